"""S3 units: a Whisper-style encoder cut after a few layers, and one vector quantizer behind it.

    h    = blocks(gelu(conv2(gelu(conv1(mel)))) + positions)       no final norm
    unit = argmin_k |h / |h| - e_k|^2                               codes e as stored
    learning: n_k, e_k follow the frames that chose code k:   n' = a n + (1 - a) count_k
              e' = (a n e + (1 - a) sum_k) / n'               a = .99 (van den Oord 2017, app. A.1)

    mel (B, M, F) 100 Hz --convs, strides--> (B, T, C) --blocks--> h --> units (B, T) int64
    any duration: windows of 30 s that overlap by 4 s, 2 s dropped on each side with a neighbour

T counts frames after the strides: 50 Hz in the public model, 25 Hz in TINY. The network is that of
speech_tokenizer_v1 [CosyVoice, arXiv:2407.05407, sec. 2.1; spec/cosyvoice.md 2]. Deviation: the
window loop ends once a window reaches the end; the published one loses up to 2 s there. What the
units mean comes from the heads that supervise them, see the training script.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import audio
from weights import load_strict, match

DECAY = 0.99  # of the moving averages, per training step
DEAD = 0.1  # a code used less than this share of the mean use is moved onto a random frame
OVERLAP = 15  # 1 / OVERLAP of a window is dropped on each side: 2 s of 30 s
PAD = -1  # the unit of a frame that is not there


@dataclass(frozen=True)
class S3Config:
    n_mels: int = 128
    width: int = 1280
    heads: int = 20
    layers: int = 6
    ffn: int = 5120
    max_frames: int = 1500  # rows of the position table: units in one window
    strides: tuple[int, int] = (1, 2)  # of the two convolutions, in frames
    codes: int = 4096

    def __post_init__(self) -> None:
        sizes = (self.n_mels, self.heads, self.ffn, self.max_frames, self.codes, *self.strides)
        if min(sizes) < 1 or self.layers < 0 or len(self.strides) != 2:
            raise ValueError(f"sizes and the two strides must be at least 1, got {self}")
        if self.width < 4 or self.width % 2 or self.width % self.heads:
            raise ValueError(
                f"width={self.width} must be even, at least 4 and a multiple of heads={self.heads}"
            )

    @property
    def stride(self) -> int:
        """Mel frames per unit."""
        return self.strides[0] * self.strides[1]

    @property
    def window(self) -> int:
        """Mel frames that the network takes at once."""
        return self.max_frames * self.stride

    @property
    def trim(self) -> int:
        """Units dropped on each side of a window that has a neighbour there."""
        return self.max_frames // OVERLAP

    def n_units(self, n_frames: int) -> int:
        """Mel frames -> units, for every duration."""
        return -(-n_frames // self.stride)

    def windows(self, n_frames: int) -> list[tuple[int, int]]:
        """[start, end) of each window in mel frames; the first that reaches the end is the last."""
        hop = (self.max_frames - 2 * self.trim) * self.stride
        last = max(0, -(-(n_frames - self.window) // hop))
        return [(i * hop, min(i * hop + self.window, n_frames)) for i in range(last + 1)]


TINY = S3Config(80, 128, 4, 3, 512, 750, (2, 2), 1024)


def sinusoids(length: int, width: int) -> Tensor:
    """Position table (length, width) in Whisper's order: all sines, then all cosines."""
    step = math.log(10_000) / (width // 2 - 1)
    angles = torch.arange(length)[:, None] * torch.exp(-step * torch.arange(width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x (B, T, C), keep (B, T) bool -> (B, T, C): pre-norm attention, then pre-norm MLP."""
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for f in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])
        x = x + self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class S3Units(nn.Module):
    positions: Tensor  # (max_frames, C)
    codebook: Tensor  # (K, C)
    usage: Tensor  # (K,) moving average of frames per step and code; all 0: not yet initialised

    def __init__(self, cfg: S3Config) -> None:
        super().__init__()
        self.cfg = cfg
        first, second = cfg.strides
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.width, 3, stride=first, padding=1)
        self.conv2 = nn.Conv1d(cfg.width, cfg.width, 3, stride=second, padding=1)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.ffn) for _ in range(cfg.layers))
        # in the state dict, because the public file has its own table
        self.register_buffer("positions", sinusoids(cfg.max_frames, cfg.width))
        codebook = torch.empty(cfg.codes, cfg.width).normal_(std=cfg.width**-0.5)  # length about 1
        self.register_buffer("codebook", codebook)
        self.register_buffer("usage", torch.zeros(cfg.codes))

    def features(self, mel: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mel (B, M, F) log-mel, lengths (B,) real frames -> h (B, T, C), keep (B, T) bool.

        At most one window, see encode() for more. What stands in padded frames has no effect."""
        lengths = self._check(mel, lengths)
        x = mel
        for conv in (self.conv1, self.conv2):
            keep = torch.arange(x.shape[-1], device=x.device) < lengths[:, None]  # (B, frames)
            x = F.gelu(conv(x.masked_fill(~keep[:, None], 0)))  # (B, C, frames / stride)
            lengths = (lengths - 1) // conv.stride[0] + 1
        x = x.transpose(1, 2)  # (B, T, C)
        keep = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (B, T)
        x = x + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, keep)
        return x, keep

    def _check(self, mel: Tensor, lengths: Tensor | None) -> Tensor:
        if mel.ndim != 3 or mel.shape[1] != self.cfg.n_mels:
            raise ValueError(f"mel must be (B, {self.cfg.n_mels}, F), got {(*mel.shape,)}")
        B, _, n = mel.shape
        if n > self.cfg.window:
            raise ValueError(
                f"{n} mel frames, the network takes at most {self.cfg.window}; use encode()"
            )
        lengths = mel.new_full((B,), n, dtype=torch.long) if lengths is None else lengths.long()
        if B == 0 or lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > n:
            raise ValueError(f"lengths must be {B} values in 1..{n}, got {lengths.tolist()}")
        return lengths

    def nearest(self, h: Tensor) -> Tensor:
        """h (..., C), of any length -> units (...) int64; the first of equally near codes."""
        with torch.autocast(h.device.type, enabled=False):  # bf16 would change units
            e = self.codebook.float()  # (K, C)
            # |x - e|^2 less |x|^2, which all codes share; codes are not unit vectors: e^2 stays
            score = 2 * F.normalize(h.float(), dim=-1) @ e.T - e.square().sum(-1)  # (..., K)
            return score.argmax(-1)

    @torch.no_grad()
    def forward(self, mel: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mel (B, M, F), lengths (B,) -> units (B, T) int64, -1 at padding, unit_lengths (B,)."""
        h, keep = self.features(mel, lengths)
        return self.nearest(h).masked_fill(~keep, PAD), keep.sum(-1)

    @overload
    def encode(self, mels: Tensor, batch: int = 8) -> Tensor: ...
    @overload
    def encode(self, mels: Sequence[Tensor], batch: int = 8) -> list[Tensor]: ...
    @torch.no_grad()
    def encode(self, mels: Tensor | Sequence[Tensor], batch: int = 8) -> Tensor | list[Tensor]:
        """One mel (M, F) of any duration -> units (U,) int64, U = ceil(F / stride); a list -> list.

        batch: windows per forward pass. Long mels: windows that overlap, see S3Config.windows."""
        if isinstance(mels, Tensor):
            return self.encode([mels], batch)[0]
        if bad := [(*m.shape,) for m in mels if m.ndim != 2 or m.shape[1] < 1]:
            raise ValueError(f"each mel must be (M, F) with F at least 1, got {bad[0]}")
        spans = [self.cfg.windows(m.shape[1]) for m in mels]
        pieces = [m[:, a:b].T for m, span in zip(mels, spans, strict=True) for a, b in span]
        parts: list[Tensor] = []
        for i in range(0, len(pieces), batch):
            padded = nn.utils.rnn.pad_sequence(pieces[i : i + batch], batch_first=True).mT
            lengths = torch.tensor([len(p) for p in pieces[i : i + batch]], device=padded.device)
            units, unit_lengths = self(padded, lengths)
            parts += [u[:n] for u, n in zip(units, unit_lengths.tolist(), strict=True)]
        rest = iter(parts)
        return [self._join([next(rest) for _ in span]) for span in spans]

    def encode_wav(self, wav: Tensor) -> Tensor:
        """wav (S,) at 16 kHz, of any length -> units (U,) int64, one for each 1/50 s begun (TINY:
        1/25 s). In a window they are the public ones, and where these are one short, the last
        is said twice: the mel has no frame for what is left over at the end, below 10 ms."""
        units = self.encode(audio.whisper_mel(wav, self.cfg.n_mels).to(self.positions.device))
        missing = self.cfg.n_units(-(-len(wav) // audio.WHISPER_HOP)) - len(units)  # 0 or 1
        return torch.cat([units, units[len(units) - missing :]])

    def _join(self, parts: list[Tensor]) -> Tensor:
        """Units of overlapping windows -> units (U,): each window gives up its outer `trim`."""
        trim, last = self.cfg.trim, len(parts) - 1
        return torch.cat(
            [u[trim if i else 0 : len(u) - (trim if i < last else 0)] for i, u in enumerate(parts)]
        )

    def quantize(self, h: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, T, C) -> units (B, T) int64, quantized (B, T, C) fp32, commitment loss, scalar.

        quantized: the chosen codes, of length about 1, with the gradient of h / |h|; zeros and
        unit -1 at padding. Loss: mean over real frames of |h / |h| - code|^2, in 0..4. In training
        mode the codebook learns from the real frames; its first batch initialises it."""
        if keep is None:
            keep = torch.ones_like(h[..., 0], dtype=torch.bool)
        if not keep.any():
            raise ValueError(f"no real frame in a batch of {(*keep.shape,)}: all of it is padding")
        with torch.autocast(h.device.type, enabled=False):
            x = F.normalize(h.float(), dim=-1)
            frames = x.detach()[keep]  # (n, C), n real frames
            if self.training and not self.usage.any():
                self.codebook.copy_(self._random_frames(frames))
                self.usage.fill_(1 - DECAY)  # one frame's weight: the first batches count in full
            units = self.nearest(h)
            code = self.codebook.float()[units]  # (B, T, C)
            loss = (x - code).square().sum(-1)[keep].mean()
            quantized = (code + (x - x.detach())) * keep[..., None]  # value of code, gradient of x
            if self.training:
                self._learn(frames, units[keep])
        return units.masked_fill(~keep, PAD), quantized, loss

    @torch.no_grad()
    def _learn(self, frames: Tensor, units: Tensor) -> None:
        """frames (n, C), units (n,): one step of the moving averages; dead codes start anew."""
        total = torch.zeros_like(self.codebook).index_add_(0, units, frames)  # (K, C)
        count = torch.bincount(units, minlength=self.cfg.codes).to(total)  # (K,)
        if dist.is_initialized():  # every rank learns from all frames
            dist.all_reduce(total)
            dist.all_reduce(count)
        past = DECAY * self.usage
        usage = past + (1 - DECAY) * count
        moved = (past[:, None] * self.codebook + (1 - DECAY) * total) / usage[:, None]
        mean = usage.mean()
        dead = usage < DEAD * mean
        self.codebook.copy_(torch.where(dead[:, None], self._random_frames(frames), moved))
        self.usage.copy_(torch.where(dead, mean, usage))  # a new code gets time to prove itself

    def _random_frames(self, frames: Tensor) -> Tensor:
        """frames (n, C) -> (K, C), one for each code, all different if n allows; rank 0 decides."""
        n, K = len(frames), self.cfg.codes
        picked = frames[torch.randperm(max(n, K), device=frames.device)[:K] % n]
        if dist.is_initialized():
            dist.broadcast(picked, 0)
        return picked


NAMES = {  # public name (S3Tokenizer's, after its reading of speech_tokenizer_v1.onnx) -> ours
    r"encoder\.positional_embedding": r"positions",
    r"encoder\.(conv[12])\.(weight|bias)": r"\1.\2",
    r"encoder\.blocks\.(\d+)\.attn_ln\.(weight|bias)": r"blocks.\1.norm1.\2",
    r"encoder\.blocks\.(\d+)\.attn\.(query|key|value|out)\.(weight|bias)": r"blocks.\1.\2.\3",
    r"encoder\.blocks\.(\d+)\.mlp_ln\.(weight|bias)": r"blocks.\1.norm2.\2",
    r"encoder\.blocks\.(\d+)\.mlp\.0\.(weight|bias)": r"blocks.\1.up.\2",
    r"encoder\.blocks\.(\d+)\.mlp\.2\.(weight|bias)": r"blocks.\1.down.\2",
    r"quantizer\._codebook\.embed": r"codebook",
}


def complete(ours: Mapping[str, Tensor], codes: int) -> dict[str, Tensor]:
    """The public file has no usage counts: all codes start with the same, to be trained further."""
    return {**ours, "usage": torch.ones(codes)}


def load_public(model: S3Units, tensors: Mapping[str, Tensor], what: str = "S3 weights") -> None:
    """Fill `model` from tensors under public names, or raise ValueError with all differences."""
    ours, problems = match(tensors, NAMES)
    load_strict(model, complete(ours, model.cfg.codes), what, problems)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = S3Units(TINY).eval()
    mels = [torch.randn(TINY.n_mels, 300), torch.randn(TINY.n_mels, 4130)]
    units = model.encode(mels)
    print("mel", [(*m.shape,) for m in mels], "-> units", [(*u.shape,) for u in units])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
