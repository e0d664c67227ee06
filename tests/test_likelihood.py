"""likelihood.py: pairs say what they claim, scores are the LM's, ties count half."""

import math
import random
from pathlib import Path

import pytest
import torch
from conftest import speech

import audio
import likelihood
import synth
import text
from data import builtin
from likelihood import TASKS, accuracy, exchanged, plan, salmon_pairs, storycloze_pairs, win
from pipeline import Pipeline, Speech

SENTENCES = ["the dog sees a bird.", "two cats sing."]


@pytest.fixture
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline(tiny_bundle, tiny_bundle / "tokenizer", tiny_bundle / "spoken_lm")


@pytest.mark.parametrize("task", TASKS)
def test_only_what_the_task_names_differs(task: str) -> None:
    sides = set()
    for seed in range(20):
        first, good, bad = plan(task, SENTENCES, random.Random(seed))
        assert (first.text, good.text) == tuple(SENTENCES)
        assert (first.voice, first.rates[0], first.pitches[0]) == (
            good.voice, good.rates[0], good.pitches[0],
        )  # fmt: skip
        what = {"speaker": "voice", "gender": "voice", "rate": "rates", "pitch": "pitches"}
        odd = what.get(task, "text")
        for name in ("voice", "rates", "pitches", "text"):
            assert (getattr(good, name) != getattr(bad, name)) == (name == odd), name
        if odd == "voice":
            same = (good.voice in likelihood.MALE) == (bad.voice in likelihood.MALE)
            assert same == (task == "speaker")
        sides.add(getattr(bad, odd))
    assert len(sides) > 1 or task == "sentence order"  # no side is always the right one


def test_exchanged() -> None:
    assert exchanged(SENTENCES[0]) == "sees a bird the dog."
    assert exchanged("dogs run.") == "run dogs."


def test_voices_are_those_of_the_corpus() -> None:
    assert {*likelihood.MALE, *likelihood.FEMALE} == {*synth.VOICES_TRAIN}
    assert not {*likelihood.MALE} & {*likelihood.FEMALE}


def test_ties_count_half() -> None:
    assert [win(*pair) for pair in ((2, 1), (1, 2), (-3, -3), (0, 0))] == [1, 0, 0.5, 0.5]
    assert win(-100.0, -100.0 * (1 + 1e-7)) == 0.5


def spoken(words: str, seed: int) -> Speech:
    g = torch.Generator().manual_seed(seed)
    return Speech(
        words.split(), torch.randint(8, (len(words.split()), 12), generator=g), torch.zeros(64)
    )


def test_scores_are_the_losses(pipeline: Pipeline) -> None:
    """mean: minus the CE of the text and, summed over codebooks, of the codes."""
    one = spoken("the dog sees a bird.", 1)
    row = text.align_words(one.text, pipeline.lm_tokens, pipeline.lm_tokens)
    assert one.codes is not None
    ids, word_ids = torch.tensor([row.llm_ids]), torch.tensor([row.llm_word_ids])
    with torch.no_grad():
        out = pipeline.lm(ids, word_ids, one.codes[None])
    mean = likelihood.scores(pipeline, one, "mean")
    assert mean["its text"] == pytest.approx(-float(out.text_ce), rel=1e-5)
    assert mean["its codes"] == pytest.approx(-12 * float(out.code_loss), rel=1e-5)
    assert mean["joint"] == pytest.approx(mean["its text"] + mean["its codes"])
    total = likelihood.scores(pipeline, one, "sum")
    assert total["its text"] == pytest.approx(len(row.llm_ids) * mean["its text"])
    assert total["text LM"] == pytest.approx(len(row.llm_ids) * mean["text LM"])
    assert total["its codes"] == pytest.approx(5 * mean["its codes"])


def test_the_text_lm_cannot_tell_equal_texts_apart(pipeline: Pipeline) -> None:
    pairs = [(spoken(SENTENCES[0], i), spoken(SENTENCES[0], i + 50)) for i in range(6)]
    found = accuracy(pipeline, pairs, "mean")
    assert found["text LM, accuracy"] == (0.5, 0)
    assert found["joint, accuracy"][0] != 0.5 or found["joint, accuracy"][1] > 0
    turned = accuracy(pipeline, [(b, a) for a, b in pairs], "mean")
    for name, (value, _) in found.items():
        assert turned[name][0] == pytest.approx(1 - value)
    assert math.isnan(accuracy(pipeline, [], "sum").get("joint", (math.nan, 0))[0])


def test_builtin_pairs(pipeline: Pipeline, small_corpus: Path) -> None:
    items = builtin(synth.load(n_train=1), "test")
    pairs = likelihood.builtin_pairs(pipeline, items, "rate", 2)
    assert len(pairs) == 2
    for good, bad in pairs:
        assert good.text == bad.text
        n = good.text.index(".") + 1  # the first sentence is the same recording
        words = len(good.text[:n].split())
        assert good.codes is not None
        assert bad.codes is not None
        assert torch.equal(good.codes[:words], bad.codes[:words])
    with pytest.raises(ValueError, match="too few"):
        likelihood.builtin_pairs(pipeline, items[:0], "rate", 1)


def test_layout_of_salmon(tmp_path: Path) -> None:
    for name in (
        "sample_0_a",
        "sample_0_b",
        "sample_10_a",
        "sample_10_b",
        "sample_2_x",
        "sample_2_y",
    ):
        (tmp_path / f"{name}.wav").touch()
    names = [(good.stem, bad.stem) for good, bad in salmon_pairs(tmp_path)]
    assert names == [
        (f"sample_{i}_{a}", f"sample_{i}_{b}") for i, a, b in ((0, *"ab"), (2, *"xy"), (10, *"ab"))
    ]
    (tmp_path / "sample_3_a.wav").touch()
    with pytest.raises(ValueError, match="sample 3 has 1 files"):
        salmon_pairs(tmp_path)


def test_layout_of_storycloze(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.wav").touch()
    assert [(a.stem, b.stem) for a, b in storycloze_pairs(tmp_path)][-2:] == [
        ("8", "9"),
        ("10", "11"),
    ]
    (tmp_path / "12.wav").touch()
    with pytest.raises(ValueError, match="13 files"):
        storycloze_pairs(tmp_path)


def test_folders_are_measured(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    salmon, story = tmp_path / "salmon", tmp_path / "story"
    for folder, names in ((salmon / "rate", ("sample_0_a", "sample_0_b")), (story, ("0", "1"))):
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            audio.write(folder / f"{name}.wav", speech(0.6 + 0.3 * i), 16000)
    monkeypatch.setattr(likelihood, "TASKS", ())
    found = likelihood.measure(pipeline, [], 1, "sum", salmon, story)
    assert list(found) == ["SALMon rate, sum", "StoryCloze, sum"]
    assert found["StoryCloze, sum"]["text LM, accuracy"][0] == 0.5  # it hears the same in both
    for folders in ((story, Path()), (Path(), salmon), (tmp_path / "none", Path())):
        with pytest.raises(ValueError, match="wanted"):
            likelihood.measure(pipeline, [], 1, "sum", *folders)
