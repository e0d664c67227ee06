"""The built-in corpus: real synthesized speech with known words, times, phones and prosody.

    grammar.py --texts()--> text --plan()--> Utterance: voice; rate, pitch, volume of each word
    Utterance --ssml()--> espeak-ng, in a process of its own --> wav (S,) at 22.05 kHz + events
    events --> start and end of each word, start of each phone

Prosody of each word is drawn at random and stored: claims about duration, pitch and energy can
be checked against what was asked for.
espeak-ng is GPL-3: only `python synth.py --speak DIR`, a child process, loads it.
[espeak-ng 1.52: speak_lib.h; SSML 1.1, section 3.2.4]
"""

import ctypes
import hashlib
import importlib.util
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import run
from grammar import WORDS, sentences, texts

VERSION = 1  # of the corpus, in its folder name: raise it when the same sizes sound different
SAMPLE_RATE = 22_050  # Hz, what espeak-ng speaks at
MARGIN_S = 0.1  # silence before the first and after the last word
LEVEL = 45  # espeak's volume for 0 dB; leaves room for the loudest words
RATE_RANGE, PITCH_RANGE = (0.5, 2.0), (0.62, 1.6)  # factors that espeak honours
PITCH_SLOPE = 204.0  # percent of espeak's pitch scale per unit of log F0, measured
CACHE = Path(__file__).parent / ".cache" / "synth"
SILENCE = "_"
VOICES_TRAIN, VOICES_HELD_OUT, PHONES = (
    tuple(names.split())
    for names in (
        "Alex Mike m1 m4 m7 m8 Reed Lee Denis boris michel Diogo "  # en-us, median F0 82..116 Hz
        "f2 f3 f4 f5 belinda grandma shelby Annie Alicia steph Nguyen Marco",  # 133..254 Hz
        "m2 adam f1 linda",
        "_ 0 3 3: @ @2 @L A: A@ D E I I# I2 N O2 O: O@ OI S T U U@ V Z a a# aI aI3 aI@ aU aa b d "
        "dZ e@ eI f g h i i: i@3 j k l m n o@ oU p r r- s t t# t2 tS u: v w z",  # as espeak writes
    )
)


@dataclass(frozen=True)
class Utterance:
    """What is said and how, one value a word (() is neutral); speaking fills in the second half."""

    text: str  # lower-case words and their stops: 'she sings. they run.'
    voice: str = VOICES_TRAIN[0]
    rates: tuple[float, ...] = ()  # factor on the speed
    pitches: tuple[float, ...] = ()  # factor on F0
    volumes_db: tuple[float, ...] = ()
    split: str = ""
    starts_s: tuple[float, ...] = ()  # of each word in text.split(), from the start of the audio
    ends_s: tuple[float, ...] = ()  # pauses belong to no word
    phones: tuple[int, ...] = ()  # index into PHONES; pauses are SILENCE
    phone_starts_s: tuple[float, ...] = ()
    offset: int = 0  # samples
    length: int = 0  # samples

    def __post_init__(self) -> None:
        words = self.text.split()
        if not re.fullmatch(r"([a-z]+[.,?]? )*[a-z]+[.?]", self.text):
            raise ValueError(f"text {self.text!r}: wanted words of letters a-z, as in 'she sings.'")
        if self.voice not in VOICES_TRAIN + VOICES_HELD_OUT:
            raise ValueError(f"voice {self.voice!r}: choose from VOICES_TRAIN, VOICES_HELD_OUT")
        for name, neutral in ("rates", 1.0), ("pitches", 1.0), ("volumes_db", 0.0):
            values = tuple(getattr(self, name)) or (neutral,) * len(words)
            if len(values) != len(words):
                raise ValueError(f"{name}: {len(values)} values for {len(words)} words")
            object.__setattr__(self, name, values)

    @property
    def prosody(self) -> Tensor:
        """(W, 3) how fast, high and loud each word is said: logarithms and dB, by their standard
        deviation in the corpus, see _item."""
        rate, pitch = torch.tensor([self.rates, self.pitches]).log()
        return torch.stack([rate / 0.33, pitch / 0.22, torch.tensor(self.volumes_db) / 3.9], 1)


class Corpus:
    """Spoken utterances; the audio stays on disk until it is asked for."""

    def __init__(self, utterances: list[Utterance], samples: np.ndarray) -> None:
        self.utterances, self.samples = utterances, samples  # int16, all utterances in one row

    def split(self, name: str) -> list[Utterance]:
        """train, dev, test (held-out sentences) or test_voices (held-out sentences and voices)."""
        found = [u for u in self.utterances if u.split == name]
        if not found:
            raise ValueError(
                f"no split {name!r}; wanted {sorted({u.split for u in self.utterances})}"
            )
        return found

    def audio(self, utterance: Utterance) -> Tensor:
        """-> (S,) float32 in [-1, 1) at SAMPLE_RATE."""
        part = self.samples[utterance.offset : utterance.offset + utterance.length]
        return torch.from_numpy(part.astype(np.float32)) / 32768

    def held_out(self) -> set[str]:
        """Every sentence of every split but train: what no training text may contain."""
        return {s for u in self.utterances if u.split != "train" for s in sentences(u.text)}


def phone_frames(utterance: Utterance, rate: float, frames: int) -> Tensor:
    """The phone in the middle of each frame: (frames,) int64, `rate` in Hz."""
    middles = (torch.arange(frames) + 0.5) / rate
    at = torch.searchsorted(torch.tensor(utterance.phone_starts_s), middles, right=True) - 1
    return torch.tensor(utterance.phones)[at]


def load(
    n_train: int = 8000,
    n_dev: int = 200,
    n_test: int = 200,
    n_test_voices: int = 200,
    seed: int = 0,
    cache: Path | str | None = None,
) -> Corpus:
    """The corpus from disk (default: CACHE); spoken first if it is not there: 6 h in a minute.

    Raises ValueError if espeakng-loader is missing, or the files are not what was written."""
    sizes = {"train": n_train, "dev": n_dev, "test": n_test, "test_voices": n_test_voices}
    folder = Path(cache or CACHE) / "_".join(map(str, (f"v{VERSION}", *sizes.values(), seed)))
    if not folder.exists():
        print(f"speaking {sum(sizes.values())} utterances into {folder}", flush=True)
        _make(plan(sizes, seed), sizes, folder)
    wanted, found = json.loads((folder / "meta.json").read_text())["sha256"], _sha256(folder)
    if wanted != found:
        raise ValueError(f"{folder} is damaged: sha256 {found}, wanted {wanted}; delete it")
    return _open(folder)


def speak(items: Sequence[Utterance], spare: int = 0) -> Corpus:
    """Say a few items now, in order, each one utterance. Same items, same samples.

    `spare` of them are left out: those whose words espeak merges, and the last ones. ValueError: it
    merges words in more of them."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "spoken"
        _make([replace(item, split="") for item in items], {"": len(items) - spare}, folder)
        corpus = _open(folder)
        return Corpus(corpus.utterances, np.array(corpus.samples))  # the file goes away


def plan(sizes: Mapping[str, int], seed: int) -> list[Utterance]:
    """What each split says; 5 % to spare, because espeak loses a word in 1 % of the sentences."""
    items: list[Utterance] = []
    held: set[str] = set()  # train comes last and avoids the sentences of the others
    for split in sorted(sizes, key=lambda name: name == "train"):
        rng, n = random.Random(f"{seed}/{split}"), sizes[split] + sizes[split] // 20 + 5
        lines = texts(n, f"{seed}/{split}", held if split == "train" else ())
        held.update(s for line in lines for s in sentences(line))
        voices = VOICES_HELD_OUT if split == "test_voices" else VOICES_TRAIN
        items += [_item(line, rng.choice(voices), split, rng) for line in lines]
    return items


def _item(text: str, voice: str, split: str, rng: random.Random) -> Utterance:
    """Draw the prosody, an offset for all words and one for each, in log rate, log F0 and dB."""

    def draw(offset: float, spread: float, low: float, high: float) -> tuple[float, ...]:
        values = (offset + rng.uniform(-spread, spread) for _ in text.split())
        return tuple(round(min(max(v, low), high), 4) for v in values)

    rates = draw(rng.gauss(0, 0.2), 0.45, *map(math.log, RATE_RANGE))
    pitches = draw(rng.gauss(0, 0.1), 0.35, *map(math.log, PITCH_RANGE))
    volumes = draw(rng.uniform(-3, 3), 6, -9, 9)
    rates, pitches = (tuple(round(math.exp(v), 4) for v in logs) for logs in (rates, pitches))
    return Utterance(text, voice, rates, pitches, volumes, split)


def _make(items: list[Utterance], wanted: Mapping[str, int], folder: Path) -> None:
    """Let a child process speak; the folder appears under its name only when it is complete."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ValueError("the built-in corpus needs espeak-ng: pip install espeakng-loader")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new") as parent:
        new = Path(parent) / "corpus"
        new.mkdir()
        request = {"wanted": wanted, "items": [asdict(item) for item in items]}
        (new / "request.json").write_text(json.dumps(request))
        child = [sys.executable, str(Path(__file__).resolve()), "--speak", str(new)]
        done = subprocess.run(child, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(f"espeak-ng failed: {done.stderr.strip()}")
        (new / "request.json").unlink()
        meta = {"version": VERSION, "wanted": wanted, "phones": PHONES, "sha256": _sha256(new)}
        (new / "meta.json").write_text(json.dumps(meta))
        if not folder.exists():  # another process may have been faster; it wrote the same bytes
            new.rename(folder)


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256((folder / "utterances.jsonl").read_bytes())
    with open(folder / "audio.i16", "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _open(folder: Path) -> Corpus:
    rows: list[dict[str, Any]] = []
    for line in (folder / "utterances.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    return Corpus([Utterance(**row) for row in rows], np.memmap(folder / "audio.i16", "<i2", "r"))


# What follows runs in the child process only.


class _Event(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("kind", "id", "place", "length", "ms", "sample")),
        ("user", ctypes.c_void_p),
        ("phone", ctypes.c_char * 8),
    )


WORD, PHONE = 1, 7  # kinds of event that matter here; a list of events ends with kind 0
SINK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Espeak:
    """espeak-ng through ctypes. Its state drifts from call to call: same bytes need same order."""

    def __init__(self) -> None:
        loader = importlib.import_module("espeakng_loader")
        self.lib = ctypes.CDLL(loader.get_library_path())
        # mode 2: samples go to the callback; 2000 ms of buffer: with 0 the queue of events runs
        # over and words vanish; options: phone events; return an error instead of exit()
        rate = self.lib.espeak_Initialize(2, 2000, str(loader.get_data_path()).encode(), 1 | 0x8000)
        if rate != SAMPLE_RATE:
            raise ValueError(f"espeak_Initialize returned {rate}, wanted {SAMPLE_RATE} Hz")
        self.sink = SINK(self._collect)  # kept: espeak holds no reference
        self.lib.espeak_SetSynthCallback(self.sink)
        self.lib.espeak_SetParameter(2, LEVEL, 0)
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(0))  # of breath noise
        self.samples: list[np.ndarray] = []
        self.events: list[tuple[int, int, str]] = []

    def _collect(self, wav: Any, count: int, events: Any) -> int:
        if wav and count:
            self.samples.append(np.ctypeslib.as_array(wav, (count,)).copy())
        i = 0
        while events[i].kind:
            event, i = events[i], i + 1
            if event.kind in (WORD, PHONE):
                self.events.append((event.kind, event.sample, event.phone.decode()))
        return 0

    def speak(self, item: Utterance) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
        """-> samples (S,) int16, and events (kind, sample, phone) in order of time."""
        self.samples, self.events = [], []
        if self.lib.espeak_SetVoiceByName(f"en-us+{item.voice}".encode()):
            raise ValueError(f"espeak-ng has no voice en-us+{item.voice}")  # it keeps the last one
        data = ssml(item).encode()  # flags: UTF-8 | SSML | pause at the end
        if self.lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1 | 0x10 | 0x1000, None, None):
            raise ValueError(f"espeak-ng cannot speak {item.text!r}")
        return np.concatenate(self.samples), self.events


def ssml(item: Utterance) -> str:
    """Each sentence in its <s>, or there is no pause; each word with its stop in a <prosody>."""
    out, controls = "<speak><s>", zip(item.rates, item.pitches, item.volumes_db, strict=True)
    for word, (rate, pitch, db) in zip(item.text.split(), controls, strict=True):
        percents = 100 * rate, 100 + PITCH_SLOPE * math.log(pitch), 100 * 10 ** (db / 20)
        out += '<prosody rate="{:.0f}%" pitch="{:.0f}%" volume="{:.0f}%">'.format(*percents)
        out += f"{word}</prosody> " + ("</s><s>" if word[-1] in ".?" else "")
    return out.removesuffix("<s>") + "</speak>"


def _truth(
    item: Utterance, samples: np.ndarray, events: list[tuple[int, int, str]]
) -> tuple[dict[str, Any], np.ndarray]:
    """Times and audio, both with margins; ({}, ...) if espeak lost words or merged two."""
    starts: list[int] = []  # of words, in samples, as `ends`
    ends: list[int] = []
    phones, phone_starts = [SILENCE], [0]
    for kind, sample, name in events:
        phone = SILENCE if name in ("_", "_:", "_!") else name.strip("',%=")  # without stress
        if (kind == WORD or phone == SILENCE) and len(ends) < len(starts):
            ends.append(sample)
        if kind == WORD:
            starts.append(sample)
        # ';' is a sign between phones, without sound; one silence is enough for a pause
        elif phone != ";" and not (phone == SILENCE == phones[-1]):
            phones.append(phone)
            phone_starts.append(sample)
    whole = len(starts) == len(ends) == len(item.text.split())
    if not whole or any(b <= a for a, b in zip(starts, ends, strict=True)):
        return {}, samples
    margin = round(MARGIN_S * SAMPLE_RATE)
    shift = margin - starts[0]
    audio = np.pad(samples, (max(shift, 0), margin))[max(-shift, 0) :][: ends[-1] + shift + margin]
    times = {"starts_s": starts, "ends_s": ends, "phone_starts_s": phone_starts}
    truth = {k: [round(max(t + shift, 0) / SAMPLE_RATE, 4) for t in v] for k, v in times.items()}
    return truth | {"phones": [PHONES.index(phone) for phone in phones]}, audio.astype("<i2")


def _child(folder: Path) -> None:
    """request.json -> audio.i16 and utterances.jsonl, in one pass: espeak's state is part of it."""
    request = json.loads((folder / "request.json").read_text())
    wanted, espeak, offset, lost = request["wanted"], Espeak(), 0, ""
    total, start, shown = sum(wanted.values()), time.monotonic(), time.monotonic()
    with open(folder / "audio.i16", "wb") as raw, open(folder / "utterances.jsonl", "w") as lines:
        for row in request["items"]:
            item = Utterance(**row)
            truth, audio = _truth(item, *espeak.speak(item)) if wanted[item.split] else ({}, None)
            if not truth or audio is None:
                lost = item.text
                continue
            raw.write(audio.tobytes())
            row |= truth | {"offset": offset, "length": len(audio)}
            lines.write(json.dumps(row) + "\n")
            offset += len(audio)
            wanted[item.split] -= 1
            if time.monotonic() - shown > 5:
                shown, done = time.monotonic(), total - sum(wanted.values())
                left = (shown - start) / done * (total - done)
                hours = offset / SAMPLE_RATE / 3600
                print(f"spoken {done}/{total} | {hours:.2f} h | {left:.0f} s left", flush=True)
    if any(wanted.values()):
        raise ValueError(f"words were lost or merged, as in {lost!r}; still wanted: {wanted}")


def main() -> None:
    """No flags: speak and show a small corpus. --speak DIR is what `_make` calls."""
    if sys.argv[1:2] == ["--speak"]:
        _child(Path(sys.argv[2]))
        return
    corpus = load(n_train=40, n_dev=5, n_test=5, n_test_voices=5)
    for u in corpus.utterances[::6]:
        print(f"{u.split:11} {u.voice:8} {u.length / SAMPLE_RATE:.2f} s  {u.text}")
    print("audio", tuple(corpus.audio(u).shape), "| words", len(WORDS), "| phones", len(PHONES))


if __name__ == "__main__":
    run(main)
