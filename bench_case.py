"""What a line of bench.py is, which models its presets have, and what a call takes.

full: whisper-large-v3, Llama-3.2-1B, CosyVoice-300M and the papers' sizes; small: whisper-small
and SmolLM2-135M instead; tiny: those of weights/tiny, with an encoder at 50 Hz
"""

import copy
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

import fsq
import llm
import rvq
import s3_units
import unit_decoder
import whisper_dec
import whisper_enc
from flow import TINY as FLOW
from flow import FlowConfig
from fsq import FSQConfig
from hift import TINY as HIFT
from hift import HiFTConfig
from llm import LlamaConfig
from rvq import RVQConfig
from s3_units import S3Config
from unit_decoder import UnitDecoderConfig
from whisper_dec import DecoderConfig
from whisper_enc import EncoderConfig


@dataclass(frozen=True)
class Sizes:
    """The models of a preset, and how much they are given."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    llm: LlamaConfig
    s3: S3Config
    rvq: RVQConfig
    fsq: FSQConfig
    unit_decoder: UnitDecoderConfig
    flow: FlowConfig
    hift: HiFTConfig
    tokens: int = 24  # to generate, after a prompt of as many
    said: int = 64  # words to generate, of a token each, after a prompt of 30
    batch: int = 8  # prompts at once
    units: int = 500  # to generate
    seconds: float = 3.0  # to vocode
    recordings: int = 1  # to hear at once
    words: int = 32  # of an utterance, of which 16 are quantized: 12 s each
    skip: int = 16  # what has no cache is timed at one of so many steps


FULL = Sizes(
    EncoderConfig(), DecoderConfig(layers=32), LlamaConfig(), S3Config(), RVQConfig(), FSQConfig(),
    UnitDecoderConfig(), FlowConfig(), HiFTConfig(),
)  # fmt: skip
SMALL = replace(  # whisper-small and SmolLM2-135M
    FULL, encoder=EncoderConfig(80, 768, 12, 12, 3072), rvq=RVQConfig(768), fsq=FSQConfig(768),
    decoder=DecoderConfig(51865, 768, 12, 12, 3072),
    llm=LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, 1e5, None, max_tokens=8192),
)  # fmt: skip
TINY = Sizes(
    replace(whisper_enc.TINY, strides=(1, 2), max_frames=1500),  # 50 Hz: the peer has no other
    whisper_dec.TINY, llm.TINY, replace(s3_units.TINY, max_frames=1500), rvq.TINY, fsq.TINY,
    unit_decoder.TINY, FLOW, HIFT,
)  # fmt: skip
SIZES = {"full": FULL, "small": SMALL, "tiny": TINY}


@dataclass
class Case:
    """One line of the table."""

    what: str
    model: nn.Module
    ours: Callable[[], Tensor]
    reads: int = 0  # bytes of weights and of kept keys that a call cannot avoid to read
    peer: Callable[[], Tensor] | None = None
    peer_name: str = ""
    peer_share: float = 1.0  # of its work that the peer does: its time is divided by it
    tolerance: float = 1e-4  # of floats, relative to the largest; integers: share that differs
    dtype: torch.dtype | None = None  # of our large products, if not the usual one of the device


Model = TypeVar("Model", bound=nn.Module)
Stage = Callable[[Sizes, torch.device, bool], Case]


def size(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(x.nbytes for x in {x.data_ptr(): x for x in model.state_dict().values()}.values())


def twin(model: Model) -> Model:
    """The same weights in modules of their own: what bench.py quickens does not reach them."""
    kept = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in kept})


def middles(steps: int, skip: int) -> range:
    """The steps at which a loop without a cache is timed: of each `skip` the middle one."""
    return range(skip // 2, steps, skip)


# --- time and memory -----------------------------------------------------------------------------

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Result = TypeVar("Result")


def wait(device: torch.device) -> float:
    """The time at which all is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that it takes."""
    start = wait(device)
    call()
    return wait(device) - start


def taken(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What it gives, and the most bytes that it takes beside what is there. To be asked of a first
    run: later ones find memory that the process has kept."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    elif FORGET.exists():
        FORGET.write_text("5")  # forgets the peak so far
    before = torch.cuda.memory_allocated(device) if cuda else resident("VmRSS")
    out = call()
    after = torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")
    return out, after - before


def resident(key: str) -> float:
    """Bytes of memory of this process; nan where the system does not say."""
    found = re.search(key + r":\s+(\d+)", STATUS.read_text()) if STATUS.exists() else None
    return 1024 * float(found[1]) if found else math.nan
