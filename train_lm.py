"""Train the spoken LM: a text LM, adapted by LoRA, that reads and writes words with their codes.

    python train_lm.py                              on the bundle's tokenizer
    python train_lm.py --tokenizer runs/tokenizer   on one of your own
    python train_lm.py --resume ...                 go on after an interruption

    torchrun --nproc-per-node 8 train_lm.py --preset taste --data CODES --dev ..   at scale

Frozen: the text LM and the tokenizer. Trained: LoRA, the bridge that lets the LM hear codes, the
heads that predict them. At the end it prints nats per code beside the uniform and unigram guess.
CODES are features of prepare.py --corpus features.
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
import text
from common import Log, finish, flag, one_by_one, parse, positive, run, seed_step, setup
from data import (
    Batches,
    Item,
    Lengths,
    Ragged,
    builtin,
    digest,
    pad,
    prepare,
    tokenizer_batch,
    unit_features,
)
from llm import Llama, LlamaConfig, load_llama
from rvq import RVQ
from shards import Shards, hash_of
from spoken_lm import TINY, SpokenLM, SpokenLMConfig, SpokenLMOutput
from tokenizer import Frontend, SpeechTokenizer, load_tokenizer
from weights import as_config, load_model, read_config, save_model


@dataclass(frozen=True)
class Config(loop.Recipe):
    out: Path = flag(Path("runs/lm"), "checkpoints, log.jsonl and the finished model folder")
    tokenizer: Path = flag(Path("weights/tiny/tokenizer"), "folder of train_tokenizer.py")
    head: str = flag("token", "what predicts codes", choices=("token", "latent", "token_mse"))
    lora_rank: int = flag(TINY.lora_rank, "of LoRA, on all linear layers of the text LM")
    lora_alpha: float = flag(TINY.lora_alpha, "LoRA is scaled by alpha / rank")
    lora_dropout: float = flag(0.0, "before LoRA; the shipped bundle was trained without")
    reference: bool = flag(True, "hold on to the untouched text LM: 0.9 KL + 0.1 CE")
    pairs: float = flag(0.5, "share of items that one of the same voice and manner follows")
    shard: bool = flag(False, "FSDP: the text LM's layers lie split over the processes")
    steps: int = flag(1500, "optimizer steps")
    batch: int = flag(32, "utterances in a micro-batch")
    lr: float = flag(2e-3, "peak learning rate")
    floor: float = flag(0.03, "where the cosine ends, as a share of the peak")


# [TASTE 3.2; TASTE-SpokenLM 301bce2, scripts/run.py, stage 2] 512 utterances, 10 epochs
TASTE: dict[str, Any] = dict(
    head="latent", lora_rank=64, lora_alpha=128.0, lora_dropout=0.05, pairs=0.0, epochs=True,
    steps=10, batch=16, micro=32, optimizer="adamw", lr=5e-5, schedule="cosine", warmup=100,
    floor=0.0, beta2=0.999, weight_decay=0.0, clip=1.0, seed=8747, save_every=300, eval_every=300,
    ahead=4, mfu=True,
)  # fmt: skip
# FSQ codes have no latent sum; the TASLA paper says no more of its LM
TASLA: dict[str, Any] = TASTE | dict(head="token")
SMALL: dict[str, Any] = TASLA | dict(batch=32, micro=16)  # for SmolLM2-135M on one GPU
PRESETS: dict[str, dict[str, Any]] = {"tiny": {}, "small": SMALL, "taste": TASTE, "tasla": TASLA}
CANDIDATES = 32  # of which the most alike follows


Row = tuple[Tensor, ...]  # ids, word_ids (B, N), codes (B, W, Q); padding 0, -1, -1


@dataclass
class Data:
    """Utterances of the built-in corpus."""

    items: list[Item]
    codes: Ragged
    same_voice: dict[str, Tensor]  # voice -> items (n,)
    manner: Tensor  # (n, 3) mean prosody of each item
    lm: text.Tokenizer

    def lengths(self) -> Lengths:
        return self.codes.lengths("codes")

    def batch(self, indices: Sequence[int], pairs: float = 0.0) -> Row:
        return draw(self, indices, self.lm, pairs)


@dataclass
class Prepared:
    """Codes of prepare.py --corpus features."""

    codes: Shards

    def lengths(self) -> Lengths:
        return self.codes.lengths("llm_ids")

    def batch(self, indices: Sequence[int], pairs: float = 0.0) -> Row:
        rows = [("llm_ids", 0), ("llm_word_ids", -1), ("codes", -1)]
        return tuple(
            pad([self.codes.get(name, i).long() for i in indices], value)[0] for name, value in rows
        )


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

    model = hash_of([cfg.tokenizer / "model.safetensors", cfg.bundle / "asr" / "model.safetensors"])
    codes = prepare(items, compute, f"codes 1 {digest(items)} {model}", f"codes of {split}")
    speakers = [item.speaker for item in items]
    manner = torch.stack([item.truth.prosody.mean(0) for item in items])  # (n, 3)
    same_voice = {
        voice: torch.tensor([i for i, other in enumerate(speakers) if other == voice])
        for voice in set(speakers)
    }
    return Data(items, codes, same_voice, manner, text.load_tokenizer(cfg.bundle / "lm"))


def next_said(data: Data, i: int) -> int:
    """An item that could follow item i: of some of the same voice, the one most like it in rate,
    pitch and volume. Chance alone would teach that a speaker's manner ends with the sentence."""
    voice = data.same_voice[data.items[i].speaker]
    some = voice[torch.randint(len(voice), (CANDIDATES,))]
    off = (data.manner[some] - data.manner[i]).square().sum(1)
    return int(some[off.masked_fill(some == i, torch.inf).argmin()])


def draw(data: Data, indices: Sequence[int], lm: text.Tokenizer, pairs: float) -> Row:
    """-> ids, word_ids (B, N), codes (B, W, Q); padding 0, -1, -1. `pairs`: share of items that
    another utterance follows, so that speech goes on after a full stop."""
    ids, words, codes = [], [], []
    for i in indices:
        group = [i]
        if torch.rand(()) < pairs:
            group.append(next_said(data, i))
        row = text.align_words(" ".join(data.items[j].text for j in group), lm, lm)
        ids.append(torch.tensor(row.llm_ids))
        words.append(torch.tensor(row.llm_word_ids))
        codes.append(torch.cat([data.codes.get("codes", j).long() for j in group]))
    return pad(ids)[0], pad(words, -1)[0], pad(codes, -1)[0]


def unigram(codes: Ragged | Shards, levels: int) -> float:
    """Nats per code of a guess that knows how often each value of each channel occurs."""
    found = torch.cat([codes.get("codes", i).long() for i in range(len(codes))])  # (n, Q)
    share = torch.stack([c.bincount(minlength=levels) for c in found.T]) / len(found)  # (Q, K)
    return float(-(share * share.clamp(min=1e-9).log()).sum(-1).mean())


@torch.no_grad()
def evaluate(
    model: SpokenLM, data: Data | Prepared, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """Mean losses over a split, each utterance alone; the processes share it out, and make as many
    calls, because --shard wants it: what is left over reads item 0 and does not count."""
    model.eval()
    device = next(model.parameters()).device
    size = 50 if isinstance(data, Data) else 8
    sums = {name: torch.zeros((), device=device) for name in ("text", "code", "n")}
    mine = range(rank, len(data.codes), world)
    for first in range(0, math.ceil(len(data.codes) / world), size):
        indices = mine[first : first + size]
        out = model(*(x.to(device) for x in data.batch(indices or [0])))
        sums["text"] += out.text_ce * len(indices)
        sums["code"] += out.code_loss * len(indices)
        sums["n"] += len(indices)
    model.train()
    found = loop.total(sums, world)
    return {f"dev_{name}_nll": found[name] / found["n"] for name in ("text", "code")}


def load_lm(folder: Path) -> tuple[Llama, int]:
    """The text LM of a bundle, of train_tiny.py or public, and its first token (sos)."""
    values = read_config(folder)
    if "model_type" in values:
        return load_llama(folder), int(values["bos_token_id"])
    return load_model(Llama(as_config(LlamaConfig, values)), folder), TINY.sos


def build(cfg: Config, tokenizer: SpeechTokenizer) -> SpokenLM:
    """The bundle's text LM with fresh LoRA, bridges and heads for this tokenizer's codes."""
    quantizer = tokenizer.quantizer
    if quantizer is None:
        raise ValueError(f"{cfg.tokenizer} has quantizer='none': there are no codes to model")
    llm, sos = load_lm(cfg.bundle / "lm")
    config = SpokenLMConfig(
        llm.config, sos, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, head=cfg.head,
        audio_dim=quantizer.config.dim, n_codebooks=quantizer.n_codebooks,
        n_codes=quantizer.n_codes,
    )  # fmt: skip
    if isinstance(quantizer, RVQ) and cfg.head == "latent":
        config = replace(config, latent_dim=quantizer.config.codebook_dim)
    return SpokenLM(config, quantizer, llm)


class Trained:
    """What of the model a checkpoint holds: not the text LM, which stays as it is."""

    def __init__(self, model: SpokenLM) -> None:
        self.state_dict, self.load_state_dict = model.state_to_save, model.load_saved


def train(cfg: Config) -> SpokenLM:
    rank, world, device = setup(cfg.device)
    loop.check(cfg, world)
    positive(cfg, "steps", "lora_rank")
    if cfg.data != Path() and (cfg.pairs or cfg.frames):
        raise ValueError("--pairs and --frames are not for prepared codes")
    if cfg.shard and world == 1:
        raise ValueError("--shard splits over processes: torchrun --nproc-per-node 2 or more")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    with one_by_one(rank):
        tokenizer = load_tokenizer(cfg.tokenizer).to(device)
        data, dev = prepare_data(cfg, tokenizer, device)
    model = build(cfg, tokenizer).train()  # a loaded LM is in eval mode
    if cfg.shard:
        loop.shard(model, world, device)
    model.to(device)
    opt = loop.optimizer(cfg, model.trainable_parameters(), device)
    saved = loop.Run(cfg, {"trained": Trained(model), "optimizer": opt}, rank)
    batches = Batches(data.lengths(), cfg.batch, cfg.seed)
    last = math.ceil(cfg.steps * batches.per_epoch / cfg.micro) if cfg.epochs else cfg.steps
    loop.speed_up(cfg, model)
    net = loop.parallel(model, world, device)
    mine = range(rank, cfg.micro, world)  # the micro-batches of this process

    def load(at: int) -> Row:
        return data.batch(batches(at), cfg.pairs)

    def forward(net: nn.Module, batch: Row) -> SpokenLMOutput:
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            return net(*(x.to(device) for x in batch), reference=cfg.reference)

    micro = (i * cfg.micro + k + 1 for i in range(saved.first, last) for k in mine)
    stream = loop.read_ahead(load, micro, cfg.ahead, cfg.threads)
    meter = loop.Meter(world, device, "tokens_s")
    if cfg.mfu:
        batch = load(1)
        meter.measure(model, (batch[1] >= 0).sum(), partial(forward, model, batch))
    log = Log(cfg.out, "lm", last, saved.first, quiet=rank > 0, board=True)
    for step in range(saved.first + 1, last + 1):
        rate = loop.set_rate(cfg, opt, step, last)
        opt.zero_grad()
        for part in mine:
            seed_step(cfg.seed, step, part, cfg.micro)
            batch = next(stream)
            with loop.share(net, part == mine[-1]):
                out = forward(net, batch)
                (out.loss / len(mine)).backward()
            parts = {"loss": out.loss, "text": out.text_ce, "kl": out.text_kl}
            meter.add((batch[1] >= 0).sum().to(device), **parts, code=out.code_loss)
        norm = torch.nn.utils.clip_grad_norm_(
            model.trainable_parameters(), cfg.clip, error_if_nonfinite=True
        )
        opt.step()
        if step % cfg.log_every == 0 or step == last:
            log.row(step, **meter.row(), norm=norm, lr=rate)
        with meter.stopped():
            if step == last or (cfg.eval_every and step % cfg.eval_every == 0):
                found = evaluate(model, dev, rank, world)
                log.row(step, **found)
                if saved.improved(-sum(found.values())) and rank == 0:
                    save(cfg.out / "best", whole(cfg, model), step)
                if step == last and rank == 0:
                    report(found["dev_code_nll"], dev, model.config.n_codes)
            if step == last or step % cfg.save_every == 0:
                saved.save(step)
    if rank == 0:
        save(cfg.out, whole(cfg, model), last)
        loop.curve(cfg.out)
    finish()
    return model


def prepare_data(
    cfg: Config, tokenizer: SpeechTokenizer, device: torch.device
) -> tuple[Data | Prepared, Data | Prepared]:
    """Training and evaluation."""
    if cfg.data == Path():
        frontend = Frontend(cfg.bundle).to(device)
        train, dev = (load_data(cfg, frontend, tokenizer, split) for split in ("train", "dev"))
        return train, dev
    stores = [Shards(folder, cfg.bundle, cfg.tokenizer) for folder in (cfg.data, cfg.dev)]
    for store in stores:
        if missing := {"codes", "llm_ids", "llm_word_ids"} - {*store.names}:
            raise ValueError(f"{store.folder}: lacks {sorted(missing)}; --corpus features has them")
    return Prepared(stores[0]), Prepared(stores[1])


def whole(cfg: Config, model: SpokenLM) -> SpokenLM:
    """The model, all of it in this process."""
    if not cfg.shard:
        return model
    found = build(cfg, load_tokenizer(cfg.tokenizer))
    found.load_saved(model.state_to_save())
    return found


def save(folder: Path, model: SpokenLM, step: int) -> None:
    """A model folder, with the text LM."""
    save_model(folder, model, {"spoken_lm": asdict(model.config)}, torch.float16, step=step)


def report(code_nll: float, dev: Data | Prepared, levels: int) -> None:
    print(f"\nnats per code: uniform {math.log(levels):.3f}, unigram "
          f"{unigram(dev.codes, levels):.3f}, this model {code_nll:.3f}\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    run(lambda: (train(parse(Config, PRESETS, __doc__)), None)[1])
