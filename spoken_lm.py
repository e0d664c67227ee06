"""The spoken language model: a text LM that also hears and says the TASTE codes of each word.

    x_0 = E[sos]                                       h = Llama(x),  LoRA on a frozen text LM
    x_p = w_0 (W a_p + b) + w_1 E[t_p]                 (w_0, w_1) = softmax(weights)
    a_p = embedding of the codes of word(t_p) - d      the word before, if d = 1

    h_p -> next text token t_{p+1};  where that begins word u + d, also -> codes of word u
    loss = 1/2 text + 1/2 codes,     text = 0.9 KL(untouched LM || ours) + 0.1 CE
    codes, token head:  mean CE over the Q codebooks
    codes, latent head: y = sum of the code vectors, z = mu + sigma eps, quantized residually;
        1/2 mean (z - y)^2 + 1/4 mean (sigma^2 + (mu - y)^2 - 1 - log sigma^2)

    ids, word ids (B, N), codes (B, W, Q) --layout, rows--> x (B, R, C) --llm--> hidden (B, R, C)
      --> text logits (B, R, V), codes (B, R, Q)       R = N + d + 1: sos in front, d rows behind

[TASTE: arXiv:2504.07053, sec. 3.2; numbers: TASTE-SpokenLM 301bce2; TASLA: arXiv:2510.14934]
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llm as llama
import lora
from fsq import FSQ
from llm import Llama, LlamaConfig, pick
from rvq import RVQ
from vocabulary import LLAMA3_SPECIAL
from weights import load_strict, match

IGNORE = -1  # label of a position that predicts nothing; also word id and code of padding
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # layers of the Llama that LoRA adapts
HEADS = ("latent", "token", "token_mse")


@dataclass(frozen=True)
class SpokenLMConfig:
    llm: LlamaConfig = field(default_factory=lambda: LlamaConfig(rope_bf16=True))
    sos: int = LLAMA3_SPECIAL  # text id in front of everything
    lora_rank: int = 64
    lora_alpha: float = 128.0
    lora_dropout: float = 0.05
    audio_dim: int = 1280  # width of the quantizer's embedding
    delay: int = 1  # d, words
    head: str = "latent"  # latent (RVQ only) | token | token_mse (RVQ only)
    n_codebooks: int = 4  # Q
    n_codes: int = 512  # K
    latent_dim: int = 256  # E, width of the RVQ's code space; only head="latent" uses it
    reference_weight: float = 0.9  # of the KL in the text loss
    code_weight: float = 0.5  # of the code loss in the whole

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}: wanted one of {HEADS}")
        for name in ("lora_rank", "audio_dim", "delay", "n_codebooks", "n_codes", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.sos < self.llm.vocab:
            raise ValueError(f"sos={self.sos} is no id of a vocabulary of {self.llm.vocab}")
        if not (0 <= self.reference_weight <= 1 and 0 <= self.code_weight <= 1):
            raise ValueError("reference_weight and code_weight must be in [0, 1]")


TINY = SpokenLMConfig(
    llama.TINY, sos=1, lora_rank=16, lora_alpha=32.0, audio_dim=128, head="token",
    n_codebooks=12, n_codes=8,
)  # fmt: skip


class Layout(NamedTuple):
    """One row per position of the LM; IGNORE where there is nothing."""

    ids: Tensor  # (B, R) int64, text token of the row
    heard: Tensor  # (B, R) int64, the word whose codes are fused into the row
    text_labels: Tensor  # (B, R) int64
    code_labels: Tensor  # (B, R, Q) int64
    keep: Tensor  # (B, R) bool


def layout(
    ids: Tensor, word_ids: Tensor, codes: Tensor, delay: int, faithful: bool = False
) -> Layout:
    """ids, word_ids (B, N) int64, word_ids IGNORE at padding; codes (B, W, Q). For d = 1:

        row          0      1      2      3      4      5
        text         sos    the    cap    tain   saw    -        three words, d rows behind
        heard        -      -      the    the    cap-   saw
        text label   the    cap    tain   saw    -      -
        code label   -      the    -      cap-   saw    -        asked once, when first heard next

    With d = 2 `heard` moves one more word down and one more row follows. If W <= d, the codes are
    heard in the last W rows. ValueError: empty rows, padding on the left, words without codes."""
    real, step = word_ids >= 0, word_ids.diff(dim=1, prepend=torch.full_like(ids[:, :1], -1))
    length, words = real.sum(1, True), word_ids.amax(1, True) + 1  # (B, 1) each
    here = torch.arange(ids.shape[1] + delay + 1, device=ids.device)  # (R,)
    good = (real == (here[: -1 - delay] < length)) & ((step == 0) | (step == 1) | ~real)
    good = good.all(1) & (length[:, 0] > 0)  # (B,)
    if not good.all():
        odd = word_ids[~good][0].tolist()
        raise ValueError(f"word_ids must count 0, 1, .. and then be {IGNORE}, got {odd}")
    if int(words.max()) > codes.shape[1]:
        raise ValueError(f"{int(words.max())} words, but codes for {codes.shape[1]} only")
    behind = here - 1 - length  # (B, R), 0 .. d-1 in the rows after the text
    word = F.pad(word_ids, (1, delay), value=IGNORE)  # (B, R)
    word = torch.where(behind >= 0, words + behind, word)
    heard = torch.where(behind < delay, word - delay, IGNORE).clamp(min=IGNORE)  # (B, R)
    text = F.pad(ids, (1, delay)).masked_fill((behind >= 0) | (here == 0), IGNORE)  # (B, R)
    labels = F.pad(text[:, 1:], (0, 1), value=IGNORE)
    if faithful:
        # Quirk: shorter rows of a public batch learn to say "!" (id 0) once they are over.
        labels = labels.masked_fill((behind >= -1) & (behind < delay) & (here < ids.shape[1]), 0)
    asked = F.pad(heard[:, 1:], (0, 1), value=IGNORE)  # (B, R), the word heard in the next row
    asked = asked.masked_fill(asked == heard, IGNORE)[..., None]  # (B, R, 1)
    said = codes.gather(1, asked.clamp(min=0).expand(-1, -1, codes.shape[2]))  # (B, R, Q)
    return Layout(text, heard, labels, said.where(asked >= 0, IGNORE), behind < delay)


class LatentHead(nn.Module):
    """A Gaussian in the code space of the RVQ; codes are read off by residual quantization."""

    def __init__(self, width: int, latent_dim: int) -> None:
        super().__init__()
        self.mu = nn.Linear(width, latent_dim)
        self.logvar = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> mu (..., E) fp32"""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.mu(hidden.float())

    def latent(self, mu: Tensor) -> Tensor:
        """mu (..., E) -> z (..., E)"""
        # Quirk: outside training z is mu + sigma, not mu, and the gradient is always that of
        # mu + sigma [TASTE-SpokenLM 301bce2]; the public weights were trained around it.
        sigma = (0.5 * self.logvar).exp()
        noise = torch.randn_like(mu) - 1 if self.training else torch.zeros_like(mu)
        return mu + sigma + (sigma * noise).detach()

    def loss(self, hidden: Tensor, codes: Tensor, quantizer: Any) -> Tensor:
        """hidden (M, C), codes (M, Q) -> ()"""
        mu, y = self(hidden), quantizer.latent(codes).detach()  # (M, E) each
        regression = (self.latent(mu) - y).square().mean()
        kl = self.logvar.exp() + (mu - y).square() - 1 - self.logvar
        return 0.5 * regression + 0.25 * kl.mean()

    def likelihood(self, hidden: Tensor, codes: Tensor, quantizer: Any) -> Tensor:
        """hidden (M, C), codes (M, Q) -> log density of y (M,), in nats."""
        squares = (self(hidden) - quantizer.latent(codes)).square() / self.logvar.exp()  # (M, E)
        return -0.5 * (squares + self.logvar + math.log(2 * math.pi)).sum(-1)

    def say(
        self, hidden: Tensor, quantizer: Any, temperature: float, rng: torch.Generator | None
    ) -> Tensor:
        """hidden (..., C) -> codes (..., Q); there is nothing to draw, whatever the temperature."""
        return quantizer.encode_latent(self.latent(self(hidden)))


class TokenHead(nn.Module):
    """A softmax over the K codes of each codebook, all codebooks at once."""

    def __init__(self, width: int, n_codebooks: int, n_codes: int, mse: bool = False) -> None:
        super().__init__()
        self.n_codes, self.mse = n_codes, mse
        self.linear = nn.Linear(width, n_codebooks * n_codes)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., Q, K) fp32"""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).unflatten(-1, (-1, self.n_codes))

    def loss(self, hidden: Tensor, codes: Tensor, quantizer: Any) -> Tensor:
        """hidden (M, C), codes (M, Q) -> mean CE (); with mse, half of it and half of the squared
        distance between the mean code vector and the true one."""
        logits = self(hidden)  # (M, Q, K)
        ce = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        if not self.mse:
            return ce
        error = quantizer.expected(logits).sum(-2) - quantizer.latent(codes)  # (M, E)
        return 0.5 * (error.square().mean() + ce)

    def likelihood(self, hidden: Tensor, codes: Tensor, quantizer: Any) -> Tensor:
        """hidden (M, C), codes (M, Q) -> log probability of all Q codes (M,), in nats."""
        return self(hidden).log_softmax(-1).gather(-1, codes[..., None]).sum((-1, -2))

    def say(
        self, hidden: Tensor, quantizer: Any, temperature: float, rng: torch.Generator | None
    ) -> Tensor:
        """hidden (..., C) -> codes (..., Q); temperature 0: the most likely."""
        return pick(self(hidden), temperature, rng=rng)


@dataclass
class SpokenLMOutput:
    loss: Tensor  # the sum that is minimized
    text_ce: Tensor
    text_kl: Tensor  # from the untouched LM; 0 if it was not asked
    code_loss: Tensor
    text_logits: Tensor  # (B, R, V)
    hidden: Tensor  # (B, R, C)
    layout: Layout


def check(config: SpokenLMConfig, quantizer: FSQ | RVQ, llm: Llama | None) -> None:
    """ValueError where the three do not fit each other."""
    theirs = (quantizer.config.dim, quantizer.n_codebooks, quantizer.n_codes)
    ours = (config.audio_dim, config.n_codebooks, config.n_codes)
    if theirs != ours:
        raise ValueError(f"(audio_dim, n_codebooks, n_codes) {ours}, the quantizer has {theirs}")
    if config.head != "token" and not isinstance(quantizer, RVQ):
        raise ValueError(f"head={config.head!r} needs an RVQ, got {type(quantizer).__name__}")
    width = getattr(quantizer.config, "codebook_dim", None)
    if config.head == "latent" and config.latent_dim != width:
        raise ValueError(f"latent_dim={config.latent_dim}, the code space of the RVQ has {width}")
    if llm is not None and llm.config != config.llm:
        raise ValueError(f"the given LM is {llm.config}, config.llm is {config.llm}")


def kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """Logits (M, V) of both -> KL(theirs || ours), mean over positions ()."""
    p, q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@contextmanager
def untouched(model: Llama) -> Iterator[None]:
    """In here the Llama is the public one: no LoRA, exact rotary frequencies."""
    config, model.config = model.config, replace(model.config, rope_bf16=False)
    try:
        with lora.disabled(model):
            yield
    finally:
        model.config = config


class SpokenLM(nn.Module):
    def __init__(
        self, config: SpokenLMConfig, quantizer: FSQ | RVQ, llm: Llama | None = None
    ) -> None:
        """llm: a pretrained text LM, which config.llm describes; it is given LoRA. None: random.

        The quantizer is used as it is and frozen: it stays in eval mode."""
        super().__init__()
        check(config, quantizer, llm)
        self.config, width = config, config.llm.width
        self.llm = llm or Llama(config.llm)
        lora.add_lora(self.llm, TARGETS, config.lora_rank, config.lora_alpha, config.lora_dropout)
        self.quantizer = quantizer.requires_grad_(False).eval()
        self.audio = nn.Linear(config.audio_dim, width)  # W, b
        self.weights = nn.Parameter(torch.tensor([-2.0, 2.0]))  # audio, text: starts as a text LM
        self.pad_audio = nn.Parameter(torch.zeros(config.audio_dim))
        self.pad_text = nn.Parameter(torch.zeros(width))
        if config.head == "latent":
            self.head: LatentHead | TokenHead = LatentHead(width, config.latent_dim)
        else:
            mse = config.head == "token_mse"
            self.head = TokenHead(width, config.n_codebooks, config.n_codes, mse)

    def train(self, mode: bool = True) -> "SpokenLM":
        super().train(mode)
        self.quantizer.eval()
        return self

    def fuse(self, text: Tensor, audio: Tensor) -> Tensor:
        """text (..., C), audio (..., A) -> input rows (..., C) in the dtype of the Llama."""
        with torch.autocast(text.device.type, enabled=False):
            w = self.weights.softmax(0)
            x = w[0] * self.audio(audio) + w[1] * text.float()
        return x.to(self.llm.embed.weight.dtype)

    def rows(self, plan: Layout, codes: Tensor) -> Tensor:
        """codes (B, W, Q) -> what the Llama reads (B, R, C)."""
        B, A = len(codes), self.config.audio_dim
        pad, audio = self.pad_audio.expand(B, 1, A), self.quantizer.decode(codes)
        audio = torch.cat([pad, audio], 1)  # (B, 1 + W, A)
        audio = audio.gather(1, (plan.heard + 1)[..., None].expand(-1, -1, A))  # (B, R, A)
        text = self.llm.embed(plan.ids.clamp(min=0)).float()  # (B, R, C)
        text = text.where((plan.ids >= 0)[..., None], self.pad_text)
        sos = self.llm.embed(torch.full_like(plan.ids[:, :1], self.config.sos))  # (B, 1, C)
        return torch.cat([sos, self.fuse(text, audio)[:, 1:]], 1)

    def hear(self, plan: Layout, codes: Tensor) -> Tensor:
        """-> hidden (B, R, C). Causal: real rows cannot see the padding, all of which is behind."""
        return self.llm(embeddings=self.rows(plan, codes))

    def forward(
        self,
        ids: Tensor,
        word_ids: Tensor,
        codes: Tensor,
        reference: bool = False,
        faithful: bool = False,
    ) -> SpokenLMOutput:
        """ids, word_ids (B, N), codes (B, W, Q), faithful: see layout() -> losses and text logits.

        reference: the text loss holds on to the untouched LM, for training."""
        plan = layout(ids, word_ids, codes, self.config.delay, faithful)
        hidden = self.hear(plan, codes)  # (B, R, C)
        logits = self.llm.logits(hidden)  # (B, R, V)
        asked = plan.text_labels != IGNORE
        text = text_ce = F.cross_entropy(logits[asked].float(), plan.text_labels[asked])
        text_kl = torch.zeros_like(text_ce)
        if reference:
            theirs = self.reference(ids.masked_fill(word_ids < 0, 0))  # (B, N + 1, V)
            n = theirs.shape[1]  # labels never reach further
            text_kl = kl(theirs[asked[:, :n]], logits[:, :n][asked[:, :n]])
            part = self.config.reference_weight
            text = part * text_kl + (1 - part) * text_ce
        said = plan.code_labels[..., 0] != IGNORE
        code_loss = self.head.loss(hidden[said], plan.code_labels[said], self.quantizer)
        loss = (1 - self.config.code_weight) * text + self.config.code_weight * code_loss
        return SpokenLMOutput(loss, text_ce, text_kl, code_loss, logits, hidden, plan)

    @torch.no_grad()
    def reference(self, ids: Tensor) -> Tensor:
        """ids (B, N) -> logits (B, N + 1, V) of the text LM as it was before LoRA, on sos + ids."""
        with untouched(self.llm):
            return self.llm.logits(self.llm(F.pad(ids, (1, 0), value=self.config.sos)))

    @torch.no_grad()
    def score(self, ids: Tensor, word_ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """As forward -> sums of log likelihoods per item, in nats: text (B,), codes (B,)."""
        plan = layout(ids, word_ids, codes, self.config.delay)
        hidden = self.hear(plan, codes)  # (B, R, C)
        asked, said = plan.text_labels != IGNORE, plan.code_labels[..., 0] != IGNORE
        text, speech = hidden.new_zeros(2, *asked.shape, dtype=torch.float32)  # (B, R) each
        logits = self.llm.logits(hidden[asked]).float()  # (M, V)
        text[asked] = -F.cross_entropy(logits, plan.text_labels[asked], reduction="none")
        speech[said] = self.head.likelihood(hidden[said], plan.code_labels[said], self.quantizer)
        return text.sum(1), speech.sum(1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """LoRA, the bridges into and out of the LM, the pad embeddings."""
        return [p for p in self.parameters() if p.requires_grad]

    def state_to_save(self) -> dict[str, Tensor]:
        """The trainable tensors by name: all that a run changes."""
        return {k: p.detach() for k, p in self.named_parameters() if p.requires_grad}

    def load_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what state_to_save() gave; ValueError if anything is missing or too much."""
        frozen = {k: v for k, v in self.state_dict().items() if k not in self.state_to_save()}
        load_strict(self, frozen | dict(tensors), "spoken LM")


# What follows the public prefix `spoken_lm.`, once peft's names are undone.
NAMES = {
    r"pad_(text|audio)_unit_embed": r"pad_\1",
    r"fuse_for_bridge_in_llm\.weights": "weights",
    r"fuse_for_bridge_in_llm\.linear\.(weight|bias)": r"audio.\1",
    r"extract_for_bridge_out_llm\.fc_mu\.(weight|bias)": r"head.mu.\1",
    r"extract_for_bridge_out_llm\.b_logvar": "head.logvar",
    r"extract_for_bridge_out_llm\.linear\.(weight|bias)": r"head.linear.\1",
    **{rf"language_model\.{row}": f"llm.{ours}" for row, ours in llama.NAMES.items()},
}
SKIP = tuple(rf"language_model\.{row}" for row in llama.SKIP)
PEFT = {rf"language_model\.{row}": f"language_model.{new}" for row, new in lora.NAMES.items()}
PEFT[r"((?!language_model\.).+)"] = r"\1"


def from_public(
    tensors: Mapping[str, Tensor], config: SpokenLMConfig, quantizer: FSQ | RVQ
) -> SpokenLM:
    """Public tensors, without the prefix `spoken_lm.` -> the model, in eval mode, their dtypes."""
    plain, odd = match(tensors, PEFT)
    ours, problems = match(plain, NAMES, SKIP)
    if config.head == "token_mse":
        ours.pop("head.logvar", None)  # in the file, without a use
    llm, ours = llama.settle_head(config.llm, ours, "llm.")
    with torch.device("meta"):
        model = SpokenLM(replace(config, llm=llm), quantizer)
    ours |= {f"quantizer.{k}": v for k, v in quantizer.state_dict().items()}
    load_strict(model, ours, "spoken LM", odd + problems)
    return model.eval()


if __name__ == "__main__":
    from fsq import TINY as TINY_FSQ

    model = SpokenLM(TINY, FSQ(TINY_FSQ)).eval()
    ids, words = torch.randint(320, (2, 9)), torch.arange(9).expand(2, 9) // 2
    codes = torch.randint(TINY.n_codes, (2, 5, TINY.n_codebooks))
    out = model(ids, words, codes, reference=True)
    print(f"ids {(*ids.shape,)}, codes {(*codes.shape,)} -> text {(*out.text_logits.shape,)}")
    print(f"text {out.text_ce:.2f} of ln V = {math.log(320):.2f}, codes {out.code_loss:.2f} nats")
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
