"""Public checkpoints, as `hf download` leaves them: what a folder holds, and our models of it.

    python public.py --check DIR                 parts, parameters, dtypes, what is missing; instant
    python public.py --convert FILE --out DIR    an ONNX file (or flow.pt, ..) -> folders of ours

    file --name tables--> tensors by part, our names --config.json, shapes--> models without storage
      --the tensors themselves, memory-mapped--> {"encoder": .., "decoder": ..} in their dtypes

The names in a file tell what it is. One name table per kind of file, one to one or not at all.
ONNX: an initializer is named after the node that reads it, since most have no name of their own;
a convolution that swallowed its BatchNorm gets it back as one that only adds the bias.
[file kinds: the README's table; keys and shapes: CosyVoice 33a5853, TASTE-SpokenLM 301bce2]
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aggregator as agg
import flow
import hift
import llm
import rvq
import s3_units
import speaker
import spoken_lm
import text
import unit_decoder
import whisper_dec
import whisper_enc
from common import flag, parse, run
from onnx_file import read_onnx
from sizes import BUILD, Part, hollow
from weights import (
    MODEL_FILES,
    as_config,
    load_strict,
    match,
    read_config,
    read_tensors,
    save_model,
)

Names = dict[str, str]
PARTS = {  # of the whole system -> where it comes from
    "encoder": "Whisper or TASTE", "decoder": "Whisper", "llm": "Llama", "tokenizer": "TASTE",
    "spoken_lm": "TASTE", "s3": "speech_tokenizer_v1.onnx", "speaker": "campplus.onnx",
    "flow": "voice_generator.pth or flow.pt", "hift": "voice_generator.pth or hift.pt",
}  # fmt: skip
OTHER_FILES = ("*.pt", "*.pth", "*.onnx", "campplus*.bin")  # .bin else may be anything
OTHER_VOCAB = 0.1  # share of the ids by which a tokenizer may differ from the model beside it
OURS: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {  # folders that --convert writes
    "s3": (s3_units.S3Config, s3_units.S3Units),
    "speaker": (speaker.CAMPlusConfig, speaker.CAMPlus),
    "flow": (flow.FlowConfig, flow.Flow),
    "hift": (hift.HiFTConfig, lambda config: hift.HiFT(config).fold()),
}


def under(prefix: str, names: Mapping[str, str], ours: str) -> Names:
    return {prefix + row: f"{ours}.{name}" for row, name in names.items()}


@dataclass(frozen=True)
class Kind:
    """A kind of public file."""

    title: str
    marker: str  # regex of names that only this kind has, given that the kinds before were not it
    parts: tuple[str, ...]
    names: Names  # public name -> part.our name
    skip: tuple[str, ...] = ()
    first: Names = field(default_factory=lambda: {"(.+)": r"\1"})  # applied before `names`


KINDS = (
    Kind(
        "TASTE",
        r"spoken_lm\.",
        ("encoder", "tokenizer", "spoken_lm"),
        under("", whisper_enc.NAMES, "encoder")
        | under("", agg.NAMES, "tokenizer.aggregator")
        | under(r"audio_tower\.vq\.", rvq.NAMES, "tokenizer.quantizer")
        | under("", unit_decoder.NAMES, "tokenizer.unit_decoder")
        | under(r"spoken_lm\.", spoken_lm.NAMES, "spoken_lm"),
        tuple(rf"audio_tower\.vq\.{x}" for x in rvq.SKIP)
        + tuple(rf"spoken_lm\.{x}" for x in spoken_lm.SKIP),
        {rf"spoken_lm\.{row}": f"spoken_lm.{name}" for row, name in spoken_lm.PEFT.items()}
        | {r"((?!spoken_lm\.).+)": r"\1"},
    ),
    Kind(
        "vocoder of TASTE",
        r"(flow|hift)\.",
        ("flow", "hift"),
        under(r"flow\.", flow.NAMES, "flow") | under(r"hift\.", hift.NAMES, "hift"),
    ),
    Kind(
        "Whisper",
        r"(model\.)?(en|de)coder\.layers\.",
        ("encoder", "decoder"),
        under("", whisper_enc.NAMES, "encoder") | under("", whisper_dec.NAMES, "decoder"),
        (r"proj_out\.weight",),  # the token table again
    ),
    Kind(
        "Whisper, openai's file",
        r"decoder\.blocks\.",
        ("encoder", "decoder"),
        under("", whisper_enc.NAMES_OPENAI, "encoder")
        | under("", whisper_dec.NAMES_OPENAI, "decoder"),
        (r"alignment_heads",),
    ),
    Kind("S3 units", r"quantizer\.|encoder\.blocks\.", ("s3",), under("", s3_units.NAMES, "s3")),
    Kind("CAM++", r"xvector\.", ("speaker",), under("", speaker.NAMES, "speaker")),
    Kind("CosyVoice flow", r"decoder\.estimator\.", ("flow",), under("", flow.NAMES, "flow")),
    Kind("CosyVoice HiFT", r"source_downs\.", ("hift",), under("", hift.NAMES, "hift")),
    Kind("Llama", r"(model\.)?layers\.\d+\.self_attn\.", ("llm",), under("", llm.NAMES, "llm"),
         llm.SKIP),
)  # fmt: skip


def kind_of(tensors: Mapping[str, Any]) -> Kind | None:
    marked = (kind for kind in KINDS if any(re.match(kind.marker, name) for name in tensors))
    return next(marked, None)


# --- opening -------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """What there is to open in a folder and the folders in it; a model of one or more files counts
    once, as its folder."""
    if not path.is_dir():
        return [path]
    found = []
    for folder in [path, *sorted(x for x in path.iterdir() if x.is_dir())]:
        if any((folder / f"{x}{end}").exists() for x in MODEL_FILES for end in ("", ".index.json")):
            found.append(folder)
        found += [x for row in OTHER_FILES for x in sorted(folder.glob(row))]
    return found


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A weight file or a model folder -> tensors under public names, and what tells more sizes."""
    if path.suffix == ".onnx":
        return read_onnx(path)
    folder = path.parent if path.name in MODEL_FILES else path
    if (folder / "config.json").is_file():
        return read_tensors(path), read_config(folder)
    # the stride of 25 Hz units is in no tensor; S3Tokenizer goes by the name, too
    return read_tensors(path), {"strides": (2, 2)} if "25hz" in path.name else {}


def assemble(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], what: str, head: int = 64
) -> dict[str, nn.Module]:
    """Tensors under public names -> models by part, in eval mode. ValueError: all that does not
    fit, or a file of no kind that is known."""
    for name, (cls, build) in OURS.items():
        if config.keys() - {"source"} == {f.name for f in fields(cls)}:
            model = hollow(build, as_config(cls, config, what))
            load_strict(model, tensors, what)
            return {name: model.eval()}
    if of_a_bundle(config):
        raise ValueError(f"{what}: trained here, to be opened with the rest of its bundle")
    if (kind := kind_of(tensors)) is None:
        raise ValueError(f"{what}: no public file that is known; it has {sorted(tensors)[:3]}")
    plain, odd = match(tensors, kind.first)
    ours, problems = match(plain, kind.names, kind.skip)
    models: dict[str, nn.Module] = {}
    state: dict[str, Tensor] = {}
    what = f"{what} ({kind.title})"
    for name in kind.parts:
        own = {k.removeprefix(f"{name}."): v for k, v in ours.items() if k.startswith(f"{name}.")}
        part = Part(own, config, head, models)
        try:
            models[name] = BUILD[name](part)
        except ValueError as e:  # sizes that no model can have
            raise ValueError("\n  ".join([f"{what}: {name}: {e}", *odd, *problems])) from e
        state |= {f"{name}.{k}": v for k, v in part.ours.items()}
    if "spoken_lm" in models:  # it shares the quantizer of the tokenizer
        shared = {k: v for k, v in state.items() if k.startswith("tokenizer.quantizer.")}
        state |= {k.replace("tokenizer", "spoken_lm", 1): v for k, v in shared.items()}
    whole = nn.ModuleDict(models).eval()
    load_strict(whole, state, what, odd + problems)
    return models


def of_a_bundle(config: Mapping[str, Any]) -> bool:
    """Of our own, and no stage that public files have: all config.json of transformers say more."""
    own = [{f.name for f in fields(cls)} for cls, _ in OURS.values()]
    keys = config.keys() - {"source"}
    return "model_type" not in keys and keys not in [set(), {"strides"}, *own]


def open_public(
    path: Path, dtype: torch.dtype | None = None, head: int = 64
) -> dict[str, nn.Module]:
    """A file, or all files of a folder whose kind is known -> {part: model}, memory-mapped.

    dtype: of the floating tensors; None: as each is stored, for the caller to cast part by part.
    head: channels of an attention head, of models that are not the released ones."""
    path = Path(path)
    models: dict[str, nn.Module] = {}
    for file in weight_files(path):
        if file == path or file.suffix != ".onnx":  # these are converted first
            tensors, config = read(file)
            if file == path or kind_of(tensors):
                models = assemble(tensors, config, str(file), head) | models
    if not models:
        raise ValueError(f"{path}: no weights of a known kind; `--check` says what is there")
    return {part: model if dtype is None else model.to(dtype) for part, model in models.items()}


# --- the two commands ----------------------------------------------------------------------------


def convert(path: Path, out: Path) -> list[Path]:
    """Write each part of a file as a model folder out/part, to stand in a bundle."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted an ONNX file, flow.pt or hift.pt")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    models = open_public(path)
    if odd := models.keys() - OURS.keys():
        raise ValueError(f"{path} holds {sorted(odd)}: opened as it is, no conversion is needed")
    for part, model in models.items():
        if isinstance(model, hift.HiFT):
            model.fold()
        config = getattr(model, "config", None) or getattr(model, "cfg", None)
        save_model(out / part, model, config, source={"file": path.name, "sha256": digest})
    return [out / part for part in models]


def check(path: Path) -> tuple[list[str], list[str]]:
    """What is there, line by line, and what is wrong with it. Of the weights only the headers are
    read (of files from before torch 1.6, all)."""
    lines: list[str] = []
    problems: list[str] = []
    parts: set[str] = set()
    vocab = None
    for file in weight_files(path):
        name = str(file.relative_to(path)) if file != path else file.name
        try:
            found, models = look(file)
            parts |= models.keys()
            vocab = vocab_of(models) or vocab
        except (ValueError, OSError) as e:
            problems.append(str(e))
            found = "see below"
        lines.append(f"{name}: {found}")
    try:
        lines.append(f"tokenizer: {check_tokenizer(path, vocab)}")
    except FileNotFoundError:
        lines.append("tokenizer: none")
    except ValueError as e:
        problems.append(str(e))
    missing = [f"{part} ({source})" for part, source in PARTS.items() if part not in parts]
    lines.append(f"of the whole system it lacks {', '.join(missing)}")
    return lines, problems


def look(file: Path) -> tuple[str, dict[str, nn.Module]]:
    """What a file is, and its models without their weights."""
    if file.suffix == ".onnx":
        return f"ONNX: python public.py --convert {file} --out BUNDLE", {}
    tensors, config = read(file)
    if of_a_bundle(config):
        return "trained here, part of a bundle", {}
    if kind_of(tensors) is None and not config:
        return f"not a file that is known, it has {sorted(tensors)[:3]}", {}
    models = assemble({k: v.to("meta") for k, v in tensors.items()}, config, str(file))
    return describe(models, tensors), models


def vocab_of(models: Mapping[str, nn.Module]) -> int | None:
    """Ids that the models of one file know."""
    if isinstance(lm := models.get("llm"), llm.Llama):
        return lm.config.vocab
    decoder = models.get("decoder")
    return decoder.cfg.vocab if isinstance(decoder, whisper_dec.WhisperDecoder) else None


def check_tokenizer(path: Path, vocab: int | None) -> str:
    """What kind the tokenizer of a folder is. ValueError: it cannot be that of the model beside it
    (a few ids more or less are padding of the table, or tokens that were added)."""
    tokens = text.load_tokenizer(path, vocab)
    kind = "SentencePiece" if isinstance(tokens, text.SentencePieceTokenizer) else "byte-level BPE"
    found = f"{kind}, {tokens.vocab_size:,} ids"
    if vocab and abs(tokens.vocab_size - vocab) > vocab * OTHER_VOCAB:
        raise ValueError(f"{path}: the tokenizer is {found}; the model beside it has {vocab:,}")
    return found


def describe(models: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> str:
    """'flow 104,874,752 + hift 20,452,271 parameters | float32 ..' of one file"""
    counts = {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()}
    dtypes: Counter[str] = Counter()
    for x in tensors.values():
        dtypes[str(x.dtype).removeprefix("torch.")] += x.numel()
    total = sum(x.numel() * x.element_size() for x in tensors.values())
    held = " + ".join(f"{part} {n:,}" for part, n in counts.items())
    stored = ", ".join(f"{n:,} {dtype}" for dtype, n in dtypes.items())
    return f"{held} parameters; stored: {stored}; {total / 1e9:.2f} GB"


@dataclass(frozen=True)
class Config:
    check: Path = flag(None, "folder or file to report on")
    convert: Path = flag(None, "file to make model folders of ours from")
    out: Path = flag(None, "where --convert writes: OUT/s3, OUT/speaker, OUT/flow, OUT/hift")


def main() -> None:
    cfg = parse(Config, {"none": {}}, __doc__)
    if (cfg.check is None) == (cfg.convert is None) or (cfg.convert and not cfg.out):
        raise ValueError("wanted --check DIR, or --convert FILE --out DIR; --help shows the flags")
    if cfg.convert:
        print("\n".join(f"wrote {folder}" for folder in convert(cfg.convert, cfg.out)))
        return
    if not cfg.check.exists():
        raise FileNotFoundError(f"{cfg.check}: no such file or folder")
    lines, problems = check(cfg.check)
    print("\n".join(lines))
    if problems:
        raise ValueError("\n".join(problems))


if __name__ == "__main__":
    run(main)
