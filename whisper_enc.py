"""Whisper's audio encoder: log-mel in, one vector per frame out, and every layer can be tapped.

    x_0 = GELU(conv2(GELU(conv1(mel)))) + positions
    x  <- x + Attn(LN(x)),   x <- x + W_2 GELU(W_1 LN(x))        one block; x_k is x after k blocks
    last = LN(x_L)

    mel (B, M, F) --two convs--> x_0 (B, T, C) --L blocks, taps x_k--> x_L --LN--> last (B, T, C)

TASTE takes its keys from `last` and its values from the tap x_6: a residual stream, not normalised.
A tap k is what transformers calls hidden_states[k], except that x_L comes here before the final LN.
Padding: `keep` hides frames from the attention and zeroes what the convolutions would see of them,
so a padded batch gives what single items give. The public models have no mask: they attend to the
padding up to 30 s. For their numbers zero-pad the log-mel to 3000 frames and leave out keep.
Our deviation: other strides, and fewer frames than the position table has, are allowed.
[Radford et al. 2022, arXiv:2212.04356, sec. 2.2; taps: Tseng et al. 2025, arXiv:2504.07053, 3.1.1]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class EncoderConfig:
    """The defaults are whisper-large-v3, and distil-large-v3, which has the same encoder."""

    n_mels: int = 128  # mel bins
    width: int = 1280  # C
    heads: int = 20
    layers: int = 32
    ffn: int = 5120  # width inside the MLP
    max_frames: int = 1500  # rows of the position table: 30 s at 50 Hz
    strides: tuple[int, int] = (1, 2)  # of the two convolutions: 100 Hz mel -> 50 Hz frames

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.width % 2 or self.width < 4:  # half sines, half cosines
            raise ValueError(f"width={self.width} must be even and at least 4")
        if len(self.strides) != 2 or min(*self.strides, self.layers, self.max_frames) < 1:
            raise ValueError(f"two strides, layers and max_frames must be 1 or more, got {self}")

    @property
    def stride(self) -> int:
        """Mel frames per encoder frame."""
        return self.strides[0] * self.strides[1]

    def frames(self, mel_frames: int) -> int:
        """F mel frames -> T encoder frames, rounded up."""
        return -(-mel_frames // self.stride)

    def out_lengths(self, mel_lengths: Tensor) -> Tensor:
        """mel_lengths (B,) int64 -> encoder lengths (B,) int64."""
        return (mel_lengths + self.stride - 1) // self.stride


TINY = EncoderConfig(80, 128, 4, 4, 512, 750, (2, 2))  # 25 Hz, up to 30 s


def sinusoids(length: int, width: int) -> Tensor:
    """Position table (length, width): sines, then cosines; periods from 2 pi to 20000 pi frames."""
    periods = torch.logspace(0, math.log10(10_000), width // 2, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / periods  # (length, width / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()  # (length, width)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # a key bias cancels in the softmax
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C), mask (B, 1, 1, T) bool or None = all real -> (B, T, C)"""
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        v = self.value(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.attn_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class WhisperEncoder(nn.Module):
    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.width, 3, stride=cfg.strides[0], padding=1)
        self.conv2 = nn.Conv1d(cfg.width, cfg.width, 3, stride=cfg.strides[1], padding=1)
        # stored, because public files hold it, but not trained unless requires_grad is switched on
        self.positions = nn.Parameter(sinusoids(cfg.max_frames, cfg.width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.ffn) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)

    def forward(
        self, mel: Tensor, keep: Tensor | None = None, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """mel (B, M, F) -> last (B, T, C), {k: residual stream after k blocks (B, T, C)}.

        keep bool marks what is real: (B, T), or (B, F) to be exact also for items whose mel length
        is no multiple of cfg.stride; None = all. What comes out at padding is not specified.
        ValueError: wrong shapes, too many frames, an item without frames, no such layer."""
        self.check(mel, taps)
        mel_keep = self.mel_keep(mel, keep)
        x = self.embed(mel, mel_keep)  # (B, T, C)
        mask = None if mel_keep is None else mel_keep[:, None, None, :: self.cfg.stride]
        tapped = {0: x} if 0 in taps else {}
        for k, block in enumerate(self.blocks, start=1):
            x = block(x, mask)
            if k in taps:
                tapped[k] = x
        return self.norm(x), tapped

    def embed(self, mel: Tensor, mel_keep: Tensor | None) -> Tensor:
        """mel (B, M, F), mel_keep (B, F) or None -> x_0 (B, T, C); both convs see padding as 0."""
        if mel_keep is not None:
            mel = mel.masked_fill(~mel_keep[:, None], 0)
        x = F.gelu(self.conv1(mel))  # (B, C, F / strides[0])
        if mel_keep is not None:
            x = x.masked_fill(~mel_keep[:, None, :: self.cfg.strides[0]], 0)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, T, C)
        return x + self.positions[: x.shape[1]]

    def mel_keep(self, mel: Tensor, keep: Tensor | None) -> Tensor | None:
        """keep (B, T) or (B, F) -> (B, F): encoder frame t covers mel frames t * stride and up."""
        B, _, n = mel.shape
        T = self.cfg.frames(n)
        if keep is None:
            return None
        if keep.dtype != torch.bool or keep.shape not in ((B, T), (B, n)):
            got = f"{keep.dtype} {[*keep.shape]}"
            raise ValueError(f"keep is {got}, wanted bool [{B}, {T}] or [{B}, {n}] for this mel")
        if not keep.any(1).all():
            raise ValueError(f"items {(~keep.any(1)).nonzero().flatten().tolist()} have no frame")
        return keep if keep.shape[1] == n else keep.repeat_interleave(self.cfg.stride, 1)[:, :n]

    def check(self, mel: Tensor, taps: Sequence[int]) -> None:
        """Raise ValueError for a mel that does not fit this model or a layer that it lacks."""
        cfg = self.cfg
        if mel.ndim != 3 or mel.shape[1] != cfg.n_mels or mel.shape[2] == 0:
            raise ValueError(f"mel has shape {[*mel.shape]}, wanted [B, {cfg.n_mels}, F >= 1]")
        if (T := cfg.frames(mel.shape[2])) > cfg.max_frames:
            most = cfg.max_frames * cfg.stride
            raise ValueError(
                f"{mel.shape[2]} mel frames give {T} frames, the position table ends at "
                f"{cfg.max_frames}: cut the audio to {most} mel frames or less"
            )
        if odd := [k for k in taps if not 0 <= k <= cfg.layers]:
            raise ValueError(f"no layer {odd} to tap: 0 (input) to {cfg.layers} (last) exist")


# transformers' names (whisper, distil-whisper), also below the prefix of the TASTE checkpoint
_HF = r"(?:model\.|(?:audio_tower\.audio_joint_encoder_segmenter\.)?audio_encoder\.)?encoder\."
NAMES = {
    rf"{_HF}conv([12])\.(\w+)": r"conv\1.\2",
    rf"{_HF}embed_positions\.weight": "positions",
    rf"{_HF}layers\.(\d+)\.self_attn_layer_norm\.(\w+)": r"blocks.\1.attn_norm.\2",
    rf"{_HF}layers\.(\d+)\.self_attn\.q_proj\.(\w+)": r"blocks.\1.attn.query.\2",
    rf"{_HF}layers\.(\d+)\.self_attn\.k_proj\.(\w+)": r"blocks.\1.attn.key.\2",
    rf"{_HF}layers\.(\d+)\.self_attn\.v_proj\.(\w+)": r"blocks.\1.attn.value.\2",
    rf"{_HF}layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"blocks.\1.attn.out.\2",
    rf"{_HF}layers\.(\d+)\.final_layer_norm\.(\w+)": r"blocks.\1.mlp_norm.\2",
    rf"{_HF}layers\.(\d+)\.fc1\.(\w+)": r"blocks.\1.mlp.0.\2",
    rf"{_HF}layers\.(\d+)\.fc2\.(\w+)": r"blocks.\1.mlp.2.\2",
    rf"{_HF}layer_norm\.(\w+)": r"norm.\1",
}
# the rest of a whole Whisper or TASTE file
SKIP = (
    r"(model\.)?decoder\..*",
    r"proj_out\.weight",
    r"(audio_tower\.audio_joint_encoder_segmenter\.)?audio_segmenter\..*",
    r"(audio_tower\.vq|speech_decoder|spoken_lm)\..*",
)
# openai's own .pt files, the entry "model_state_dict"
NAMES_OPENAI = {
    r"encoder\.(conv[12]\.\w+)": r"\1",
    r"encoder\.positional_embedding": "positions",
    r"encoder\.(blocks\.\d+\.attn\.\w+\.\w+)": r"\1",
    r"encoder\.(blocks\.\d+\.)(attn|mlp)_ln\.(\w+)": r"\1\2_norm.\3",
    r"encoder\.(blocks\.\d+\.mlp\.\d\.\w+)": r"\1",
    r"encoder\.ln_post\.(\w+)": r"norm.\1",
}
SKIP_OPENAI = (r"decoder\..*", r"alignment_heads")


if __name__ == "__main__":
    torch.manual_seed(0)
    model, mel = WhisperEncoder(TINY), torch.randn(2, TINY.n_mels, 230)
    keep = torch.arange(230) < torch.tensor([[230], [115]])  # the second item is half as long
    last, taps = model(mel, keep, taps=(2,))
    print(f"mel {(*mel.shape,)} -> last {(*last.shape,)}, layer 2 {(*taps[2].shape,)}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
