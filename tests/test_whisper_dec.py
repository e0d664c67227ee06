"""whisper_dec.py against transformers; cache, causality, padding, recognition, word times."""

import pytest
import torch
from torch import Tensor, nn

from weights import load_strict, rename
from whisper_dec import (
    NAMES,
    NAMES_OPENAI,
    SKIP,
    SKIP_OPENAI,
    TINY,
    DecoderConfig,
    WhisperDecoder,
    transcribe,
    word_times,
)

SMALL = DecoderConfig(vocab=50, width=24, heads=3, layers=3, ffn=40, max_tokens=20)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """No parameter stays at 0 or 1, so that a bias or a norm that is left out shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)


def build(cfg: DecoderConfig = SMALL, seed: int = 0) -> WhisperDecoder:
    model = WhisperDecoder(cfg).eval()
    randomize(model, seed)
    return model


def batch(seed: int = 0, n: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids (3, n), keys and values (3, 13, 24), keep (3, 13) with 13, 8 and 1 real frames"""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 3, 13, 24, generator=g)
    keep = torch.arange(13) < torch.tensor([[13], [8], [1]])
    return torch.randint(50, (3, n), generator=g), keys, values, keep


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=50, num_mel_bins=4, d_model=24, encoder_layers=1, encoder_attention_heads=3,
        encoder_ffn_dim=8, decoder_layers=3, decoder_attention_heads=3, decoder_ffn_dim=40,
        max_source_positions=13, max_target_positions=20, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, decoder_start_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    randomize(model, 3)
    return model


@torch.no_grad()
def test_equals_transformers(theirs: nn.Module) -> None:
    ours = WhisperDecoder(SMALL).eval()
    load_strict(ours, rename(theirs.state_dict(), NAMES, SKIP))
    for seed, n in ((0, 9), (1, 1), (2, 20)):
        ids, keys, _, _ = batch(seed, n)
        want = theirs(decoder_input_ids=ids, encoder_outputs=(keys,), output_attentions=True)
        hidden, weights = ours(ids, keys, need_weights=True)
        close(ours.logits(hidden), want.logits)
        close(weights, torch.stack(want.cross_attentions, 1))
        close(ours(ids, keys), hidden)


@torch.no_grad()
def test_weights_are_those_of_the_fused_path_with_other_values_and_padding() -> None:
    model = build()
    ids, keys, values, keep = batch()
    hidden, weights = model(ids, keys, values, keep, need_weights=True)
    close(hidden, model(ids, keys, values, keep))
    assert weights.shape == (3, 3, 3, 9, 13)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3, 3, 9))
    assert not weights[~keep[:, None, None, None].expand_as(weights)].any()
    assert (hidden - model(ids, keys, keys, keep)).abs().max() > 1e-3  # values are heard
    assert (hidden - model(ids, values, values, keep)).abs().max() > 1e-3  # and so are keys


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(9,), (4, 5), (4, 1, 1, 1, 2), (1,) * 9], ids=str)
def test_cached_equals_uncached(cuts: tuple[int, ...]) -> None:
    model = build()
    ids, keys, values, keep = batch()
    caches, parts = model.new_caches(), []
    for part in ids.split(cuts, dim=1):
        hidden, weights = model(part, keys, values, keep, caches, need_weights=True)
        parts.append((hidden, weights))
    want, maps = model(ids, keys, values, keep, need_weights=True)
    close(torch.cat([p[0] for p in parts], 1), want)
    close(torch.cat([p[1] for p in parts], 3), maps)


@torch.no_grad()
def test_audio_is_projected_once() -> None:
    model, (ids, keys, _, _) = build(), batch()
    calls: list[int] = []
    model.get_submodule("blocks.0.cross.key").register_forward_hook(lambda *_: calls.append(1))
    caches = model.new_caches()
    for part in ids.split(1, dim=1):
        model(part, keys, caches=caches)
    assert len(calls) == 1


@torch.no_grad()
def test_future_text_does_not_change_the_past() -> None:
    model, (ids, keys, _, _) = build(), batch()
    before = model(ids, keys)
    ids[:, 5] = (ids[:, 5] + 1) % 50
    after = model(ids, keys)
    close(after[:, :5], before[:, :5])
    assert (after[:, 5:] - before[:, 5:]).abs().amax((0, 2)).min() > 1e-4


@torch.no_grad()
def test_padded_batch_equals_single_items() -> None:
    model = build()
    ids, keys, values, keep = batch()
    hidden = model(ids, keys.masked_fill(~keep[..., None], 7.0), values, keep)
    for i, frames in enumerate((13, 8, 1)):
        one = slice(i, i + 1)
        close(
            hidden[one, : 9 - i], model(ids[one, : 9 - i], keys[one, :frames], values[one, :frames])
        )


def greedy(model: WhisperDecoder, keys: Tensor, prefix: list[int], eos: int, n: int) -> list[int]:
    """The slow way, one item, no cache: keys (1, T, C) -> ids"""
    ids = [*prefix]
    for _ in range(n):
        ids.append(int(model.logits(model(torch.tensor([ids]), keys))[0, -1].argmax()))
    new = ids[len(prefix) :]
    return new[: new.index(eos)] if eos in new else new


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_transcribe_gives_what_single_items_give(seed: int) -> None:
    model = build(seed=seed)
    keys, lengths = batch(seed)[1], (13, 8, 4)
    keep = torch.arange(13) < torch.tensor(lengths)[:, None]
    free = [greedy(model, keys[i : i + 1, :n], [1, 2], 99, 15) for i, n in enumerate(lengths)]
    eos = free[0][3]  # an id that the first item is known to say
    got = transcribe(model, keys, keep, prefix=[1, 2], eos=eos, max_new=15)
    assert got == [row[: row.index(eos)] if eos in row else row for row in free]
    assert got == [
        transcribe(model, keys[i : i + 1, :n], prefix=[1, 2], eos=eos, max_new=15)[0]
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def test_transcribe_stops_each_item_by_itself_and_suppresses() -> None:
    model, (_, keys, _, _) = build(), batch()
    first = [row[0] for row in transcribe(model, keys, prefix=[1], eos=49, max_new=1)]
    assert transcribe(model, keys, prefix=[1], eos=first[0], max_new=6)[0] == []
    never = transcribe(model, keys, prefix=[1], eos=49, max_new=6, suppress=first)
    assert not {*first} & {i for row in never for i in row}
    later = transcribe(model, keys, prefix=[1], eos=49, max_new=6, suppress_first=first)
    assert all(a[0] not in first and a[:1] == b[:1] for a, b in zip(later, never, strict=True))
    assert transcribe(model, keys, prefix=[1], eos=49, max_new=0) == [[], [], []]


def test_word_times_follow_the_attention() -> None:
    spans = [(0, 4), (4, 6), (6, 13), (13, 14), (14, 20)]  # frames of each token
    weights = torch.full((2, 3, 5, 20), 0.01)
    for n, (a, b) in enumerate(spans):
        weights[:, :, n, a:b] = 0.5
    times = word_times(weights, [-1, 0, 0, 1, -1], frame_s=0.04)
    torch.testing.assert_close(times, torch.tensor([[4, 13], [13, 14]]) * 0.04)
    torch.testing.assert_close(word_times(weights[0, 0], [-1, 0, 0, 1, -1], 0.04), times)
    assert word_times(weights, [-1] * 5, 0.04).shape == (0, 2)
    with pytest.raises(ValueError, match=r"5 rows, 4 frames.*N <= T"):
        word_times(weights[..., :4], [-1, 0, 0, 1, -1], 0.04)
    with pytest.raises(ValueError, match="no word left out"):
        word_times(weights, [0, 0, 2, 2, 2], 0.04)


@pytest.mark.parametrize("seed", range(3))
def test_word_times_take_the_best_monotone_path(seed: int) -> None:
    w = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
    cuts = [(a, b) for a in range(1, 7) for b in range(a + 1, 8)]
    a, b = max(
        cuts, key=lambda c: float(w[0, : c[0]].sum() + w[1, c[0] : c[1]].sum() + w[2, c[1] :].sum())
    )
    assert word_times(w, [0, 1, 2], 1.0).tolist() == [[0, a], [a, b], [b, 8]]


def test_names_of_the_released_checkpoint_and_of_openai() -> None:
    state = WhisperDecoder(SMALL).state_dict()
    layer = "audio_tower.audio_joint_encoder_segmenter.audio_segmenter.decoder.layers.1."
    public = ["encoder_attn.k_proj.weight", "encoder_attn_layer_norm.bias", "fc1.weight"]
    ours = rename({layer + k: torch.zeros(1) for k in public}, NAMES, SKIP)
    assert [*ours] == [
        "blocks.1.cross.key.weight",
        "blocks.1.cross_norm.bias",
        "blocks.1.mlp.0.weight",
    ]
    names = {"cross_norm": "cross_attn_ln", "attn_norm": "attn_ln", "mlp_norm": "mlp_ln"}
    names |= {"cross.": "cross_attn.", "norm.": "ln.", "positions": "positional_embedding"}
    names |= {"tokens.": "token_embedding."}
    openai = {}
    for key, value in state.items():
        row = next((k for k in names if k in key), None)
        openai["decoder." + (key.replace(row, names[row]) if row else key)] = value
    back = rename(openai | {"encoder.ln_post.bias": torch.zeros(1)}, NAMES_OPENAI, SKIP_OPENAI)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_gradient_reaches_every_parameter_also_through_the_weights() -> None:
    model, (ids, keys, values, keep) = build(), batch(n=20)
    hidden, weights = model(ids, keys, values, keep, need_weights=True)
    (model.logits(hidden).logsumexp(-1).mean() + weights[..., 0].log().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_fp32_norm_and_softmax_under_autocast() -> None:
    model, (ids, keys, _, keep) = build(), batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, weights = model(ids, keys, keep=keep, need_weights=True)
    assert hidden.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 3, 3, 9))


def test_messages() -> None:
    model, (ids, keys, _, keep) = build(), batch()
    with pytest.raises(ValueError, match="21 tokens, the position table ends at 20"):
        model(ids[:, :1].expand(3, 21), keys)
    caches = model.new_caches()
    with torch.no_grad():
        model(ids.repeat(1, 2), keys, caches=caches)
    with pytest.raises(ValueError, match="27 tokens"):
        model(ids, keys, caches=caches)
    with pytest.raises(ValueError, match=r"keys have shape \[2, 13, 24\], wanted \[3, T, 24\]"):
        model(ids, keys[:2])
    with pytest.raises(ValueError, match=r"keep is torch.int64 \[3, 13\], wanted bool \[3, 13\]"):
        model(ids, keys, keep=keep.long())
    with pytest.raises(ValueError, match=r"items \[0, 1, 2\] have no frame"):
        model(ids, keys, keep=keep & False)
    with pytest.raises(ValueError, match="1 prefix ids and max_new=20"):
        transcribe(model, keys, prefix=[1], eos=2, max_new=20)
    with pytest.raises(ValueError, match="width=10 must be a multiple of heads=4"):
        DecoderConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="must be 1 or more"):
        DecoderConfig(vocab=0)


def test_default_is_the_released_size() -> None:
    with torch.device("meta"):
        model = WhisperDecoder(DecoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 119_436_800  # spec/taste.md, section 0
    assert sum(p.numel() for p in WhisperDecoder(TINY).parameters()) < 700_000
