"""continuation.py with several prompts at once: each gives what it gives alone."""

from functools import partial

import pytest
import torch
from test_spoken_lm import CASES, batch, note, plain_sets, tiny

from continuation import Generated, Prompt, Sampling, converse, generate, generate_all
from spoken_lm import SpokenLM
from vocabulary import Rule

WILD = Sampling(9.0, 0.9, 1.1, 1.0)


def prompts_of(model: SpokenLM) -> list[Prompt]:
    """Every kind, of 1 to 10 rows."""
    ids, word_ids, codes = batch(model, [[1, 2], [2, 1, 3, 1]])
    short, long = (
        Prompt(ids[0, :3], word_ids[0, :3], codes[0, :2]),
        Prompt(ids[1], word_ids[1], codes[1]),
    )
    around = Prompt(ids[1], word_ids[1], codes[1], torch.tensor([20, 21]), torch.tensor([30]))
    return [short, Prompt(), long, Prompt(ids[0, :2]), around]


def same(ours: Generated, theirs: Generated) -> bool:
    equal = torch.equal(ours.ids, theirs.ids) and torch.equal(ours.codes, theirs.codes)
    words = torch.equal(ours.word_ids, theirs.word_ids)
    rest = ("text", "words", "glue", "ended")
    return equal and words and all(getattr(ours, k) == getattr(theirs, k) for k in rest)


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize(("head", "quantizer"), CASES)
def test_a_greedy_batch_gives_what_single_prompts_give(
    head: str, quantizer: str, delay: int
) -> None:
    sets, lengths = plain_sets(), set[int]()
    for seed in range(3):
        model = tiny(head, delay, seed, quantizer)
        prompts, calm = prompts_of(model), Sampling(0.0, 1.0, 1.3)
        together = generate_all(model, sets, prompts, calm, 2)
        for prompt, out in zip(prompts, together, strict=True):
            assert same(out, generate(model, sets, prompt, calm, 2))
            lengths.add(len(out.ids))
    assert len(lengths) > 2  # some ended before others


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("stop", [None, 3])
def test_a_drawn_batch_with_a_generator_for_each_prompt(faithful: bool, stop: int | None) -> None:
    sets, model = plain_sets(), tiny()
    prompts, wild = prompts_of(model), Sampling(5.0, 0.9, 1.1, 1.0, faithful)

    def rngs() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]

    together = generate_all(model, sets, prompts, wild, 3, rng=rngs(), stop=stop)
    for prompt, rng, out in zip(prompts, rngs(), together, strict=True):
        assert same(out, generate(model, sets, prompt, wild, 3, rng=rng, stop=stop))
    assert len({len(out.ids) for out in together}) > 1


def test_one_generator_for_all_draws_each_from_its_own_odds() -> None:
    """First tokens of two prompts, 2000 draws each, against the odds that a full forward gives."""
    model, sets = tiny(), plain_sets()
    first, _, second, *_ = prompts_of(model)
    rng, found = torch.Generator().manual_seed(0), torch.zeros(2, 96)
    mild = Sampling(2.0, 1.0, 1.0, 1.0)
    for _ in range(4):
        prompts = [first, second] * 500
        said = next(converse(model, sets, prompts, mild, 1, rng=rng))
        for i, talk in enumerate(said):
            found[i % 2, talk.ids[0]] += 1 / 2000
    for prompt, odds in zip((first, second), found, strict=True):
        assert prompt.ids is not None
        assert prompt.word_ids is not None
        assert prompt.codes is not None
        whole = model(prompt.ids[None], prompt.word_ids[None], prompt.codes[None])
        logits = whole.text_logits[0, len(prompt.ids)].masked_fill(
            sets.never(None)[Rule.WORD_OR_END], -torch.inf
        )
        want = (logits / 2.0).softmax(-1)
        assert (odds - want).abs().sum() < 0.08  # what chance leaves is 0.05
        assert (want - 1 / 96).abs().sum() > 0.3  # it is not simply uniform


def test_no_prefix_is_read_twice_and_each_step_is_one_row_of_all() -> None:
    model, sets, seen = tiny(), plain_sets(), list[int]()
    prompts = prompts_of(model)
    model.llm.layers[0].register_forward_pre_hook(partial(note, seen))
    together = generate_all(model, sets, prompts, Sampling(0.0, 1.0, 1.3), 2)
    longest = max(len(out.ids) for out in together)
    assert seen == [10] + [1] * longest  # delay 1: one row behind the longest text


def test_words_come_as_soon_as_the_next_one_begins() -> None:
    model, sets = tiny(), plain_sets()
    rng = torch.Generator().manual_seed(3)
    grown = list[tuple[list[str], int]]()
    for (talk,) in converse(model, sets, [Prompt()], WILD, 4, rng=rng):
        grown.append(([talk.word(w, sets.tokenizer) for w in range(talk.ready)], talk.words))
    out = generate(model, sets, None, WILD, 4, rng=torch.Generator().manual_seed(3))
    assert grown[-1][0] == out.words
    for words, begun in grown:
        assert words == out.words[: len(words)]  # no word changes once it is ready
        assert begun - len(words) in (0, 1)
    assert len({len(words) for words, _ in grown}) > 4


def test_a_batch_without_prompts_or_room_is_refused() -> None:
    model, sets = tiny(), plain_sets()
    with pytest.raises(ValueError, match="no prompts"):
        generate_all(model, sets, [])
    with pytest.raises(ValueError, match="no room"):
        generate_all(model, sets, prompts_of(model), extra_words=0)
    with pytest.raises(ValueError, match="1 generators for 5 prompts"):
        generate_all(model, sets, prompts_of(model), rng=[torch.Generator()])


def test_rules_are_what_they_say() -> None:
    sets = plain_sets()
    never = sets.never(stop=3)
    assert never.shape == (len(Rule), 96)
    allowed = {rule: {*(~never[rule]).nonzero().flatten().tolist()} for rule in Rule}
    text, starts = {*range(2, 95)}, {2, *range(4, 12), 94}
    assert allowed == {
        Rule.TEXT: text,
        Rule.FIRST: text - {3},
        Rule.REST: text - starts,
        Rule.WORD: starts,
        Rule.WORD_OR_END: starts,
    }
    assert {*(~sets.never(None)[Rule.WORD_OR_END]).nonzero().flatten().tolist()} == starts | {3}
