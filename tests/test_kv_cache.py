"""kv_cache.py: cached attention equals attention over the whole prefix; capacity; the compiled
steps of all three models that generate."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kv_cache
import llm
import loop
import unit_decoder
import whisper_dec
from kv_cache import KVCache, advance, causal_keep
from llm import Llama
from unit_decoder import Stack, UnitDecoder
from whisper_dec import WhisperDecoder

CPU = torch.device("cpu")


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


# --- compiled steps ------------------------------------------------------------------------------


def test_a_static_cache_gives_the_same_attention_in_shapes_that_stay() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 5, generator=rng)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    cache, out, at = KVCache(9, static=True), [], 0
    for n in (3, 1, 1, 2):
        past, total = advance([cache], n, CPU)
        assert (past, total) == (at, 9 if n == 1 else at + n)
        part = slice(at, at := at + n)
        keys, values = cache.append(k[:, :, part], v[:, :, part])
        assert keys.shape == values.shape == (2, 4, total, 5)
        mask = causal_keep(n, past, CPU, total)
        out.append(F.scaled_dot_product_attention(q[:, :, part], keys, values, attn_mask=mask))
    torch.testing.assert_close(torch.cat(out, 2), whole, rtol=0, atol=1e-6)
    advance([cache], 2, CPU)
    cache.append(k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="KV cache holds 9 positions, 10 were asked for"):
        advance([cache], 1, CPU)


def llama() -> tuple[Llama, Callable[[int, int], Tensor]]:
    model = Llama(llm.TINY).eval()

    def generate(B: int, N: int) -> Tensor:
        """Hidden states of 12 steps after B prompts of up to N tokens, (B, 12, C)."""
        rng = torch.Generator().manual_seed(N)
        ids = torch.randint(320, (B, N), generator=rng)
        keep = torch.arange(N) >= torch.randint(N, (B, 1), generator=rng) if B > 1 else None
        caches, hidden = model.new_caches(N + 12), []
        for _ in range(12):
            hidden.append(model(ids, keep=keep, caches=caches)[:, -1:])
            ids = model.logits(hidden[-1]).argmax(-1)
            keep = None if keep is None else F.pad(keep, (0, 1), value=True)
        return torch.cat(hidden, 1)

    return model, generate


def units() -> tuple[Stack, Callable[[int, int], Tensor]]:
    cfg = unit_decoder.TINY
    model = UnitDecoder(cfg).eval().lm
    for name, p in model.named_parameters():
        if name.endswith(("out.weight", "bias_v")):  # what is far away, and where, matters
            torch.nn.init.normal_(p, std=0.3)

    def generate(B: int, N: int) -> Tensor:
        """Hidden states of 12 steps after B prompts of up to N rows, (B, 12, C)."""
        rng = torch.Generator().manual_seed(N)
        x, *rows = torch.randn(B, N + 11, cfg.width, generator=rng).split([N, *[1] * 11], 1)
        keep = torch.arange(N) >= torch.arange(B)[:, None] * N // (B + 1)
        past, hidden = model.past(N + 12), list[Tensor]()
        for row in (x, *rows):
            hidden.append(model(row, keep, past)[:, -1:])
            keep = F.pad(keep, (0, 1), value=True)
        return torch.cat(hidden, 1)

    return model, generate


def recognizer() -> tuple[WhisperDecoder, Callable[[int, int], Tensor]]:
    model = WhisperDecoder(whisper_dec.TINY).eval()

    def generate(B: int, N: int) -> Tensor:
        """Hidden states of 12 steps over B recordings of N frames, (B, 12, C)."""
        rng = torch.Generator().manual_seed(N)
        frames = torch.randn(B, N, model.cfg.width, generator=rng)
        caches, ids, hidden = model.new_caches(), torch.ones(B, 3, dtype=torch.long), []
        for _ in range(12):
            x = model(ids, frames, caches=caches)
            assert isinstance(x, Tensor)
            hidden.append(x[:, -1:])
            ids = model.logits(hidden[-1]).argmax(-1)
        return torch.cat(hidden, 1)

    return model, generate


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("made", [llama, units, recognizer])
@torch.inference_mode()
def test_compiled_steps_agree_and_share_their_graphs(
    made: Callable, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, generate = made()
    sizes = [(1, 5), (1, 30), (3, 9), (1, 1), (1, 12), (2, 7), (5, 20), (1, 5)]
    plain = [generate(*size) for size in sizes]
    torch._dynamo.reset()
    mode = {"backend": "eager"} if backend == "eager" else {"mode": "reduce-overhead"}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **mode))
    monkeypatch.setattr(kv_cache, "ROOM", 64)
    model.compile_steps()
    graphs = [loop.graphs()]
    for size, want in zip(sizes, plain, strict=True):
        torch.testing.assert_close(generate(*size), want, rtol=1e-4, atol=1e-5)
        graphs.append(loop.graphs() - graphs[0])
    assert graphs[1] == 1
    assert graphs[4] <= 4
    assert graphs[4:] == [graphs[4]] * 5  # from then on there are graphs for all


@pytest.mark.parametrize("made", [llama, units, recognizer])
def test_a_step_does_not_remember_in_which_mode_it_ran(
    made: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    model, generate = made()
    model.compile_steps()
    found = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found.append(generate(1, 5))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_step_is_compiled_only_where_it_has_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def compiled(run: Callable, mode: str) -> Callable:
        def step(x: Tensor, *rest: object) -> Tensor:
            calls.append(x.shape[1])
            return run(x, *rest)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    model, generate = llama()
    model.compile_steps()
    generate(1, 5)
    generate(1, 1)
    assert calls == [1] * 22  # not the prompts
