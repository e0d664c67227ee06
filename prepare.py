"""Run the frozen models over a corpus, once: features in shards, for training at scale.

    python prepare.py --preset tasla --corpus librispeech --data LibriSpeech/ --bundle B --out DIR
    python prepare.py --corpus manifest --data all.tsv ...          also libritts, builtin
    python prepare.py --corpus features --data DIR --tokenizer T    codes of T, for train_lm.py
    torchrun --nproc-per-node 8 prepare.py ...                      eight processes, or GPUs

Utterance i lies in shard i // per-shard, and every utterance is computed alone: the bytes depend
on nothing else. A shard appears when it is complete, so a killed run goes on where it was. Run it
with the same flags on several machines by torchrun's --nnodes, or one after the other.

What cannot be used (unreadable, too long, without text) is left out and named, with the reason, in
report.json and on the screen. Exit code: 0 all is in, 3 finished but some was left out, 2 error.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import audio
import synth
import text
from common import flag, parse, place, positive, progress, run
from cpu_linear import quicken
from data import Item, builtin, digest, from_file, librispeech, libritts, manifest
from shards import (
    FORMAT,
    Shards,
    check_layers,
    digests,
    open_frontend,
    read_layers,
    shard_batch,
    shard_name,
)  # fmt: skip
from tokenizer import Frontend, load_tokenizer
from weights import read_json, write_atomic

LEFT_OUT = 3  # exit code


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("features"), "folder of the shards")
    corpus: str = flag(
        "builtin",
        "kind of corpus, or features that are there already, to compute codes",
        choices=("builtin", "librispeech", "libritts", "manifest", "features"),
    )
    tokenizer: Path = flag(Path(), "folder of train_tokenizer.py, with --corpus features")
    data: Path = flag(Path("train"), "its folder or file; of the built-in one: its split")
    utterances: int = flag(2000, "training utterances of the built-in corpus")
    bundle: Path = flag(Path("weights/tiny"), "the frozen models: asr, s3, speaker, and lm if any")
    store: str = flag("mel", "log-mels, or states of the encoder", choices=("mel", "states"))
    layers: str = flag("1,2,3,4", "whose states: the value layers; the last one always is")
    dtype: str = flag("float16", "of mels and states", choices=("float16", "bfloat16"))
    per_shard: int = flag(100, "utterances in a shard")
    threads: int = flag(1, "CPU threads of each process; sums depend on it")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {"store": "states", "layers": "3,6,9,12"},  # all of whisper-small's twelve, as TASLA
    "taste": {"store": "states", "layers": "6"},  # TASTE 3.1.1
    "tasla": {"store": "states", "layers": "8,16,24,32"},  # TASLA 4.1; its appendix G: 3,6,9,32
}


def read_corpus(cfg: Config) -> list[Item]:
    if cfg.corpus == "builtin":
        return builtin(synth.load(n_train=cfg.utterances), str(cfg.data))
    if cfg.corpus == "libritts":
        return libritts(cfg.data)
    if cfg.corpus == "features":
        rows = Shards(cfg.data, cfg.bundle).utterances()
        return [from_file(r["key"], r["text"], r["speaker"], cfg.data) for r in rows]
    return (librispeech if cfg.corpus == "librispeech" else manifest)(cfg.data, strict=False)


class Features:
    """All features of one utterance, by the models of a bundle."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.frontend = quicken(open_frontend(cfg.bundle).to(device))
        self.layers = read_layers(cfg.layers, self.frontend.encoder.cfg.layers)
        self.dtype = getattr(torch, cfg.dtype)
        lm = cfg.bundle / "lm"
        self.lm = text.load_tokenizer(lm) if lm.is_dir() else None

    @torch.inference_mode()
    def of(self, i: int, item: Item) -> dict[str, Tensor]:
        """Of utterance i. ValueError or OSError: why it cannot be used."""
        wav = item.wav(audio.WHISPER_RATE)
        self.check_length(len(wav) // audio.WHISPER_HOP)
        found = self.texts(item.text) | self.frontend.features(wav)
        mel, bins = found.pop("mel"), self.frontend.encoder.cfg.n_mels
        if bins != mel.shape[1]:  # whisper-small hears 80, S3 units 128
            mel = audio.whisper_mel(wav.to(self.device), bins).T
        found["units"] = found["units"].short()
        if self.cfg.store == "mel":
            found["mel"] = mel.to(self.dtype)
        else:
            keep = torch.ones(1, len(mel), dtype=torch.bool, device=self.device)
            with torch.autocast(self.device.type, torch.float16, self.device.type == "cuda"):
                last, taps, _ = self.frontend.hear(mel.T[None], keep, self.layers)
            states = {"last": last} | {f"tap.{k}": tap for k, tap in taps.items()}
            found |= {name: x[0].to(self.dtype) for name, x in states.items()}
        for name, x in found.items():
            if x.is_floating_point() and not x.isfinite().all():
                raise ValueError(f"{name} holds values that {self.cfg.dtype} cannot")
        return {name: x.cpu().contiguous() for name, x in found.items()}

    def check_length(self, frames: int) -> None:
        most = self.frontend.encoder.cfg.max_frames * self.frontend.encoder.cfg.stride
        if frames > most:
            raise ValueError(f"{frames / 100:.1f} s long, the encoder hears {most / 100:.0f} s")

    def texts(self, said: str) -> dict[str, Tensor]:
        """Text and word ids for the recognizer's decoder, and for the LM if there is one."""
        row = text.align_words(said, self.frontend.tokens, self.lm or self.frontend.tokens)
        room = self.frontend.decoder.cfg.max_tokens - len(self.frontend.prefix)
        if len(row.asr_ids) > room:
            raise ValueError(f"{len(row.asr_ids)} text tokens, the decoder takes {room}")
        rows = {"ids": row.asr_ids, "word_ids": row.asr_word_ids}
        if self.lm is not None:
            rows |= {"llm_ids": row.llm_ids, "llm_word_ids": row.llm_word_ids}
        return {name: torch.tensor(ids, dtype=torch.int32) for name, ids in rows.items()}


class Codes:
    """The codes that a tokenizer gives the words of prepared features, and the LM's text."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        if cfg.tokenizer == Path():
            raise ValueError("--corpus features makes codes: give their --tokenizer")
        self.store, self.device = Shards(cfg.data, cfg.bundle), device
        hears = "mel" in self.store.names
        self.frontend = quicken(open_frontend(cfg.bundle, hears).to(device))
        self.tokenizer = quicken(load_tokenizer(cfg.tokenizer).to(device))
        check_layers(self.store, self.tokenizer.config.aggregator.value_layers)
        if "llm_ids" not in self.store.names:
            raise ValueError(
                f"{cfg.data}: has no text for an LM; prepare it with one in the bundle"
            )

    @torch.inference_mode()
    def of(self, i: int, item: Item) -> dict[str, Tensor]:
        """Of utterance i."""
        layers = self.tokenizer.config.aggregator.value_layers
        x = shard_batch(self.store, [i], layers, self.frontend, self.device)
        codes = self.tokenizer.encode(x.ids, x.word_ids, x.last, x.taps, x.keep)[0]
        names = ("llm_ids", "llm_word_ids", "units")
        return {name: self.store.get(name, i) for name in names} | {"codes": codes.short().cpu()}


def write_shard(path: Path, first: int, items: Sequence[Item], features: Features | Codes) -> None:
    """Compute one shard, items from number `first` on, and put it in its place, completely or not
    at all."""
    parts: dict[str, list[Tensor]] = {}
    kept: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for i, item in enumerate(items, first):
        try:
            found = features.of(i, item)
        except (ValueError, OSError) as e:
            skipped.append({"key": item.key, "reason": str(e)})
            print(f"left out {item.key}: {e}", file=sys.stderr, flush=True)
            continue
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
        seconds = len(found["units"]) * features.frontend.s3.cfg.stride / 100
        row = {"key": item.key, "text": item.text, "speaker": item.speaker, "seconds": seconds}
        kept.append(row)
    flat = {name: torch.cat(tensors) for name, tensors in parts.items()}
    for name, tensors in parts.items():
        flat[f"{name}.ends"] = torch.tensor([len(t) for t in tensors]).cumsum(0)
    partial = path.with_name(f".partial_{path.name}")
    # one entry only: the order of several is not fixed, and the bytes shall be
    save_file(flat, partial, {"items": json.dumps({"kept": kept, "skipped": skipped})})
    os.replace(partial, path)


def describe(cfg: Config, items: Sequence[Item], frontend: Frontend) -> dict[str, Any]:
    """The manifest: all that the features follow from."""
    codes = cfg.corpus == "features"
    states = {"layers": cfg.layers, "window": frontend.window} if cfg.store == "states" else {}
    return {
        "format": FORMAT,
        "models": digests(cfg.bundle, cfg.tokenizer if codes else None),
        "store": "codes" if codes else cfg.store,
        **states,
        "dtype": cfg.dtype,
        "unit_frames": frontend.s3.cfg.stride,
        "corpus": digest(items),
        "utterances": len(items),
        "per_shard": cfg.per_shard,
        "shards": -(-len(items) // cfg.per_shard),
    }


def settle(out: Path, ours: dict[str, Any]) -> None:
    """Write the manifest, or ValueError: the folder holds features of another kind."""
    path = out / "manifest.json"
    if path.exists():
        theirs = read_json(path)
        if odd := sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)):
            raise ValueError(
                f"{out} holds features that differ in {', '.join(odd)}: choose another --out, or"
                " delete them"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(ours, indent=2) + "\n").encode())


def report(out: Path, shards: int) -> dict[str, Any]:
    """Read what all shards say of themselves, and write report.json."""
    kept: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    sizes = []
    for k in range(shards):
        path = out / shard_name(k)
        rows = json.loads(header(path)["__metadata__"]["items"])
        kept, skipped = kept + rows["kept"], skipped + rows["skipped"]
        sizes.append(path.stat().st_size)
    found = {
        "kept": len(kept),
        "hours": round(sum(row["seconds"] for row in kept) / 3600, 4),
        "bytes": sum(sizes),
        "skipped": skipped,
    }
    write_atomic(out / "report.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of itself: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "utterances", "per_shard", "threads")
    rank, world, device = place(cfg.device)
    torch.set_num_threads(cfg.threads)
    items = read_corpus(cfg)
    features = Codes(cfg, device) if cfg.corpus == "features" else Features(cfg, device)
    ours = describe(cfg, items, features.frontend)
    settle(cfg.out, ours)
    names = [shard_name(k) for k in range(ours["shards"])]
    todo = [k for k in range(rank, len(names), world) if not (cfg.out / names[k]).exists()]
    for k in progress(f"shards of process {rank}", todo):
        first = k * cfg.per_shard
        write_shard(cfg.out / names[k], first, items[first : first + cfg.per_shard], features)
    if not all((cfg.out / name).exists() for name in names):
        return  # another process is not ready; the last one writes the report
    found = report(cfg.out, len(names))
    print(f"{found['kept']} utterances, {found['hours']:.2f} h, {found['bytes'] / 1e9:.3f} GB")
    if left := found["skipped"]:
        if not found["kept"]:
            raise ValueError(f"{cfg.out}: nothing could be used; first {left[0]}")
        print(f"{len(left)} left out, see {cfg.out / 'report.json'}", file=sys.stderr)
        sys.exit(LEFT_OUT)


if __name__ == "__main__":
    run(main)
