"""The training scripts, six steps each on a small corpus: killed and resumed, the same bytes."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import script
from torch import nn

import audio
import common
import loop
import prepare
import synth
import train_lm
import train_tiny
import train_tokenizer
import train_unit_lm
from data import Item
from s3_units import TINY as S3
from tokenizer import Frontend, load_tokenizer
from unit_lm import load_unit_lm
from vocoder import load_vocoder
from weights import read_tensors

SMALL = ("--utterances", 30, "--batch", 4, "--threads", 1, "--save-every", 2, "--device", "cpu")
TOKENIZER = (*SMALL, "--text-steps", 2, "--steps", 4, "--warmup", 1)
LM = (*SMALL, "--steps", 6, "--warmup", 1)
SCRIPTS: dict[str, Any] = {
    "train_tokenizer": train_tokenizer, "train_lm": train_lm, "train_unit_lm": train_unit_lm
}  # fmt: skip


def here(name: str, *argv: object) -> None:
    """The script in this process."""
    module = SCRIPTS[name]
    module.train(common.parse(module.Config, module.PRESETS, "", [*map(str, argv)]))


def equal(a: Path, b: Path) -> bool:
    theirs, ours = (read_tensors(path / "model.safetensors") for path in (a, b))
    same = {k: torch.equal(theirs[k], ours[k]) for k in theirs}
    return theirs.keys() == ours.keys() and all(same.values())


@pytest.mark.parametrize(
    ("name", "flags", "when"),
    [
        ("train_tokenizer", ("--quantizer", "fsq", *TOKENIZER), "step 5"),
        ("train_tokenizer", ("--quantizer", "rvq", "--aggregator", "xattn", *TOKENIZER), "save 4"),
        ("train_lm", LM, "step 5"),
        ("train_unit_lm", LM, "step 5"),
    ],
    ids=["fsq", "rvq", "lm", "unit_lm"],
)
def test_killed_and_resumed_gives_the_same_bytes(
    name: str,
    flags: tuple[object, ...],
    when: str,
    tiny_bundle: Path,
    small_corpus: Path,
    tmp_path: Path,
) -> None:
    flags = (*flags, "--bundle", tiny_bundle)
    if name == "train_lm":
        flags = (*flags, "--tokenizer", tiny_bundle / "tokenizer")
    here(name, *flags, "--out", tmp_path / "whole")
    killed = (*flags, "--out", tmp_path / "killed")
    when = when.replace("save 4", "save step_000004")
    done = script(small_corpus, f"{name}.py", *killed, when=when)
    assert done.returncode == -9, done.stderr
    kept = sorted(p.name for p in (tmp_path / "killed").glob("step_*"))
    assert kept == (["step_000002"] if "save" in when else ["step_000002", "step_000004"])
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    here(name, *killed, "--resume")
    assert equal(tmp_path / "whole", tmp_path / "killed")


# --- several processes ---------------------------------------------------------------------------


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("train_tokenizer", ()),
        ("train_lm", ("--shard", "--mfu")),
        ("train_lm", ()),
        pytest.param("train_lm", ("--shard", "--recompute"), marks=pytest.mark.slow),
        pytest.param("train_unit_lm", (), marks=pytest.mark.slow),
    ],
)
def test_two_processes_are_one_and_resume_exactly(
    name: str, together: tuple[str, ...], tiny_bundle: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """Also after process 1 was killed, which ends process 0 with a message: at step 6, because at
    step 5 process 0 may still be writing what step 4 left."""
    flags: list[object] = [
        *(TOKENIZER if name == "train_tokenizer" else LM),
        "--bundle",
        tiny_bundle,
    ]
    flags += ["--micro", 2, "--log-every", 1]
    if name == "train_lm":
        flags += ["--tokenizer", tiny_bundle / "tokenizer"]
    here(name, *flags, "--out", tmp_path / "one")
    alone = (*flags, "--out", tmp_path / "alone", "--resume")
    flags += together
    two = (*flags, "--out", tmp_path / "two")
    done = script(small_corpus, f"{name}.py", *two, when="step 6 of process 1", processes=2)
    assert done.returncode != 0
    assert "go on with --resume" in done.stderr
    kept = sorted(p.name for p in (tmp_path / "two").glob("step_*"))
    assert kept == ["step_000002", "step_000004"]
    shutil.copytree(tmp_path / "two", tmp_path / "alone")
    here(name, *alone)  # one process goes on where two were
    assert losses(tmp_path / "alone")[-2:] == pytest.approx(losses(tmp_path / "one")[-2:], rel=1e-5)
    done = script(small_corpus, f"{name}.py", *two, "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    whole = (*flags, "--out", tmp_path / "whole")
    done = script(small_corpus, f"{name}.py", *whole, processes=2)
    assert done.returncode == 0, done.stderr
    assert equal(tmp_path / "two", tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "whole" / "curve.png").exists()


class Meaning(nn.Module):
    """Losses are the mean of what is read; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, read: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(text_ce=read.mean(), code_loss=self.one * read.mean())


def test_every_process_evaluates_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """17 items, 8 at once: process 0 reads 8 + 1 of them, process 1 reads 8 + 1 for nothing."""
    read = SimpleNamespace(codes=range(17), batch=lambda i: (torch.tensor([*i]).float() + 1,))
    sums: list[dict[str, torch.Tensor]] = []

    def total(values: dict[str, torch.Tensor], world: int) -> dict[str, float]:
        sums.append(values)
        return {"text": 0.0, "code": 0.0, "n": 1.0}

    monkeypatch.setattr(loop, "total", total)
    models = [Meaning(), Meaning()]
    for rank, model in enumerate(models):
        train_lm.evaluate(model, read, rank, 2)  # type: ignore[arg-type]
    assert [model.calls for model in models] == [2, 2]
    assert [s["n"] for s in sums] == [9, 8]
    assert sum(s["text"] for s in sums) == sum(s["code"] for s in sums) == 17 * 18 / 2


def test_what_only_processes_can_split(refused: Callable, tiny_bundle: Path) -> None:
    flags = ("--tokenizer", tiny_bundle / "tokenizer", "--shard")
    assert "torchrun --nproc-per-node 2" in refused("train_lm", *flags)


def test_micro_batches_that_cannot_be_shared_out(refused: Callable, monkeypatch: Any) -> None:
    monkeypatch.setattr(train_tokenizer, "setup", lambda device: (0, 2, torch.device("cpu")))
    assert "--micro 3: wanted a multiple of the 2" in refused("train_tokenizer", "--micro", 3)


# --- prepared features ---------------------------------------------------------------------------


@pytest.fixture
def features(
    tiny_bundle: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """prepare.py in this process -> the folder."""

    def make(name: str, *argv: object) -> Path:
        flags = ["--bundle", tiny_bundle, "--utterances", 30, "--out", tmp_path / name, *argv]
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--device", "cpu", *map(str, flags)])
        prepare.main()
        return tmp_path / name

    return make


def test_training_on_prepared_features(
    features: Callable[..., Path], tiny_bundle: Path, tmp_path: Path, refused: Callable
) -> None:
    """Tokenizer, its codes, the spoken LM on them; killed by losing the last checkpoint."""
    states = [features(x, "--data", x, "--store", "states", "--per-shard", 7)
              for x in ("train", "dev")]  # fmt: skip
    data = ("--data", states[0], "--dev", states[1], "--bundle", tiny_bundle, "--log-every", 1)
    steps = ("--threads", 1, "--device", "cpu", "--warmup", 1, "--micro", 2, "--save-every", 1)
    flags = [*data, *steps, "--text-steps", 1, "--continuous-steps", 1, "--steps", 2]
    flags += ["--frames", 1500, "--ahead", 2, "--eval-every", 1, "--recompute", "--mfu"]
    out = tmp_path / "tok"
    here("train_tokenizer", *flags, "--out", out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "dev_accuracy" in row] == [1, 2, 3, 4]
    assert {"loss", "norm", "lr", "units_s", "memory_gb", "mfu"} < rows[0].keys()
    assert load_tokenizer(out / "best").config == load_tokenizer(out).config
    first = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "step_000004")
    here("train_tokenizer", *flags, "--out", out, "--resume")
    assert (out / "model.safetensors").read_bytes() == first
    here("train_unit_lm", *data, *steps, "--steps", 2, "--batch", 4, "--ahead", 2, "--mfu",
         "--eval-every", 1, "--out", tmp_path / "units")  # fmt: skip
    rows = [json.loads(x) for x in (tmp_path / "units" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "dev_nll" in row] == [1, 2]
    assert load_unit_lm(tmp_path / "units").eos == S3.codes
    codes = [features(f"codes_{x}", "--corpus", "features", "--data", folder, "--tokenizer", out)
             for x, folder in zip(("train", "dev"), states, strict=True)]  # fmt: skip
    lm = ["--data", codes[0], "--dev", codes[1], "--bundle", tiny_bundle, *steps]
    lm += ["--steps", 2, "--pairs", 0, "--batch", 4, "--ahead", 2, "--out", tmp_path / "lm"]
    assert "made by other models" in refused(
        "train_lm", *lm, "--tokenizer", tiny_bundle / "tokenizer", "--out", tmp_path / "no"
    )
    assert "lacks ['codes'" in refused(
        "train_lm", *lm, "--tokenizer", out, "--data", states[0], "--out", tmp_path / "no"
    )
    here("train_lm", *lm, "--tokenizer", out)
    first = (tmp_path / "lm" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "lm" / "step_000002")
    here("train_lm", *lm, "--tokenizer", out, "--resume")
    assert (tmp_path / "lm" / "model.safetensors").read_bytes() == first


def test_each_stage_killed_and_resumed(
    tiny_bundle: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train_tiny.py, which goes on by itself. S3 units keep a codebook that is no parameter."""
    flags = ["--only", "s3", "--scale", "0.0012", "--save-every", "2", "--utterances", "30"]
    flags += ["--threads", "1", "--device", "cpu"]
    for way in ("whole", "killed"):
        shutil.copytree(tiny_bundle / "asr", tmp_path / way / "asr")
    ways = {w: [*flags, "--out", str(tmp_path / w), "--runs", str(tmp_path / f"{w}_runs")]
            for w in ("whole", "killed")}  # fmt: skip
    done = script(small_corpus, "train_tiny.py", *ways["killed"], when="step 5")
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "killed" / "s3").exists()
    for way in ("whole", "killed"):
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", *ways[way]])
        train_tiny.main()
    assert equal(tmp_path / "whole" / "s3", tmp_path / "killed" / "s3")


def test_a_whole_bundle_from_nothing(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of every stage of train_tiny.py give folders that open; mu then no longer moves."""
    out, runs = tmp_path / "bundle", tmp_path / "runs"
    flags = ["--out", str(out), "--runs", str(runs), "--scale", "0", "--threads", "1"]
    flags += ["--utterances", "30", "--save-every", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *flags])
    train_tiny.main()
    wav = synth.load().audio(synth.load().utterances[0])
    heard = Frontend(out).features(audio.resample(wav, synth.SAMPLE_RATE, audio.WHISPER_RATE))
    assert len(load_vocoder(out)(heard["units"], heard["voice"][0])) > 0
    first, last = (
        read_tensors(runs / "flow" / f"step_00000{n}" / "model.safetensors") for n in (1, 2)
    )
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"speaker", "estimator"}


def test_what_follows_has_the_voice_and_the_manner() -> None:
    """Three voices, each calm in one half, lively in the other: 40 draws never cross."""
    items = [Item(str(i), "", f"m{i % 3}", lambda: (torch.zeros(1), 1)) for i in range(240)]
    manner = torch.where(torch.arange(240)[:, None] % 2 == 0, -1.0, 1.0) + torch.randn(240, 3) / 10
    voices = {f"m{k}": torch.arange(k, 240, 3) for k in range(3)}
    data = train_lm.Data(items, None, voices, manner, None)  # type: ignore[arg-type]
    found = [(i, train_lm.next_said(data, i)) for i in range(40)]
    assert all(i != j and i % 6 == j % 6 for i, j in found)


def test_what_was_trained_can_be_loaded_and_started_from(
    tiny_bundle: Path, small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*TOKENIZER, "--bundle", tiny_bundle)
    here("train_tokenizer", *flags, "--text-only", "--out", tmp_path / "text")
    assert "unit accuracy on held-out sentences, text-only" in capsys.readouterr().out
    start = load_tokenizer(tmp_path / "text").unit_decoder.state_dict()
    here("train_tokenizer", *flags, "--init", tmp_path / "text", "--out", tmp_path / "all")
    after = load_tokenizer(tmp_path / "all").unit_decoder.state_dict()
    assert len((tmp_path / "all" / "log.jsonl").read_text().splitlines()) == 2  # 4 steps, accuracy
    assert all((after[k] - start[k]).abs().max() < 0.05 for k in start)  # it began there
    here("train_lm", *LM, "--bundle", tiny_bundle, "--tokenizer", tmp_path / "all",
         "--out", tmp_path / "lm")  # fmt: skip
    assert "nats per code: uniform 2.079" in capsys.readouterr().out


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def refused(
    tiny_bundle: Path, small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The one line with which a script ends."""

    def run(name: str, *argv: object) -> str:
        flags = (*(TOKENIZER if name == "train_tokenizer" else LM), "--bundle", tiny_bundle)
        flags = (*flags, "--out", tmp_path / "run", *argv)
        with pytest.raises(SystemExit) as e:
            common.run(lambda: here(name, *flags))
        assert e.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line

    return run


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (("--resume",), "nothing to resume"),
        (("--batch", 0), "--batch 0"),
        (("--utterances", 0), "--utterances 0"),
        (("--bundle", "none"), "none/"),
        (("--steps", "many"), "--steps"),
        (("--device", "gpu"), "--device gpu"),
    ],
)
def test_bad_flags(
    name: str, argv: tuple[object, ...], fragment: str, refused: Callable, tiny_bundle: Path
) -> None:
    if name == "train_lm":
        argv = ("--tokenizer", tiny_bundle / "tokenizer", *argv)
    assert fragment in refused(name, *argv)


def test_flags_that_no_unit_lm_can_have(refused: Callable, tiny_bundle: Path) -> None:
    assert "--width 100: wanted a multiple of 64" in refused("train_unit_lm", "--width", 100)
    data = ("--data", tiny_bundle, "--dev", tiny_bundle, "--frames", 100)
    assert "--frames are for mels" in refused("train_unit_lm", *data)


def test_an_lm_needs_codes(refused: Callable, tmp_path: Path) -> None:
    assert str(tmp_path) in refused("train_lm", "--tokenizer", tmp_path)


@pytest.fixture
def interrupted(tiny_bundle: Path, small_corpus: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a run of two steps."""
    flags = (*TOKENIZER, "--steps", 0, "--bundle", tiny_bundle, "--out", tmp_path / "run")
    here("train_tokenizer", *flags)
    return tmp_path / "run" / "step_000002"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "meta.json"])
def test_a_damaged_checkpoint(file: str, interrupted: Path, refused: Callable) -> None:
    data = (interrupted / file).read_bytes()
    (interrupted / file).write_bytes(data[: len(data) // 2])
    assert file in refused("train_tokenizer", "--resume")


def test_a_checkpoint_of_another_model(interrupted: Path, refused: Callable) -> None:
    assert "problems" in refused("train_tokenizer", "--resume", "--quantizer", "rvq")


def test_without_espeak_there_is_no_corpus(
    refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(synth, "CACHE", tmp_path / "empty")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "espeak" in name else find(name)
    )
    assert "pip install espeakng-loader" in refused("train_tokenizer")


def test_without_espeak_in_a_real_process(tiny_bundle: Path, tmp_path: Path) -> None:
    flags = (*TOKENIZER, "--bundle", tiny_bundle, "--out", tmp_path / "run")
    done = script(tmp_path / "cache", "train_tokenizer.py", *flags, when="no espeak")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the built-in corpus needs espeak-ng")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_rvq"])
def test_codes_are_kept(folder: str, tiny_bundle: Path, small_corpus: Path, tmp_path: Path) -> None:
    """--codes: only the unit decoder learns; RVQ's moving averages stay where they are, too."""
    start, out = tiny_bundle / folder, tmp_path / "run"
    flags = (*SMALL, "--bundle", tiny_bundle, "--codes", start, "--eval-every", 1)
    here("train_tokenizer", *flags, "--steps", 3, "--out", out)
    before, after = (read_tensors(path / "model.safetensors") for path in (start, out))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"unit_decoder"}
    kept = train_tokenizer.Config(codes=start, aggregator="mlda" if "rvq" in folder else "xattn")
    assert (
        train_tokenizer.value_layers(kept, 4)
        == load_tokenizer(start).config.aggregator.value_layers
    )
    with pytest.raises(ValueError, match=r"--codes .*: without --init"):
        here("train_tokenizer", *flags, "--text-only", "--out", tmp_path / "other")


def test_history_is_hidden_in_stretches_in_a_share_of_the_items() -> None:
    torch.manual_seed(0)
    units = torch.zeros(4000, 100, dtype=torch.long)
    assert train_tokenizer.hide_history(units, 0) is None
    keep = train_tokenizer.hide_history(units, 0.5)
    assert keep is not None
    assert keep.shape == units.shape
    lost = (~keep).float().mean(1)  # (B,)
    assert 0.45 < (lost > 0).float().mean() < 0.52
    assert 0.08 < (lost == 1).float().mean() < 0.13  # a fifth of them altogether
    part = keep[(lost > 0.3) & (lost < 0.7)]
    assert (part[:, 1:] != part[:, :-1]).float().mean() < 0.2  # unit by unit: 0.5
    for at in (0, 1, 50, 99):  # no position is special
        assert 0.66 < keep[:, at].float().mean() < 0.74
