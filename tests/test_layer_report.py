"""layer_report.py on weights, flux and attention whose figures are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import audio
import layer_report
import synth
from data import Item
from layer_report import Heard, attention_figures, hear, layer_figures, spectral_flux
from pipeline import Pipeline

T = 20  # frames of 40 ms
ITEM = Item(
    "x", "two dogs.", "Alex", lambda: (torch.zeros(1), 16000),
    synth.Utterance("two dogs.", starts_s=(0.08, 0.4), ends_s=(0.24, 0.6)),
)  # fmt: skip


def heard(
    seed: int, weights: torch.Tensor | None = None, flux: torch.Tensor | None = None
) -> Heard:
    rng = torch.Generator().manual_seed(seed)
    flux = torch.rand(T, generator=rng) if flux is None else flux
    return Heard(torch.zeros(80, 4 * T), flux, torch.full((2, T), 1 / T), weights)


def test_equal_weights_are_all_layers_and_one_layer_is_one() -> None:
    same = layer_figures([heard(i, torch.full((4, T), 0.25)) for i in range(3)], (1, 2, 3, 4))
    assert same["all layers"]["H"] == pytest.approx((math.log(4), 0))
    assert same["all layers"]["ENL"][0] == pytest.approx(4)
    assert same["layer 2"]["mean weight"][0] == pytest.approx(0.25)
    assert math.isnan(same["layer 2"]["flux r"][0])  # a constant has no correlation
    one = torch.zeros(4, T)
    one[2] = 1
    alone = layer_figures([heard(i, one) for i in range(3)], (1, 2, 3, 4))
    assert alone["all layers"]["ENL"][0] == pytest.approx(1)
    assert [alone[f"layer {k}"]["mean weight"][0] for k in (1, 2, 3, 4)] == [0, 0, 1, 0]


def test_entropy_is_the_mean_over_frames() -> None:
    """Half the frames on one layer, half on two: ln 2 / 2."""
    w = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).repeat(T // 2, 1).T  # (2, T)
    found = layer_figures([heard(0, w), heard(1, w)], (1, 2))["all layers"]
    assert found["H"][0] == pytest.approx(math.log(2) / 2)
    assert found["ENL"][0] == pytest.approx(2**0.5)


def test_a_weight_that_follows_the_flux() -> None:
    rng = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(12):
        flux = torch.rand(T, generator=rng) * torch.rand((), generator=rng)
        rows.append(heard(0, torch.stack([flux, 1 - flux]), flux))
    found = layer_figures(rows, (3, 7))
    assert found["layer 3"]["flux r"][0] == pytest.approx(1)
    assert found["layer 7"]["flux r"][0] == pytest.approx(-1)
    assert found["layer 3"]["flux r, utterances"][0] > 0.9


def test_without_mlda_there_is_nothing_to_report() -> None:
    with pytest.raises(ValueError, match="one value layer"):
        layer_figures([heard(0)], (2,))


def test_attention_against_true_times() -> None:
    """Word 1 lasts 0.08 .. 0.24 s, frames 2 to 5; word 2 0.4 .. 0.6 s, frames 10 to 14."""
    assert layer_report.inside(ITEM, T).nonzero()[:, 1].tolist() == [2, 3, 4, 5, *range(10, 15)]
    flat = attention_figures([heard(0)], [ITEM])
    assert flat["mass in the word"][0] == pytest.approx(flat["flat"][0])
    assert flat["flat"][0] == pytest.approx(4.5 / T)
    aimed = torch.zeros(2, T)
    aimed[0, 2] = 1  # its centre, 0.1 s, is 60 ms before the middle
    aimed[1, 11] = aimed[1, 16] = 0.5  # their mean, 0.56 s, is 60 ms behind it; one is outside
    found = attention_figures([heard(0)._replace(attention=aimed)], [ITEM])
    assert found["mass in the word"][0] == pytest.approx(0.75)
    assert found["centre error, ms"][0] == pytest.approx(60, abs=1e-3)


def test_flux_is_the_distance_of_mel_magnitudes() -> None:
    wav = 0.3 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    mel = audio.whisper_mel(wav)  # (80, 100)
    power = 10 ** (4 * mel.double() - 4)
    want = (power.sqrt()[:, 1:] - power.sqrt()[:, :-1]).square().sum(0).sqrt()  # (99,)
    found = spectral_flux(mel, 25)
    assert found.shape == (25,)
    torch.testing.assert_close(found[3].double(), want[11:15].mean(), rtol=1e-5, atol=0)
    assert not spectral_flux(torch.full((80, 100), 0.4), 25).any()
    assert spectral_flux(mel[:, :98], 25).isfinite().all()  # the last frame is a short one


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_rvq"])
def test_hear_and_pictures(folder: str, tiny_bundle: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_bundle, tiny_bundle / folder)
    wav = audio.read(tiny_bundle / "prompt.wav")[: 16000 * T // 25]
    one = hear(pipeline, wav, ITEM.text.split())
    assert one.attention.shape == (2, T)
    torch.testing.assert_close(one.attention.sum(1), torch.ones(2))
    assert one.weights is not None
    torch.testing.assert_close(one.weights.sum(0), torch.ones(T))
    layer_report.save([one] * 3, [ITEM] * 3, (1, 2, 3, 4), tmp_path / "new")
    layer_report.save([one._replace(weights=None)], [ITEM], (2,), tmp_path / "single")
    for name in ("new/layers_and_flux.png", "new/x.png", "new/x_attention.png", "single/x.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_curves_of_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("TASTE", "old"):
        (tmp_path / name).mkdir()
    log = tmp_path / "TASTE" / "log.jsonl"
    rows = [{"step": s, "accuracy": s / 100} for s in (50, 100)] + [{"step": 100, "dev_x": 1}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "old" / "log.jsonl").write_text('{"step": 1, "ce": 2.0}\n')
    layer_report.curves({f"run {i}": log for i in range(30)}).savefig(tmp_path / "many.png")
    (axis,) = layer_report.curves({"TASTE": log}).axes
    assert np.asarray(axis.lines[0].get_xydata()).tolist() == [[50, 0.5], [100, 1.0]]
    layer_report.save_curves(tmp_path, tmp_path / "new" / "x.png")
    assert "has no accuracy" in capsys.readouterr().out
    assert (tmp_path / "new" / "x.png").is_file()
    layer_report.save_curves(tmp_path / "none", tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()
