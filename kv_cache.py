"""Keys and values of the past, so that each new token costs one step and not the whole prefix.

    step t:   K = [k_1 .. k_t],  V = [v_1 .. v_t]      memory is reserved once, `append` fills it

    k, v (B, H, n, D) --append--> K, V (B, H, t, D), views of (B, H, max_len, D)

One cache holds one attention layer; a model owns a list of them, one per layer.
"""

import torch
from torch import Tensor


class KVCache:
    def __init__(self, max_len: int) -> None:
        """max_len: most positions it will ever hold; memory is taken at the first append."""
        self.max_len, self.length = max_len, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, n, D), the next n positions -> all so far, (B, H, length, D) each."""
        if self.k is None or self.v is None:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.max_len, D), v.new_empty(B, H, self.max_len, D)
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"KV cache holds {self.max_len} positions, {end} were asked for")
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


def causal_keep(n: int, past: int, device: torch.device) -> Tensor:
    """keep (n, past + n) bool: query i, at position past + i, sees positions 0 .. past + i."""
    return torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)


if __name__ == "__main__":
    cache = KVCache(max_len=8)
    for n in (5, 1, 1):
        k, v = cache.append(torch.zeros(2, 4, n, 16), torch.zeros(2, 4, n, 16))
        print(f"{n} new -> keys {(*k.shape,)}")
