"""HiFT against golden vectors of CosyVoice, its losses, its loader and its properties."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from audio import vocoder_mel
from hift import (
    NAMES,
    HiFT,
    HiFTConfig,
    Judges,
    JudgeConfig,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    load_public,
    tpr_loss,
)
from weights import rename

GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
SMALL = HiFTConfig(channels=32, f0_channels=32)


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def gold() -> dict[str, Tensor]:
    return load_file(GOLDEN / "hift.safetensors")


def public(gold: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k[2:]: v for k, v in gold.items() if k.startswith("w.")}


@pytest.fixture(scope="module")
def model(gold: dict[str, Tensor]) -> HiFT:
    return load_public(HiFT(SMALL), public(gold)).eval()


@torch.no_grad()
def test_golden_f0_source_and_wav(model: HiFT, gold: dict[str, Tensor]) -> None:
    phase, noise = gold["src.phase"][..., 0], gold["src.noise"].float()
    assert error(model.f0(gold["in.mel"]), gold["out.f0"]) < 2e-5
    f0 = gold["out.f0"]
    sines = model.source.sines(f0, phase, torch.zeros_like(noise)).transpose(1, 2)
    assert error(sines[..., :2048], gold["src.sines_no_noise"]) < 2e-5
    assert error(model.source(f0, phase, noise)[:, None], gold["src.source"]) < 2e-5
    source = gold["src.source"][:, 0]
    print(error(model.decode(gold["in.mel"], source), gold["out.wav"]))
    assert error(model.decode(gold["in.mel"], source), gold["out.wav"]) < 2e-5
    assert error(model(gold["in.mel"], None, phase, noise), gold["out.wav"]) < 2e-5
