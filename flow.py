"""Flow matching: speech units -> log-mel at 22.05 kHz, by integrating a learned velocity field.

    y_t = (1 - (1 - s) t) z + t x      x the mel, z ~ N(0, I), s = 1e-6: a straight path, noise to mel
    loss = | v(y_t, t, c) - (x - (1 - s) z) |^2        over the real frames, t ~ 1 - cos(pi U(0,1)/2)
    dx/dt = (1 + g) v(x, t, c) - g v(x, t, 0)          Euler on the same cosine grid, guidance g

    units (B, U) --UnitEncoder--> (B, U, C) --project--> (B, M, U) --stretch, LengthRegulator-->
    mu (B, M, F);  c = mu, voice (B, M), prompt frames (B, M, F)
    [x, mu, voice, prompt] (B, 4M, F) --Estimator, a U-Net over time with attention--> v (B, M, F)

M mel bins, F frames at 22050/256 Hz, U units at `unit_rate` Hz, X speaker vector, G channels.
[CosyVoice: Du et al. 2024, arXiv:2407.05407, sec. 2.3; the U-Net is Matcha-TTS's, arXiv:2309.03199]
Ours, off in the public configuration: mel normalisation, a prior loss |mu - x|, the speaker in mu,
and `masked_norm` with attention_bias="mask", under which a padded batch gives what single items do.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

SIGMA = 1e-6  # s above: what is left of the noise at t = 1
DROP_CONDITION = 0.2  # share of training items that learn the unconditional field
EDGE_UNITS = 20  # regulator "split": this many units at either end are stretched on their own
GROUPS = 8  # of the estimator's GroupNorms
SILENCE = math.log(1e-5)  # floor of the log-mel: what frames beyond an item's length hold


@dataclass(frozen=True)
class FlowConfig:
    units: int = 4096  # size of the unit vocabulary
    width: int = 512  # C, unit encoder
    blocks: int = 6
    heads: int = 8
    ffn: int = 2048
    speaker: int = 192  # X
    mels: int = 80  # M
    channels: tuple[int, ...] = (256, 256)  # G of the U-Net levels; each further one halves time
    estimator_heads: int = 8
    head_width: int = 64
    stage_blocks: int = 4  # transformer blocks per stage
    mid_stages: int = 12
    unit_rate: int = 50  # Hz
    sample_rate: int = 22050  # Hz
    hop: int = 256  # samples per mel frame
    guidance: float = 0.7  # g
    steps: int = 10
    regulator: str = "nearest"  # TASTE; "linear"; "split": linear in training, by parts in sample
    attention_bias: str = "add01"  # public; "mask": padding is really invisible
    masked_norm: bool = False  # own stretch ratio and norm statistics for each item of a batch
    dropout: float = 0.1  # unit encoder only
    mel_mean: float = 0.0  # the flow models (mel - mean) / std
    mel_std: float = 1.0
    prior_weight: float = 0.0  # of the prior loss in the total
    speaker_in_mu: bool = False  # mu hears the speaker too, so that mu alone can be a mel

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * heads={2 * self.heads}")
        if not self.channels or any(c % GROUPS or c <= 0 for c in self.channels):
            raise ValueError(f"channels={self.channels} must be multiples of {GROUPS}")
        if self.regulator not in ("nearest", "linear", "split"):
            raise ValueError(f"regulator={self.regulator!r}: use nearest, linear or split")
        if self.attention_bias not in ("add01", "mask"):
            raise ValueError(f"attention_bias={self.attention_bias!r}: use add01 or mask")
        if self.mel_std <= 0 or self.unit_rate <= 0 or self.steps < 0:
            raise ValueError("mel_std and unit_rate must be positive, steps not negative")

    @property
    def exact_padding(self) -> bool:
        """True if an item's result does not depend on the batch that it is in."""
        return self.masked_norm and self.attention_bias == "mask"

    def frames(self, units: int) -> int:
        """Mel frames that so many units become: floor, exact for every length."""
        return units * self.sample_rate // (self.hop * self.unit_rate)


TINY = FlowConfig(
    units=512,
    width=128,
    blocks=3,
    heads=4,
    ffn=384,
    speaker=64,
    channels=(96, 96),
    estimator_heads=4,
    head_width=32,
    stage_blocks=1,
    mid_stages=2,
    unit_rate=25,
    regulator="linear",
    attention_bias="mask",
    masked_norm=True,
    dropout=0.0,
    mel_mean=-6.0,
    mel_std=2.5,
    prior_weight=1.0,
    speaker_in_mu=True,
)


class FlowLoss(NamedTuple):
    total: Tensor  # flow + prior_weight * prior
    flow: Tensor  # velocity MSE per real value
    prior: Tensor  # mean |mu - mel| over real values, normalised mel


def lengths_to_keep(lengths: Tensor) -> Tensor:
    """lengths (B,) -> keep (B, max length) bool, True = real."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (B, F)


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """x (B, C, F) with padding set to zero; keep (B, F), None = all real."""
    return x if keep is None else x * keep[:, None]


def relative_table(length: int, width: int, like: Tensor) -> Tensor:
    """(2 length - 1, width) fp32: sines and cosines, interleaved, of length - 1 .. -(length - 1)."""
    distance = torch.arange(length - 1, -length, -1, device=like.device, dtype=torch.float32)
    pairs = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)
    angle = distance[:, None] * torch.exp(pairs * (-math.log(10000) / width))  # (2U-1, C/2)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (2U-1, C)


def relative_shift(scores: Tensor) -> Tensor:
    """(B, H, U, 2U-1), last axis = distance U-1 .. -(U-1) -> (B, H, U, U), entry (i, j) at i - j."""
    B, H, U, R = scores.shape
    rows = F.pad(scores, (1, 0)).view(B, H, R + 1, U)[:, :, 1:]  # (B, H, 2U-1, U): one place late
    return rows.reshape(B, H, U, R)[..., :U]  # (B, H, U, U)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        """fp32 also under autocast."""
        return super().forward(x.float())


class EncoderBlock(nn.Module):
    """Pre-norm transformer layer whose scores are [(q_i + u) k_j + (q_i + w) p_(i-j)] / sqrt(D)."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.position = nn.Linear(width, width, bias=False)
        self.u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, width // heads)))
        self.w = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, width // heads)))
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor, table: Tensor, keep: Tensor) -> Tensor:
        """x (B, U, C), table (2U-1, C), keep (B, U) -> (B, U, C)."""
        x = x + self.drop(self.attend(self.norm1(x), table, keep))
        return x + self.drop(self.down(self.drop(F.silu(self.up(self.norm2(x))))))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def attend(self, x: Tensor, table: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v))
        p = self.position(table).unflatten(1, (self.heads, -1)).transpose(0, 1)  # (H, 2U-1, D)
        content, place = ((q + bias).transpose(1, 2).to(v.dtype) for bias in (self.u, self.w))
        bias = relative_shift(place @ p.mT) / math.sqrt(q.shape[3])  # (B, H, U, U)
        bias = bias.masked_fill(~keep[:, None, None], -math.inf)
        y = F.scaled_dot_product_attention(  # (B, H, U, D)
            content, k.transpose(1, 2), v.transpose(1, 2), bias, self.dropout * self.training
        )
        return self.out(y.transpose(1, 2).flatten(2))  # (B, U, C)


class UnitEncoder(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        C = config.width
        self.dropout = config.dropout
        self.embed = nn.Embedding(config.units, C)
        self.speaker = nn.Linear(config.speaker, C) if config.speaker_in_mu else None
        self.enter, self.enter_norm = nn.Linear(C, C), LayerNorm(C)
        self.blocks = nn.ModuleList(
            EncoderBlock(C, config.heads, config.ffn, config.dropout) for _ in range(config.blocks)
        )
        self.norm = LayerNorm(C)

    def forward(self, units: Tensor, keep: Tensor, speaker: Tensor | None = None) -> Tensor:
        """units (B, U) int64, keep (B, U), speaker (B, X) -> (B, U, C)."""
        x = self.embed(units.clamp(min=0))  # (B, U, C)
        if self.speaker is not None:
            if speaker is None:
                raise ValueError("speaker_in_mu is set: mu needs the speaker vector (B, X)")
            x = x + self.speaker(F.normalize(speaker.float(), dim=1))[:, None]
        x = self.enter_norm(self.enter(x * keep[..., None]))
        table = relative_table(x.shape[1], x.shape[2], x)  # (2U-1, C)
        x, table = (F.dropout(y, self.dropout, self.training) for y in (x, table))
        x = x * math.sqrt(x.shape[2])
        for block in self.blocks:
            x = block(x, table, keep)
        return self.norm(x)


def stretch(x: Tensor, frames: int, kind: str, edge: int, prompt: tuple[int, int]) -> Tensor:
    """x (B, M, U) -> (B, M, frames), by interpolation in time, kind as FlowConfig.regulator.

    split: edge = frames of EDGE_UNITS units; prompt = (units, frames) at the start, own ratio."""
    if kind == "nearest":
        return F.interpolate(x, frames, mode="nearest")
    lengths = [prompt, (x.shape[2] - prompt[0], frames - prompt[1])]
    if kind == "linear":
        lengths = [(x.shape[2], frames)]
    elif lengths[1][0] > 2 * EDGE_UNITS:
        middle = (lengths[1][0] - 2 * EDGE_UNITS, lengths[1][1] - 2 * edge)
        lengths = [prompt, (EDGE_UNITS, edge), middle, (EDGE_UNITS, edge)]
    lengths = [pair for pair in lengths if pair[0]]
    parts = zip(x.split([n for n, _ in lengths], 2), lengths, strict=True)
    return torch.cat([F.interpolate(y, f, mode="linear") for y, (_, f) in parts], 2)  # (B, M, F)


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, G, F); fp32; with keep (B, F) the statistics are those of the real frames."""
        if keep is None:
            return super().forward(x.float())
        real = keep[:, None, None]  # (B, 1, 1, F)
        y = x.float().unflatten(1, (self.num_groups, -1)) * real  # (B, groups, G/groups, F)
        n = keep.sum(1)[:, None, None, None] * y.shape[2]
        y = (y - y.sum((2, 3), keepdim=True) / n) * real
        y = y * torch.rsqrt((y * y).sum((2, 3), keepdim=True) / n + self.eps)
        return y.flatten(1, 2) * self.weight[:, None] + self.bias[:, None]  # (B, G, F)


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int, masked_norm: bool) -> None:
        super().__init__()
        self.masked_norm = masked_norm
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.norm = GroupNorm(groups, outputs)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x (B, inputs, F) -> (B, outputs, F), zero beyond keep (B, F).

        Quirk: the public norm counts padding frames [Matcha-TTS]; masked_norm does not."""
        x = self.norm(self.conv(masked(x, keep)), keep if self.masked_norm else None)
        return masked(F.mish(x), keep)


class LengthRegulator(nn.Module):
    def __init__(self, mels: int, masked_norm: bool) -> None:
        super().__init__()
        self.masked_norm = masked_norm
        self.blocks = nn.ModuleList(ConvBlock(mels, mels, 1, masked_norm) for _ in range(4))
        self.out = nn.Conv1d(mels, mels, 1)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """x (B, M, F), already stretched, keep (B, F) -> mu (B, M, F)."""
        inner = keep if self.masked_norm else None  # Quirk: publicly only the output is masked
        for block in self.blocks:
            x = block(x, inner)
        return masked(self.out(x), keep)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int, masked_norm: bool) -> None:
        super().__init__()
        self.conv1 = ConvBlock(inputs, outputs, GROUPS, masked_norm)
        self.conv2 = ConvBlock(outputs, outputs, GROUPS, masked_norm)
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, keep: Tensor | None, time: Tensor) -> Tensor:
        """x (B, inputs, F), time (B, time) -> (B, outputs, F)."""
        h = self.conv1(x, keep) + self.time(F.mish(time))[:, :, None]
        return self.conv2(h, keep) + self.skip(masked(x, keep))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, F, G); mask as scaled_dot_product_attention takes it -> (B, F, G)."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).mT for f in (self.q, self.k, self.v))
        q, k, v = (y.permute(0, 3, 1, 2) if False else y for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask)  # (B, H, F, D)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))
