"""Train the spoken LM: a text LM, adapted by LoRA, that reads and writes words with their codes.

    python train_lm.py                              on the bundle's tokenizer
    python train_lm.py --tokenizer runs/tokenizer   on one of your own
    python train_lm.py --resume ...                 go on after an interruption

Frozen: the text LM and the tokenizer. Trained: LoRA, the bridge that lets the LM hear codes, the
heads that predict them. At the end it prints nats per code beside the uniform and unigram guess.
"""

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import synth
import text
from common import Log, cosine, flag, parse, pick_device, positive, run, seed_step
from data import (
    Batches,
    Item,
    Ragged,
    builtin,
    digest,
    pad,
    prepare,
    tokenizer_batch,
    unit_features,
)
from llm import Llama, LlamaConfig
from spoken_lm import TINY, SpokenLM
from tokenizer import Frontend, SpeechTokenizer, load_tokenizer
from weights import as_config, first_step, load_model, read_config, save_checkpoint, save_model


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("runs/lm"), "checkpoints, log.jsonl and the finished model folder")
    bundle: Path = flag(Path("weights/tiny"), "the frozen models: asr, s3, speaker, lm")
    tokenizer: Path = flag(Path("weights/tiny/tokenizer"), "folder of train_tokenizer.py")
    steps: int = flag(1500, "optimizer steps")
    utterances: int = flag(2000, "training utterances of the built-in corpus")
    batch: int = flag(32, "utterances per step; half of them are two of one voice in a row")
    lr: float = flag(2e-3, "peak learning rate")
    warmup: int = flag(100, "steps of linear warm-up")
    reference: bool = flag(True, "hold on to the untouched text LM (KL)")
    seed: int = flag(0, "weights, batches and dropout follow from (seed, step)")
    save_every: int = flag(200, "steps between two checkpoints")
    threads: int = flag(2, "CPU threads")
    bf16: bool = flag(True, "bf16 autocast; losses stay in fp32")
    device: str = flag("auto", "auto, cpu or cuda")
    resume: bool = flag(False, "go on from the newest checkpoint under --out")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


@dataclass
class Data:
    items: list[Item]
    codes: Ragged
    same_voice: dict[str, list[int]]  # voice -> items


def load_data(cfg: Config, frontend: Frontend, tokenizer: SpeechTokenizer, split: str) -> Data:
    """Items of a split and the codes that the tokenizer gives their words, kept on disk."""
    items = builtin(synth.load(n_train=cfg.utterances), split)
    store = unit_features(items, frontend, digest(items), f"units of {split}")
    layers = tokenizer.config.aggregator.value_layers
    device = next(tokenizer.parameters()).device
    at = {item.key: i for i, item in enumerate(items)}

    @torch.inference_mode()
    def compute(item: Item) -> dict[str, Tensor]:
        batch = tokenizer_batch(items, store, [at[item.key]], frontend, layers, device)
        codes = tokenizer.encode(batch.ids, batch.word_ids, batch.last, batch.taps, batch.keep)
        return {"codes": codes[0].short().cpu()}

    files = (cfg.tokenizer / "model.safetensors", cfg.bundle / "asr" / "model.safetensors")
    model = "-".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    codes = prepare(items, compute, f"codes 1 {digest(items)} {model}", f"codes of {split}")
    same_voice: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        same_voice.setdefault(item.speaker, []).append(i)
    return Data(items, codes, same_voice)


def draw(data: Data, indices: list[int], lm: text.Tokenizer, pairs: float) -> tuple[Tensor, ...]:
    """-> ids, word_ids (B, N), codes (B, W, Q); padding 0, -1, -1. `pairs`: share of items that
    another utterance of the same voice follows, so that speech goes on after a full stop."""
    ids, words, codes = [], [], []
    for i in indices:
        group, voice = [i], data.same_voice[data.items[i].speaker]
        if torch.rand(()) < pairs:
            group.append(voice[int(torch.randint(len(voice), ()))])
        row = text.align_words(" ".join(data.items[j].text for j in group), lm, lm)
        ids.append(torch.tensor(row.llm_ids))
        words.append(torch.tensor(row.llm_word_ids))
        codes.append(torch.cat([data.codes.get("codes", j).long() for j in group]))
    return pad(ids)[0], pad(words, -1)[0], pad(codes, -1)[0]


def unigram(data: Data, levels: int) -> float:
    """Nats per code of a guess that knows how often each value of each channel occurs."""
    codes = torch.cat([data.codes.get("codes", i).long() for i in range(len(data.items))])  # (n, Q)
    share = torch.stack([c.bincount(minlength=levels) for c in codes.T]) / len(codes)  # (Q, K)
    return float(-(share * share.clamp(min=1e-9).log()).sum(-1).mean())


@torch.no_grad()
def evaluate(model: SpokenLM, data: Data, lm: text.Tokenizer) -> dict[str, float]:
    """Mean losses over a split, each utterance alone."""
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(2)
    for first in range(0, len(data.items), 50):
        indices = list(range(first, min(first + 50, len(data.items))))
        out = model(*(x.to(device) for x in draw(data, indices, lm, pairs=0)))
        sums += torch.stack([out.text_ce, out.code_loss]).cpu() * len(indices)
    model.train()
    text_nll, code_nll = (sums / len(data.items)).tolist()
    return {"dev_text_nll": text_nll, "dev_code_nll": code_nll}


def build(cfg: Config, tokenizer: SpeechTokenizer) -> SpokenLM:
    """The bundle's text LM with fresh LoRA, bridges and heads for this tokenizer's codes."""
    llm = Llama(as_config(LlamaConfig, read_config(cfg.bundle / "lm")))
    load_model(llm, cfg.bundle / "lm")
    quantizer = tokenizer.quantizer
    if quantizer is None:
        raise ValueError(f"{cfg.tokenizer} has quantizer='none': there are no codes to model")
    shape: dict[str, Any] = {"n_codebooks": quantizer.n_codebooks, "n_codes": quantizer.n_codes}
    return SpokenLM(replace(TINY, llm=llm.config, **shape), quantizer, llm)


def train(cfg: Config) -> SpokenLM:
    positive(cfg, "utterances", "batch", "steps", "save_every", "threads")
    device = pick_device(cfg.device)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    frontend = Frontend(cfg.bundle).to(device)
    tokenizer = load_tokenizer(cfg.tokenizer).to(device)
    data, dev = (load_data(cfg, frontend, tokenizer, split) for split in ("train", "dev"))
    lm = text.load_tokenizer(cfg.bundle / "lm" / "tokenizer.model")
    model = build(cfg, tokenizer).to(device)
    opt = torch.optim.AdamW(model.trainable_parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    state = {"model": model, "optimizer": opt}
    first = first_step(cfg.out, state, cfg.resume)
    batches = Batches(data.codes.lengths("codes"), cfg.batch, cfg.seed)
    log = Log(cfg.out, "lm", cfg.steps, first)
    for step in range(first + 1, cfg.steps + 1):
        seed_step(cfg.seed, step)
        for group in opt.param_groups:
            group["lr"] = cosine(step, cfg.steps, cfg.lr, cfg.warmup)
        batch = draw(data, batches(step), lm, pairs=0.5)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            out = model(*(x.to(device) for x in batch), reference=cfg.reference)
        opt.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.trainable_parameters(), 1.0, error_if_nonfinite=True
        )
        opt.step()
        if step % 50 == 0 or step == cfg.steps:
            log.row(
                step, loss=out.loss, text=out.text_ce, kl=out.text_kl, code=out.code_loss, norm=norm
            )
        if step % cfg.save_every == 0 or step == cfg.steps:
            save_checkpoint(cfg.out, state, {"step": step, "config": vars(cfg)})
    found = evaluate(model, dev, lm)
    log.row(cfg.steps, **found)
    levels = model.config.n_codes
    print(f"\nnats per code: uniform {math.log(levels):.3f}, unigram {unigram(dev, levels):.3f}, "
          f"this model {found['dev_code_nll']:.3f}\n", flush=True)  # fmt: skip
    save_model(cfg.out, model, {"spoken_lm": asdict(model.config)}, torch.float16)
    return model


if __name__ == "__main__":
    run(lambda: (train(parse(Config, PRESETS, __doc__)), None)[1])
