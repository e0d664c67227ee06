"""CAM++: one vector that says who speaks, from a fbank of any length.

    layer:  h = relu bn W1 relu bn x                 x grows: concat(x, local(h) * gate)
            gate = sigmoid(W3 relu(W2 (mean_t h + mean of h in the same 100 frames)))
    voice = bn(W concat(mean_t x, std_t x))          std unbiased, bn without scale and shift

    fbank (B, F, M) --2-D convs--> (B, 320, F) --stride 2, dense blocks--> (B, C, T) --> (B, dim)

The fbank is Kaldi's less its mean over time (spec/cosyvoice.md 1.3): embed() subtracts the mean,
forward() takes it as subtracted. The vector is raw: take the mean over the clips of a speaker, then
normalise. Nothing is masked, so a batch has one length; embed() sorts clips by length. Deviation:
the public code gives NaN for a clip of fewer than 3 frames (45 ms), since a std needs two
positions; here such a clip is repeated up to 3 frames.
[Wang 2023, arXiv:2303.00332; spec/cosyvoice.md 3]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights import load_strict, match

MIN_FRAMES = 3  # of fbank: two positions after stride 2
FREQ_STRIDE = 8  # mel bins that become one: three strides of 2 in the head


@dataclass(frozen=True)
class CAMPlusConfig:
    mels: int = 80
    dim: int = 192  # of the voice vector
    init_channels: int = 128
    growth: int = 32  # channels that each dense layer adds
    bottleneck: int = 4  # inner width of a dense layer, in multiples of growth
    blocks: tuple[tuple[int, int], ...] = ((12, 1), (24, 2), (16, 2))  # (layers, dilation)
    head_channels: int = 32
    segment: int = 100  # frames after stride 2 over which the local context is averaged

    def __post_init__(self) -> None:
        sizes = (self.dim, self.init_channels, self.growth, self.bottleneck, self.head_channels)
        if min(*sizes, self.segment, *(n for block in self.blocks for n in block)) < 1:
            raise ValueError(f"all sizes must be at least 1, got {self}")
        if self.mels < 1 or self.mels % FREQ_STRIDE:
            raise ValueError(f"mels={self.mels} must be a multiple of {FREQ_STRIDE}")
        if self.growth * self.bottleneck % 2:
            raise ValueError(f"growth * bottleneck = {self.growth * self.bottleneck} must be even")


TINY = CAMPlusConfig(
    dim=64, init_channels=32, growth=16, blocks=((3, 1), (4, 2), (3, 2)), head_channels=8
)


class Residual(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        """stride: over frequency; time is never shortened here."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=(stride, 1), padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            conv = nn.Conv2d(channels, channels, 1, stride=(stride, 1), bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, M, F) -> (B, C, ceil(M / stride), F)"""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Head(nn.Module):
    """Reads the fbank as a picture: mel bins shrink by 8, frames stay."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.stage1 = nn.Sequential(Residual(channels, 2), Residual(channels, 1))
        self.stage2 = nn.Sequential(Residual(channels, 2), Residual(channels, 1))
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=(2, 1), padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, fbank: Tensor) -> Tensor:
        """fbank (B, F, M) -> (B, channels * M / 8, F)"""
        x = F.relu(self.norm1(self.conv1(fbank.mT[:, None])))  # (B, C, M, F)
        x = self.stage2(self.stage1(x))  # (B, C, M / 4, F)
        return F.relu(self.norm2(self.conv2(x))).flatten(1, 2)  # (B, C * M / 8, F)


class ContextLayer(nn.Module):
    """Adds `growth` channels; a gate that knows the segment and the whole clip scales them."""

    def __init__(self, width: int, inner: int, growth: int, dilation: int, segment: int) -> None:
        super().__init__()
        self.segment = segment
        self.norm1 = nn.BatchNorm1d(width)
        self.squeeze = nn.Conv1d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(inner)
        self.local = nn.Conv1d(inner, growth, 3, padding=dilation, dilation=dilation, bias=False)
        self.gate1 = nn.Conv1d(inner, inner // 2, 1)
        self.gate2 = nn.Conv1d(inner // 2, growth, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T) -> (B, C + growth, T)"""
        h = F.relu(self.norm2(self.squeeze(F.relu(self.norm1(x)))))  # (B, inner, T)
        # the last segment is averaged over the frames that it has
        parts = F.avg_pool1d(h, self.segment, self.segment, ceil_mode=True)  # (B, inner, segments)
        context = h.mean(-1, keepdim=True) + parts
        gate = self.gate2(F.relu(self.gate1(context))).sigmoid()  # (B, growth, segments)
        gate = gate.repeat_interleave(self.segment, -1)[..., : x.shape[-1]]  # (B, growth, T)
        return torch.cat([x, self.local(h) * gate], dim=1)  # (B, C + growth, T)


class DenseBlock(nn.Module):
    def __init__(
        self, width: int, layers: int, dilation: int, inner: int, growth: int, segment: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(  # counted from 1, as in the public names
            {
                str(j + 1): ContextLayer(width + j * growth, inner, growth, dilation, segment)
                for j in range(layers)
            }
        )
        width += layers * growth
        self.norm = nn.BatchNorm1d(width)
        self.halve = nn.Conv1d(width, width // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T) -> (B, (C + layers * growth) / 2, T)"""
        for layer in self.layers.values():
            x = layer(x)
        return self.halve(F.relu(self.norm(x)))


class CAMPlus(nn.Module):
    def __init__(self, cfg: CAMPlusConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.init_channels
        self.head = Head(cfg.head_channels)
        self.tdnn = nn.Conv1d(
            cfg.head_channels * cfg.mels // FREQ_STRIDE, width, 5, stride=2, padding=2, bias=False
        )
        self.norm1 = nn.BatchNorm1d(width)
        self.blocks = nn.ModuleDict()
        inner = cfg.growth * cfg.bottleneck
        for i, (layers, dilation) in enumerate(cfg.blocks, 1):
            self.blocks[str(i)] = DenseBlock(
                width, layers, dilation, inner, cfg.growth, cfg.segment
            )
            width = (width + layers * cfg.growth) // 2
        self.norm2 = nn.BatchNorm1d(width)
        self.out = nn.Conv1d(2 * width, cfg.dim, 1, bias=False)
        self.norm3 = nn.BatchNorm1d(cfg.dim, affine=False)

    def forward(self, fbank: Tensor) -> Tensor:
        """fbank (B, F, M), its mean over time subtracted, all of one length -> voices (B, dim).

        F may be as short as one frame, see the module's docstring; no frame is a ValueError."""
        if fbank.ndim != 3 or fbank.shape[2] != self.cfg.mels or fbank.shape[1] < 1:
            raise ValueError(
                f"fbank must be (B, F, {self.cfg.mels}) with F at least 1, got {(*fbank.shape,)};"
                " a clip needs 25 ms"
            )
        if fbank.shape[1] < MIN_FRAMES:
            fbank = fbank.repeat(1, MIN_FRAMES, 1)[:, :MIN_FRAMES]
        x = F.relu(self.norm1(self.tdnn(self.head(fbank))))  # (B, C, T), T = ceil(F / 2)
        for block in self.blocks.values():
            x = block(x)  # (B, C of this block, T)
        x = F.relu(self.norm2(x)).float()  # sums of squares are too coarse in bf16
        stats = torch.cat([x.mean(-1), x.std(-1)], dim=1)  # (B, 2 C)
        return self.norm3(self.out(stats[..., None]).squeeze(-1))  # (B, dim)

    @torch.no_grad()
    def embed(self, fbanks: Sequence[Tensor], batch: int = 16) -> Tensor:
        """n fbanks (F, M) of any lengths -> raw voices (n, dim), in the order given.

        The mean over time is subtracted here, so audio.kaldi_fbank's output goes straight in.
        Clips of one length share a forward pass, at most `batch` of them. Needs eval mode."""
        if self.training:
            raise ValueError("embed() in training mode would mix the clips of a batch: call eval()")
        if bad := [(*f.shape,) for f in fbanks if f.ndim != 2]:
            raise ValueError(f"each fbank must be (F, {self.cfg.mels}), got {bad[0]}")
        voices = self.out.weight.new_empty(len(fbanks), self.cfg.dim)  # (n, dim)
        order = sorted(range(len(fbanks)), key=lambda i: fbanks[i].shape[0])
        while order:
            same = [i for i in order[:batch] if fbanks[i].shape == fbanks[order[0]].shape]
            clips = torch.stack([fbanks[i] for i in same])  # (b, F, M), b <= batch
            voices[same] = self(clips - clips.mean(1, keepdim=True)).to(voices)
            order = order[len(same) :]
        return voices


def _norm(theirs: str, ours: str) -> dict[str, str]:
    """Rows for a BatchNorm, its statistics and its batch counter included."""
    kinds = "weight|bias|running_mean|running_var|num_batches_tracked"
    return {rf"{theirs}\.({kinds})": rf"{ours}.\{theirs.count('(') + 1}"}


_LAYER = r"xvector\.block(\d)\.tdnnd(\d+)"
NAMES = {  # public name (3D-Speaker's CAMPPlus, campplus_cn_common.bin) -> ours
    r"head\.(conv[12])\.weight": r"head.\1.weight",
    **_norm(r"head\.bn([12])", r"head.norm\1"),
    r"head\.layer([12])\.(\d)\.(conv[12])\.weight": r"head.stage\1.\2.\3.weight",
    **_norm(r"head\.layer([12])\.(\d)\.bn([12])", r"head.stage\1.\2.norm\3"),
    r"head\.layer([12])\.(\d)\.shortcut\.0\.weight": r"head.stage\1.\2.shortcut.0.weight",
    **_norm(r"head\.layer([12])\.(\d)\.shortcut\.1", r"head.stage\1.\2.shortcut.1"),
    r"xvector\.tdnn\.linear\.weight": r"tdnn.weight",
    **_norm(r"xvector\.tdnn\.nonlinear\.batchnorm", r"norm1"),
    **_norm(_LAYER + r"\.nonlinear([12])\.batchnorm", r"blocks.\1.layers.\2.norm\3"),
    _LAYER + r"\.linear1\.weight": r"blocks.\1.layers.\2.squeeze.weight",
    _LAYER + r"\.cam_layer\.linear_local\.weight": r"blocks.\1.layers.\2.local.weight",
    _LAYER + r"\.cam_layer\.linear([12])\.(weight|bias)": r"blocks.\1.layers.\2.gate\3.\4",
    **_norm(r"xvector\.transit(\d)\.nonlinear\.batchnorm", r"blocks.\1.norm"),
    r"xvector\.transit(\d)\.linear\.weight": r"blocks.\1.halve.weight",
    **_norm(r"xvector\.out_nonlinear\.batchnorm", r"norm2"),
    r"xvector\.dense\.linear\.weight": r"out.weight",
    **_norm(r"xvector\.dense\.nonlinear\.batchnorm", r"norm3"),
}


def complete(ours: Mapping[str, Tensor], model: CAMPlus) -> dict[str, Tensor]:
    """Batch counters may be missing (exports drop them, no result depends on them): then 0."""
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    return {name: torch.tensor(0) for name in counters} | dict(ours)


def load_public(model: CAMPlus, tensors: Mapping[str, Tensor], what: str = "CAM++ weights") -> None:
    """Fill `model` from tensors under public names, or raise ValueError with all differences."""
    ours, problems = match(tensors, NAMES)
    load_strict(model, complete(ours, model), what, problems)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = CAMPlus(TINY).eval()
    clips = [torch.randn(n, TINY.mels) for n in (3, 200, 345)]
    print("fbank", [(*c.shape,) for c in clips], "-> voices", (*model.embed(clips).shape,))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
