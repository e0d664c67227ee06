"""What generation has to know about each token of a text vocabulary, and what may follow what.

token -> does a word begin? may it be said at all? does it end a sentence? is it a lone space?

tokenizer, V --of--> sets (V,) bool --never--> what cannot come next (rules, V) bool
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

LLAMA3_SPECIAL = 128000  # the first special id of Llama 3, also its sos
UNKNOWN = "⁇"  # the text of SentencePiece's unknown token


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class Rule(IntEnum):
    """What may come next: a row of VocabularySets.never."""

    TEXT = 0
    FIRST = 1  # text, but no end of it
    REST = 2  # of a word
    WORD = 3  # the beginning of one
    WORD_OR_END = 4  # or what ends the sentence before


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

    def never(self, stop: int | None) -> Tensor:
        """-> tokens that cannot come next, (rules, V) bool. stop: a token that ends the text."""
        nothing = torch.zeros_like(self.banned)
        end = nothing if stop is None else nothing.index_fill(0, torch.tensor(stop), True)
        start = self.word_start
        rules = {
            Rule.TEXT: nothing,
            Rule.FIRST: end,
            Rule.REST: start,
            Rule.WORD: end | ~start,
            Rule.WORD_OR_END: end | ~(start | self.sentence_end),
        }
        return self.banned | torch.stack([rules[rule] for rule in Rule])


def spell(tokenizer: Decoder, i: int) -> str:
    """The text of one token, "" if the vocabulary has no such id."""
    try:
        return tokenizer.decode([i])
    except (ValueError, IndexError, KeyError):
        return ""


if __name__ == "__main__":

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(" a" if i % 3 == 0 else chr(97 + i % 26) for i in ids)

    sets = VocabularySets.of(Letters(), 320)
    print(f"{int(sets.word_start.sum())} of 320 tokens begin a word, 0 parameters")
    for rule, row in zip(Rule, sets.never(None), strict=True):
        print(f"{rule.name:12} {int((~row).sum())} tokens may come next")
