"""Keys and values of the past, so that each new token costs one step and not the whole prefix.

    step t:   K = [k_1 .. k_t],  V = [v_1 .. v_t]      memory is reserved once, `append` fills it

    k, v (B, H, n, D) --append--> K, V (B, H, t, D), views of (B, H, max_len, D)
    static, n = 1, t > 1:     --> K, V (B, H, max_len, D), whose unwritten end the mask hides

One cache holds one attention layer; a model owns a list of them, one per layer. With static ones
all steps after the first have the same shapes: Step compiles them, on a GPU as a CUDA graph.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROOM = 256  # static caches are as long as a multiple of it: few graphs for prompts of all lengths


class KVCache:
    def __init__(self, max_len: int, static: bool = False) -> None:
        """max_len: most positions it will ever hold; memory is taken at the first append."""
        self.max_len, self.static, self.length = max_len, static, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.at: Tensor | None = None  # (1,) int64, where a static one writes its next position

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, n, D), the next n positions -> all so far, (B, H, length, D) each, or all
        that there is room for, if `advance` said so."""
        if self.k is None or self.v is None or len(self.k) != len(k):
            B, H, _, D = k.shape
            # A static one is used again, perhaps outside of inference mode.
            with torch.inference_mode(torch.is_inference_mode_enabled() and not self.static):
                self.k, self.v = (x.new_empty(B, H, self.max_len, D) for x in (k, v))
            if self.static:  # what is masked has to be finite; a CUDA graph knows its addresses
                torch._dynamo.mark_static_address(self.k.zero_())
                torch._dynamo.mark_static_address(self.v.zero_())
        if self.at is not None:
            self.k.index_copy_(2, self.at, k)
            self.v.index_copy_(2, self.at, v)
            return self.k, self.v
        end = self.grown(k.shape[2])
        self.k[:, :, self.length : end], self.v[:, :, self.length : end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def grown(self, n: int) -> int:
        """Its length with n more positions; ValueError: there is no room."""
        if (end := self.length + n) > self.max_len:
            raise ValueError(f"KV cache holds {self.max_len} positions, {end} were asked for")
        return end


class Step:
    """The layers of a model for one more position of each item, compiled. Its caches are used
    again and again: one generation at a time."""

    def __init__(self, run: Callable[..., Tensor], layers: int) -> None:
        """run(x (B, 1, C), ..) -> (B, 1, C)"""
        self.run, self.layers = torch.compile(run, mode="reduce-overhead"), layers
        self.kept: dict[int, list[KVCache]] = {}

    def __call__(self, *args: object) -> Tensor:
        return self.run(*args).clone()  # the next step will write to the same place

    def caches(self, max_len: int) -> list[KVCache]:
        """Empty static caches with room for max_len positions or more, one per layer."""
        room = -(-max_len // ROOM) * ROOM
        fresh = [KVCache(room, static=True) for _ in range(self.layers)]
        for cache in (caches := self.kept.setdefault(room, fresh)):
            cache.length = 0
        return caches


def advance(caches: Sequence[KVCache], n: int, device: torch.device) -> tuple[int, int]:
    """Before n positions are appended: how many there are, and how many keys append will give."""
    past, at = caches[0].length if caches else 0, None
    if past and n == 1 and caches[0].static:
        at = torch.tensor([past], device=device)
    for cache in caches:
        cache.at, cache.length = at, past if at is None else cache.grown(1)
    return past, past + n if at is None else caches[0].max_len


def causal_keep(n: int, past: int, device: torch.device, total: int | None = None) -> Tensor:
    """keep (n, total) bool: query i, at position past + i, sees positions 0 .. past + i.
    total: past + n if not given."""
    total = past + n if total is None else total
    return torch.ones(n, total, dtype=torch.bool, device=device).tril(past)


if __name__ == "__main__":
    cache = KVCache(max_len=8)
    for n in (5, 1, 1):
        k, v = cache.append(torch.zeros(2, 4, n, 16), torch.zeros(2, 4, n, 16))
        print(f"{n} new -> keys {(*k.shape,)}")
