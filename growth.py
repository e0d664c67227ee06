"""How the cost of speaking grows: seconds and memory of the tiny bundle, against

    python growth.py --only prompt    its length, 1 s to 3 min: transcribe and encode
    python growth.py --only words     that are generated, 8 to 512: reply, then speak
    python growth.py --only batch     of prompts, 1 to 32, each continued by 8 words: reply, speak
    python growth.py                  all three

`power`: the p of time ~ size^p between a row and the one above; 1 is linear. Memory is what
a call takes beside the weights, at most. Tables and a picture go to benchmarks/growth*.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import audio
from bench_case import taken, timed
from common import flag, parse, pick_device, positive, run
from pipeline import RATE, SAMPLING, Pipeline
from weights import write_atomic

SECONDS = (1, 2, 5, 10, 30, 60, 180)
WORDS = (8, 16, 32, 64, 128, 256, 512)
BATCH = (1, 2, 4, 8, 16, 32)
Row = dict[str, float | str]
Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class Config:
    only: str = flag("all", "which part", ("all", "prompt", "words", "batch"))
    most: int = flag(512, "seconds, words or prompts at most")
    repeat: int = flag(3, "runs of each call; the median counts")
    bundle: Path = flag(Path("weights/tiny"), "all models, see train_tiny.py")
    out: Path = flag(Path("benchmarks"), "folder of the results")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


# --- one call ------------------------------------------------------------------------------------


def measure(call: Callable[[], Any], device: torch.device, repeat: int) -> tuple[float, float]:
    """-> seconds, the median after a first run, and the most MB that this one took."""
    _, most = taken(call, device)
    spent = [timed(call, device) for _ in range(repeat)]
    return sorted(spent)[repeat // 2], most / 1e6


# --- growth --------------------------------------------------------------------------------------


def prompts(cfg: Config, pipeline: Pipeline) -> list[Row]:
    wav, rows = audio.read(cfg.bundle / "prompt.wav", RATE), list[Row]()
    for length in (s for s in SECONDS if s <= cfg.most):
        heard = wav.repeat(math.ceil(length * RATE / len(wav)))[: length * RATE]

        def hear(heard: Tensor = heard) -> None:
            pipeline.encode(heard, pipeline.transcribe(heard))

        spent, memory = measure(hear, pipeline.device, cfg.repeat)
        rows.append({"prompt, s": length, "hear, s": spent, "MB": memory})
    return rows


def answers(cfg: Config, pipeline: Pipeline, words: int, batch: int) -> Row:
    """`batch` times the prompt of the bundle, each continued by `words` words."""
    wav = audio.read(cfg.bundle / "prompt.wav", RATE)
    speech = pipeline.encode(wav, pipeline.transcribe(wav))

    def reply() -> list[Any]:
        rngs = [torch.Generator(pipeline.device).manual_seed(seed) for seed in range(batch)]
        given = [speech] * batch, words, SAMPLING, [speech.voice] * batch
        return [new for new, _ in pipeline.reply_all(*given, rngs)]

    said = reply()
    lm, lm_memory = measure(reply, pipeline.device, cfg.repeat)
    rng = torch.Generator(pipeline.device)
    speak = partial(pipeline.speak_all, said, rng.manual_seed(0))
    sound, memory = measure(speak, pipeline.device, cfg.repeat)
    made = sum(len(new.words) for new in said)
    row = {"words": made, "reply, s": lm, "reply, MB": lm_memory}
    return {"prompts": batch, **row, "speak, s": sound, "speak, MB": memory}


def powers(rows: list[Row], size: str) -> list[Row]:
    """The rows, with the exponent of each time from one to the next."""
    out = [dict(row) for row in rows]
    for last, row in pairwise(out):
        grown = math.log(float(row[size]) / float(last[size]))
        for key in [key for key in row if key.endswith(", s") and key != size and grown]:
            row[f"{key[:-3]} power"] = math.log(float(row[key]) / float(last[key])) / grown
    return out


def growth(cfg: Config) -> Tables:
    path = cfg.bundle / "tokenizer", cfg.bundle / "spoken_lm"
    pipeline, out = Pipeline(cfg.bundle, *path, device=str(pick_device(cfg.device))), Tables()
    if cfg.only in ("all", "prompt"):
        out["prompt"] = powers(prompts(cfg, pipeline), "prompt, s")
    if cfg.only in ("all", "words"):
        sizes = [n for n in WORDS if n <= cfg.most]
        out["words"] = powers([answers(cfg, pipeline, n, 1) for n in sizes], "words")
    if cfg.only in ("all", "batch"):
        sizes = [n for n in BATCH if n <= cfg.most]
        out["batch"] = powers([answers(cfg, pipeline, 8, n) for n in sizes], "prompts")
    return out


# --- results -------------------------------------------------------------------------------------


def markdown(title: str, rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        shown = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return f"**{title}**\n\n" + "\n".join(lines) + "\n"


def draw(tables: Tables, path: Path) -> None:
    """Seconds against size, both logarithmic; dotted: what linear would be."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(5 * len(tables), 4), squeeze=False)
    for axis, (name, rows) in zip(axes[0], tables.items(), strict=True):
        size = {"prompt": "prompt, s", "batch": "prompts"}.get(name, name)
        x = [float(row[size]) for row in rows]
        for key in [key for key in rows[0] if key.endswith(", s") and key != size]:
            y = [float(row[key]) for row in rows]
            (line,) = axis.loglog(x, y, marker="o", label=key[:-3])
            axis.loglog(x, [y[-1] * a / x[-1] for a in x], ":", color=line.get_color(), alpha=0.5)
        axis.set(xlabel=size, ylabel="s", title=name)
        axis.set_xticks(x, [f"{a:g}" for a in x])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "repeat", "threads")
    torch.set_num_threads(cfg.threads)
    if cfg.most < WORDS[0]:
        raise ValueError(f"--most {cfg.most}: wanted {WORDS[0]} or more")
    tables = growth(cfg)
    name = "growth" if cfg.only == "all" else f"growth_{cfg.only}"
    text = "\n".join(markdown(*table) for table in tables.items())
    print(text)
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_atomic(cfg.out / f"{name}.md", text.encode())
    found = {"config": {k: str(v) for k, v in vars(cfg).items()}, "tables": tables}
    write_atomic(cfg.out / f"{name}.json", (json.dumps(found, indent=2) + "\n").encode())
    draw(tables, cfg.out / f"{name}.png")
    print(f"written to {cfg.out / name}.*")


if __name__ == "__main__":
    run(main)
