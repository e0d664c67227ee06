"""Datasets and batches: where audio and text come from, and how they reach a training step.

    built-in corpus | LibriSpeech folder | TSV/JSONL manifest --> list[Item]   audio read on demand
    list[Item] --prepare--> Ragged       tensors of different lengths, memory-mapped from one file
    lengths --Batches--> indices of step s     every item once per epoch, similar lengths together
    list of tensors --pad--> (B, longest, ...), lengths (B,)

Which items a step sees follows from (seed, step) alone, so that a resumed run sees the same ones.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import audio
import synth
import text
from common import progress
from tokenizer import Frontend, SpeechTokenizer, TokenizerBatch, UnitFrontend

UNK, BOS, EOS = 0, 1, 2  # of the tiny SentencePiece tokenizers
UNIT_S = 0.04  # seconds per encoder frame and unit of the tiny system
CACHE = Path(__file__).parent / ".cache"
Lengths = Sequence[int] | Tensor
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".mp3")


@dataclass(frozen=True)
class Item:
    """One utterance. `utterance` holds the true word times and prosody of the built-in corpus."""

    key: str
    text: str
    speaker: str
    read: Callable[[], tuple[Tensor, int]]  # -> wav (S,) float32, rate in Hz
    utterance: synth.Utterance | None = None

    def wav(self, rate: int) -> Tensor:
        """(S,) float32 at `rate` Hz."""
        wav, own = self.read()
        return audio.resample(wav, own, rate)

    @property
    def truth(self) -> synth.Utterance:
        """Word times and prosody, or ValueError: only the built-in corpus knows them."""
        if self.utterance is None:
            raise ValueError(f"{self.key}: its word times are unknown; use the built-in corpus")
        return self.utterance


def builtin(corpus: synth.Corpus, split: str) -> list[Item]:
    """The utterances of one split of the built-in corpus, see synth.py."""

    def reader(utt: synth.Utterance) -> Callable[[], tuple[Tensor, int]]:
        return lambda: (corpus.audio(utt), synth.SAMPLE_RATE)

    return [
        Item(f"{split}-{i:05d}", u.text, u.voice, reader(u), u)
        for i, u in enumerate(corpus.split(split))
    ]


def from_file(key: str, text: str, speaker: str, path: Path) -> Item:
    return Item(key, text, speaker, lambda: audio.read_with_rate(path))


def librispeech(root: Path, strict: bool = True) -> list[Item]:
    """root/**/SPEAKER-CHAPTER.trans.txt with lines `KEY TEXT`, and KEY.flac beside each.

    strict: a missing file is an error; else it is one when it is read."""
    items = []
    for transcript in sorted(Path(root).rglob("*.trans.txt")):
        for line in filter(str.strip, transcript.read_text().splitlines()):
            key, _, text = line.partition(" ")
            files = [transcript.parent / (key + suffix) for suffix in AUDIO_SUFFIXES]
            found = [file for file in files if file.is_file()] or ([] if strict else files[:1])
            if not found:
                raise FileNotFoundError(
                    f"{transcript}: names {key}, but no {key}.flac lies beside it"
                )
            items.append(from_file(key, text.strip().lower(), key.split("-")[0], found[0]))
    if not items:
        raise FileNotFoundError(f"{root}: no *.trans.txt below it; wanted a LibriSpeech folder")
    return items


def libritts(root: Path) -> list[Item]:
    """root/**/KEY.normalized.txt, and KEY.wav beside each; the speaker is KEY's first part."""
    items = []
    for path in sorted(Path(root).rglob("*.normalized.txt")):
        key = path.name.removesuffix(".normalized.txt")
        said = path.read_text().strip()
        items.append(from_file(key, said, key.split("_")[0], path.with_name(f"{key}.wav")))
    if not items:
        raise FileNotFoundError(f"{root}: no *.normalized.txt below it; wanted a LibriTTS folder")
    return items


def manifest(path: Path, strict: bool = True) -> list[Item]:
    """A .tsv with a header, or a .jsonl: columns audio (path, relative to the file), text, and
    optionally speaker and key. strict: see librispeech."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        rows = [json_row(line, f"{path}: entry {i}") for i, line in enumerate(lines, 1)]
    else:
        header = "".join(lines[:1]).split("\t")
        rows = [dict(zip(header, line.split("\t"), strict=False)) for line in lines[1:]]
    if not rows:
        raise ValueError(f"{path}: empty; wanted one utterance a line")
    items = []
    for i, row in enumerate(rows, 1):
        if not all(row.get(name) and isinstance(row[name], str) for name in ("audio", "text")):
            raise ValueError(f"{path}: entry {i} has {sorted(row)}; wanted audio and text")
        file = path.parent / row["audio"]
        if strict and not file.is_file():
            raise FileNotFoundError(f"{path}: entry {i} names {file}, which does not exist")
        key = row.get("key", file.stem)
        items.append(from_file(key, row["text"].strip(), row.get("speaker", "unknown"), file))
    return items


def json_row(line: str, what: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{what} is not a JSON object ({e})") from e
    if not isinstance(row, dict):
        raise ValueError(f"{what} is not a JSON object but a {type(row).__name__}")
    return row


def digest(items: Sequence[Item]) -> str:
    """Names a list of items by what is said, by whom, and where known how: for `prepare`."""
    rows = [(item.key, item.text, item.speaker, item.utterance) for item in items]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


class Ragged:
    """Named tensors of many items, e.g. mel (F_i, M) of item i; read from disk when asked for."""

    def __init__(self, folder: Path) -> None:
        self.file = safe_open(folder / "features.safetensors", framework="pt")
        keys = list(self.file.keys())
        self.names = sorted(k.removesuffix(".ends") for k in keys if k.endswith(".ends"))
        self.ends = {name: self.file.get_tensor(name + ".ends").tolist() for name in self.names}
        self.slices = {name: self.file.get_slice(name) for name in self.names}

    def __len__(self) -> int:
        return len(self.ends[self.names[0]])

    def get(self, name: str, i: int) -> Tensor:
        ends = self.ends[name]
        return self.slices[name][(ends[i - 1] if i else 0) : ends[i]]

    def lengths(self, name: str) -> list[int]:
        ends = self.ends[name]
        return [b - a for a, b in zip([0, *ends], ends, strict=False)]


def prepare(
    items: Sequence[Item],
    compute: Callable[[Item], dict[str, Tensor]],
    tag: str,
    what: str = "features",
) -> Ragged:
    """Compute tensors of all items once and keep them on disk.

    tag: says everything that the result depends on (corpus, models, settings); another tag is
    another folder. The folder is written aside and renamed, so it is complete or absent."""
    folder = CACHE / "features" / hashlib.sha256(tag.encode()).hexdigest()[:16]
    if not folder.exists():
        parts: dict[str, list[Tensor]] = {}
        for item in progress(what, items):
            for name, tensor in compute(item).items():
                parts.setdefault(name, []).append(tensor)
        flat = {name: torch.cat(tensors) for name, tensors in parts.items()}
        for name, tensors in parts.items():
            flat[name + ".ends"] = torch.tensor([len(t) for t in tensors]).cumsum(0)
        partial = folder.with_name(f".partial_{folder.name}_{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(flat, partial / "features.safetensors")
        (partial / "tag.txt").write_text(tag + "\n")
        if folder.exists():  # another process was faster
            shutil.rmtree(partial)
        else:
            os.replace(partial, folder)
    return Ragged(folder)


class Batches:
    """batches(step) -> item indices of that step, step = 1, 2, ...

    Each epoch sorts by length with some noise, cuts batches of similar length and shuffles them."""

    def __init__(self, lengths: Lengths, size: int, seed: int) -> None:
        if not len(lengths) or size < 1:
            raise ValueError(f"{len(lengths)} utterances in batches of {size}: nothing to train on")
        self.lengths = torch.as_tensor(lengths, dtype=torch.float)
        self.size, self.seed = min(size, len(lengths)), seed
        self.per_epoch = -(-len(lengths) // self.size)
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int) -> list[int]:
        epoch, index = divmod(step - 1, self.per_epoch)
        if epoch != self.epoch:
            rng = torch.Generator().manual_seed(self.seed * 1000003 + epoch)
            noise = 1 + 0.1 * torch.rand(len(self.lengths), generator=rng)
            self.sorted = (self.lengths * noise).argsort()
            self.order = torch.randperm(self.per_epoch, generator=rng)
            self.epoch = epoch
        first = int(self.order[index]) * self.size
        return self.sorted[first : first + self.size].tolist()


class FrameBatches:
    """As Batches, but a batch is full when its frames are, padding included [TASLA, app. B].

    Lengths are rounded up to edges that grow by a tenth, and a batch holds lengths of one edge
    only: little padding, and as many shapes as there are edges, for compiled code. What alone is
    longer than `frames` is a batch of its own."""

    def __init__(self, lengths: Lengths, frames: int, seed: int) -> None:
        if not len(lengths) or frames < 1:
            raise ValueError(
                f"{len(lengths)} utterances in batches of {frames} frames: nothing to train on"
            )
        edges = [1.0]
        while edges[-1] < max(lengths):
            edges.append(max(edges[-1] + 1, edges[-1] * 1.1) // 1)
        bucket = torch.bucketize(torch.as_tensor(lengths), torch.tensor(edges))
        self.buckets = [
            (found, max(1, int(frames // edge)))
            for b, edge in enumerate(edges)
            if len(found := (bucket == b).nonzero().flatten().int())
        ]
        sizes = [(len(found), size) for found, size in self.buckets]
        starts = [torch.arange(0, n, size) for n, size in sizes]
        ends = [(start + size).clamp(max=n) for start, (n, size) in zip(starts, sizes, strict=True)]
        before = torch.tensor([0] + [n for n, _ in sizes]).cumsum(0).tolist()
        self.starts = torch.cat([x + first for x, first in zip(starts, before, strict=False)])
        self.ends = torch.cat([x + first for x, first in zip(ends, before, strict=False)])
        self.per_epoch, self.seed = len(self.starts), seed
        self.epoch, self.items, self.order = -1, torch.empty(0), torch.empty(0)

    def __call__(self, step: int) -> list[int]:
        epoch, index = divmod(step - 1, self.per_epoch)
        if epoch != self.epoch:
            rng = torch.Generator().manual_seed(self.seed * 1000003 + epoch)
            self.items = torch.cat(
                [found[torch.randperm(len(found), generator=rng)] for found, _ in self.buckets]
            )
            self.order = torch.randperm(self.per_epoch, generator=rng)
            self.epoch = epoch
        at = self.order[index]
        return self.items[self.starts[at] : self.ends[at]].tolist()


def pad(tensors: Sequence[Tensor], value: float = 0, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """n tensors (n_i, ...) -> (B, longest, ...) filled up with `value`, lengths (B,) int64.

    The longest axis is rounded up to a multiple of `multiple`."""
    lengths = torch.tensor([len(t) for t in tensors])
    x = torch.nn.utils.rnn.pad_sequence(list(tensors), True, value)
    more = -x.shape[1] % multiple
    return (
        x if not more else torch.cat([x, x.new_full((len(x), more, *x.shape[2:]), value)], 1)
    ), lengths


def unit_features(items: Sequence[Item], frontend: UnitFrontend, tag: str, what: str) -> Ragged:
    """mel (F, M) fp16, units (U,) and voice (1, X) of all items, kept on disk; tag: see prepare."""

    def compute(item: Item) -> dict[str, Tensor]:
        found = frontend.features(item.wav(audio.WHISPER_RATE))
        return {
            "mel": found["mel"].half().cpu(),
            "units": found["units"].short().cpu(),
            "voice": found["voice"].cpu(),
        }

    return prepare(items, compute, f"units 1 {tag} {frontend.digest}", what)


def tokenizer_batch(
    items: Sequence[Item], store: Ragged, indices: Sequence[int], frontend: Frontend,
    layers: tuple[int, ...] | None, device: torch.device,
) -> TokenizerBatch:  # fmt: skip
    """The batch of these items; the frozen encoder listens here, and word spans come where known.
    layers: the taps; None if only the text matters: `last` is then without width."""
    mel, mel_len = pad([store.get("mel", i).float() for i in indices])
    mel_keep = keep_mask(mel_len).to(device)
    if layers is None:
        keep = mel_keep[:, :: frontend.encoder.cfg.stride]
        last, taps = torch.empty(*keep.shape, 0, device=device), dict[int, Tensor]()
    else:
        last, taps, keep = frontend.hear(mel.transpose(1, 2).to(device), mel_keep, layers)
    rows = [text.align_words(items[i].text, frontend.tokens, frontend.tokens) for i in indices]
    spans = prosody = None
    if all(items[i].utterance is not None for i in indices):
        prosody = pad([items[i].truth.prosody for i in indices])[0].to(device)
        spans = pad(
            [
                word_spans(items[i].truth, row.asr_word_ids, last.shape[1])
                for i, row in zip(indices, rows, strict=True)
            ]
        )[0].to(device)
    return TokenizerBatch(
        ids=pad([torch.tensor(row.asr_ids) for row in rows])[0].to(device),
        word_ids=pad([torch.tensor(row.asr_word_ids) for row in rows], -1)[0].to(device),
        last=last,
        taps=taps,
        keep=keep,
        voice=torch.cat([store.get("voice", i) for i in indices]).to(device),
        units=pad([store.get("units", i).long() for i in indices], -1)[0].to(device),
        spans=spans,
        prosody=prosody,
    )


def word_spans(utterance: synth.Utterance, word_ids: Sequence[int], frames: int) -> Tensor:
    """(N, frames) bool: encoder frames in which the word of each token is spoken, and one more on
    either side."""
    centre = (torch.arange(frames) + 0.5) * UNIT_S
    starts = torch.tensor(utterance.starts_s)[list(word_ids), None] - UNIT_S
    ends = torch.tensor(utterance.ends_s)[list(word_ids), None] + UNIT_S
    return (centre > starts) & (centre < ends)


def unit_hits(
    model: SpeechTokenizer, items: Sequence[Item], store: Ragged, frontend: Frontend,
    text_only: bool, size: int = 50,
) -> dict[str, Tensor]:  # fmt: skip
    """As all_hits, of utterances of the built-in corpus."""
    device = next(model.parameters()).device

    def batch(indices: Sequence[int], layers: tuple[int, ...] | None) -> TokenizerBatch:
        return tokenizer_batch(items, store, indices, frontend, layers, device)

    units = [store.get("units", i) for i in range(len(items))]
    return all_hits(model, range(len(items)), batch, units, text_only, size)


@torch.no_grad()
def all_hits(
    model: SpeechTokenizer, indices: Sequence[int],
    make: Callable[[Sequence[int], tuple[int, ...] | None], TokenizerBatch],
    units: Sequence[Tensor], text_only: bool, size: int = 50, continuous: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Units that are predicted right, (n,) one number per item: teacher-forced (accuracy), with
    all history hidden (masked_accuracy), always the majority unit of `units`, and repeat the unit
    before, which need no model; `total` units, and the sum of the teacher-forced loss (ce) in
    nats. make: indices, value layers -> the batch."""
    training, layers = model.training, model.config.aggregator.value_layers
    model.eval()
    majority = torch.cat(list(units)).mode().values
    found: dict[str, list[Tensor]] = {}
    for first in range(0, len(indices), size):
        batch = make(indices[first : first + size], None if text_only else layers)
        real = batch.units >= 0  # (B, U)
        keeps = None, torch.zeros_like(real)
        out = [model(batch, text_only, keep, continuous).units for keep in keeps]
        hits = [(o.correct[:, : real.shape[1]] & real).sum(1) for o in out]
        repeat = ((batch.units[:, 1:] == batch.units[:, :-1]) & real[:, 1:]).sum(1)
        odds = out[0].logits[:, :-1].log_softmax(-1).gather(2, batch.units.clamp(min=0)[..., None])
        ce = -odds.squeeze(2).masked_fill(~real, 0).sum(1)
        rows = (*hits, (batch.units == majority).sum(1), repeat, real.sum(1), ce)
        names = ("accuracy", "masked_accuracy", "majority", "repeat_last", "total", "ce")
        for name, row in zip(names, rows, strict=True):
            found.setdefault(name, []).append(row.cpu())
    model.train(training)
    return {name: torch.cat(rows) for name, rows in found.items()}


def keep_mask(lengths: Tensor, longest: int | None = None) -> Tensor:
    """lengths (B,) -> keep (B, longest) bool, True = real."""
    n = int(lengths.max()) if longest is None else longest
    return torch.arange(n, device=lengths.device) < lengths[:, None]


if __name__ == "__main__":
    batches = Batches([5, 9, 2, 7, 3, 8], size=2, seed=0)
    print("indices of steps 1 to 4:", [batches(step) for step in range(1, 5)])
    x, lengths = pad([torch.ones(3, 4), torch.ones(5, 4)])
    print(f"padded {(*x.shape,)}, lengths {lengths.tolist()}, keep {(*keep_mask(lengths).shape,)}")
