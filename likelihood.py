"""Does the spoken LM find the natural recording more likely than its twin? Chance is 50 %.

    pair of recordings --tokenizer--> words, codes --spoken LM--> log p(text), log p(codes)
      --sum or mean--> score of each; right: the first is higher, a tie counts half

    sum   log p(text) + log p(codes), in nats
    mean  log p(text) / tokens + log p(codes) / words: minus the mean CEs of text and codebooks

Built in, two sentences of the corpus: speaker, gender, rate and pitch change with the second one or
do not, and it is drawn which side is fast or high; sentence order: the halves of the second one
stand in order or not. Rows: the joint LM, its two parts, and the text LM that it started from.
SALMon: TASK/sample_<i>_*.wav, the first of each i by name is right. StoryCloze: *.wav in the order
of their numbers, right and wrong in turn.
[Maimon et al. 2024, arXiv:2409.07437; Hassid et al. 2023, arXiv:2305.13009; TASTE, 4.3]
"""

import random
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch

import audio
import synth
import text
from common import progress
from data import Item
from grammar import sentences
from metrics import Figures, mean_and_error
from pipeline import RATE, Pipeline, Speech

TASKS = ("speaker", "gender", "rate", "pitch", "sentence order")
SCORES = ("mean", "sum")
RATES, PITCHES = (0.7, 1.4), (0.75, 1.3)  # of a whole sentence
LONGEST = 6  # words of a sentence
FEMALE = synth.VOICES_TRAIN[synth.VOICES_TRAIN.index("f2") :]
MALE = synth.VOICES_TRAIN[: synth.VOICES_TRAIN.index("f2")]
TIE = 1e-6  # relative; the same text scored twice
Pair = tuple[Speech, Speech]  # right, wrong


# --- what is compared ----------------------------------------------------------------------------


def said(sentence: str, voice: str, rate: float = 1.0, pitch: float = 1.0) -> synth.Utterance:
    n = len(sentence.split())
    return synth.Utterance(sentence, voice, (rate,) * n, (pitch,) * n)


def exchanged(sentence: str) -> str:
    """'the dog sees a bird.' -> 'sees a bird the dog.'"""
    words = sentence.rstrip(".").split()
    half = len(words) // 2
    return " ".join([*words[half:], *words[:half]]) + "."


def plan(task: str, two: Sequence[str], rng: random.Random) -> list[synth.Utterance]:
    """-> the first sentence, the second as it fits, the second as it does not."""
    first, second = two
    group, other = rng.sample((MALE, FEMALE), 2)
    voice = rng.choice(group)
    if task in ("speaker", "gender"):
        others = [v for v in group if v != voice] if task == "speaker" else other
        return [said(first, voice), said(second, voice), said(second, rng.choice(others))]
    if task in ("rate", "pitch"):
        a, b = rng.sample(RATES if task == "rate" else PITCHES, 2)
        parts = ((first, a), (second, a), (second, b))
        return [said(s, voice, **{task: value}) for s, value in parts]
    return [said(first, voice), said(second, voice), said(exchanged(second), voice)]


def builtin_pairs(
    pipeline: Pipeline, items: Sequence[Item], task: str, count: int, seed: int = 0
) -> list[Pair]:
    """`count` pairs from the sentences of these items; the two sentences are encoded one by one,
    as in the training of the spoken LM."""
    rng = random.Random(f"{task}/{seed}")
    short = [s for item in items for s in sentences(item.text) if len(s.split()) <= LONGEST]
    if len({*short}) < 2:
        raise ValueError(f"{len({*short})} short sentences in {len(items)} utterances: too few")
    plans = [plan(task, rng.sample(short, 2), rng) for _ in range(count)]
    corpus = synth.speak([utterance for three in plans for utterance in three])
    encoded = []
    for u in progress(f"likelihood, {task}", corpus.utterances):
        wav = audio.resample(corpus.audio(u), synth.SAMPLE_RATE, RATE)
        encoded.append(pipeline.encode(wav, u.text))
    threes = (encoded[i : i + 3] for i in range(0, len(encoded), 3))
    return [(a.join(good), a.join(bad)) for a, good, bad in threes]


def salmon_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Files of one SALMon task, right and wrong."""
    files = [(re.match(r"[^_]+_(\d+)(_|$)", path.stem), path) for path in folder.glob("*.wav")]
    named = sorted((int(found[1]), path) for found, path in files if found)
    pairs = []
    for i, rows in groupby(named, key=lambda row: row[0]):
        two = [path for _, path in rows]
        if len(two) != 2:
            raise ValueError(f"{folder}: sample {i} has {len(two)} files, wanted two")
        pairs.append((two[0], two[1]))
    return pairs


def storycloze_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Files of a spoken StoryCloze, right and wrong."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(n or 0), name) for name, n in re.findall(r"(\D*)(\d*)", path.stem)]

    files = sorted(folder.glob("*.wav"), key=order)
    if len(files) % 2:
        raise ValueError(f"{folder}: {len(files)} files, wanted right and wrong ones in turn")
    return list(zip(files[::2], files[1::2], strict=True))


def folder_tasks(salmon: Path, storycloze: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Task -> pairs of files; Path() leaves one out. ValueError: a folder without pairs."""
    tasks: dict[str, list[tuple[Path, Path]]] = {}
    if salmon != Path():
        folders = sorted(path for path in salmon.glob("*") if path.is_dir())
        found = {f"SALMon {path.name}": salmon_pairs(path) for path in folders}
        tasks |= {name: pairs for name, pairs in found.items() if pairs}
        if not tasks:
            raise ValueError(f"{salmon}: no TASK/sample_0_*.wav; wanted SALMon as it is published")
    if storycloze != Path():
        tasks["StoryCloze"] = storycloze_pairs(storycloze)
        if not tasks["StoryCloze"]:
            raise ValueError(f"{storycloze}: no *.wav; wanted a spoken StoryCloze")
    return tasks


def read_pairs(pipeline: Pipeline, files: Iterable[tuple[Path, Path]]) -> list[Pair]:
    """Their words are transcribed by the pipeline's recognizer."""

    def read(path: Path) -> Speech:
        wav = audio.read(path, RATE)
        return pipeline.encode(wav, pipeline.transcribe(wav))

    return [(read(good), read(bad)) for good, bad in files]


# --- scores --------------------------------------------------------------------------------------


@torch.inference_mode()
def scores(pipeline: Pipeline, speech: Speech, how: str) -> dict[str, float]:
    """Log likelihoods of one recording: joint, its two parts, and that of the text LM."""
    row = text.align_words(speech.text, pipeline.lm_tokens, pipeline.lm_tokens)
    ids = torch.tensor([row.llm_ids], device=pipeline.device)
    word_ids = torch.tensor([row.llm_word_ids], device=pipeline.device)
    if speech.codes is None:
        raise ValueError("speech without codes has no joint likelihood")
    codes = speech.codes[None].to(pipeline.device)
    words, sounds = (float(x) for x in pipeline.lm.score(ids, word_ids, codes))
    logits = pipeline.lm.reference(ids)[0, :-1].float()  # (N, V)
    plain = float(logits.log_softmax(-1).gather(1, ids[0, :, None]).sum())
    if how == "mean":
        words, plain = words / ids.shape[1], plain / ids.shape[1]
        sounds /= codes.shape[1]
    return {"joint": words + sounds, "its codes": sounds, "its text": words, "text LM": plain}


def win(good: float, bad: float) -> float:
    """1 right, 0 wrong, 0.5 a tie."""
    if abs(good - bad) <= TIE * max(abs(good), abs(bad)):
        return 0.5
    return float(good > bad)


def accuracy(pipeline: Pipeline, pairs: Iterable[Pair], how: str) -> Figures:
    """Share of pairs whose right one is more likely, and its standard error, by who judges."""
    wins: dict[str, list[float]] = {}
    for pair in pairs:
        good, bad = (scores(pipeline, speech, how) for speech in pair)
        for name in good:
            wins.setdefault(name, []).append(win(good[name], bad[name]))
    return {f"{name}, accuracy": mean_and_error(row) for name, row in wins.items()}


def measure(
    pipeline: Pipeline, items: Sequence[Item], count: int, how: str, salmon: Path, storycloze: Path
) -> dict[str, Figures]:
    """A row per task: the built-in ones with `count` pairs each, then those of the folders."""
    files = folder_tasks(salmon, storycloze)  # a wrong folder is told before anything is spoken
    out: dict[str, Figures] = {}
    for task in TASKS:
        pairs = builtin_pairs(pipeline, items, task, count)
        out[f"{task}, {how}"] = accuracy(pipeline, pairs, how)
    for task, found in files.items():
        pairs = read_pairs(pipeline, progress(f"likelihood, {task}", found))
        out[f"{task}, {how}"] = accuracy(pipeline, pairs, how)
    return out
