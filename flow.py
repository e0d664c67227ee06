"""Flow matching: speech units -> log-mel at 22.05 kHz, by integrating a learned velocity field.

    y_t = (1 - (1 - s) t) z + t x       x the mel, z ~ N(0, I), s = 1e-6: straight from noise to mel
    loss = |v(y_t, t, c) - (x - (1 - s) z)|^2     over real frames, t = 1 - cos(pi U(0, 1) / 2)
    dx/dt = (1 + g) v(x, t, c) - g v(x, t, 0)     Euler on the same cosine grid, guidance g

    units (B, U) --encoder--> (B, U, C) --project, stretch in time--> (B, M, F) --regulator--> mu
    [x, mu, voice, prompt] (B, 4M, F) --Estimator: U-Net over time, with attention--> v (B, M, F)

c = mu, voice (B, M), prompt = the first G frames of a recording of P units; X = speaker vector.
[CosyVoice: Du et al. 2024, arXiv:2407.05407, sec. 2.3; U-Net: Matcha-TTS, arXiv:2309.03199]
Ours, off by default: normalised mel, prior loss |mu - x|, speaker in mu, padding without a trace
(masked_norm with attention_bias="mask": a padded batch gives what single items give).
"""

import math
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA = 1e-6  # s above: the noise that is left at t = 1
SAMPLE_RATE, HOP = 22050, 256  # Hz, samples per frame
UNCONDITIONAL = 0.2  # share of training items that see no condition
EDGE, GROUPS = 20, 8  # units at an end that regulator "split" treats apart; of the U-Net's norms
SILENCE = math.log(1e-5)  # floor of the log-mel; stands beyond an item's last frame
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
    channels: tuple[int, ...] = (256, 256)  # U-Net levels, each at half the frame rate of the last
    estimator_heads: int = 8
    head_width: int = 64
    stage_blocks: int = 4  # transformer blocks per stage
    mid_stages: int = 12
    unit_rate: int = 50  # Hz
    guidance: float = 0.7  # g
    steps: int = 10  # Euler steps
    temperature: float = 1.0  # of the noise
    regulator: str = "nearest"  # as TASTE; "linear"; "split" = linear in training, parts in sample
    attention_bias: str = "add01"  # as the public weights; "mask" hides padding
    masked_norm: bool = False  # each item has norm statistics and a stretch ratio of its own
    dropout: float = 0.1  # unit encoder
    mel_mean: float = 0.0  # x = (log-mel - mean) / std
    mel_std: float = 1.0
    prior_weight: float = 0.0  # of |mu - x| in the total loss
    speaker_in_mu: bool = False  # mu depends on the voice, so that it can be a mel by itself
    parts: int = 1  # vectors per unit before stretching: one is coarse if a unit is many frames

    def __post_init__(self) -> None:
        for wrong, wanted in (
            (self.width % (2 * self.heads), "width a multiple of 2 * heads"),
            (any(n < 1 or n % GROUPS for n in self.channels or [0]), f"channels in {GROUPS}s"),
            (self.regulator not in ("nearest", "linear", "split"), "nearest, linear or split"),
            (self.attention_bias not in ("add01", "mask"), "attention_bias add01 or mask"),
            (self.mel_std <= 0 or self.unit_rate <= 0, "mel_std and unit_rate above 0"),
            (self.parts < 1 or (self.parts > 1 and self.regulator == "split"), "parts=1 to split"),
        ):
            if wrong:
                raise ValueError(f"the flow needs {wanted}, got {self}")

    def frames(self, units: Count) -> Count:
        """Mel frames of so many units: floor(units * 22050 / (256 * unit_rate)), in integers."""
        return units * SAMPLE_RATE // (HOP * self.unit_rate)


TINY = FlowConfig(  # 25 Hz units; the second half is ours
    units=1024, width=128, blocks=3, heads=4, ffn=256, speaker=64, channels=(64, 80),
    estimator_heads=4, head_width=32, stage_blocks=1, mid_stages=2, unit_rate=25,
    regulator="linear", attention_bias="mask", masked_norm=True, dropout=0.0,
    mel_mean=-6.6, mel_std=2.8, prior_weight=1.0, speaker_in_mu=True, parts=4,
    guidance=1.0, temperature=0.5,
)  # fmt: skip


class FlowLoss(NamedTuple):
    total: Tensor  # flow + prior_weight * prior
    flow: Tensor  # squared velocity error per real value
    prior: Tensor  # |mu - x| per real value
    end: Tensor  # (B, M, F) normalised mel where v, followed straight on from y_t, arrives


def up_to(lengths: Tensor) -> Tensor:
    """lengths (B,) -> keep (B, longest), True = real."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def masked(x: Tensor, keep: Tensor | None) -> Tensor:
    """x (B, M, F) with zeros beyond keep (B, F)."""
    return x if keep is None else x * keep[:, None]


class Block(nn.Module):
    """Pre-norm transformer; the relative one scores [(q_i + u) k_j + (q_i + v) p_(i-j)] / √D."""

    def __init__(
        self, width: int, heads: int, inner: int, ffn: int, relative: bool, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.drop, self.act = heads, nn.Dropout(dropout), F.silu if relative else F.gelu
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=relative) for _ in range(3))
        self.out = nn.Linear(inner, width)
        self.ff1, self.ff2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        if relative:
            self.p = nn.Linear(width, inner, bias=False)
            zeros = (torch.zeros(heads, inner // heads) for _ in range(2))
            self.bias_u, self.bias_v = map(nn.Parameter, zeros)

    def forward(self, x: Tensor, mask: Tensor | None, table: Tensor | None = None) -> Tensor:
        """x (B, F, C) fp32, mask as SDPA takes it, table (2F-1, C) if relative -> (B, F, C)."""
        h, shape = self.norm1(x), (self.heads, -1)
        q, k, v = (f(h).unflatten(2, shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        if table is not None and mask is not None:
            B, H, F_, D = q.shape
            p = self.p(table).unflatten(1, shape).transpose(0, 1)  # (H, 2F-1, D)
            score = F.pad((q + self.bias_v[:, None]) @ p.mT, (1, 0))  # (B, H, F, 2F)
            score = score.view(B, H, 2 * F_, F_)[:, :, 1:]  # moves row i by F-1-i to the left
            score = score.reshape(B, H, F_, 2 * F_ - 1)[..., :F_] / math.sqrt(D)  # (B, H, F, F)
            mask = score.masked_fill(~mask, -math.inf).to(v)
            q = (q + self.bias_u[:, None]).to(v)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.drop.p * self.training)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(2)))  # (B, F, C)
        return x + self.drop(self.ff2(self.drop(self.act(self.ff1(self.norm2(x))))))


class UnitEncoder(nn.Module):
    def __init__(self, c: FlowConfig) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(c.units, c.width), nn.Dropout(c.dropout)
        self.speaker = nn.Linear(c.speaker, c.width) if c.speaker_in_mu else None
        self.enter = nn.ModuleList([nn.Linear(c.width, c.width), nn.LayerNorm(c.width)])
        sizes = c.width, c.heads, c.width, c.ffn
        self.blocks = nn.ModuleList(Block(*sizes, True, c.dropout) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, units: Tensor, keep: Tensor, speaker: Tensor) -> Tensor:
        """units (B, U) int64, keep (B, U), speaker (B, X) -> (B, U, C)."""
        x = self.embed(units.clamp(min=0))  # (B, U, C)
        if self.speaker is not None:
            x = x + self.speaker(F.normalize(speaker.float(), dim=1))[:, None]
        x = self.enter[1](self.enter[0](x * keep[..., None]).float())
        U, C = x.shape[1:]
        rates = torch.exp(torch.arange(0, C, 2, device=x.device) * (-math.log(10000) / C))
        angle = torch.arange(U - 1, -U, -1, device=x.device)[:, None] * rates  # (2U-1, C/2)
        table = self.drop(torch.stack([angle.sin(), angle.cos()], 2).flatten(1))  # (2U-1, C)
        x = self.drop(x) * math.sqrt(C)
        for block in self.blocks:
            x = block(x, keep[:, None, None], table)
        return self.norm(x)


def stretch(x: Tensor, frames: int, kind: str, prompt: tuple[int, int], edge: int) -> Tensor:
    """x (B, M, U) -> (B, M, frames). "split": the prompt (units, frames) by itself and, of more
    than 2 EDGE units after it, the first and the last EDGE, which become `edge` frames each."""
    if kind != "split":
        return F.interpolate(x, frames, mode=kind)
    U, rest = x.shape[2] - prompt[0], frames - prompt[1]
    parts = [prompt, (U, rest)]
    if U > 2 * EDGE:
        parts[1:] = [(EDGE, edge), (U - 2 * EDGE, rest - 2 * edge), (EDGE, edge)]
    pieces = zip(x.split([u for u, _ in parts], 2), parts, strict=True)
    return torch.cat([F.interpolate(y, f, mode="linear") for y, (u, f) in pieces if u], 2)


class ConvBlock(nn.ModuleList):
    def __init__(self, inputs: int, outputs: int, groups: int, masked_norm: bool) -> None:
        super().__init__([nn.Conv1d(inputs, outputs, 3, padding=1), nn.GroupNorm(groups, outputs)])
        self.masked_norm = masked_norm

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Mish(GroupNorm(conv x)): x (B, inputs, F), keep (B, F) -> (B, outputs, F)."""
        conv, norm = self[0], self[1]
        x = conv(masked(x, keep)).float()  # (B, outputs, F)
        if keep is None or not self.masked_norm:
            x = norm(x)  # Quirk: the public statistics count padding [Matcha-TTS]
        else:
            real = keep[:, None, None]  # (B, 1, 1, F)
            y = x.unflatten(1, (norm.num_groups, -1)) * real  # (B, groups, outputs / groups, F)
            n = real.sum(3, keepdim=True) * y.shape[2]  # (B, 1, 1, 1)
            y = (y - y.sum((2, 3), keepdim=True) / n) * real
            y = y * torch.rsqrt(y.square().sum((2, 3), keepdim=True) / n + norm.eps)
            weight, bias = (p[:, None] for p in norm.parameters())
            x = y.flatten(1, 2) * weight + bias  # (B, outputs, F)
        return masked(F.mish(x), keep)


class Stage(nn.Module):
    """A ResNet block that hears the time, transformer blocks, and `next`, to another frame rate."""

    def __init__(self, c: FlowConfig, inputs: int, width: int, next: str) -> None:
        super().__init__()
        self.add01 = c.attention_bias == "add01"
        self.time = nn.Linear(4 * c.channels[0], width)
        self.conv1 = ConvBlock(inputs, width, GROUPS, c.masked_norm)
        self.conv2 = ConvBlock(width, width, GROUPS, c.masked_norm)
        self.skip = nn.Conv1d(inputs, width, 1)
        sizes = width, c.estimator_heads, c.estimator_heads * c.head_width, 4 * width
        self.blocks = nn.ModuleList(Block(*sizes, False, 0.0) for _ in range(c.stage_blocks))
        conv = nn.ConvTranspose1d if next == "up" else nn.Conv1d
        size = {"up": (4, 2, 1), "down": (3, 2, 1)}.get(next, (3, 1, 1))
        self.next = conv(width, width, *size) if next else nn.Identity()

    def forward(self, x: Tensor, keep: Tensor | None, time: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, inputs, F), keep (B, F), time (B, T) -> (B, width, F), and that after `next`."""
        h = self.conv1(x, keep) + self.time(F.mish(time))[:, :, None]
        x = (self.conv2(h, keep) + self.skip(masked(x, keep))).mT  # (B, F, width)
        mask = None if keep is None else keep[:, None, None]  # (B, 1, 1, F)
        if mask is not None and self.add01:  # Quirk: padding is but e times weaker [CosyVoice 2024]
            mask = (mask & mask.mT).float()  # (B, 1, F, F), added to the logits
        for block in self.blocks:
            x = block(x, mask)
        return x.mT, self.next(masked(x.mT, keep))


class Estimator(nn.Module):
    def __init__(self, c: FlowConfig) -> None:
        super().__init__()
        sizes, time = c.channels, 4 * c.channels[0]
        down, up = ([way] * (len(sizes) - 1) + ["same"] for way in ("down", "up"))
        ins, outs = (4 * c.mels, *sizes[:-1]), (*sizes[-2::-1], sizes[0])
        self.time1, self.time2 = nn.Linear(4 * c.mels, time), nn.Linear(time, time)
        self.down = nn.ModuleList(map(Stage, repeat(c), ins, sizes, down))
        self.mid = nn.ModuleList(Stage(c, sizes[-1], sizes[-1], "") for _ in range(c.mid_stages))
        self.up = nn.ModuleList(map(Stage, repeat(c), [2 * n for n in sizes[::-1]], outs, up))
        self.last = ConvBlock(sizes[0], sizes[0], GROUPS, c.masked_norm)
        self.project = nn.Conv1d(sizes[0], c.mels, 1)
        nn.init.normal_(self.project.weight, std=0.01)  # training starts near v = 0

    def forward(self, x: Tensor, keep: Tensor | None, t: Tensor) -> Tensor:
        """x (B, 4M, F), keep (B, F), t (B,) in [0, 1] -> v (B, M, F) fp32, 0 beyond keep."""
        half = self.time1.in_features // 2
        rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        angle = 1000 * t.float()[:, None] * rates  # (B, 2M)
        time = self.time2(F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], 1))))
        skips, level = [], keep
        for stage in self.down:
            skip, x = stage(x, level, time)  # x (B, channels, F / 2), rounded up
            skips.append((skip, level))
            if level is not None and x.shape[2] < level.shape[1]:
                level = level[:, ::2]
        for stage in self.mid:
            _, x = stage(x, level, time)
        for stage in self.up:
            skip, level = skips.pop()
            x = torch.cat([x[..., : skip.shape[2]], skip], 1)  # (B, 2 channels, F)
            _, x = stage(x, level, time)  # (B, channels, 2 F), perhaps one too many
        return masked(self.project(self.last(x, keep)), keep).float()


class Flow(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config, M = config, config.mels
        self.encoder, self.project = UnitEncoder(config), nn.Linear(config.width, config.parts * M)
        blocks = [ConvBlock(M, M, 1, config.masked_norm) for _ in range(4)]
        self.regulator = nn.ModuleList([*blocks, nn.Conv1d(M, M, 1)])
        self.speaker, self.estimator = nn.Linear(config.speaker, M), Estimator(config)

    def voice(self, speaker: Tensor) -> Tensor:
        """Speaker vectors of any length (B, X) -> (B, M)."""
        return self.speaker(F.normalize(speaker.float(), dim=1))

    def mu(
        self, units: Tensor, unit_len: Tensor, mel_len: Tensor, speaker: Tensor,
        prompt: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """units (B, U), lengths (B,), speaker (B, X) -> normalised mu (B, M, F), keep (B, F).
        prompt: the (units, frames) that lead every item; given when sampling, None in training."""
        c, real, keep = self.config, up_to(unit_len), up_to(mel_len)
        x = self.project(self.encoder(units[:, : real.shape[1]], real, speaker))  # (B, U, parts M)
        x = x.unflatten(2, (c.parts, -1)).flatten(1, 2).mT  # (B, M, U parts)
        kind = "linear" if c.regulator == "split" and prompt is None else c.regulator
        how = kind, prompt or (0, 0), c.frames(EDGE)
        if c.masked_norm:
            items = zip(x, unit_len.tolist(), mel_len.tolist(), strict=True)
            rows = [
                stretch(y[None, :, : u * c.parts], f, *how)[0].mT for y, u, f in items
            ]  # (F, M) each
            x = nn.utils.rnn.pad_sequence(rows, batch_first=True).mT  # (B, M, F)
        else:  # Quirk: one ratio for the whole batch, so padding changes the timing
            x = stretch(x, keep.shape[1], *how)  # (B, M, F)
        for block in self.regulator[:-1]:
            x = block(x, keep if c.masked_norm else None)
        return masked(self.regulator[-1](x), keep).float(), keep

    def velocity(
        self, x: Tensor, keep: Tensor | None, mu: Tensor, t: Tensor, voice: Tensor, prompt: Tensor
    ) -> Tensor:
        """x, mu, prompt (B, M, F), keep (B, F), t (B,), voice (B, M) -> dx/dt (B, M, F)."""
        return self.estimator(torch.cat([x, mu, voice[..., None].expand_as(x), prompt], 1), keep, t)

    def loss(
        self, units: Tensor, unit_len: Tensor, mel: Tensor, mel_len: Tensor, speaker: Tensor,
        prompt_len: Tensor | None = None, t: Tensor | None = None, noise: Tensor | None = None,
        cfg_keep: Tensor | None = None,
    ) -> FlowLoss:  # fmt: skip
        """units (B, U), log-mel (B, M, F), lengths (B,), speaker (B, X); the first prompt_len (B,)
        frames are shown. Drawn if None: t (B,), noise (B, M, F), cfg_keep (B,), True = sees c."""
        mu, keep = self.mu(units, unit_len, mel_len, speaker)
        x = masked((mel[..., : mu.shape[2]] - self.config.mel_mean) / self.config.mel_std, keep)
        z = torch.randn_like(x) if noise is None else noise
        draw = torch.rand(2, len(x), device=x.device)
        t = 1 - torch.cos(draw[0] * math.pi / 2) if t is None else t
        on = (draw[1] > UNCONDITIONAL if cfg_keep is None else cfg_keep)[:, None, None]
        shown = torch.zeros_like(mel_len) if prompt_len is None else prompt_len
        prompt = x * (torch.arange(x.shape[2], device=x.device) < shown[:, None, None])
        u = x - (1 - SIGMA) * z  # the velocity to learn, constant along the path
        y = z + t[:, None, None] * u
        v = self.velocity(y, keep, mu * on, t, self.voice(speaker) * on[:, 0], prompt * on)
        n = keep.sum() * x.shape[1]
        flow = masked(v - u, keep).square().sum() / n
        prior = (mu - x).abs().sum() / n
        end = y + (1 - t)[:, None, None] * v
        return FlowLoss(flow + self.config.prior_weight * prior, flow, prior, end)

    def integrate(self, x: Tensor, keep: Tensor, c: list[Tensor], steps: int, g: float) -> Tensor:
        """Noise x (B, M, F), c = mu, voice, prompt as in velocity -> normalised mel (B, M, F)."""
        B, n = len(x), 2 if g else 1  # with and without condition, in one batch
        mu, voice, prompt = (torch.cat([y, torch.zeros_like(y)])[: n * B] for y in c)
        twice = None if bool(keep.all()) else keep.repeat(n, 1)  # (2B, F)
        grid = 1 - torch.cos(torch.linspace(0, math.pi / 2, steps + 1, device=x.device))
        for t, step in zip(grid, grid.diff(), strict=False):
            v = self.velocity(x.repeat(n, 1, 1), twice, mu, t.expand(n * B), voice, prompt)
            x = x + step * ((1 + g) * v[:B] - g * v[-B:])
        return x

    @torch.no_grad()
    def sample(
        self, units: Tensor, unit_len: Tensor, speaker: Tensor,
        prompt: tuple[Tensor, Tensor] | None = None, steps: int | None = None,
        guidance: float | None = None, noise: Tensor | None = None,
        rng: torch.Generator | None = None, temperature: float | None = None,
        mel_len: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """units (B, U), unit_len (B,), speaker (B, X) -> log-mel (B, M, F), mel_len (B,).
        prompt: units (B, P) and log-mel (B, M, G) of a recording to go on from, not in the result.
        noise (B, M, G + F): drawn from `rng` (CPU) if None. steps=0: mu, which needs the prior.
        mel_len (B,): how long to make it, if not as long as the units last."""
        c, B = self.config, len(units)
        mel_len = c.frames(unit_len) if mel_len is None else mel_len
        if int(mel_len.min()) < 1 or int(units.max()) >= c.units:
            raise ValueError(f"need units < {c.units}, lengths >= 1, got {units.max()}, {unit_len}")
        steps = c.steps if steps is None else steps
        guidance = c.guidance if guidance is None else guidance
        temperature = c.temperature if temperature is None else temperature
        head, mel = prompt or (units[:, :0], speaker.new_zeros(B, c.mels, 0))
        P, G = head.shape[1], mel.shape[2]
        if noise is None:
            noise = torch.randn(B, c.mels, G + int(mel_len.max()), generator=rng)
        if B > 1 and (c.masked_norm, c.attention_bias) != (True, "mask"):  # Quirk: padding is heard
            rows, batch = [], (units, unit_len, speaker, head, mel, noise, mel_len)
            for u, n, voice, h, m, z, f in zip(*(y.split(1) for y in batch), strict=True):
                one = self.sample(u, n, voice, (h, m), steps, guidance, z, None, temperature, f)[0]
                rows.append(one[0].mT)  # (F, M)
            return nn.utils.rnn.pad_sequence(rows, True, SILENCE).mT, mel_len
        units = torch.cat([head, units], 1)  # (B, P + U)
        x, keep = self.mu(units, P + unit_len, G + mel_len, speaker, (P, G))
        if steps:
            shown = F.pad((mel - c.mel_mean) / c.mel_std, (0, x.shape[2] - G))  # (B, M, G + F)
            z = temperature * noise[..., : x.shape[2]].to(x)
            x = self.integrate(z, keep, [x, self.voice(speaker), shown], steps, guidance)
        x = (c.mel_mean + c.mel_std * x).masked_fill(~keep[:, None], SILENCE)
        return x[..., G:], mel_len


LAYER, OURS = r"encoder\.encoders\.(\d+)\.", r"encoder.blocks.\1."
STAGE, THIS = r"decoder\.estimator\.(down|mid|up)_blocks\.(\d+)\.", r"estimator.\1.\2."
NAMES = {  # flow.pt -> ours
    r"input_embedding\.(.+)": r"encoder.embed.\1",
    r"encoder\.embed\.out\.(.+)": r"encoder.enter.\1",
    r"encoder\.after_norm\.(.+)": r"encoder.norm.\1",
    LAYER + r"norm_mha\.(.+)": OURS + r"norm1.\2",
    LAYER + r"norm_ff\.(.+)": OURS + r"norm2.\2",
    LAYER + r"self_attn\.linear_(q|k|v|out|p)(?:os)?\.(.+)": OURS + r"\2.\3",
    LAYER + r"self_attn\.pos_bias_([uv])": OURS + r"bias_\2",
    LAYER + r"feed_forward\.w_(\d)\.(.+)": OURS + r"ff\2.\3",
    r"encoder_proj\.(.+)": r"project.\1",
    r"length_regulator\.model\.12\.(.+)": r"regulator.4.\1",
    r"spk_embed_affine_layer\.(.+)": r"speaker.\1",
    r"decoder\.estimator\.time_mlp\.linear_(\d)\.(.+)": r"estimator.time\1.\2",
    STAGE + r"0\.mlp\.1\.(.+)": THIS + r"time.\3",
    STAGE + r"0\.block(\d)\.block\.(.+)": THIS + r"conv\3.\4",
    STAGE + r"0\.res_conv\.(.+)": THIS + r"skip.\3",
    STAGE + r"1\.(\d+)\.norm1\.(.+)": THIS + r"blocks.\3.norm1.\4",
    STAGE + r"1\.(\d+)\.norm3\.(.+)": THIS + r"blocks.\3.norm2.\4",
    STAGE + r"1\.(\d+)\.attn1\.to_(q|k|v|out)\.(?:0\.)?(.+)": THIS + r"blocks.\3.\4.\5",
    STAGE + r"1\.(\d+)\.ff\.net\.0\.proj\.(.+)": THIS + r"blocks.\3.ff1.\4",
    STAGE + r"1\.(\d+)\.ff\.net\.2\.(.+)": THIS + r"blocks.\3.ff2.\4",
    STAGE + r"2\.(?:conv\.)?(weight|bias)": THIS + r"next.\3",
    r"decoder\.estimator\.final_block\.block\.(.+)": r"estimator.last.\1",
    r"decoder\.estimator\.final_proj\.(.+)": r"estimator.project.\1",
}
for i, j in ((i, j) for i in range(4) for j in range(2)):  # conv, norm, Mish, conv, ...
    NAMES[rf"length_regulator\.model\.{3 * i + j}\.(.+)"] = rf"regulator.{i}.{j}.\1"


if __name__ == "__main__":
    flow = Flow(TINY).eval()
    units, unit_len = torch.randint(TINY.units, (2, 75)), torch.tensor([75, 50])
    mel, mel_len = flow.sample(units, unit_len, torch.randn(2, TINY.speaker))
    count = sum(p.numel() for p in flow.parameters())
    print(f"units {(*units.shape,)} -> mel {(*mel.shape,)}, {count:,} parameters")
