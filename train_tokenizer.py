"""Train a speech tokenizer: text-only first, then with codes, on frozen recognition and S3 units.

    python train_tokenizer.py --quantizer fsq                       TASLA in small: MLDA + FSQ
    python train_tokenizer.py --quantizer rvq --aggregator xattn    TASTE: one value layer + RVQ
    python train_tokenizer.py --text-only                           the baseline of both papers
    python train_tokenizer.py --resume ...                          go on after an interruption
    torchrun --nproc-per-node 8 train_tokenizer.py --preset tasla --data FEATURES --dev ..

At the end it prints how many S3 units the model predicts, beside the baselines: with the true
history (teacher forcing) and with the history hidden, where only text and codes can tell.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import loop
import synth
from aggregator import AggregatorConfig
from common import Log, finish, flag, one_by_one, parse, positive, run, seed_step, setup
from data import (
    UNIT_S,
    Batches,
    FrameBatches,
    Item,
    Lengths,
    Ragged,
    all_hits,
    builtin,
    digest,
    tokenizer_batch,
    unit_features,
)
from fsq import TINY as FSQ
from fsq import FSQConfig
from rvq import TINY as RVQ
from rvq import RVQConfig
from shards import Shards, check_layers, open_frontend, read_layers, shard_batch
from tokenizer import (
    Frontend,
    SpeechTokenizer,
    TokenizerBatch,
    TokenizerConfig,
    TokenizerOutput,
    load_tokenizer,
    unit_pitch,
)
from unit_decoder import TINY as UNIT_DECODER
from unit_decoder import UnitDecoderConfig
from weights import save_model


@dataclass(frozen=True)
class Config(loop.Recipe):
    out: Path = flag(Path("runs/tokenizer"), "checkpoints, log.jsonl and the finished model folder")
    size: str = flag("tiny", "of what is trained", choices=("tiny", "small", "full"))
    quantizer: str = flag("fsq", "what makes the codes", choices=("fsq", "rvq", "none"))
    quantizer_weight: float = flag(0.1, "lambda; the TASLA paper does not give it, TASTE's is 1")
    fsq_channels: int = flag(FSQ.d, "FSQ integers per word; 64 in the TASLA paper")
    tau: float = flag(1.0, "temperature with which FSQ starts; the TASLA paper does not give it")
    aggregator: str = flag(
        "mlda", "values: all layers mixed per frame, or one layer", choices=("mlda", "xattn")
    )
    layers: str = flag("", "value layers, as 8,16,24,32; none: all of the tiny encoder, or its 1st")
    text_only: bool = flag(False, "stay with the text-only baseline to the end")
    text_steps: int = flag(600, "steps of text-only training before the codes come in")
    continuous_steps: int = flag(0, "steps without quantizer after that")
    steps: int = flag(900, "steps with codes (or of more text-only training)")
    init: Path = flag(Path(), "start from this text-only model instead of training one")
    codes: Path = flag(Path(), "go on from this tokenizer, keep its codes: its unit decoder learns")
    lr: float = flag(3e-3, "peak learning rate, in each phase anew")
    floor: float = flag(0.1, "where the cosine ends, as a share of the peak")
    history_dropout: float = flag(0.5, "share of utterances whose unit history is partly hidden")
    guide: bool = flag(True, "attend to the spoken word; needs word times")
    prosody: bool = flag(True, "teach rate, pitch, volume of words; only the built-in corpus knows")


# [TASTE-SpokenLM 301bce2, scripts/run.py] 2, 10 and 10 epochs; 256 utterances; dropout .1
TASTE: dict[str, Any] = dict(
    size="full", quantizer="rvq", quantizer_weight=1.0, aggregator="xattn", layers="6",
    epochs=True, text_steps=2, continuous_steps=10, steps=10, batch=8, micro=32,
    optimizer="adamw", lr=2e-4, schedule="cosine", warmup=100, floor=0.0, beta2=0.999,
    weight_decay=0.0, clip=1.0, seed=8747, save_every=300, eval_every=300,
    history_dropout=0.0, guide=False, prosody=False, ahead=4, mfu=True,
)  # fmt: skip
# [TASLA, appendix B; text-only start: 7 epochs, STAGE1_TRAIN conf/text-only_baseline.yaml];
# micro: two for each of four GPUs
TASLA: dict[str, Any] = TASTE | dict(
    quantizer="fsq", quantizer_weight=0.25, aggregator="mlda", layers="8,16,24,32",
    fsq_channels=64, text_steps=7, continuous_steps=0, steps=5, frames=2000, micro=8,
    optimizer="adam", lr=1.6e-4, schedule="root", warmup=5000, clip=5.0, seed=1986,
    save_every=2000, eval_every=2000,
)  # fmt: skip
# ours: TASLA on whisper-small, for one GPU
SMALL: dict[str, Any] = TASLA | dict(size="small", layers="3,6,9,12", frames=6000, micro=2)
PRESETS: dict[str, dict[str, Any]] = {"tiny": {}, "small": SMALL, "taste": TASTE, "tasla": TASLA}
SIZES = {  # --size -> hidden width of MLDA, unit decoder, RVQ
    "tiny": (64, replace(UNIT_DECODER, dropout=0.0),
             replace(RVQ, codebook_size=512, dead_code_threshold=0.02)),
    "small": (256, UnitDecoderConfig(branch_width=512, width=512, text_blocks=2, audio_blocks=1),
              RVQConfig(codebook_dim=128)),
    "full": (512, UnitDecoderConfig(), RVQConfig()),
}  # fmt: skip
DECODER_LAYERS = 2  # of the aggregator: distil-large-v3's
SPAN = 16  # units, one or two words: the longest stretch of history that is hidden in one piece
LOGGED = ("loss", "ce", "recon", "guide", "prosody", "pitch")
TASTE_LAYER = 1  # the value layer of --aggregator xattn: shallow, as TASTE's 6 of 32


def value_layers(cfg: Config, encoder_layers: int) -> tuple[int, ...]:
    if cfg.codes != Path():
        return load_tokenizer(cfg.codes).config.aggregator.value_layers
    if cfg.layers:
        return read_layers(cfg.layers, encoder_layers)
    return tuple(range(1, encoder_layers + 1)) if cfg.aggregator == "mlda" else (TASTE_LAYER,)


def build(cfg: Config, frontend: Frontend) -> SpeechTokenizer:
    """The model, its aggregator's decoder started from the recognizer's, as TASTE does: of more
    than two layers from the first and the last, as distil-whisper did."""
    theirs, units = frontend.decoder.cfg, frontend.s3.cfg.codes
    hidden, unit_decoder, rvq = SIZES[cfg.size]
    aggregator = AggregatorConfig(
        theirs.vocab, theirs.width, theirs.heads, DECODER_LAYERS, theirs.ffn, theirs.max_tokens,
        frontend.prefix, value_layers(cfg, frontend.encoder.cfg.layers), cfg.aggregator == "mlda",
        hidden,
    )  # fmt: skip
    voice = frontend.speaker.out.weight.shape[0]
    config = TokenizerConfig(
        aggregator,
        replace(unit_decoder, vocab=theirs.vocab, units=units, audio_dim=theirs.width,
                speaker_dim=voice),
        cfg.quantizer,
        FSQConfig(theirs.width, cfg.fsq_channels, tau_init=cfg.tau),
        replace(rvq, dim=theirs.width),
        cfg.quantizer_weight,
    )  # fmt: skip
    model = SpeechTokenizer(config)
    ours, given = model.aggregator.decoder.state_dict(), frontend.decoder.state_dict()
    last = f"blocks.{theirs.layers - 1}."
    start = {k: given[k.replace(f"blocks.{DECODER_LAYERS - 1}.", last)] for k in ours}
    model.aggregator.decoder.load_state_dict(
        {k: ours[k] if ".cross.value." in k else start[k] for k in ours}
    )
    return model


@dataclass
class Data:
    """Utterances of the built-in corpus: the encoder listens in each step, word times are known."""

    items: list[Item]
    store: Ragged
    frontend: Frontend
    guide: bool
    unit_pitch: Tensor | None  # None: prosody is not taught

    def lengths(self) -> Lengths:
        return self.store.lengths("units")

    def batch(self, indices: Sequence[int], layers: tuple[int, ...] | None) -> TokenizerBatch:
        device = next(self.frontend.parameters()).device
        batch = tokenizer_batch(self.items, self.store, indices, self.frontend, layers, device)
        taught = batch.prosody if self.unit_pitch is not None else None
        spans = batch.spans if self.guide else None
        return replace(batch, spans=spans, prosody=taught, unit_pitch=self.unit_pitch)


@dataclass
class Prepared:
    """Features of prepare.py."""

    store: Shards
    frontend: Frontend
    device: torch.device
    multiple: int

    def lengths(self) -> Lengths:
        return self.store.frames()

    def batch(self, indices: Sequence[int], layers: tuple[int, ...] | None) -> TokenizerBatch:
        args = layers, self.frontend, self.device, self.multiple
        return shard_batch(self.store, indices, *args)


def load_data(cfg: Config, frontend: Frontend, split: str) -> Data:
    corpus = synth.load(n_train=cfg.utterances)
    items = builtin(corpus, split)
    store = unit_features(items, frontend, digest(items), f"units of {split}")
    pitch = None
    if cfg.prosody:
        units = (store.get("units", i) for i in range(len(items)))
        truths = [item.truth for item in items]
        pitch = unit_pitch(truths, units, frontend.s3.cfg.codes, UNIT_S)
        pitch = pitch.to(frontend.speaker.out.weight.device)
    return Data(items, store, frontend, cfg.guide, pitch)


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


class Stage(NamedTuple):
    """A part of the training with a schedule of its own: steps begin + 1 .. end."""

    name: str
    begin: int
    end: int
    text_only: bool
    quantize: bool


def accuracies(
    model: SpeechTokenizer, data: Data | Prepared, stage: Stage, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """Unit accuracy on a split, and two baselines, see data.all_hits; the processes share it."""
    units = [data.store.get("units", i) for i in range(len(data.store))]
    mine, size = range(rank, len(units), world), 50 if isinstance(data, Data) else 8
    found = all_hits(model, mine, data.batch, units, stage.text_only, size, not stage.quantize)
    sums = loop.total({name: hits.sum() for name, hits in found.items()}, world)
    total = sums.pop("total")
    return {name: hits / total for name, hits in sums.items()}


def stages(cfg: Config, per_epoch: int) -> list[Stage]:
    """Text-only, then without quantizer, then with it [TASTE 3.1.3; scripts/run.py]."""
    kept = cfg.codes != Path()
    rows = [
        ("text-only", 0 if kept or cfg.init != Path() else cfg.text_steps, True, True),
        (f"{cfg.aggregator} without quantizer", cfg.continuous_steps, False, False),
        ("unit decoder" if kept else f"{cfg.aggregator} + {cfg.quantizer}", cfg.steps, False, True),
    ]
    found, begin = list[Stage](), 0
    for name, n, text_only, quantize in rows:
        end = begin + (math.ceil(n * per_epoch / cfg.micro) if cfg.epochs else n)
        text_only = text_only or cfg.text_only
        found.append(Stage("text-only" if text_only else name, begin, end, text_only, quantize))
        begin = end
    return [stage for stage in found if stage.end > stage.begin]


def choose_trained(model: SpeechTokenizer, stage: Stage, keep_codes: bool) -> None:
    """Only what a stage trains has gradients: DDP waits for those of all the others."""
    model.requires_grad_(True)
    model.keep_codes = keep_codes
    decoder, unused = model.train().unit_decoder, list[nn.Module]()
    if keep_codes:
        unused.append(model.aggregator)
    if stage.text_only:
        unused += [model.aggregator, decoder.audio_in, decoder.audio, decoder.audio_out]
        decoder.mix.requires_grad_(False)
    if model.quantizer is not None and (keep_codes or stage.text_only or not stage.quantize):
        unused.append(model.quantizer)
    for module in unused:
        module.requires_grad_(False)


def prepare(cfg: Config, device: torch.device) -> tuple[Frontend, Data | Prepared, Data | Prepared]:
    """The frozen models, and the data of training and evaluation."""
    if cfg.data == Path():
        frontend = open_frontend(cfg.bundle).to(device)
        return frontend, load_data(cfg, frontend, "train"), load_data(cfg, frontend, "dev")
    stores = [Shards(folder, cfg.bundle) for folder in (cfg.data, cfg.dev)]
    hears = any("mel" in store.names for store in stores)
    frontend, multiple = open_frontend(cfg.bundle, hears), 64 if cfg.compile else 1
    for store in stores:
        check_layers(store, value_layers(cfg, frontend.encoder.cfg.layers))
    if hears:  # else only its sizes and its decoder's weights are needed
        frontend = frontend.to(device)
    train, dev = (Prepared(store, frontend, device, multiple) for store in stores)
    return frontend, train, dev


def train(cfg: Config) -> SpeechTokenizer:
    rank, world, device = setup(cfg.device)
    loop.check(cfg, world)
    positive(cfg, "fsq_channels")
    if cfg.codes != Path() and (cfg.init != Path() or cfg.text_only or cfg.continuous_steps):
        raise ValueError(f"--codes {cfg.codes}: without --init, --text-only, --continuous-steps")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    with one_by_one(rank):
        frontend, data, dev = prepare(cfg, device)
    kept = cfg.codes != Path()
    model = (load_tokenizer(cfg.codes) if kept else build(cfg, frontend)).to(device)
    if cfg.init != Path():
        model.unit_decoder.load_state_dict(load_tokenizer(cfg.init).unit_decoder.state_dict())
    opt = loop.optimizer(cfg, model.parameters(), device)
    saved = loop.Run(cfg, {"model": model, "optimizer": opt}, rank)
    cut = (
        partial(FrameBatches, frames=cfg.frames) if cfg.frames else partial(Batches, size=cfg.batch)
    )
    batches = cut(data.lengths(), seed=cfg.seed)
    plan = stages(cfg, batches.per_epoch)
    last = plan[-1].end if plan else 0
    loop.speed_up(cfg, model)
    layers = model.config.aggregator.value_layers
    mine = range(rank, cfg.micro, world)  # the micro-batches of this process

    def load(at: tuple[Stage, int]) -> TokenizerBatch:
        return data.batch(batches(at[1]), None if at[0].text_only else layers)

    def forward(net: nn.Module, batch: TokenizerBatch, stage: Stage) -> TokenizerOutput:
        hidden = hide_history(batch.units, cfg.history_dropout)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            return net(batch, stage.text_only, hidden, not stage.quantize)

    order = [(stage, range(max(saved.first, stage.begin) + 1, stage.end + 1)) for stage in plan]
    order = [(stage, steps_left) for stage, steps_left in order if steps_left]
    micro = ((s, (i - 1) * cfg.micro + k + 1) for s, steps in order for i in steps for k in mine)
    stream = loop.read_ahead(load, micro, cfg.ahead, cfg.threads)
    meter = loop.Meter(world, device)
    log = Log(cfg.out, "tokenizer", last, saved.first, quiet=rank > 0, board=True)
    for stage, steps in order:
        choose_trained(model, stage, kept)
        net = loop.parallel(model, world, device)
        if saved.first <= stage.begin:
            saved.best = None  # models of different stages do not compete
            if stage.quantize and not stage.text_only and not kept:
                model.start(load((stage, stage.begin * cfg.micro + 1)))
        if cfg.mfu:
            batch = load((stage, 1))
            sample = partial(forward, model, batch, stage)
            meter.measure(model, (batch.units >= 0).sum(), sample)
        for step in steps:
            rate = loop.set_rate(cfg, opt, step - stage.begin, stage.end - stage.begin)
            opt.zero_grad()
            for part in mine:
                seed_step(cfg.seed, step, part, cfg.micro)
                batch = next(stream)
                with loop.share(net, part == mine[-1]):
                    out = forward(net, batch, stage)
                    (out.loss / len(mine)).backward()
                parts = {name: getattr(out, name) for name in LOGGED}
                parts["accuracy"] = out.units.unit_accuracy
                meter.add((batch.units >= 0).sum(), **parts)
            norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), cfg.clip, error_if_nonfinite=True
            )
            opt.step()
            if step % cfg.log_every == 0 or step == last:
                log.row(step, **meter.row(), norm=norm, lr=rate)
            with meter.stopped():
                ends = step == stage.end
                if ends or (cfg.eval_every and step % cfg.eval_every == 0):
                    found = accuracies(model, dev, stage, rank, world)
                    log.row(step, **{f"dev_{k}": v for k, v in found.items()})
                    if saved.improved(found["accuracy"]) and rank == 0:
                        save(cfg.out / "best", model, step)
                    if ends and rank == 0:
                        report(stage.name, found)
                if ends or step % cfg.save_every == 0:
                    saved.save(step)
    if rank == 0:
        save(cfg.out, model, last)
        loop.curve(cfg.out)
    finish()
    return model


def save(folder: Path, model: SpeechTokenizer, step: int) -> None:
    """A model folder, which load_tokenizer opens."""
    save_model(folder, model, {"tokenizer": asdict(model.config)}, torch.float16, step=step)


def report(name: str, found: dict[str, float]) -> None:
    print(f"\nunit accuracy on held-out sentences, {name}:")
    print(f"  with true history {found['accuracy']:7.2%}    history hidden "
          f"{found['masked_accuracy']:7.2%}")  # fmt: skip
    print(f"  majority unit     {found['majority']:7.2%}    repeat the last "
          f"{found['repeat_last']:6.2%}\n", flush=True)  # fmt: skip


if __name__ == "__main__":
    run(lambda: (train(parse(Config, PRESETS, __doc__)), None)[1])
