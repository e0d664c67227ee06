"""Train the pure unit LM: the next S3 unit, without text; see unit_lm.py.

    python train_unit_lm.py                     on the built-in corpus
    python train_unit_lm.py --resume ...        go on after an interruption
    torchrun --nproc-per-node 8 train_unit_lm.py --data FEATURES --dev .. --bundle ..    at scale

At the end it prints nats per unit beside those of the uniform and the unigram guess. FEATURES are
those of prepare.py, of which only the units are read. evaluate.py --unit-lm RUN lets it speak.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loop
import synth
from common import Log, finish, flag, one_by_one, parse, positive, run, seed_step, setup
from data import Batches, Ragged, builtin, digest, pad, unit_features
from s3_units import S3Config
from shards import Shards
from tokenizer import UnitFrontend
from unit_lm import IGNORE, TINY, UnitLM, UnitLMOutput
from weights import as_config, read_config, save_model


@dataclass(frozen=True)
class Config(loop.Recipe):
    out: Path = flag(Path("runs/unit_lm"), "checkpoints, log.jsonl and the finished model folder")
    width: int = flag(TINY.width, "of the Llama, whose heads have 32 channels")
    layers: int = flag(TINY.layers, "of the Llama")
    steps: int = flag(3000, "optimizer steps")
    batch: int = flag(32, "utterances in a micro-batch")
    lr: float = flag(2e-3, "peak learning rate")
    floor: float = flag(0.03, "where the cosine ends, as a share of the peak")


LONGEST = 2048  # units of an utterance and its continuation: 80 s at 25 Hz
PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


def load_units(cfg: Config, split: str, device: torch.device) -> Ragged | Shards:
    """split: train or dev."""
    if cfg.data != Path():
        return Shards(cfg.data if split == "train" else cfg.dev, cfg.bundle)
    items = builtin(synth.load(n_train=cfg.utterances), split)
    frontend = UnitFrontend(cfg.bundle).to(device)
    return unit_features(items, frontend, digest(items), f"units of {split}")


def batch(store: Ragged | Shards, indices: Sequence[int]) -> Tensor:
    """-> units (B, U), IGNORE behind each"""
    return pad([store.get("units", i).long() for i in indices], IGNORE)[0]


def build(cfg: Config) -> UnitLM:
    """Two heads share their keys and values, as in TINY."""
    if cfg.width % (2 * TINY.head_dim):
        raise ValueError(f"--width {cfg.width}: wanted a multiple of {2 * TINY.head_dim}")
    s3 = as_config(S3Config, read_config(cfg.bundle / "s3"), str(cfg.bundle / "s3"))
    heads = cfg.width // TINY.head_dim
    config = replace(
        TINY, vocab=s3.codes + 1, width=cfg.width, layers=cfg.layers, heads=heads,
        kv_heads=heads // 2, ffn=cfg.width * 11 // 4, max_tokens=LONGEST,
    )  # fmt: skip
    return UnitLM(config)


@torch.no_grad()
def evaluate(
    model: UnitLM, store: Ragged | Shards, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """Nats per unit and EOS, and how many are guessed; the processes share the utterances out."""
    model.eval()
    device = next(model.parameters()).device
    sums = {name: torch.zeros((), device=device) for name in ("nll", "accuracy", "n")}
    mine = range(rank, len(store), world)
    for first in range(0, len(mine), 50):
        units = batch(store, mine[first : first + 50]).to(device)
        n, out = (units >= 0).sum() + len(units), model(units)
        sums["nll"] += n * out.loss
        sums["accuracy"] += n * out.accuracy
        sums["n"] += n
    model.train()
    found = loop.total(sums, world)
    return {f"dev_{name}": found[name] / found["n"] for name in ("nll", "accuracy")}


def train(cfg: Config) -> UnitLM:
    rank, world, device = setup(cfg.device)
    loop.check(cfg, world)
    positive(cfg, "steps", "width", "layers")
    if cfg.frames:
        raise ValueError("--frames are for mels; units come in batches of --batch")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    with one_by_one(rank):
        data, dev = (load_units(cfg, split, device) for split in ("train", "dev"))
    model = build(cfg).to(device)
    opt = loop.optimizer(cfg, model.parameters(), device)
    saved = loop.Run(cfg, {"model": model, "optimizer": opt}, rank)
    batches = Batches(data.lengths("units"), cfg.batch, cfg.seed)
    last = math.ceil(cfg.steps * batches.per_epoch / cfg.micro) if cfg.epochs else cfg.steps
    loop.speed_up(cfg, model)
    net = loop.parallel(model, world, device)
    mine = range(rank, cfg.micro, world)  # the micro-batches of this process

    def load(at: int) -> Tensor:
        return batch(data, batches(at)).to(device)

    def forward(net: nn.Module, units: Tensor) -> UnitLMOutput:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            return net(units)

    micro = (i * cfg.micro + k + 1 for i in range(saved.first, last) for k in mine)
    stream = loop.read_ahead(load, micro, cfg.ahead, cfg.threads)
    meter = loop.Meter(world, device)
    if cfg.mfu:
        units = load(1)
        meter.measure(model, (units >= 0).sum(), partial(forward, model, units))
    log = Log(cfg.out, "unit LM", last, saved.first, quiet=rank > 0, board=True)
    for step in range(saved.first + 1, last + 1):
        rate = loop.set_rate(cfg, opt, step, last)
        opt.zero_grad()
        for part in mine:
            seed_step(cfg.seed, step, part, cfg.micro)
            units = next(stream)
            with loop.share(net, part == mine[-1]):
                out = forward(net, units)
                (out.loss / len(mine)).backward()
            meter.add((units >= 0).sum(), loss=out.loss, accuracy=out.accuracy)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, error_if_nonfinite=True)
        opt.step()
        if step % cfg.log_every == 0 or step == last:
            log.row(step, **meter.row(), norm=norm, lr=rate)
        with meter.stopped():
            if step == last or (cfg.eval_every and step % cfg.eval_every == 0):
                found = evaluate(model, dev, rank, world)
                log.row(step, **found)
                if saved.improved(-found["dev_nll"]) and rank == 0:
                    save(cfg.out / "best", model, step)
                if step == last and rank == 0:
                    report(found, dev, model.eos)
            if step == last or step % cfg.save_every == 0:
                saved.save(step)
    if rank == 0:
        save(cfg.out, model, last)
        loop.curve(cfg.out)
    finish()
    return model


def save(folder: Path, model: UnitLM, step: int) -> None:
    """A model folder, which load_unit_lm opens."""
    save_model(folder, model, {"unit_lm": asdict(model.config)}, torch.float16, step=step)


def report(found: dict[str, float], dev: Ragged | Shards, codes: int) -> None:
    units = torch.cat([dev.get("units", i).long() for i in range(len(dev))])
    share = units.bincount(minlength=codes) / len(units)
    unigram = float(-(share * share.clamp(min=1e-9).log()).sum())
    print(f"\nnats per unit: uniform {math.log(codes):.3f}, unigram {unigram:.3f}, this model "
          f"{found['dev_nll']:.3f}; right: {found['dev_accuracy']:.2%}\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    run(lambda: (train(parse(Config, PRESETS, __doc__)), None)[1])
