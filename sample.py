"""Speak: continue a recording, continue a text, begin from nothing, or say a recording again.

    python sample.py prompt.wav                           transcribe, encode, go on, speak
    python sample.py prompt.wav --text "two dogs run"     what is said, if you know better
    python sample.py --words 6 --seed 3                   no prompt: the model begins
    python sample.py prompt.wav --reconstruct             through the codes and back

The tiny bundle knows its synthetic voices and the 300-odd words of synth.py only; of other speech
it makes what it can.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import audio
from common import flag, parse, pick_device, run
from pipeline import RATE, Pipeline, Speech, check_wav
from spoken_lm import Sampling

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    wav: Path = flag(Path(), "the prompt: wav, flac, ogg or mp3 of any rate; none: begin freely")
    text: str = flag("", "what is said in the prompt; empty: it is transcribed")
    words: int = flag(4, "new words at least; it goes on to the end of the sentence")
    out: Path = flag(Path("continuation.wav"), "where the sound goes")
    reconstruct: bool = flag(False, "say the prompt again from its codes, add nothing")
    temperature: float = flag(0.8, "of the text; 0: the most likely word")
    top_p: float = flag(0.95, "of the text: the fewest tokens that reach this probability")
    code_temperature: float = flag(0.5, "of the codes, that is, of the prosody")
    bundle: Path = flag(ROOT / "weights" / "tiny", "folder with asr, s3, speaker, flow, hift, lm")
    tokenizer: Path = flag(Path(), "folder of train_tokenizer.py; default: BUNDLE/tokenizer")
    lm: Path = flag(Path(), "folder of train_lm.py; default: BUNDLE/spoken_lm")
    seed: int = flag(0, "same seed, same sound")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


def check(cfg: Config) -> None:
    """Refuse what cannot work before anything is loaded."""
    if cfg.words < 1 or cfg.temperature < 0 or not 0 < cfg.top_p <= 1 or cfg.code_temperature < 0:
        raise ValueError(
            f"--words {cfg.words} --temperature {cfg.temperature} --top-p {cfg.top_p} "
            f"--code-temperature {cfg.code_temperature}: wanted words >= 1, temperatures >= 0 and "
            "top-p above 0 and at most 1"
        )
    if cfg.wav == Path() and (cfg.reconstruct or cfg.text):
        raise ValueError("--reconstruct and --text need a recording: python sample.py prompt.wav")
    if cfg.out.suffix != ".wav":
        raise ValueError(f"--out {cfg.out}: wanted a name that ends in .wav")
    if not cfg.out.absolute().parent.is_dir():
        raise ValueError(f"--out {cfg.out}: the folder does not exist; make it first")


def default_voice(pipeline: Pipeline, seed: int) -> Tensor:
    """A voice for speech without a prompt: the bundle's own prompt."""
    return pipeline.voice(audio.read(ROOT / "weights" / "tiny" / "prompt.wav", RATE))


def main() -> None:
    start = time.monotonic()
    cfg = parse(Config, PRESETS, __doc__)
    check(cfg)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    wav = None if cfg.wav == Path() else check_wav(audio.read(cfg.wav, RATE), str(cfg.wav))
    tokenizer = cfg.bundle / "tokenizer" if cfg.tokenizer == Path() else cfg.tokenizer
    lm = cfg.bundle / "spoken_lm" if cfg.lm == Path() else cfg.lm
    device = str(pick_device(cfg.device))
    pipeline = Pipeline(cfg.bundle, tokenizer, None if cfg.reconstruct else lm, device)
    loaded = time.monotonic()
    rng = torch.Generator().manual_seed(cfg.seed)
    speech, ended = None, True
    if wav is not None:
        said = cfg.text or pipeline.transcribe(wav)
        speech = pipeline.encode(wav, said)
        print(f"prompt        {speech.text}   ({len(wav) / RATE:.2f} s)")
    if not cfg.reconstruct:
        sampling = Sampling(cfg.temperature, cfg.top_p, 1.0, cfg.code_temperature)
        voice = default_voice(pipeline, cfg.seed) if speech is None else speech.voice
        new, ended = pipeline.reply(speech, cfg.words, sampling, voice, rng)
        print(f"continuation  {new.text}{'' if ended else ' ...'}")
        speech = join(speech, new)
    spoken, stopped = pipeline.speak(speech, rng)
    audio.write(cfg.out, spoken, audio.VOCODER_RATE)
    seconds, spent = len(spoken) / audio.VOCODER_RATE, time.monotonic() - loaded
    print(f"audio         {seconds:.2f} s in {cfg.out}{'' if stopped else ', cut at its limit'}")
    print(f"time          {loaded - start:.1f} s to load, {spent:.1f} s to speak: "
          f"{spent / seconds:.2f} x real time")  # fmt: skip


def join(first: Speech | None, second: Speech) -> Speech:
    """Two parts of one utterance, in the voice of the second."""
    if first is None or first.codes is None or second.codes is None:
        return second
    return replace(
        second, words=first.words + second.words, codes=torch.cat([first.codes, second.codes])
    )


if __name__ == "__main__":
    run(main)
