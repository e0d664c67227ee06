"""Llama: the decoder-only language model, with rotary positions and grouped queries.

    x_0 = embedding
    x  += O softmax(R_i q . R_j k / sqrt(D) | j <= i) v      q, k, v = Q, K, V norm(x)
    x  += W_down (silu(W_gate norm(x)) * W_up norm(x))
    hidden = norm(x_L),   logits = hidden W_head^T           norm(x) = g x / sqrt(mean x^2 + eps)

    R_p turns channel pair (m, m + D/2) by p w_m,  w_m = theta^(-2m/D), slow ones slowed further

    ids (B, N) --embed--> (B, N, C) --L layers--> hidden (B, N, C) --head--> logits (B, N, V)

Heads share keys and values in groups: q has H heads, k and v have G <= H. [Llama: arXiv:2302.13971;
RoPE: 2104.09864; GQA: 2305.13245; SwiGLU: 2002.05202; Llama 3: 2407.21783, sec. 3.2]
A padded batch gives what single sequences give: a position counts the real tokens before it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpu_linear import linear
from kv_cache import KVCache, Step, advance, causal_keep
from weights import load_strict, match, read_config, read_tensors

INIT_STD = 0.02  # of all matrices when trained from scratch


@dataclass(frozen=True)
class LlamaConfig:
    vocab: int = 128256  # V; the defaults are Llama-3.2-1B
    width: int = 2048  # C
    layers: int = 16  # L
    heads: int = 32  # H
    kv_heads: int = 8  # G
    head_dim: int = 64  # D
    ffn: int = 8192  # width inside the feed-forward part
    rope_theta: float = 500000.0
    rope_factor: float | None = 32.0  # slow channels turn this much slower; None: all as they are
    rope_low: float = 1.0  # a channel is slow if it turns less than this often in rope_original,
    rope_high: float = 4.0  # fast if more than this often; in between it is mixed
    rope_original: int = 8192  # tokens, the context before it was stretched
    rope_bf16: bool = False  # Quirk: True for TASTE's LM, see frequencies()
    norm_eps: float = 1e-5
    tied: bool = True  # the head is the embedding table
    max_tokens: int = 131072

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (channels turn in pairs), got {self.head_dim}")
        if self.rope_factor is not None and not 0 < self.rope_low < self.rope_high:
            raise ValueError(
                f"wanted 0 < rope_low < rope_high, got {self.rope_low, self.rope_high}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """config.json of a public Llama (2, 3.x), TinyLlama or SmolLM2 -> LlamaConfig.

        ValueError for what this file does not compute: other models, biases, other rotations."""
        for key, ours in REFUSE.items():
            if config.get(key, ours) != ours:
                raise ValueError(f"config.json: {key}={config[key]!r}, only {ours!r} is supported")
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab=config["vocab_size"],
                width=config["hidden_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                ffn=config["intermediate_size"],
                norm_eps=config.get("rms_norm_eps", 1e-6),
                tied=config.get("tie_word_embeddings", False),
                max_tokens=config.get("max_position_embeddings", 2048),
                **rope_of(config),
            )
        except KeyError as e:
            raise ValueError(f"config.json: {e} is missing") from e


REFUSE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
}
TINY = LlamaConfig(
    vocab=320,
    width=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=352,
    rope_theta=10000.0,
    rope_factor=None,
    max_tokens=1024,
)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_* fields of LlamaConfig from config.json, in its old and its new spelling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    match kind := rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return {"rope_theta": theta, "rope_factor": None}
        case "llama3":
            return {
                "rope_theta": theta,
                "rope_factor": rope["factor"],
                "rope_low": rope["low_freq_factor"],
                "rope_high": rope["high_freq_factor"],
                "rope_original": rope["original_max_position_embeddings"],
            }
    raise ValueError(f"config.json: rope type {kind!r} is unknown, wanted 'default' or 'llama3'")


def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """w (D/2,) fp32, radians per position; with rope_factor, slow channels are slowed down."""
    m = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    w = 1 / config.rope_theta**m
    if config.rope_factor is not None:
        turns = config.rope_original * w / (2 * math.pi)  # in the original context
        fast = (turns - config.rope_low) / (config.rope_high - config.rope_low)
        fast = fast.clamp(0, 1)  # 0: slow, 1: fast
        w = w * (fast + (1 - fast) / config.rope_factor)
    if config.rope_bf16:
        # Quirk: TASTE's LM was cast to bf16 with its frequencies, and its LoRA trained on that
        # [TASTE-SpokenLM 301bce2, language_model.to(bfloat16)].
        w = w.bfloat16().float()
    return w


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> the same shape and dtype; the mean is taken in fp32."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, N, D), turn = (cos, sin) (B or 1, 1, N, D/2): turn pairs (m, m + D/2)."""
    cos, sin = (t.to(x.dtype) for t in turn)
    a, b = x.chunk(2, -1)  # (B, H, N, D/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)  # (B, H, N, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """x (B, N, C) -> (B, N, C). mask: see Llama.mask; None is causal, or one new token."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or G, N, D)
            for layer in (self.q, self.k, self.v)
        )
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, past + N, D)
        causal = mask is None and q.shape[2] == k.shape[2]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
        )  # (B, H, N, D)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, N, C)


class FeedForward(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C)"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        c = config
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.attention = Attention(c.width, c.heads, c.kv_heads, c.head_dim)
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.ffn = FeedForward(c.width, c.ffn)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """x (B, N, C) -> (B, N, C)"""
        x = x + self.attention(self.norm1(x), turn, mask, cache)
        return x + self.ffn(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.step: Step | None = None  # see compile_steps
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(
        self,
        ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        keep: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """ids (B, N) int64, or embeddings (B, N, C) instead -> hidden (B, N, C), normed.

        caches: from new_caches(); this call then continues their P positions (else P = 0).
        keep (B, P + N) bool, of the cached positions too: padding anywhere is not attended to and
        takes no position number, so prompts of different lengths can be continued in one batch."""
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings, not both and not neither")
        x = self.embed(ids) if embeddings is None else embeddings  # (B, N, C)
        caches = caches or []
        self.check(x, caches[0].length if caches else 0, keep)
        past, total = advance(caches, x.shape[1], x.device)
        run = self.step if self.step and total > past + x.shape[1] else self.run
        return run(x, self.turn(x, past, keep), self.mask(x, past, total, keep), caches)

    def run(
        self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, caches: list[KVCache]
    ) -> Tensor:
        """x (B, N, C) -> hidden (B, N, C), normed."""
        for i, layer in enumerate(self.layers):
            x = layer(x, turn, mask, caches[i] if caches else None)
        return self.norm(x)

    def compile_steps(self) -> None:
        """From now on: see Step."""
        self.step = Step(self.run, len(self.layers))

    def check(self, x: Tensor, past: int, keep: Tensor | None) -> None:
        """ValueError if keep or the length does not fit."""
        B, N, _ = x.shape
        if past + N > self.config.max_tokens:
            raise ValueError(f"{past + N} tokens, the model takes {self.config.max_tokens}")
        if keep is not None and (keep.shape != (B, past + N) or keep.dtype != torch.bool):
            got = f"{keep.dtype} {(*keep.shape,)}"
            raise ValueError(f"keep must be bool (B, past + N) = {(B, past + N)}, got {got}")

    def turn(self, x: Tensor, past: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, N, D/2) fp32 of the angles of the new positions."""
        if keep is None:
            position = torch.arange(past, past + x.shape[1], device=x.device)[None]  # (1, N)
        else:
            position = (keep.cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, N)
        angle = position[:, None, :, None] * frequencies(self.config, x.device)  # (B, 1, N, D/2)
        return angle.cos(), angle.sin()

    def mask(self, x: Tensor, past: int, total: int, keep: Tensor | None) -> Tensor | None:
        """Who attends to whom, (B or 1, 1, N, total) bool, or None: SDPA's own causal mask."""
        N = x.shape[1]
        if keep is None and total == past + N and (past == 0 or N == 1):
            return None
        mask = causal_keep(N, past, x.device, total)[None, None]  # (1, 1, N, total)
        if keep is not None:
            mask = mask & F.pad(keep, (0, total - past - N))[:, None, None, :]
            # Padding sees at least itself: a softmax over nothing is NaN.
            itself = torch.eye(total, device=x.device, dtype=torch.bool)
            mask = mask | itself[past : past + N]
        return mask

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V)"""
        return linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    def new_caches(self, max_len: int) -> list[KVCache]:
        """Empty caches, one per layer, for sequences of up to max_len tokens."""
        return self.step.caches(max_len) if self.step else [KVCache(max_len) for _ in self.layers]


def pick(
    logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, rng: torch.Generator | None = None
) -> Tensor:
    """logits (..., V) -> ids (...) int64. Temperature 0: the most likely.

    top_p: draw among the fewest ids whose probability, after temperature, reaches top_p."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"wanted temperature >= 0 and 0 < top_p <= 1, got {temperature=}, {top_p=}"
        )
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.amax(-1, keepdim=True)  # no overflow however cold
    p = (logits / temperature).softmax(-1)  # (..., V)
    if top_p < 1:
        falling, order = p.sort(-1, descending=True)
        above = F.pad(falling.cumsum(-1), (1, -1))  # probability of all that are more likely
        p = p.scatter(-1, order, falling.masked_fill(above >= top_p, 0.0))  # in their old places
    return torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=rng).view(p.shape[:-1])


NAMES = {
    r"(?:model\.)?embed_tokens\.weight": "embed.weight",
    r"(?:model\.)?layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.norm1.weight",
    # The last part is "weight", or what lora.NAMES made of it.
    r"(?:model\.)?layers\.(\d+)\.self_attn\.([qkvo])_proj\.(.+)": r"layers.\1.attention.\2.\3",
    r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.norm2.weight",
    r"(?:model\.)?layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(.+)": r"layers.\1.ffn.\2.\3",
    r"(?:model\.)?norm\.weight": "norm.weight",
    r"lm_head\.weight": "head.weight",
}
SKIP = (r".*rotary_emb\.inv_freq",)  # old files store what frequencies() computes


def settle_head(
    config: LlamaConfig, tensors: Mapping[str, Tensor], prefix: str = ""
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Our names: a head stored beside a tied table is used, or dropped where it is a mere copy."""
    tensors, table = dict(tensors), tensors.get(f"{prefix}embed.weight")
    if config.tied and (head := tensors.get(f"{prefix}head.weight")) is not None:
        if table is None or head.is_meta or not head.equal(table):
            config = replace(config, tied=False)
        else:
            del tensors[f"{prefix}head.weight"]
    return config, tensors


def load_llama(folder: Path) -> Llama:
    """A public model folder, as `hf download` leaves it (config.json, weights) -> Llama, in the
    dtype of the file."""
    config = LlamaConfig.from_hf(read_config(folder))
    ours, problems = match(read_tensors(folder), NAMES, SKIP)
    config, ours = settle_head(config, ours)
    with torch.device("meta"):
        model = Llama(config)
    load_strict(model, ours, str(folder), problems)
    return model.eval()


if __name__ == "__main__":
    model, ids = Llama(TINY).eval(), torch.randint(TINY.vocab, (2, 5))
    with torch.inference_mode():
        print(f"ids {(*ids.shape,)} -> logits {(*model.logits(model(ids)).shape,)}")
        caches = model.new_caches(20)
        for _ in range(10):
            hidden = model(ids if not caches[0].length else ids[:, -1:], caches=caches)
            ids = torch.cat([ids, pick(model.logits(hidden[:, -1:]))], 1)
    print(f"sampled {ids[0, 5:].tolist()}")
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
