"""continuations.py: measured on speech with known words, times, pitch, rate and level."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import HEARD
from torch import Tensor

import continuations
import pipeline
import synth
import text
from continuation import VocabularySets
from continuations import (
    ANOTHER,
    NEW_WORDS,
    OFF,
    PROMPT_WORDS,
    RECORDING,
    Prompt,
    another,
    consistency,
    cut_prompts,
    manner,
    measure,
    recorded,
    split_heard,
    systems,
    text_reply,
    word_start,
)
from data import builtin
from llm import TINY as LM
from llm import Llama
from metrics import contours
from pipeline import RATE
from tokenizer import Frontend
from unit_lm import TINY as UNIT_LM
from unit_lm import UnitLM
from weights import save_model

SHIPPED = Path(__file__).parent.parent / "weights" / "tiny"


@pytest.mark.parametrize(
    ("prompt", "new", "heard", "split"),
    [
        ("the dog sees", "a bird", "the dog sees a bird", 3),
        ("the dog sees", "a bird", "the dog a bird", 2),
        ("the dog sees", "a bird", "the big dog sees a bird", 4),
        ("the dog sees", "sees a bird", "the dog sees a bird", 3),  # both 2 and 3 are one edit
        ("the dog sees", "", "the duck sees a cat and a bird", 3),
        ("the dog sees", "", "", 0),
        ("the dog sees", "", "the dog", 2),
    ],
)
def test_split_heard(prompt: str, new: str, heard: str, split: int) -> None:
    assert split_heard(prompt.split(), new.split(), heard.split()) == split


def tone(hz: float, level: float, seconds: float) -> Tensor:
    t, k = torch.arange(round(seconds * RATE)) / RATE, torch.arange(1, 5)[:, None]
    return level * (torch.sin(2 * math.pi * k * hz * t) / k).sum(0)


def test_manner_of_a_tone_with_a_pause() -> None:
    """Tolerances: the pitch tracker's grid, and windows of 25 ms at the edges of the sound."""
    hiss = 1e-4 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))  # 58 dB below
    sound = torch.cat([tone(220, 0.1, 1.0), hiss, tone(220, 0.1, 1.0)])
    f0, rate, db = manner(contours(sound), ["abcde", "fghij"]).tolist()
    assert f0 == pytest.approx(24, abs=0.1)  # two octaves above 55 Hz
    assert rate == pytest.approx(math.log(10 / 2), abs=0.03)  # the pause does not count
    square = 0.1**2 / 2 * sum(1 / k**2 for k in range(1, 5))
    assert db == pytest.approx(10 * math.log10(square), abs=0.2)
    louder = manner(contours(2 * sound), ["abcdefghij"])
    assert float(louder[2]) - db == pytest.approx(20 * math.log10(2), abs=0.01)
    higher = manner(contours(tone(220 * 2 ** (3 / 12), 0.1, 1.0)), ["a"])
    assert float(higher[0]) - f0 == pytest.approx(3, abs=0.1)


def test_manner_of_nothing_is_undefined() -> None:
    for sound in (torch.zeros(0), torch.zeros(RATE)):
        assert manner(contours(sound), ["abc"]).isnan().all()
    noise = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    f0, rate, _ = manner(contours(noise), []).tolist()
    assert math.isnan(f0)
    assert math.isnan(rate)


def test_consistency() -> None:
    old = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    shifted = old + torch.tensor([1.0, -2.0, 0.5])
    found = consistency(old, [shifted, shifted])
    assert [found[name][0] for name in OFF] == pytest.approx([1, 2, 0.5])
    assert [found[f"r of {name}"][0] for name in ("F0", "rate", "volume")] == pytest.approx([1] * 3)
    gap = shifted.clone()
    gap[0] = math.nan  # left out, not counted as 0
    assert consistency(old, [gap])[OFF[0]][0] == pytest.approx(1)
    assert math.isnan(consistency(old, [old * math.nan])[OFF[0]][0])


def test_another_recording_is_of_the_same_voice() -> None:
    empty = torch.zeros(0)
    prompts = [Prompt([], empty, [], empty, voice) for voice in ("a", "b", "a", "c", "a", "b")]
    values = torch.arange(6.0)[:, None].expand(6, 3)
    found = another(prompts, values)[:, 0]
    assert found[[0, 1, 2, 4, 5]].tolist() == [2, 5, 4, 0, 1]
    assert found[3].isnan()


# --- recordings ----------------------------------------------------------------------------------


@pytest.fixture
def prompts(small_corpus: Path) -> list[Prompt]:
    return cut_prompts(builtin(synth.load(n_train=1), "test"), 6)


def test_prompts_are_the_first_words(small_corpus: Path) -> None:
    items = builtin(synth.load(n_train=1), "test")
    found = cut_prompts(items, 100)
    whole = [item for item in items if len(item.text.split()) > PROMPT_WORDS]
    assert [" ".join(p.words + p.rest) for p in found] == [item.text for item in whole]
    for prompt, item in zip(found, whole, strict=True):
        assert len(prompt.words) == PROMPT_WORDS
        assert len(prompt.wav) == round(item.truth.ends_s[PROMPT_WORDS - 1] * RATE)
        assert torch.equal(prompt.whole[: len(prompt.wav)], prompt.wav)
    assert len(cut_prompts(items, 2)) == 2
    with pytest.raises(ValueError, match="none of more than 3 words"):
        cut_prompts([], 1)


def test_when_a_word_begins(prompts: list[Prompt]) -> None:
    """The shipped recognizer against true times; 40 ms are its frames."""
    frontend = Frontend(SHIPPED)
    off = []
    for prompt in prompts:
        words = [*prompt.words, *prompt.rest]
        found = word_start(frontend, prompt.whole, words, PROMPT_WORDS)
        off.append(abs(found - len(prompt.wav) / RATE))
    assert sum(off) / len(off) < 0.08
    assert math.isnan(word_start(frontend, prompts[0].wav[: RATE // 5], ["the"] * 20, 3))


# --- who goes on ---------------------------------------------------------------------------------


class Scripted(Llama):
    """Wants to say certain tokens, one after the other."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(LM)
        self.script = iter(script)

    def logits(self, hidden: Tensor) -> Tensor:
        return 100 * torch.nn.functional.one_hot(torch.tensor([next(self.script)]), LM.vocab)


@pytest.mark.parametrize(
    ("wanted", "glue", "words", "ended"),
    [
        ("a bird by the river.", "", "a bird by the river.", True),
        ("a bird. two cats sing now.", "", "a bird. two cats sing now.", True),
        (" . two cats sing by rivers.", ".", "two cats sing by rivers.", True),
        ("sees " * 30, "", ("sees " * 12).strip(), True),
    ],
    ids=["to a stop", "stops too early do not count", "a stop first", "no stop"],
)
def test_text_reply_keeps_the_rules(
    wanted: str, glue: str, words: str, ended: bool, tiny_bundle: Path
) -> None:
    tokens = text.load_tokenizer(tiny_bundle / "lm" / "tokenizer.model")
    sets = VocabularySets.of(tokens, LM.vocab)
    ids = text.align_words("the dog sees", tokens, tokens).llm_ids
    stop = [i for i in range(LM.vocab) if sets.tokenizer.decode([i]) == "."]
    said = [i for word in wanted.replace(" . ", "").split() for i in tokens.encode(" " + word)]
    script = [*(stop if glue else []), *said]
    found = text_reply(Scripted(script), sets, ids, torch.Generator().manual_seed(0))
    assert found == (words.split(), glue, ended)
    stuttered = Scripted([*stop, *script])  # one stop, and no second one
    assert text_reply(stuttered, sets, ids, torch.Generator().manual_seed(0))[1] in ("", ".")


def test_text_reply_begins_with_a_word(tiny_bundle: Path) -> None:
    torch.manual_seed(0)
    tokens = text.load_tokenizer(tiny_bundle / "lm" / "tokenizer.model")
    sets, llm = VocabularySets.of(tokens, LM.vocab), Llama(LM).eval()
    ids = text.align_words("the dog sees", tokens, tokens).llm_ids
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        words, glue, _ = text_reply(llm, sets, ids, rng)
        assert glue in ("", ".")
        assert 1 <= len(words) <= 3 * NEW_WORDS + 1


@pytest.fixture
def unit_lm(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path / "unit_lm", UnitLM(UNIT_LM), {"unit_lm": vars(UNIT_LM)})
    return tmp_path / "unit_lm"


def rngs() -> Iterator[torch.Generator]:
    for seed in range(2):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def test_every_system_goes_on(
    tiny_bundle: Path, unit_lm: Path, prompts: list[Prompt], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(continuations, "MOST_UNITS", 20)
    monkeypatch.setattr(pipeline, "TEXT_ONLY_TEMPERATURE", 0.2)  # untrained: it ends soon
    folders = unit_lm, tiny_bundle / "text_only", tmp_path / "none"
    found = systems(tiny_bundle, *folders, "cpu")
    assert list(found) == ["unit LM", "cascade", "joint, tokens"]
    rows = measure(found, prompts[:2], Frontend(tiny_bundle), rngs, "yin", tmp_path / "out")
    assert list(rows) == [RECORDING, ANOTHER, *found]
    assert {"WER", "grammatical, meant"} <= rows["cascade"].keys()
    assert not {"WER", "grammatical, meant", "text ended"} & rows["unit LM"].keys()
    lines = [json.loads(x) for x in (tmp_path / "out" / "judge.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 2 * 2  # systems and recordings, seeds, prompts
    for line in lines:
        assert line["prompt"] in [" ".join(p.words) for p in prompts[:2]]
        assert (line["meant"] is None) == (line["system"] == "unit LM")
        assert " ".join([HEARD] * 9).endswith(line["heard"])  # once for each part between pauses
        for name in ("wav", "prompt_wav"):
            assert (tmp_path / "out" / line[name]).is_file()
    meant = {line["meant"] for line in lines if line["system"] == "cascade"}
    assert len(meant) == 4  # seeds differ, and prompts
    true = [line["meant"] for line in lines if line["system"] == RECORDING]
    assert true == [" ".join(p.rest) for p in prompts[:2]] * 2


def test_absent_systems_are_named(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = tiny_bundle / "none"
    assert list(systems(tiny_bundle, none, none, none, "cpu")) == ["joint, tokens"]
    said = capsys.readouterr().out
    for name in ("unit LM", "cascade", "joint, embeddings"):
        assert f"{name}: no folder {none}, left out" in said


def test_a_unit_lm_speaks_behind_its_prompt(
    tiny_bundle: Path, unit_lm: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "MOST_UNITS", 10)
    speak = continuations.unit_speaker(unit_lm, tiny_bundle, "cpu")
    answer = speak(prompts[0], torch.Generator().manual_seed(0))
    assert answer.start_s == pytest.approx(len(prompts[0].wav) / RATE, abs=0.08)  # two units
    assert len(answer.wav) / RATE - answer.start_s == pytest.approx(10 * 0.04, abs=0.02)
    assert answer.speech_ended == 0
    said = recorded(prompts[0], torch.Generator())
    assert said.meant == [*prompts[0].words, *prompts[0].rest]
