"""Finite scalar quantization: squash each channel into [-1, 1], then round it to one of L levels.

    u     = E x                                            linear encoder, D -> d
    ubar  = tanh((u * s + b) / tau)                        s, b per channel, tau one positive number
    i     = clip(round((ubar + 1) / 2 * (L - 1)), 0, L-1)  the code, one small integer per channel
    q     = -1 + 2 i / (L - 1)
    z_q   = ubar + sg(q - ubar)                            value of q, gradient of ubar
    loss  = mean over real positions and the D channels of (sg(x) - F z_q)^2   F: linear, d -> D

    x (B, N, D) --E--> u (B, N, d) --round--> codes (B, N, d) --> z_q (B, N, d) --F--> (B, N, D)

No codebook is learned, so none can collapse. A token is d integers, never one: L^d overflows.
[TASLA: arXiv:2510.14934, sec. 4.2 and 4.3; the idea: Mentzer et al. 2023, arXiv:2309.15505]
The paper's loss compares "z" and "z_q"; both have to be D wide, hence the input and the output of
this module. Its x is a fixed target here: with gradient into x, the cheapest way to a small loss is
an aggregator whose vectors are all the same, and training finds it. The paper sums over D where we
average: lambda absorbs the factor D.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START_STD = 0.85  # of what goes into tanh: makes a normal distribution about uniform in [-1, 1]
PAD = -1  # the code of a position that is not there


@dataclass(frozen=True)
class FSQConfig:
    dim: int = 1280  # D, width of what is quantized
    d: int = 64  # channels = integers per token
    levels: int = 8  # L, values per channel
    scale_init: float = 1.0  # until `start` fits it; too large saturates tanh
    tau_init: float = 1.0
    learn_tau: bool = True  # a fixed tau loses no function: s and b can take its place

    def __post_init__(self) -> None:
        if min(self.dim, self.d) < 1:
            raise ValueError(f"dim and d must be at least 1, got dim={self.dim}, d={self.d}")
        if self.levels < 2:
            raise ValueError(f"a channel needs at least 2 levels, got levels={self.levels}")
        if not self.tau_init > 0:
            raise ValueError(f"tau_init must be positive, got {self.tau_init}")


TINY = FSQConfig(dim=128, d=12)  # 36 bit per token, as many as the public RVQ


class Quantized(NamedTuple):
    embedding: Tensor  # (B, N, D) fp32
    codes: Tensor  # (B, N, d) int64, PAD where there is no token
    loss: Tensor  # () fp32


class FSQ(nn.Module):
    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Linear(config.dim, config.d)
        self.scale = nn.Parameter(torch.full((config.d,), config.scale_init))
        self.shift = nn.Parameter(torch.zeros(config.d))
        log_tau = torch.tensor(math.log(config.tau_init))  # as a logarithm it stays positive
        if config.learn_tau:
            self.log_tau = nn.Parameter(log_tau)
        else:
            self.register_buffer("log_tau", log_tau)
        self.decoder = nn.Linear(config.d, config.dim)

    @property
    def n_codebooks(self) -> int:
        """Integers per token: d."""
        return self.config.d

    @property
    def n_codes(self) -> int:
        """Values that each of them takes: L."""
        return self.config.levels

    @property
    def bits_per_token(self) -> float:
        """d log2 L, the nominal rate."""
        return self.config.d * math.log2(self.config.levels)

    def squash(self, x: Tensor) -> Tensor:
        """x (B, N, D) fp32 -> ubar (B, N, d) in [-1, 1]; callers switch autocast off."""
        u = self.encoder(x)  # (B, N, d)
        return torch.tanh((u * self.scale + self.shift) * torch.exp(-self.log_tau))

    @torch.no_grad()
    def start(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Choose s and b so that the channels of this batch x (B, N, D), keep (B, N) bool, use all
        levels about equally: where tanh is saturated it has no gradient, and codes learn nothing.

        Ours; the paper says only that s and b are learned."""
        with torch.autocast(x.device.type, enabled=False):
            u = self.encoder(x.float()[real(x, keep)[..., 0]])  # (n, d)
            self.scale.copy_(START_STD * self.log_tau.exp() / u.std(0))
            self.shift.copy_(-u.mean(0) * self.scale)

    def round(self, ubar: Tensor) -> Tensor:
        """ubar (B, N, d) in [-1, 1] -> codes (B, N, d) int64 in 0 .. L-1."""
        top = self.n_codes - 1
        return ((ubar + 1) / 2 * top).round().clamp(0, top).long()

    def values(self, codes: Tensor) -> Tensor:
        """codes (B, N, d) -> q (B, N, d) fp32 in [-1, 1]; 0 for PAD."""
        q = -1 + 2 * codes / (self.n_codes - 1)
        return q.masked_fill(codes == PAD, 0.0)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Quantized:
        """x (B, N, D), keep (B, N) bool -> embedding (B, N, D), codes (B, N, d), loss ().

        At padding: codes PAD, q = 0, so the embedding there is the decoder's bias, as in RVQ."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 would move 1.2 % of the codes
            x = x.float()
            if keep is not None:  # padding may hold anything, even NaN
                x = x.masked_fill(~real(x, keep), 0.0)
            keep = real(x, keep)  # (B, N, 1)
            ubar = self.squash(x)  # (B, N, d)
            codes = self.round(ubar).masked_fill(~keep, PAD)
            # The paper's ubar + sg(q - ubar), summed so that its value is q to the last bit.
            z_q = self.values(codes) + (ubar - ubar.detach()) * keep
            embedding = self.decoder(z_q)  # (B, N, D)
            error = F.mse_loss(embedding, x.detach(), reduction="none")  # (B, N, D)
            error = error.mean(-1) * keep[..., 0]  # (B, N)
            return Quantized(embedding, codes, error.sum() / keep.sum().clamp(min=1))

    @torch.no_grad()
    def encode(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, N, D), keep (B, N) bool -> codes (B, N, d) int64, PAD at padding."""
        return self(x, keep).codes

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, N, d) int64, PAD allowed -> embedding (B, N, D), the very one of forward."""
        if codes.shape[-1] != self.n_codebooks:
            raise ValueError(f"codes {(*codes.shape,)}: the last axis must be d={self.n_codebooks}")
        if codes.numel() and (codes.min() < PAD or codes.max() >= self.n_codes):
            span = f"{int(codes.min())} .. {int(codes.max())}"
            raise ValueError(f"codes in {span}, wanted 0 .. {self.n_codes - 1} or {PAD} (padding)")
        with torch.autocast(codes.device.type, enabled=False):
            return self.decoder(self.values(codes))  # (B, N, D)


def real(x: Tensor, keep: Tensor | None) -> Tensor:
    """keep (B, N) bool or None (all real), x (B, N, D) -> (B, N, 1) bool."""
    if keep is None:
        return torch.ones_like(x[..., :1], dtype=torch.bool)
    if keep.shape != x.shape[:-1] or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool {(*x.shape[:-1],)}, got {keep.dtype} {(*keep.shape,)}")
    return keep[..., None]  # (B, N, 1)


if __name__ == "__main__":
    fsq = FSQ(TINY)
    x = torch.randn(2, 5, TINY.dim)
    out = fsq(x)
    print(f"x {(*x.shape,)} -> codes {(*out.codes.shape,)} -> embedding {(*out.embedding.shape,)}")
    print(
        f"{fsq.bits_per_token:.0f} bits per token, codes of the first: {out.codes[0, 0].tolist()}"
    )
    print(f"{sum(p.numel() for p in fsq.parameters())} parameters")
