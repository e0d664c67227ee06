"""Do codes help, and which? text-only, TASTE and TASLA at equal steps and bits, several seeds.

    python compare.py --seeds 3     again after an interruption: it goes on with what is missing

For each seed one text-only model is trained; from it start one more text-only run, TASTE (one value
layer, RVQ 4 x 512) and TASLA (MLDA, FSQ 12 x 8), 36 bit a word both. Counted: S3 units predicted
right on sentences and voices that no training saw, with the true history and with it hidden. Errors
are standard errors over seeds, of the accuracies and of the paired differences.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import synth
import train_tokenizer
from common import flag, parse, positive, run
from data import builtin, digest, unit_features, unit_hits
from metrics import mean_and_error
from tokenizer import Frontend, SpeechTokenizer, load_tokenizer
from train_tokenizer import train

SYSTEMS: dict[str, dict[str, Any]] = {
    "text-only": {"text_only": True},
    "TASTE": {"text_only": False, "quantizer": "rvq", "aggregator": "xattn"},
    "TASLA": {"text_only": False, "quantizer": "fsq", "aggregator": "mlda"},
}
MEASURES = {"accuracy": "true history", "masked_accuracy": "history hidden"}


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("runs/compare"), "all runs, and compare.md")
    bundle: Path = flag(Path("weights/tiny"), "the frozen models: asr, s3, speaker")
    seeds: int = flag(3, "how many; each trains four models")
    text_steps: int = flag(1500, "steps of the common start")
    steps: int = flag(2000, "steps of each system after it")
    utterances: int = flag(8000, "training utterances of the built-in corpus")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}
Accuracies = dict[tuple[str, str], list[float]]  # (system, measure) -> one value per seed


def trained(cfg: train_tokenizer.Config) -> SpeechTokenizer:
    """The model of this run: finished before, gone on with, or new."""
    if (cfg.out / "model.safetensors").exists():
        return load_tokenizer(cfg.out)
    return train(replace(cfg, resume=bool([*cfg.out.glob("step_*")])))


def measure(cfg: Config) -> Accuracies:
    frontend, found = Frontend(cfg.bundle), Accuracies()
    items = builtin(synth.load(n_train=cfg.utterances), "test_voices")
    store = unit_features(items, frontend, digest(items), "units of test_voices")
    for seed in range(cfg.seeds):
        start = cfg.out / f"start_{seed}"
        common = train_tokenizer.Config(
            out=start, bundle=cfg.bundle, text_only=True, text_steps=cfg.text_steps, steps=0,
            utterances=cfg.utterances, seed=seed, threads=cfg.threads, device=cfg.device,
        )  # fmt: skip
        trained(common)
        for name, what in SYSTEMS.items():
            out = cfg.out / f"{name.lower()}_{seed}"
            own = replace(common, out=out, init=start, steps=cfg.steps, **what)
            hits = unit_hits(trained(own), items, store, frontend, own.text_only)
            total = float(hits["total"].sum())
            for kind in MEASURES:
                found.setdefault((name, kind), []).append(float(hits[kind].sum()) / total)
    return found


def table(found: Accuracies) -> str:
    """Markdown: accuracies in per cent, mean ± standard error over seeds, then differences."""
    names = list(SYSTEMS)
    rows = {name: {kind: found[name, kind] for kind in MEASURES} for name in names}
    for a, b in zip(names[1:], names, strict=False):
        gains = {
            k: [x - y for x, y in zip(found[a, k], found[b, k], strict=True)] for k in MEASURES
        }
        rows[f"{a} less {b}"] = gains
    lines = [f"| units right | {' | '.join(MEASURES.values())} |", "| --- " * 3 + "|"]
    for name, row in rows.items():
        cells = (
            "{:.2f} ± {:.2f} %".format(*(100 * x for x in mean_and_error(v))) for v in row.values()
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "seeds", "text_steps", "steps", "utterances", "threads")
    text = table(measure(cfg))
    (cfg.out / "compare.md").write_text(text)
    print(f"\n{cfg.seeds} seeds, {cfg.text_steps} + {cfg.steps} steps\n\n{text}")


if __name__ == "__main__":
    run(main)
