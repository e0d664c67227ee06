"""unit_lm.py: what it learns is the next unit and the end, and generation follows the same odds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unit_lm import TINY, UnitLM, load_unit_lm
from weights import save_model

SMALL = replace(TINY, vocab=11, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48)


def build(seed: int = 0) -> UnitLM:
    torch.manual_seed(seed)
    model = UnitLM(SMALL).eval()
    for p in model.parameters():
        p.data.mul_(8)  # far from uniform, or all orders of targets would cost the same
    return model


def log_odds(model: UnitLM, units: list[int]) -> list[float]:
    """Of each unit and then EOS, one whole pass each: no shifting, no cache, no padding."""
    found = []
    for n, target in enumerate([*units, model.eos]):
        hidden = model.llm(torch.tensor([[model.eos, *units[:n]]]))[0, -1]
        found.append(float(model.llm.logits(hidden).log_softmax(-1)[target]))
    return found


@torch.no_grad()
def test_loss_is_that_of_each_unit_given_those_before_and_of_the_end() -> None:
    model, rows = build(), [[3, 1, 4, 1, 5], [9], [2, 6]]
    odds = [x for row in rows for x in log_odds(model, row)]
    padded = torch.tensor([row + [-1] * (5 - len(row)) for row in rows])
    loss = model(padded).loss
    # 1e-5: sums of fp32 in another order
    assert float(loss) == pytest.approx(-sum(odds) / len(odds), rel=1e-5)
    assert float(model(torch.tensor(rows[:1])).loss) == pytest.approx(-sum(odds[:6]) / 6, rel=1e-5)


@torch.no_grad()
def test_accuracy_counts_units_and_the_end_but_no_padding() -> None:
    model = build()
    row, _ = model.generate(torch.tensor([7]), 6, temperature=0)
    whole = torch.cat([torch.tensor([7]), row])
    hits = [
        int(model.llm.logits(model.llm(torch.tensor([[10, *whole[:n].tolist()]]))[0, -1]).argmax())
        for n in range(len(whole) + 1)
    ]
    right = sum(a == b for a, b in zip(hits, [*whole.tolist(), 10], strict=True))
    assert 0 < right < len(hits)
    padded = torch.nn.functional.pad(whole[None], (0, 3), value=-1)
    assert float(model(padded).accuracy) == pytest.approx(right / len(hits))


def test_greedy_generation_without_and_with_the_cache() -> None:
    for seed in range(5):
        model = build(seed)
        new, ended = model.generate(torch.tensor([seed, 2]), 12, temperature=0)
        for n, unit in enumerate([*new.tolist(), *([model.eos] if ended else [])]):
            ids = torch.tensor([[model.eos, seed, 2, *new[:n].tolist()]])
            assert int(model.llm.logits(model.llm(ids)[0, -1]).argmax()) == unit
        assert ended == (len(new) < 12)


def test_generation_ends_at_eos_or_at_the_limit() -> None:
    model = build()
    model.llm.norm.weight.data.zero_()  # all units alike: EOS comes in the end
    lengths = set()
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        new, ended = model.generate(torch.tensor([], dtype=torch.long), 30, rng=rng)
        assert ended == (len(new) < 30)
        assert model.eos not in new
        lengths.add(len(new))
    assert len(lengths) > 5
    assert 0 <= min(lengths) < 6


@torch.no_grad()
def test_a_folder_gives_the_same_model(tmp_path: Path) -> None:
    model, units = build(), torch.tensor([[3, 1, 4]])
    save_model(tmp_path, model, {"unit_lm": vars(SMALL)})
    again = load_unit_lm(tmp_path)
    assert float(again(units).loss) == float(model(units).loss)
    save_model(tmp_path, model, SMALL)
    with pytest.raises(ValueError, match="unit_lm"):
        load_unit_lm(tmp_path)
