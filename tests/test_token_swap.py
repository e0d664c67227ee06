"""token_swap.py: codes move as asked; its measuring sees what espeak-ng was told to do."""

import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

import synth
import token_swap
from data import builtin
from metrics import Contours
from pipeline import Pipeline, Speech
from token_swap import PROPERTIES, Trial, effect, mixtures, swap, trials

WORDS = ["the", "dog", "sees", "birds."]


def said(seed: int, words: list[str] = WORDS) -> Speech:
    g = torch.Generator().manual_seed(seed)
    return Speech(words, torch.randint(8, (len(words), 12), generator=g), torch.full((64,), seed))


def test_swap_moves_codes_of_these_words_only() -> None:
    a, b = said(1), said(2)
    assert a.codes is not None
    assert b.codes is not None
    kept = a.codes.clone()
    mixed = mixtures(a, b, 2, 3)
    assert list(mixed) == ["a", "a_with_b", "b", "b_with_a"]
    rows = [a.codes[:1], b.codes[1:3], a.codes[3:]]
    assert torch.equal(mixed["a_with_b"].codes, torch.cat(rows))  # type: ignore[arg-type]
    assert torch.equal(mixed["b_with_a"].codes[1:3], a.codes[1:3])  # type: ignore[index]
    assert torch.equal(mixed["a_with_b"].voice, a.voice)
    assert torch.equal(a.codes, kept)
    assert torch.equal(swap(a, b, 1, 4).codes, b.codes)  # type: ignore[arg-type]


def test_swap_refuses() -> None:
    a = said(1)
    for other in (["the", "dog", "sees", "cats."], ["the", "dog", "sees"]):
        with pytest.raises(ValueError, match="same words"):
            swap(a, said(2, other), 1, 1)
    assert swap(a, said(2, ["The", "dog", "sees", "birds"]), 1, 1).words == WORDS
    for span in ((0, 1), (2, 1), (3, 5)):
        with pytest.raises(ValueError, match="of 4"):
            swap(a, said(2), *span)
    with pytest.raises(ValueError, match="text only"):
        swap(a, Speech(WORDS, None, a.voice), 1, 1)


def test_contrast_is_opposite_for_each_word() -> None:
    a, b = token_swap.contrast("the dog sees birds.", "Alex", random.Random(0))
    for name, (low, high) in token_swap.SPREAD.items():
        logs = [math.log(x) for x in getattr(a, name)]
        assert logs == pytest.approx([-math.log(x) for x in getattr(b, name)])
        assert all(low <= abs(x) <= high for x in logs)
    assert a.volumes_db == pytest.approx([-x for x in b.volumes_db])


@pytest.fixture
def spoken(small_corpus: Path) -> list[Trial]:
    return trials(builtin(synth.load(n_train=1), "test"), 12)


def test_trials_say_what_they_claim(spoken: list[Trial]) -> None:
    assert len(spoken) == 12
    for test in spoken:
        assert test.a.text == test.b.text
        assert test.a.voice == test.b.voice
        ratio = (test.a.ends_s[test.word] - test.a.starts_s[test.word]) / (
            test.b.ends_s[test.word] - test.b.starts_s[test.word]
        )
        assert (ratio > 1) == (test.a.rates[test.word] < test.b.rates[test.word])
    assert len({test.a.text for test in spoken}) > 1


def test_the_measuring_sees_swaps_of_espeak(spoken: list[Trial]) -> None:
    """The DTW times words to a frame or two; the other words do not move at all in truth."""
    for row in token_swap.espeak_effect(spoken).values():
        assert row["r with truth"][0] > 0.9
        assert row["right sign"][0] > 0.9
        assert row["slope"][0] == pytest.approx(1, abs=0.2)
        assert row["others / swapped"][0] < 0.15


def test_effect_of_known_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped words change by half of the truth, the others by a tenth of it."""
    g = torch.Generator().manual_seed(0)
    n, W = 40, 5
    truth = torch.randn(n, 3, generator=g, dtype=torch.double)
    utterance = synth.Utterance("a b c d e.")
    silence = torch.zeros(160)
    tests = [Trial(i % W, utterance, utterance, silence, silence, silence) for i in range(n)]
    values = iter([v for i in range(n) for v in (torch.zeros(W, 3), truth[i].expand(W, 3))])
    monkeypatch.setattr(token_swap, "known_values", lambda *args: next(values))
    before = [torch.zeros(W, 3, dtype=torch.double) for _ in tests]
    after = [0.1 * truth[i].expand(W, 3).clone() for i in range(n)]
    for i, test in enumerate(tests):
        after[i][test.word] = 0.5 * truth[i]
    after[0][:, 1] = math.nan  # an F0 that is undefined is left out
    found = effect(tests, before, after)
    assert list(found) == [*PROPERTIES]
    for name, row in found.items():
        assert row["swaps"][0] == (n - 1 if "F0" in name else n)
        assert row["r with truth"][0] == pytest.approx(1)
        assert row["right sign"][0] == 1
        assert row["slope"][0] == pytest.approx(0.5)
        assert row["others / swapped"][0] == pytest.approx(0.2)


def test_values_of_a_word() -> None:
    """110 Hz is 12 semitones above 55 Hz; 0.1 is -20 dB."""
    f0, rms = torch.zeros(100), torch.full((100,), 0.1)
    f0[20:30] = 110
    sound = Contours(torch.zeros(100, 13), f0, rms)
    found = token_swap.word_values(sound, torch.tensor([[0.15, 0.35], [0.5, 0.6]]))
    assert found[0].tolist() == pytest.approx([0.2, 12, -20], abs=1e-4)
    assert found[1].isnan().tolist() == [False, True, False]


def test_a_system_with_equal_codes_changes_nothing(
    spoken: list[Trial], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(tiny_bundle, tiny_bundle / "tokenizer")
    codes: dict[str, Tensor] = {}

    def encode(self: Pipeline, wav: Tensor, text: str) -> Speech:
        words = text.split()
        codes.setdefault(text, torch.randint(8, (len(words), 12)))
        return Speech(words, codes[text], torch.zeros(64))

    real = token_swap.system_effect(pipeline, spoken[:3], seed=0)
    assert set(real) == set(PROPERTIES)
    monkeypatch.setattr(Pipeline, "encode", encode)
    for row in token_swap.system_effect(pipeline, spoken[:3], seed=0).values():
        moved = row["swapped word"][0]
        assert moved == 0 or math.isnan(moved)
