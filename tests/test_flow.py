"""flow.py against the public code's numbers; padding, batching and seeds."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flow import NAMES, SILENCE, TINY, ConvBlock, Flow, FlowConfig, stretch, up_to
from weights import load_strict, rename

FOLDER = Path(__file__).parent / "golden" / "cosyvoice"
GOLD = load_file(FOLDER / "flow.safetensors")
HEAD = load_file(
    FOLDER / "flow_head.safetensors"
)  # the same with a later revision: mask, not add01
PUBLIC = FlowConfig(
    units=256, width=48, blocks=2, heads=4, ffn=96, speaker=24, channels=(64, 64),
    estimator_heads=4, head_width=16, stage_blocks=2, mid_stages=2,
)  # fmt: skip
SMALL = replace(
    TINY, units=50, width=32, blocks=1, ffn=32, speaker=8, channels=(16, 24), head_width=8
)


def golden(**changes: object) -> Flow:
    model = Flow(replace(PUBLIC, **changes))  # type: ignore[arg-type]
    public = {k[2:]: v for k, v in GOLD.items() if k.startswith("w.")}
    load_strict(model, rename(public, NAMES))
    return model.eval()


def small(**changes: object) -> Flow:
    torch.manual_seed(0)
    model = Flow(replace(SMALL, **changes)).eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(model.estimator.project.weight, std=0.3)  # v must not be near 0
    return model


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(len(lengths))
    shape = len(lengths), max(lengths)
    units = torch.randint(SMALL.units, shape, generator=rng)
    return units, torch.tensor(lengths), torch.randn(len(lengths), SMALL.speaker, generator=rng)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nearest", "linear"])
def test_mu_equals_public(kind: str) -> None:
    model, units, lengths = golden(regulator=kind), GOLD["in.token"], GOLD["in.token_len"]
    x = model.encoder(units, up_to(lengths), GOLD["in.embedding"])
    close(x, GOLD["out.encoder"])
    close(model.project(x), GOLD["out.encoder_proj"])
    close(model.voice(GOLD["in.embedding"]), GOLD["out.spk"])
    mu, keep = model.mu(units, lengths, GOLD["in.feat_len"], GOLD["in.embedding"])
    close(mu.mT, GOLD[f"out.mu_{kind}"])
    assert keep.sum(1).tolist() == GOLD["in.feat_len"].tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prompt", "units"), [("split", (15, 27), 46), ("short", (0, 0), 30)]
)
def test_mu_split_equals_public(name: str, prompt: tuple[int, int], units: int) -> None:
    model, total = golden(regulator="split"), torch.tensor([prompt[0] + units])
    x = GOLD["out.encoder_proj"][:1, :total].mT
    frames = prompt[1] + PUBLIC.frames(units)
    x = stretch(x, frames, "split", prompt, PUBLIC.frames(20))
    for block in model.regulator[:-1]:
        x = block(x, None)
    close(model.regulator[-1](x).mT, GOLD[f"out.mu_infer_{name}"])


@torch.no_grad()
@pytest.mark.parametrize(("bias", "end"), [("add01", ""), ("mask", "_head")])
def test_velocity_and_euler_equal_public(bias: str, end: str) -> None:
    """Quirk: the weights' own attention adds 1 to real pairs, later code masks."""
    model, source = golden(attention_bias=bias), HEAD if end else GOLD
    x, mu, t, voice, prompt = (GOLD[f"est.{k}"] for k in ("x", "mu", "t", "spks", "cond"))
    keep = GOLD["est.mask"][:, 0].bool()
    close(model.velocity(x, keep, mu, t, voice, prompt), source[f"est.out{end}"])
    alone = model.velocity(x[:1], None, mu[:1], t[:1], voice[:1], prompt[:1])
    close(alone, source[f"est.out{end}_item0_alone"])
    given = [GOLD["euler.mu"], GOLD["out.spk"][:1], GOLD["euler.cond"]]
    keep = torch.ones(1, given[0].shape[2], dtype=torch.bool)
    close(model.integrate(GOLD["euler.z"], keep, given, 10, 0.7), source[f"euler.mel{end}"])


@pytest.mark.parametrize("name", ["prompt", "noprompt", "noprompt_taste_nearest"])
def test_sample_equals_public(name: str) -> None:
    model = golden(regulator="nearest" if "nearest" in name else "split")
    prompt = (GOLD["inf.prompt_token"], GOLD["inf.prompt_feat"].mT) if name == "prompt" else None
    noise = GOLD[f"inf.z_{name.split('_')[0]}"]
    units = GOLD["inf.token"], torch.tensor([50]), GOLD["inf.embedding"]
    mel, mel_len = model.sample(*units, prompt, noise=noise)
    close(mel, GOLD[f"inf.mel_{name}"])
    assert mel_len.tolist() == [86]


def public_loss(model: Flow, t: Tensor, keep: Tensor, prompt: Tensor | None) -> Tensor:
    data = (GOLD[f"in.{k}"] for k in ("token", "token_len", "feat", "feat_len", "embedding"))
    units, unit_len, feat, feat_len, speaker = data
    noise = GOLD["train.z"]
    loss = model.loss(units, unit_len, feat.mT, feat_len, speaker, prompt, t, noise, keep)
    assert loss.total == loss.flow  # the prior has no weight in the public recipe
    return loss.total[None]


def test_loss_and_gradients_equal_public() -> None:
    uniform, keep, prompt = (GOLD[f"train.{k}"] for k in ("t_uniform", "cfg_keep", "prompt_len"))
    t, everyone = 1 - torch.cos(uniform * math.pi / 2), torch.ones(2, dtype=torch.bool)
    model = golden(regulator="linear")
    loss = public_loss(model, t, keep, prompt)
    close(loss, GOLD["train.loss_v1"])
    loss.sum().backward()
    start = "train.grad."
    expected = rename({k[len(start) :]: v for k, v in GOLD.items() if start in k}, NAMES)
    assert len(expected) == 7
    for name, gradient in expected.items():
        close(model.get_parameter(name).grad, gradient)  # type: ignore[arg-type]
    close(public_loss(model, t, everyone, prompt), GOLD["train.loss_v1_keep_all"])
    close(public_loss(golden(), t, keep, None), GOLD["train.loss_taste_nearest_noprompt"])
    later = golden(regulator="linear", attention_bias="mask")
    close(public_loss(later, uniform, keep, prompt), HEAD["train.loss_head"])


def test_public_names_and_shapes_fill_the_default_model() -> None:
    manifest = json.loads((FOLDER / "manifest_flow.json").read_text())
    shapes = {k: v["shape"] for k, v in manifest.items() if k != "_meta"}
    with torch.device("meta"):
        model = Flow(FlowConfig())
        public = {k: torch.empty(shape) for k, shape in shapes.items()}
    ours = rename(public, NAMES)
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert sum(p.numel() for p in model.parameters()) == 104_874_752


def test_frames_are_the_exact_floor() -> None:
    for units in range(1, 3001):
        assert FlowConfig().frames(units) == 441 * units // 256
        assert TINY.frames(units) == math.floor(units * 22050 / (256 * 25))
    assert TINY.frames(torch.tensor([70, 1])).tolist() == [241, 3]


def test_masked_norm_of_a_full_batch_is_group_norm() -> None:
    torch.manual_seed(1)
    block, x = ConvBlock(16, 16, 8, True), torch.randn(2, 16, 9) + 3
    close(block(x, torch.ones(2, 9, dtype=torch.bool)), block(x, None))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, None).dtype == torch.float32


def test_the_prior_alone_trains_the_encoder() -> None:
    model = small()
    units, lengths, speaker = batch([9, 5])
    mel_len, nobody = model.config.frames(lengths), torch.tensor([False, False])
    mel = torch.randn(2, 80, int(mel_len.max()))
    model.loss(units, lengths, mel, mel_len, speaker, cfg_keep=nobody).total.backward()
    assert model.encoder.embed.weight.grad is not None
    assert model.encoder.embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("regulator", ["linear", "nearest", "split"])
def test_padded_batch_equals_single_items(regulator: str) -> None:
    model = small(regulator=regulator, parts=1 if regulator == "split" else 3)
    units, lengths, speaker = batch([47, 1, 6, 22])
    noise = torch.randn(4, 80, model.config.frames(47))
    together, mel_len = model.sample(units, lengths, speaker, steps=3, noise=noise)
    for i, (u, f) in enumerate(zip(lengths.tolist(), mel_len.tolist(), strict=True)):
        one = slice(i, i + 1)
        alone, _ = model.sample(
            units[one, :u], lengths[one], speaker[one], steps=3, noise=noise[one, :, :f]
        )
        close(together[one, :, :f], alone)
        assert (together[i, :, f:] == SILENCE).all()


@pytest.mark.parametrize("public", [False, True])
def test_length_of_the_mel_can_be_asked_for(public: bool) -> None:
    model = small(**({"attention_bias": "add01", "masked_norm": False} if public else {}))
    units, lengths, speaker = batch([6, 3])
    wanted = torch.tensor([13, 25])
    mel, mel_len = model.sample(units, lengths, speaker, steps=0, mel_len=wanted)
    assert mel_len.tolist() == wanted.tolist()
    for i, f in enumerate(wanted.tolist()):
        row = units[i : i + 1, : lengths[i]], lengths[i : i + 1], speaker[i : i + 1]
        mu, _ = model.mu(row[0], row[1], wanted[i : i + 1], row[2])
        close(mel[i : i + 1, :, :f], mu * TINY.mel_std + TINY.mel_mean)


def test_public_padded_batch_is_sampled_item_by_item() -> None:
    model = small(attention_bias="add01", masked_norm=False)
    units, lengths, speaker = batch([9, 5])
    noise = torch.randn(2, 80, model.config.frames(9))
    together, mel_len = model.sample(units, lengths, speaker, steps=2, noise=noise, temperature=0.5)
    f = int(mel_len[1])
    row = units[1:, :5], lengths[1:], speaker[1:]
    alone, _ = model.sample(*row, steps=2, noise=noise[1:, :, :f], temperature=0.5)
    close(together[1:, :, :f], alone)


def test_padding_does_not_leak_into_the_loss() -> None:
    model = small()
    units, lengths, speaker = batch([9, 5])
    mel_len = model.config.frames(lengths)
    mel, noise = torch.randn(2, 2, 80, int(mel_len.max()))
    rest = mel_len, speaker, None, torch.tensor([0.2, 0.7]), noise, torch.tensor([True, True])
    loss = model.loss(units, lengths, mel, *rest)
    units[1, 5:], mel[1, :, int(mel_len[1]) :] = 3, 1e4
    assert torch.equal(loss.total, model.loss(units, lengths, mel, *rest).total)
    assert torch.isclose(loss.total, loss.flow + TINY.prior_weight * loss.prior)


def test_end_is_where_the_velocity_leads() -> None:
    model = small()
    units, lengths, speaker = batch([9, 5])
    mel_len = model.config.frames(lengths)
    mel, noise = torch.randn(2, 2, 80, int(mel_len.max()))
    t = torch.tensor([0.2, 0.7])
    loss = model.loss(
        units, lengths, mel, mel_len, speaker, None, t, noise, torch.tensor([True] * 2)
    )
    x = (mel - TINY.mel_mean) / TINY.mel_std
    off = loss.end - x  # an exact velocity would lead to x, but for SIGMA
    real = torch.arange(mel.shape[2]) < mel_len[:, None, None]
    square = (off / (1 - t)[:, None, None]).square() * real
    torch.testing.assert_close(square.sum() / (80 * mel_len.sum()), loss.flow, rtol=1e-4, atol=0)


@pytest.mark.parametrize("public", [False, True])
def test_temperature_is_that_of_the_config(public: bool) -> None:
    quirks = {"attention_bias": "add01", "masked_norm": False} if public else {}
    model, data = small(temperature=0.3, **quirks), batch([4, 3])
    noise = torch.randn(2, 80, model.config.frames(4))
    mel, _ = model.sample(*data, steps=2, noise=noise)
    close(mel, model.sample(*data, steps=2, noise=0.3 * noise, temperature=1.0)[0])
    assert not torch.allclose(mel, model.sample(*data, steps=2, noise=noise, temperature=1.0)[0])


def test_guidance_in_one_batch_equals_two_calls() -> None:
    model = small()
    x, mu, prompt = torch.randn(3, 1, 80, 7)
    voice, keep, t = torch.randn(1, 80), torch.ones(1, 7, dtype=torch.bool), torch.zeros(1)
    with torch.no_grad():
        given = model.velocity(x, None, mu, t, voice, prompt)
        free = model.velocity(x, None, mu * 0, t, voice * 0, prompt * 0)
        step = model.integrate(x, keep, [mu, voice, prompt], 1, 0.7)
        close(step, x + 1.7 * given - 0.7 * free)
        close(model.integrate(x, keep, [mu, voice, prompt], 1, 0.0), x + given)


def test_rng_decides_the_sample() -> None:
    model, data = small(), batch([4, 3])
    a, b, c = (
        model.sample(*data, steps=2, rng=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


@torch.no_grad()
def test_each_part_of_a_unit_has_its_place() -> None:
    """With 4 parts a unit and 4 frames a unit, nothing is stretched: frame 4 u + p is part p."""
    model = small(parts=4, masked_norm=False, speaker_in_mu=False)
    model.regulator = torch.nn.ModuleList([torch.nn.Identity()])
    units, lengths, speaker = batch([5])
    mu, _ = model.mu(units, lengths, torch.tensor([20]), speaker)
    parts = model.project(model.encoder(units, up_to(lengths), speaker)).view(1, 5, 4, 80)
    for u in range(5):
        for p in range(4):
            close(mu[:, :, 4 * u + p], parts[:, u, p])


@pytest.mark.parametrize("channels", [(16,), (16, 24), (16, 24, 32)])
@pytest.mark.parametrize("units", [1, 2, 7])
def test_any_length_and_depth(channels: tuple[int, ...], units: int) -> None:
    model, data = small(channels=channels, parts=units), batch([units])
    mel, _ = model.sample(*data, steps=1)
    assert mel.shape == (1, 80, SMALL.frames(units))
    assert mel.isfinite().all()
    noise = torch.randn(1, 80, 1)  # one frame
    assert model.velocity(noise, None, noise, torch.zeros(1), noise[..., 0], noise).shape == (
        1,
        80,
        1,
    )


def test_no_steps_give_mu_as_a_mel() -> None:
    model, data = small(), batch([6])
    mel, mel_len = model.sample(*data, steps=0)
    close(mel, model.mu(data[0], data[1], mel_len, data[2])[0] * TINY.mel_std + TINY.mel_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("public", [False, True])
def test_gradient_reaches_every_parameter(dtype: torch.dtype, public: bool) -> None:
    torch.manual_seed(0)
    kind = {"attention_bias": "add01", "masked_norm": False, "dropout": 0.1} if public else {}
    model = Flow(replace(SMALL, **kind))  # type: ignore[arg-type]
    units, lengths, speaker = batch([9, 5, 7, 9])
    mel_len = model.config.frames(lengths)
    mel = torch.randn(4, 80, int(mel_len.max()))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model.loss(units, lengths, mel, mel_len, speaker, cfg_keep=torch.arange(4) > 0)
    assert {x.dtype for x in loss} == {torch.float32}
    loss.total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0 or name.endswith("k.bias"), name  # cancels in the softmax


def test_errors_say_what_is_wrong() -> None:
    for change, text in [
        ({"width": 12}, "width a multiple"),
        ({"channels": (12,)}, "channels in 8s"),
        ({"channels": ()}, "channels in 8s"),
        ({"regulator": "cubic"}, "nearest, linear or split"),
        ({"attention_bias": "none"}, "add01 or mask"),
        ({"mel_std": 0.0}, "above 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            replace(PUBLIC, **change)  # type: ignore[arg-type]
    units, lengths, speaker = batch([3])
    with pytest.raises(ValueError, match="units < 50"):
        small().sample(units + 50, lengths, speaker)
    with pytest.raises(ValueError, match="lengths >= 1"):
        small().sample(units, lengths * 0, speaker)
