"""aggregator.py against the TASTE golden vectors; MLDA, words, padding, causality, gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aggregator import (
    MLDA,
    NAMES,
    SKIP,
    TASLA,
    TINY,
    Aggregator,
    AggregatorConfig,
    spread,
    word_vectors,
)
from weights import as_config, load_strict, rename

GOLDEN = Path(__file__).parent / "golden" / "taste"
SMALL = AggregatorConfig(50, 24, 3, 2, 40, 20, (1, 2), (3, 1), True, 16)
TASTE = replace(SMALL, value_layers=(3,), mlda=False)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def build(cfg: AggregatorConfig = SMALL, seed: int = 0) -> Aggregator:
    """Random weights everywhere: nothing stays at 0, 1 or the identity."""
    torch.manual_seed(seed)
    model = Aggregator(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


WORD_IDS = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 1, 1, 2, -1, -1], [0, 0, -1, -1, -1, -1]])
KEEP = torch.arange(11) < torch.tensor([[11], [6], [1]])


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
    """ids, word_ids (3, 6), the last item of one word; last and two taps (3, 11, 24)"""
    g = torch.Generator().manual_seed(seed)
    last, one, three = torch.randn(3, 3, 11, 24, generator=g)
    return torch.randint(50, (3, 6), generator=g), WORD_IDS, last, {1: one, 3: three}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "aggregator.safetensors")


@torch.no_grad()
def test_golden(golden: dict[str, Tensor]) -> None:
    cfg = AggregatorConfig(96, 32, 4, 2, 64, 64, prefix_ids=(1, 2, 3, 4), value_layers=(2,))
    model = Aggregator(cfg).eval()
    public = {k[8:]: v for k, v in golden.items() if k.startswith("weights.")}
    load_strict(model, rename(public, NAMES, SKIP))
    text_keep = torch.arange(9) < golden["asr_token_lengths"][:, None]
    z, maps = model(
        golden["asr_token_ids"],
        golden["asr_word_ids"].long(),
        golden["states_for_key"],
        golden["states_for_val"][:, None],
        text_keep=text_keep,
        need_weights=True,
    )
    close(z[text_keep], golden["z"][text_keep])
    assert not z[~text_keep].any()
    for i in range(2):  # prefix and EOS cut off; at padding theirs saw other ids
        seen = text_keep[:, None, :, None].expand(3, 4, 9, 40)
        close(maps.frames[:, i][seen], golden[f"cross_attn_{i}"][:, :, 4:-1][seen])
    assert maps.layers is None

    hidden = model.decoder(
        golden["decoder_input_ids"], golden["states_for_key"], golden["states_for_val"]
    )
    close(hidden, golden["decoder_last_hidden"])
    close(hidden[:, 4:-1], golden["z_subword"])


def test_one_word_items_are_averaged_over_their_own_tokens() -> None:
    """Not so in the reference: it merges the padding, which has word id 0, with the only word."""
    edge = json.loads((GOLDEN / "aggregator_edge_single_word.json").read_text())
    [[_, start, end]] = edge["correct"]
    assert [[0, start, end]] not in edge["spans"].values()
    for pads in (1, 3):
        x = torch.randn(1, 2 + pads, 4)
        keep = torch.arange(2 + pads) < 2
        words, word_keep = word_vectors(x, torch.zeros(1, 2 + pads, dtype=torch.long), keep[None])
        close(words, x[:, start:end].mean(1, keepdim=True), 1e-6)
        assert word_keep.tolist() == [[True]]


@torch.no_grad()
@pytest.mark.parametrize("cfg", [SMALL, TASTE], ids=["tasla", "taste"])
def test_padded_batch_equals_single_items(cfg: AggregatorConfig) -> None:
    model, (ids, word_ids, last, taps) = build(cfg), batch()
    hole = ~KEEP[..., None]
    dirty = {k: v.masked_fill(hole, 5.0) for k, v in taps.items()}
    z, maps = model(ids, word_ids, last.masked_fill(hole, -3.0), dirty, KEEP, need_weights=True)
    for i, (n, t) in enumerate(((6, 11), (4, 6), (2, 1))):
        one = slice(i, i + 1)
        cut = {k: v[one, :t] for k, v in taps.items()}
        single, its = model(ids[one, :n], word_ids[one, :n], last[one, :t], cut, need_weights=True)
        close(z[one, :n], single)
        close(maps.frames[one, :, :, :n, :t], its.frames)
        if cfg.mlda:
            close(maps.layers[one, :, :t], its.layers)
    assert not z[word_ids < 0].any()


@torch.no_grad()
def test_padding_of_the_text_does_not_leak() -> None:
    model, (ids, word_ids, last, taps) = build(), batch()
    z = model(ids, word_ids, last, taps, KEEP)
    real = word_ids >= 0
    close(model(ids.masked_fill(~real, -1), word_ids, last, taps, KEEP), z)
    zeros = word_ids.masked_fill(~real, 0)  # as in the public data sets
    assert torch.equal(model(ids, zeros, last, taps, KEEP, text_keep=real), z)


@torch.no_grad()
def test_later_words_do_not_change_earlier_ones() -> None:
    model, (ids, word_ids, last, taps) = build(), batch()
    z = model(ids, word_ids, last, taps)
    ids[0, 3] = (ids[0, 3] + 1) % 50  # the first token of word 2
    again = model(ids, word_ids, last, taps)
    close(again[0, :3], z[0, :3])
    assert (again[0, 3:] - z[0, 3:]).abs().max() > 1e-4


@torch.no_grad()
def test_all_tokens_of_a_word_carry_the_same_vector() -> None:
    model, (ids, word_ids, last, taps) = build(), batch()
    z = model(ids, word_ids, last, taps)
    words, keep = word_vectors(z, word_ids)
    assert keep.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    assert torch.equal(z[0, 3], z[0, 5])
    assert torch.equal(words[0], z[0, [0, 2, 3]])
    assert not words[~keep].any()
    assert torch.equal(spread(words, word_ids), z)


def test_word_mean_is_exact_under_autocast() -> None:
    x = torch.randn(3, 6, 24)
    want = word_vectors(x, WORD_IDS)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        words, _ = word_vectors(x, WORD_IDS)
        assert torch.equal(words, want)
        assert torch.equal(spread(words, WORD_IDS)[0, :2], want[0, [0, 0]])
    torch.testing.assert_close(want[0, 2], x[0, 3:].mean(0))


@torch.no_grad()
def test_mlda_is_the_equation() -> None:
    torch.manual_seed(0)
    mlda, last, values = MLDA(8, 5, 3), torch.randn(2, 7, 8), torch.randn(2, 3, 7, 8)
    mixed, weights = mlda(last, values)
    close(weights, torch.full((2, 3, 7), 1 / 3))  # at the start all layers count the same
    close(mixed, values.mean(1))
    nn.init.normal_(mlda.down.weight)
    mixed, weights = mlda(last, values)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 7))
    for i in range(7):  # frame by frame, by hand
        scores = mlda.down(nn.functional.gelu(mlda.up(last[1, i]))).exp()
        close(weights[1, :, i], scores / scores.sum())
        close(mixed[1, i], sum(weights[1, s, i] * values[1, s, i] for s in range(3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlda(last, values)[1].dtype == torch.float32


@torch.no_grad()
def test_mlda_of_one_layer_is_taste() -> None:
    ids, word_ids, last, taps = batch()
    one = build(replace(SMALL, value_layers=(3,)))
    taste = Aggregator(TASTE).eval()
    load_strict(taste, {k: v for k, v in one.state_dict().items() if not k.startswith("mlda.")})
    close(one(ids, word_ids, last, taps, KEEP), taste(ids, word_ids, last, taps, KEEP))


@torch.no_grad()
def test_mlda_listens_to_each_layer_and_stacked_taps_are_in_order() -> None:
    model, (ids, word_ids, last, taps) = build(), batch()
    z, maps = model(ids, word_ids, last, taps, need_weights=True)
    assert maps.layers.shape == (3, 2, 11)
    stacked = torch.stack([taps[3], taps[1]], 1)  # as in value_layers
    assert torch.equal(model(ids, word_ids, last, stacked), model(ids, word_ids, last, taps))
    assert torch.equal(
        model(ids, word_ids, last, {0: last} | taps), model(ids, word_ids, last, taps)
    )
    for k in (1, 3):
        assert (model(ids, word_ids, last, taps | {k: -taps[k]}) - z).abs().max() > 1e-3


def test_values_pass_unchanged_at_first() -> None:
    model = Aggregator(SMALL)
    for i in range(2):
        value = model.decoder.get_submodule(f"blocks.{i}.cross.value").state_dict()
        assert torch.equal(value["weight"], torch.eye(24))
        assert not value["bias"].any()


@pytest.mark.parametrize("cfg", [SMALL, TASTE], ids=["tasla", "taste"])
def test_gradient_reaches_every_parameter(cfg: AggregatorConfig) -> None:
    model, (ids, word_ids, last, taps) = build(cfg), batch()
    model(ids, word_ids, last, taps, KEEP).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_released_names_and_sizes() -> None:
    layer = "audio_tower.audio_joint_encoder_segmenter.audio_segmenter.decoder.layers.1."
    ours = rename({layer + "encoder_attn.v_proj.bias": torch.zeros(1)}, NAMES, SKIP)
    assert [*ours] == ["decoder.blocks.1.cross.value.bias"]
    with torch.device("meta"):
        taste, tasla = Aggregator(AggregatorConfig()), Aggregator(TASLA)
    assert sum(p.numel() for p in taste.parameters()) == 119_436_800  # spec/taste.md, section 0
    assert tasla.state_dict().keys() - taste.state_dict().keys() == {
        f"mlda.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")
    }
    assert sum(p.numel() for p in Aggregator(TINY).parameters()) < 700_000


def test_config_survives_json() -> None:
    values = json.loads(json.dumps({**vars(TASLA)}))
    assert as_config(AggregatorConfig, values) == TASLA


def test_messages() -> None:
    model, (ids, word_ids, last, taps) = build(), batch()
    with pytest.raises(ValueError, match=r"taps \[1\] lack \[3\]"):
        model(ids, word_ids, last, {1: taps[1]})
    with pytest.raises(ValueError, match=r"shape \[3, 3, 11, 24\], wanted \[3, 2, 11, 24\]"):
        model(ids, word_ids, last, torch.zeros(3, 3, 11, 24))
    with pytest.raises(ValueError, match="padded on the left or inside"):
        model(ids, word_ids.flip(1), last, taps)
    with pytest.raises(ValueError, match=r"wanted one shape \[B, N\]"):
        model(ids, word_ids[:, :5], last, taps)
    with pytest.raises(ValueError, match="21 tokens, the position table ends at 20"):
        model(ids.repeat(1, 4)[:, :19], torch.arange(19).expand(3, -1), last, taps)
    with pytest.raises(ValueError, match=r"one layer, or several with mlda=True"):
        AggregatorConfig(value_layers=(6, 8))
    with pytest.raises(ValueError, match="each once, and none below 0"):
        AggregatorConfig(value_layers=(6, 6), mlda=True)
    with pytest.raises(ValueError, match=r"must lie in 0 .. vocab-1=511"):
        AggregatorConfig(vocab=512)
    with pytest.raises(ValueError, match="no room beside 4 prefix ids"):
        AggregatorConfig(max_tokens=4)
