"""The text-speech aggregator: every word gathers the frames that it was spoken in.

    w_i = softmax(MLP(last_i))                  TASLA only: one weight per value layer and frame i
    V_i = sum_l w_{l,i} tap_{l,i}               TASTE: V is one fixed layer, no weights
    y   = Decoder(prefix + ids, K = last, V)    a small Whisper decoder; the prefix is dropped again
    z_n = mean of y over the sub-words of n's word

    last (B, T, C), taps S x (B, T, C) --MLDA--> V (B, T, C) -+
    ids (B, N) ---------------------------> decoder(K, V) <---+--> y (B, N, C) --mean--> z (B, N, C)

The last encoder layer knows where a word is, shallow layers still hear how it was said. More than
the papers' softmax(Q K^T) V: z goes through two decoder blocks, so it knows its text and its past.
Open in the TASLA paper, our choice: "layer 32" is the residual stream before the final LayerNorm,
as all taps are; the MLP is Linear-GELU-Linear and starts with equal weights for all layers.
[TASTE: Tseng et al. 2025, arXiv:2504.07053, sec. 3.1.1; MLDA: TASLA paper, sec. 4.1]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whisper_dec
from whisper_dec import DecoderConfig, WhisperDecoder


@dataclass(frozen=True)
class AggregatorConfig(DecoderConfig):
    """The decoder's sizes (distil-large-v3) and what TASTE adds; the defaults are TASTE."""

    prefix_ids: tuple[int, ...] = (50258, 50259, 50360, 50364)  # start, en, transcribe, no times
    value_layers: tuple[int, ...] = (6,)  # taps of the encoder: stream after so many of its layers
    mlda: bool = False  # mix the value layers per frame (TASLA); else there is exactly one
    mlda_hidden: int = 512  # width inside the MLP; the paper does not say

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.value_layers) < 1 or (len(self.value_layers) > 1 and not self.mlda):
            raise ValueError(
                f"value_layers={self.value_layers}: one layer, or several with mlda=True"
            )
        if len({*self.value_layers}) < len(self.value_layers) or min(self.value_layers) < 0:
            raise ValueError(f"value_layers={self.value_layers}: each once, and none below 0")
        if len(self.prefix_ids) >= self.max_tokens or self.mlda_hidden < 1:
            raise ValueError(f"no room beside {len(self.prefix_ids)} prefix ids, or no mlda_hidden")
        if not all(0 <= i < self.vocab for i in self.prefix_ids):
            raise ValueError(
                f"prefix_ids={self.prefix_ids} must lie in 0 .. vocab-1={self.vocab - 1}"
            )


TASLA = AggregatorConfig(value_layers=(8, 16, 24, 32), mlda=True)
TINY = AggregatorConfig(512, 128, 4, 2, 512, 128, (1, 2), (1, 2, 3, 4), True, 64)


class MLDA(nn.Module):
    """Multi-layer dynamic attention: how much of each layer, decided anew at every frame."""

    def __init__(self, width: int, hidden: int, sources: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, sources)
        nn.init.zeros_(self.down.weight)  # start with the plain mean of the layers
        nn.init.zeros_(self.down.bias)

    def forward(self, last: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """last (B, T, C), values (B, S, T, C) -> mixture (B, T, C), weights (B, S, T) fp32, sum 1.

        [TASLA paper, sec. 4.1: w = softmax(MLP(h_last)), V~_i = sum_l w_{l,i} V_{l,i}]"""
        scores = self.down(F.gelu(self.up(last))).float()  # (B, T, S)
        weights = scores.softmax(-1).transpose(1, 2)  # (B, S, T)
        return (weights[..., None] * values).sum(1), weights  # (B, T, C)


class Maps(NamedTuple):
    """Where the aggregator looked."""

    frames: Tensor  # (B, L, H, N, T) of each text token over the audio, sum 1
    layers: Tensor | None  # (B, S, T) of each frame over the value layers, sum 1; None without MLDA


def members(word_ids: Tensor, words: int, keep: Tensor | None = None) -> Tensor:
    """word_ids, keep (B, N) -> (B, W, N) bool: token n is part of word w; of none if padding."""
    numbers = torch.arange(words, device=word_ids.device)[:, None]  # (W, 1)
    member = word_ids[:, None] == numbers  # (B, W, N)
    return member if keep is None else member & keep[:, None]


def word_vectors(x: Tensor, word_ids: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (B, N, C), word_ids (B, N), -1 = padding -> mean per word (B, W, C) fp32, keep (B, W).

    keep (B, N) bool can say instead what is padding. W is the longest item's number of words, the
    vectors beyond an item's own are 0. In float64, which neither autocast nor TF32 makes coarser
    (that would move codes); by a matrix product, which is deterministic on a GPU, gradient too."""
    real = word_ids if keep is None else word_ids.masked_fill(~keep, -1)  # (B, N)
    member = members(real, int(real.max()) + 1 if real.numel() else 0)  # (B, W, N)
    share = member.double() / member.sum(-1, keepdim=True).clamp(min=1)  # (B, W, N)
    words = share @ x.double().masked_fill(real[..., None] < 0, 0)  # (B, W, C)
    return words.float(), member.any(-1)


def spread(words: Tensor, word_ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """words (B, W, C) -> (B, N, C) fp32: each token gets its word's vector, padding gets 0."""
    member = members(word_ids, words.shape[1], keep)  # (B, W, N)
    return (member.mT.double() @ words.double()).float()  # (B, N, C)


class Aggregator(nn.Module):
    def __init__(self, cfg: AggregatorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.mlda = MLDA(cfg.width, cfg.mlda_hidden, len(cfg.value_layers)) if cfg.mlda else None
        self.decoder = WhisperDecoder(cfg)
        for name, part in self.decoder.named_modules():
            if name.endswith("cross.value"):  # values pass unchanged at first [TASTE code]
                nn.init.eye_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(
        self,
        ids: Tensor,
        word_ids: Tensor,
        last: Tensor,
        taps: Mapping[int, Tensor] | Tensor,
        keep: Tensor | None = None,
        text_keep: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Maps]:
        """ids, word_ids (B, N) int64, last (B, T, C), taps -> z (B, N, C) fp32, 0 at padding.

        word_ids: 0-based number of each token's word, -1 at padding, which is on the right; or
        text_keep (B, N) bool says what is real. keep (B, T) bool: real frames. taps: by layer, as
        the encoder gives them, or stacked (B, S, T, C) in the order of cfg.value_layers.
        need_weights: (z, Maps). Raises ValueError for wrong shapes, missing taps, other padding."""
        real = word_ids >= 0 if text_keep is None else text_keep & (word_ids >= 0)  # (B, N)
        self.check(ids, word_ids, real)
        values, layers = self.values(last, taps)
        prefix = ids.new_tensor(self.cfg.prefix_ids).expand(len(ids), -1)  # (B, P)
        text = torch.cat([prefix, ids.masked_fill(~real, 0)], dim=1)  # (B, P + N)
        y = self.decoder(text, last, values, keep, need_weights=need_weights)
        y, maps = y if need_weights else (y, None)
        P = prefix.shape[1]
        words, _ = word_vectors(y[:, P:], word_ids, real)  # (B, W, C)
        z = spread(words, word_ids, real)  # (B, N, C)
        return z if maps is None else (z, Maps(maps[:, :, :, P:], layers))

    def values(
        self, last: Tensor, taps: Mapping[int, Tensor] | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """last (B, T, C), taps as in forward -> V (B, T, C), layer weights (B, S, T) or None."""
        layers = self.cfg.value_layers
        if isinstance(taps, Mapping):
            if missing := [k for k in layers if k not in taps]:
                raise ValueError(f"taps {sorted(taps)} lack {missing}: tap {layers} in the encoder")
            taps = torch.stack([taps[k] for k in layers], dim=1)  # (B, S, T, C)
        B, T, C = last.shape
        if taps.shape != (B, len(layers), T, C):
            wanted = [B, len(layers), T, C]
            raise ValueError(f"stacked taps have shape {[*taps.shape]}, wanted {wanted}")
        return (taps[:, 0], None) if self.mlda is None else self.mlda(last, taps)

    def check(self, ids: Tensor, word_ids: Tensor, real: Tensor) -> None:
        """Raise ValueError for text that does not fit."""
        if ids.ndim != 2 or word_ids.shape != ids.shape or real.shape != ids.shape:
            shapes = f"{[*ids.shape]}, {[*word_ids.shape]}, {[*real.shape]}"
            raise ValueError(f"ids, word_ids, text_keep are {shapes}, wanted one shape [B, N]")
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("text is padded on the left or inside: move all padding to the right")


# below audio_tower.audio_joint_encoder_segmenter.audio_segmenter. in the TASTE checkpoint, or a
# Whisper file to start from; MLDA has no public weights
NAMES = {row: f"decoder.{ours}" for row, ours in whisper_dec.NAMES.items()}
SKIP = whisper_dec.SKIP


if __name__ == "__main__":
    torch.manual_seed(0)
    model, last = Aggregator(TINY), torch.randn(2, 50, 128)
    taps = {k: torch.randn(2, 50, 128) for k in TINY.value_layers}
    word_ids = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 1, 2, -1, -1, -1]])
    z, maps = model(torch.randint(512, (2, 6)), word_ids, last, taps, need_weights=True)
    words, keep = word_vectors(z, word_ids)
    print(
        f"ids (2, 6), 50 frames -> z {(*z.shape,)}, words {(*words.shape,)} {keep.sum(1).tolist()}"
    )
    print(f"attention {(*maps.frames.shape,)}, layer weights {(*maps.layers.shape,)}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
