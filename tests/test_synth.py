"""The built-in corpus: the grammar is exact, times and prosody are true, the bytes repeat."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grammar
import synth
from synth import Corpus, Utterance

SIZES = {"n_train": 60, "n_dev": 6, "n_test": 6, "n_test_voices": 12}
needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synth")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> Corpus:
    return synth.load(**SIZES, seed=1, cache=cache)


def words_of(u: Utterance) -> list[str]:
    return u.text.split()


# ---- grammar


def test_everything_sampled_is_grammatical() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = grammar.document(rng)
        assert grammar.is_grammatical(text), text
        assert all(3 <= len(s.split()) <= 8 for s in grammar.sentences(text))
        assert len(text.split()) <= (8 if text.count(".") == 1 else 10)


def test_sampler_uses_every_word_and_seldom_repeats() -> None:
    rng = random.Random(1)
    drawn = [grammar.sentence(rng) for _ in range(6000)]
    assert len(set(drawn)) > 0.98 * len(drawn)
    assert {w for s in drawn for w in s[:-1].split()} == set(grammar.WORDS)
    assert all(w.isascii() and w.isalpha() and w.islower() for w in grammar.WORDS)
    assert "in" not in grammar.WORDS  # espeak merges 'in the' into one word event


@pytest.mark.parametrize(
    "text",
    [
        "two birds sing by the river.",
        "the dog sleeps.",
        "the women were famous.",
        "he can carry his big red box now.",
        "she sings softly. they must run.",
        "her mouse sees her.",
        "a child gives the dog a cake.",
    ],
)
def test_grammatical_by_hand(text: str) -> None:
    assert grammar.is_grammatical(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "two birds sings by the river.",  # agreement of the verb
        "the bird sing by the river.",
        "two bird sing by the river.",  # of the determiner
        "these dog sleeps.",
        "he can carries his box.",  # a modal wants the plain form
        "they was happy.",
        "two birds by sing the river.",  # swapped
        "birds two sing by the river.",
        "he carries his red big box.",
        "two birds sing by the.",  # truncated
        "two birds sing by.",
        "the dog.",
        "the zebra sleeps.",  # unknown
        "two birds sing by the river",  # the stop
        "two birds sing by the river..",
        "two birds sing. by the river.",
        "two  birds sing by the river.",
        " two birds sing by the river.",
        "Two birds sing by the river.",
        "the box reads a book.",  # selection
        "the dog cooks a letter.",
        "she runs and he runs and they run.",  # two conjunctions
        "she runs.",  # too short, too long
        "the small young king carries my big red book.",
    ],
)
def test_ungrammatical_by_hand(text: str) -> None:
    assert not grammar.is_grammatical(text)


def test_neighbours_cannot_be_swapped_and_agreement_cannot_be_broken() -> None:
    rng, verbs = random.Random(2), grammar.LEXICON
    forms = {
        p: s for v in grammar.VERBS for p, s in zip(verbs[v + ".p"], verbs[v + ".s"], strict=True)
    }
    broken = 0
    for text in [grammar.sentence(rng) for _ in range(1000)]:
        words = text[:-1].split()
        i = rng.randrange(len(words) - 1)
        swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
        assert words == swapped or not grammar.is_grammatical(" ".join(swapped) + ".")
        plural = [k for k, w in enumerate(words) if w in forms]
        if len(plural) == 1 and not any(w in grammar.LEXICON["can"] for w in words):
            words[plural[0]] = forms[words[plural[0]]]
            assert not grammar.is_grammatical(" ".join(words) + ".")
            broken += 1
    assert broken > 200


def test_texts_repeat_by_seed_and_avoid_what_is_held_out() -> None:
    first = grammar.texts(300, seed=3)
    assert first == grammar.texts(300, seed=3) != grammar.texts(300, seed=4)
    held = {s for t in first[:100] for s in grammar.sentences(t)}
    again = grammar.texts(300, seed=3, avoid=held)
    assert not held & {s for t in again for s in grammar.sentences(t)}


# ---- plan


def test_no_held_out_sentence_or_voice_in_train() -> None:
    items = synth.plan({"train": 3000, "dev": 100, "test": 100, "test_voices": 100}, seed=0)
    said = {
        split: {s for i in items if i.split == split for s in grammar.sentences(i.text)}
        for split in ("train", "dev", "test", "test_voices")
    }
    assert not said["train"] & (said["dev"] | said["test"] | said["test_voices"])
    voices = {split: {i.voice for i in items if i.split == split} for split in said}
    assert voices["train"] == set(synth.VOICES_TRAIN)
    assert voices["test_voices"] == set(synth.VOICES_HELD_OUT)
    assert voices["dev"] | voices["test"] <= voices["train"]
    assert not set(synth.VOICES_TRAIN) & set(synth.VOICES_HELD_OUT)


def test_prosody_stays_in_the_range_that_espeak_honours() -> None:
    items = synth.plan({"train": 500}, seed=5)
    for name, (low, high) in {"rates": synth.RATE_RANGE, "pitches": synth.PITCH_RANGE}.items():
        values = np.array([v for i in items for v in getattr(i, name)])
        assert values.min() >= low
        assert values.max() <= high
        assert np.log(values).std() == pytest.approx(0.3 if name == "rates" else 0.22, abs=0.05)
    assert max(abs(v) for i in items for v in i.volumes_db) <= 9


def test_ssml_says_what_was_asked() -> None:
    item = Utterance("he sings. they run.", rates=(0.5, 1, 1, 2), volumes_db=(0, 6.0206, 0, 0))
    sentences = synth.ssml(item).split("</s>")
    assert sentences[0].startswith('<speak><s><prosody rate="50%" pitch="100%" volume="100%">he<')
    assert 'volume="200%">sings.<' in sentences[0]
    assert sentences[1].startswith("<s>")
    assert sentences[2] == "</speak>"


# ---- speech


@needs_espeak
def test_sizes_splits_and_audio(corpus: Corpus) -> None:
    for name, n in SIZES.items():
        assert len(corpus.split(name.removeprefix("n_"))) == n
    held = corpus.held_out()
    assert not held & {s for u in corpus.split("train") for s in grammar.sentences(u.text)}
    for u in corpus.utterances:
        wav = corpus.audio(u)
        assert wav.shape == (u.length,)
        assert wav.dtype == torch.float32
        assert 0.02 < wav.abs().max() < 1
        assert 0.8 < u.length / synth.SAMPLE_RATE < 12
    assert sum(u.length for u in corpus.utterances) == len(corpus.samples)


@needs_espeak
def test_times_increase_and_lie_inside(corpus: Corpus) -> None:
    for u in corpus.utterances:
        times = [t for span in zip(u.starts_s, u.ends_s, strict=True) for t in span]
        assert times == sorted(times)
        assert len(times) == 2 * len(words_of(u))
        assert all(b - a > 0.02 for a, b in zip(u.starts_s, u.ends_s, strict=True))
        assert u.starts_s[0] == pytest.approx(synth.MARGIN_S, abs=1e-3)
        assert u.ends_s[-1] + synth.MARGIN_S == pytest.approx(u.length / 22050, abs=1e-3)
        assert list(u.phone_starts_s) == sorted(u.phone_starts_s)
        assert u.phone_starts_s[0] == 0
        assert u.phone_starts_s[-1] <= u.length / 22050
        for a, b in zip(u.starts_s, u.ends_s, strict=True):  # no word lost its phones
            inside = [p for p, t in zip(u.phones, u.phone_starts_s, strict=True) if a <= t < b]
            assert inside
            assert 0 not in inside


@needs_espeak
def test_sound_starts_and_stops_where_the_words_do(corpus: Corpus) -> None:
    offsets = []
    for u in corpus.utterances:
        loud = corpus.audio(u).abs() > 0.01
        first = int(loud.int().argmax()) / synth.SAMPLE_RATE
        last = (u.length - int(loud.flip(0).int().argmax())) / synth.SAMPLE_RATE
        offsets.append((first - u.starts_s[0], last - u.ends_s[-1]))
    start, end = np.abs(np.array(offsets)).mean(0)
    assert start < 0.06  # seconds; closures and weak onsets are silent at first
    assert end < 0.06


@needs_espeak
def test_prosody_does_what_it_says(corpus: Corpus) -> None:
    rows = []
    for u in corpus.utterances:
        wav = corpus.audio(u).numpy()
        for i, word in enumerate(words_of(u)):
            a, b = (round(t * synth.SAMPLE_RATE) for t in (u.starts_s[i], u.ends_s[i]))
            level = 20 * math.log10(np.sqrt(np.mean(wav[a:b] ** 2)))
            letters = len(word.strip("."))
            rows.append((math.log((b - a) / letters), math.log(u.rates[i]), level, u.volumes_db[i]))
    r = np.corrcoef(np.array(rows).T)
    assert r[0, 1] < -0.5
    assert r[2, 3] > 0.5


@needs_espeak
def test_phone_frames(corpus: Corpus) -> None:
    u = corpus.split("dev")[0]
    frames = synth.phone_frames(u, 25, 400)
    assert frames.shape == (400,)
    assert frames[0] == frames[399] == synth.PHONES.index(synth.SILENCE)
    fine = synth.phone_frames(u, 1000, 16000)
    ends = (*u.phone_starts_s[1:], 16.0)
    for start, end, phone in zip(u.phone_starts_s, ends, u.phones, strict=True):
        inside = fine[math.ceil(start * 1000) : math.floor(end * 1000)]
        assert (inside == phone).all()


@needs_espeak
def test_same_seed_same_bytes_in_another_process(
    corpus: Corpus, cache: Path, tmp_path: Path
) -> None:
    again = synth.load(**SIZES, seed=1, cache=tmp_path)
    assert np.array_equal(corpus.samples, again.samples)
    assert corpus.utterances == again.utterances
    assert [p.name for p in tmp_path.iterdir()] == [p.name for p in cache.iterdir()]  # no leftovers


@needs_espeak
def test_espeak_stays_in_its_own_process() -> None:
    """Asked of a fresh process: in this one, other tests may have loaded anything."""
    code = (
        "import sys, pathlib, synth; synth.speak([synth.Utterance('the dog sees a river.', 'm1')]);"
        "maps = pathlib.Path('/proc/self/maps'); assert 'espeakng_loader' not in sys.modules;"
        "assert not maps.exists() or 'espeak' not in maps.read_text()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(synth.__file__).parent, check=True)


@needs_espeak
def test_speak_changes_one_word_and_tells_voices_apart() -> None:
    text = "the dog sees a river."
    edited = Utterance(text, "m1", rates=(1, 0.5, 1, 1, 1))
    said = synth.speak([Utterance(text, "m1"), edited, Utterance(text, "f2")])
    plain, slow, other = said.utterances
    spans = [np.subtract(u.ends_s, u.starts_s) for u in (plain, slow)]
    assert spans[1][1] > 1.6 * spans[0][1]
    assert np.abs(spans[1] - spans[0])[[0, 2, 3, 4]].max() < 0.04
    low, high = (_pitch(said, u) for u in (plain, other))
    assert 80 < low < 110 < 170 < high < 220  # Hz


def _pitch(corpus: Corpus, u: Utterance) -> float:
    """Median over 'the dog sees' of the lag where the autocorrelation of 40 ms peaks, in Hz."""
    wav, lags = corpus.audio(u)[round(0.1 * 22050) : round(u.ends_s[2] * 22050)], slice(70, 320)
    frames = wav.unfold(0, 1024, 256)
    frames = frames[frames.square().mean(1) > 0.3 * frames.square().mean()]
    power = torch.fft.rfft(frames, 2048).abs().square()
    return float(22050 / (torch.fft.irfft(power)[:, lags].argmax(1) + 70).float().median())


# ---- failures


@needs_espeak
def test_damage_is_noticed(corpus: Corpus, cache: Path) -> None:
    audio = next(cache.iterdir()) / "audio.i16"
    whole = audio.read_bytes()
    audio.write_bytes(whole[:-2] + b"\x01\x02")
    with pytest.raises(ValueError, match="damaged: sha256"):
        synth.load(**SIZES, seed=1, cache=cache)
    audio.write_bytes(whole)
    meta = json.loads((audio.parent / "meta.json").read_text())
    assert meta["phones"] == list(synth.PHONES)


def test_missing_package_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install espeakng-loader"):
        synth.load(1, 1, 1, 1, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_items_are_refused() -> None:
    with pytest.raises(ValueError, match="letters a-z"):
        Utterance("Don't.")
    with pytest.raises(ValueError, match="voice 'whisper': choose from"):
        Utterance("she sings.", "whisper")
    with pytest.raises(ValueError, match="rates: 1 values for 2 words"):
        Utterance("she sings.", rates=(1.0,))


@needs_espeak
def test_merged_words_are_an_error_not_wrong_times() -> None:
    with pytest.raises(ValueError, match="lost or merged, as in 'he sits in the house"):
        synth.speak([Utterance("he sits in the house.")])


@needs_espeak
def test_unknown_split(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="no split 'valid'; wanted"):
        corpus.split("valid")


def test_prosody_is_in_standard_deviations_of_the_corpus() -> None:
    items = synth.load(n_train=300).utterances
    rows = torch.cat([item.prosody for item in items])
    assert rows.shape == (sum(len(item.text.split()) for item in items), 3)
    torch.testing.assert_close(rows.std(0), torch.ones(3), atol=0.05, rtol=0)
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=0.05, rtol=0)
    said = synth.Utterance("she sings.", rates=(1, 2), pitches=(1, 0.5), volumes_db=(0, -3))
    rate, pitch, volume = said.prosody.T
    assert rate[0] == pitch[0] == volume[0] == 0
    assert rate[1] > 0 > pitch[1]
    assert volume[1] < 0
