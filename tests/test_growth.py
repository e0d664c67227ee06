"""growth.py: what it counts, and its tables; the times themselves are not looked at."""

import json
import sys
from pathlib import Path

import pytest
import torch

import bench_case
import common
import growth


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["growth.py", "--threads", "1", *map(str, argv)])
    common.run(growth.main)


def test_powers_are_the_slopes_of_a_double_logarithmic_picture() -> None:
    rows: list[growth.Row] = [{"n": n, "a, s": 3.0 * n, "b, s": 0.5 * n * n} for n in (1, 2, 8)]
    first, second, third = growth.powers(rows, "n")
    assert "a power" not in first
    for row in (second, third):
        assert row["a power"] == pytest.approx(1)
        assert row["b power"] == pytest.approx(2)


def test_memory_is_what_a_call_takes_beside_what_was_there() -> None:
    if not bench_case.FORGET.exists():
        pytest.skip("this system does not say")
    kept = torch.ones(10**7)
    _, memory = growth.measure(lambda: torch.ones(5 * 10**7).sum(), torch.device("cpu"), 1)
    assert len(kept) == 10**7
    assert 150 < memory < 300  # 200 MB


def test_tables_and_picture(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "SECONDS", (1, 2))
    monkeypatch.setattr(growth, "WORDS", (1, 2))
    monkeypatch.setattr(growth, "BATCH", (1, 3))
    call(monkeypatch, "--bundle", tiny_bundle, "--out", tmp_path, "--repeat", 1)
    tables = json.loads((tmp_path / "growth.json").read_text())["tables"]
    assert [row["prompt, s"] for row in tables["prompt"]] == [1, 2]
    assert [row["prompts"] for row in tables["words"]] == [1, 1]
    assert tables["words"][1]["words"] >= 2
    assert [row["prompts"] for row in tables["batch"]] == [1, 3]
    assert tables["batch"][1]["words"] >= 3 * 8
    assert (tmp_path / "growth.md").read_text().count("**") == 6
    assert (tmp_path / "growth.png").stat().st_size > 10**4


def test_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, "--most", 1)
    assert e.value.code == 2
