"""s3_units.py: same units as the public code, any duration, and a codebook that learns."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import audio
from s3_units import DEAD, DECAY, NAMES, TINY, S3Config, S3Units, load_public, sinusoids
from weights import read_tensors, rename

GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
SMALL = S3Config(n_mels=8, width=16, heads=2, layers=2, ffn=32, max_frames=30, codes=32)
SMALL_25HZ = dataclasses.replace(SMALL, strides=(2, 2))
CONFIGS = pytest.mark.parametrize("cfg", [SMALL, SMALL_25HZ], ids=["50Hz", "25Hz"])


def golden() -> tuple[S3Units, dict[str, Tensor]]:
    tensors = read_tensors(GOLDEN / "s3_tokenizer.safetensors")
    model = S3Units(S3Config(width=64, heads=4, layers=2, ffn=256, codes=256)).eval()
    load_public(model, {k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    return model, tensors


def small(cfg: S3Config, seed: int = 0) -> S3Units:
    """Random weights, and a codebook of its own features: units then vary."""
    torch.manual_seed(seed)
    model = S3Units(cfg)
    torch.nn.init.normal_(model.positions, std=0.1)
    h, _ = model.features(torch.randn(4, cfg.n_mels, cfg.window))
    model.quantize(h.detach())
    return model.eval()


@pytest.mark.parametrize("name", ["speech_tokenizer_v1", "speech_tokenizer_v1_25hz"])
@pytest.mark.parametrize("seed", [0, 1])
def test_units_are_those_of_s3tokenizer(name: str, seed: int) -> None:
    """The package itself: random weights, another size for each seed, a padded batch."""
    lib = pytest.importorskip("s3tokenizer.model")
    torch.manual_seed(seed)
    width, heads, layers = ((64, 4, 2), (96, 3, 3))[seed]
    sizes = lib.ModelConfig(80 + 48 * seed, 1500, width, heads, layers, 300)
    theirs = lib.S3Tokenizer(name, sizes).eval()
    strides = (2, 2) if name.endswith("25hz") else (1, 2)
    cfg = S3Config(sizes.n_mels, width, heads, layers, 4 * width, codes=300, strides=strides)
    model = S3Units(cfg).eval()
    mel, mel_len = torch.randn(3, cfg.n_mels, 400), torch.tensor([400, 251, 36])
    with torch.no_grad():
        hidden, lengths = theirs.encoder(mel, mel_len)
        real = torch.arange(hidden.shape[1]) < lengths[:, None]
        frames = F.normalize(hidden[real], dim=-1)
        pick = torch.randperm(len(frames)).repeat(9)[:300]
        codebook = F.normalize(frames[pick] + 0.05 * torch.randn(300, width), dim=-1)
        theirs.quantizer._codebook.embed.copy_(codebook)
    load_public(model, theirs.state_dict())
    h, keep = model.features(mel, mel_len)
    assert torch.equal(keep, real)
    assert (h - hidden)[real].abs().max() <= 2e-5 * hidden[real].abs().max()
    wanted, wanted_len = theirs.quantize(mel, mel_len)
    units, unit_len = model(mel, mel_len)
    assert torch.equal(unit_len, wanted_len)
    for ours, expected, n in zip(units, wanted, wanted_len, strict=True):
        assert len({*expected[:n].tolist()}) > 3
        assert torch.equal(ours[:n], expected[:n])


def test_features_and_units_match_the_public_code() -> None:
    model, g = golden()
    inner: dict[str, Tensor] = {}
    stages = {"conv1_pre_gelu": model.conv1, "conv2_pre_gelu": model.conv2}
    for name, stage in (stages | {"block0": model.blocks[0]}).items():
        stage.register_forward_hook(lambda _, x, y, name=name: inner.update({name: y}))
    h, keep = model.features(g["in.mel"], g["in.mel_len"])
    for name, ours in inner.items():
        theirs = g[f"mid.{name}"]
        if name == "block0":  # padded rows hold what nobody reads
            ours, theirs = ours[keep], theirs[keep]
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    assert len(inner) == 3
    assert (h - g["out.hidden"])[keep].abs().max() <= 2e-5 * g["out.hidden"][keep].abs().max()
    units, lengths = model(g["in.mel"], g["in.mel_len"])
    assert lengths.tolist() == g["out.code_len"].tolist()
    assert torch.equal(units[keep], g["out.codes"][keep])
    assert (units[~keep] == -1).all()
    x = F.normalize(h, dim=-1)
    distance = torch.cdist(x.double(), model.codebook.double()).square()
    theirs = -g["out.neg_sqdist"].view_as(distance)[keep]
    assert (distance[keep] - theirs).abs().max() <= 2e-5 * theirs.max()
    alone, _ = model(g["in.mel"][1:, :, : g["in.mel_len"][1]])
    assert torch.equal(alone, g["out.codes_item1_alone"])


def test_nearest_is_the_argmin_of_the_distance_to_stored_codes() -> None:
    model, g = golden()
    model.codebook *= torch.linspace(0.5, 1.5, 256)[:, None]  # norms must count
    x = F.normalize(g["out.hidden"], dim=-1)
    expected = torch.cdist(x.double(), model.codebook.double()).argmin(-1)
    assert torch.equal(model.nearest(g["out.hidden"]), expected)


def test_41_seconds_match_the_public_windows() -> None:
    model, _ = golden()
    g = read_tensors(GOLDEN / "s3_tokenizer_long.safetensors")
    assert torch.equal(model.encode(g["in.mel"][0].float()), g["out.codes"][0])


def test_public_sizes_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda w, **_: w)  # memory untouched
    model = S3Units(S3Config())
    assert sum(p.numel() for p in model.parameters()) == 123_466_240
    assert len(model.state_dict()) == 96 + 1  # the public file lacks `usage`
    model, g = golden()
    public = {k[2:]: v for k, v in g.items() if k.startswith("w.")}
    assert {"usage"} == model.state_dict().keys() - rename(public, NAMES).keys()
    del public["encoder.blocks.1.attn.out.bias"]
    with pytest.raises(ValueError, match=r"blocks\.1\.out\.bias: in the model, not in the file"):
        load_public(model, public)


def test_positions_are_whispers_sinusoids() -> None:
    _, g = golden()
    expected = g["w.encoder.positional_embedding"]
    torch.testing.assert_close(sinusoids(1500, 64), expected, rtol=0, atol=2e-4)  # angles to 1500


@CONFIGS
def test_padded_batch_equals_single_items(cfg: S3Config) -> None:
    model = small(cfg)
    lengths = torch.tensor([1, 2, 3, cfg.window // 2 + 1, cfg.window])
    mel = torch.randn(5, cfg.n_mels, cfg.window)
    for i, n in enumerate(lengths):
        mel[i, :, n:] = float("nan")  # nothing may be read there
    units, unit_lengths = model(mel, lengths)
    h, _ = model.features(mel, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone, _ = model(mel[i : i + 1, :, :n])
        m = int(unit_lengths[i])
        assert m == cfg.n_units(n) == alone.shape[1]
        assert torch.equal(units[i, :m], alone[0])
        assert (units[i, m:] == -1).all()
        expected, _ = model.features(mel[i : i + 1, :, :n])
        torch.testing.assert_close(h[i, :m], expected[0], rtol=0, atol=1e-5)
    assert len(units[units >= 0].unique()) > 5


@pytest.mark.parametrize("cfg", [S3Config(), TINY, SMALL, SMALL_25HZ, S3Config(max_frames=7)])
def test_windows_give_each_unit_once_for_every_length(cfg: S3Config) -> None:
    model = S3Units(dataclasses.replace(SMALL, max_frames=cfg.max_frames, strides=cfg.strides))
    step = 1 if cfg.window <= 200 else 13
    defects = [5201, 5210, 5400, 5500, 5598, 7801, 7900, 8198, 10401]  # the public code loses some
    for n in [*range(1, 5 * cfg.window, step), *defects]:
        spans = cfg.windows(n)
        assert spans[-1][1] == n
        assert all(end < n and end - start == cfg.window for start, end in spans[:-1])
        parts = [torch.arange(a // cfg.stride, cfg.n_units(b)) for a, b in spans]
        assert torch.equal(model._join(parts), torch.arange(cfg.n_units(n))), n


def test_public_window_is_30_s_with_4_s_overlap() -> None:
    for cfg in (S3Config(), TINY):
        assert cfg.windows(3000) == [(0, 3000)]
        assert cfg.windows(5210) == [(0, 3000), (2600, 5210)]
        assert cfg.windows(5601) == [(0, 3000), (2600, 5600), (5200, 5601)]
        assert cfg.trim * cfg.stride == 200


@CONFIGS
def test_encode_any_duration(cfg: S3Config) -> None:
    model = small(cfg)
    mels = [torch.randn(cfg.n_mels, n) for n in (1, 2, 5, 59, 60, 61, 119, 120, 121, 333)]
    together = model.encode(mels, batch=3)
    for mel, units in zip(mels, together, strict=True):
        assert units.shape == (-(-mel.shape[1] // cfg.stride),)
        assert torch.equal(units, model.encode(mel))
        assert 0 <= units.min() <= units.max() < cfg.codes
    assert torch.equal(together[3], model(mels[3][None])[0][0])
    assert model.encode([]) == []


RATE, WINDOW = 16000, 30 * 16000
LENGTHS = [1, 2, 159, 160, 161, 319, 320, 321, 479, 480, 639, 640, 641, 799, 800]
LENGTHS += [n * RATE + d for n in (1, 29, 30, 56, 82) for d in (-1, 0, 1, 160, 161)]
LENGTHS += [WINDOW + 160 * d + r for d in (1, 2, 3) for r in (-1, 0, 1)]  # 30.01 s and more
LENGTHS += [180 * RATE + d for d in (-1, 0)]


@pytest.mark.parametrize("strides", [(1, 2), (2, 2)], ids=["50Hz", "25Hz"])
def test_a_wav_of_any_length_has_a_unit_for_every_fiftieth_of_a_second_begun(
    strides: tuple[int, int],
) -> None:
    """1 sample to 3 minutes, and the windows of 30 s at real size (the network is small)."""
    max_frames = 3000 // (strides[0] * strides[1])
    cfg = dataclasses.replace(SMALL, layers=0, strides=strides, max_frames=max_frames)
    model, hertz = small(cfg), 100 // cfg.stride
    torch.manual_seed(1)
    long = 0.1 * torch.randn(180 * RATE)
    for n in LENGTHS:
        units = model.encode_wav(long[:n])
        assert len(units) == -(-n * hertz // RATE), n
        assert 0 <= units.min() <= units.max() < cfg.codes
        public = model.encode(audio.whisper_mel(long[:n], cfg.n_mels))
        assert torch.equal(units[: len(public)], public)
        assert len(units) - len(public) == (0 < n % (RATE // hertz) < 160 < n)


@CONFIGS
def test_long_units_equal_those_of_their_window(cfg: S3Config) -> None:
    model, n = small(cfg), 3 * cfg.window + 5
    mel = torch.randn(cfg.n_mels, n)
    units, trim = model.encode(mel), cfg.trim
    a, b = cfg.windows(n)[1]
    expected = model(mel[None, :, a:b])[0][0, trim:-trim]
    start = a // cfg.stride + trim
    assert torch.equal(units[start : start + len(expected)], expected)


def test_quantize_values_gradient_and_padding() -> None:
    model = small(SMALL)
    h = torch.randn(2, 7, 16, requires_grad=True)
    keep = torch.arange(7) < torch.tensor([7, 4])[:, None]
    units, quantized, loss = model.quantize(h, keep)
    assert torch.equal(quantized[keep], model.codebook[units[keep]])
    assert (units[~keep] == -1).all()
    assert (quantized[~keep] == 0).all()
    x = F.normalize(h, dim=-1)
    expected = (x - model.codebook[units])[keep].square().sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    weight = torch.randn(2, 7, 16)
    got = torch.autograd.grad((quantized * weight).sum(), h)[0]
    wanted = torch.autograd.grad((x * weight)[keep].sum(), h)[0]  # as if not quantized
    torch.testing.assert_close(got, wanted)


def test_codebook_follows_the_moving_average() -> None:
    torch.manual_seed(0)
    model, h = S3Units(SMALL), torch.randn(4, 50, 16)
    keep = torch.rand(4, 50) < 0.8
    frames = F.normalize(h, dim=-1)[keep]
    model.codebook.copy_(frames[:32])
    model.usage.fill_(3.0)
    before = model.codebook.clone()
    units, _, _ = model.train().quantize(h, keep)
    for k in range(32):
        mine = frames[units[keep] == k]
        count = DECAY * 3 + (1 - DECAY) * len(mine)
        code = (DECAY * 3 * before[k] + (1 - DECAY) * mine.sum(0)) / count
        torch.testing.assert_close(model.usage[k], torch.tensor(count))
        torch.testing.assert_close(model.codebook[k], code)


def test_first_batch_initialises_and_eval_never_learns() -> None:
    torch.manual_seed(0)
    model, h = S3Units(SMALL), torch.randn(3, 40, 16)
    keep = torch.arange(40) < torch.tensor([40, 9, 1])[:, None]
    empty = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval().quantize(h, keep)
    model.train()(torch.randn(1, 8, 20))  # forward does not learn either
    model.encode(torch.randn(8, 20))
    assert all(torch.equal(v, empty[k]) for k, v in model.state_dict().items())
    units, _, loss = model.quantize(h, keep)
    assert len(units[keep].unique()) == 32  # distinct frames: each is its own nearest code
    assert loss < 1
    few = S3Units(SMALL).train()
    assert few.quantize(h[:1, :5])[2] < 1e-6  # fewer frames than codes


def test_dead_codes_move_onto_frames() -> None:
    model, h = small(SMALL).train(), torch.randn(4, 50, 16)
    model.usage[:] = 5.0
    model.usage[[3, 8]] = DEAD
    model.codebook[[3, 8]] = 100.0  # never the nearest
    model.quantize(h)
    similarity = model.codebook[[3, 8]] @ F.normalize(h, dim=-1).flatten(0, 1).T
    torch.testing.assert_close(similarity.amax(1), torch.ones(2))
    assert (model.usage[[3, 8]] > 4).all()


def test_learning_uses_the_codebook_and_lowers_the_error() -> None:
    torch.manual_seed(0)
    model, centres = S3Units(SMALL).train(), torch.randn(32, 16) * 3
    # all frames of the first batches lie near 4 of the 32 centres
    losses = []
    for step in range(300):
        picks = torch.randint(4 if step < 20 else 32, (2, 100))
        losses.append(model.quantize(centres[picks] + 0.1 * torch.randn(2, 100, 16))[2])
    assert losses[-1] < 0.3 * losses[20]
    units = model.eval().nearest(centres)
    assert len(units.unique()) >= 20  # from 4; k-means stays in local optima


def test_resumed_training_equals_uninterrupted() -> None:
    def steps(model: S3Units, first: int, last: int) -> None:
        opt = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(first, last):
            torch.manual_seed(step)
            _, quantized, loss = model.quantize(*model.features(torch.randn(2, 8, 60)))
            (loss + quantized.square().mean()).backward()
            opt.step()
            opt.zero_grad()

    torch.manual_seed(0)
    whole, again = S3Units(SMALL).train(), S3Units(SMALL).train()
    steps(whole, 0, 3)
    again.load_state_dict({k: v.clone() for k, v in whole.state_dict().items()})
    steps(whole, 3, 6)
    steps(again, 3, 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = S3Units(SMALL_25HZ).train()
    h, keep = model.features(torch.randn(2, 8, 60), torch.tensor([60, 33]))
    _, quantized, _ = model.quantize(h, keep)
    (quantized * torch.randn(16)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_units_do_not_change_under_autocast() -> None:
    model, g = golden()
    h = g["out.hidden"]
    with torch.autocast("cpu", torch.bfloat16):
        units, quantized, loss = model.quantize(h)
        assert torch.equal(model.nearest(h), units)
    assert torch.equal(units, model.nearest(h))
    assert quantized.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("mel", "lengths", "message"),
    [
        (torch.zeros(1, 8, 61), None, r"61 mel frames.*at most 60; use encode"),
        (torch.zeros(1, 9, 20), None, r"\(B, 8, F\), got \(1, 9, 20\)"),
        (torch.zeros(2, 8, 20), torch.tensor([20, 0]), r"1\.\.20, got \[20, 0\]"),
        (torch.zeros(2, 8, 20), torch.tensor([21, 3]), r"1\.\.20, got \[21, 3\]"),
    ],
)
def test_rejects_wrong_input(mel: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S3Units(SMALL)(mel, lengths)


def test_rejects_nothing_to_do_and_impossible_configs() -> None:
    model = S3Units(SMALL)
    with pytest.raises(ValueError, match="all of it is padding"):
        model.quantize(torch.zeros(1, 3, 16), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(M, F\) with F at least 1, got \(8, 0\)"):
        model.encode(torch.zeros(8, 0))
    with pytest.raises(ValueError, match=r"width=10.*multiple of heads=4"):
        S3Config(width=10, heads=4)
    with pytest.raises(ValueError, match="at least 1"):
        S3Config(codes=0)


def _learn_on_rank(rank: int, file: str, h: Tensor, state: dict[str, Tensor], out: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # each rank draws its own random frames: rank 0's must win
    model = S3Units(SMALL).train()
    model.load_state_dict(state)
    model.quantize(h[rank : rank + 1])
    torch.save(model.state_dict(), f"{out}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_like_one(tmp_path: Path) -> None:
    model, h = small(SMALL).train(), torch.randn(2, 60, 16)
    model.usage.fill_(2.0)
    model.usage[7], model.codebook[7] = DEAD, 100.0
    args = (str(tmp_path / "init"), h, model.state_dict(), str(tmp_path / "out"))
    torch.multiprocessing.spawn(_learn_on_rank, args, nprocs=2)
    first, second = (torch.load(f"{args[3]}.{rank}", weights_only=True) for rank in (0, 1))
    model.quantize(h)
    for name in ("codebook", "usage"):
        assert torch.equal(first[name], second[name])
        alive = torch.arange(32) != 7
        torch.testing.assert_close(first[name][alive], model.state_dict()[name][alive])
