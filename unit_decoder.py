"""Unit decoder: text, one prosody vector per text token and a voice -> S3 speech units.

    fused = g_0 A(audio) + g_1 T(text),  g = softmax(mix)     A, T: causal transformers, per token
    x     = [sos | W_s speaker/|speaker| | fused (N) | task | E(units) (U)]
    p(unit_t | all before) = softmax(head(LM(x)))             from task on; after the last unit: EOS

    score(i, j) = [(q_i + u) . k_j + (q_i + v) . W_pos R(i - j)] / sqrt(D),   j <= i, in all three
    R(r)[2m] = sin(r w_m),  R(r)[2m+1] = cos(r w_m),  w_m = 10000^(-2m/C)

    text_ids (B, N) --T--> (B, N, C) -+--> x (B, 3+N+U, C) --LM, head--> logits (B, 1+U, units+1)
    audio (B, N, Ca) --A--> (B, N, C) -'

A score knows only i - j, so shorter texts are shifted right until all task positions meet: items
stay contiguous, unit t is predicted in one column, and one KV cache serves the whole batch.
[TASTE: Tseng et al. 2025, arXiv:2504.07053; the layers are those of CosyVoice-300M's
LLM, Du et al. 2024, arXiv:2407.05407; attention: Dai et al. 2019, arXiv:1901.02860, sec. 3.3]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kv_cache import KVCache, Step, advance, causal_keep

IGNORE = -1  # pads units and targets: 0 is a real unit
MAX_TIME = 10000.0  # longest period of R, in positions / 2 pi
INIT_STD = 0.02  # of every weight matrix and embedding
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class UnitDecoderConfig:
    vocab: int = 51866  # text ids (Whisper's)
    units: int = 4096  # speech units; id `units` is EOS
    audio_dim: int = 1280  # Ca, of the quantized audio vectors
    speaker_dim: int = 192  # X, of the voice
    embed_dim: int = 512  # of the text embedding, and of the audio after its first projection
    branch_width: int = 1024  # C of the text and the audio branch
    width: int = 1024  # C of the language model
    heads: int = 8  # H, everywhere
    ffn: int = 2048  # inner width of the feed-forward layers, everywhere
    text_blocks: int = 3
    audio_blocks: int = 2
    lm_blocks: int = 7
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = {k: v for k, v in vars(self).items() if k != "dropout"}
        if min(sizes.values()) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"sizes must be at least 1 and dropout in [0, 1), got {self}")
        for name in ("branch_width", "width"):
            if (width := getattr(self, name)) % (2 * self.heads):
                raise ValueError(f"{name}={width} must be a multiple of 2 * heads={2 * self.heads}")


TINY = UnitDecoderConfig(
    vocab=512, units=1024, audio_dim=128, speaker_dim=64, embed_dim=128, branch_width=128,
    width=128, heads=4, ffn=512, text_blocks=2, audio_blocks=1, lm_blocks=4,
)  # fmt: skip


@dataclass
class UnitDecoderOutput:
    """Row t of logits and target belongs to unit t; the row after an item's last unit to EOS."""

    logits: Tensor  # (B, 1+U, units+1) fp32; the last class is EOS
    target: Tensor  # (B, 1+U) int64, IGNORE where nothing is to be predicted
    loss: Tensor  # mean cross-entropy in nats over the rows that have a target, EOS included
    maps: list[Tensor]  # if asked for, of each block: attention of rows to text, (B, H, 1+U, N)

    @property
    def correct(self) -> Tensor:
        """(B, 1+U) bool: the best class of all, EOS among them, is the target."""
        return self.logits.argmax(-1) == self.target

    @property
    def accuracy(self) -> Tensor:
        """Part of the targets hit, EOS included (the published figure)."""
        return self.correct[self.target != IGNORE].float().mean()

    @property
    def unit_accuracy(self) -> Tensor:
        """Part of the units hit; EOS is not counted, though it may be a wrong answer."""
        is_unit = (self.target != IGNORE) & (self.target != self.logits.shape[-1] - 1)
        return self.correct[is_unit].float().mean()


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """R(r) for r = length-1, .., 1, 0 -> (length, width): the farthest key comes first."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(MAX_TIME) / width))
    angle = torch.arange(length - 1, -1, -1.0, device=device)[:, None] * rate  # (length, width/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (length, width)


def by_key(x: Tensor) -> Tensor:
    """(B, H, n, t) by distance t-1 .. 0 -> (B, H, n, t) by key 0 .. t-1, for the last n queries.

    One more column makes each row slip by one. What lies in the future of a query is meaningless.
    [Dai et al. 2019, appendix B]"""
    n, t = x.shape[-2:]
    return F.pad(x, (1, 0)).flatten(-2)[..., n:].unflatten(-1, (n, t))


class RelativeAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.v = nn.Linear(width, width), nn.Linear(width, width)
        # Quirk: public files have the bias of k, though the softmax cancels it
        self.k = nn.Linear(width, width)
        self.pos = nn.Linear(width, width, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.bias_v = nn.Parameter(torch.zeros(heads, width // heads))
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, distance: Tensor, seen: Tensor, cache: KVCache | None,
        slip: Tensor | None = None,
    ) -> Pair:  # fmt: skip
        """x (B, n, C); distance (H, t, D), W_pos R; seen (B or 1, 1, n, t) bool -> (B, n, C), and
        where each position looked, (B, H, n, t). slip (t,): from distances to keys, n = 1."""
        qkv = (f(x).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (y.transpose(1, 2) for y in qkv)  # (B, H, n, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, t, D)
        content = (q + self.bias_u[:, None]) @ k.transpose(2, 3)  # (B, H, n, t)
        position = (q + self.bias_v[:, None]) @ distance.transpose(1, 2)  # (B, H, n, t)
        position = by_key(position) if slip is None else position[..., slip]
        score = (content + position).float() / q.shape[3] ** 0.5
        # finite, not -inf: a padding row, which sees nothing, gives a mean and no NaN
        score = score.masked_fill(~seen, torch.finfo(score.dtype).min)
        weights = score.softmax(-1)
        y = weights.to(v.dtype) @ v  # (B, H, n, D)
        return self.out(y.transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float, act: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = RelativeAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.act, self.drop = act, nn.Dropout(dropout)

    def forward(
        self, x: Tensor, distance: Tensor, seen: Tensor, cache: KVCache | None,
        slip: Tensor | None = None,
    ) -> Pair:  # fmt: skip
        """x (B, n, C) -> (B, n, C): pre-norm attention, then pre-norm feed-forward; weights."""
        y, weights = self.attn(self.norm1(x), distance, seen, cache, slip)
        x = x + self.drop(y)
        return x + self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm2(x)))))), weights


# what generation keeps, per block: keys and values so far, and W_pos R, (H, max_len, D)
Past = list[tuple[KVCache, Tensor]]


class Stack(nn.Module):
    """A causal transformer with its input layer. ReLU in the language model, SiLU in branches."""

    def __init__(
        self, inputs: int, width: int, blocks: int, config: UnitDecoderConfig, is_lm: bool = False
    ) -> None:
        super().__init__()
        self.width, self.is_lm = width, is_lm
        self.into, self.into_norm = nn.Linear(inputs, width), nn.LayerNorm(width)
        layer = config.heads, config.ffn, config.dropout, nn.ReLU() if is_lm else nn.SiLU()
        self.blocks = nn.ModuleList(Block(width, *layer) for _ in range(blocks))
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(config.dropout)
        self.step: Step | None = None  # see compile_steps

    def distances(self, length: int) -> list[Tensor]:
        """W_pos R(length-1 .. 0), (H, length, D), of each block."""
        table = sinusoids(length, self.width, self.into.weight.device)  # (length, C)
        attns = [m for m in self.modules() if isinstance(m, RelativeAttention)]
        return [a.pos(table).unflatten(1, (a.heads, -1)).transpose(0, 1) for a in attns]

    def past(self, max_len: int) -> Past:
        """Room for max_len positions, to be handed to forward step by step."""
        if self.step:
            caches = self.step.caches(max_len)
            return list(zip(caches, self.distances(caches[0].max_len), strict=True))
        return [(KVCache(max_len), distance) for distance in self.distances(max_len)]

    def forward(
        self, x: Tensor, keep: Tensor | None = None, past: Past | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, n, inputs), the next n positions -> (B, n, C). keep (B, t): which keys are real.

        Without `past` t = n. Padding on the right needs no keep: nothing real looks ahead.
        maps: a list to which each block adds where it looked, (B, H, n, t)."""
        n, caches = x.shape[1], [cache for cache, _ in past or []]
        before, t = advance(caches, n, x.device)
        seen, slip = causal_keep(n, before, x.device, t), None  # (n, t)
        if keep is not None:  # (B, 1, n, t): the same for all heads
            seen = (seen & F.pad(keep, (0, t - before - n))[:, None])[:, None]
        if t > before + n:  # what is not there yet comes last among the keys, first among distances
            slip = (torch.arange(t, device=x.device) + t - 1 - before) % t
        x = self.drop(self.into_norm(self.into(x).float()))  # (B, n, C)
        if self.is_lm:
            x = x.relu()  # Quirk: the published LM clips its input, so that it is never negative
        x = self.drop(x * self.width**0.5)
        distance = [d[:, -t:] for _, d in past] if past else self.distances(n)  # (H, t, D) each
        run = self.step if self.step and t > before + n else self.run
        return run(x, distance, seen, slip, caches, maps)

    def run(
        self, x: Tensor, distance: list[Tensor], seen: Tensor, slip: Tensor | None,
        caches: list[KVCache], maps: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """x (B, n, C) -> (B, n, C), normed."""
        for i, block in enumerate(self.blocks):
            x, weights = block(x, distance[i], seen, caches[i] if caches else None, slip)
            if maps is not None:
                maps.append(weights)
        return self.norm(x)

    def compile_steps(self) -> None:
        """From now on: see Step."""
        self.step = Step(self.run, len(self.blocks))


class UnitDecoder(nn.Module):
    def __init__(self, config: UnitDecoderConfig) -> None:
        super().__init__()
        self.config, C = config, config.width
        self.text_embed = nn.Embedding(config.vocab, config.embed_dim)
        self.text = Stack(config.embed_dim, config.branch_width, config.text_blocks, config)
        self.text_out = nn.Linear(config.branch_width, C)
        self.audio_in = nn.Linear(config.audio_dim, config.embed_dim)
        self.audio = Stack(config.embed_dim, config.branch_width, config.audio_blocks, config)
        self.audio_out = nn.Linear(config.branch_width, C)
        self.mix = nn.Parameter(torch.ones(2))  # audio, text
        self.speaker = nn.Linear(config.speaker_dim, C)
        self.marks = nn.Embedding(2, C)  # sos, task
        self.unit_embed = nn.Embedding(config.units, C)
        self.lm = Stack(C, C, config.lm_blocks, config, is_lm=True)
        self.head = nn.Linear(C, config.units + 1)
        for module in self.modules():  # the published start of training: small, no bias
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, text_ids: Tensor, text_keep: Tensor | None, audio: Tensor | None, speaker: Tensor,
        units: Tensor, history_keep: Tensor | None = None, need_maps: bool = True,
    ) -> UnitDecoderOutput:  # fmt: skip
        """Teacher forcing: the prompt as in `prompt`, units (B, U) int64, padded right with -1.

        history_keep (B, U) bool, ours, not the papers': where False, that unit's embedding is zero
        and the model must ask text and audio. A random mask in training is history dropout; all
        False in evaluation gives the history-masked accuracy. Masked units stay targets.
        Raises ValueError for units out of range or not padded right."""
        _check_units(units, self.config.units)
        prompt, keep = self.prompt(text_ids, text_keep, audio, speaker)  # (B, P, C), (B, P)
        history = self.unit_embed(units.clamp(min=0))  # (B, U, C)
        if history_keep is not None:
            history = history.masked_fill(~history_keep[..., None], 0.0)
        x, maps = torch.cat([prompt, history], 1), list[Tensor]() if need_maps else None
        x = self.lm(x, F.pad(keep, (0, units.shape[1]), value=True), maps=maps)
        logits = self.head(x[:, prompt.shape[1] - 1 :]).float()  # (B, 1+U, units+1)
        target = F.pad(units, (0, 1), value=IGNORE)  # (B, 1+U)
        target.scatter_(1, (units != IGNORE).sum(1, keepdim=True), self.config.units)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
        if maps is None:
            return UnitDecoderOutput(logits, target, loss, [])
        N, rows = text_ids.shape[1], slice(prompt.shape[1] - 1, None)
        at = 2 + (torch.arange(N, device=keep.device) - keep.sum(1, keepdim=True) + 3) % N  # (B, N)
        at = at[:, None, None].expand(-1, self.config.heads, logits.shape[1], -1)
        return UnitDecoderOutput(logits, target, loss, [m[:, :, rows].gather(3, at) for m in maps])

    def prompt(
        self, text_ids: Tensor, text_keep: Tensor | None, audio: Tensor | None, speaker: Tensor
    ) -> tuple[Tensor, Tensor]:
        """text_ids (B, N), text_keep (B, N) bool padded right (None: all real), audio (B, N, Ca),
        speaker (B, X) of any norm -> [sos | speaker | fused | task], padded left: (B, P, C) and
        its keep (B, P), P = 3 + N. audio=None: the text branch alone, no mixing."""
        B, N = text_ids.shape
        keep = torch.ones_like(text_ids, dtype=torch.bool) if text_keep is None else text_keep
        self._check([B, N], keep, audio, speaker)
        voice = self.speaker(F.normalize(speaker.float(), dim=-1))[:, None]  # (B, 1, C)
        marks = self.marks.weight.expand(B, -1, -1)  # (B, 2, C)
        fused = self.fuse(text_ids, keep, audio)  # (B, N, C)
        x = torch.cat([marks[:, :1], voice, fused, marks[:, 1:]], 1)  # (B, P, C)
        at = torch.arange(x.shape[1], device=x.device)  # (P,)
        shift = N - keep.sum(1, keepdim=True)  # (B, 1)
        source = torch.where(at < at[-1], (at - shift).clamp(min=0), at)  # (B, P): task stays last
        return x.gather(1, source[..., None].expand_as(x)), at >= shift

    def _check(self, BN: list[int], keep: Tensor, audio: Tensor | None, speaker: Tensor) -> None:
        wanted = {"text_keep": BN, "speaker": [BN[0], self.config.speaker_dim]}
        wanted["audio"] = [*BN, self.config.audio_dim]
        for name, x in {"text_keep": keep, "speaker": speaker, "audio": audio}.items():
            if x is not None and [*x.shape] != wanted[name]:
                raise ValueError(f"{name}: shape {[*x.shape]}, wanted {wanted[name]}")
        if (~keep[:, :1].any(1)).any() | (keep[:, 1:] & ~keep[:, :-1]).any():
            raise ValueError("text_keep: each item needs a token, and padding only on the right")

    def fuse(self, text_ids: Tensor, keep: Tensor, audio: Tensor | None) -> Tensor:
        """text_ids, keep (B, N), audio (B, N, Ca) or None -> (B, N, C); padding holds leftovers."""
        text = self.text_out(self.text(self.text_embed(text_ids.masked_fill(~keep, 0))))
        if audio is None:
            return text
        audio = self.audio_in(audio.masked_fill(~keep[..., None], 0.0))  # (B, N, embed_dim)
        audio = self.audio_out(self.audio(audio))  # (B, N, C)
        g = self.mix.float().softmax(0)
        return g[0] * audio + g[1] * text

    @torch.no_grad()
    def generate(
        self, text_ids: Tensor, text_keep: Tensor | None, audio: Tensor | None, speaker: Tensor,
        *, top_k: int = 25, temperature: float = 1.0, min_ratio: float = 2.0,
        max_ratio: float = 20.0, min_len: int | None = None, max_len: int | None = None,
        greedy: bool = False, rng: torch.Generator | None = None,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """The prompt as in `prompt` -> per item (U_b,) int64 without EOS, and stopped (B,) bool:
        True where EOS ended the item, False where its limit did.

        An item has min_len to max_len units, by default ratio * (its text tokens + 3). Greedy
        gives each item what it gives alone. Raises ValueError for settings that cannot be."""
        if self.training:
            raise ValueError("generate() on a model in training mode would drop out: call .eval()")
        if temperature <= 0 or top_k < 1:
            raise ValueError(f"wanted temperature > 0 and top_k >= 1, got {temperature}, {top_k}")
        x, keep = self.prompt(text_ids, text_keep, audio, speaker)  # (B, P, C), (B, P)
        L = keep.sum(1)  # (B,) Quirk: the published limits count the whole prompt, not the text
        least = (L * min_ratio).long() if min_len is None else torch.full_like(L, min_len)
        most = (L * max_ratio).long() if max_len is None else torch.full_like(L, max_len)
        if (least > most).any() or (most < 1).any():
            raise ValueError(f"no length between {least.tolist()} and {most.tolist()} units")
        draw = partial(pick, top_k=1 if greedy else top_k, temperature=temperature, rng=rng)
        return self._continue(x, keep, least, most, draw)

    def _continue(
        self, x: Tensor, keep: Tensor, least: Tensor, most: Tensor, draw: Callable[..., Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Prompt x (B, P, C), keep (B, P); least and most units (B,) -> what generate returns."""
        past = self.lm.past(x.shape[1] + int(most.max()))
        running, stopped, out = most > 0, most < 0, []
        for step in range(int(most.max())):
            logits = self.head(self.lm(x, keep, past)[:, -1]).float()  # (B, units+1)
            unit = draw(logits, step < least)  # (B,)
            stopped |= running & (unit == self.config.units)
            running &= unit != self.config.units
            out.append(unit.masked_fill(~running, IGNORE))
            running &= step + 1 < most
            if not running.any():
                break
            x = self.unit_embed(out[-1].clamp(min=0))[:, None]  # (B, 1, C)
            keep = F.pad(keep, (0, 1), value=True)  # (B, t)
        return [row[row != IGNORE] for row in torch.stack(out, 1)], stopped


def pick(
    logits: Tensor, early: Tensor, top_k: int, temperature: float, rng: torch.Generator | None
) -> Tensor:
    """logits (B, units+1), early (B,) bool: EOS is forbidden -> ids (B,) int64. top_k 1: the best.

    The published code draws from the best top_k until the draw is not EOS, which may take for ever.
    Taking EOS out of those top_k and drawing once has the same distribution."""
    top = logits.topk(min(top_k, logits.shape[1])).indices  # (B, top_k)
    logits = torch.cat([logits[:, :-1], logits[:, -1:].masked_fill(early[:, None], -torch.inf)], 1)
    best = logits.argmax(-1, keepdim=True)  # (B, 1), stays when EOS was the only one of the top_k
    if top_k == 1:
        return best.squeeze(1)
    allowed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, torch.cat([top, best], 1), True)
    odds = (logits.masked_fill(~allowed, -torch.inf) / temperature).softmax(-1)  # (B, units+1)
    return odds.multinomial(1, generator=rng).squeeze(1)


def _check_units(units: Tensor, count: int) -> None:
    gap = (units[:, 1:] != IGNORE) & (units[:, :-1] == IGNORE)  # (B, U-1)
    if gap.any() | ((units < IGNORE) | (units >= count)).any():
        got = f"{units.min()}..{units.max()} with {gap.sum()} gaps"
        raise ValueError(f"units {got}: wanted 0..{count - 1}, right-padded with {IGNORE}, no EOS")


def _names(theirs: str, ours: str) -> dict[str, str]:
    stack = rf"speech_decoder\.{theirs}\."
    attn, block = stack + r"encoders\.(\d+)\.self_attn\.", stack + r"encoders\.(\d+)\."
    return {
        stack + r"embed\.out\.0\.(\w+)": rf"{ours}.into.\1",
        stack + r"embed\.out\.1\.(\w+)": rf"{ours}.into_norm.\1",
        stack + r"after_norm\.(\w+)": rf"{ours}.norm.\1",
        attn + r"linear_(q|k|v|out|pos)\.(\w+)": rf"{ours}.blocks.\1.attn.\2.\3",
        attn + r"pos_(bias_[uv])": rf"{ours}.blocks.\1.attn.\2",
        block + r"feed_forward\.w_([12])\.(\w+)": rf"{ours}.blocks.\1.fc\2.\3",
        block + r"(?:norm1|norm_mha)\.(\w+)": rf"{ours}.blocks.\1.norm1.\2",
        block + r"(?:norm2|norm_ff)\.(\w+)": rf"{ours}.blocks.\1.norm2.\2",
    }


NAMES = {
    **_names("text_encoder", "text"),
    **_names("audio_token_encoder", "audio"),
    **_names("llm", "lm"),
    r"speech_decoder\.text_embedding\.weight": "text_embed.weight",
    r"speech_decoder\.(text|audio)(?:_token)?_encoder_affine_layer\.(\w+)": r"\1_out.\2",
    r"speech_decoder\.audio_embed_affine_layer\.(\w+)": r"audio_in.\1",
    r"speech_decoder\.fuse_encoded_audio_text_module\.weights": "mix",
    r"speech_decoder\.spk_embed_affine_layer\.(\w+)": r"speaker.\1",
    r"speech_decoder\.llm_embedding\.weight": "marks.weight",
    r"speech_decoder\.speech_embedding\.weight": "unit_embed.weight",
    r"speech_decoder\.llm_decoder\.(\w+)": r"head.\1",
}
SKIP = (r"(audio_tower|spoken_lm)\..*",)  # the other parts of the published file

if __name__ == "__main__":
    model = UnitDecoder(TINY).eval()
    text, units = torch.randint(TINY.vocab, (2, 8)), torch.randint(TINY.units, (2, 70))
    audio, voice = torch.randn(2, 8, TINY.audio_dim), torch.randn(2, TINY.speaker_dim)
    out = model(text, None, audio, voice, units)
    said, _ = model.generate(text, None, audio, voice, max_len=50)
    print(f"text {(*text.shape,)}, audio {(*audio.shape,)} -> logits {(*out.logits.shape,)}")
    print(
        f"{[len(u) for u in said]} units, {sum(p.numel() for p in model.parameters()):,} parameters"
    )
