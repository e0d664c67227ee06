"""bench.py: both sides of every stage compute the same, and no figure is lost or made up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bench
import bench_case
import bench_train
import cpu_linear
from bench_case import TINY, Case, Sizes, size, twin
from bench_stages import STAGES

CPU = torch.device("cpu")
LIBRARIES = {
    "transformers": ("encoder", "decode", "transcribe"),
    "s3tokenizer": ("s3",),
    "vector_quantize_pytorch": ("rvq", "fsq"),
    "peft": ("lora",),
}
QUICK = replace(TINY, tokens=4, said=6, batch=3, units=24, skip=3, seconds=0.5)
QUICK = replace(QUICK, unit_decoder=replace(TINY.unit_decoder, text_blocks=1, lm_blocks=2))
QUICK = replace(QUICK, flow=replace(TINY.flow, steps=2), hift=replace(TINY.hift, channels=16))


def case(peer: Tensor | None = None, share: float = 1.0) -> Case:
    x = torch.tensor([1.0, 2.0])
    theirs = None if peer is None else lambda: peer
    return Case("one and two", nn.Linear(2, 3).eval(), lambda: x, 12, theirs, "another", share)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine that reads 4 B/s, computes 2 operations/s, and calls that last 1, 3, 1, 3 .. s."""
    spent: list[float] = []

    def timed(call: Any, device: torch.device) -> float:
        spent.append(1.0 + 2.0 * (len(spent) % 2))
        return spent[-1]

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "ENOUGH_S", 0.0)
    monkeypatch.setattr(bench, "read_rate", lambda device: 4.0)
    monkeypatch.setattr(bench.loop, "ceiling", lambda device, dtype: 4.0 if dtype else 2.0)
    return spent


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft asks transformers
@pytest.mark.parametrize("name", STAGES)
def test_both_sides_compute_the_same(name: str) -> None:
    for library, stages in LIBRARIES.items():
        if name in stages:
            pytest.importorskip(library)
    for stage in STAGES[name]:
        torch.manual_seed(0)
        with torch.random.fork_rng():
            made = stage(QUICK, CPU, True)
        assert made.peer is not None
        assert made.peer_name
        with torch.set_grad_enabled(made.model.training):
            ours, theirs = made.ours(), made.peer()
        assert ours.numel() > 1
        assert ours.unique().numel() > 1  # else both may be nothing
        bench.agree(made, ours, theirs)
        alone = stage(QUICK, CPU, False)
        assert alone.peer is None
        assert size(alone.model) == size(made.model)


def test_sides_that_differ_are_not_timed() -> None:
    ours = torch.tensor([1.0, 2.0])
    bench.agree(case(), ours, ours + 1e-5)
    with pytest.raises(ValueError, match=r"differs from another by 0\.05; not timed"):
        bench.agree(case(), ours, torch.tensor([1.1, 2.0]))
    with pytest.raises(ValueError, match="not timed"):
        bench.agree(case(), ours, torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"we give \[2\], the peer \[1\]"):
        bench.agree(case(), ours, ours[:1])
    with pytest.raises(ValueError, match=r"by 0\.5"):
        bench.agree(case(), torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_a_line_is_ratios_of_pairs_and_the_floor(clock: list[float]) -> None:
    made = case(torch.tensor([1.0, 2.0]), share=0.25)
    row = bench.measure(made, CPU, 4)
    assert len(clock) == 8
    assert (row["ours, s"], row["peer, s"], row["pairs"]) == (1.0, 12.0, 4)
    assert (row["ratio"], row["25 %"], row["75 %"]) == (12.0, 12.0, 12.0)
    assert (row["floor, s"], row["floor / ours"]) == (3.0, 3.0)  # 12 bytes read, nothing computed
    assert row["weights, GB"] == 36e-9
    made.ours = lambda: torch.ones(2, 8) @ torch.ones(8, 2)  # 64 operations: now they decide
    made.peer = None
    row = bench.measure(made, CPU, 1)
    assert (row["floor, s"], row["ratio"], row["peer, s"]) == (32.0, None, None)


@pytest.mark.skipif(not cpu_linear.HERE, reason="this torch has no oneDNN")
def test_operations_of_onednn_count() -> None:
    layer = cpu_linear.quicken(nn.Linear(512, 512))
    case = Case("a layer", layer, lambda: layer(torch.ones(3, 4, 512)))
    with torch.no_grad():
        _, operations, _ = bench.first_call(case, CPU)
    assert operations == 2 * 12 * 512 * 512
    with cpu_linear.counter() as counted:
        layer(torch.ones(3, 4, 512, requires_grad=True)).sum().backward()
    assert counted.get_total_flops() == 3 * operations


def test_a_twin_has_the_weights_and_stays_slow() -> None:
    layer = nn.Linear(512, 512)
    other = twin(layer)
    cpu_linear.quicken(layer)
    assert type(other) is nn.Linear
    assert other.weight is layer.weight


def test_memory_is_what_a_call_takes_beside_the_weights() -> None:
    made = case()
    made.ours = lambda: torch.ones(10_000_000).double().sum()[None]
    _, _, memory = bench.first_call(made, CPU)
    if bench_case.FORGET.exists():
        assert 0.11e9 < memory < 0.16e9


def test_in_bf16_the_floor_is_lower_and_the_peer_stays(clock: list[float]) -> None:
    torch.manual_seed(0)
    made = STAGES["encoder"][0](QUICK, CPU, True)
    before, peer = made.reads, made.peer() if made.peer else None
    halved = bench.halved(made, CPU)
    assert halved.what.endswith(", bf16")
    assert 0.4 < halved.reads / before < 0.7  # its positions stay
    assert halved.peer is not None
    assert peer is not None
    assert torch.equal(halved.peer(), peer)
    error = (halved.ours() - peer).abs().max() / peer.abs().max()
    assert 1e-4 < error < 0.05
    floor, usual = (
        bench.measure(replace(halved, dtype=dtype), CPU, 1)["floor, s"]
        for dtype in (halved.dtype, None)
    )
    assert floor == usual / 2
    exact = STAGES["fsq"][0](QUICK, CPU, False)
    assert bench.halved(exact, CPU) is exact


def test_what_is_compiled_is_checked_and_timed_after_it(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = list[int]()

    def mark(run: Any, **_: object) -> Any:
        compiled.append(len(clock))
        return run

    monkeypatch.setattr(torch, "compile", mark)
    made = STAGES["unit_decoder"][0](QUICK, CPU, False)
    assert bench.measure(made, CPU, 2, compiled=True)["what"].endswith(", compiled")
    assert compiled == [0]
    assert len(clock) == 2
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda x, *a: run(x + 1, *a))
    with pytest.raises(ValueError, match="not timed"):
        bench.measure(STAGES["spoken_lm"][0](QUICK, CPU, False), CPU, 2, compiled=True)


def test_results_of_each_way_have_a_file(tmp_path: Path) -> None:
    line = {"what": "it", "ours, s": 0.5}
    bench.keep(bench.Config(out=tmp_path, size="tiny"), "rvq", CPU, [line])
    cfg = bench.Config(out=tmp_path, size="tiny", bf16=True, compile=True, items=16)
    bench.keep(cfg, "encoder", CPU, [line])
    names = "cpu_tiny.json", "cpu_tiny.md", "cpu_tiny_bf16_compile.json", "cpu_tiny_bf16_compile.md"
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names]
    command = (
        "`python bench.py --stage encoder --preset tiny --threads 2 --bf16 --compile --items 16`"
    )
    assert command in (tmp_path / names[3]).read_text()


def test_an_absent_peer_is_named(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    def stage(sizes: Sizes, device: torch.device, peers: bool) -> Case:
        if peers:
            raise ModuleNotFoundError("no library", name="library")
        return case()

    row = bench.compare(stage, QUICK, CPU, bench.Config(pairs=1))
    assert row["peer"] == "library: absent"
    assert row["ratio"] is None
    assert "library is not installed" in capsys.readouterr().out


def test_a_run_replaces_its_stage_and_no_other(tmp_path: Path) -> None:
    cfg = bench.Config(out=tmp_path, size="tiny")
    line = {"what": "it", "ours, s": 0.5, "ratio": None}
    bench.keep(cfg, "rvq", CPU, [line])
    bench.keep(cfg, "train", CPU, [{"training step": "tasla", "ms": 1.0}])
    bench.keep(cfg, "encoder", CPU, [line | {"ratio": 2.0}])
    bench.keep(cfg, "rvq", CPU, [line | {"ours, s": 0.25}])
    found = json.loads((tmp_path / "cpu_tiny.json").read_text())
    assert [*found] == ["encoder", "rvq", "train"]
    assert found["rvq"]["rows"] == [line | {"ours, s": 0.25}]
    report = (tmp_path / "cpu_tiny.md").read_text()
    assert "| encoder | it | 0.5 | 2 |\n| rvq | it | 0.25 |  |\n\n| stage | training" in report
    assert f"torch {torch.__version__}" in report
    assert "`python bench.py --stage train --preset tiny --threads 2`" in report


def test_stages_are_known_ones() -> None:
    assert bench.chosen(bench.Config(stage="rvq,train")) == ["rvq", "train"]
    assert bench.chosen(bench.Config()) == [*STAGES, "sample"]
    with pytest.raises(ValueError, match="--stage warp: wanted all"):
        bench.chosen(bench.Config(stage="rvq,warp"))


def test_sample_is_timed_as_a_process() -> None:
    row = bench.sample(bench.Config(threads=1))
    times = "start and imports, s", "whole process, s", "x real time, loaded"
    assert all(row[name] > 0 for name in times)  # on a busy machine they have no order


def test_a_process_that_fails_is_no_figure() -> None:
    with pytest.raises(ValueError, match=r"(?s)python -c import nothing failed: .*ModuleNotFound"):
        bench.process("-c", "import nothing")


def test_operations_become_hours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_train, "build", lambda cfg: nn.Linear(2, 2))
    monkeypatch.setattr(bench_train, "per_hour", lambda operations: 4.5e15)
    bench_train.count(bench_train.Steps(tflops=2.5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1] == "4.50"
    heard = float(lines[2].split()[2])  # PFLOP an hour of speech
    assert lines[3].startswith("960 h at 2.5 TFLOP/s: 4.8e+02 h an epoch, ")
    assert float(lines[3].split()[-3]) == pytest.approx(heard * 960 / 9, rel=0.05)
    with pytest.raises(ValueError, match=r"--tflops 0\.0: wanted"):
        bench_train.count(bench_train.Steps(tflops=0.0))
