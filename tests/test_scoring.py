"""scoring.py, and evaluate.py --ref --hyp: any codec's output, scored by file names."""

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import HEARD, speech
from released_models import build

import audio
import common
import evaluate
import scoring
from metrics import PROSODY
from released import Released
from scoring import Judges, paper
from tokenizer import UnitFrontend

NAMES = ("a/one", "a/two", "three")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three recordings, and the same with half the amplitude at another rate."""
    ref, hyp = tmp_path / "ref", tmp_path / "codec"
    for i, name in enumerate(NAMES):
        wav = speech(0.6 + 0.2 * i)
        for folder, samples, rate in (
            (ref, wav, 16000),
            (hyp, audio.resample(wav, 16000, 22050) / 2, 22050),
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            audio.write(folder / f"{name}.wav", samples, rate)
    return ref, hyp


@pytest.fixture
def score(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict]:
    def run(*argv: object, ref: object = folders[0], hyp: object = folders[1]) -> dict:
        flags = ("--ref", ref, "--hyp", hyp, "--out", tmp_path / "out", "--threads", 1, *argv)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        common.run(evaluate.main)
        return json.loads((tmp_path / "out" / "scores.json").read_text())

    return run


def refusal(
    call: Callable, capsys: pytest.CaptureFixture[str], *argv: object, **dirs: object
) -> str:
    with pytest.raises(SystemExit) as e:
        call(*argv, **dirs)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_half_the_amplitude(score: Callable, tmp_path: Path) -> None:
    """6.02 dB; 0.1 for the resampling and what the DTW does."""
    found = score()
    row = {k: value for k, (value, _) in found["here"]["codec"].items()}
    assert row["Ene. RMSE"] == pytest.approx(6.02, abs=0.1)
    assert row["F0-PCC"] > 0.99
    assert row["GPE"] == 0
    assert row["duration"] == pytest.approx(1, abs=1e-3)
    assert set(row) == {*PROSODY, "duration"}
    assert found["judges"]["tracker"] == "yin"
    text = (tmp_path / "out" / "scores.md").read_text()
    assert "F0 and voicing: yin" in text
    assert "| LibriSpeech: TASLA | 6.970 | 0.870 |" in text
    with open(tmp_path / "out" / "scores.csv") as file:
        rows = [*csv.DictReader(file)]
    mine = {r["measure"]: r for r in rows if r["block"] == "here"}
    assert float(mine["F0-PCC"]["value"]) == row["F0-PCC"]
    assert {r["defined"] for r in mine.values()} == {"3"}


def test_what_is_undefined_is_said(score: Callable, folders: tuple, tmp_path: Path) -> None:
    hiss = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    audio.write(folders[0] / "three.wav", hiss, 16000)
    found = score()
    assert found["defined"]["codec"]["F0-PCC"] == 2
    assert found["here"]["codec"]["F0-PCC"][0] > 0.99  # of the other two
    for name in NAMES:
        audio.write(folders[0] / f"{name}.wav", hiss, 16000)
    found = score()
    assert found["here"]["codec"]["F0-PCC"] == [None, None]
    assert "| undefined |" in (tmp_path / "out" / "scores.md").read_text()
    assert "F0-PCC undefined for 3" in (tmp_path / "out" / "scores.md").read_text()
    assert ",F0-PCC,undefined,,0\n" in (tmp_path / "out" / "scores.csv").read_text()


def test_it_goes_on_after_an_interruption(
    score: Callable, folders: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, log = score(), tmp_path / "out" / "codec.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + lines[1][:40])  # killed while it wrote the second
    seen: list[str] = []
    real = scoring.Ears.score

    def watched(ears: scoring.Ears, ref: Path, hyp: Path, said: str) -> dict:
        seen.append(ref.stem)
        return real(ears, ref, hyp, said)

    monkeypatch.setattr(scoring.Ears, "score", watched)
    assert score() == whole
    assert len(seen) == 2
    assert sorted(log.read_text().splitlines(keepends=True)) == sorted(lines)
    seen.clear()
    assert score() == whole
    assert not seen
    audio.write(folders[1] / "three.wav", 0.1 * speech(1.0), 16000)  # other bytes
    assert score() != whole
    assert seen == ["three"]


def test_what_was_measured_before_an_error_is_kept(
    score: Callable, folders: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "three.wav").write_bytes(b"no audio")
    assert "three.wav" in refusal(score, capsys)
    assert len((tmp_path / "out" / "codec.jsonl").read_text().splitlines()) == 2


def test_several_codecs_and_missing_files(score: Callable, folders: tuple, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    audio.write(other / "three.wav", speech(1.0), 16000)
    found = score(hyp=f"{folders[1]},{other}")
    assert list(found["here"]) == ["codec", "other"]
    assert found["here"]["other"]["F0-PCC"][0] == pytest.approx(1, abs=1e-6)
    assert any("lacks 2 of 3, such as a/one" in note for note in found["notes"])


def test_words_and_voice(score: Callable, folders: tuple, tiny_bundle: Path) -> None:
    """The untrained recognizer hears HEARD, five words, whatever is said."""
    judges = ("--asr", tiny_bundle, "--speaker", tiny_bundle)
    found = score(*judges)["here"]["codec"]
    assert found["WER"][0] == 0  # against what it hears in the recording
    assert -1 <= found["Spk. Sim."][0] <= 1
    for name in NAMES:
        (folders[0] / f"{name}.txt").write_text("The dog sees.\n")
    assert score(*judges)["here"]["codec"]["WER"][0] == pytest.approx(2 / 3)
    assert HEARD == "the dog sees a bird."


def test_transcripts_of_librispeech(folders: tuple) -> None:
    ref = folders[0]
    (ref / "a" / "a.trans.txt").write_text("one HELLO THERE\ntwo YES\n")
    (ref / "three.txt").write_text("Three.")
    texts = scoring.transcripts(ref, scoring.recordings(ref))
    assert texts == {"a/one": "hello there", "a/two": "yes", "three": "Three."}


def test_opinion_scores_stand_apart(score: Callable, tmp_path: Path) -> None:
    class Loudness(torch.nn.Module):
        def forward(self, wav: torch.Tensor, rate: int) -> torch.Tensor:
            return wav.abs().max() * rate

    file = tmp_path / "mos.pt"
    torch.jit.script(Loudness()).save(str(file))
    command = f"{sys.executable} -c \"print('MOS', 3.5)\""
    found = score("--utmos22", file, "--utmosv2", command)["here"]["codec"]
    assert found["UTMOSv2"] == [3.5, 0]
    assert found["UTMOS22"][0] > 1000


def test_refusals(
    score: Callable, folders: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "none of its 0 recordings" in refusal(score, capsys, hyp=empty)
    assert "no such folder" in refusal(score, capsys, hyp=tmp_path / "nowhere")
    assert "go together" in refusal(score, capsys, ref=".", hyp=folders[1])
    assert "equal names" in refusal(score, capsys, hyp=f"{folders[1]},{folders[1]}")
    assert "wanted a number" in refusal(score, capsys, "--utmosv2", "echo")
    audio.write(folders[1] / "x.wav", speech(0.5), 16000)
    (folders[1] / "x.wav").rename(folders[1] / "three.ogg")
    assert "three.ogg" in refusal(score, capsys)


def test_the_papers_values() -> None:
    rows = paper()
    assert len(rows) == 12 + 6 + 1
    assert rows["VoxCeleb: TASTE"]["Phr. Cos."][0] == 0.93
    assert rows["Expresso: text-only"]["Phr. L2"][0] == 11.77
    assert rows["LibriSpeech: TASLA"]["WER"][0] == 0.12
    assert rows["LibriSpeech: BigCodec, 1040 bit/s"]["Spk. Sim."][0] == 1.0
    assert all(math.isnan(error) for row in rows.values() for _, error in row.values())


@pytest.mark.parametrize("seconds", [2.0, 33.0])  # one piece, and two
def test_a_public_whisper_hears_as_the_released_system(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = build()
    parts = {"encoder": models.asr_encoder, "decoder": models.asr_decoder}
    monkeypatch.setattr(scoring, "open_public", lambda path, dtype: dict(parts))
    monkeypatch.setattr(scoring.text, "load_tokenizer", lambda path: models.asr_tokens)
    wav = speech(seconds)
    heard = scoring.whisper(tmp_path)(wav)
    assert heard == Released(models, faithful=False).transcribe(wav)
    del parts["decoder"]
    with pytest.raises(ValueError, match=r"lacks \['decoder'\]"):
        scoring.whisper(tmp_path)


def test_a_public_speaker_model(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as a file of their own and as part of a bundle."""
    frontend, wav = UnitFrontend(tiny_bundle), speech(1.0)
    monkeypatch.setattr(scoring, "open_public", lambda path, dtype: {"speaker": frontend.speaker})
    voice = scoring.Ears(Judges(speaker=Path("campplus.bin"))).voice(wav)
    bundled = scoring.Ears(Judges(speaker=tiny_bundle)).voice(wav)
    torch.testing.assert_close(voice, bundled)
    monkeypatch.setattr(scoring, "open_public", lambda path, dtype: {"llm": frontend.speaker})
    with pytest.raises(ValueError, match="wanted a CAM"):
        scoring.Ears(Judges(speaker=Path("llama"))).voice(wav)


def test_judges_are_named() -> None:
    told = " ".join(Judges("crepe", asr=Path("w"), speaker=Path("s"), utmosv2="cmd").describe())
    for word in ("crepe", "WER: by w, basic rules", "CAM++ of s", "UTMOSv2: cmd"):
        assert word in told
    with pytest.raises(ValueError, match="tracker 'praat'"):
        scoring.Ears(Judges("praat"))
