"""A bundle of untrained models in the exact folder format of weights/tiny, for tests of scripts."""

import math
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import audio
import data
import grammar
import synth
import text
from aggregator import TINY as AGGREGATOR
from data import BOS, EOS
from flow import TINY as FLOW
from flow import Flow
from fsq import FSQ
from fsq import TINY as TINY_FSQ
from hift import TINY as HIFT
from hift import HiFT
from llm import TINY as LM
from llm import Llama
from rvq import RVQ
from rvq import TINY as TINY_RVQ
from s3_units import TINY as S3
from s3_units import S3Units
from speaker import TINY as SPEAKER
from speaker import CAMPlus
from spoken_lm import TINY as SPOKEN_LM
from spoken_lm import SpokenLM
from tokenizer import SpeechTokenizer, TokenizerConfig
from unit_decoder import TINY as UNIT_DECODER
from weights import save_model
from whisper_dec import TINY as DECODER
from whisper_dec import WhisperDecoder
from whisper_enc import TINY as ENCODER
from whisper_enc import WhisperEncoder

ROOT = Path(__file__).parent.parent
HEARD = "the dog sees a bird."  # what the untrained recognizer hears in everything


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part of weights/tiny, untrained; the vocoder and the unit decoders are also smaller."""
    folder = tmp_path_factory.mktemp("bundle")
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    lines = grammar.texts(3000, 0)
    for name, pieces in (("asr", 512), ("lm", 320)):
        (folder / name).mkdir()
        tokens = text.train_sentencepiece(lines, pieces, byte_fallback=False)
        (folder / name / "tokenizer.model").write_bytes(tokens)
    save_asr(folder / "asr")
    for name, module, config in (
        ("s3", S3Units(S3), S3),
        ("speaker", CAMPlus(SPEAKER), SPEAKER),
        ("hift", HiFT(small := replace(HIFT, channels=16, f0_channels=16)).fold(), small),
        ("flow", Flow(quick := replace(FLOW, units=S3.codes, blocks=1, steps=2)), quick),
        ("lm", llm := Llama(LM), LM),
    ):
        save_model(folder / name, module, config, torch.float16)
    for name, kind in (("tokenizer_rvq", "rvq"), ("text_only", "fsq"), ("tokenizer", "fsq")):
        quantizer = save_tokenizer(folder / name, kind)
    spoken_lm = SpokenLM(replace(SPOKEN_LM, llm=LM), quantizer, llm)
    save_model(folder / "spoken_lm", spoken_lm, {"spoken_lm": asdict(spoken_lm.config)})
    audio.write(folder / "prompt.wav", speech(2.0), audio.WHISPER_RATE)
    torch.random.set_rng_state(state)
    return folder


def save_asr(folder: Path) -> None:
    """Its positions are so large that the decoder says HEARD, one token each, whatever comes in."""
    decoder = WhisperDecoder(DECODER)
    tokens = text.load_tokenizer(folder / "tokenizer.model")
    said = [*text.align_words(HEARD, tokens, tokens).asr_ids, EOS]
    decoder.positions.data[: len(said)] = 30 * nn.functional.normalize(decoder.tokens.weight[said])
    pair = nn.ModuleDict({"encoder": WhisperEncoder(ENCODER), "decoder": decoder})
    sizes = {"encoder": asdict(ENCODER), "decoder": asdict(DECODER)}
    save_model(folder, pair, sizes | {"prefix_ids": [BOS], "eos": EOS}, torch.float16)


def save_tokenizer(folder: Path, quantizer: str) -> FSQ | RVQ:
    """Small, and it comes to an end: EOS is likely at every step."""
    unit_decoder = replace(UNIT_DECODER, text_blocks=1, lm_blocks=1, ffn=128)
    config = TokenizerConfig(
        replace(AGGREGATOR, prefix_ids=(BOS,)), unit_decoder, quantizer, TINY_FSQ,
        replace(TINY_RVQ, codebook_size=512),
    )  # fmt: skip
    model = SpeechTokenizer(config)
    model.unit_decoder.head.bias.data[-1] = 1.5
    save_model(folder, model, {"tokenizer": asdict(config)}, torch.float16)
    assert model.quantizer is not None
    return model.quantizer


def speech(seconds: float, rate: int = audio.WHISPER_RATE) -> torch.Tensor:
    """A buzz that glides between 100 and 160 Hz and swells four times a second: (S,)."""
    t = torch.arange(round(seconds * rate)) / rate
    phase = 2 * math.pi * (130 * t + 15 * torch.sin(2 * t))
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 8))
    return 0.2 * buzz * (0.6 + 0.4 * torch.sin(8 * math.pi * t))


SIZES: dict[str, Any] = {"n_dev": 6, "n_test": 6, "n_test_voices": 6}  # of the small corpus
WRAPPER = """
import functools, importlib.util, os, runpy, signal, sys
from pathlib import Path
import common, data, synth
data.CACHE, script, when, sys.argv = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[2:]
del sys.argv[1]
synth.CACHE = data.CACHE / "synth"
synth.load = functools.partial(synth.load, **{SIZES})
seed_step, replace, find_spec = common.seed_step, os.replace, importlib.util.find_spec
def die(now):
    if now:
        os.kill(os.getpid(), signal.SIGKILL)
def killed_in_step(seed, step, *world):
    die(when in (f"step {step}", f"step {step} of process {os.environ.get('RANK')}"))
    seed_step(seed, step, *world)
def killed_in_save(old, new):
    die(when == f"save {Path(new).name}")
    replace(old, new)
common.seed_step, os.replace = killed_in_step, killed_in_save
if when == "no espeak":
    importlib.util.find_spec = lambda name: None if "espeak" in name else find_spec(name)
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small_corpus(corpus_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In this process: a corpus of a few utterances; what is prepared of it goes to a folder."""
    monkeypatch.setattr(data, "CACHE", corpus_cache)
    monkeypatch.setattr(synth, "CACHE", corpus_cache / "synth")
    monkeypatch.setattr(synth, "load", partial(synth.load, **SIZES))
    return corpus_cache


def script(
    cache: Path, name: str, *argv: object, when: str = "", processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """A script in processes of its own with the small corpus. when: "step 5", "step 5 of process 1"
    or "save step_000004" is the place at which SIGKILL ends it; or "no espeak"."""
    code = WRAPPER.replace("{SIZES}", repr(SIZES))
    command = [sys.executable, "-c", code, str(cache), name, when, *map(str, argv)]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *torchrun, "--no-python", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
