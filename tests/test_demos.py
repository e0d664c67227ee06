"""Every demo at the foot of a file runs, and every script shows its flags and refuses others."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import FILES, ROOT, ROW, STAGES

DEMO = 'if __name__ == "__main__":'
SCRIPT = ROW["train_tokenizer"]
DEMOS = [
    p
    for p in FILES
    if ROW.get(p.stem, 0) < SCRIPT and DEMO in p.read_text() and p.stem not in ("synth", "public")
]
SCRIPTS = [p for p in FILES if ROW.get(p.stem, 0) >= SCRIPT]


def run(path: Path, *argv: str) -> None:
    """`python path argv` without the seconds that a new process needs to import torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *argv])
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_demo(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(path)
    shown = capsys.readouterr()
    assert any(c.isdigit() for c in shown.out)
    assert not shown.err


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_short_demo(name: str) -> None:
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert DEMO in lines
    assert len(lines) - lines.index(DEMO) <= 14


def test_demo_of_the_corpus_in_a_process_of_its_own(tmp_path: Path) -> None:
    """On copies of the files, because the corpus is kept beside them."""
    pytest.importorskip("espeakng_loader")
    for path in FILES:
        shutil.copy(path, tmp_path)
    command = [sys.executable, str(tmp_path / "synth.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "audio (" in done.stdout
    assert (tmp_path / ".cache").is_dir()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_show_their_flags(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        run(path, "--help")
    assert e.value.code == 0
    shown = capsys.readouterr().out
    assert "--preset" in shown
    assert "default:" in shown


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_refuse_a_misspelt_flag(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        run(path, "--thread", "1")
    assert e.value.code == 2
    assert "unrecognized arguments: --thread" in capsys.readouterr().err
