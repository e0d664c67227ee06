"""How speech goes on: a unit LM, a cascade, and joint LMs with tokens or embeddings, side by side.

    recording --cut behind word 3--> prompt --system--> prompt and new words, spoken
      unit LM             S3 units -> more S3 units
      cascade             text -> text LM -> text-only unit decoder, in the voice of the prompt
      joint, tokens       words with FSQ codes -> spoken LM, a softmax over codes
      joint, embeddings   words with RVQ codes -> spoken LM, a Gaussian over their sum

Counted on what the bundle's recognizer hears: WER against what was meant, of all and of the new
words (a unit LM means none), and whether the whole is grammatical. Consistency: median F0, rate
(letters per second of sound) and volume of the new words against those of the prompt, as mean
absolute differences and as r over prompts. An utterance of the corpus has one voice and an offset
of each, around which its words scatter: the row "recording" is what a perfect system gets, and
"another recording", the rest of another prompt of the same voice, what one gets that does not
listen. OUT/continuation has all wavs, and judge.jsonl for a judge who reads.
[TASTE slides, "How to evaluate speech continuation?"; by GPT-4o, UTMOS and listeners there]
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import audio
import text
from common import progress
from continuation import STEPS_PER_WORD, Talk
from data import BOS, UNIT_S, Item
from grammar import is_grammatical
from llm import Llama, LlamaConfig, pick
from metrics import (
    EPS,
    Contours,
    Figures,
    Scores,
    basic_rules,
    contours,
    correlation,
    decibels,
    edit_distance,
)
from pipeline import RATE, SAMPLING, Pipeline, Speech, mels, transcribe
from tokenizer import Frontend, UnitFrontend
from unit_lm import load_unit_lm
from vocabulary import VocabularySets
from vocoder import load_vocoder
from weights import as_config, load_model, read_config, write_atomic
from whisper_dec import word_times

PROMPT_WORDS, NEW_WORDS = 3, 4
MOST_UNITS = 300  # that a unit LM may add
SOUNDING_DB = 40.0  # what is softer than the loudest frame by more is a pause
OFF = ("F0 off, semitones", "rate off, ln", "volume off, dB")
RECORDING, ANOTHER = "recording", "another recording"
HEAT = SAMPLING.temperature, SAMPLING.top_p  # of words, and of a unit LM's units


class Prompt(NamedTuple):
    """A recording of the corpus, cut behind its first words."""

    words: list[str]
    wav: Tensor  # (S,) at 16 kHz
    rest: list[str]  # what follows in the recording
    whole: Tensor  # (S',)
    voice: str


class Answer(NamedTuple):
    """Prompt and continuation, spoken. NaN: there is no such thing, or it was not found."""

    wav: Tensor  # (S,) at 16 kHz
    meant: list[str]  # all words, those of the prompt first; empty: there is no text
    start_s: float  # of the new words
    text_ended: float  # by itself
    speech_ended: float


Speaker = Callable[[Prompt, torch.Generator], Answer]


def cut_prompts(items: Sequence[Item], most: int) -> list[Prompt]:
    """Of utterances that go on behind PROMPT_WORDS words. ValueError: there are none."""
    found = []
    for item in items:
        words, wav = item.text.split(), item.wav(RATE)
        if len(words) > PROMPT_WORDS:
            end = round(item.truth.ends_s[PROMPT_WORDS - 1] * RATE)
            said, rest = words[:PROMPT_WORDS], words[PROMPT_WORDS:]
            found.append(Prompt(said, wav[:end], rest, wav, item.speaker))
    if not found:
        raise ValueError(f"{len(items)} utterances, none of more than {PROMPT_WORDS} words")
    return found[:most]


# --- who goes on ---------------------------------------------------------------------------------


def recorded(prompt: Prompt, rng: torch.Generator) -> Answer:
    """What was said in truth."""
    both, start_s = [*prompt.words, *prompt.rest], len(prompt.wav) / RATE
    return Answer(prompt.whole, both, start_s, math.nan, math.nan)


def unit_speaker(folder: Path, bundle: Path, device: str) -> Speaker:
    """folder: of train_unit_lm.py"""
    model, vocoder = load_unit_lm(folder).to(device), load_vocoder(bundle).to(device)
    frontend = UnitFrontend(bundle).to(device)

    def speak(prompt: Prompt, rng: torch.Generator) -> Answer:
        found = frontend.features(prompt.wav)
        old = found["units"].long()
        new, ended = model.generate(old, MOST_UNITS, *HEAT, rng)
        wav = to_16k(vocoder(torch.cat([old, new]), found["voice"][0], rng).cpu())
        start_s = len(wav) / RATE * len(old) / (len(old) + len(new))
        return Answer(wav, [], start_s, math.nan, float(ended))

    return speak


def cascade_speaker(folder: Path, bundle: Path, device: str) -> Speaker:
    """folder: of train_tokenizer.py --text-only"""
    pipeline, lm = Pipeline(bundle, folder, device=device), bundle / "lm"
    llm = load_model(Llama(as_config(LlamaConfig, read_config(lm), str(lm))), lm).to(device)
    tokens = text.load_tokenizer(lm / "tokenizer.model")
    sets = VocabularySets.of(tokens, llm.config.vocab)

    def speak(prompt: Prompt, rng: torch.Generator) -> Answer:
        ids = text.align_words(" ".join(prompt.words), tokens, tokens).llm_ids
        words, glue, ended = text_reply(llm, sets, ids, rng)
        voice = pipeline.voice(prompt.wav)
        both = Speech(prompt.words, None, voice).join(Speech(words, None, voice, glue))
        return spoken(pipeline, both, ended, rng)

    return speak


@torch.inference_mode()
def text_reply(
    llm: Llama, sets: VocabularySets, ids: Sequence[int], rng: torch.Generator
) -> tuple[list[str], str, bool]:
    """Text alone, by the rules of Pipeline.reply -> new words, what ends the last word of ids (a
    full stop, or nothing), and whether they came to an end by themselves."""
    device, most = llm.embed.weight.device, 3 * NEW_WORDS * STEPS_PER_WORD
    row, caches = torch.tensor([[BOS, *ids]], device=device), llm.new_caches(1 + len(ids) + most)
    talk, never = Talk([], 1, NEW_WORDS, most, goes_on=True), sets.never(None).to(device)
    while not talk.waiting:
        logits = llm.logits(llm(row, caches=caches)[:, -1]).float()  # (1, V)
        row = pick(logits.masked_fill(never[talk.rule], -torch.inf), *HEAT, rng)[None]  # (1, 1)
        talk.push(int(row), sets)
    words = [talk.word(w, sets.tokenizer) for w in range(talk.words)]
    return words, talk.word(-1, sets.tokenizer), talk.ended


def joint_speaker(folder: Path, tokenizer: Path, bundle: Path, device: str) -> Speaker:
    """folder: of train_lm.py"""
    pipeline = Pipeline(bundle, tokenizer, folder, device)

    def speak(prompt: Prompt, rng: torch.Generator) -> Answer:
        said = pipeline.encode(prompt.wav, " ".join(prompt.words))
        new, ended = pipeline.reply(said, NEW_WORDS, SAMPLING, said.voice, rng)
        return spoken(pipeline, said.join(new), ended, rng)

    return speak


def spoken(pipeline: Pipeline, both: Speech, ended: bool, rng: torch.Generator) -> Answer:
    """both: the words of the prompt and the new ones."""
    wav, stopped = pipeline.speak(both, rng)
    wav = to_16k(wav)
    start_s = word_start(pipeline.frontend, wav, both.words, PROMPT_WORDS)
    return Answer(wav, both.words, start_s, float(ended), float(stopped))


def to_16k(wav: Tensor) -> Tensor:
    return audio.resample(wav, audio.VOCODER_RATE, RATE)


@torch.inference_mode()
def word_start(frontend: Frontend, wav: Tensor, words: list[str], n: int) -> float:
    """wav (S,) in which these words are said -> when words[n] begins, in s, by the two heads of the
    tiny recognizer that were taught to look at the word. NaN: fewer frames than tokens."""
    row = text.align_words(" ".join(words), frontend.tokens, frontend.tokens)
    last, _, keep = frontend.hear(*mels(frontend, [wav]), ())
    ids = torch.tensor([[*frontend.prefix, *row.asr_ids]], device=last.device)  # (1, N)
    if last.shape[1] < ids.shape[1]:
        return math.nan
    _, maps = frontend.decoder(ids, last, keep=keep, need_weights=True)  # (1, L, H, N, T)
    word_ids = [*[-1] * (len(frontend.prefix) - 1), *row.asr_word_ids, -1]  # of the next token
    return float(word_times(maps[0, -1, :2], word_ids, UNIT_S)[n, 0])


def systems(
    bundle: Path, unit_lm: Path, cascade: Path, embeddings: Path, device: str
) -> dict[str, Speaker]:
    """Those whose folders are there; the others are named, not silently left out."""
    makers: dict[str, tuple[Path, Callable[[Path], Speaker]]] = {
        "unit LM": (unit_lm, lambda path: unit_speaker(path, bundle, device)),
        "cascade": (cascade, lambda path: cascade_speaker(path, bundle, device)),
        "joint, tokens": (
            bundle / "spoken_lm",
            lambda path: joint_speaker(path, bundle / "tokenizer", bundle, device),
        ),
        "joint, embeddings": (
            embeddings,
            lambda path: joint_speaker(path, bundle / "tokenizer_rvq", bundle, device),
        ),
    }
    for name, (folder, _) in makers.items():
        if not folder.is_dir():
            print(f"{name}: no folder {folder}, left out")
    return {name: make(path) for name, (path, make) in makers.items() if path.is_dir()}


# --- what is heard of it -------------------------------------------------------------------------


def split_heard(prompt: Sequence[str], new: Sequence[str], heard: Sequence[str]) -> int:
    """How many of the words heard belong to the prompt: the split with the fewest edits of both
    parts, or of the prompt alone if nobody knows what else was meant (no new words)."""

    def edits(k: int) -> tuple[int, int]:
        rest = edit_distance(new, heard[k:]) if new else 0
        return edit_distance(prompt, heard[:k]) + rest, abs(k - len(prompt))

    return min(range(len(heard) + 1), key=edits)


def manner(sound: Contours, words: Iterable[str]) -> Tensor:
    """How these words are said -> (3,) F0 in semitones, ln of letters per second, dB; NaN where
    undefined."""
    letters, level = len("".join(words)), decibels(sound.rms)
    loud = sound.rms > EPS
    loud = loud & (level > level[loud].max() - SOUNDING_DB) if loud.any() else loud
    voiced, seconds = sound.f0[sound.f0 > 0], float(loud.sum()) / 100
    tone = 12 * math.log2(float(voiced.median()) / 55) if len(voiced) else math.nan
    rate = math.log(letters / seconds) if letters and seconds else math.nan
    volume = float(decibels(sound.rms[loud].square().mean().sqrt()))
    return torch.tensor([tone, rate, volume], dtype=torch.double)


def consistency(old: Tensor, new: Sequence[Tensor]) -> Figures:
    """Manners of the prompts (n, 3) and, for each seed, of what follows (n, 3)."""
    scores, found = Scores(), Figures()
    for again in new:
        for i, off in enumerate((again - old).abs().tolist()):
            for name, value in zip(OFF, off, strict=True):
                scores.add(name, i, value)
    for k, name in enumerate(("F0", "rate", "volume")):
        x, y = old[:, k].repeat(len(new)), torch.cat([*new])[:, k]
        both = x.isfinite() & y.isfinite()
        r = correlation(x[both], y[both])
        found[f"r of {name}"] = r, (1 - r * r) / max(1, len(old) - 1) ** 0.5
    return scores.figures() | found


def score(
    scores: Scores, i: int, prompt: Prompt, answer: Answer, heard: str, tracker: str
) -> tuple[Tensor, dict[str, Any]]:
    """Add what is known of answer i -> manner (3,) of its new words, its part of judge.jsonl."""
    meant, plain, old = (
        [basic_rules(word) for word in words]
        for words in (answer.meant, heard.split(), prompt.words)
    )
    new = meant[len(old) :]
    at = split_heard(old, new, plain)
    scores.add("new words heard", i, len(plain) - at)
    scores.add("grammatical, heard", i, is_grammatical(heard))
    if meant:
        scores.add("grammatical, meant", i, is_grammatical(" ".join(answer.meant)))
        scores.add("WER", i, edit_distance(meant, plain), len(meant))
        scores.add("WER of the new words", i, edit_distance(new, plain[at:]), len(new))
    for name, ended in (("text ended", answer.text_ended), ("speech ended", answer.speech_ended)):
        if not math.isnan(ended):
            scores.add(name, i, ended)
    start = len(answer.wav) if math.isnan(answer.start_s) else round(answer.start_s * RATE)
    return manner(contours(answer.wav[start:], tracker), new or plain[at:]), {
        "prompt": " ".join(prompt.words),
        "meant": " ".join(answer.meant[len(old) :]) or None,
        "heard": " ".join(heard.split()[at:]),
    }


def another(prompts: Sequence[Prompt], manners: Tensor) -> Tensor:
    """manners (n, 3) -> of each prompt those of the next of its voice; NaN if there is none."""
    out = torch.full_like(manners, math.nan)
    for i, prompt in enumerate(prompts):
        same = [j for j, other in enumerate(prompts) if other.voice == prompt.voice]
        j = same[(same.index(i) + 1) % len(same)]
        if j != i:
            out[i] = manners[j]
    return out


def measure(
    found: dict[str, Speaker], prompts: Sequence[Prompt], frontend: Frontend,
    rngs: Callable[[], Iterable[torch.Generator]], tracker: str, out: Path,
) -> dict[str, Figures]:  # fmt: skip
    """A row for the recordings, for other recordings, and for each system. rngs: one per seed."""
    out.mkdir(parents=True, exist_ok=True)
    old = torch.stack([manner(contours(p.wav, tracker), p.words) for p in prompts])  # (n, 3)
    for i, prompt in enumerate(prompts):
        audio.write(out / f"prompt_{i:03d}.wav", prompt.wav, RATE)
    rows, lines = dict[str, Figures](), list[str]()
    for name, speak in {RECORDING: recorded, **found}.items():
        scores, new, slug = Scores(), list[Tensor](), re.sub(r"\W+", "_", name)
        for seed, rng in enumerate(rngs()):
            said, manners = list[Answer](), list[Tensor]()
            for i, prompt in enumerate(progress(f"continuation, {name}", prompts)):
                start = time.monotonic()
                said.append(speak(prompt, rng))
                if speak is not recorded:
                    spent = time.monotonic() - start
                    scores.add("x real time", i, spent, len(said[-1].wav) / RATE)
            for i, heard in enumerate(transcribe(frontend, [answer.wav for answer in said])):
                values, line = score(scores, i, prompts[i], said[i], heard, tracker)
                manners.append(values)
                wav = f"{slug}_{seed}_{i:03d}.wav"
                audio.write(out / wav, said[i].wav, RATE)
                files = {"prompt_wav": f"prompt_{i:03d}.wav", "wav": wav}
                lines.append(json.dumps({"system": name, "seed": seed, **line, **files}) + "\n")
            new.append(torch.stack(manners))
        rows[name] = scores.figures() | consistency(old, new)
        if name == RECORDING:
            rows[ANOTHER] = consistency(old, [another(prompts, new[0])])
    write_atomic(out / "judge.jsonl", "".join(lines).encode())
    return rows
