"""HiFT against golden vectors of CosyVoice, its losses, its loader and its properties."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from audio import vocoder_mel
from hift import (
    NAMES,
    TINY,
    TINY_JUDGES,
    G,
    HiFT,
    HiFTConfig,
    JudgeConfig,
    Judges,
    Source,
    V,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    generator_loss,
    init_for_training,
    load_public,
    period_judge,
    stft_loss,
    tpr_loss,
)
from weights import rename

GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
SMALL = HiFTConfig(channels=32, f0_channels=32)  # the golden one
LEAST = HiFTConfig(channels=16, f0_channels=8, kernels=(3, 5), dilations=(1, 2))
RATE = SMALL.rate


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def random_mel(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 80, frames, generator=torch.Generator().manual_seed(seed)) - 5


@pytest.fixture(scope="module")
def gold() -> dict[str, Tensor]:
    return load_file(GOLDEN / "hift.safetensors")


@pytest.fixture(scope="module")
def public(gold: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k[2:]: v for k, v in gold.items() if k.startswith("w.")}


@pytest.fixture(scope="module")
def model(public: dict[str, Tensor]) -> HiFT:
    return load_public(HiFT(SMALL), public).eval()


@pytest.fixture(scope="module")
def judged() -> dict[str, Tensor]:
    return load_file(GOLDEN / "hifigan_losses.safetensors")


@pytest.fixture(scope="module")
def judges(judged: dict[str, Tensor]) -> Judges:
    model = Judges(JudgeConfig(periods=()))
    names = {
        rf"w\.discriminators\.(\d)\.{old}\.{a}": rf"by_stft.\1.{new}.{b}"
        for old, new in {r"discriminators\.(\d)": r"convs.\2", "out": "out"}.items()
        for a, b in {"weight_g": G, "weight_v": V, "bias": "bias"}.items()
    }
    model.load_state_dict(rename(judged, names, skip=[r"(in|mrd|loss)\..*"]))
    return model


# ---- parity


@torch.no_grad()
def test_golden_f0(model: HiFT, gold: dict[str, Tensor]) -> None:
    assert error(model.f0(gold["in.mel"]), gold["out.f0"]) < 2e-5
    assert torch.equal((gold["out.f0"] > 10).float(), gold["src.uv_per_frame"])


@torch.no_grad()
def test_golden_source(model: HiFT, gold: dict[str, Tensor]) -> None:
    f0, phase, noise = gold["out.f0"], gold["src.phase"], gold["src.noise"].float()
    sines = model.source.sines(f0, phase, 0 * noise).transpose(1, 2)
    assert error(sines[..., :2048], gold["src.sines_no_noise"]) < 2e-5
    assert error(model.source(f0, phase, noise)[:, None], gold["src.source"]) < 2e-5
    assert error(model.source(f0, phase, 0 * noise)[:, None], gold["src.source_no_noise"]) < 2e-5


@torch.no_grad()
def test_golden_inner_layers(model: HiFT, gold: dict[str, Tensor]) -> None:
    seen: dict[str, Tensor] = {}
    public_names = {"pre": "conv_pre", "ups.0": "ups0", "downs.0": "source_down0"}
    public_names |= {"source_blocks.0": "source_resblock0"}
    # the golden resblock0 is the sum of the three: the public code adds in place to the first
    public_names |= {f"blocks.{j}": f"block{j}" for j in range(3)}
    public_names |= {"post": "conv_post"}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *a, n=n: seen.update({n: a[2]}))
        for name, n in public_names.items()
    ]
    model.decode(gold["in.mel"], gold["src.source"][:, 0])
    for hook in hooks:
        hook.remove()
    seen["resblock0"] = sum((seen.pop(f"block{j}") for j in range(3)), torch.zeros(()))
    for name, ours in seen.items():
        assert error(ours[..., :600], gold[f"dec.mid.{name}"]) < 2e-5, name


@torch.no_grad()
def test_golden_wav(model: HiFT, gold: dict[str, Tensor]) -> None:
    phase, noise = gold["src.phase"], gold["src.noise"].float()
    assert error(model.decode(gold["in.mel"], gold["src.source"][:, 0]), gold["out.wav"]) < 2e-5
    assert error(model(gold["in.mel"], None, phase, noise), gold["out.wav"]) < 2e-5
    assert error(model(gold["in.mel"], None, phase, 0 * noise), gold["out.wav_no_noise"]) < 2e-5


@torch.no_grad()
def test_golden_losses(judges: Judges, judged: dict[str, Tensor]) -> None:
    real, fake = judges(judged["in.real"]), judges(judged["in.fake"])
    for i in range(3):
        assert error(real[i][0], judged[f"mrd.out_real.{i}"]) < 2e-5
        assert error(fake[i][0], judged[f"mrd.out_fake.{i}"]) < 2e-5
    mel = (vocoder_mel(judged["in.real"], None) - vocoder_mel(judged["in.fake"], None)).abs().mean()
    ours = {"gen_adv": adversarial_loss(fake), "feature": feature_loss(real, fake), "mel": mel}
    ours |= {"tpr_gen": tpr_loss(fake, real), "tpr_disc": tpr_loss(real, fake)}
    ours["disc"] = discriminator_loss(real, fake)
    for name, value in ours.items():
        assert error(value.view(1), judged[f"loss.{name}"]) < 2e-5, name
    weights = {"gen_adv": 1, "feature": 2, "mel": 45, "tpr_gen": 1}
    total = torch.stack([w * judged[f"loss.{k}"] for k, w in weights.items()]).sum(0) + 7.0
    assert error(generator_loss(real, fake, mel, torch.tensor(7.0)).view(1), total) < 2e-5


def test_public_sizes() -> None:
    with torch.device("meta"):
        vocoder, judges = HiFT(HiFTConfig()), Judges(JudgeConfig())
    assert sum(p.numel() for p in vocoder.parameters()) == 20_460_591
    assert sum(p.numel() for p in judges.by_period.parameters()) == 41_105_770
    assert sum(p.numel() for p in judges.by_stft.parameters()) == 280_902


# ---- weights


def test_every_public_tensor_has_its_place() -> None:
    manifest = json.loads((GOLDEN / "manifest_hift.json").read_text())
    manifest.pop("_meta")
    with torch.device("meta"):
        model = HiFT(HiFTConfig())
        file = {k: torch.empty(v["shape"]) for k, v in manifest.items()}
    ours = {k: v.shape for k, v in rename(file, NAMES).items()}
    assert len(ours) == 227
    assert ours == {k: v.shape for k, v in model.state_dict().items()}


def folded(public: dict[str, Tensor]) -> dict[str, Tensor]:
    """g v / ||v|| by hand, in double precision."""
    out = {k: v for k, v in public.items() if not k.endswith(("weight_g", "weight_v"))}
    for k, g in public.items():
        if k.endswith("weight_g"):
            v = public[k.replace("weight_g", "weight_v")].double()
            norm = v.pow(2).sum((1, 2), keepdim=True).sqrt()
            out[k.removesuffix("_g")] = (g * v / norm).float()
    return out


def spelled_new(public: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("weight_g", G).replace("weight_v", V): v for k, v in public.items()}


@pytest.mark.parametrize("spell", [dict, folded, spelled_new])
@pytest.mark.parametrize("fold", [False, True])
@torch.no_grad()
def test_loads_each_spelling_into_each_form(spell, fold, public, gold) -> None:  # type: ignore[no-untyped-def]
    model = HiFT(SMALL).fold() if fold else HiFT(SMALL)
    load_public(model, spell(public))
    wav = model.decode(gold["in.mel"], gold["src.source"][:, 0])
    assert error(wav, gold["out.wav"]) < 2e-5


@torch.no_grad()
def test_folding_changes_nothing_but_the_names() -> None:
    model = HiFT(LEAST)
    mel, f0 = random_mel(11, 2), torch.full((2, 11), 130.0)
    torch.manual_seed(1)
    before = model(mel, f0)
    assert model.fold() is model
    torch.manual_seed(1)
    assert error(model(mel, f0), before) < 2e-5
    assert not any("parametrizations" in k for k in model.state_dict())


def test_bad_weight_files_name_the_tensor(public: dict[str, Tensor]) -> None:
    short = {k: v for k, v in public.items() if k != "ups.1.weight_g"}
    with pytest.raises(
        ValueError, match=r"ups\.1\.parametrizations\.weight\.original0: in the mod"
    ):
        load_public(HiFT(SMALL), short)
    with pytest.raises(ValueError, match=r"conv_mid\.bias: maps to nothing"):
        load_public(HiFT(SMALL), public | {"conv_mid.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"pre\.bias: \[32\] in the file, \[16\] here"):
        load_public(HiFT(LEAST), public)


# ---- source


def test_source_is_voiced_sines_or_louder_noise() -> None:
    f0 = torch.tensor([[200.0] * 40 + [0.0] * 40, [10.0] * 80])  # 10 Hz is not above the threshold
    sines = Source(SMALL).sines(f0)  # (2, S, 9)
    voiced, unvoiced = sines[0, : 40 * 256], sines[0, 40 * 256 :]
    assert voiced.std() == pytest.approx(0.1 / 2**0.5, rel=0.02)
    assert unvoiced.std() == pytest.approx(0.1 / 3, rel=0.02)
    assert sines[1].std() == pytest.approx(0.1 / 3, rel=0.02)
    peak = torch.fft.rfft(voiced, dim=0).abs().argmax(0) * RATE / len(voiced)
    assert torch.allclose(peak, 200.0 * torch.arange(1, 10), atol=RATE / len(voiced))


def test_only_the_upper_harmonics_start_anywhere() -> None:
    f0 = torch.full((3, 4), 100.0)
    start = Source(SMALL).sines(f0, noise=torch.zeros(3, 9, 1024))[:, 0]  # (3, 9)
    assert torch.allclose(
        start[:, 0], torch.full((3,), 0.1).mul(torch.tensor(2 * torch.pi * 100 / RATE).sin())
    )
    assert start[:, 1:].std() > 0.03


def test_same_seed_same_wav_and_items_of_a_batch_do_not_mix() -> None:
    model, mel, f0 = HiFT(LEAST), random_mel(9, 3), torch.rand(3, 9) * 300
    phase, noise = torch.rand(3, 9), torch.randn(3, 9, 9 * 256)
    together = model(mel, f0, phase, noise)
    alone = [model(*(x[i : i + 1] for x in (mel, f0, phase, noise))) for i in range(3)]
    assert error(torch.cat(alone), together) < 2e-5
    torch.manual_seed(5)
    first = model(mel, f0)
    torch.manual_seed(5)
    assert torch.equal(model(mel, f0), first)
    assert not torch.equal(model(mel, f0), first)


# ---- generator


@pytest.mark.parametrize("frames", [1, 2, 7, 50])
@torch.no_grad()
def test_256_samples_a_frame_within_the_limit(frames: int) -> None:
    model = HiFT(LEAST)
    model.post.bias += 9  # far too loud
    wav = model(random_mel(frames))
    assert wav.shape == (1, 256 * frames)
    assert wav.abs().max() == pytest.approx(0.99)
    model.config = dataclasses.replace(LEAST, limit=1e9)  # now the clip of the magnitudes is seen
    assert 2 < model(random_mel(frames)).abs().max() < 80


@torch.no_grad()
def test_other_strides_and_hop() -> None:
    config = HiFTConfig(
        channels=16, f0_channels=8, upsample=(4, 2, 2), upsample_kernels=(8, 4, 4), n_fft=32, hop=8,
        source_kernels=(3, 3, 3), kernels=(3,), harmonics=3,
    )  # fmt: skip
    assert config.samples == 128
    assert HiFT(config)(random_mel(6)).shape == (1, 6 * 128)


@torch.no_grad()
def test_quirk_last_leaky_relu_has_torchs_own_slope(model: HiFT, gold: dict[str, Tensor]) -> None:
    seen: list[Tensor] = []
    hooks = [model.post.register_forward_hook(lambda _, i, o: seen.append(i[0]))]
    hooks += [b.register_forward_hook(lambda _, i, o: seen.append(o)) for b in model.blocks[3:]]
    model.decode(gold["in.mel"], gold["src.source"][:, 0])
    for hook in hooks:
        hook.remove()
    x = torch.stack(seen[:3]).mean(0)
    assert torch.allclose(seen[3], torch.where(x > 0, x, 0.01 * x), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_far_frames_do_not_matter() -> None:
    """Why items may be vocoded in pieces that overlap, and that what pads an item stays near it."""
    model, mel, f0 = HiFT(LEAST), random_mel(60), torch.full((1, 60), 120.0)
    phase, noise = torch.zeros(1, 9), torch.randn(1, 9, 60 * 256)
    whole = model(mel, f0, phase, noise)
    part = model(mel[..., :40], f0[:, :40], phase, noise[..., : 40 * 256])
    assert error(part[:, : 30 * 256], whole[:, : 30 * 256]) < 2e-5
    assert error(part, whole[:, : 40 * 256]) > 1e-4  # but the frames at the cut do


@torch.no_grad()
def test_bfloat16_autocast_keeps_source_and_spectrum_in_fp32() -> None:
    model, mel, f0 = HiFT(LEAST), random_mel(8), torch.full((1, 8), 120.0)
    phase, noise = torch.zeros(1, 9), torch.randn(1, 9, 8 * 256)
    source = model.source(f0, phase, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.source(f0, phase, noise), source)
        wav = model(mel, f0, phase, noise)
    assert wav.dtype == torch.float32
    assert error(wav, model(mel, f0, phase, noise)) < 0.1


# ---- training


@torch.no_grad()
def test_an_untrained_model_already_has_the_pitch_of_its_source() -> None:
    """Share of the power at the first five harmonics; torch's own start gives about 0.2."""
    hz, frames, edge, shares = 150.0, 60, 5 * 256, []
    for seed in range(8):
        torch.manual_seed(seed)
        mel = random_mel(1, seed=seed).expand(1, 80, frames)
        wav = HiFT(TINY)(mel, torch.full((1, frames), hz))[0, edge:-edge]
        power = torch.fft.rfft(wav * torch.hann_window(len(wav))).abs() ** 2
        bins = (torch.arange(1, 6) * hz * len(wav) / RATE).round().long()
        at = torch.stack([power[b - 2 : b + 3].sum() for b in bins]).sum()
        shares.append(at / power[bins[0] // 2 : bins[-1] + bins[0] // 2].sum())
    assert torch.stack(shares).mean() > 0.45


def test_init_can_be_called_again() -> None:
    model = HiFT(TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    init_for_training(model)
    for key, value in model.state_dict().items():
        assert value.norm() == pytest.approx(before[key].norm().item(), rel=0.3, abs=1e-6), key


def test_a_wave_loss_trains_the_generator_and_an_f0_loss_the_predictor() -> None:
    model, mel = HiFT(LEAST), random_mel(12)
    loss = stft_loss(model(mel), 0.1 * torch.randn(1, 12 * 256))
    loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {n for n, _ in model.named_parameters() if n.startswith("f0.")}
    (model.f0(mel) - 120).abs().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model, mel = HiFT(LEAST), random_mel(12, 2)
    target, f0 = 0.1 * torch.randn(2, 12 * 256), torch.full((2, 12), 110.0)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        loss = stft_loss(model(mel, f0), target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_stft_loss_is_zero_for_equals_and_finite_for_silence() -> None:
    wav = 0.1 * torch.randn(2, 8192, generator=torch.Generator().manual_seed(0))
    assert stft_loss(wav, wav) == 0
    silence = torch.zeros(2, 8192, requires_grad=True)
    stft_loss(silence, wav).backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()
    assert stft_loss(wav, torch.zeros(2, 8192)).isfinite()


def test_period_judge_sees_one_column_per_place_in_the_period() -> None:
    judge = period_judge(5, (4, 4))
    picture = judge.picture(torch.arange(5.0).repeat(3)[None, :13])  # 13 samples, padded to 15
    assert picture.shape == (1, 1, 3, 5)
    assert picture[0, 0, :2].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert picture[0, 0, 2].tolist() == [0, 1, 2, 1, 0]  # reflected
    out, maps = judge(torch.randn(2, 13))
    assert [m.shape[1] for m in maps] == [4, 4, 1]
    assert torch.equal(maps[-1].flatten(1), out)


def test_judges_learn_and_pass_gradient_to_the_wave() -> None:
    torch.manual_seed(0)
    judges = Judges(TINY_JUDGES)
    assert 50_000 < sum(p.numel() for p in judges.parameters()) < 500_000
    real, fake = 0.3 * torch.randn(2, 4096), 0.1 * torch.ones(2, 4096)
    opt = torch.optim.Adam(judges.parameters(), 3e-3)
    first = last = 0.0
    for _ in range(6):
        loss = discriminator_loss(judges(real), judges(fake)) + tpr_loss(judges(real), judges(fake))
        opt.zero_grad()
        loss.backward()
        opt.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.9 * first
    fake.requires_grad_()
    zero = torch.tensor(0.0)
    generator_loss(judges(real), judges(fake), zero, zero).backward()
    assert fake.grad is not None
    assert fake.grad.any()


def test_tpr_by_hand() -> None:
    a, b = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.1, 0.9, 2.5]])
    # a - b = -.1, .1, -.5; median -.1; below it only -.5, which is .4 away: r = .16 > tau
    assert tpr_loss([(a, [])], [(b, [])]) == pytest.approx(0.04)
    assert tpr_loss([(a / 10, [])], [(b / 10, [])]) == pytest.approx(0.0016)
    assert tpr_loss([(a, [])], [(a, [])]) == 0  # nothing lies below the median


# ---- failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 30}, "channels=30 cannot be halved"),
        ({"source_kernels": (7,)}, "differ in length"),
        ({"upsample_kernels": (16, 15)}, "by even numbers"),
        ({"upsample_kernels": (6, 16)}, "must exceed"),
        ({"kernels": (3, 4)}, "must be odd"),
    ],
)
def test_impossible_config(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_source_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"source \(1, 2304\): mel \(1, 80, 8\) needs \(1, 2048\)"):
        HiFT(LEAST).decode(random_mel(8), torch.zeros(1, 9 * 256))


def test_names_are_one_way() -> None:
    with pytest.raises(ValueError, match="maps to nothing"):
        rename({"resblocks.0.convs3.0.bais": torch.zeros(1)}, NAMES)
