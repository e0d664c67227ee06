"""Flow matching: speech units -> log-mel at 22.05 kHz, by integrating a learned velocity field.

    y_t = (1 - (1 - s) t) z + t x       x the mel, z ~ N(0, I), s = 1e-6: straight from noise to mel
    loss = |v(y_t, t, c) - (x - (1 - s) z)|^2     over real frames, t = 1 - cos(pi U(0, 1) / 2)
    dx/dt = (1 + g) v(x, t, c) - g v(x, t, 0)     Euler on the same cosine grid, guidance g

    units (B, U) --encoder--> (B, U, C) --project, stretch in time--> (B, M, F) --regulator--> mu
    [x, mu, voice, prompt] (B, 4M, F) --Estimator: U-Net over time, with attention--> v (B, M, F)

c = mu, voice (B, M) and prompt, the first frames of a recording. M mel bins, F frames at 22050/256
Hz, U units at `unit_rate` Hz, X speaker vector, P prompt units, G prompt frames.
[CosyVoice: Du et al. 2024, arXiv:2407.05407, sec. 2.3; U-Net: Matcha-TTS, arXiv:2309.03199]
Ours, off by default: normalised mel, prior loss |mu - x|, speaker in mu, and padding that leaves no
trace (masked_norm with attention_bias="mask": a padded batch gives what single items give).
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

SIGMA = 1e-6  # s above: the noise that is left at t = 1
SAMPLE_RATE, HOP = 22050, 256  # Hz, samples per frame
UNCONDITIONAL = 0.2  # share of training items that see no condition
EDGE = 20  # units at either end that regulator "split" stretches on their own
GROUPS = 8  # of the estimator's norms
SILENCE = math.log(1e-5)  # floor of the log-mel: stands beyond an item's last frame
Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class FlowConfig:
    units: int = 4096  # vocabulary
    width: int = 512  # C
    blocks: int = 6
    heads: int = 8
    ffn: int = 2048
    speaker: int = 192  # X
    mels: int = 80  # M
    channels: tuple[int, ...] = (256, 256)  # of the U-Net's levels, each at half the frame rate
    estimator_heads: int = 8
    head_width: int = 64
    stage_blocks: int = 4  # transformer blocks per stage
    mid_stages: int = 12
    unit_rate: int = 50  # Hz
    guidance: float = 0.7  # g
    steps: int = 10  # Euler steps
    regulator: str = "nearest"  # TASTE; or "linear"; "split": linear in training, parts in sample
    attention_bias: str = "add01"  # the public weights'; "mask" hides padding
    masked_norm: bool = False  # each item of a batch has its own norm statistics and stretch ratio
    dropout: float = 0.1  # unit encoder
    mel_mean: float = 0.0  # x = (mel - mean) / std
    mel_std: float = 1.0
    prior_weight: float = 0.0  # of |mu - x| in the total loss
    speaker_in_mu: bool = False  # mu depends on the voice, so it can be a mel by itself

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be a multiple of 2 * heads={2 * self.heads}")
        if not self.channels or any(c < 1 or c % GROUPS for c in self.channels):
            raise ValueError(f"channels={self.channels} must be multiples of {GROUPS}")
        if self.regulator not in ("nearest", "linear", "split"):
            raise ValueError(f"regulator={self.regulator!r}: use nearest, linear or split")
        if self.attention_bias not in ("add01", "mask"):
            raise ValueError(f"attention_bias={self.attention_bias!r}: use add01 or mask")
        if min(self.mel_std, self.unit_rate, self.steps + 1) <= 0:
            raise ValueError("mel_std and unit_rate must be positive, steps 0 or more")

    @property
    def exact_padding(self) -> bool:
        """True if an item's result does not depend on its batch."""
        return self.masked_norm and self.attention_bias == "mask"

    def frames(self, units: Count) -> Count:
        """Number of mel frames that so many units become."""
        return units * SAMPLE_RATE // (HOP * self.unit_rate)


TINY = FlowConfig(
    units=1024,
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
    flow: Tensor  # squared velocity error per real value
    prior: Tensor  # |mu - x| per real value


def up_to(lengths: Tensor) -> Tensor:
    """lengths (B,) -> keep (B, longest), True = real."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """x (B, M, F) with zeros beyond keep (B, F)."""
    return x if keep is None else x * keep[:, None]


class Block(nn.Module):
    """Pre-norm transformer layer; a relative one scores [(q_i + u) k_j + (q_i + w) p_{i-j}] / √D."""

    def __init__(
        self, width: int, heads: int, inner: int, ffn: int, relative: bool, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.drop, self.act = heads, nn.Dropout(dropout), F.silu if relative else F.gelu
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=relative) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)
        if relative:
            self.p = nn.Linear(width, inner, bias=False)
            self.u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, inner // heads)))
            self.w = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, inner // heads)))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, F, D)

    def forward(self, x: Tensor, mask: Tensor | None, table: Tensor | None = None) -> Tensor:
        """x (B, F, C), mask as SDPA takes it, table (2F-1, C) of a relative layer -> (B, F, C)."""
        h = self.norm1(x)
        q, k, v = self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h))
        if table is not None:
            mask = self.place(q, table).masked_fill(~mask, -math.inf)
            q = (q + self.u[:, None]).to(k.dtype)
        drop = self.drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, drop)  # (B, H, F, D)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))  # (B, F, C)
        return x + self.drop(self.down(self.drop(self.act(self.up(self.norm2(x))))))

    def place(self, q: Tensor, table: Tensor) -> Tensor:
        """The term of the distance i - j: q (B, H, F, D) -> (B, H, F, F)."""
        B, H, F_, D = q.shape
        score = (q + self.w[:, None]) @ self.split(self.p(table)[None]).mT  # (B, H, F, 2F-1)
        score = F.pad(score, (1, 0)).view(B, H, 2 * F_, F_)[:, :, 1:]  # row i moves left by F-1-i
        return score.reshape(B, H, F_, 2 * F_ - 1)[..., :F_].to(q.dtype) / math.sqrt(D)


class UnitEncoder(nn.Module):
    def __init__(self, c: FlowConfig) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(c.units, c.width), nn.Dropout(c.dropout)
        self.speaker = nn.Linear(c.speaker, c.width) if c.speaker_in_mu else None
        self.enter, self.enter_norm = nn.Linear(c.width, c.width), nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.width, c.ffn, True, c.dropout) for _ in range(c.blocks)
        )
        self.norm = nn.LayerNorm(c.width)

    def forward(self, units: Tensor, keep: Tensor, speaker: Tensor) -> Tensor:
        """units (B, U) int64, keep (B, U), speaker (B, X) -> (B, U, C)."""
        x = self.embed(units.clamp(min=0))  # (B, U, C)
        if self.speaker is not None:
            x = x + self.speaker(F.normalize(speaker.float(), dim=1))[:, None]
        x = self.drop(self.enter_norm(self.enter(x * keep[..., None]).float())) * math.sqrt(
            x.shape[2]
        )
        table = self.drop(self.table(*x.shape[1:], x.device))
        for block in self.blocks:
            x = block(x, keep[:, None, None], table)
        return self.norm(x)

    def table(self, length: int, width: int, device: torch.device) -> Tensor:
        """Sines and cosines, interleaved, of distances length-1 .. 1-length: (2 length - 1, width)"""
        distance = torch.arange(length - 1, -length, -1, device=device)
        rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000) / width))
        angle = distance[:, None] * rates  # (2U-1, C/2)
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (2U-1, C)


def stretch(x: Tensor, frames: int, kind: str, prompt: tuple[int, int], edge: int) -> Tensor:
    """x (B, M, U) -> (B, M, frames). "split": the prompt (units, frames) by itself and, of more than
    2 EDGE units after it, the first and the last EDGE, which become `edge` frames each."""
    if kind != "split":
        return F.interpolate(x, frames, mode=kind)
    U, F_ = x.shape[2] - prompt[0], frames - prompt[1]
    parts = [prompt, (U, F_)]
    if U > 2 * EDGE:
        parts[1:] = [(EDGE, edge), (U - 2 * EDGE, F_ - 2 * edge), (EDGE, edge)]
    pieces = zip(x.split([u for u, _ in parts], 2), parts, strict=True)
    return torch.cat([F.interpolate(y, f, mode="linear") for y, (u, f) in pieces if u], 2)


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int, masked_norm: bool) -> None:
        super().__init__()
        self.masked_norm = masked_norm
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(groups, outputs)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Mish(GroupNorm(conv x)): x (B, inputs, F), keep (B, F) -> (B, outputs, F)."""
        x = self.conv(masked(x, keep)).float()  # (B, outputs, F)
        if keep is None or not self.masked_norm:
            x = self.norm(x)  # Quirk: publicly the statistics count padding [Matcha-TTS]
        else:
            real = keep[:, None, None]
            n = real.sum(3, keepdim=True) * x.shape[1] / self.norm.num_groups
            y = x.unflatten(1, (self.norm.num_groups, -1)) * real  # (B, groups, _, F)
            y = (y - y.sum((2, 3), keepdim=True) / n) * real
            y = y * torch.rsqrt(y.square().sum((2, 3), keepdim=True) / n + self.norm.eps)
            x = y.flatten(1, 2) * self.norm.weight[:, None] + self.norm.bias[:, None]
        return masked(F.mish(x), keep)


class Stage(nn.Module):
    """A ResNet block that hears the time, transformer blocks, and `next`, to another frame rate."""

    def __init__(self, c: FlowConfig, inputs: int, width: int, next: str = "") -> None:
        super().__init__()
        self.bias = c.attention_bias
        self.time = nn.Linear(4 * c.channels[0], width)
        self.conv1 = ConvBlock(inputs, width, GROUPS, c.masked_norm)
        self.conv2 = ConvBlock(width, width, GROUPS, c.masked_norm)
        self.skip = nn.Conv1d(inputs, width, 1)
        sizes = width, c.estimator_heads, c.estimator_heads * c.head_width, 4 * width
        self.blocks = nn.ModuleList(Block(*sizes, False, 0.0) for _ in range(c.stage_blocks))
        if next == "up":
            self.next: nn.Module = nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)
        elif next:
            self.next = nn.Conv1d(width, width, 3, stride=2 if next == "down" else 1, padding=1)

    def forward(self, x: Tensor, keep: Tensor | None, time: Tensor) -> Tensor:
        """x (B, inputs, F), keep (B, F), time (B, 4 channels) -> (B, width, F), without `next`."""
        h = self.conv1(x, keep) + self.time(F.mish(time))[:, :, None]
        x = (self.conv2(h, keep) + self.skip(masked(x, keep))).mT  # (B, F, width)
        mask = None if keep is None else keep[:, None, None]  # (B, 1, 1, F)
        if mask is not None and self.bias == "add01":
            # Quirk: added to the logits, so padding is only e times weaker [CosyVoice 2024-09]
            mask = (mask & mask.mT).to(self.blocks[0].out.weight.dtype)  # (B, 1, F, F)
        for block in self.blocks:
            x = block(x, mask)
        return x.mT  # (B, width, F)


class Estimator(nn.Module):
    def __init__(self, c: FlowConfig) -> None:
        super().__init__()
        sizes, time = c.channels, 4 * c.channels[0]
        down, up = ([kind] * (len(sizes) - 1) + ["same"] for kind in ("down", "up"))
        ins, outs = (4 * c.mels, *sizes[:-1]), (*sizes[-2::-1], sizes[0])
        self.time1, self.time2 = nn.Linear(4 * c.mels, time), nn.Linear(time, time)
        self.down = nn.ModuleList(map(partial(Stage, c), ins, sizes, down))
        self.mid = nn.ModuleList(Stage(c, sizes[-1], sizes[-1]) for _ in range(c.mid_stages))
        self.up = nn.ModuleList(map(partial(Stage, c), [2 * n for n in sizes[::-1]], outs, up))
        self.last = ConvBlock(sizes[0], sizes[0], GROUPS, c.masked_norm)
        self.project = nn.Conv1d(sizes[0], c.mels, 1)
        nn.init.normal_(self.project.weight, std=0.01)  # training starts near v = 0

    def embed(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1] -> (B, 4 channels)"""
        half = self.time1.in_features // 2
        rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        angle = 1000 * t.float()[:, None] * rates  # (B, 2M)
        return self.time2(F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], 1))))

    def forward(self, x: Tensor, keep: Tensor | None, t: Tensor) -> Tensor:
        """x (B, 4M, F), keep (B, F) or None, t (B,) -> v (B, M, F) fp32, 0 beyond keep."""
        time, skips, level = self.embed(t), [], keep
        for stage in self.down:
            x = stage(x, level, time)
            skips.append((x, level))
            x = stage.next(masked(x, level))  # (B, channels, F / 2), rounded up
            if level is not None and stage is not self.down[-1]:
                level = level[:, ::2]
        for stage in self.mid:
            x = stage(x, level, time)
        for stage in self.up:
            skip, level = skips.pop()
            x = stage(torch.cat([x[..., : skip.shape[2]], skip], 1), level, time)
            x = stage.next(masked(x, level))  # (B, channels, 2 F), perhaps one too many
        return masked(self.project(self.last(x, keep)), keep).float()


class Flow(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder, self.project = UnitEncoder(c), nn.Linear(c.width, c.mels)
        self.regulator = nn.ModuleList(
            ConvBlock(c.mels, c.mels, 1, c.masked_norm) for _ in range(4)
        )
        self.regulated = nn.Conv1d(c.mels, c.mels, 1)
        self.speaker, self.estimator = nn.Linear(c.speaker, c.mels), Estimator(c)

    def voice(self, speaker: Tensor) -> Tensor:
        """Speaker vectors of any length (B, X) -> (B, M)."""
        return self.speaker(F.normalize(speaker.float(), dim=1))

    def mu(
        self,
        units: Tensor,
        unit_len: Tensor,
        mel_len: Tensor,
        speaker: Tensor,
        prompt: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """units (B, U), unit_len (B,), mel_len (B,), speaker (B, X) -> mu (B, M, F), keep (B, F).

        prompt: (units, frames) that lead every item; given when sampling, None in training."""
        c, real, keep = self.config, up_to(unit_len), up_to(mel_len)
        x = self.project(self.encoder(units[:, : real.shape[1]], real, speaker)).mT  # (B, M, U)
        kind = "linear" if c.regulator == "split" and prompt is None else c.regulator
        how = kind, prompt or (0, 0), c.frames(EDGE)
        if c.masked_norm:
            items = zip(x, unit_len.tolist(), mel_len.tolist(), strict=True)
            rows = [stretch(y[None, :, :u], f, *how)[0].mT for y, u, f in items]  # (F, M) each
            x = pad_sequence(rows, batch_first=True).mT  # (B, M, F)
        else:  # Quirk: one ratio for the whole batch, so padding changes the timing
            x = stretch(x, keep.shape[1], *how)  # (B, M, F)
        for block in self.regulator:
            x = block(x, keep if c.masked_norm else None)
        return masked(self.regulated(x), keep).float(), keep

    def velocity(
        self, x: Tensor, keep: Tensor | None, mu: Tensor, t: Tensor, voice: Tensor, prompt: Tensor
    ) -> Tensor:
        """x, mu, prompt (B, M, F), keep (B, F), t (B,), voice (B, M) -> dx/dt (B, M, F)."""
        wide = voice[:, :, None].expand(-1, -1, x.shape[2])  # (B, M, F)
        return self.estimator(torch.cat([x, mu, wide, prompt], 1), keep, t)

    def loss(
        self,
        units: Tensor,
        unit_len: Tensor,
        mel: Tensor,
        mel_len: Tensor,
        speaker: Tensor,
        prompt_len: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        cfg_keep: Tensor | None = None,
    ) -> FlowLoss:
        """units (B, U), log-mel (B, M, F), their lengths (B,), speaker (B, X) -> three scalars.

        prompt_len (B,): mel frames shown as prompt. Drawn unless given: t (B,) in [0, 1], noise
        (B, M, F), cfg_keep (B,) bool, False = sees no condition. [sec. 2.3]"""
        mu, keep = self.mu(units, unit_len, mel_len, speaker)
        x = masked((mel[..., : mu.shape[2]] - self.config.mel_mean) / self.config.mel_std, keep)
        if t is None:
            t = 1 - torch.cos(torch.rand(len(x), device=x.device) * math.pi / 2)
        if cfg_keep is None:
            cfg_keep = torch.rand(len(x), device=x.device) > UNCONDITIONAL
        z = torch.randn_like(x) if noise is None else noise
        shown = torch.zeros_like(unit_len) if prompt_len is None else prompt_len
        prompt = x * (torch.arange(x.shape[2], device=x.device) < shown[:, None, None])
        on, s = cfg_keep[:, None, None], t[:, None, None]
        y = (1 - (1 - SIGMA) * s) * z + s * x
        v = self.velocity(y, keep, mu * on, t, self.voice(speaker) * on[:, 0], prompt * on)
        n = keep.sum() * x.shape[1]
        flow = masked(v - (x - (1 - SIGMA) * z), keep).square().sum() / n
        prior = (mu - x).abs().sum() / n
        return FlowLoss(flow + self.config.prior_weight * prior, flow, prior)

    def integrate(
        self,
        x: Tensor,
        keep: Tensor,
        mu: Tensor,
        voice: Tensor,
        prompt: Tensor,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """Noise x (B, M, F) at t = 0 -> normalised mel (B, M, F) at t = 1; the rest as velocity."""
        B, n = len(x), 2 if guidance else 1  # with and without condition in one batch
        mu, voice, prompt = (torch.cat([y, y * 0])[: n * B] for y in (mu, voice, prompt))
        twice = None if bool(keep.all()) else keep.repeat(n, 1)
        grid = 1 - torch.cos(torch.linspace(0, math.pi / 2, steps + 1, device=x.device))
        for start, end in pairwise(grid):
            v = self.velocity(x.repeat(n, 1, 1), twice, mu, start.expand(n * B), voice, prompt)
            x = x + (end - start) * ((1 + guidance) * v[:B] - guidance * v[-B:])
        return x

    @torch.no_grad()
    def sample(
        self,
        units: Tensor,
        unit_len: Tensor,
        speaker: Tensor,
        prompt: tuple[Tensor, Tensor] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        rng: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """units (B, U), unit_len (B,), speaker (B, X) -> log-mel (B, M, F), mel_len (B,).

        prompt: units (B, P) and log-mel (B, M, G) of a recording to go on from, not in the result.
        noise (B, M, G + F) is drawn from `rng` unless given. steps=0: mu itself, needs the prior."""
        c, B = self.config, len(units)
        if int(unit_len.min()) < 1 or int(units.max()) >= c.units:
            worst = int(unit_len.min()), int(units.max())
            raise ValueError(f"need lengths >= 1 and units < {c.units}, got {worst}")
        head, mel = prompt or (units[:, :0], speaker.new_zeros(B, c.mels, 0))
        P, G = head.shape[1], mel.shape[2]
        mel_len = c.frames(unit_len)
        if noise is None:
            shape = B, c.mels, G + int(mel_len.max())
            noise = torch.randn(shape, generator=rng, device=rng and rng.device).to(mel)
        if not c.exact_padding and bool((unit_len != unit_len[0]).any()):
            rows = []  # Quirk: padding would change the result, so one by one
            for b in range(B):
                one, row = slice(b, b + 1), noise[b : b + 1, :, : G + int(mel_len[b])]
                given = units[one], unit_len[one], speaker[one], (head[one], mel[one])
                rows.append(self.sample(*given, steps, guidance, row, None, temperature)[0][0].mT)
            return pad_sequence(rows, batch_first=True, padding_value=SILENCE).mT, mel_len
        both = torch.cat([head, units], 1)
        mu, keep = self.mu(both, P + unit_len, G + mel_len, speaker, (P, G))
        shown = F.pad((mel - c.mel_mean) / c.mel_std, (0, mu.shape[2] - G))
        steps, guidance = (
            c.steps if steps is None else steps,
            c.guidance if guidance is None else guidance,
        )
        x = (
            mu
            if steps == 0
            else self.integrate(
                temperature * noise, keep, mu, self.voice(speaker), shown, steps, guidance
            )
        )
        x = (c.mel_mean + c.mel_std * x).masked_fill(~keep[:, None], SILENCE)
        return x[..., G:], mel_len


def prompt_lengths(mel_len: Tensor) -> Tensor:
    """mel_len (B,) -> frames to show in training: none for half the items, else up to 30 %."""
    share = torch.rand(mel_len.shape, device=mel_len.device)
    half = torch.rand(mel_len.shape, device=mel_len.device) < 0.5
    return half * (share * (1 + (0.3 * mel_len).floor())).long()


LAYER = r"encoder\.encoders\.(\d+)\."
STAGE = r"decoder\.estimator\.(down|mid|up)_blocks\.(\d+)\."
NAMES = {  # flow.pt -> ours
    r"input_embedding\.(.+)": r"encoder.embed.\1",
    r"encoder\.embed\.out\.0\.(.+)": r"encoder.enter.\1",
    r"encoder\.embed\.out\.1\.(.+)": r"encoder.enter_norm.\1",
    r"encoder\.after_norm\.(.+)": r"encoder.norm.\1",
    LAYER + r"norm_mha\.(.+)": r"encoder.blocks.\1.norm1.\2",
    LAYER + r"norm_ff\.(.+)": r"encoder.blocks.\1.norm2.\2",
    LAYER + r"self_attn\.linear_(q|k|v|out)\.(.+)": r"encoder.blocks.\1.\2.\3",
    LAYER + r"self_attn\.linear_pos\.(.+)": r"encoder.blocks.\1.p.\2",
    LAYER + r"self_attn\.pos_bias_u": r"encoder.blocks.\1.u",
    LAYER + r"self_attn\.pos_bias_v": r"encoder.blocks.\1.w",
    LAYER + r"feed_forward\.w_1\.(.+)": r"encoder.blocks.\1.up.\2",
    LAYER + r"feed_forward\.w_2\.(.+)": r"encoder.blocks.\1.down.\2",
    r"encoder_proj\.(.+)": r"project.\1",
    r"length_regulator\.model\.12\.(.+)": r"regulated.\1",
    r"spk_embed_affine_layer\.(.+)": r"speaker.\1",
    r"decoder\.estimator\.time_mlp\.linear_(\d)\.(.+)": r"estimator.time\1.\2",
    STAGE + r"0\.mlp\.1\.(.+)": r"estimator.\1.\2.time.\3",
    STAGE + r"0\.block(\d)\.block\.0\.(.+)": r"estimator.\1.\2.conv\3.conv.\4",
    STAGE + r"0\.block(\d)\.block\.1\.(.+)": r"estimator.\1.\2.conv\3.norm.\4",
    STAGE + r"0\.res_conv\.(.+)": r"estimator.\1.\2.skip.\3",
    STAGE + r"1\.(\d+)\.norm1\.(.+)": r"estimator.\1.\2.blocks.\3.norm1.\4",
    STAGE + r"1\.(\d+)\.norm3\.(.+)": r"estimator.\1.\2.blocks.\3.norm2.\4",
    STAGE + r"1\.(\d+)\.attn1\.to_([qkv])\.(.+)": r"estimator.\1.\2.blocks.\3.\4.\5",
    STAGE + r"1\.(\d+)\.attn1\.to_out\.0\.(.+)": r"estimator.\1.\2.blocks.\3.out.\4",
    STAGE + r"1\.(\d+)\.ff\.net\.0\.proj\.(.+)": r"estimator.\1.\2.blocks.\3.up.\4",
    STAGE + r"1\.(\d+)\.ff\.net\.2\.(.+)": r"estimator.\1.\2.blocks.\3.down.\4",
    STAGE + r"2\.(?:conv\.)?(weight|bias)": r"estimator.\1.\2.next.\3",
    r"decoder\.estimator\.final_block\.block\.0\.(.+)": r"estimator.last.conv.\1",
    r"decoder\.estimator\.final_block\.block\.1\.(.+)": r"estimator.last.norm.\1",
    r"decoder\.estimator\.final_proj\.(.+)": r"estimator.project.\1",
}
for i in range(4):
    NAMES[rf"length_regulator\.model\.{3 * i}\.(.+)"] = rf"regulator.{i}.conv.\1"
    NAMES[rf"length_regulator\.model\.{3 * i + 1}\.(.+)"] = rf"regulator.{i}.norm.\1"


if __name__ == "__main__":
    flow = Flow(TINY).eval()
    units, unit_len = torch.randint(TINY.units, (2, 75)), torch.tensor([75, 50])
    mel, mel_len = flow.sample(units, unit_len, torch.randn(2, TINY.speaker))
    print(f"units {(*units.shape,)} -> mel {(*mel.shape,)}, frames {mel_len.tolist()}")
    print(f"{sum(p.numel() for p in flow.parameters()):,} parameters")
