"""Where each stage stands: our time, that of what one would pick instead, the machine's limit.

    python bench.py                                      all stages at full size, random weights
    python bench.py --stage decode,rvq --preset small    some of them, smaller
    python bench.py --stage encoder --bf16 --compile     ours in bf16, compiled; the peer as before
    python bench.py --stage train --count                a training step, see bench_train.py

Both sides share their weights, must agree on the same input before anything is timed, and then run
in turn: ratio = peer / ours of each pair, above 1 where we are faster; its median and quartiles.
floor = max(operations / rate of a large matrix product, bytes read / rate of reading), both rates
measured in the same process. Memory is that of the weights, and what one call takes beside them.
Each stage runs in a process of its own and replaces its lines in benchmarks/DEVICE_PRESET.json and
.md: what other runs found there stays. Without --peers, or where one is missing, we run alone.
"""

import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench_train
import cpu_linear
import loop
from bench_case import SIZES, Case, Sizes, Stage, size, taken, timed, wait
from bench_stages import STAGES
from common import flag, parse, pick_device, positive, run
from pipeline import compile_steps, ready
from weights import read_json, write_atomic

ROOT = Path(__file__).parent
ENOUGH_S = 2.0  # quick stages repeat their pairs for so long
WARM = 3  # calls of what is compiled, before it is timed
MOST = 50  # but not more often
ALL = (*STAGES, "sample")  # `train` has to be asked for: at full size it is one for a GPU
Row = dict[str, Any]


@dataclass(frozen=True)
class Config(bench_train.Steps):
    stage: str = flag("all", f"all, or some of {','.join(ALL)},train")
    peers: bool = flag(True, "run the peers, too")
    pairs: int = flag(3, "runs of each side, at least")
    out: Path = flag(ROOT / "benchmarks", "folder of the results")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")
    size: str = flag("full", "set by --preset", choices=SIZES)
    bf16: bool = flag(False, "our large matrices in bf16; then sides are not compared")
    compile: bool = flag(False, "compile what we repeat")
    items: int = flag(1, "recordings that the encoder hears at once")


PRESETS: dict[str, dict[str, Any]] = {name: {"size": name} for name in SIZES}


# --- the machine ---------------------------------------------------------------------------------


def read_rate(device: torch.device, seconds: float = 1.0) -> float:
    """Bytes a second of the best of some sums over a large tensor."""
    x, best, end = torch.ones(2**27, device=device), 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        start = wait(device)
        x.sum()
        best = max(best, 4 * len(x) / (wait(device) - start))
    return best


def machine(device: torch.device) -> str:
    """In words."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}"


# --- one line ------------------------------------------------------------------------------------


def first_call(case: Case, device: torch.device) -> tuple[Tensor, int, float]:
    """The answer, the operations, and the bytes that the call takes beside what is there."""
    with cpu_linear.counter() as counted:
        torch.ones(1).double().sum()  # the counter takes its own memory at the first operation
        out, most = taken(case.ours, device)
    return out, counted.get_total_flops(), most


def agree(case: Case, ours: Tensor, theirs: Tensor) -> None:
    """ValueError: the two sides do not compute the same."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{case.what}: we give {[*ours.shape]}, the peer {[*theirs.shape]}")
    if ours.is_floating_point():
        error = float((ours - theirs).abs().max() / theirs.abs().max())
    else:
        error = float((ours != theirs).float().mean())
    if not error <= case.tolerance:
        raise ValueError(f"{case.what}: differs from {case.peer_name} by {error:.1g}; not timed")


def halved(case: Case, device: torch.device) -> Case:
    """Ours in bf16, in which another token may soon be the best one: the sides are not compared."""
    before, after = size(case.model), size(ready(case.model, bf16=True))
    if after == before:  # nothing of it may be
        return case
    ours, reads = (
        torch.autocast(device.type, torch.bfloat16)(case.ours),
        case.reads * after // before,
    )
    what, dtype = f"{case.what}, bf16", torch.bfloat16
    return replace(case, what=what, ours=ours, reads=reads, dtype=dtype, tolerance=math.inf)


def measure(case: Case, device: torch.device, least: int, compiled: bool = False) -> Row:
    """One line of the table."""
    with torch.set_grad_enabled(case.model.training):
        out, operations, memory = first_call(case, device)
        if case.peer is not None:
            agree(case, out, case.peer())
        if compiled:
            compile_steps(case.model)
            case = replace(case, what=f"{case.what}, compiled")
            for _ in range(WARM):
                agree(case, case.ours(), out)
        ours: list[float] = []
        theirs: list[float] = []
        start = time.monotonic()
        while len(ours) < least or (time.monotonic() - start < ENOUGH_S and len(ours) < MOST):
            ours.append(timed(case.ours, device))
            if case.peer is not None:
                theirs.append(timed(case.peer, device) / case.peer_share)
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, ratio, high = [None] * 3
    if theirs:
        pairs = zip(ours, theirs, strict=True)
        ratios = torch.tensor([b / a for a, b in pairs], dtype=torch.float64)
        low, ratio, high = ratios.quantile(at).tolist()
    floor = max(operations / loop.ceiling(device, case.dtype), case.reads / read_rate(device))
    spent = float(torch.tensor(ours).median())
    return {
        "what": case.what,
        "ours, s": spent,
        "peer": case.peer_name or "none",
        "peer, s": float(torch.tensor(theirs).median()) if theirs else None,
        "ratio": ratio,
        "25 %": low,
        "75 %": high,
        "pairs": len(ours),
        "floor, s": floor,
        "floor / ours": floor / spent,
        "weights, GB": size(case.model) / 1e9,
        "call, GB": memory / 1e9,
    }


# --- stages --------------------------------------------------------------------------------------


def compare(stage: Stage, sizes: Sizes, device: torch.device, cfg: Config) -> Row:
    torch.manual_seed(0)
    try:
        case, absent = stage(sizes, device, cfg.peers), {}
    except ModuleNotFoundError as e:
        print(f"{e.name} is not installed: pip install -r requirements-dev.txt")
        case, absent = stage(sizes, device, False), {"peer": f"{e.name}: absent"}
    if cfg.bf16:
        case = halved(case, device)
    else:
        cpu_linear.quicken(case.model)
    return measure(case, device, cfg.pairs, cfg.compile) | absent


def sample(cfg: Config) -> Row:
    """From the start of the process to a finished wav; the tiny bundle, whatever the preset."""
    words = "sample.py", "weights/tiny/prompt.wav"
    with tempfile.TemporaryDirectory() as folder:
        process("-c", "import sample")  # the disk's cache is warm for both
        imports, _ = process("-c", "import sample")
        flags = "--out", f"{folder}/a.wav", "--threads", str(cfg.threads), "--device", cfg.device
        whole, said = process(*words, *flags)
    rate = re.search(r"([\d.]+) x real time", said)
    return {
        "what": f"python {' '.join(words)}",
        "start and imports, s": imports,
        "whole process, s": whole,
        "x real time, loaded": float(rate[1]) if rate else None,
    }


def process(*argv: str) -> tuple[float, str]:
    """Python with these arguments -> seconds, what it printed. ValueError: it failed."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"python {' '.join(argv)} failed: {done.stderr.strip()[-300:]}")
    return time.monotonic() - start, done.stdout


def rows(name: str, cfg: Config, device: torch.device) -> list[Row]:
    """What one stage has to say."""
    if name == "sample":
        return [sample(cfg)]
    if name == "train":
        kinds = {"eager": False, "compiled": True}
        if device.type == "cpu" and not cfg.compile:  # it is for a GPU
            del kinds["compiled"]
        found = [{"what": k, **bench_train.timed(cfg, c, device)} for k, c in kinds.items()]
        return [{"training step": cfg.model, **row} for row in found]
    sizes = replace(SIZES[cfg.size], recordings=cfg.items)
    return [compare(stage, sizes, device, cfg) for stage in STAGES[name]]


# --- the report ----------------------------------------------------------------------------------


def text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def table(lines: list[Row]) -> list[str]:
    head = [*lines[0]]
    cells = [[text(line[key]) for key in head] for line in lines]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


def markdown(found: dict[str, Any]) -> str:
    """{stage: rows and how they were found} -> tables, one for all stages with the same columns."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    runs: dict[str, list[str]] = {}
    for name, part in found.items():
        for row in part["rows"]:
            tables.setdefault(tuple(row), []).append({"stage": name, **row})
        runs.setdefault(f"{part['machine']}, {part['date']}", []).append(f"`{part['command']}`")
    body = [line for lines in tables.values() for line in [*table(lines), ""]]
    made = [f"{machine}: {', '.join(dict.fromkeys(names))}  " for machine, names in runs.items()]
    return "\n".join(["# Where each stage stands", "", *body, *made, ""])


def keep(cfg: Config, name: str, device: torch.device, new: list[Row]) -> None:
    """Put the lines of one stage in the place of its old ones."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    how = [name for name in ("bf16", "compile") if getattr(cfg, name)]
    path = cfg.out / f"{'_'.join([device.type, cfg.size, *how])}.json"
    found = read_json(path) if path.exists() else {}
    flags = " ".join([f" --preset {cfg.size} --threads {cfg.threads}", *(f"--{x}" for x in how)])
    flags += f" --items {cfg.items}" if cfg.items > 1 else ""
    command = f"python bench.py --stage {name}{flags}"
    about = {"machine": machine(device), "date": str(date.today()), "command": command}
    found[name] = {"rows": new, **about}
    found = {k: found[k] for k in (*ALL, "train") if k in found}
    write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())
    write_atomic(path.with_suffix(".md"), markdown(found).encode())


def chosen(cfg: Config) -> list[str]:
    """The stages of --stage; ValueError for one that does not exist."""
    names = [*ALL] if cfg.stage == "all" else cfg.stage.split(",")
    if odd := [x for x in names if x not in (*ALL, "train")]:
        raise ValueError(f"--stage {','.join(odd)}: wanted all, or some of {', '.join(ALL)}, train")
    return names


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "steps", "frames", "threads", "pairs", "items")
    if cfg.count:
        bench_train.count(cfg)
        return
    device, names = pick_device(cfg.device), chosen(cfg)
    if len(names) > 1:
        command = [sys.executable, __file__, *sys.argv[1:], "--stage"]
        failed = [x for x in names if subprocess.run([*command, x]).returncode]
        if failed:
            raise ValueError(f"no figures for {', '.join(failed)}: see above")
        return
    torch.set_num_threads(cfg.threads)
    new = rows(names[0], cfg, device)
    keep(cfg, names[0], device, new)
    print("\n".join(table([{"stage": names[0], **row} for row in new])), flush=True)


if __name__ == "__main__":
    run(main)
