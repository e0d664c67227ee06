"""Generation with the spoken LM: text tokens and, for each word, its codes, one row at a time.

    t_{p+1} ~ text(h_p)                      if it begins word u:  codes of word u - d ~ codes(h_p)
    x_{p+1} = fuse(E[t_{p+1}], embedding of the codes of the word d before)
    behind the last word, d rows without text bring the codes of the last d words

    prompts --rows--> x (B, N, C) --llm, caches--> hidden (B, C) --> tokens, codes --> x (B, 1, C)

Starts: nothing (sos), a text, speech (text and codes), or speech between two texts (instruct).
Shorter prompts of a batch are padded on the left, so that all go on in one column.
[TASTE: arXiv:2504.07053, sec. 3.2; numbers: TASTE-SpokenLM 301bce2]
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm import pick
from spoken_lm import IGNORE, SpokenLM, layout
from vocabulary import Decoder, Rule, VocabularySets

STEPS_PER_WORD = 16  # text tokens; a model that begins no new word must stop at some time
RNG = torch.Generator | Sequence[torch.Generator] | None  # one for all, or one for each


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
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


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
    def lacks_codes(self) -> bool:
        return self.heard == len(self.codes)

    @property
    def done(self) -> bool:
        return self.waited == self.delay

    @property
    def rule(self) -> Rule:
        """What may come next."""
        if self.blank:
            return Rule.REST
        if self.words:
            return Rule.TEXT
        if not self.goes_on:
            return Rule.FIRST
        may_end = not self.ids and self.steps > 1  # one full stop, and no letters: it was a word
        return Rule.WORD_OR_END if may_end else Rule.WORD

    @property
    def ready(self) -> int:
        """New words that are complete: their codes are said when a later word begins."""
        return len(self.codes) - self.first

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
        assert self.words == self.ready, (self.words, self.ready)
        ids, word_ids = torch.tensor(self.ids), torch.tensor(self.word_ids)
        codes, text = torch.stack(self.codes[self.first :]), tokenizer.decode(self.ids).strip()
        words = [self.word(w, tokenizer) for w in range(self.words)]
        return Generated(ids, word_ids, text, words, codes, self.ended, self.word(-1, tokenizer))

    def word(self, w: int, tokenizer: Decoder) -> str:
        """The text of new word w; -1: what ends the last word of the prompt."""
        own = [i for i, word in zip(self.ids, self.word_ids, strict=True) if word == w]
        return tokenizer.decode(own).strip()


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
    """Go on from one prompt: see converse."""
    prompts = [prompt or Prompt()]
    return generate_all(model, sets, prompts, sampling, extra_words, max_steps, rng, stop)[0]


def generate_all(
    model: SpokenLM,
    sets: VocabularySets,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    extra_words: int = 8,
    max_steps: int | None = None,
    rng: RNG = None,
    stop: int | None = None,
) -> list[Generated]:
    """Go on from several prompts of any lengths at once: see converse."""
    *_, talks = converse(model, sets, prompts, sampling, extra_words, max_steps, rng, stop)
    return [talk.result(sets.tokenizer) for talk in talks]


@torch.inference_mode()
def converse(
    model: SpokenLM,
    sets: VocabularySets,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    extra_words: int = 8,
    max_steps: int | None = None,
    rng: RNG = None,
    stop: int | None = None,
) -> Iterator[list[Talk]]:
    """Go on from each prompt; end at a sentence end once extra_words are begun, or anywhere once
    3 * extra_words are. Yields the same utterances after each row, until all are done.

    max_steps: most text tokens, default 16 for each of those words: the public loop has no such
    bound. All must fit into the LM's context behind the longest prompt. stop: a token that ends the
    text, once a word is begun. rng: with one for each prompt, or if nothing is drawn, an item gives
    what it gives alone; with one for all, draws are independent, but depend on the company.

    Each step reads one row and keeps keys and values; what has ended keeps its place in the batch,
    and its further rows go nowhere. The model should be in eval mode."""
    sampling, delay = sampling or Sampling(), model.config.delay
    rows, keep = prompt_batch(model, prompts)  # (B, N, C), (B, N)
    B, N, _ = rows.shape
    said = torch.cat([prompt_ids(model, p, sampling.faithful) for p in prompts])  # (B, V) bool
    steps = STEPS_PER_WORD * 3 * extra_words if max_steps is None else max_steps
    steps = min(steps, model.config.llm.max_tokens - N - delay)
    if extra_words < 1 or steps < 1:
        raise ValueError(f"no room: {extra_words=}, {max_steps=}, prompt of {N} rows")
    if isinstance(rng, Sequence) and len(rng) != B:
        raise ValueError(f"{len(rng)} generators for {B} prompts: wanted one for all, or for each")
    goes_on = [p.ids is not None and p.prefix is None and not sampling.faithful for p in prompts]
    talks = [
        Talk(prompt.history(rows.device), delay, extra_words, steps, glued, stop)
        for prompt, glued in zip(prompts, goes_on, strict=True)
    ]
    never, caches = sets.never(stop).to(rows.device), model.llm.new_caches(N + steps + delay)

    def write(logits: Tensor, said: Tensor, rng: torch.Generator | None) -> Tensor:
        return next_text(logits, said, sampling, rng)

    def say(hidden: Tensor, rng: torch.Generator | None) -> Tensor:
        return model.head.say(hidden, model.quantizer, sampling.code_temperature, rng)

    while True:
        hidden = model.llm(embeddings=rows, keep=keep, caches=caches)[:, -1]  # (B, C)
        tokens, text = [IGNORE] * B, model.pad_text.float().repeat(B, 1)  # (B, C): no text
        if asked := [b for b, talk in enumerate(talks) if not talk.waiting]:
            logits = model.llm.logits(hidden[asked]).float()  # (n, V)
            logits = logits.masked_fill(never[[talks[b].rule for b in asked]], -torch.inf)
            chosen = by_row(write, rng, asked, logits, said[asked])  # (n,)
            said[asked, chosen], text[asked] = True, model.llm.embed(chosen).float()
            for b, token in zip(asked, chosen.tolist(), strict=True):
                tokens[b] = token
        going = [b for b, talk in enumerate(talks) if not talk.done]
        begun = [b for b in going if talks[b].push(tokens[b], sets) and talks[b].lacks_codes]
        if begun:
            codes = by_row(say, rng, begun, hidden[begun])  # (n, Q), of one word each
            for b, own in zip(begun, codes, strict=True):
                talks[b].codes.append(own)
        yield talks
        if all(talk.done for talk in talks):
            return
        rows = model.fuse(text, sound(model, talks))[:, None]  # (B, 1, C)
        keep = None if keep is None else F.pad(keep, (0, 1), value=True)  # (B, t)


def by_row(draw: Callable[..., Tensor], rng: RNG, items: list[int], *x: Tensor) -> Tensor:
    """draw(*x, rng) for x (n, ...), or row by row if each of the items has an rng of its own."""
    if not isinstance(rng, Sequence):
        return draw(*x, rng)
    return torch.cat([draw(*(y[i : i + 1] for y in x), rng[b]) for i, b in enumerate(items)])


def sound(model: SpokenLM, talks: list[Talk]) -> Tensor:
    """What is heard in the next row (B, A)."""
    audio = model.pad_audio.float().repeat(len(talks), 1)  # (B, A)
    if hears := [b for b, talk in enumerate(talks) if talk.heard >= 0]:
        codes = torch.stack([talks[b].codes[talks[b].heard] for b in hears])  # (n, Q)
        audio[hears] = model.quantizer.decode(codes[:, None])[:, 0].float()
    return audio


def prompt_batch(model: SpokenLM, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
    """-> what the Llama reads first (B, N, C), and which of it is real (B, N); None: all."""
    if not prompts:
        raise ValueError("no prompts; Prompt() begins from nothing")
    rows = [prompt_rows(model, prompt)[0] for prompt in prompts]  # (N_i, C) each
    x = pad_sequence(rows, batch_first=True, padding_side="left")  # (B, N, C)
    gaps = torch.tensor([[x.shape[1] - len(own)] for own in rows], device=x.device)  # (B, 1)
    keep = torch.arange(x.shape[1], device=x.device) >= gaps
    return x, None if bool(keep.all()) else keep


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
