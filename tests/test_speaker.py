"""speaker.py: same voices as the public code, any clip length, trains from scratch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speaker import NAMES, TINY, CAMPlus, CAMPlusConfig, ContextLayer, load_public
from weights import as_config, load_strict, read_tensors, rename

GOLDEN = Path(__file__).parent / "golden" / "cosyvoice" / "campplus.safetensors"


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 2e-5 * theirs.abs().max())


def golden() -> tuple[CAMPlus, dict[str, Tensor], dict[str, Tensor]]:
    tensors = read_tensors(GOLDEN)
    public = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
    model = CAMPlus(CAMPlusConfig(dim=24, growth=4, bottleneck=2, init_channels=16)).eval()
    load_public(model, public)
    return model, tensors, public


def test_voices_match_the_public_code() -> None:
    model, g, _ = golden()
    with torch.no_grad():
        for i in (0, 1):  # above and below one segment of 100 frames
            assert close(model(g[f"in.fbank{i}"][None]), g[f"out.emb{i}"])
        batch = torch.stack([g["in.fbank1"], g["in.fbank1"].flip(0)])
        assert close(model(batch), g["out.emb_batch"])
        assert close(model.head(g["in.fbank1"][None]), g["mid1.head"])


def test_embed_groups_lengths_and_keeps_order() -> None:
    model, g, _ = golden()
    clips = [g["in.fbank1"] + 5, g["in.fbank0"], g["in.fbank1"].flip(0) - 3, g["in.fbank1"][:3]]
    voices = model.embed(clips, batch=2)
    assert close(voices[:1], g["out.emb1"])
    assert close(voices[1:2], g["out.emb0"])
    assert close(voices[[0, 2]], g["out.emb_batch"])
    assert close(voices[3:], model.embed(clips[3:]))
    assert model.embed([]).shape == (0, 24)


def test_public_sizes_and_names() -> None:
    model = CAMPlus(CAMPlusConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_848_544
    assert len(model.state_dict()) == 937
    small, _, public = golden()
    counters = {k.replace("_mean", "_var"): None for k in public if k.endswith("running_mean")}
    full = public | {
        k.replace("running_var", "num_batches_tracked"): torch.tensor(7) for k in counters
    }
    assert len(full) == 937  # the golden network has as many layers as the public one
    load_strict(small, rename(full, NAMES))
    load_public(small, full)
    assert small.norm3.num_batches_tracked == 7
    del public["xvector.block2.tdnnd24.cam_layer.linear2.bias"]
    with pytest.raises(ValueError, match=r"blocks\.2\.layers\.24\.gate2\.bias: in the model"):
        load_public(small, public)


@pytest.mark.parametrize("n", [1, 2, 50, 99, 100, 101, 230])
def test_gate_sees_the_clip_and_its_own_segment(n: int) -> None:
    torch.manual_seed(0)
    layer = ContextLayer(width=6, inner=8, growth=4, dilation=2, segment=50).eval()
    x = torch.randn(2, 6, n)
    h = F.relu(layer.norm2(layer.squeeze(F.relu(layer.norm1(x)))))
    gates = []
    for t in range(n):  # one frame at a time, as the paper writes it
        segment = h[..., t // 50 * 50 : (t // 50 + 1) * 50].mean(-1) + h.mean(-1)
        gates.append(layer.gate2(F.relu(layer.gate1(segment[..., None]))).sigmoid())
    expected = torch.cat([x, layer.local(h) * torch.cat(gates, -1)], dim=1)
    torch.testing.assert_close(layer(x), expected)


def test_short_clips_give_finite_voices() -> None:
    model, _, _ = golden()
    clip = torch.randn(5, 80)
    for n in (1, 2, 3, 4, 5):  # 3 frames are 45 ms
        assert model.embed([clip[:n]]).isfinite().all(), n
    repeated = torch.cat([clip[:2], clip[:1]])[None]
    assert torch.equal(model(clip[None, :2]), model(repeated))


def test_trains_from_scratch() -> None:
    torch.manual_seed(0)
    cfg = CAMPlusConfig(
        dim=16, init_channels=16, growth=8, blocks=((2, 1), (2, 2)), head_channels=4
    )
    model, classes = CAMPlus(cfg).train(), nn.Linear(16, 4)
    opt = torch.optim.AdamW([*model.parameters(), *classes.parameters()], 3e-3)
    colours, who = torch.randn(4, 1, 80), torch.arange(8) % 4

    def clips() -> Tensor:  # a speaker is a pattern over mel bins that moves with the sound
        return colours[who] * torch.randn(8, 40, 1) + 0.5 * torch.randn(8, 40, 80)

    for _ in range(25):
        loss = F.cross_entropy(classes(model(clips())), who)
        loss.backward()
        if _ == 0:
            for name, p in model.named_parameters():
                assert p.grad is not None, name
                assert p.grad.isfinite().all(), name
        opt.step()
        opt.zero_grad()
    assert loss < 0.3
    with torch.no_grad():
        assert (classes(model.eval()(clips())).argmax(-1) == who).float().mean() > 0.7


def test_silence_has_a_finite_gradient() -> None:
    """A channel that relu closes has standard deviation 0: its derivative must not be NaN."""
    torch.manual_seed(0)
    model = CAMPlus(TINY).eval()
    model(torch.zeros(2, 20, 80)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_tiny_is_tiny() -> None:
    assert sum(p.numel() for p in CAMPlus(TINY).parameters()) < 150_000


def test_config_survives_json_and_rejects_impossible_values() -> None:
    values = {**vars(CAMPlusConfig()), "blocks": [[12, 1], [24, 2], [16, 2]]}
    assert as_config(CAMPlusConfig, values) == CAMPlusConfig()
    with pytest.raises(ValueError, match="mels=81 must be a multiple of 8"):
        CAMPlusConfig(mels=81)
    with pytest.raises(ValueError, match="at least 1"):
        CAMPlusConfig(blocks=((3, 0),))


def test_rejects_wrong_input() -> None:
    model = CAMPlus(TINY)
    with pytest.raises(ValueError, match=r"\(B, F, 80\).*got \(1, 0, 80\)"):
        model(torch.zeros(1, 0, 80))
    with pytest.raises(ValueError, match=r"got \(1, 80, 200\)"):
        model(torch.zeros(1, 80, 200))
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        model.embed([torch.zeros(9, 80)])
    with pytest.raises(ValueError, match=r"each fbank must be \(F, 80\), got \(1, 9, 80\)"):
        model.eval().embed([torch.zeros(1, 9, 80)])
