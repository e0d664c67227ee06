"""common.py: the command line, exit codes, seeds, schedule, log; every message."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
from common import flag


@dataclass(frozen=True)
class Script:
    wav: Path = flag(Path("in.wav"), "recording")
    steps: int = flag(10, "steps, 100 % of them")
    batch_size: int = flag(4, "utterances per step")
    lr: float = flag(0.5, "peak")
    kind: str = flag("fsq", "quantizer", choices=("fsq", "rvq"))
    resume: bool = flag(False, "go on")


PRESETS = {"tiny": {"steps": 20}, "large": {"steps": 30, "batch_size": 8, "resume": True}}


def parse(*argv: str) -> Script:
    return common.parse(Script, PRESETS, "A script.", list(argv))


# --- command line --------------------------------------------------------------------------------


def test_later_wins_field_then_preset_then_flag() -> None:
    assert parse() == Script(steps=20)
    assert parse("--preset", "large") == Script(steps=30, batch_size=8, resume=True)
    got = parse("--preset", "large", "--steps", "3", "--no-resume")
    assert got == Script(steps=3, batch_size=8, resume=False)
    assert parse("--steps", "3", "--preset", "large").steps == 3  # wherever the preset stands


def test_types_and_spelling_of_flags() -> None:
    got = parse("--batch-size", "7", "--lr", "1e-3", "--kind", "rvq", "--resume", "a b.wav")
    assert got == Script(Path("a b.wav"), 20, 7, 1e-3, "rvq", True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--step", "3"], "unrecognized arguments: --step"),  # no abbreviations
        (["--batch_size", "3"], "unrecognized arguments: --batch_size"),
        (["--steps", "3.5"], "invalid int value: '3.5'"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--kind", "vq"], "invalid choice: 'vq'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--steps"], "expected one argument"),
        (["one.wav", "two.wav"], "unrecognized arguments: two.wav"),
    ],
)
def test_bad_flags_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        parse(*argv)
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_help_names_flags_defaults_and_a_percent_sign(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        parse("--help")
    assert e.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A script." in shown
    assert "steps, 100 % of them (default: 10)" in shown
    assert "{fsq,rvq}" in shown
    assert "--no-resume" in shown


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_run_turns_user_errors_into_one_line(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error("a.wav: silent")

    with pytest.raises(SystemExit) as e:
        common.run(main)
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: a.wav: silent\n"


def test_run_ends_an_interrupted_script_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        common.run(main)
    assert e.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_run_names_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    torch._dynamo.reset()
    with pytest.raises(SystemExit) as e:
        common.run(lambda: torch.compile(lambda x: x.sin() + 1)(torch.ones(3)))
    assert e.value.code == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: --compile needs a C++ compiler")


def test_run_lets_our_own_mistakes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: print(1 / 0))
    common.run(lambda: None)


# --- devices -------------------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert common.setup("cpu") == (0, 1, torch.device("cpu"))
    assert common.pick_device("auto").type in ("cpu", "cuda")
    common.finish()  # no group: nothing to leave


@pytest.mark.parametrize("name", ["gpu", "cuda:77", ""])
def test_a_device_that_is_not_here(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name}: not usable on this machine"):
        common.pick_device(name)


# --- seeds, schedule, log ------------------------------------------------------------------------


def test_seed_step_is_a_function_of_seed_step_rank() -> None:
    def draw(*key: int) -> float:
        common.seed_step(*key)
        return float(torch.rand(()))

    keys = [(0, 1, 0, 1), (0, 2, 0, 1), (1, 1, 0, 1), (0, 1, 0, 2), (0, 1, 1, 2)]
    first = [draw(*key) for key in keys]
    assert [draw(*key) for key in reversed(keys)] == first[::-1]
    pairs = [draw(0, step, rank, 2) for step in range(1, 5) for rank in range(2)]
    assert len(set(pairs)) == 8


def test_cosine() -> None:
    rates = [common.cosine(step, 100, 2.0, 10) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(2.0 * (0.03 + 0.97 / 2))  # half way down
    assert rates[-1] == pytest.approx(2.0 * 0.03)
    assert common.cosine(7, 7, 1.0, 7) == 1.0  # nothing but warm-up
    assert common.cosine(5, 5, 1.0, 0, floor=0.5) == pytest.approx(0.5)


def test_log_writes_a_line_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = common.Log(tmp_path / "new" / "run", "asr", steps=100)
    log.row(50, loss=torch.tensor(0.5), lr=1e-3)
    log.row(100, dev_wer=0.25)
    rows = [json.loads(line) for line in (log.run / "log.jsonl").read_text().splitlines()]
    assert [row.pop("seconds") >= 0 for row in rows] == [True, True]
    assert rows == [{"step": 50, "loss": 0.5, "lr": 1e-3}, {"step": 100, "dev_wer": 0.25}]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("asr 50/100 | loss 0.5 | lr 0.001 | ")
    assert shown[1] == "asr 100/100 | dev_wer 0.25 | 0:00 left"


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_if_it_is_there(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here with a stand-in for torch's writer."""
    written = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, *row: object) -> None:
            written.append((self.folder, *row))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    stand_in = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    common.Log(tmp_path, "lm", 10, board=True).row(3, loss=torch.tensor(0.5), lr=0.1)
    common.Log(tmp_path, "lm", 10, board=True, quiet=True).row(4, loss=1.0)
    common.Log(tmp_path, "lm", 10).row(5, loss=1.0)
    expected = [(str(tmp_path), "loss", 0.5, 3), (str(tmp_path), "lr", 0.1, 3)]
    assert written == (expected if installed else [])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # not the quiet one


def test_a_process_that_is_stopped_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.dist.is_initialized", lambda: True)

    def lost() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7")

    def ours() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    for main in (lost, lambda: common.stopped(15, None)):
        with pytest.raises(SystemExit) as e:
            common.run(main)
        assert e.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert line.endswith("go on with --resume")
    with pytest.raises(RuntimeError, match="mat1"):
        common.run(ours)


def test_time_left_counts_from_the_resumed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([1000.0, 1060.0])
    monkeypatch.setattr("common.time.monotonic", lambda: next(now))
    common.Log(tmp_path, "lm", steps=100, first=80).row(90, loss=1.0)  # 10 steps took a minute
    assert capsys.readouterr().out.endswith("1:00 left\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (59.9, "0:59"), (6000, "100:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert common.clock(seconds) == text
