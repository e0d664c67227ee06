"""Generation with the spoken LM: text tokens and, for each word, its codes, one row at a time.

    t_{p+1} ~ text(h_p)                      if it begins word u:  codes of word u - d ~ codes(h_p)
    x_{p+1} = fuse(E[t_{p+1}], embedding of the codes of the word d before)
    behind the last word, d rows without text bring the codes of the last d words

    prompt --rows--> x (1, N, C) --llm, caches--> hidden (1, C) --> token, codes (Q) --> x (1, 1, C)

Starts: nothing (sos), a text, speech (text and codes), or speech between two texts (instruct).
[TASTE: arXiv:2504.07053, sec. 3.2; numbers: TASTE-SpokenLM 301bce2]
"""

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llm import pick
from spoken_lm import IGNORE, LLAMA3_SPECIAL, SpokenLM, layout

STEPS_PER_WORD = 16  # text tokens; a model that begins no new word must stop at some time
UNKNOWN = "⁇"  # the text of SentencePiece's unknown token


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class VocabularySets:
    """What generation has to know about each text token; tensors (V,) bool."""

    word_start: Tensor
    banned: Tensor
    sentence_end: Tensor
    blank: Tensor  # a lone space: its word goes on with the next token
    tokenizer: Decoder

    @classmethod
    def of(cls, tokenizer: Decoder, vocab: int, faithful: bool = False) -> "VocabularySets":
        """Sort the tokens of a vocabulary by their text. A word starts with a space in front.

        Banned is what is no text: specials, holes, blanks but a space in front. faithful: the rules
        of the public Llama 3 system, which bans all without letter, digit or one of .,' instead."""
        special = set(getattr(tokenizer, "special", {}).values())
        texts = [spell(tokenizer, i) for i in range(vocab)]
        blank = [t == " " for t in texts]
        if faithful:
            start = [t[:1] == " " or i >= LLAMA3_SPECIAL for i, t in enumerate(texts)]
            # Quirk: this bans "?", "!", quotes and dashes; of the specials, only the first two of
            # Llama 3 matter, and <|end_of_text|> alone is named [TASTE-SpokenLM 301bce2].
            banned = [
                "\n" in t or not re.search(r"[A-Za-z0-9.,']", t) or i == LLAMA3_SPECIAL + 1
                for i, t in enumerate(texts)
            ]
        else:
            start = [t[:1] == " " for t in texts]
            banned = [
                i in special
                or t in ("", UNKNOWN)
                or re.search(r"\s", t.removeprefix(" ")) is not None
                for i, t in enumerate(texts)
            ]
        stops = "." if faithful else ".?!"
        ends = [any(stop in t for stop in stops) for t in texts]
        sets = [torch.tensor(x) for x in (start, banned, ends, blank)]
        return cls(sets[0], sets[1], sets[2], sets[3], tokenizer)


def spell(tokenizer: Decoder, i: int) -> str:
    """The text of one token, "" if the vocabulary has no such id."""
    try:
        return tokenizer.decode([i])
    except (ValueError, IndexError, KeyError):
        return ""


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.5  # of the text; 0: the most likely token
    top_p: float = 0.3
    repetition_penalty: float = 1.1  # of text tokens that the prompt or the answer has already
    code_temperature: float = 0.0  # of token heads
    faithful: bool = False  # Quirk: the order and the smaller nucleus of the public system


def next_text(
    logits: Tensor, said: Tensor, sampling: Sampling, rng: torch.Generator | None = None
) -> Tensor:
    """logits (B, V), said (B, V) bool -> ids (B,): penalty, temperature, nucleus, draw.

    faithful: nucleus, penalty, temperature, draw, and the plain argmax if top_p is 0."""
    if sampling.faithful:
        if sampling.top_p == 0:
            return logits.argmax(-1)
        logits = penalize(narrow(logits, sampling.top_p), said, sampling.repetition_penalty)
        return pick(logits, sampling.temperature, rng=rng)
    logits = penalize(logits, said, sampling.repetition_penalty)
    return pick(logits, sampling.temperature, sampling.top_p, rng)


def narrow(logits: Tensor, top_p: float) -> Tensor:
    """logits (B, V) -> the same with -inf outside the public nucleus."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    # Quirk: the token that crosses top_p is dropped, elsewhere it is the last one kept.
    outside = p.cumsum(-1) > top_p
    outside[..., 0] = False
    return logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)


def penalize(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Make what was said less likely. [CTRL: arXiv:1909.05858, sec. 4.1]"""
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclass
class Prompt:
    """Nothing: start from silence. ids: go on from a text. With word_ids and codes: go on from
    speech. With prefix and suffix, texts around it: answer the speech (instruct)."""

    ids: Tensor | None = None  # (N,)
    word_ids: Tensor | None = None  # (N,)
    codes: Tensor | None = None  # (W, Q)
    prefix: Tensor | None = None  # (N',)
    suffix: Tensor | None = None  # (N",)

    def __post_init__(self) -> None:
        given = {name for name, x in vars(self).items() if x is not None}
        if given & {"word_ids", "codes"} and not given >= {"ids", "word_ids", "codes"}:
            raise ValueError(f"a speech prompt needs ids, word_ids and codes, got {sorted(given)}")
        if given & {"prefix", "suffix"} and len(given) < 5:
            raise ValueError(f"prefix and suffix go around a speech prompt, got {sorted(given)}")
        if self.ids is not None and not len(self.ids):
            raise ValueError("ids is empty: leave it out to start from nothing")
        if self.word_ids is not None and self.codes is not None:
            words = int(self.word_ids[-1]) + 1
            if words != len(self.codes):
                raise ValueError(f"{words} words, but codes for {len(self.codes)}")

    def history(self, device: torch.device) -> list[Tensor]:
        """Codes of the words that the new ones follow, (Q,) each. Not those of a question."""
        if self.codes is None or self.prefix is not None:
            return []
        return list(self.codes.to(device))


@dataclass
class Generated:
    ids: Tensor  # (N,) int64, without the prompt
    word_ids: Tensor  # (N,) int64
    text: str
    words: list[str]  # W
    codes: Tensor  # (W, Q) int64
    ended: bool  # False: cut off by max_steps
    glue: str = ""  # what comes first and ends the last word of the prompt: a full stop, or nothing


class Talk:
    """The book-keeping of one utterance while it is generated: whose codes are heard now?"""

    def __init__(
        self,
        codes: list[Tensor],
        delay: int,
        extra_words: int,
        steps: int,
        goes_on: bool = False,
        stop: int | None = None,
    ) -> None:
        """codes: of the words of the prompt, (Q,) each; those of new words are put behind.
        goes_on: the first token may end the last word of the prompt, and begin no word.
        stop: a token that ends the text and is not kept."""
        self.codes, self.first, self.delay, self.stop = codes, len(codes), delay, stop
        self.extra_words, self.steps, self.goes_on = extra_words, steps, goes_on
        self.ids: list[int] = []
        self.word_ids: list[int] = []
        self.words = self.waited = 0  # words begun, rows behind the text
        self.waiting = self.ended = self.blank = False

    @property
    def heard(self) -> int:
        """Word whose codes are fused into the next row, as in layout(); negative: none yet."""
        return self.first + self.words + self.waited - 1 - self.delay

    @property
    def done(self) -> bool:
        return self.waited == self.delay

    def never(self, sets: VocabularySets) -> Tensor:
        """Tokens (V,) bool that cannot come next."""
        if self.blank:
            return sets.banned | sets.word_start
        if self.words or not self.goes_on:
            return sets.banned
        may_end = not self.ids and self.steps > 1  # one full stop, and no letters: it was a word
        return sets.banned | ~(sets.word_start | sets.sentence_end & may_end)

    def push(self, token: int, sets: VocabularySets) -> bool:
        """The next text token, or what you like while waiting -> does a word begin?"""
        if token == self.stop and not self.waiting:
            self.waiting = self.ended = True
        if self.waiting:
            self.waited += 1
            return True
        begins = bool(sets.word_start[token]) or not (self.ids or self.goes_on)
        full = self.words >= self.extra_words and bool(sets.sentence_end[token])
        full |= self.words >= 3 * self.extra_words  # counted without this token
        self.words += begins
        self.ids.append(token)
        self.word_ids.append(self.words - 1)
        self.blank = begins and bool(sets.blank[token])
        self.ended = full and not self.blank
        self.waiting = self.ended or len(self.ids) == self.steps
        return begins

    def result(self, tokenizer: Decoder) -> Generated:
        ids, codes = torch.tensor(self.ids), torch.stack(self.codes[self.first :])
        word_ids = torch.tensor(self.word_ids)
        words = [tokenizer.decode(ids[word_ids == w].tolist()) for w in range(self.words)]
        assert len(words) == len(codes), (words, codes.shape)
        words, glue = [w.strip() for w in words], tokenizer.decode(ids[word_ids < 0].tolist())
        text = tokenizer.decode(self.ids).strip()
        return Generated(ids, word_ids, text, words, codes, self.ended, glue.strip())


@torch.inference_mode()
def generate(
    model: SpokenLM,
    sets: VocabularySets,
    prompt: Prompt | None = None,
    sampling: Sampling | None = None,
    extra_words: int = 8,
    max_steps: int | None = None,
    rng: torch.Generator | None = None,
    stop: int | None = None,
) -> Generated:
    """Go on from the prompt; end at a sentence end once extra_words are begun, or anywhere once
    3 * extra_words are. max_steps: most text tokens, default 16 for each of those words: the public
    loop has no such bound. stop: a token that ends the text, once a word is begun.

    Each step reads one row and keeps keys and values; the model should be in eval mode."""
    prompt, sampling, delay = prompt or Prompt(), sampling or Sampling(), model.config.delay
    rows = prompt_rows(model, prompt)  # (1, N, C)
    said = prompt_ids(model, prompt, sampling.faithful)  # (1, V) bool
    steps = STEPS_PER_WORD * 3 * extra_words if max_steps is None else max_steps
    steps = min(steps, model.config.llm.max_tokens - rows.shape[1] - delay)
    if extra_words < 1 or steps < 1:
        raise ValueError(f"no room: {extra_words=}, {max_steps=}, prompt of {rows.shape[1]} rows")
    goes_on = prompt.ids is not None and prompt.prefix is None and not sampling.faithful
    talk = Talk(prompt.history(rows.device), delay, extra_words, steps, goes_on, stop)
    caches = model.llm.new_caches(rows.shape[1] + steps + delay)
    while True:
        hidden = model.llm(embeddings=rows, caches=caches)[:, -1]  # (1, C)
        token, text = IGNORE, model.pad_text[None]  # behind the last word, as in training
        if not talk.waiting:
            never = talk.never(sets).to(rows.device)
            if stop is not None and not talk.words:
                never = never.index_fill(0, torch.tensor(stop, device=never.device), True)
            logits = model.llm.logits(hidden).float().masked_fill(never, -torch.inf)
            chosen = next_text(logits, said, sampling, rng)  # (1,)
            said[:, chosen], token = True, int(chosen)
            text = model.llm.embed(chosen)  # (1, C)
        if talk.push(token, sets) and talk.heard == len(talk.codes):
            heat = sampling.code_temperature
            talk.codes += model.head.say(hidden, model.quantizer, heat, rng)  # of one word, (Q,)
        if talk.done:
            return talk.result(sets.tokenizer)
        rows = model.fuse(text, sound(model, talk))[:, None]  # (1, 1, C)


def sound(model: SpokenLM, talk: Talk) -> Tensor:
    """What is heard in the next row (1, A)."""
    if talk.heard < 0:
        return model.pad_audio[None]
    return model.quantizer.decode(talk.codes[talk.heard][None, None])[0]


def prompt_ids(model: SpokenLM, prompt: Prompt, faithful: bool) -> Tensor:
    """-> which text ids the prompt holds (1, V) bool, for the repetition penalty."""
    texts = [x for x in (prompt.prefix, prompt.ids, prompt.suffix) if x is not None]
    if faithful and not texts:
        # Quirk: sos counts as said, but only where nothing follows it [TASTE-SpokenLM 301bce2].
        texts = [torch.tensor([model.config.sos])]
    if faithful and prompt.prefix is not None:
        # Quirk: the first token of an instructed prompt is taken for the sos and not counted
        # [TASTE-SpokenLM 301bce2].
        texts[1] = texts[1][1:]
    said = torch.zeros(1, model.config.llm.vocab, dtype=torch.bool, device=model.pad_text.device)
    for ids in texts:
        said[:, ids.to(said.device)] = True
    return said


def prompt_rows(model: SpokenLM, prompt: Prompt) -> Tensor:
    """-> what the Llama reads first (1, N, C)."""
    device = model.pad_text.device
    if prompt.ids is None:
        return model.llm.embed(torch.tensor([[model.config.sos]], device=device))
    if prompt.codes is None or prompt.word_ids is None:
        # Quirk: a text prompt has no sos and is not fused [TASTE-SpokenLM 301bce2].
        return model.llm.embed(prompt.ids.to(device))[None]
    words, codes = prompt.word_ids.to(device)[None], prompt.codes.to(device)[None]
    plan = layout(prompt.ids.to(device)[None], words, codes, model.config.delay)
    rows = model.rows(plan, codes)[:, : 1 + len(prompt.ids)]  # (1, 1 + N, C)
    if prompt.prefix is None or prompt.suffix is None:
        return rows
    before, after = (model.llm.embed(x.to(device))[None] for x in (prompt.prefix, prompt.suffix))
    return torch.cat([before, rows[:, 1:], after], 1)


if __name__ == "__main__":
    from fsq import FSQ
    from fsq import TINY as TINY_FSQ
    from spoken_lm import TINY

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(" a" if i % 3 == 0 else chr(97 + i % 26) for i in ids)

    model = SpokenLM(TINY, FSQ(TINY_FSQ)).eval()
    out = generate(model, VocabularySets.of(Letters(), 320), extra_words=3)
    print(f"{len(out.ids)} tokens, {len(out.words)} words -> codes {(*out.codes.shape,)}")
    print(out.text)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
