"""tokenizer.py: what goes in, what the codes are, and where attention is guided to."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from aggregator import TINY as AGGREGATOR
from fsq import FSQ, PAD
from synth import Utterance
from tokenizer import (
    SpeechTokenizer,
    TokenizerBatch,
    TokenizerConfig,
    guided_attention,
    load_tokenizer,
    unit_pitch,
)
from unit_decoder import TINY as UNIT_DECODER
from weights import save_model

WORDS = [2, 1]  # of the two items
LAYERS = AGGREGATOR.value_layers


def tokenizer(quantizer: str = "fsq") -> SpeechTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(
        replace(AGGREGATOR, prefix_ids=(1,)), replace(UNIT_DECODER, dropout=0.0), quantizer
    )
    return SpeechTokenizer(config).eval()


def batch(spans: bool = False) -> TokenizerBatch:
    """Two items: words of 2 + 1 and of 2 tokens, 9 and 6 frames and units."""
    torch.manual_seed(1)
    word_ids = torch.tensor([[0, 0, 1], [0, 0, -1]])
    units = torch.randint(UNIT_DECODER.units, (2, 9))
    units[1, 6:] = -1
    spoken = torch.zeros(2, 3, 9, dtype=torch.bool)
    spoken[0, :2, 1:4] = spoken[0, 2, 4:8] = spoken[1, :2, 2:6] = True
    return TokenizerBatch(
        ids=torch.randint(3, UNIT_DECODER.vocab, (2, 3)).masked_fill(word_ids < 0, 0),
        word_ids=word_ids,
        last=torch.randn(2, 9, AGGREGATOR.width),
        taps={layer: torch.randn(2, 9, AGGREGATOR.width) for layer in LAYERS},
        keep=torch.arange(9) < torch.tensor([[9], [6]]),
        voice=torch.randn(2, UNIT_DECODER.speaker_dim),
        units=units,
        spans=spoken if spans else None,
    )


def heard(x: TokenizerBatch) -> tuple:
    return x.ids, x.word_ids, x.last, x.taps, x.keep


@torch.no_grad()
@pytest.mark.parametrize("quantizer", ["fsq", "rvq"])
def test_codes_alone_give_what_the_whole_model_gives(quantizer: str) -> None:
    model, x = tokenizer(quantizer), batch()
    out, codes = model(x), model.encode(*heard(x))
    assert out.codes is not None
    assert torch.equal(codes, out.codes)
    assert (codes >= 0).all(2).sum(1).tolist() == WORDS
    audio = model.embed(codes, x.word_ids)
    again = model.unit_decoder(x.ids, x.word_ids >= 0, audio, x.voice, x.units)
    torch.testing.assert_close(again.logits, out.units.logits)
    assert torch.equal(audio[0, 0], audio[0, 1])
    same = torch.equal(codes[0, 0], codes[0, 1])
    assert torch.equal(audio[0, 1], audio[0, 2]) == same


@torch.no_grad()
def test_padding_and_company_change_no_code() -> None:
    model, x = tokenizer(), batch()
    codes = model.encode(*heard(x))
    cut = (
        x.ids[1:, :2],
        x.word_ids[1:, :2],
        x.last[1:, :6],
        {k: v[1:, :6] for k, v in x.taps.items()},
    )
    assert torch.equal(model.encode(*cut)[0], codes[1, :1])


def test_text_only_hears_nothing_and_trains_no_aggregator() -> None:
    model, x = tokenizer(), batch(spans=True)
    out = model(x, text_only=True)
    out.loss.backward()
    assert out.codes is None
    assert out.recon == 0
    assert all(p.grad is None for p in model.aggregator.parameters())
    other = replace(x, last=torch.empty(2, 9, 0), taps={})
    assert torch.equal(model(other, text_only=True).loss, out.loss)


def test_without_a_quantizer_there_are_no_codes() -> None:
    model, x = tokenizer("none"), batch()
    assert model(x).codes is None
    with pytest.raises(ValueError, match="makes no codes"):
        model.encode(*heard(x))


def test_guided_attention_is_the_mass_outside() -> None:
    spans = torch.tensor([[True, True, False, False], [False, False, True, False]])
    keep = torch.tensor([True, True])
    assert guided_attention((spans / spans.sum(1, keepdim=True))[None], spans, keep) == 0
    even = torch.full((3, 2, 4), 0.25)
    middle = guided_attention(even, spans, keep)
    assert math.isclose(middle, (math.log(2) + math.log(4)) / 2, rel_tol=1e-6)
    assert math.isclose(
        guided_attention(even, spans, torch.tensor([True, False])), math.log(2), rel_tol=1e-6
    )
    assert guided_attention(even * 0, spans, keep).isfinite()


@pytest.mark.parametrize("text_only", [False, True])
def test_guide_counts_rows_of_words_and_moves_attention(text_only: bool) -> None:
    model, x = tokenizer().train(), batch(spans=True)
    assert x.spans is not None
    assert model(replace(x, spans=None), text_only).guide == 0
    out = model(x, text_only)
    half = out.units.maps[len(out.units.maps) // 2][:, :2].mean(1)  # (B, 1+U, N)
    rows = [half[0, t, :2].sum() for t in range(1, 4)] + [half[0, t, 2] for t in range(4, 8)]
    rows += [half[1, t, :2].sum() for t in range(2, 6)]
    wanted = -torch.stack(rows).log().mean()
    if not text_only:
        assert out.maps is not None
        wanted = wanted + guided_attention(out.maps[:, -1], x.spans, x.word_ids >= 0)
    torch.testing.assert_close(out.guide, wanted)
    before = out.guide.item()
    opt = torch.optim.SGD(model.parameters(), 1.0)
    out.guide.backward()
    opt.step()
    assert model(x, text_only).guide < before


def test_prosody_is_read_from_the_codes_alone() -> None:
    model, x = tokenizer().eval(), batch()
    assert model(x).prosody == 0
    true = torch.randn(2, 2, 3)
    x = replace(x, prosody=true)
    out = model(x)
    assert out.codes is not None
    assert model.quantizer is not None
    z = model.quantizer.decode(out.codes)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    off = (z[..., :3] / 5 - true).square()  # (B, W, 3)
    torch.testing.assert_close(out.prosody, torch.cat([off[0], off[1, :1]]).mean())
    torch.testing.assert_close(out.loss - model(replace(x, prosody=None)).loss, 3 * out.prosody)
    out.prosody.backward()
    assert next(model.aggregator.parameters()).grad is not None
    assert model(x, text_only=True).prosody == 0


def test_pitch_is_expected_of_the_units() -> None:
    model, x = tokenizer().eval(), batch()
    assert model(x).pitch == 0
    x = replace(x, unit_pitch=torch.randn(model.unit_decoder.config.units))
    assert x.unit_pitch is not None
    out, off = model(x), []
    for b, t in (x.units >= 0).nonzero().tolist():
        odds = out.units.logits[b, t, :-1].softmax(0)  # EOS has no pitch
        off.append((odds * x.unit_pitch).sum() - x.unit_pitch[x.units[b, t]])
    torch.testing.assert_close(out.pitch, torch.stack(off).square().mean())
    torch.testing.assert_close(out.loss - model(replace(x, unit_pitch=None)).loss, 3 * out.pitch)
    assert model(x, text_only=True).pitch == 0


def test_unit_pitch_is_the_pitch_of_the_words_around() -> None:
    """Units of 40 ms: 0 to 3 are in 'he', 4 in the pause, 5 to 9 in 'sings.'"""
    high, low = (
        Utterance("he sings.", pitches=pitches, starts_s=(0.0, 0.2), ends_s=(0.16, 0.4))
        for pitches in ((1.25, 0.8), (0.8, 0.8))
    )
    units = torch.tensor([0, 0, 0, 7, 2, 1, 1, 1, 1, 0])  # 2 is heard in no word
    found = unit_pitch([high] * 5 + [low], [units.short()] * 6, 9, 0.04)
    up, down = (torch.tensor(x).log().item() / 0.22 for x in (1.25, 0.8))
    mean = torch.tensor([(15 * up + 9 * down) / 24, down, (5 * up + down) / 6])  # of units 0, 1, 7
    share = torch.tensor([24.0, 24.0, 6.0]) / 54
    mean -= mean @ share
    wanted = torch.zeros(9)
    wanted[[0, 1, 7]] = mean / (mean.square() @ share).sqrt()
    torch.testing.assert_close(found, wanted)
    rare = unit_pitch([high] * 5, [units] * 5, 9, 0.04)
    assert (rare != 0).tolist() == [True, True, *[False] * 7]


@torch.no_grad()
def test_start_spreads_the_first_codes() -> None:
    model, x = tokenizer(), batch()
    assert isinstance(model.quantizer, FSQ)
    model.quantizer.scale.fill_(1e3)  # all codes at either end
    before = model(x).codes
    model.start(x)
    after = model(x).codes
    assert ((before == 0) | (before == 7) | (before == PAD)).all()
    assert ((after > 0) & (after < 7)).any(-1)[0].all()
    rvq = tokenizer("rvq")
    old = {k: v.clone() for k, v in rvq.state_dict().items()}
    rvq.start(x)
    assert all(torch.equal(v, old[k]) for k, v in rvq.state_dict().items())


@torch.no_grad()
def test_a_saved_folder_opens_again(tmp_path: Path) -> None:
    model, x = tokenizer("rvq"), batch()
    save_model(tmp_path, model, {"tokenizer": asdict(model.config)}, torch.float32)
    again = load_tokenizer(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(x).loss, model(x).loss)
