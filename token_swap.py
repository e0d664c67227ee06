"""Token swap: the same words said in two ways, and the codes of some words exchanged.

    A, B: Speech of the same words --swap--> A with B's codes in words FIRST .. LAST, and B with A's
    sentences, two prosodies each --espeak-ng--> A, B, truth --tokenizer, unit decoder, vocoder-->
      change of every word (duration, F0, energy): of A with one word of B, less that of A

The effect is measured on held-out sentences. In A every word is drawn fast or slow, high or low,
loud or soft; in B it is the opposite. Times of words come from a DTW over MFCCs onto the recording
of A, whose times are known. The row "espeak-ng" is the speech that the swap should give, spoken by
espeak-ng itself and timed in the same way: what this measuring can see at best.
[TASTE slides: "word-level editing by swapping tokens"; the figures are ours]
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import audio
import synth
from common import progress
from data import Item
from metrics import (
    Contours,
    Figures,
    carry_times,
    contours,
    correlation,
    decibels,
    dtw,
    mean_and_error,
    plain_words,
    ratio_and_error,
)
from pipeline import RATE, Pipeline, Speech

SPREAD = {"rates": (0.2, 0.45), "pitches": (0.15, 0.35)}  # |log factor| of a word, from .. to
LOUDER = (2.0, 5.0)  # dB
PROPERTIES = ("duration, s", "F0, semitones", "energy, dB")
MIN_VOICED = 3  # frames of a word that give it an F0
BATCH = 25  # utterances that are spoken at once


def swap(a: Speech, b: Speech, first: int, last: int) -> Speech:
    """a with the codes of b in words first .. last, counted from 1, both included.

    ValueError: not the same words, no codes, or no such words."""
    ours, theirs = (plain_words(" ".join(x.words)) for x in (a, b))
    if ours != theirs or len(a.words) != len(b.words):
        raise ValueError(f"a swap needs the same words, these are {a.text!r} and {b.text!r}; "
                         "if both say the same, give it with --text")  # fmt: skip
    if a.codes is None or b.codes is None:
        raise ValueError("a swap needs codes, and this speech is text only")
    if not 1 <= first <= last <= len(a.words):
        raise ValueError(f"words {first}:{last} of {len(a.words)}: wanted FIRST:LAST, from 1")
    codes = a.codes.clone()
    codes[first - 1 : last] = b.codes[first - 1 : last]
    return replace(a, codes=codes)


def mixtures(a: Speech, b: Speech, first: int, last: int) -> dict[str, Speech]:
    """The four: each as it is, and each with the other's codes in words first .. last."""
    return {
        "a": a,
        "a_with_b": swap(a, b, first, last),
        "b": b,
        "b_with_a": swap(b, a, first, last),
    }


# --- sentences with known prosody ----------------------------------------------------------------


class Trial(NamedTuple):
    """One swap: word `word` of recording a gets the prosody of b; `truth` is said that way."""

    word: int  # from 0
    a: synth.Utterance
    b: synth.Utterance
    wav_a: Tensor  # (S,) at 16 kHz
    wav_b: Tensor
    wav_truth: Tensor


def contrast(text: str, voice: str, rng: random.Random) -> tuple[synth.Utterance, synth.Utterance]:
    """Two ways to say it, each word in opposite ones."""

    def draw(low: float, high: float) -> list[float]:
        return [rng.choice((-1, 1)) * rng.uniform(low, high) for _ in text.split()]

    logs = {name: draw(*spread) for name, spread in SPREAD.items()}
    db = draw(*LOUDER)
    pair = []
    for sign in (1, -1):
        factors: dict[str, Any] = {
            k: tuple(math.exp(sign * x) for x in row) for k, row in logs.items()
        }
        volumes = tuple(sign * x for x in db)
        pair.append(synth.Utterance(text, voice, **factors, volumes_db=volumes))
    return pair[0], pair[1]


def trials(items: Sequence[Item], count: int, seed: int = 0) -> list[Trial]:
    """`count` swaps on sentences of these items, in turn, one word each.

    Texts of two sentences are left out: what is spoken in two pieces is no single swap."""
    rng, plans = random.Random(f"swap/{seed}"), list[tuple[int, tuple[synth.Utterance, ...]]]()
    single = [item for item in items if item.text.count(".") == 1]
    if not single:
        raise ValueError(f"no single sentence among {len(items)} utterances; raise --items")
    spare = count // 10 + 2  # espeak merges words in 1 % of the utterances
    for i in range(count + spare):
        item = single[i % len(single)]
        a, b = contrast(item.text, item.truth.voice, rng)
        word = rng.randrange(len(item.text.split()))
        mixed: dict[str, Any] = {}
        for name in (*SPREAD, "volumes_db"):
            values = list(getattr(a, name))
            values[word] = getattr(b, name)[word]
            mixed[name] = tuple(values)
        truth = replace(a, **mixed)
        plans.append((word, (a, b, truth)))
    wanted = [utterance for _, three in plans for utterance in three]
    corpus = synth.speak(wanted, spare=3 * spare)
    said, out = {manner(u): u for u in corpus.utterances}, list[Trial]()
    for word, three in plans:
        found = [said[manner(u)] for u in three if manner(u) in said]
        if len(found) == 3:
            wavs = (audio.resample(corpus.audio(u), synth.SAMPLE_RATE, RATE) for u in found)
            out.append(Trial(word, found[0], found[1], *wavs))
    return out[:count]


def manner(u: synth.Utterance) -> tuple[Any, ...]:
    """What is said and how."""
    return u.text, u.voice, u.rates, u.pitches, u.volumes_db


# --- what a word sounds like ---------------------------------------------------------------------


def word_values(sound: Contours, times: Tensor) -> Tensor:
    """times (W, 2) in s -> PROPERTIES of each word (W, 3); NaN where undefined."""
    rows = []
    for start, end in times.tolist():
        part = slice(round(100 * start), max(round(100 * end), round(100 * start) + 1))
        f0, rms = sound.f0[part], sound.rms[part]
        voiced = f0[f0 > 0]
        tone = (
            12 * math.log2(float(voiced.median()) / 55) if len(voiced) >= MIN_VOICED else math.nan
        )
        level = float(decibels(rms.square().mean().sqrt())) if len(rms) else math.nan
        rows.append((end - start, tone, level))
    return torch.tensor(rows, dtype=torch.double)


def known_values(utterance: synth.Utterance, sound: Contours) -> Tensor:
    return word_values(sound, torch.tensor([utterance.starts_s, utterance.ends_s]).T)


def found_values(utterance: synth.Utterance, template: Contours, sound: Contours) -> Tensor:
    """Of speech whose word times are not known: those of the template, carried over by DTW."""
    path = dtw(template.mfcc, sound.mfcc)
    return word_values(sound, carry_times(path, utterance.starts_s, utterance.ends_s))


def effect(
    tests: Sequence[Trial], before: Sequence[Tensor], after: Sequence[Tensor]
) -> dict[str, Figures]:
    """PROPERTIES of every word (W, 3), before and after the swap -> for each of them: correlation
    with the true change, share with its sign, and how far the other words moved."""
    true, got, others = list[Tensor](), list[Tensor](), list[Tensor]()
    for test, old, new in zip(tests, before, after, strict=True):
        change = new - old  # (W, 3)
        sounds = (contours(wav) for wav in (test.wav_a, test.wav_b))
        a, b = (known_values(u, s) for u, s in zip((test.a, test.b), sounds, strict=True))
        true.append((b - a)[test.word])
        got.append(change[test.word])
        rest = torch.cat([change[: test.word], change[test.word + 1 :]]).abs()
        others.append(rest.nanmean(0))
    t, g, o = (torch.stack(rows) for rows in (true, got, others))  # (n, 3) each
    out: dict[str, Figures] = {}
    for k, name in enumerate(PROPERTIES):
        ok = t[:, k].isfinite() & g[:, k].isfinite() & o[:, k].isfinite()
        x, y, z = (v[ok, k] for v in (t, g, o))
        r = correlation(x, y)
        slope = float(x @ y / (x @ x)) if len(x) else math.nan
        out[name] = {
            "swaps": (len(x), math.nan),
            "r with truth": (r, (1 - r * r) / max(1, len(x) - 1) ** 0.5),
            "right sign": mean_and_error((x * y > 0).double().tolist()),
            "slope": (slope, math.nan),
            "swapped word": mean_and_error(y.abs().tolist()),
            "other words": mean_and_error(z.tolist()),
            "others / swapped": ratio_and_error(z.tolist(), y.abs().tolist()),
        }
    return out


def speak_twice(
    pipeline: Pipeline, pairs: Sequence[tuple[Speech, Speech]], seed: int
) -> tuple[list[Tensor], list[Tensor], list[bool]]:
    """Both of each pair with the same random numbers -> wavs (S,) at 16 kHz, and whether both came
    to an end: only the codes differ."""
    wavs: tuple[list[Tensor], list[Tensor]] = ([], [])
    stops: tuple[list[bool], list[bool]] = ([], [])
    for first in progress("swaps, spoken in batches", range(0, len(pairs), BATCH)):
        for which in (0, 1):
            torch.manual_seed(seed + first)  # of HiFT's phases
            rng = torch.Generator(pipeline.device).manual_seed(seed + first)
            batch = [pair[which] for pair in pairs[first : first + BATCH]]
            for wav, ended in pipeline.speak_all(batch, rng):
                wavs[which].append(audio.resample(wav, audio.VOCODER_RATE, RATE))
                stops[which].append(ended)
    return *wavs, [one and two for one, two in zip(*stops, strict=True)]


def timed(tests: Sequence[Trial], wavs: Sequence[Tensor]) -> list[Tensor]:
    """Speech of each trial's words (S,) at 16 kHz -> (W, 3) each."""
    return [
        found_values(test.a, contours(test.wav_a), contours(wav))
        for test, wav in zip(tests, wavs, strict=True)
    ]


def espeak_effect(tests: Sequence[Trial]) -> dict[str, Figures]:
    """What the measuring sees of swaps that espeak-ng spoke."""
    return effect(
        tests,
        timed(tests, [test.wav_a for test in tests]),
        timed(tests, [test.wav_truth for test in tests]),
    )


def system_effect(pipeline: Pipeline, tests: Sequence[Trial], seed: int) -> dict[str, Figures]:
    pairs = []
    for test in progress("swaps, codes", tests):
        a, b = (pipeline.encode(wav, test.a.text) for wav in (test.wav_a, test.wav_b))
        pairs.append((a, swap(a, b, test.word + 1, test.word + 1)))
    before, after, ended = speak_twice(pipeline, pairs, seed)
    found = effect(tests, timed(tests, before), timed(tests, after))
    share = mean_and_error([float(x) for x in ended])
    return {name: row | {"both ended": share} for name, row in found.items()}


def matrix(pipeline: Pipeline, trial: Trial, seed: int = 0) -> tuple[Tensor, Tensor]:
    """-> (W, W) change of each word's duration, in s (columns), if one word's codes (rows) are
    those of b; and the true change of each word (W,)."""
    a, b = (pipeline.encode(wav, trial.a.text) for wav in (trial.wav_a, trial.wav_b))
    words = range(1, len(a.words) + 1)
    before, after, _ = speak_twice(pipeline, [(a, swap(a, b, w, w)) for w in words], seed)
    tests = [trial] * len(a.words)
    old, new = (torch.stack(timed(tests, wavs))[..., 0] for wavs in (before, after))
    starts, ends = (
        torch.tensor([getattr(u, name) for u in (trial.a, trial.b)])
        for name in ("starts_s", "ends_s")
    )
    spent = ends - starts  # (2, W)
    return new - old, spent[1] - spent[0]
