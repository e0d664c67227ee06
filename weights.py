"""Model folders, strict loading and atomic checkpoints.

    folder/config.json + folder/model.safetensors      a model, ours or public (single or sharded)
    run/step_000500/{model.safetensors, optimizer.pt, meta.json}                  a checkpoint

Weights enter one to one or not at all: every tensor of a file has exactly one place in the model
and every place is filled; else one error lists all differences and the model is untouched. A name
table maps public names to ours: {regex of the public name: our name}, see NAMES in the stages.

Files are memory-mapped, and a model on the meta device takes the tensors as they are: no copy is
made, and the disk is read when a weight is first used.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)
Names = Mapping[str, str]
DAMAGED = (  # what safetensors and torch.load raise for files of another kind, or cut short
    SafetensorError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, RuntimeError,
    EOFError, OSError, ValueError, TypeError, AttributeError, LookupError, AssertionError,
)  # fmt: skip
LARGE = (nn.Linear, nn.Conv1d, nn.Embedding)  # what halve() rounds
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder; also with .index.json


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, a model folder (also sharded), or a .pt/.pth/.bin pickle.

    Pickles are read with weights_only=True: they can hold tensors, never code; OpenAI's hold them
    one level down, beside the sizes. A file of another kind, or without tensors: ValueError."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file; see README.md on where to get it")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 cannot be
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            state = state.get("model_state_dict", state)
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    except DAMAGED as e:
        raise ValueError(f"{path}: damaged or not a weight file ({reason(e)})") from e
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; it has {sorted(map(str, state))[:5]}")
    return tensors


def reason(error: Exception) -> str:
    """Its first sentence: what follows is advice, and torch's is dangerous for pickles."""
    return re.split(r"\.\s|\n", str(error))[0]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder. Shards must hold what their index says, nothing else."""
    for name in MODEL_FILES:
        if (index := folder / f"{name}.index.json").exists():
            return read_shards(index, read_json(index, "weight_map"))
        if (folder / name).exists():
            return read_tensors(folder / name)
    return read_tensors(folder / MODEL_FILES[0])  # which says that it is not there


def read_shards(index: Path, where: Mapping[str, Any]) -> dict[str, Tensor]:
    """where: {tensor: file beside the index}"""
    if odd := [x for x in where.values() if not isinstance(x, str) or Path(x).name != x]:
        raise ValueError(f"{index}: {odd[0]!r} is no name of a file in this folder")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in sorted(set(where.values())):
        part, named = read_tensors(index.with_name(shard)), {k for k in where if where[k] == shard}
        problems += [f"{k}: in the index, not in {shard}" for k in named - part.keys()]
        problems += [f"{k}: in {shard}, the index has it elsewhere" for k in part.keys() - named]
        tensors |= part
    if problems:
        raise ValueError(f"{index}: {len(problems)} problems\n  " + "\n  ".join(sorted(problems)))
    return tensors


def match(
    tensors: Mapping[str, Tensor], names: Names, skip: Iterable[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Public names -> ours, and a line on each tensor that has no place, for load_strict to report.

    Each must match exactly one row of `names`, to which no other came, or else one of `skip`."""
    ours: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors.items():
        keys = [re.sub(row, new, name) for row, new in names.items() if re.fullmatch(row, name)]
        if len(keys) == 1 and keys[0] not in ours:
            ours[keys[0]] = tensor
        elif keys or not any(re.fullmatch(row, name) for row in skip):
            problems.append(f"{name}: maps to {keys or 'nothing'}, expected one free name")
    return ours, problems


def rename(
    tensors: Mapping[str, Tensor], names: Names, skip: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Public names -> ours, or ValueError that names all tensors without a place: see match."""
    ours, problems = match(tensors, names, skip)
    if problems:
        raise ValueError(f"{len(problems)} unknown tensors\n  " + "\n  ".join(sorted(problems)))
    return ours


def load_strict(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str = "weights",
    problems: Iterable[str] = (),
) -> None:
    """Fill `model` from `tensors` (our names), or raise ValueError that names every difference,
    the `problems` of match among them.

    The model keeps its dtype, or, where it lies on the meta device, takes the tensors themselves
    in theirs."""
    ours, problems = model.state_dict(), [*problems]
    problems += [f"{k}: in the file, not in the model" for k in tensors.keys() - ours.keys()]
    problems += [f"{k}: in the model, not in the file" for k in ours.keys() - tensors.keys()]
    for k in ours.keys() & tensors.keys():
        a, b = tensors[k], ours[k]
        if a.shape != b.shape:
            problems.append(f"{k}: {[*a.shape]} in the file, {[*b.shape]} here")
        if a.dtype not in (FLOATS if b.is_floating_point() else INTS):
            problems.append(f"{k}: {a.dtype} in the file, {b.dtype} here")
    if problems:
        raise ValueError(f"{what}: {len(problems)} problems\n  " + "\n  ".join(sorted(problems)))
    model.load_state_dict(tensors, assign=any(v.is_meta for v in ours.values()))


def read_config(folder: Path, key: str = "") -> dict[str, Any]:
    """config.json of a model folder; with `key`, that entry of it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a model is a folder with config.json in it")
    return read_json(path, key)


def read_json(path: Path, key: str = "") -> dict[str, Any]:
    """The object in a JSON file; with `key`, the object that it has under that key."""
    try:
        config = json.loads(path.read_text())
        config = config[key] if key else config
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: damaged or from another program ({e!r})") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, wanted a JSON object")
    return config


def as_config(cls: type[Config], values: Mapping[str, Any], what: str = "config.json") -> Config:
    """A config dataclass from JSON values (lists become tuples); odd or missing keys are errors.

    "source", where a converted model came from, is for the reader."""
    values = {k: v for k, v in values.items() if k != "source"}
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if values.keys() != fields:
        odd = sorted(values.keys() ^ fields)
        raise ValueError(
            f"{what}: keys {odd} do not fit {cls.__name__}, which has {sorted(fields)}"
        )
    return cls(**{k: frozen(v) for k, v in values.items()})


def frozen(value: Any) -> Any:
    """Lists, also nested ones, become the tuples that they were before JSON."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def save_model(
    folder: Path, model: nn.Module, config: Any, dtype: torch.dtype | None = None, **extra: Any
) -> None:
    """Write folder/{config.json, model.safetensors}; `dtype` rounds the floating tensors.

    config: the model's dataclass, or a dict of several; `extra` goes into config.json beside it."""
    values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", (json.dumps(values | extra, indent=2) + "\n").encode())
    save_file(state, folder / ".partial.safetensors")
    os.replace(folder / ".partial.safetensors", folder / "model.safetensors")


def load_model(model: Model, folder: Path) -> Model:
    """Fill `model` (which keeps its dtype) from a folder that save_model wrote; in eval mode."""
    load_strict(model, read_tensors(folder), str(folder))
    return model.eval()


def halve(model: Model, kinds: tuple[type[nn.Module], ...]) -> Model:
    """The model itself, to be run under torch.autocast: the linear layers, convolutions and
    embeddings of its modules of these kinds in bf16, all else in fp32.

    Half the memory; what is stored in bf16 stays memory-mapped."""
    parts = (module for module in model.modules() if isinstance(module, kinds))
    large = {x for part in parts for x in part.modules() if isinstance(x, LARGE)}
    for layer in model.modules():
        dtype = torch.bfloat16 if layer in large else torch.float32
        for name, p in [*layer.named_parameters(recurse=False)]:
            if p.dtype != dtype:
                setattr(layer, name, nn.Parameter(p.to(dtype), p.requires_grad))
        for name, x in [*layer.named_buffers(recurse=False)]:
            setattr(layer, name, x.to(dtype) if x.is_floating_point() else x)
    return model


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")
    partial.write_bytes(data)
    os.replace(partial, path)


def save_checkpoint(
    run: Path, state: Mapping[str, Any], meta: Mapping[str, Any], keep: int = 2
) -> None:
    """Write run/step_{meta["step"]} completely or not at all; the newest `keep` steps stay.

    state: anything with state_dict(), by name: {"model": ..., "optimizer": ...}. Rank 0 only.
    RNG state is not kept: everything random in a step follows from (seed, step, rank)."""
    final = run / f"step_{meta['step']:06d}"
    partial = run / f".partial_{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, part in state.items():
            write_part(partial, name, part)
        (partial / "meta.json").write_text(json.dumps(meta, indent=2, default=str) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)  # a rename is atomic: a killed run leaves no half checkpoint
    except (OSError, SafetensorError, RuntimeError) as e:  # what a full disk looks like
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{final}: cannot be written ({reason(e)}); the checkpoints before it are whole: make"
            " room and go on with --resume"
        ) from e
    for old in steps_of(run)[:-keep]:
        shutil.rmtree(old)


def write_part(folder: Path, name: str, part: Any) -> None:
    """A module as folder/name.safetensors, anything else as folder/name.pt."""
    if not isinstance(part, nn.Module):
        torch.save(part.state_dict(), folder / f"{name}.pt")
        return
    state = {k: v.detach().cpu().contiguous().clone() for k, v in part.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")


def steps_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; a seventh digit comes after 999999."""
    return sorted(Path(run).glob("step_*"), key=lambda path: (len(path.name), path.name))


def first_step(run: Path, state: Mapping[str, Any], resume: bool) -> int:
    """Steps already done: those of the newest checkpoint to resume from, else 0. ValueError: a new
    run would write among the checkpoints of another one."""
    if resume:
        return int(load_checkpoint(run, state)["step"])
    if steps_of(run):
        raise ValueError(f"{run} holds a run already: --resume goes on with it, or choose --out")
    return 0


def load_checkpoint(run: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Load the newest step under `run` into the objects of `state`. Returns its meta."""
    if not (steps := steps_of(run)):
        raise FileNotFoundError(f"no step_* under {run}: nothing to resume or to sample from")
    for name, part in state.items():
        if isinstance(part, nn.Module):
            load_strict(part, read_tensors(steps[-1] / f"{name}.safetensors"), str(steps[-1]))
        else:
            file = steps[-1] / f"{name}.pt"
            try:
                part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            except DAMAGED as e:
                raise ValueError(f"{file}: damaged, or of another model ({reason(e)})") from e
    return read_json(steps[-1] / "meta.json")
