"""Whisper's text decoder: predicts the next token from the tokens so far and the audio frames.

    x_0 = E[ids] + positions
    x  <- x + SelfAttn(LN(x))                 causal: position n sees positions 0 .. n
    x  <- x + softmax(Q K^T / sqrt(D)) V      Q <- LN(x), K <- keys, V <- values (default: keys)
    x  <- x + W_2 GELU(W_1 LN(x))             these three lines are one block
    hidden = LN(x_L),   logits = hidden E^T      one table E for input and output

    ids (B, N) --E--> x (B, N, C) --L blocks, each hears keys, values (B, T, C)--> hidden (B, N, C)

Keys and values may differ: TASTE's aggregator is this decoder with keys from a deep and values from
a shallow layer of the encoder. `transcribe` is greedy speech recognition, `word_times` reads from
the cross-attention when each word was said.
Padding: `keep` hides audio frames; text is padded on the right, where nobody looks.
[Whisper: Radford et al. 2022, arXiv:2212.04356, sec. 2.2]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpu_linear import linear
from kv_cache import KVCache, Step, advance, causal_keep


@dataclass(frozen=True)
class DecoderConfig:
    """The defaults are distil-large-v3; whisper-large-v3 has layers=32 and is else the same."""

    vocab: int = 51866
    width: int = 1280  # C, also of keys and values
    heads: int = 20
    layers: int = 2
    ffn: int = 5120  # width inside the MLP
    max_tokens: int = 448  # rows of the position table, prefix included

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if min(self.vocab, self.layers, self.ffn, self.max_tokens) < 1:
            raise ValueError(f"vocab, layers, ffn and max_tokens must be 1 or more, got {self}")


TINY = DecoderConfig(vocab=512, width=128, heads=4, layers=2, ffn=512, max_tokens=128)


@dataclass
class LayerCache:
    """What one block keeps between steps: its own past, and the audio, projected once."""

    text: KVCache
    audio: tuple[Tensor, Tensor] | None = None  # keys, values (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # a key bias cancels in the softmax
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def project(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values (B, T, C) -> k, v (B, H, T, D)"""
        k = self.key(keys).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        v = self.value(values).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
        return k, v

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, C); k, v (B, H, T, D); mask bool, fits (B, H, N, T) -> y (B, N, C), weights.

        weights (B, H, N, T) fp32 if asked for: y is the same, but without the fused kernel."""
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
        if not need_weights:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D)
            return self.out(y.transpose(1, 2).flatten(2)), None  # (B, N, C)
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B, H, N, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1)
        y = weights.to(v.dtype) @ v  # (B, H, N, D)
        return self.out(y.transpose(1, 2).flatten(2)), weights  # (B, N, C)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        causal: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, C); keys, values (B, T, C); causal (N, past + N); mask (B, 1, 1, T) or None
        -> x (B, N, C), cross-attention weights (B, H, N, T) or None."""
        h = self.attn_norm(x)
        k, v = self.attn.project(h, h)  # (B, H, N, D)
        if cache is not None:
            k, v = cache.text.append(k, v)  # (B, H, past + N, D)
        x = x + self.attn(h, k, v, causal)[0]
        audio = cache.audio if cache is not None else None
        if audio is None:
            audio = self.cross.project(keys, values)  # (B, H, T, D)
            if cache is not None:
                cache.audio = audio
        y, weights = self.cross(self.cross_norm(x), *audio, mask, need_weights)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), weights


class WhisperDecoder(nn.Module):
    def __init__(self, cfg: DecoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.positions = nn.Parameter(torch.empty(cfg.max_tokens, cfg.width))
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.ffn) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.step: Step | None = None  # see compile_steps
        nn.init.normal_(self.tokens.weight, std=0.02)  # also the output layer: keep logits small
        nn.init.normal_(self.positions, std=0.02)

    def forward(
        self,
        ids: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        keep: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ids (B, N) int64; keys, values (B, T, C); keep (B, T) bool -> hidden (B, N, C)

        or, with need_weights, (hidden, cross-attention weights (B, L, H, N, T) fp32).
        caches: from new_caches(); ids then continue where the last call ended, and keys and values
        are read by the first call only. Raises ValueError if positions run out or shapes differ."""
        caches, N = caches or [], ids.shape[1]
        self.check(ids, keys, keep, caches[0].text.length if caches else 0)
        past, total = advance([cache.text for cache in caches], N, ids.device)
        values = keys if values is None else values
        causal = causal_keep(N, past, ids.device, total)  # (N, total)
        mask = None if keep is None else keep[:, None, None, :]  # (B, 1, 1, T)
        x = self.tokens(ids) + self.positions[past : past + N]  # (B, N, C)
        maps: list[Tensor] | None = [] if need_weights else None
        run = self.step if self.step and total > past + N else self.run
        hidden = run(x, keys, values, causal, mask, caches, maps)
        return hidden if maps is None else (hidden, torch.stack(maps, dim=1))

    def run(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        causal: Tensor,
        mask: Tensor | None,
        caches: list[LayerCache],
        maps: list[Tensor] | None,
    ) -> Tensor:
        """x (B, N, C) -> hidden (B, N, C); maps: each block adds its weights (B, H, N, T)."""
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            x, weights = block(x, keys, values, causal, mask, cache, maps is not None)
            if maps is not None:
                maps.append(weights)
        return self.norm(x)

    def compile_steps(self) -> None:
        """From now on: see Step."""
        self.step = Step(self.run, len(self.blocks))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, N, C) -> (B, N, V), with the token table as the output layer."""
        return linear(hidden, self.tokens.weight)

    def new_caches(self) -> list[LayerCache]:
        """One empty cache per block, for forward(caches=...). Use under inference_mode."""
        room = self.cfg.max_tokens
        texts = self.step.caches(room) if self.step else [KVCache(room) for _ in self.blocks]
        return [LayerCache(text) for text in texts]

    def check(self, ids: Tensor, keys: Tensor, keep: Tensor | None, past: int) -> None:
        """Raise ValueError for input that does not fit."""
        if (end := past + ids.shape[1]) > self.cfg.max_tokens:
            raise ValueError(
                f"{end} tokens, the position table ends at {self.cfg.max_tokens}: shorten the text"
            )
        if keys.ndim != 3 or keys.shape[::2] != (len(ids), self.cfg.width):
            fit = f"[{len(ids)}, T, {self.cfg.width}]"
            raise ValueError(f"keys have shape {[*keys.shape]}, wanted {fit}")
        if keep is None or past:  # checked at the first step
            return
        if keep.dtype != torch.bool or keep.shape != keys.shape[:2]:
            got, wanted = f"{keep.dtype} {[*keep.shape]}", [*keys.shape[:2]]
            raise ValueError(f"keep is {got}, wanted bool {wanted}")
        if not keep.any(1).all():
            raise ValueError(f"items {(~keep.any(1)).nonzero().flatten().tolist()} have no frame")


@torch.inference_mode()
def transcribe(
    model: WhisperDecoder,
    keys: Tensor,
    keep: Tensor | None = None,
    *,
    prefix: Sequence[int],
    eos: int,
    max_new: int,
    suppress: Sequence[int] = (),
    suppress_first: Sequence[int] = (),
) -> list[list[int]]:
    """Greedy recognition. keys (B, T, C), keep (B, T) bool -> B lists of ids, no prefix, no eos.

    Each item ends at its own eos, or after max_new ids. Ids in suppress are never chosen, those in
    suppress_first not as the first one (Whisper: the blank and eos). ValueError: no room."""
    if len(prefix) < 1 or len(prefix) + max_new > model.cfg.max_tokens:
        room = f"{len(prefix)} prefix ids and max_new={max_new}"
        raise ValueError(f"{room}: wanted 1 or more, and {model.cfg.max_tokens} at most together")
    ids = torch.tensor([prefix] * len(keys), device=keys.device)  # (B, P)
    done = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)  # (B,)
    caches = model.new_caches()
    steps: list[Tensor] = []
    for step in range(max_new):
        hidden = model(ids, keys, keep=keep, caches=caches)[:, -1:]  # (B, 1, C)
        scores = model.logits(hidden)[:, 0].float()  # (B, V)
        scores[:, [*suppress, *(suppress_first if step == 0 else ())]] = -torch.inf
        ids = scores.argmax(-1, keepdim=True)  # (B, 1), after an item's eos: cut off below
        steps.append(ids)
        done |= ids[:, 0] == eos
        if done.all():
            break
    rows: list[list[int]] = torch.cat(steps, dim=1).tolist() if steps else [[] for _ in keys]
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def word_times(weights: Tensor, word_ids: Sequence[int], frame_s: float) -> Tensor:
    """When was each word said? weights (..., N, T) of one utterance -> (W, 2): start, end in s.

    Mean over the heads given (choose those that align), then the best monotone path: every frame
    belongs to one token, in order, and every token gets a frame. word_ids: word of each token, -1
    for tokens that are no word (prefix, eos: they take up the silence). To time the token that a
    position predicts, shift word_ids. Cut padded frames off first. ValueError if T < N.
    [after Whisper's word timestamps, DTW on the cross-attention, openai/whisper timing.py]"""
    score = weights.reshape(-1, *weights.shape[-2:]).mean(0).double().cpu()  # (N, T)
    N, T = score.shape
    if T < N or len(word_ids) != N or {*range(max(word_ids) + 1)} - {*word_ids}:
        got = f"{N} rows, {T} frames, word_ids={[*word_ids]}"
        raise ValueError(f"{got}: wanted as many ids as rows, no word left out, N <= T")
    best = torch.full((N + 1,), -torch.inf, dtype=torch.float64)  # best[n + 1]: the path ends in n
    best[0], moved = 0.0, torch.zeros(T, N, dtype=torch.bool)
    for t in range(T):
        moved[t] = best[:-1] > best[1:]  # coming from the token before beats staying
        best[1:] = torch.maximum(best[:-1], best[1:]) + score[:, t]
        best[0] = -torch.inf
    word, n = [0] * T, N - 1
    for t in reversed(range(T)):
        word[t] = word_ids[n]
        n -= int(moved[t, n])
    ends = [(word.index(w), T - word[::-1].index(w)) for w in range(max(word_ids) + 1)]
    return torch.tensor(ends).view(-1, 2) * frame_s  # (W, 2)


# transformers' names (whisper, distil-whisper), also below the prefix of the TASTE checkpoint
_HF = r"(?:model\.|(?:audio_tower\.audio_joint_encoder_segmenter\.)?audio_segmenter\.)?decoder\."
_PROJ = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
NAMES = {
    rf"{_HF}embed_tokens\.weight": "tokens.weight",
    rf"{_HF}embed_positions\.weight": "positions",
    rf"{_HF}layers\.(\d+)\.self_attn_layer_norm\.(\w+)": r"blocks.\1.attn_norm.\2",
    **{
        rf"{_HF}layers\.(\d+)\.self_attn\.{a}\.(\w+)": rf"blocks.\1.attn.{b}.\2"
        for a, b in _PROJ.items()
    },
    rf"{_HF}layers\.(\d+)\.encoder_attn_layer_norm\.(\w+)": r"blocks.\1.cross_norm.\2",
    **{
        rf"{_HF}layers\.(\d+)\.encoder_attn\.{a}\.(\w+)": rf"blocks.\1.cross.{b}.\2"
        for a, b in _PROJ.items()
    },
    rf"{_HF}layers\.(\d+)\.final_layer_norm\.(\w+)": r"blocks.\1.mlp_norm.\2",
    rf"{_HF}layers\.(\d+)\.fc1\.(\w+)": r"blocks.\1.mlp.0.\2",
    rf"{_HF}layers\.(\d+)\.fc2\.(\w+)": r"blocks.\1.mlp.2.\2",
    rf"{_HF}layer_norm\.(\w+)": r"norm.\1",
}
# proj_out is the token table again; the others are the rest of a whole Whisper or TASTE file
SKIP = (
    r"proj_out\.weight",
    r"(model\.)?encoder\..*",
    r"(audio_tower\.audio_joint_encoder_segmenter\.)?audio_encoder\..*",
    r"(audio_tower\.vq|speech_decoder|spoken_lm)\..*",
)
# openai's own .pt files, the entry "model_state_dict"
NAMES_OPENAI = {
    r"decoder\.token_embedding\.weight": "tokens.weight",
    r"decoder\.positional_embedding": "positions",
    r"decoder\.(blocks\.\d+\.)cross_attn_ln\.(\w+)": r"\1cross_norm.\2",
    r"decoder\.(blocks\.\d+\.)cross_attn\.(\w+\.\w+)": r"\1cross.\2",
    r"decoder\.(blocks\.\d+\.)(attn|mlp)_ln\.(\w+)": r"\1\2_norm.\3",
    r"decoder\.(blocks\.\d+\.(?:attn\.\w+|mlp\.\d)\.\w+)": r"\1",
    r"decoder\.ln\.(\w+)": r"norm.\1",
}
SKIP_OPENAI = (r"encoder\..*", r"alignment_heads")


if __name__ == "__main__":
    torch.manual_seed(0)
    model, keys = WhisperDecoder(TINY).eval(), torch.randn(2, 50, TINY.width)
    ids = torch.randint(TINY.vocab, (2, 7))
    hidden, weights = model(ids, keys, need_weights=True)
    print(f"ids {(*ids.shape,)} -> hidden {(*hidden.shape,)}, attention {(*weights.shape,)}")
    print(f"transcribe: {transcribe(model, keys, prefix=(1, 2), eos=0, max_new=5)}")
    print(f"word times (s): {word_times(weights[0], [-1, 0, 0, 1, 2, 3, -1], 0.04).tolist()}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
