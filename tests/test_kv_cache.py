"""kv_cache.py: cached attention equals attention over the whole prefix; capacity."""

import pytest
import torch
import torch.nn.functional as F

from kv_cache import KVCache, causal_keep


@pytest.mark.parametrize("parts", [(7,), (1,) * 7, (3, 1, 2, 1), (6, 1)])
def test_cached_is_uncached(parts: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 5, generator=rng)  # (B, H, t, D) each
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    cache, out = KVCache(max_len=9), []
    for a, b, c in zip(*(x.split(parts, 2) for x in (q, k, v)), strict=True):
        keep = causal_keep(a.shape[2], cache.length, a.device)
        keys, values = cache.append(b, c)
        out.append(F.scaled_dot_product_attention(a, keys, values, attn_mask=keep))
    torch.testing.assert_close(torch.cat(out, 2), whole, rtol=0, atol=1e-6)
    assert cache.length == 7


def test_what_was_appended_is_returned_in_the_same_memory() -> None:
    cache = KVCache(8)
    k, v = torch.randn(2, 1, 2, 3, 4, dtype=torch.double)
    keys, values = cache.append(k, v)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert keys.dtype == torch.double
    more, _ = cache.append(k[:, :, :1], v[:, :, :1])
    assert more.shape == (1, 2, 4, 4)
    assert more.data_ptr() == keys.data_ptr()  # a view: nothing was copied
    assert torch.equal(more[:, :, :3], k)


@pytest.mark.parametrize(("held", "more", "asked"), [(0, 9, 9), (8, 1, 9), (5, 8, 13)])
def test_a_full_cache_says_so_and_stays_as_it_is(held: int, more: int, asked: int) -> None:
    cache = KVCache(8)
    cache.append(torch.zeros(1, 1, held, 2), torch.zeros(1, 1, held, 2))
    with pytest.raises(ValueError, match=f"KV cache holds 8 positions, {asked} were asked for"):
        cache.append(torch.zeros(1, 1, more, 2), torch.zeros(1, 1, more, 2))
    assert cache.length == held


def test_causal_keep() -> None:
    keep = causal_keep(2, 3, torch.device("cpu"))
    assert keep.tolist() == [[True] * 4 + [False], [True] * 5]
    assert causal_keep(1, 0, torch.device("cpu")).tolist() == [[True]]
    for n, past in ((4, 0), (3, 5), (1, 6)):
        full = causal_keep(past + n, 0, torch.device("cpu"))
        assert torch.equal(causal_keep(n, past, torch.device("cpu")), full[past:])
