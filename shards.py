"""Prepared features of a large corpus: shards on disk, and what of them a training step sees.

    folder/manifest.json             what the features are: models by hash, layers, settings, corpus
    folder/shard-00000.safetensors   tensors of some utterances, one after another, and their ends
    folder/report.json               hours, bytes, and each utterance that was left out, and why

    Shards.get("last", i) (T, C), memory-mapped      i counts utterances over all shards
    indices --shard_batch--> TokenizerBatch          frozen encoder: run once, or now if only mels
                                                     were kept

A store is one of: "states", last and tap.K (T, C) of the value layers K, for the aggregator; "mel"
(F, M), a twentieth of that, and the encoder runs in each step. Always: units (U,), voice (1, X),
text and word ids of the recognizer (ids, word_ids), and of the LM (llm_*) if the bundle has one.
Features made by other models than those of the bundle are refused. prepare.py writes all this.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import text
from data import keep_mask, pad
from public import open_public
from tokenizer import Frontend, Recognizer, TokenizerBatch
from weights import read_config, read_json
from whisper_dec import WhisperDecoder
from whisper_enc import WhisperEncoder

FORMAT = 1
PREFIX = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
WINDOW = 3000  # mel frames, 30 s: public Whisper models heard nothing shorter
MAX_OPEN = 256  # shards that are mapped at a time
TOKENIZER_FILES = ("*.model", "tokenizer.json", "vocab.json")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", *TOKENIZER_FILES)
MODELS = {"asr": WEIGHT_FILES, "s3": WEIGHT_FILES, "speaker": WEIGHT_FILES, "lm": TOKENIZER_FILES}


def open_recognizer(folder: Path, hears: bool) -> Recognizer | None:
    """A public Whisper folder (also distilled), in fp32; None: one that train_tiny.py made.
    hears: if not, the encoder stays on the disk."""
    if "encoder" in read_config(folder):
        return None
    parts = open_public(folder)
    encoder, decoder = parts.get("encoder"), parts.get("decoder")
    if not isinstance(encoder, WhisperEncoder) or not isinstance(decoder, WhisperDecoder):
        raise ValueError(f"{folder}: holds {sorted(parts)}, wanted a Whisper encoder and decoder")
    decoder.float()
    if hears:
        encoder.float()
    tokens = text.load_tokenizer(folder, decoder.cfg.vocab)
    prefix, (eos,) = tokens.encode(PREFIX, True), tokens.encode("<|endoftext|>", True)
    return Recognizer(encoder, decoder, tokens, tuple(prefix), eos, WINDOW)


def open_frontend(bundle: Path, hears: bool = True) -> Frontend:
    """The frozen models of a bundle: `s3` and `speaker` from train_tiny.py or public.py --convert,
    `asr` from train_tiny.py or a public Whisper folder. hears: see open_recognizer."""
    return Frontend(bundle, open_recognizer(Path(bundle) / "asr", hears))


def digests(bundle: Path, tokenizer: Path | None = None) -> dict[str, str]:
    """{model: hash of its files} of a bundle, and of a speech tokenizer. Of the LM, which may be
    missing, features hold only what its text tokenizer says."""
    found = {} if tokenizer is None else {"tokenizer": hash_of([tokenizer / "model.safetensors"])}
    for name, rows in MODELS.items():
        folder = Path(bundle) / name
        files = sorted({file for row in rows for file in folder.glob(row) if file.is_file()})
        if files:
            found[name] = hash_of(files)
        elif name != "lm":
            raise FileNotFoundError(f"{folder}: no model in it; a bundle has {', '.join(MODELS)}")
    return found


def hash_of(files: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


class Shards:
    """Features by name of all utterances of a folder, in their order; read when asked for."""

    def __init__(self, folder: Path, bundle: Path, tokenizer: Path | None = None) -> None:
        """tokenizer: the folder of it, for codes. ValueError: not finished, damaged, or made by
        other models than these."""
        self.folder = Path(folder)
        if not (self.folder / "report.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no finished features (report.json); run prepare.py to the end"
            )
        self.manifest = read_json(self.folder / "manifest.json")
        self.report = read_json(self.folder / "report.json")
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{folder}: format {self.manifest.get('format')}, wanted {FORMAT}")
        theirs, ours = self.manifest["models"], digests(bundle, tokenizer)
        if stale := [k for k in theirs if k in ours and theirs[k] != ours[k]]:
            raise ValueError(
                f"{folder}: stale, made by other models than {bundle} has ({', '.join(stale)});"
                " give that bundle, or prepare again into another folder"
            )
        self.mapped: dict[int, Any] = {}
        self.names: list[str] = []
        self.ends: dict[str, list[Tensor]] = {}
        for k in range(self.manifest["shards"]):
            shard = self.shard(k)
            for name in (x.removesuffix(".ends") for x in shard.keys() if x.endswith(".ends")):  # noqa: SIM118
                self.ends.setdefault(name, []).append(shard.get_tensor(f"{name}.ends"))
        self.names = sorted(self.ends)
        if not self.names:
            raise ValueError(f"{folder}: every utterance was left out, see report.json")
        counts = torch.tensor([len(ends) for ends in self.ends[self.names[0]]])
        self.first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def shard(self, k: int) -> Any:
        """Shard k, mapped into memory; of those that were, the oldest is given up."""
        if k not in self.mapped:
            path = self.folder / shard_name(k)
            try:
                self.mapped[k] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise ValueError(
                    f"{path}: missing or damaged ({e}); delete it and report.json, and prepare it"
                    " again"
                ) from e
            if len(self.mapped) > MAX_OPEN:
                del self.mapped[next(iter(self.mapped))]
        return self.mapped[k]

    def get(self, name: str, i: int) -> Tensor:
        """Feature `name` of utterance i, (n_i, ...)."""
        k = int(torch.searchsorted(self.first, i, right=True)) - 1
        row, ends = i - int(self.first[k]), self.ends[name][k]
        return self.shard(k).get_slice(name)[(int(ends[row - 1]) if row else 0) : int(ends[row])]

    def lengths(self, name: str) -> Tensor:
        """(n,) int64: length of feature `name` of each utterance."""
        first = torch.zeros(1, dtype=torch.long)
        return torch.cat([ends.diff(prepend=first) for ends in self.ends[name]])

    def frames(self) -> Tensor:
        """(n,) int64: mel frames of each utterance, 100 a second."""
        return self.lengths("units") * self.manifest["unit_frames"]

    def utterances(self) -> list[dict[str, Any]]:
        """key, text, speaker and seconds of each utterance: all of them in memory at once."""
        rows: list[dict[str, Any]] = []
        for k in range(self.manifest["shards"]):
            rows += json.loads(self.shard(k).metadata()["items"])["kept"]
        return rows


def shard_name(k: int) -> str:
    return f"shard-{k:05d}.safetensors"


def read_layers(flag: str, most: int) -> tuple[int, ...]:
    """--layers "8,16" of an encoder of `most` layers -> (8, 16), or ValueError."""
    found = [part.strip() for part in flag.split(",")]
    if odd := [part for part in found if not part.isdecimal() or int(part) > most]:
        raise ValueError(f"--layers {flag}: {odd[0]!r} is none of 0 .. {most}, as in 3,6,9")
    return tuple(map(int, found))


def check_layers(store: Shards, layers: Sequence[int]) -> None:
    """ValueError: the states of these layers were not kept."""
    missing = sorted({f"tap.{k}" for k in layers} - {*store.names})
    if "mel" not in store.names and missing:
        raise ValueError(f"{store.folder}: lacks {missing}; it has {store.names}")


def shard_batch(
    store: Shards, indices: Sequence[int], layers: Sequence[int] | None, frontend: Frontend | None,
    device: torch.device, multiple: int = 1,
) -> TokenizerBatch:  # fmt: skip
    """The batch of these utterances. layers: the taps; None if only the text matters. frontend: to
    hear mels with; not needed for states. Axes are padded to a multiple of `multiple`."""

    def padded(name: str, value: float = 0) -> tuple[Tensor, Tensor]:
        rows = [store.get(name, i) for i in indices]
        rows = [row.float() if row.is_floating_point() else row.long() for row in rows]
        return pad(rows, value, multiple)

    ids, word_ids = padded("ids")[0].to(device), padded("word_ids", -1)[0].to(device)
    last, keep = torch.empty(*ids.shape, 0, device=device), torch.ones_like(ids, dtype=torch.bool)
    taps: dict[int, Tensor] = {}
    if layers is not None and "mel" in store.names:
        if frontend is None:
            raise ValueError(f"{store.folder}: holds mels, which need the encoder")
        mel, lengths = padded("mel")
        mel_keep = keep_mask(lengths, mel.shape[1]).to(device)
        last, taps, keep = frontend.hear(mel.mT.to(device), mel_keep, tuple(layers))
    elif layers is not None:
        states, lengths = padded("last")
        last, keep = states.to(device), keep_mask(lengths, states.shape[1]).to(device)
        taps = {k: padded(f"tap.{k}")[0].to(device) for k in layers}
    return TokenizerBatch(
        ids=ids,
        word_ids=word_ids,
        last=last,
        taps=taps,
        keep=keep,
        voice=torch.cat([store.get("voice", i) for i in indices]).to(device),
        units=padded("units", -1)[0].to(device),
    )
