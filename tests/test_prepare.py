"""prepare.py and shards.py: what is kept, what is left out, what a killed run leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, script, speech

import audio
import common
import prepare
import shards
from data import librispeech
from shards import Shards, open_frontend, shard_batch

TEXTS = ["THE DOG SEES A BIRD", "A BIRD", "IT IS SO", "THE BIRD SEES THE DOG", "SO IT IS", "A DOG"]


@pytest.fixture
def spoken(tmp_path: Path) -> Path:
    """Six utterances as LibriSpeech stores them."""
    folder = tmp_path / "speech" / "19" / "198"
    folder.mkdir(parents=True)
    for i in range(len(TEXTS)):
        soundfile.write(folder / f"19-198-{i:04d}.flac", speech(0.6 + 0.2 * i).numpy(), 16000)
    lines = [f"19-198-{i:04d} {text}" for i, text in enumerate(TEXTS)]
    (folder / "19-198.trans.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "speech"


def flags(spoken: Path, bundle: Path, out: Path, *more: object) -> list[str]:
    given = ["--corpus", "librispeech", "--data", spoken, "--bundle", bundle, "--out", out]
    return [str(x) for x in (*given, "--per-shard", 2, "--device", "cpu", *more)]


def exit_code(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *argv])
    try:
        common.run(prepare.main)
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.mark.parametrize("when", ["save shard-00000.safetensors", "save shard-00001.safetensors",
                                  "save report.json"])  # fmt: skip
def test_killed_and_run_again_gives_the_same_bytes(
    when: str, spoken: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (spoken / "19/198/19-198-0001.flac").write_bytes(b"no sound" * 100)
    assert exit_code(flags(spoken, tiny_bundle, tmp_path / "whole"), monkeypatch) == 3
    argv = flags(spoken, tiny_bundle, tmp_path / "killed")
    done = script(tmp_path / "cache", "prepare.py", *argv, when=when)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "killed" / "report.json").exists()
    with pytest.raises(FileNotFoundError, match=r"run prepare\.py to the end"):
        Shards(tmp_path / "killed", tiny_bundle)
    assert exit_code(argv, monkeypatch) == 3
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert {"shard-00002.safetensors", "manifest.json"} < files(tmp_path / "whole").keys()


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(
    spoken: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken, cut, gone, long = ((spoken / "19/198" / f"19-198-000{i}.flac") for i in (0, 1, 3, 4))
    broken.write_bytes(b"no sound" * 100)
    cut.write_bytes(cut.read_bytes()[:2000])
    gone.unlink()
    soundfile.write(long, speech(31).numpy(), 16000)
    assert exit_code(flags(spoken, tiny_bundle, tmp_path / "out"), monkeypatch) == 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {row["key"]: row["reason"] for row in report["skipped"]}
    assert sorted(reasons) == [f"19-198-000{i}" for i in (0, 1, 3, 4)]
    assert all(str(path) in reasons[path.stem] for path in (broken, cut, gone))
    assert "not audio that can be read" in reasons[broken.stem]
    assert "no such audio file" in reasons[gone.stem]
    assert reasons[long.stem] == "31.0 s long, the encoder hears 30 s"
    shown = capsys.readouterr().err
    assert f"left out {broken.stem}" in shown
    assert "4 left out" in shown
    store = Shards(tmp_path / "out", tiny_bundle)
    assert [row["key"] for row in store.utterances()] == ["19-198-0002", "19-198-0005"]
    assert len(store) == 2 == report["kept"]


def test_shards_hold_what_the_frontend_finds(
    spoken: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mels or states: the same batch, but for the rounding to fp16."""
    for store in ("mel", "states"):
        more = ("--store", store, "--layers", "1,3")
        assert exit_code(flags(spoken, tiny_bundle, tmp_path / store, *more), monkeypatch) == 0
    frontend = open_frontend(tiny_bundle)
    mel, states = (Shards(tmp_path / store, tiny_bundle) for store in ("mel", "states"))
    wavs = [item.wav(16000) for item in librispeech(spoken)]
    assert mel.frames().tolist() == [4 * -(-len(wav) // 160 // 4) for wav in wavs]
    for i in (0, 5):
        found = frontend.features(wavs[i])
        assert torch.equal(mel.get("units", i).long(), found["units"])
        assert torch.equal(states.get("voice", i), found["voice"])
        assert torch.equal(mel.get("mel", i), found["mel"].half())
    device, rows = torch.device("cpu"), [4, 0, 3]
    a = shard_batch(mel, rows, (1, 3), frontend, device)
    b = shard_batch(states, rows, (1, 3), None, device)
    assert a.keep is not None
    assert b.keep is not None
    assert torch.equal(a.keep, b.keep)
    assert torch.equal(a.ids, b.ids)
    assert a.units.shape == b.units.shape == (3, int(mel.lengths("units")[4]))
    for x, y in [(a.last, b.last), *((a.taps[k], b.taps[k]) for k in (1, 3))]:
        torch.testing.assert_close(x[a.keep], y[a.keep], rtol=0.02, atol=0.02)
    wide = shard_batch(states, rows, (1,), None, device, multiple=64)
    assert {x.shape[1] % 64 for x in (wide.ids, wide.last, wide.units, wide.taps[1])} == {0}
    assert (wide.units[:, b.units.shape[1] :] == -1).all()
    assert wide.keep is not None
    assert not wide.keep[:, b.keep.shape[1] :].any()
    with pytest.raises(ValueError, match=r"lacks \['tap.2'\]"):
        shards.check_layers(states, (1, 2))


def test_a_window_is_filled_with_silence(tiny_bundle: Path) -> None:
    """Public Whisper models want 30 s of log-mel: that of a wav with zeros behind it."""
    frontend = open_frontend(tiny_bundle)
    frontend.window = 400
    wav = speech(1.5)
    wav[-4000:] = 0  # at the cut itself the two windows differ
    mel, whole = audio.whisper_mel(wav, 80), audio.whisper_mel(wav, 80, pad_s=4.0)
    keep = torch.ones(1, mel.shape[1], dtype=torch.bool)
    last, taps, kept = frontend.hear(mel[None], keep, (2,))
    theirs, their_taps = frontend.encoder(whole[None], taps=(2,))
    n = kept.shape[1]
    assert n == last.shape[1] == -(-150 // 4)
    torch.testing.assert_close(last, theirs[:, :n], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taps[2], their_taps[2][:, :n], rtol=1e-4, atol=1e-4)


def test_stale_features_are_refused(
    spoken: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, other = tmp_path / "out", tmp_path / "bundle"
    assert exit_code(flags(spoken, tiny_bundle, out), monkeypatch) == 0
    shutil.copytree(tiny_bundle, other)
    path = other / "s3" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"stale, made by other models than .* \(s3\)"):
        Shards(out, other)
    assert exit_code(flags(spoken, other, out), monkeypatch) == 2
    assert "features that differ in models" in capsys.readouterr().err
    assert exit_code(flags(spoken, tiny_bundle, out, "--store", "states"), monkeypatch) == 2
    shutil.rmtree(other / "lm")  # of the LM nothing but its tokenizer matters, if it is there
    shutil.copytree(tiny_bundle / "s3", other / "s3", dirs_exist_ok=True)
    assert len(Shards(out, other)) == len(TEXTS)


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_shard_is_named(
    harm: str, spoken: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(flags(spoken, tiny_bundle, tmp_path / "out"), monkeypatch) == 0
    path = tmp_path / "out" / "shard-00001.safetensors"
    os.truncate(path, 1000) if harm == "cut" else path.unlink()
    with pytest.raises(ValueError, match=f"{path}: missing or damaged"):
        Shards(tmp_path / "out", tiny_bundle)


def test_few_shards_are_open_at_a_time(
    spoken: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(flags(spoken, tiny_bundle, tmp_path / "out"), monkeypatch) == 0
    whole = Shards(tmp_path / "out", tiny_bundle)
    monkeypatch.setattr(shards, "MAX_OPEN", 1)
    store = Shards(tmp_path / "out", tiny_bundle)
    for i in (5, 0, 3, 1, 4, 2):
        assert torch.equal(store.get("mel", i), whole.get("mel", i))
        assert len(store.mapped) == 1


def test_two_processes_write_the_same_bytes(
    spoken: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_code(flags(spoken, tiny_bundle, tmp_path / "one"), monkeypatch) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               "prepare.py", *flags(spoken, tiny_bundle, tmp_path / "two")]  # fmt: skip
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data", "nowhere"), "wanted a LibriSpeech folder"),
        (("--per-shard", 0), "--per-shard 0"),
        (("--store", "states", "--layers", "9"), "'9' is none of 0 .. 4"),
        (("--store", "states", "--layers", "one"), "--layers one"),
        (("--bundle", "nowhere"), "nowhere"),
    ],
)
def test_bad_flags(
    argv: tuple[object, ...],
    message: str,
    spoken: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(flags(spoken, tiny_bundle, tmp_path / "out", *argv), monkeypatch) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
