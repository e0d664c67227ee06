"""The language of the built-in corpus: small enough to be decided, large enough to be modelled.

    RULES, word lists --_grammar()--> GRAMMAR, LEXICON
    sentence(rng)  --walks the rules--> "two birds sing by the river."
    is_grammatical --parses by the same rules--> exactly what the sampler can say, nothing else

Determiners and verbs agree with their nouns, verbs choose what kinds of nouns they go with.
No contraction, no "in": espeak-ng merges "in the" into one word, and its times would be lost.
"""

import random
from collections.abc import Collection
from functools import cache as memo

SHORTEST, LONGEST, DOCUMENT = 3, 8, 10  # words in a sentence; most words in two sentences

NOUNS = {
    "person": "boy girl man/men woman/women child/children farmer teacher doctor sailor king "
    "friend singer",
    "animal": "dog cat bird horse cow rabbit fox/foxes bear mouse/mice duck lion wolf/wolves",
    "thing": "book letter ball basket hat cup chair box/boxes lamp picture bottle drum",
    "food": "cake pie peach/peaches carrot cookie potato/potatoes",
    "place": "river window garden road mountain lake forest",
    "room": "house barn school church/churches tower castle",
    "cover": "tree table bridge bench/benches",
}
VERBS = {  # plural, singular where it is not the plural with an s: they sing, he sings
    "move": "sleep run walk sit wait play jump swim sing stand",
    "work": "laugh smile talk dance read cook",
    "see": "see watch/watches follow like love want remember",
    "use": "carry/carries hold paint buy clean lift draw",
    "eat": "eat taste share finish/finishes",
    "help": "help thank call meet visit",
    "give": "give show bring sell",
    "fall": "fall shine roll break",
    "be": "are/is were/was",
    "seem": "are/is were/was seem look",
}
WORDLISTS = {
    "the.s": "the the the the a a a this that every my your our his her their one",
    "the.p": "the the the the these those two three four five many some my our his her their",
    "size": "big small little",
    "nice.person": "young tall happy brave clever kind quiet proud tired hungry busy famous",
    "nice.animal": "wild hungry lazy sleepy gentle quick brave furry",
    "nice.thing": "red green blue yellow heavy broken round wooden golden new",
    "nice.food": "sweet fresh warm cold ripe tasty",
    "nice.place": "long narrow dark lovely distant pretty",
    "nice.room": "dark white lovely quiet famous",
    "nice.cover": "brown narrow pretty wooden",
    "he.s": "he she",
    "he.p": "they we you",
    "him": "him her them us me",
    "near": "near behind by beside past",
    "inside": "inside outside",
    "under": "under below",
    "softly": "softly quickly slowly quietly happily loudly gently proudly gladly calmly",
    "often": "often always never sometimes usually",
    "can": "can will must may",
    "first": "today tonight now maybe",
    "last": "today tonight now again soon",
    "and": "and but while because",
}
# One rule a key; alternatives between bars, an alternative written twice is twice as likely.
# {n} is s (singular) or p (plural) throughout a rule, {x} a class of nouns: that is agreement.
RULES = {
    "sentence": "clause | clause | clause | clause | clause last | first clause | "
    "clause and clause",
    "clause": "live.s | live.p | live.s | live.p | state.s | state.p",
    "live.{n}": "np.person.{n} do.person.{n} | he.{n} do.person.{n} | np.animal.{n} do.animal.{n}",
    "do.{x}.{n}": "act.{x}.{n} | act.{x}.{n} | act.{x}.{n} | often act.{x}.{n} | can act.{x}.p",
    "act.animal.{n}": "go.{n} | feel.{n}",
    "act.person.{n}": "go.{n} | feel.{n} | work.{n} | work.{n} softly | use.{n} thing | "
    "use.{n} thing where | help.{n} person | help.{n} him | give.{n} being gift",
    "go.{n}": "move.{n} | move.{n} softly | move.{n} where | move.{n} where | "
    "move.{n} softly where",
    "feel.{n}": "see.{n} being | see.{n} him | see.{n} thing | see.{n} being where | "
    "eat.{n} food | eat.{n} food | eat.{n} food where",
    "state.{n}": "is.person.{n} | is.animal.{n} | is.thing.{n} | is.food.{n} | "
    "np.thing.{n} fall.{n} | np.thing.{n} be.{n} where | np.thing.{n} fall.{n} where",
    "is.{x}.{n}": "np.{x}.{n} seem.{n} nice.{x}",
    "being": "person | animal",
    "gift": "thing | food",
    "where": "near place | near room | near cover | inside room | under cover",
    "{x}": "np.{x}.s | np.{x}.s | np.{x}.p",
    "np.{x}.{n}": "the.{n} {x}.{n} | the.{n} {x}.{n} | the.{n} {x}.{n} | the.{n} nice.{x} {x}.{n} "
    "| the.{n} nice.{x} {x}.{n} | the.{n} size {x}.{n} | the.{n} size nice.{x} {x}.{n}",
}


def _forms(words: str) -> tuple[list[str], list[str]]:
    """'dog man/men' -> ['dog', 'man'], ['dogs', 'men']"""
    pairs = [(*entry.split("/"), entry + "s")[:2] for entry in words.split()]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _grammar() -> tuple[dict[str, list[list[str]]], dict[str, list[str]]]:
    """Return rules (symbol -> alternatives -> symbols) and lexicon (symbol -> words)."""
    lexicon = {name: words.split() for name, words in WORDLISTS.items()}
    for table, numbers in (NOUNS, "sp"), (VERBS, "ps"):  # the s: dogs sing, a dog sings
        for name, words in table.items():
            for n, forms in zip(numbers, _forms(words), strict=True):
                lexicon[f"{name}.{n}"] = forms
    rules: dict[str, list[list[str]]] = {}
    for key, rule in RULES.items():
        for n in "sp" if "{n}" in key else "s":
            for x in NOUNS if "{x}" in key else ["person"]:
                rules[key.format(n=n, x=x)] = [a.split() for a in rule.format(n=n, x=x).split("|")]
    return rules, lexicon


GRAMMAR, LEXICON = _grammar()
WORDS = tuple(sorted({word for words in LEXICON.values() for word in words}))


def _expand(symbol: str, rng: random.Random) -> list[str]:
    if symbol in LEXICON:
        return [rng.choice(LEXICON[symbol])]
    return [word for part in rng.choice(GRAMMAR[symbol]) for word in _expand(part, rng)]


def sentence(rng: random.Random, longest: int = LONGEST) -> str:
    """A sentence of 3..longest lower-case words; the full stop belongs to the last word."""
    while True:
        words = _expand("sentence", rng)
        if SHORTEST <= len(words) <= longest:
            return " ".join(words) + "."


def document(rng: random.Random) -> str:
    """What one utterance says: a sentence (3 in 4), or two short ones of <= 10 words together."""
    if rng.random() < 0.75:
        return sentence(rng)
    first = sentence(rng, DOCUMENT - SHORTEST)
    return first + " " + sentence(rng, min(LONGEST, DOCUMENT - len(first.split())))


def texts(n: int, seed: int | str, avoid: Collection[str] = ()) -> list[str]:
    """n documents for a text LM; none has a sentence that is in `avoid` (see held_out)."""
    rng, out = random.Random(f"texts/{seed}"), list[str]()
    while len(out) < n:
        text = document(rng)
        if not any(s in avoid for s in sentences(text)):
            out.append(text)
    return out


def sentences(text: str) -> list[str]:
    """'she sings. they run.' -> ['she sings.', 'they run.']"""
    return [part.strip() + "." for part in text.split(".") if part.strip()]


def is_grammatical(text: str) -> bool:
    """True for exactly what the grammar generates: one or more sentences, each with its stop."""
    parts = sentences(text)
    whole = bool(parts) and " ".join(parts) == text
    return whole and all(_parses(tuple(part[:-1].split(" "))) for part in parts)


def _parses(words: tuple[str, ...]) -> bool:
    @memo
    def ends(symbol: str, start: int) -> frozenset[int]:
        """Where a `symbol` that starts at word `start` can end."""
        if symbol in LEXICON:
            fits = start < len(words) and words[start] in LEXICON[symbol]
            return frozenset([start + 1]) if fits else frozenset()
        found: set[int] = set()
        for alternative in GRAMMAR[symbol]:
            at = {start}
            for part in alternative:
                at = {end for i in at for end in ends(part, i)}
            found |= at
        return frozenset(found)

    return SHORTEST <= len(words) <= LONGEST and len(words) in ends("sentence", 0)
