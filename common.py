"""What every script needs and no model: command line, device and process group, seeds, log.

One dataclass is the whole configuration of a script: its fields are the flags, presets are dicts.
"""

import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

Config = TypeVar("Config")
Thing = TypeVar("Thing")
LOST = re.compile(r"(?i)connection (was )?(closed|reset|refused)|remote process exited|NCCL error")
GO_ON = "if another one ended by itself, its message says why; go on with --resume"
Presets = Mapping[str, Mapping[str, Any]]


def flag(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """A field of a script's config: `--name`, with its help and the values that it may take."""
    help = f"{help} (default: {default})".replace("%", "%%")  # argparse formats it once more
    note = {"help": help, "choices": choices and list(choices)}
    return field(default=default, metadata=note)


class OneLineParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As run() ends: one line and exit code 2."""
        print(f"error: {message}; --help shows the flags", file=sys.stderr)
        sys.exit(2)


def parse(
    cls: type[Config], presets: Presets, doc: str | None, argv: list[str] | None = None
) -> Config:
    """Later wins: field defaults, then --preset, then flags. Unknown or ill-typed flags exit 2.

    A field named `wav` is positional. The first preset is the default."""
    parser = OneLineParser(
        description=doc,
        argument_default=SUPPRESS,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    for f in fields(cls):  # type: ignore[arg-type]
        help, choices = f.metadata["help"], f.metadata["choices"]
        name = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(name, help=help, action=BooleanOptionalAction)
        elif f.name == "wav":
            parser.add_argument(f.name, help=help, type=Path, nargs="?", default=None)
        else:
            parser.add_argument(name, help=help, type=f.type, choices=choices)
    flags = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    return cls(**{**presets[flags.pop("preset")], **flags})


def run(main: Callable[[], None]) -> None:
    """Call a script's main; what the user gave us wrongly ends in one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        first, *more = (line.strip() for line in str(e).splitlines() or [""])
        text = "; ".join([first, *more[:3], *([f"and {len(more) - 3} more"] if more[3:] else [])])
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as e:
        if "InvalidCxxCompiler" in str(e):  # torch's own class would take seconds to import
            text = "--compile needs a C++ compiler, and none was found: install g++, or set CXX"
        elif dist.is_initialized() and LOST.search(str(e)):
            text = f"lost a process of this run: {GO_ON}"
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


def positive(cfg: Any, *names: str) -> None:
    """ValueError if one of these numbers of a script's config is below 1."""
    for name in names:
        if getattr(cfg, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(cfg, name)}: wanted at least 1")


def pick_device(name: str = "auto") -> torch.device:
    """auto: cuda, else cpu. A name that this machine lacks is a ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not usable on this machine; try --device cpu") from e
    return torch.device(name)


def place(device: str = "auto") -> tuple[int, int, torch.device]:
    """Which of torchrun's processes this is: (rank, world, device), each with a GPU of its own."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device)
    if world > 1 and chosen.type == "cuda":
        chosen = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    return rank, world, chosen


def setup(device: str = "auto") -> tuple[int, int, torch.device]:
    """As place; under torchrun also join the process group, see finish()."""
    rank, world, chosen = place(device)
    if world > 1:
        signal.signal(signal.SIGTERM, stopped)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return rank, world, chosen


def stopped(signum: int, frame: object) -> NoReturn:
    """torchrun ends all processes as soon as one of them has ended."""
    raise OSError(f"stopped ({signal.Signals(signum).name}): {GO_ON}")


@contextmanager
def one_by_one(rank: int) -> Iterator[None]:
    """Process 0 first, then all the others: it writes the files that they would write, too."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and dist.is_initialized():
        dist.barrier()


def finish() -> None:
    """Wait for every rank, then leave the group: a rank that leaves early can fail the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def seed_step(seed: int, step: int, rank: int = 0, world: int = 1) -> None:
    """All randomness of a step follows from (seed, step, rank): a resumed run equals an
    uninterrupted one to the bit, with no RNG state in the checkpoint."""
    torch.manual_seed(seed + 10**6 * (step * world + rank))


def cosine(step: int, steps: int, peak: float, warmup: int, floor: float = 0.03) -> float:
    """Rate at step 1 .. steps: linear warm-up to `peak`, then half a cosine to floor * peak."""
    if step <= warmup:
        return peak * step / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))


class Log:
    """One line per logged step on the screen, with the time left, and the same in run/log.jsonl."""

    def __init__(
        self,
        run: Path,
        name: str,
        steps: int,
        first: int = 0,
        quiet: bool = False,
        board: bool = False,
    ) -> None:
        """first: the step that was done already. quiet: a process that does not write. board: for
        TensorBoard, too, if it is installed."""
        self.run, self.name, self.steps, self.first, self.quiet = run, name, steps, first, quiet
        self.board = open_board(run) if board and not quiet else None
        self.start = time.monotonic()
        run.mkdir(parents=True, exist_ok=True)

    def row(self, step: int, **values: float | torch.Tensor) -> None:
        """Tensors are read here, and only here: reading one waits for the GPU."""
        if self.quiet:
            return
        plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        spent = time.monotonic() - self.start
        left = spent / max(1, step - self.first) * (self.steps - step)
        text = " | ".join(f"{k} {v:.4g}" for k, v in plain.items())
        print(f"{self.name} {step}/{self.steps} | {text} | {clock(left)} left", flush=True)
        with open(self.run / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **plain, "seconds": round(spent, 2)}) + "\n")
        if self.board is not None:
            for key, value in plain.items():
                self.board.add_scalar(key, value, step)


def open_board(run: Path) -> Any:
    """What writes event files into `run`, or None without TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run))


def progress(what: str, things: Sequence[Thing]) -> Iterator[Thing]:
    """Yield them; a line every 5 s says how far and how long still."""
    start = last = time.monotonic()
    for i, thing in enumerate(things, 1):
        yield thing
        if (now := time.monotonic()) - last > 5:
            left = (now - start) / i * (len(things) - i)
            print(f"{what}: {i}/{len(things)} | {clock(left)} left", flush=True)
            last = now


def clock(seconds: float) -> str:
    """75.2 -> '1:15'"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
