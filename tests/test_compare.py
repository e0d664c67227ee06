"""compare.py: one seed of two systems in two steps, an interruption, and its table."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import compare


def test_measures_what_is_missing(
    tiny_bundle: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compare.Config(
        out=tmp_path, bundle=tiny_bundle, systems="text-only,TASLA", seeds=1, text_steps=1, steps=1,
        utterances=30, items=2, threads=1, device="cpu",
    )  # fmt: skip
    found, topline = compare.measure(cfg, compare.check(cfg))
    assert found.keys() == {"text-only", "TASLA"}
    for row in (found["text-only"][0], found["TASLA"][0]):
        assert row.keys() == {*compare.UNITS.values(), *compare.SPEECH}
        assert 0 <= row["units, accuracy"] <= 1
    assert topline.keys() >= {"F0-PCC", "WER"}
    (tmp_path / "tasla_0" / "measured.json").unlink()
    monkeypatch.setattr(compare, "train", None)  # models are there: nothing is trained again
    again, _ = compare.measure(cfg, compare.check(cfg))
    assert str(again) == str(found)
    with pytest.raises(ValueError, match=r"runs of .*choose another --out"):
        compare.check(replace(cfg, steps=2))
    with pytest.raises(ValueError, match=r"no system \['TASTY'\]; there are text-only, TASTE"):
        compare.check(replace(cfg, systems="TASTE,TASTY"))


def test_table_pairs_the_seeds() -> None:
    def rows(*values: float) -> list[dict[str, float]]:
        return [{"F0-PCC": v} for v in values]

    found = {"text-only": rows(0.1, 0.3), "TASTE": rows(0.2, 0.4), "TASLA": rows(0.5, math.nan)}
    lines = compare.table(found, {"F0-PCC": (0.9, 0.01), "x real time": (1, 0)}).splitlines()
    assert lines[0] == "| system | F0-PCC |"
    assert "| TASTE | 0.30 ± 0.10 |" in lines
    assert "| TASTE less text-only | 0.10 ± 0.00 |" in lines  # paired: the spread of seeds cancels
    assert "| TASLA less TASTE | 0.30 |" in lines  # one seed is defined: no error
    assert "| S3 topline | 0.90 ± 0.01 |" in lines
