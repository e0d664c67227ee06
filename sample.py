"""Speak: continue a recording, continue a text, begin from nothing, or say a recording again.

    python sample.py prompt.wav                           transcribe, encode, go on, speak
    python sample.py prompt.wav --text "two dogs run"     what is said, if you know better
    python sample.py --words 6 --seed 3                   no prompt: the model begins
    python sample.py prompt.wav --reconstruct             through the codes and back

The tiny bundle knows its synthetic voices and the 300-odd words of synth.py only; of other speech
it makes what it can.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import audio
from common import flag, parse, pick_device, positive, run
from continuation import Sampling
from pipeline import RATE, SAMPLING, Pipeline, Speech, check_wav

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    wav: Path | None = flag(None, "the prompt: wav, flac, ogg, mp3 of any rate; none: begin freely")
    text: str = flag("", "what is said in the prompt; empty: it is transcribed")
    words: int = flag(4, "new words at least; it goes on to the end of the sentence")
    out: Path = flag(Path("continuation.wav"), "where the sound goes")
    reconstruct: bool = flag(False, "say the prompt again from its codes, add nothing")
    temperature: float = flag(SAMPLING.temperature, "of the text; 0: the most likely word")
    top_p: float = flag(SAMPLING.top_p, "of the text: fewest tokens that reach this probability")
    code_temperature: float = flag(
        SAMPLING.code_temperature, "of the codes, that is, of the prosody"
    )
    bundle: Path = flag(ROOT / "weights" / "tiny", "asr, s3, speaker, flow, hift, lm, prompt.wav")
    tokenizer: Path = flag(Path(), "folder of train_tokenizer.py; default: BUNDLE/tokenizer")
    lm: Path = flag(Path(), "folder of train_lm.py; default: BUNDLE/spoken_lm")
    seed: int = flag(0, "same seed, same sound")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


def check(cfg: Config) -> None:
    """Refuse what cannot work before anything is loaded."""
    positive(cfg, "words", "threads")
    if not (0 <= cfg.temperature < math.inf and 0 <= cfg.code_temperature < math.inf):
        raise ValueError(
            f"--temperature {cfg.temperature} --code-temperature {cfg.code_temperature}: "
            "wanted numbers of 0 or more"
        )
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"--top-p {cfg.top_p}: wanted a number above 0, at most 1")
    if not 0 <= cfg.seed < 2**63:
        raise ValueError(f"--seed {cfg.seed}: wanted 0 or more, below 2^63")
    if cfg.wav is None and (cfg.reconstruct or cfg.text):
        raise ValueError("--reconstruct and --text need a recording: python sample.py prompt.wav")
    if cfg.out.suffix != ".wav":
        raise ValueError(f"--out {cfg.out}: wanted a name that ends in .wav")
    if not cfg.out.absolute().parent.is_dir():
        raise ValueError(f"--out {cfg.out}: the folder does not exist; make it first")


def default_voice(pipeline: Pipeline, bundle: Path) -> Tensor:
    """A voice for speech without a prompt: that of the bundle's own prompt.wav."""
    return pipeline.voice(audio.read(bundle / "prompt.wav", RATE))


def main() -> None:
    start = time.monotonic()
    cfg = parse(Config, PRESETS, __doc__)
    check(cfg)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    wav = None if cfg.wav is None else check_wav(audio.read(cfg.wav, RATE), str(cfg.wav))
    tokenizer = cfg.bundle / "tokenizer" if cfg.tokenizer == Path() else cfg.tokenizer
    lm = cfg.bundle / "spoken_lm" if cfg.lm == Path() else cfg.lm
    device = pick_device(cfg.device)
    pipeline = Pipeline(cfg.bundle, tokenizer, None if cfg.reconstruct else lm, str(device))
    loaded = time.monotonic()
    rng = torch.Generator(device).manual_seed(cfg.seed)
    speech: Speech | None = None
    if wav is not None:
        speech = pipeline.encode(wav, cfg.text or pipeline.transcribe(wav))
        print(f"prompt        {speech.text}   ({len(wav) / RATE:.2f} s)")
    if speech is None or not cfg.reconstruct:
        sampling = Sampling(cfg.temperature, cfg.top_p, 1.0, cfg.code_temperature)
        voice = default_voice(pipeline, cfg.bundle) if speech is None else speech.voice
        new, ended = pipeline.reply(speech, cfg.words, sampling, voice, rng)
        said = f"{new.glue} {new.text}".strip()
        print(f"continuation  {said}{'' if ended else ' ...'}")
        speech = new if speech is None else speech.join(new)
    spoken, stopped = pipeline.speak(speech, rng)
    audio.write(cfg.out, spoken, audio.VOCODER_RATE)
    seconds, spent = len(spoken) / audio.VOCODER_RATE, time.monotonic() - loaded
    print(f"audio         {seconds:.2f} s in {cfg.out}{'' if stopped else ', cut at its limit'}")
    print(f"time          {loaded - start:.1f} s to load, {spent:.1f} s to speak: "
          f"{spent / seconds:.2f} x real time")  # fmt: skip


if __name__ == "__main__":
    run(main)
