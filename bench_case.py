"""What a line of bench.py is, and which models its presets have.

full: whisper-large-v3, Llama-3.2-1B, CosyVoice-300M and the papers' sizes; small: whisper-small
and SmolLM2-135M instead; tiny: those of weights/tiny, with an encoder at 50 Hz
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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


Stage = Callable[[Sizes, torch.device, bool], Case]


def size(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(x.nbytes for x in {x.data_ptr(): x for x in model.state_dict().values()}.values())


def middles(steps: int, skip: int) -> range:
    """The steps at which a loop without a cache is timed: of each `skip` the middle one."""
    return range(skip // 2, steps, skip)
