"""The speech tokenizer: one set of codes per word, from which a unit decoder says the words again.

    z      = words(Aggregator(text, deep frames, shallow frames))     one vector per word
    codes  = quantize(z)                                              RVQ: TASTE, FSQ: TASLA
    units ~ UnitDecoder(text, dequantize(codes), voice)               S3 units of the same speech
    loss   = CE(units) + lambda * quantizer loss                      TASLA eq. of 4.3; TASTE lambda = 1

    last, taps (B, T, C) --aggregator--> tokens (B, N, C) --mean per word--> z (B, W, C)
      --quantizer--> codes (B, W, Q), embedding (B, W, C) --repeat--> (B, N, C) --> units (B, U)

The frozen encoder stays outside: it is given, not learned. A word's codes are quantized once and
repeated over its text tokens, which is the same as quantizing the pooled tokens one by one.
[TASTE: Tseng et al. 2025, arXiv:2504.07053; TASLA: Hsu et al. 2025, arXiv:2510.14934]
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aggregator as agg
import fsq
import rvq
import unit_decoder as ud
from weights import as_config, load_model, read_config

QUANTIZERS = ("fsq", "rvq", "none")


@dataclass(frozen=True)
class TokenizerConfig:
    """quantizer: fsq | rvq | none (continuous). The two that are not used keep their defaults."""

    aggregator: agg.AggregatorConfig
    unit_decoder: ud.UnitDecoderConfig
    quantizer: str = "fsq"
    fsq: fsq.FSQConfig = fsq.TINY
    rvq: rvq.RVQConfig = rvq.TINY
    recon_weight: float = 1.0  # lambda

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer={self.quantizer!r}: wanted one of {QUANTIZERS}")


@dataclass
class TokenizerBatch:
    """What one training step sees. Padding: ids 0, word_ids -1, units -1, keep False."""

    ids: Tensor  # (B, N) text tokens
    word_ids: Tensor  # (B, N) 0-based word of each token
    last: Tensor  # (B, T, C) encoder output
    taps: dict[int, Tensor]  # layer -> (B, T, C)
    keep: Tensor | None  # (B, T) real frames
    voice: Tensor  # (B, X) speaker vectors
    units: Tensor  # (B, U) S3 units
    spans: Tensor | None = None  # (B, N, T) bool: frames in which the token's word is spoken

    def to(self, device: torch.device) -> "TokenizerBatch":
        def move(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: v.to(device) for k, v in x.items()}
            return x if x is None else x.to(device)

        return TokenizerBatch(**{k: move(v) for k, v in vars(self).items()})


@dataclass
class TokenizerOutput:
    loss: Tensor  # the sum that is minimized
    ce: Tensor  # of units, nats
    recon: Tensor  # quantizer loss
    guide: Tensor  # -log attention inside the spoken word; 0 without spans
    codes: Tensor | None  # (B, W, Q)
    units: ud.UnitDecoderOutput
    maps: Tensor | None = None  # cross-attention (B, L, H, N, T)


class SpeechTokenizer(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.aggregator = agg.Aggregator(config.aggregator)
        self.quantizer: nn.Module | None = None
        if config.quantizer == "fsq":
            self.quantizer = fsq.FSQ(config.fsq)
        elif config.quantizer == "rvq":
            self.quantizer = rvq.RVQ(config.rvq)
        self.unit_decoder = ud.UnitDecoder(config.unit_decoder)
