"""What surrounds a training step, alike in both scripts: recipe, processes, speed, checkpoints.

    step = micro-batches 0 .. n-1 of one recipe; process r of w takes r, r + w, ...
    gradient = mean over all n, added up in each process, averaged once over the processes (DDP)
    lr(s), cosine:  warm-up to the peak, then half a cosine        TASTE-SpokenLM, scripts/run.py
    lr(s), root:    peak min(s / w, (w / s)^1/2)                   its STAGE1_TRAIN, and TASLA

All that is random in a micro-batch follows from (seed, step, its number), so one process, eight,
or one that was killed and resumed see the same numbers, up to the order of a sum. A changed number
of processes is no change of recipe. MFU: floating-point operations of the step, counted once, by
time and by what a large matrix product reaches on the same device.
"""

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cpu_linear
import llm
import unit_decoder
import whisper_dec
from common import cosine, flag, positive
from weights import first_step, read_json, save_checkpoint, steps_of

In = TypeVar("In")
Out = TypeVar("Out")
BLOCKS = (unit_decoder.Block, whisper_dec.Block, llm.Layer)  # compiled, or recomputed, one by one
SAME = ("seed", "batch", "frames", "micro", "utterances", "data")  # of a run and its resumption
CEILING = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}  # matrices to time


@dataclass(frozen=True)
class Recipe:
    """The flags that both training scripts have."""

    out: Path = flag(Path("runs/new"), "checkpoints, log.jsonl, curve.png, the finished model")
    bundle: Path = flag(Path("weights/tiny"), "the frozen models: asr, s3, speaker, lm")
    data: Path = flag(Path(), "features of prepare.py to train on; none: the built-in corpus")
    dev: Path = flag(Path(), "features to evaluate on, with --data")
    utterances: int = flag(2000, "training utterances of the built-in corpus")
    epochs: bool = flag(False, "count --steps in epochs")
    batch: int = flag(16, "utterances in a micro-batch")
    frames: int = flag(0, "mel frames in a micro-batch, padding included, instead of --batch")
    micro: int = flag(1, "micro-batches in a step, shared out to all processes")
    optimizer: str = flag("adamw", "which", choices=("adamw", "adam"))
    lr: float = flag(1e-3, "peak learning rate")
    schedule: str = flag("cosine", "of the learning rate", choices=("cosine", "root"))
    warmup: int = flag(100, "steps of linear warm-up")
    floor: float = flag(0.0, "where the cosine ends, as a share of the peak")
    beta2: float = flag(0.98, "decay of the squared gradients")
    weight_decay: float = flag(0.01, "of AdamW")
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "weights, batches and dropout follow from (seed, step, micro-batch)")
    log_every: int = flag(50, "steps between two lines of the log")
    save_every: int = flag(200, "steps between two checkpoints")
    eval_every: int = flag(0, "steps between two evaluations; 0: at the end")
    keep: int = flag(2, "how many checkpoints stay")
    threads: int = flag(2, "CPU threads of each process")
    ahead: int = flag(0, "micro-batches of --data that are read ahead")
    bf16: bool = flag(True, "bf16 autocast; quantizer and losses stay in fp32")
    compile: bool = flag(False, "compile the transformer blocks")
    recompute: bool = flag(False, "keep no activations inside blocks: less memory, more time")
    mfu: bool = flag(False, "measure the device first, and log MFU")
    device: str = flag("auto", "auto, cpu or cuda; a GPU for each process of torchrun")
    resume: bool = flag(False, "go on from the newest checkpoint under --out")


def check(cfg: Recipe, world: int) -> None:
    """ValueError: numbers that no run can have."""
    names = ("utterances", "batch", "micro", "save_every", "log_every", "keep", "threads")
    positive(cfg, *names, *(["warmup"] if cfg.schedule == "root" else []))
    if cfg.micro % world:
        raise ValueError(f"--micro {cfg.micro}: wanted a multiple of the {world} processes")
    if (cfg.data == Path()) != (cfg.dev == Path()):
        raise ValueError("--data and --dev belong together: features to train and to evaluate on")
    if cfg.data == Path() and (cfg.frames or cfg.ahead):
        raise ValueError("--frames and --ahead are for prepared features: give --data and --dev")


# --- optimization --------------------------------------------------------------------------------


def optimizer(
    cfg: Recipe, params: Iterable[nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, or Adam, whose weight decay is none; on a GPU as one kernel."""
    betas, fused = (0.9, cfg.beta2), device.type == "cuda"
    if cfg.optimizer == "adam":
        return torch.optim.Adam(params, betas=betas, fused=fused)
    return torch.optim.AdamW(params, betas=betas, weight_decay=cfg.weight_decay, fused=fused)


def set_rate(cfg: Recipe, opt: torch.optim.Optimizer, step: int, steps: int) -> float:
    """The rate of step 1 .. steps of a phase, also put into the optimizer."""
    if cfg.schedule == "root":
        rate = cfg.lr * min(step / cfg.warmup, math.sqrt(cfg.warmup / step))
    else:
        rate = cosine(step, steps, cfg.lr, cfg.warmup, cfg.floor)
    for group in opt.param_groups:
        group["lr"] = rate
    return rate


# --- processes -----------------------------------------------------------------------------------


def parallel(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """The model, or what keeps its gradients alike in all processes. To be made anew when other
    parameters are trained."""
    if world == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def shard(model: nn.Module, world: int, device: torch.device) -> None:
    """FSDP2, in place: of the frozen weights of each block a process keeps its share, and borrows
    the others' while the block runs. So every process has to run it as often. What is trained stays
    whole, and the business of `parallel`."""
    mesh = init_device_mesh(device.type, (world,))
    for block in (m for m in model.modules() if isinstance(m, BLOCKS)):
        trained = {p for p in block.parameters() if p.requires_grad}
        fully_shard(block, mesh=mesh, ignored_params=trained)
    split = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, split)


def share(net: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around one micro-batch: only after the last one do the processes exchange gradients."""
    return nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()


def total(values: Mapping[str, Tensor], world: int) -> dict[str, float]:
    """Sums over the processes."""
    summed = torch.stack([v.detach().double() for v in values.values()])
    if world > 1:
        dist.all_reduce(summed)
    return dict(zip(values, summed.tolist(), strict=True))


def read_ahead(
    load: Callable[[In], Out], order: Iterable[In], depth: int, threads: int
) -> Generator[Out, None, None]:
    """load(x) for x in order; `depth` of them in advance, by a thread. 0: when they are asked for,
    so that `load` may draw random numbers."""
    if not depth:
        yield from map(load, order)
        return
    with ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (threads,)) as pool:
        waiting = deque[Any]()
        try:
            for x in order:
                waiting.append(pool.submit(load, x))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# --- speed ---------------------------------------------------------------------------------------


def speed_up(cfg: Recipe, model: nn.Module) -> None:
    """--recompute and --compile, block by block: the blocks of a stack share their graphs, and
    what decides by values (words, masks) stays outside. What is not compiled is quickened."""
    if not cfg.compile:
        cpu_linear.quicken(model)
    for block in (m for m in model.modules() if isinstance(m, BLOCKS)):
        if cfg.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if cfg.compile:
            block.compile(dynamic=True)


def graphs() -> int:
    """Graphs compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def flops(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Floating-point operations of forward() and of its loss' gradient; in eval mode, so that
    nothing changes by it."""
    training = model.training
    model.eval()
    with cpu_linear.counter() as counted:
        forward().loss.backward()
    model.zero_grad()
    model.train(training)
    return counted.get_total_flops()


def ceiling(device: torch.device, dtype: torch.dtype | None = None, seconds: float = 1.0) -> float:
    """Operations a second of the best of some large matrix products on this device."""
    n, usual = CEILING[device.type]
    a, best, end = (
        torch.ones(n, n, dtype=dtype or usual, device=device),
        0.0,
        time.monotonic() + seconds,
    )
    while time.monotonic() < end:
        start = time.monotonic()
        with torch.no_grad():
            for _ in range(10):
                cpu_linear.linear(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 10 * 2 * n**3 / (time.monotonic() - start))
    return best


class Meter:
    """What is added up between two lines of the log."""

    def __init__(self, world: int, device: torch.device, what: str = "units_s") -> None:
        """what: is counted, for the rate."""
        self.world, self.device, self.what, self.mfu_per_unit_s = world, device, what, 0.0
        self.sums: dict[str, Tensor] = {}
        self.start = time.monotonic()

    def measure(self, model: nn.Module, units: Tensor, forward: Callable[[], Any]) -> None:
        """Log MFU from now on; forward: a typical micro-batch with so many units."""
        self.mfu_per_unit_s = flops(model, forward) / int(units) / ceiling(self.device)

    def add(self, count: Tensor, **values: Tensor) -> None:
        """Of one micro-batch, on the device; nothing waits for it."""
        for name, value in {"n": torch.ones_like(count), "count": count, **values}.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def row(self) -> dict[str, float]:
        """Means over all micro-batches of all processes, counts per second. Starts anew."""
        found = total(self.sums, self.world)
        n, rate = found.pop("n"), found.pop("count") / (time.monotonic() - self.start)
        found = {name: value / n for name, value in found.items()} | {self.what: rate}
        if self.mfu_per_unit_s:
            found["mfu"] = rate / self.world * self.mfu_per_unit_s
        self.sums, self.start = {}, time.monotonic()
        return found | {"memory_gb": peak_memory(self.device) / 1e9}

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Evaluations and checkpoints do not count as training time."""
        before = time.monotonic()
        yield
        self.start += time.monotonic() - before


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- checkpoints ---------------------------------------------------------------------------------


class Run:
    """The checkpoints of a run, and the best value of its evaluations so far."""

    def __init__(self, cfg: Recipe, state: Mapping[str, Any], rank: int) -> None:
        """state: what a checkpoint holds, see save_checkpoint. Loads it if --resume is given.

        ValueError: a run of another recipe, or a new one in the place of another."""
        self.cfg, self.state, self.rank = cfg, state, rank
        self.best: float | None = None
        if cfg.resume and (steps := steps_of(cfg.out)):
            meta = read_json(steps[-1] / "meta.json")
            self.best = meta.get("best")
            theirs = meta.get("config", {})
            for name in SAME:
                if str(theirs.get(name)) != str(getattr(cfg, name)):
                    raise ValueError(
                        f"--{name} {getattr(cfg, name)}: the run to resume has {theirs.get(name)}"
                    )
        self.first = first_step(cfg.out, state, cfg.resume)
        if self.first and rank == 0:
            print(f"resumed after step {self.first}", flush=True)

    def save(self, step: int) -> None:
        if self.rank == 0:
            meta = {"step": step, "best": self.best, "config": vars(self.cfg)}
            save_checkpoint(self.cfg.out, self.state, meta, self.cfg.keep)

    def improved(self, value: float) -> bool:
        """The best evaluation so far? The first is."""
        if self.best is not None and value <= self.best:
            return False
        self.best = value
        return True


def curve(run: Path) -> Path:
    """run/log.jsonl -> run/curve.png: every column over the steps. A step that was logged twice,
    because a killed run went on, counts once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns: dict[str, dict[int, float]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in row.keys() - {"step", "seconds"}:
            columns.setdefault(name, {})[row["step"]] = row[name]
    across = 3
    down = -(-len(columns) // across)
    size = (4 * across, 2.5 * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, layout="tight")
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, (name, points) in zip(axes.flat, sorted(columns.items()), strict=False):
        steps = sorted(points)
        axis.plot(steps, [points[step] for step in steps], ".-", markersize=3)
        axis.set_title(name)
        axis.set_xlabel("step")
    figure.savefig(run / "curve.png")
    pyplot.close(figure)
    return run / "curve.png"
