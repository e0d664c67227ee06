"""Do codes help, and which? Every system at equal steps, over seeds: its units, and its speech.

    python compare.py                                      three seeds of all systems
    python compare.py --systems text-only,TASTE,TASLA      of some
                            again after an interruption: it goes on with what is missing

For each seed one text-only model is trained, from which every system starts:

    text-only             as many steps more, without codes
    TASTE       36 bit    a word; one value layer, RVQ 4 x 512: the size of its paper
    xattn+FSQ   36        one value layer, FSQ 12 x 8
    MLDA+RVQ    36        all layers mixed, RVQ 4 x 512
    TASLA       36        all layers mixed, FSQ 12 x 8
    TASLA-64    192       all layers mixed, FSQ 64 x 8: the size of its paper

Measured on sentences and voices that no training saw: S3 units predicted right, with the true
history and with it hidden; words, endings and prosody of the speech that each system generates.
Errors are standard errors over seeds, of the measures and of their paired differences.
[the miniature of TASLA, table 1]
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluate
import train_tokenizer
from common import flag, parse, positive, run
from data import digest, unit_features, unit_hits
from metrics import Figures, mean_and_error
from tokenizer import SpeechTokenizer, load_tokenizer
from train_tokenizer import train
from weights import write_atomic

SYSTEMS: dict[str, dict[str, Any]] = {
    "text-only": {"text_only": True},
    "TASTE": {"quantizer": "rvq", "aggregator": "xattn"},
    "TASLA": {"quantizer": "fsq", "aggregator": "mlda"},
    "xattn+FSQ": {"quantizer": "fsq", "aggregator": "xattn"},
    "MLDA+RVQ": {"quantizer": "rvq", "aggregator": "mlda"},
    "TASLA-64": {"quantizer": "fsq", "aggregator": "mlda", "fsq_channels": 64},
}
UNITS = {"accuracy": "units, accuracy", "masked_accuracy": "hidden accuracy"}
SPEECH = ("F0-PCC", "Ene. PCC", "GPE", "Ene. RMSE", "VDE", "Phr. Cos.", "Phr. L2", "WER", "ended")
TOPLINE = "S3 topline"  # not trained here: its errors are those over utterances


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("runs/compare"), "all runs, and compare.md")
    bundle: Path = flag(Path("weights/tiny"), "the frozen models, from recognizer to vocoder")
    systems: str = flag(",".join(SYSTEMS), "which")
    seeds: int = flag(3, "how many; each trains a common start and all systems")
    text_steps: int = flag(1500, "steps of the common start")
    steps: int = flag(2000, "steps of each system after it")
    utterances: int = flag(8000, "training utterances of the built-in corpus")
    items: int = flag(200, "utterances that each system is measured on, 200 at most")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}
Found = dict[str, list[dict[str, float]]]  # system -> measures of each seed


def check(cfg: Config) -> list[str]:
    """The systems; ValueError for unknown ones, and for a folder with runs of other settings."""
    names = cfg.systems.split(",")
    if unknown := set(names) - SYSTEMS.keys():
        raise ValueError(f"no system {sorted(unknown)}; there are {', '.join(SYSTEMS)}")
    kept = "bundle", "text_steps", "steps", "utterances", "items"
    settings, path = {k: str(getattr(cfg, k)) for k in kept}, cfg.out / "settings.json"
    if path.exists() and (found := json.loads(path.read_text())) != settings:
        raise ValueError(f"{path}: runs of {found}, wanted {settings}; choose another --out")
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings).encode())
    return names


def trained(cfg: train_tokenizer.Config) -> SpeechTokenizer:
    """The model of this run: finished before, gone on with, or new."""
    if (cfg.out / "model.safetensors").exists():
        return load_tokenizer(cfg.out)
    return train(replace(cfg, resume=bool([*cfg.out.glob("step_*")])))


def measure(cfg: Config, names: list[str]) -> tuple[Found, Figures]:
    """All systems over seeds, and the topline; what was measured before is read, not repeated."""
    heard = evaluate.Config(bundle=cfg.bundle, items=cfg.items, device=cfg.device)
    system, found = evaluate.System(heard, "test_voices"), Found()
    items = system.test
    store = unit_features(items, system.frontend, digest(items), "units of test_voices")
    for seed in range(cfg.seeds):
        start = cfg.out / f"start_{seed}"
        common = train_tokenizer.Config(
            out=start, bundle=cfg.bundle, text_only=True, text_steps=cfg.text_steps, steps=0,
            utterances=cfg.utterances, seed=seed, threads=cfg.threads, device=cfg.device,
        )  # fmt: skip
        for name in names:
            out = cfg.out / f"{name.lower()}_{seed}"
            path = out / "measured.json"
            if not path.exists():
                trained(common)
                what = {"text_only": False, **SYSTEMS[name]}
                own = replace(common, out=out, init=start, steps=cfg.steps, **what)
                hits = unit_hits(trained(own), items, store, system.frontend, own.text_only)
                total = float(hits["total"].sum())
                row = {UNITS[k]: float(hits[k].sum()) / total for k in UNITS}
                said = evaluate.reconstruct(system, out, f"{name} {seed}", not own.text_only)
                row |= {k: said[k][0] for k in SPEECH}
                write_atomic(path, json.dumps(row).encode())
            found.setdefault(name, []).append(json.loads(path.read_text()))
    return found, evaluate.topline(system)["S3 units"]


def table(found: Found, topline: Figures) -> str:
    """Markdown: mean ± standard error over seeds; each system, then the paper's order, paired."""
    rows: dict[str, Figures] = {}
    for name, seeds in found.items():
        rows[name] = {k: mean_and_error([row[k] for row in seeds]) for k in seeds[0]}
    rows[TOPLINE] = {k: topline[k] for k in SPEECH if k in topline}
    for a, b in (("TASTE", "text-only"), ("TASLA", "TASTE")):
        if a in found and b in found:
            pairs = [*zip(found[a], found[b], strict=True)]
            rows[f"{a} less {b}"] = {k: mean_and_error([x[k] - y[k] for x, y in pairs])
                                     for k in pairs[0][0]}  # fmt: skip
    return evaluate.table("system", rows)


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "seeds", "text_steps", "steps", "utterances", "items", "threads")
    text = table(*measure(cfg, check(cfg)))
    write_atomic(cfg.out / "compare.md", text.encode())
    print(f"\n{cfg.seeds} seeds, {cfg.text_steps} + {cfg.steps} steps\n\n{text}")


if __name__ == "__main__":
    run(main)
