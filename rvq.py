"""Residual vector quantization: four small codebooks, each codes what the ones before left over.

    r_0 = W_in x
    i_q = argmin_k |r_q - c_{q,k}|^2,    r_{q+1} = r_q - c_{q, i_q}         q = 0 .. Q-1
    y   = W_out sum_q c_{q, i_q}
    loss = sum_q mean over real positions and channels of (r_q - sg[c_{q, i_q}])^2    (commitment)

    x (B, N, D) --W_in--> r (B, N, E) --Q times--> codes (B, N, Q), latent (B, N, E) --W_out--> y

The codebooks are no parameters. They start as k-means of the first training batch and then follow
    n <- 0.99 n + 0.01 count,    s <- 0.99 s + 0.01 sum of r,    c = s / smooth(n)
over all processes. In training a random number of the last codebooks is left out (quantizer
dropout), so that the first ones carry most. E is the width of the code space.
[TASTE: arXiv:2504.07053, sec. 3.1; SoundStream, arXiv:2107.03312; EMA: arXiv:1711.00937, app. A]
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PAD = -1  # the code of a position that is not there, or of a codebook that was left out


@dataclass(frozen=True)
class RVQConfig:
    dim: int = 1280  # D, width of what is quantized
    codebook_dim: int = 256  # E
    codebook_size: int = 512  # K
    quantizers: int = 4  # Q
    decay: float = 0.99  # of the moving averages, per training step
    eps: float = 1e-5  # counts added to every code, so that none divides by 0
    kmeans_iters: int = 100  # 0: keep the random start
    quantize_dropout: bool = True
    dead_code_threshold: float = 0.0  # codes with a smaller average count restart; 0: never

    def __post_init__(self) -> None:
        for name in ("dim", "codebook_dim", "codebook_size", "quantizers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if min(self.eps, self.kmeans_iters, self.dead_code_threshold) < 0:
            raise ValueError("eps, kmeans_iters and dead_code_threshold must not be negative")


TINY = RVQConfig(dim=128, codebook_dim=32, codebook_size=256, kmeans_iters=20)


class Quantized(NamedTuple):
    embedding: Tensor  # (B, N, D) fp32
    codes: Tensor  # (B, N, Q) int64, PAD where there is no token or the codebook was left out
    loss: Tensor  # () fp32


class Codebook(nn.Module):
    """K vectors, nearest-neighbour look-up, and their slow update. All in fp32."""

    ready: Tensor
    count: Tensor
    total: Tensor
    code: Tensor

    def __init__(self, config: RVQConfig) -> None:
        super().__init__()
        self.config = config
        K, E = config.codebook_size, config.codebook_dim
        start = torch.empty(1, K, E).uniform_(-1, 1) / math.sqrt(E)
        # Quirk: the leading 1 is an unused axis (heads) that the public checkpoint has.
        self.register_buffer("ready", torch.tensor([float(config.kmeans_iters == 0)]))
        self.register_buffer("count", torch.ones(1, K))  # n
        self.register_buffer("total", start.clone())  # s
        self.register_buffer("code", start)  # c

    def nearest(self, r: Tensor) -> Tensor:
        """r (..., E) fp32 -> index (...) int64 of the closest code."""
        return nearest(r, self.code[0])

    def look_up(self, index: Tensor) -> Tensor:
        """index (...) int64 -> code (..., E); PAD gives 0."""
        return F.embedding(index.clamp(min=0), self.code[0]) * (index != PAD)[..., None]

    @torch.no_grad()
    def start(self, r: Tensor) -> None:
        """At the first training step: k-means of r (M, E), the real residuals of all processes."""
        if self.ready.item() or not len(r := gather(r)):
            return
        means, count = kmeans(r, sample(r, self.config.codebook_size), self.config.kmeans_iters)
        for buffer, value in ((self.code, means), (self.count, count), (self.total, means)):
            buffer.copy_(from_first(value.float())[None])
        self.total *= self.count[..., None]
        self.ready.fill_(1)

    @torch.no_grad()
    def update(self, r: Tensor, index: Tensor) -> None:
        """Move the codes towards the r (M, E) that chose them with index (M,)."""
        total, count = sums(r, index, self.config.codebook_size)
        if distributed():
            dist.all_reduce(total), dist.all_reduce(count)
        self.count.lerp_(count[None], 1 - self.config.decay)
        self.total.lerp_(total[None], 1 - self.config.decay)
        n, eps = self.count.sum(), self.config.eps
        smooth = (self.count + eps) / (n + eps * self.count.shape[1]) * n  # (1, K), adds up to n
        self.code.copy_(self.total / smooth[..., None])
        if self.config.dead_code_threshold > 0:
            self.revive(r)

    def revive(self, r: Tensor) -> None:
        """Put codes that almost nobody chooses onto random rows of r (M, E)."""
        dead = self.count[0] < self.config.dead_code_threshold  # (K,), alike in all processes
        if dead.any() and len(r := gather(r)):
            rows = from_first(sample(r, int(dead.sum())))
            self.code[0, dead] = rows
            self.count[0, dead] = self.config.dead_code_threshold
            self.total[0, dead] = rows * self.config.dead_code_threshold


class RVQ(nn.Module):
    layers: list[Codebook]  # an nn.ModuleList, whose items mypy takes for plain modules

    def __init__(self, config: RVQConfig) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(config.dim, config.codebook_dim)
        books = (Codebook(config) for _ in range(config.quantizers))
        self.layers = nn.ModuleList(books)  # type: ignore[assignment]
        self.project_out = nn.Linear(config.codebook_dim, config.dim)

    @property
    def n_codebooks(self) -> int:
        """Integers per token: Q."""
        return self.config.quantizers

    @property
    def n_codes(self) -> int:
        """Values that each of them takes: K."""
        return self.config.codebook_size

    @property
    def bits_per_token(self) -> float:
        """Q log2 K, the nominal rate."""
        return self.config.quantizers * math.log2(self.config.codebook_size)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Quantized:
        """x (B, N, D), keep (B, N) bool -> embedding (B, N, D), codes (B, N, Q), loss ().

        At padding: codes PAD, latent 0, so the embedding there is the bias of W_out.
        In training this also moves the codebooks, and all processes have to call it together."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 would move codes
            keep = real(x, keep)
            r = self.project_in(x.float().masked_fill(~keep[..., None], 0.0))  # (B, N, E)
            depth = self.draw_depth(x.device) if self.training else self.n_codebooks
            start, latent, loss = r, torch.zeros_like(r), r.new_zeros(())
            codes = torch.full((*r.shape[:2], self.n_codebooks), PAD, device=r.device)  # (B, N, Q)
            for q in range(depth):
                code, codes[..., q] = self.quantize(q, r.detach(), keep)
                latent, r = latent + code, r - code
                loss = loss + (r.square().mean(-1) * keep).sum() / keep.sum().clamp(min=1)
            # Quirk: one gradient of the identity per codebook, so W_in is given Q times that of
            # the latent [lucidrains ResidualVQ, which TASTE trained with].
            latent = latent + depth * (start - start.detach()) * keep[..., None]
            return Quantized(self.project_out(latent), codes, loss)  # (B, N, D)

    def quantize(self, q: int, r: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """One codebook: r (B, N, E) -> its codes (B, N, E) and their numbers (B, N)."""
        book = self.layers[q]
        if self.training:
            book.start(r[keep])
        index = book.nearest(r).masked_fill(~keep, PAD)  # (B, N)
        code = book.look_up(index)  # (B, N, E)
        if self.training:
            book.update(r[keep], index[keep])
        return code, index

    def draw_depth(self, device: torch.device) -> int:
        """How many codebooks this training step uses, 1 .. Q, the same in all processes."""
        if not self.config.quantize_dropout:
            return self.n_codebooks
        return int(from_first(torch.randint(1, self.n_codebooks + 1, (1,)).to(device)))

    @torch.no_grad()
    def encode(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, N, D), keep (B, N) bool -> codes (B, N, Q) int64 of all codebooks; padding: PAD."""
        with torch.autocast(x.device.type, enabled=False):
            keep = real(x, keep)
            r = self.project_in(x.float().masked_fill(~keep[..., None], 0.0))  # (B, N, E)
            return self.encode_latent(r).masked_fill(~keep[..., None], PAD)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, N, Q) int64, PAD counts 0 -> embedding (B, N, D), that of forward in eval."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(self.latent(codes))  # (B, N, D)

    def look_up(self, codes: Tensor) -> Tensor:
        """codes (B, N, Q) int64 -> the code vector of each codebook (B, N, Q, E); PAD gives 0."""
        if codes.shape[-1] != self.n_codebooks:
            raise ValueError(f"codes {(*codes.shape,)}: the last axis must be Q={self.n_codebooks}")
        if codes.numel() and (codes.min() < PAD or codes.max() >= self.n_codes):
            span = f"{int(codes.min())} .. {int(codes.max())}"
            raise ValueError(f"codes in {span}, wanted 0 .. {self.n_codes - 1} or {PAD} (padding)")
        return torch.stack([b.look_up(codes[..., q]) for q, b in enumerate(self.layers)], -2)

    def latent(self, codes: Tensor) -> Tensor:
        """codes (B, N, Q) int64 -> sum of the code vectors (B, N, E), before W_out."""
        return torch.stack(self.look_up(codes).unbind(-2)).sum(0)

    @torch.no_grad()
    def encode_latent(self, latent: Tensor) -> Tensor:
        """A vector of the code space (B, N, E) -> codes (B, N, Q), without W_in."""
        r, codes = latent.float(), []
        for book in self.layers:
            codes.append(book.nearest(r))  # (B, N)
            r = r - book.look_up(codes[-1])
        return torch.stack(codes, -1)

    def expected(self, logits: Tensor) -> Tensor:
        """logits (B, N, Q, K) -> (B, N, Q, E), the mean code under softmax(logits)."""
        with torch.autocast(logits.device.type, enabled=False):
            p = logits.float().softmax(-1)
            return torch.einsum("...qk,qke->...qe", p, torch.cat([b.code for b in self.layers]))


def real(x: Tensor, keep: Tensor | None) -> Tensor:
    """keep (B, N) bool or None (all real), x (B, N, D) -> (B, N) bool."""
    if keep is None:
        return torch.ones_like(x[..., 0], dtype=torch.bool)
    if keep.shape != x.shape[:-1] or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool {(*x.shape[:-1],)}, got {keep.dtype} {(*keep.shape,)}")
    return keep


def nearest(r: Tensor, code: Tensor) -> Tensor:
    """r (..., E), code (K, E) -> index (...) int64, the least Euclidean distance."""
    with torch.autocast(r.device.type, enabled=False):
        return (code.square().sum(-1) - 2 * r @ code.T).argmin(-1)  # |r|^2 is the same for all k


def sums(r: Tensor, index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """r (M, E), index (M,) int64 -> sum of the rows per index (K, E), their number (K,) fp32."""
    if r.device.type == "cpu":
        total = r.new_zeros(K, r.shape[1]).index_add_(0, index, r)
        return total, torch.bincount(index, minlength=K).to(r.dtype)
    chosen = F.one_hot(index, K).to(r.dtype)  # (M, K): on a GPU, too, in a fixed order
    return chosen.T @ r, chosen.sum(0)


def sample(r: Tensor, n: int) -> Tensor:
    """n random rows of r (M, E), without repetition if M >= n."""
    index = torch.randperm(len(r))[:n] if len(r) >= n else torch.randint(len(r), (n,))
    return r[index.to(r.device)]  # (n, E)


def kmeans(r: Tensor, means: Tensor, iters: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from `means` (K, E) on r (M, E) -> means (K, E), rows of each (K,).

    A mean that nobody is closest to stays where it is."""
    count = means.new_zeros(len(means))
    for _ in range(iters):
        total, count = sums(r, nearest(r, means), len(means))
        moved = total / count.clamp(min=1)[:, None]
        means = torch.where(count[:, None] > 0, moved, means)  # (K, E)
    return means, count


def distributed() -> bool:
    """More than one process?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first(x: Tensor) -> Tensor:
    """The x of process 0, in all processes."""
    if distributed():
        dist.broadcast(x := x.contiguous(), 0)
    return x


def gather(r: Tensor) -> Tensor:
    """The rows of all processes: r (M, E), M differs from one to the next -> (sum of M, E)."""
    if not distributed():
        return r
    sizes = [
        torch.zeros(1, dtype=torch.long, device=r.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(sizes, torch.tensor([len(r)], device=r.device))
    most = int(max(sizes))
    parts = [r.new_empty(most, r.shape[1]) for _ in sizes]
    dist.all_gather(parts, F.pad(r, (0, 0, 0, most - len(r))).contiguous())
    return torch.cat([part[: int(m)] for part, m in zip(parts, sizes, strict=True)])


# What follows the public prefix `audio_tower.vq.`; `mlps` are in the checkpoint but never used.
NAMES = {
    r"rvq\.project_(in|out)\.(weight|bias)": r"project_\1.\2",
    r"rvq\.layers\.(\d+)\._codebook\.initted": r"layers.\1.ready",
    r"rvq\.layers\.(\d+)\._codebook\.cluster_size": r"layers.\1.count",
    r"rvq\.layers\.(\d+)\._codebook\.embed_avg": r"layers.\1.total",
    r"rvq\.layers\.(\d+)\._codebook\.embed": r"layers.\1.code",
}
SKIP = (r"rvq\.mlps\..*",)


if __name__ == "__main__":
    rvq = RVQ(TINY)
    x = torch.randn(8, 40, TINY.dim)
    out = rvq(x)
    print(f"x {(*x.shape,)} -> codes {(*out.codes.shape,)} -> embedding {(*out.embedding.shape,)}")
    print(
        f"{rvq.bits_per_token:.0f} bits per token, codes of the first: {out.codes[0, 0].tolist()}"
    )
    print(f"{sum(p.numel() for p in rvq.parameters())} parameters")
