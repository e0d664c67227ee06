"""What a public codec makes of recordings: EnCodec and Mimi, through transformers (optional).

    python public_codecs.py --model encodec_24khz --bits 1500 --data DIR --out OUT
    python public_codecs.py --model mimi --bits 1100 --data DIR --out OUT
    python evaluate.py --ref DIR --hyp OUT

    DIR/**/NAME.flac --its rate--> wav (1, channels, S) --model--> OUT/**/NAME.wav, as long

--model is a folder as `hf download facebook/encodec_24khz` or `kyutai/mimi` leaves it. An
interrupted run goes on: files that are there are not made again. The bits are those of table 2 of
TASLA (Hsu et al. 2025, arXiv:2510.14934): 1500 of EnCodec, 1100 of Mimi.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import audio
from common import flag, parse, pick_device, positive, progress, run
from scoring import recordings
from weights import read_json

KINDS = ("encodec", "mimi")


@dataclass(frozen=True)
class Config:
    model: Path = flag(Path("encodec_24khz"), "folder of a downloaded EnCodec or Mimi")
    data: Path = flag(Path("recordings"), "folder of recordings: wav, flac, ogg or mp3")
    out: Path = flag(Path("runs/codec"), "folder of what the codec makes of them")
    bits: int = flag(0, "a second; 0: what the model takes by itself")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


def open_codec(folder: Path, bits: int, device: str) -> Callable[[Tensor, int], tuple[Tensor, int]]:
    """-> wav (S,), rate in Hz -> what comes back (S',), the rate of the codec.

    ValueError: transformers is missing, another model, a bit rate that it has not."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{folder}: a model of type {kind!r}, wanted one of {KINDS}")
    try:
        import transformers
    except ImportError as e:
        raise ValueError("public codecs need another package: pip install transformers") from e
    where = pick_device(device)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval().to(where)
    config, how = model.config, setting(model.config, kind, bits)

    @torch.inference_mode()
    def copy(wav: Tensor, rate: int) -> tuple[Tensor, int]:
        wav = audio.resample(wav, rate, config.sampling_rate).to(where)
        made = model(wav.expand(1, config.audio_channels, -1), **how).audio_values  # (1, c, S')
        return made[0].mean(0)[: len(wav)].cpu(), config.sampling_rate

    return copy


def setting(config: Any, kind: str, bits: int) -> dict[str, Any]:
    """The argument of the model that gives so many bits a second; 0: none. ValueError: impossible.

    A frame has Q codes of log2 K bits, and there are frame_rate frames a second."""
    if not bits:
        return {}
    if kind == "encodec":
        possible = {round(1000 * kbit): {"bandwidth": kbit} for kbit in config.target_bandwidths}
    else:
        one = config.frame_rate * math.log2(config.codebook_size)
        books = range(config.num_semantic_quantizers, config.num_quantizers + 1)
        possible = {round(n * one): {"num_quantizers": n} for n in books}
    if bits not in possible:
        raise ValueError(f"--bits {bits}: this {kind} has {', '.join(map(str, possible))}")
    return possible[bits]


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "threads")
    torch.set_num_threads(cfg.threads)
    files = recordings(cfg.data)
    if not files:
        raise ValueError(f"{cfg.data}: no recordings")
    copy = open_codec(cfg.model, cfg.bits, cfg.device)
    for name, path in progress("codec", [*files.items()]):
        out = cfg.out / f"{name}.wav"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            audio.write(out, *copy(*audio.read_with_rate(path)))
    print(f"{len(files)} recordings, written to {cfg.out}")


if __name__ == "__main__":
    run(main)
