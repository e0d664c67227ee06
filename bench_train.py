"""What a training step costs: operations, time, MFU and memory, eager against compiled.

    python bench.py --stage train --count                   operations per hour of speech; no GPU
    python bench.py --stage train --steps 200               time, on whatever device there is

Synthetic features in the shapes of --frames, buckets and all; random weights at full size. The
operations are counted, not estimated: of three short utterances, to which a parabola is fitted,
for all that is done grows with the length or with its square.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import cpu_linear
import loop
from aggregator import TASLA, AggregatorConfig
from common import flag, seed_step
from data import FrameBatches, pad
from fsq import FSQConfig
from rvq import RVQConfig
from tokenizer import SpeechTokenizer, TokenizerBatch, TokenizerConfig
from unit_decoder import UnitDecoderConfig
from whisper_enc import EncoderConfig, WhisperEncoder

CORPORA = (960, 40_000)  # hours of speech
UTTERANCE_S = 12.3  # mean of LibriSpeech's 960 h
TOKENS_S = 2.62  # text tokens a second of speech [TASLA, sec. 3.3]
RATE = 50  # encoder frames and units a second
WINDOW = 3000  # mel frames of which the encoder always hears 1500 frames


@dataclass(frozen=True)
class Steps:
    """The flags of `--stage train`."""

    model: str = flag("tasla", "what --stage train trains", choices=("tasla", "taste"))
    frames: int = flag(2000, "mel frames in its micro-batch")
    steps: int = flag(200, "micro-batches that it times")
    count: bool = flag(False, "only count its operations")
    tflops: float = flag(100.0, "rate that turns them into hours: 10^12 a second, sustained")
    recompute: bool = flag(False, "keep no activations inside its blocks")


def build(cfg: Steps) -> SpeechTokenizer:
    aggregator = TASLA if cfg.model == "tasla" else AggregatorConfig()
    quantizer = "fsq" if cfg.model == "tasla" else "rvq"
    config = TokenizerConfig(aggregator, UnitDecoderConfig(), quantizer, FSQConfig(), RVQConfig())
    return SpeechTokenizer(config)


def batch(model: SpeechTokenizer, seconds: list[float], device: torch.device) -> TokenizerBatch:
    """Random utterances of these lengths."""
    units, tokens = ([max(2, round(s * rate)) for s in seconds] for rate in (RATE, TOKENS_S))
    cfg, multiple = model.config, 64

    def states() -> Tensor:
        return pad([torch.randn(n, cfg.aggregator.width) for n in units], 0, multiple)[0].to(device)

    last = states()
    keep = torch.arange(last.shape[1], device=device) < torch.tensor(units, device=device)[:, None]
    ids = pad([torch.randint(cfg.aggregator.vocab, (n,)) for n in tokens], 0, multiple)[0]
    words = pad([torch.arange(n) for n in tokens], -1, multiple)[0]
    said = pad([torch.randint(cfg.unit_decoder.units, (n,)) for n in units], -1, multiple)[0]
    voice = torch.randn(len(units), cfg.unit_decoder.speaker_dim, device=device)
    taps = {k: states() for k in cfg.aggregator.value_layers}
    return TokenizerBatch(
        ids.to(device), words.to(device), last, taps, keep, voice, said.to(device)
    )


def per_hour(operations: Callable[[float], int], seconds: float = UTTERANCE_S) -> float:
    """Operations an hour, in utterances of `seconds`; operations: of one of so many."""
    at = torch.tensor([1.28, 2.56, 3.84], dtype=torch.float64)  # multiples of 64 frames
    counted = torch.tensor([float(operations(float(x))) for x in at], dtype=torch.float64)
    a, b, c = torch.linalg.solve(torch.stack([at**2, at, at**0], 1), counted).tolist()
    return (a * seconds**2 + b * seconds + c) * 3600 / seconds


def count(cfg: Steps) -> None:
    if not 0 < cfg.tflops < math.inf:
        raise ValueError(f"--tflops {cfg.tflops}: wanted a number above 0")
    torch.manual_seed(0)
    model, cpu = build(cfg), torch.device("cpu")

    def operations(seconds: float) -> int:
        return loop.flops(model, partial(model, batch(model, [seconds], cpu)))

    trained = sum(p.numel() for p in model.parameters())
    step = per_hour(operations)
    with torch.device("meta"):
        encoder, mel = WhisperEncoder(EncoderConfig()), torch.empty(1, 128, WINDOW)
        with cpu_linear.counter() as counter:
            encoder(mel)
    heard = counter.get_total_flops() * 3600 / UTTERANCE_S
    print(f"{cfg.model}: {trained / 1e6:.1f} M parameters")
    print(f"training      {step / 1e15:8.2f} PFLOP per hour of speech and epoch")
    print(f"the encoder   {heard / 1e15:8.2f} PFLOP per hour of speech, once")
    for hours in CORPORA:
        epoch, once = (x * hours / (3600e12 * cfg.tflops) for x in (step, heard))
        print(f"{hours} h at {cfg.tflops:g} TFLOP/s: {epoch:.2g} h an epoch, {once:.2g} h once")


def timed(cfg: Steps, compile: bool, device: torch.device) -> dict[str, float]:
    """Seconds per micro-batch (optimizer included) and what follows from it."""
    torch.manual_seed(0)
    model = build(cfg).to(device)
    recipe = loop.Recipe(compile=compile, recompute=cfg.recompute)
    opt = loop.optimizer(recipe, model.parameters(), device)
    seconds = (2 + 14 * torch.rand(2000)).tolist()
    batches = FrameBatches([round(100 * s) for s in seconds], cfg.frames, seed=0)
    made = [batch(model, [seconds[i] for i in batches(k + 1)], device) for k in range(8)]
    operations = sum(loop.flops(model, partial(model, x)) for x in made) / len(made)
    loop.speed_up(recipe, model)

    def step(i: int, net: nn.Module) -> None:
        seed_step(0, i)
        opt.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            net(made[i % len(made)]).loss.backward()
        opt.step()

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    for i in range(2 * len(made)):  # all shapes, twice: compiled code is ready
        step(i, model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = wait()
    for i in range(cfg.steps):
        step(i, model)
    spent = (wait() - start) / cfg.steps
    return {
        "ms": 1000 * spent,
        "tflop_s": operations / spent / 1e12,
        "mfu": operations / spent / loop.ceiling(device),
        "memory_gb": loop.peak_memory(device) / 1e9,
        "graphs": loop.graphs() if compile else 0,
    }
