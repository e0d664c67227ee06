"""Train a speech tokenizer: text-only first, then with codes, on frozen recognition and S3 units.

    python train_tokenizer.py --quantizer fsq                       TASLA in small: MLDA + FSQ
    python train_tokenizer.py --quantizer rvq --aggregator xattn    TASTE: one value layer + RVQ
    python train_tokenizer.py --text-only                           the baseline of both papers
    python train_tokenizer.py --resume ...                          go on after an interruption

At the end it prints how many S3 units the model predicts, beside the baselines: with the true
history (teacher forcing) and with the history hidden, where only text and codes can tell.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import synth
from aggregator import TINY as AGGREGATOR
from common import Log, cosine, flag, parse, pick_device, positive, run, seed_step
from data import (
    BOS,
    Batches,
    Item,
    Ragged,
    builtin,
    digest,
    tokenizer_batch,
    unit_features,
    unit_hits,
)
from fsq import TINY as FSQ
from rvq import TINY as RVQ
from tokenizer import Frontend, SpeechTokenizer, TokenizerConfig, load_tokenizer
from unit_decoder import TINY as UNIT_DECODER
from weights import first_step, save_checkpoint, save_model


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("runs/tokenizer"), "checkpoints, log.jsonl and the finished model folder")
    bundle: Path = flag(Path("weights/tiny"), "the frozen models: asr, s3, speaker")
    quantizer: str = flag("fsq", "what makes the codes", choices=("fsq", "rvq", "none"))
    aggregator: str = flag(
        "mlda", "values: all layers mixed per frame, or one layer", choices=("mlda", "xattn")
    )
    fsq_channels: int = flag(FSQ.d, "FSQ integers per word; 64 in the TASLA paper")
    text_only: bool = flag(False, "stay with the text-only baseline to the end")
    text_steps: int = flag(600, "steps of text-only training before the codes come in")
    steps: int = flag(900, "steps with codes (or of more text-only training)")
    init: Path = flag(Path(), "start from this text-only model instead of training one")
    utterances: int = flag(2000, "training utterances of the built-in corpus")
    batch: int = flag(16, "utterances per step")
    lr: float = flag(3e-3, "peak learning rate")
    warmup: int = flag(100, "steps of linear warm-up, in each of the two phases")
    history_dropout: float = flag(0.5, "share of utterances whose unit history is partly hidden")
    guide: bool = flag(True, "attend to the spoken word; needs word times")
    prosody: bool = flag(True, "read rate, pitch and volume of each word from its codes, too")
    seed: int = flag(0, "weights, batches and dropout follow from (seed, step)")
    save_every: int = flag(200, "steps between two checkpoints")
    threads: int = flag(2, "CPU threads")
    bf16: bool = flag(True, "bf16 autocast; quantizer and losses stay in fp32")
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "go on from the newest checkpoint under --out")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}
QUANTIZER_WEIGHT = 0.1  # lambda; the TASLA paper does not give it, TASTE's is 1
SPAN = 16  # units, two or three words: the longest stretch of history that is hidden in one piece
TASTE_LAYER = 1  # the value layer of --aggregator xattn: shallow, as TASTE's 6 of 32


def build(cfg: Config, frontend: Frontend) -> SpeechTokenizer:
    """The model, its aggregator's decoder started from the recognizer's, as TASTE does."""
    aggregator = AGGREGATOR
    if cfg.aggregator == "xattn":
        aggregator = replace(AGGREGATOR, value_layers=(TASTE_LAYER,), mlda=False)
    config = TokenizerConfig(
        replace(aggregator, prefix_ids=(BOS,)),
        replace(UNIT_DECODER, dropout=0.0),
        cfg.quantizer,
        replace(FSQ, d=cfg.fsq_channels),
        replace(RVQ, codebook_size=512, dead_code_threshold=0.02),
        QUANTIZER_WEIGHT,
        cfg.prosody and not cfg.text_only,
    )
    model = SpeechTokenizer(config)
    ours, theirs = model.aggregator.decoder.state_dict(), frontend.decoder.state_dict()
    model.aggregator.decoder.load_state_dict(
        {k: ours[k] if ".cross.value." in k else theirs[k] for k in ours}
    )
    return model


@dataclass
class Data:
    items: list[Item]
    store: Ragged


def load_data(cfg: Config, frontend: Frontend, split: str) -> Data:
    corpus = synth.load(n_train=cfg.utterances)
    items = builtin(corpus, split)
    return Data(items, unit_features(items, frontend, digest(items), f"units of {split}"))


def hide_history(units: Tensor, share: float) -> Tensor | None:
    """units (B, U) -> history_keep (B, U): a `share` of the items loses some of its history, from
    nothing to all of it (one in five of those items), so that text and codes have to tell. It goes
    in stretches of up to SPAN units: what one lost unit was, its neighbours tell too well."""
    if share == 0:
        return None
    B, U = units.shape
    lost = 1.25 * torch.rand(B, 1, device=units.device)
    lost *= torch.rand_like(lost) < share  # (B, 1)
    length = torch.randint(1, SPAN + 1, (B, 1), device=units.device)
    at = torch.arange(U, device=units.device) + torch.randint(SPAN, (B, 1), device=units.device)
    return torch.rand(B, U + SPAN, device=units.device).gather(1, at // length) >= lost


def accuracies(
    model: SpeechTokenizer, data: Data, frontend: Frontend, text_only: bool
) -> dict[str, float]:
    """Unit accuracy on a split, and two baselines, see data.unit_hits."""
    found = unit_hits(model, data.items, data.store, frontend, text_only)
    total = float(found.pop("total").sum())
    return {name: float(hits.sum()) / total for name, hits in found.items()}


def train(cfg: Config) -> SpeechTokenizer:
    positive(cfg, "utterances", "batch", "save_every", "threads", "fsq_channels")
    device = pick_device(cfg.device)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    frontend = Frontend(cfg.bundle).to(device)
    data, dev = (load_data(cfg, frontend, split) for split in ("train", "dev"))
    model = build(cfg, frontend).to(device)
    if cfg.init != Path():
        model.unit_decoder.load_state_dict(load_tokenizer(cfg.init).unit_decoder.state_dict())
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    state = {"model": model, "optimizer": opt}
    text_steps = 0 if cfg.init != Path() else cfg.text_steps
    steps = text_steps + cfg.steps
    first = first_step(cfg.out, state, cfg.resume)
    batches = Batches(data.store.lengths("units"), cfg.batch, cfg.seed)
    log = Log(cfg.out, "tokenizer", steps, first)
    for step in range(first + 1, steps + 1):
        seed_step(cfg.seed, step)
        text_only = cfg.text_only or step <= text_steps
        begin, end = (0, text_steps) if step <= text_steps else (text_steps, steps)
        for group in opt.param_groups:
            group["lr"] = cosine(step - begin, end - begin, cfg.lr, cfg.warmup, floor=0.1)
        taps = None if text_only else model.config.aggregator.value_layers
        batch = tokenizer_batch(data.items, data.store, batches(step), frontend, taps, device)
        batch = batch if cfg.guide else replace(batch, spans=None)
        if step == text_steps + 1 and not text_only:
            model.start(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            out = model(batch, text_only, hide_history(batch.units, cfg.history_dropout))
        opt.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        opt.step()
        if step % 50 == 0 or step == steps:
            parts = {k: getattr(out, k) for k in ("loss", "ce", "recon", "guide", "prosody")}
            log.row(step, **parts, accuracy=out.units.unit_accuracy, norm=norm)
        if step % cfg.save_every == 0 or step in (text_steps, steps):
            save_checkpoint(cfg.out, state, {"step": step, "config": vars(cfg)})
        if step in (text_steps, steps):
            found = accuracies(model, dev, frontend, text_only)
            log.row(step, **{f"dev_{k}": v for k, v in found.items()})
            report("text-only" if text_only else f"{cfg.aggregator} + {cfg.quantizer}", found)
    save_model(cfg.out, model, {"tokenizer": asdict(model.config)}, torch.float16)
    return model


def report(name: str, found: dict[str, float]) -> None:
    print(f"\nunit accuracy on held-out sentences, {name}:")
    print(f"  with true history {found['accuracy']:7.2%}    history hidden "
          f"{found['masked_accuracy']:7.2%}")  # fmt: skip
    print(f"  majority unit     {found['majority']:7.2%}    repeat the last "
          f"{found['repeat_last']:6.2%}\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    run(lambda: (train(parse(Config, PRESETS, __doc__)), None)[1])
