"""loop.py: rates, reading ahead, recomputation, meters, checkpoints and curves of both scripts."""

import json
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import loop
import lora
import train_lm
import train_tokenizer
from common import parse
from llm import TINY as LLAMA
from llm import Llama
from loop import Meter, Recipe, Run
from unit_decoder import TINY, UnitDecoder
from weights import save_checkpoint, steps_of

CPU = torch.device("cpu")


# --- recipes: what the papers and their code say -------------------------------------------------


@pytest.mark.parametrize(
    ("script", "preset", "wanted"),
    [
        (train_tokenizer, "taste",  # TASTE-SpokenLM, scripts/run.py: 256 utterances a step
         dict(text_steps=2, continuous_steps=10, steps=10, epochs=True, optimizer="adamw", lr=2e-4,
              schedule="cosine", warmup=100, floor=0.0, clip=1.0, quantizer="rvq", layers="6",
              quantizer_weight=1.0, aggregator="xattn", size="full")),
        (train_tokenizer, "tasla",  # TASLA, appendix B and sec. 4
         dict(steps=5, epochs=True, optimizer="adam", lr=1.6e-4, schedule="root", warmup=5000,
              clip=5.0, frames=2000, micro=8, seed=1986, eval_every=2000, save_every=2000,
              quantizer="fsq", fsq_channels=64, layers="8,16,24,32", aggregator="mlda")),
        (train_lm, "taste",
         dict(lora_rank=64, lora_alpha=128.0, lora_dropout=0.05, lr=5e-5, head="latent", steps=10,
              epochs=True, reference=True)),
        (train_lm, "tasla", dict(head="token", lora_rank=64, lr=5e-5)),
    ],
)  # fmt: skip
def test_presets(script: SimpleNamespace, preset: str, wanted: dict[str, object]) -> None:
    found = parse(script.Config, script.PRESETS, "", ["--preset", preset])
    assert {name: getattr(found, name) for name in wanted} == wanted
    if script is train_lm or preset == "taste":
        assert found.batch * found.micro == (512 if script is train_lm else 256)


def test_stages_of_tasla_and_taste() -> None:
    cfg = train_tokenizer.Config(**train_tokenizer.TASTE)
    plan = train_tokenizer.stages(cfg, per_epoch=100)  # 32 micro-batches a step
    assert [(s.begin, s.end) for s in plan] == [(0, 7), (7, 39), (39, 71)]
    assert [(s.text_only, s.quantize) for s in plan] == [
        (True, True),
        (False, False),
        (False, True),
    ]
    started = replace(cfg, init=Path("text"))
    assert [s.end for s in train_tokenizer.stages(started, 100)] == [32, 64]
    only = train_tokenizer.stages(replace(cfg, text_only=True, continuous_steps=0), 100)
    assert [(s.name, s.text_only) for s in only] == [("text-only", True)] * 2


def test_rates() -> None:
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    root = Recipe(schedule="root", lr=2.0, warmup=100)
    found = {step: loop.set_rate(root, opt, step, 10**6) for step in (1, 50, 100, 400, 10000)}
    assert found == pytest.approx({1: 0.02, 50: 1.0, 100: 2.0, 400: 1.0, 10000: 0.2})
    assert opt.param_groups[0]["lr"] == pytest.approx(0.2)
    assert loop.set_rate(Recipe(lr=2.0, warmup=10), opt, 100, 100) == pytest.approx(0.0)
    assert loop.set_rate(Recipe(lr=2.0, warmup=10, floor=0.5), opt, 100, 100) == pytest.approx(1.0)


def test_optimizers() -> None:
    params = [nn.Parameter(torch.zeros(3))]
    assert type(loop.optimizer(Recipe(), params, CPU)) is torch.optim.AdamW
    adam = loop.optimizer(Recipe(optimizer="adam", beta2=0.9), params, CPU)
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["betas"] == (0.9, 0.9)
    assert adam.defaults["weight_decay"] == 0


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        (dict(micro=3), 2, "--micro 3: wanted a multiple of the 2 processes"),
        (dict(data=Path("x")), 1, "--data and --dev belong together"),
        (dict(frames=100), 1, "--frames and --ahead are for prepared features"),
        (dict(keep=0), 1, "--keep 0"),
        (dict(schedule="root", warmup=0), 1, "--warmup 0"),
    ],
)
def test_recipes_that_cannot_be(flags: dict, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.check(Recipe(**flags), world)


# --- reading ahead -------------------------------------------------------------------------------


def test_reading_ahead_changes_nothing_and_stays_bounded() -> None:
    loaded, lock = list[int](), threading.Event()

    def load(i: int) -> int:
        loaded.append(i)
        return i * i

    assert list(loop.read_ahead(load, range(9), 3, 1)) == [i * i for i in range(9)]
    loaded.clear()
    stream = loop.read_ahead(load, range(100), 3, 1)
    assert next(stream) == 0
    time.sleep(0.05)
    assert len(loaded) <= 4
    stream.close()
    loaded.clear()
    lazy = loop.read_ahead(load, range(100), 0, 1)
    assert (next(lazy), loaded) == (0, [0])  # asked for, not ahead
    assert not lock.is_set()


def test_an_error_of_the_reader_arrives() -> None:
    def load(i: int) -> int:
        if i == 2:
            raise ValueError("shard 2 is damaged")
        return i

    stream = loop.read_ahead(load, range(5), 2, 1)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="shard 2 is damaged"):
        next(stream)


# --- speed ---------------------------------------------------------------------------------------


def decoder(**flags: Any) -> tuple[UnitDecoder, Tensor]:
    torch.manual_seed(0)
    small = replace(TINY, text_blocks=1, lm_blocks=2, width=32, branch_width=32, ffn=64)
    model = UnitDecoder(small)
    loop.speed_up(Recipe(**flags), model)
    torch.manual_seed(1)  # of the dropout
    ids, units = torch.arange(6).view(2, 3), torch.arange(20).view(2, 10)
    loss = model(ids, None, torch.ones(2, 3, 128), torch.ones(2, 64), units, need_maps=False).loss
    loss.backward()
    return model, loss


def test_recomputation_gives_the_same_gradients() -> None:
    (plain, a), (again, b) = decoder(), decoder(recompute=True)
    assert torch.equal(a, b)
    for x, y in zip(plain.parameters(), again.parameters(), strict=True):
        if x.grad is None or y.grad is None:
            assert x.grad is y.grad
        else:
            assert torch.equal(x.grad, y.grad)
    assert plain.state_dict().keys() == again.state_dict().keys()


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # the first only traces, which is what decides how many graphs there are
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's tracer
def test_compiled_blocks_agree_and_share_their_graphs(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few graphs, whatever the lengths: blocks of a kind share theirs."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    model = UnitDecoder(replace(TINY, text_blocks=2, lm_blocks=3, dropout=0.0))
    batches = []
    for B, N, U in ((2, 3, 10), (3, 5, 30), (4, 7, 50), (2, 9, 70)):
        ids, units = torch.randint(512, (B, N)), torch.randint(1024, (B, U))
        batches.append((ids, None, torch.randn(B, N, 128), torch.randn(B, 64), units))
    plain = [model(*batch, need_maps=False).loss for batch in batches]
    loop.speed_up(Recipe(compile=True), model)
    before = loop.graphs()
    for batch, loss in zip(batches, plain, strict=True):
        torch.testing.assert_close(model(*batch, need_maps=False).loss, loss, rtol=1e-4, atol=1e-4)
    assert 0 < loop.graphs() - before <= 8


def use_a_share(rank: int, file: str) -> None:
    """Two calls of a Llama with LoRA, one without it between them, and the gradient of the sum."""
    torch.manual_seed(0)
    model = Llama(LLAMA)
    lora.add_lora(model, {"q", "down"}, 4, 8.0)
    for layer in lora.lora_layers(model):
        nn.init.normal_(layer.B, std=0.1)
    ids, sizes = torch.randint(LLAMA.vocab, (2, 7)), {}
    if rank >= 0:
        dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
        loop.shard(model, 2, CPU)
        sizes = {k: p.to_local().numel() / p.numel() if isinstance(p, DTensor) else 1.0
                 for k, p in model.named_parameters()}  # fmt: skip
    net = loop.parallel(model, 2 if rank >= 0 else 1, CPU)
    first = net(ids)
    with lora.disabled(model), torch.no_grad():
        plain = net(ids)
    ((first - plain) ** 2 + net(ids.flip(0))).mean().backward()
    grads = [p.grad for p in lora.lora_parameters(model)]
    torch.save([sizes, first.detach(), plain, grads], f"{file}.{rank}")
    if rank >= 0:
        dist.destroy_process_group()


def test_a_shared_out_llama_is_the_whole_one(tmp_path: Path) -> None:
    """Frozen weights of the layers: half in each process; what is trained: whole in both."""
    file = str(tmp_path / "group")
    mp.spawn(use_a_share, (file,), nprocs=2)
    use_a_share(-1, file)
    one, *two = (torch.load(f"{file}.{rank}", weights_only=True) for rank in (-1, 0, 1))
    for sizes, *rest in two:
        split = {k for k, share in sizes.items() if share < 1}
        assert split == {k for k in sizes if "layers." in k and not k.endswith((".A", ".B"))}
        assert all(0.45 < sizes[k] < 0.55 for k in split)
        torch.testing.assert_close(rest, one[1:], rtol=1e-5, atol=1e-7)


def test_operations_are_counted_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).train()
    x = torch.randn(10, 8)
    found = loop.flops(model, lambda: SimpleNamespace(loss=model(x).square().mean()))
    first, second = 2 * 10 * 8 * 16, 2 * 10 * 16 * 4
    assert found == 2 * first + 3 * second  # nothing asks for the gradient of x
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert loop.ceiling(CPU, seconds=0.01) > 1e8


def test_a_meter_counts_per_second_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 8.0, 13.0, 13.0])
    monkeypatch.setattr("loop.time.monotonic", lambda: next(now))
    meter = Meter(1, CPU, "tokens_s")
    meter.add(torch.tensor(30), loss=torch.tensor(1.0, requires_grad=True))
    with meter.stopped():  # from 5 to 8
        pass
    meter.add(torch.tensor(70), loss=torch.tensor(4.0))
    meter.mfu_per_unit_s = 0.01
    row = meter.row()
    assert row.pop("memory_gb") > 0
    assert row == pytest.approx({"loss": 2.5, "tokens_s": 10.0, "mfu": 0.1})
    assert not meter.sums


# --- checkpoints and curves ----------------------------------------------------------------------


@dataclass
class Counter:
    """Anything with a state."""

    n: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def test_a_run_knows_its_best_value_again(tmp_path: Path) -> None:
    cfg = Recipe(out=tmp_path, keep=3)
    run = Run(cfg, {"counter": Counter(7)}, 0)
    assert (run.first, run.best) == (0, None)
    assert [run.improved(value) for value in (0.2, 0.1, 0.2, 0.3)] == [True, False, False, True]
    for step in range(1, 6):
        run.save(step)
    assert [path.name for path in steps_of(tmp_path)] == [
        "step_000003",
        "step_000004",
        "step_000005",
    ]
    counter = Counter()
    again = Run(replace(cfg, resume=True), {"counter": counter}, 0)
    assert (again.first, again.best, counter.n) == (5, 0.3, 7)
    assert not again.improved(0.25)


@pytest.mark.parametrize("flag", [{"seed": 1}, {"micro": 2}, {"data": Path("other")}])
def test_another_recipe_does_not_resume(flag: dict, tmp_path: Path) -> None:
    cfg = Recipe(out=tmp_path)
    Run(cfg, {}, 0).save(1)
    with pytest.raises(ValueError, match=f"--{next(iter(flag))} .*: the run to resume has"):
        Run(replace(cfg, resume=True, **flag), {}, 0)
    assert Run(replace(cfg, resume=True, lr=5.0, threads=1), {}, 0).first == 1


def test_a_full_disk_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk, as seen by this process, takes files of 2 kB only."""
    import resource

    model = nn.Linear(4, 4)
    save_checkpoint(tmp_path, {"model": model}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for state in ({"model": nn.Linear(99, 99)}, {"big": nn.Linear(4, 4), "opt": big_state()}):
            with pytest.raises(OSError, match=r"step_000002: cannot be written .* --resume"):
                save_checkpoint(tmp_path, state, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def big_state() -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.zeros(999))]
    opt = torch.optim.AdamW(params)
    params[0].grad = torch.ones(999)
    opt.step()
    return opt


def test_a_curve_of_what_was_logged(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1 / s, "seconds": s} for s in (1, 2, 3, 2, 3)] + [
        {"step": 3, "dev_accuracy": 0.5, "seconds": 4}
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert loop.curve(tmp_path).read_bytes().startswith(b"\x89PNG")
