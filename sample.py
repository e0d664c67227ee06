"""Speak: continue a recording, continue a text, begin from nothing, or say a recording again.

    python sample.py prompt.wav                           transcribe, encode, go on, speak
    python sample.py prompt.wav --text "two dogs run"     what is said, if you know better
    python sample.py --words 6 --seed 3                   no prompt: the model begins
    python sample.py prompt.wav --reconstruct             through the codes and back
    python sample.py a.wav --swap b.wav --words 2:4       the same words, words 2 to 4 as in b.wav
    python sample.py prompt.wav --stream --out - | aplay  speak while the words come
    python sample.py prompt.wav --model Llama-1B-TASTE-V0/ --asr whisper-large-v3/

The tiny bundle knows its synthetic voices and the 332 words of grammar.py only; of other speech
it makes what it can. --model: the released system as it was published, with its own defaults.
"""

import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

import audio
from common import flag, parse, pick_device, positive, run
from continuation import Sampling
from pipeline import RATE, SAMPLING, Pipeline, Speech, check_wav
from released import SAMPLING as PUBLIC
from released import WORDS, Released, open_models
from token_swap import mixtures

ROOT, STDOUT = Path(__file__).parent, Path("-")
MODES = {
    "audio": "go on from the recording",
    "text": "go on from --text",
    "zero": "begin freely",
    "instruct": "answer the recording, between --prefix and --suffix",
}


@dataclass(frozen=True)
class Config:
    wav: Path | None = flag(None, "the prompt: wav, flac, ogg, mp3 of any rate; none: begin freely")
    text: str = flag("", "what is said in the prompt; empty: it is transcribed")
    mode: str = flag("audio", "; ".join(f"{k}: {v}" for k, v in MODES.items()), MODES)
    words: str = flag(
        "4",
        "new words at least, it goes on to the end of the sentence; with --swap: FIRST:LAST, both "
        "included, counted from 1",
    )
    out: Path = flag(
        Path("continuation.wav"), "where the sound goes; -: to the standard output, for a player"
    )
    stream: bool = flag(
        False, "speak each sentence, with --model each clause, as soon as its words are there"
    )
    swap: Path = flag(
        Path(),
        "a recording of the same words: exchange the codes of --words, and write OUT_a.wav, "
        "OUT_a_with_b.wav, OUT_b.wav and OUT_b_with_a.wav",
    )
    reconstruct: bool = flag(False, "say the prompt again from its codes, add nothing")
    temperature: float = flag(SAMPLING.temperature, "of the text; 0: the most likely word")
    top_p: float = flag(SAMPLING.top_p, "of the text: fewest tokens that reach this probability")
    code_temperature: float = flag(
        SAMPLING.code_temperature, "of the codes, that is, of the prosody; --model draws none"
    )
    repetition_penalty: float = flag(
        1.0, "of the text: above 1, words that were said are less likely"
    )
    model: Path = flag(Path(), "folder of the released system, Llama-1B-TASTE-V0")
    asr: Path = flag(Path(), "with --model: folder of whisper-large-v3")
    fixed: bool = flag(False, "with --model: without the bugs of the published inference")
    short_window: bool = flag(
        False, "with --model: hear the recording without silence up to 30 s: quicker, other codes"
    )
    through_lm: bool = flag(False, "with --model --reconstruct: the codes that the LM expects")
    new_only: bool = flag(False, "do not say the prompt again before what is new")
    prefix: str = flag(
        "", "with --mode instruct: text before the recording; <|special|> names work"
    )
    suffix: str = flag("", "with --mode instruct: text behind it")
    stop: str = flag("", "with --mode instruct: the special token that ends the answer")
    bundle: Path = flag(ROOT / "weights" / "tiny", "asr, s3, speaker, flow, hift, lm, prompt.wav")
    tokenizer: Path = flag(Path(), "folder of train_tokenizer.py; default: BUNDLE/tokenizer")
    lm: Path = flag(Path(), "folder of train_lm.py; default: BUNDLE/spoken_lm")
    seed: int = flag(0, "same seed, same sound")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")
    bf16: bool = flag(
        False, "large matrices in bf16: half the memory, quicker on a GPU and on a CPU that has it"
    )
    compile: bool = flag(
        False, "compile what is repeated: meant for a GPU; the first sentence waits minutes"
    )


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "taste": {  # the default with --model
        "words": str(WORDS),
        "temperature": PUBLIC.temperature,
        "top_p": PUBLIC.top_p,
        "repetition_penalty": PUBLIC.repetition_penalty,
    },
}


def check(cfg: Config) -> None:
    """Refuse what cannot work before anything is loaded."""
    positive(cfg, "threads")
    span(cfg)
    if not (0 <= cfg.temperature < math.inf and 0 <= cfg.code_temperature < math.inf):
        raise ValueError(
            f"--temperature {cfg.temperature} --code-temperature {cfg.code_temperature}: "
            "wanted numbers of 0 or more"
        )
    greedy = cfg.top_p == 0 and cfg.model != Path() and not cfg.fixed
    if not (0 < cfg.top_p <= 1 or greedy):
        raise ValueError(f"--top-p {cfg.top_p}: wanted a number above 0, at most 1")
    if not 0 < cfg.repetition_penalty < math.inf:
        raise ValueError(f"--repetition-penalty {cfg.repetition_penalty}: wanted a number above 0")
    if not 0 <= cfg.seed < 2**63:
        raise ValueError(f"--seed {cfg.seed}: wanted 0 or more, below 2^63")
    if cfg.wav is None and (cfg.reconstruct or (cfg.text and cfg.mode != "text")):
        raise ValueError("--reconstruct and --text need a recording: python sample.py prompt.wav")
    check_mode(cfg)
    if cfg.out == STDOUT:
        return
    if cfg.out.suffix != ".wav":
        raise ValueError(f"--out {cfg.out}: wanted a name that ends in .wav")
    if not cfg.out.absolute().parent.is_dir():
        raise ValueError(f"--out {cfg.out}: the folder does not exist; make it first")


def span(cfg: Config) -> tuple[int, int]:
    """--words: (first, last) word of a swap; else the number of new words, twice."""
    swaps = cfg.swap != Path()
    found = re.fullmatch(r"(\d+):(\d+)" if swaps and ":" in cfg.words else r"(\d+)()", cfg.words)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        wanted = "FIRST:LAST, as in 2:4" if swaps else "a number of at least 1"
        raise ValueError(f"--words {cfg.words}: wanted {wanted}")
    return first, last


def check_mode(cfg: Config) -> None:
    """Refuse flags that do not go together."""
    if cfg.swap != Path() and (cfg.wav is None or cfg.reconstruct or cfg.mode != "audio"):
        raise ValueError("--swap needs a recording, and neither --reconstruct nor --mode")
    if cfg.swap != Path() and (cfg.stream or cfg.out == STDOUT):
        raise ValueError("--swap writes four files: leave out --stream and --out -")
    given = cfg.model != Path()
    if given != (cfg.asr != Path()):
        raise ValueError("--model and --asr go together: the released system does not recognize")
    if given and cfg.wav is None:
        raise ValueError("--model needs a recording, if only for its voice")
    for name in ("fixed", "through_lm", "short_window"):
        if getattr(cfg, name) and not given:
            raise ValueError(f"--{name.replace('_', '-')} needs --model")
    if cfg.mode == "instruct" and not given:
        raise ValueError("--mode instruct needs --model")
    if cfg.through_lm and not cfg.reconstruct:
        raise ValueError("--through-lm says what --reconstruct does")
    if cfg.reconstruct and cfg.mode != "audio":
        raise ValueError(f"--reconstruct adds nothing: leave out --mode {cfg.mode}")
    if cfg.mode == "text" and not cfg.text.strip():
        raise ValueError("--mode text needs --text")
    if (cfg.mode == "instruct") != bool(cfg.prefix and cfg.suffix):
        raise ValueError("--mode instruct, --prefix and --suffix go together")
    if cfg.stop and cfg.mode != "instruct":
        raise ValueError("--stop ends the answer of --mode instruct")


def open_system(cfg: Config, device: torch.device) -> Pipeline | Released:
    """The models of the flags, loaded."""
    if cfg.model != Path():
        models = open_models(cfg.model, cfg.asr, device, cfg.bf16)
        return Released(models, not cfg.fixed, cfg.short_window)
    tokenizer = cfg.bundle / "tokenizer" if cfg.tokenizer == Path() else cfg.tokenizer
    lm = cfg.bundle / "spoken_lm" if cfg.lm == Path() else cfg.lm
    speaks_only = cfg.reconstruct or cfg.swap != Path()
    return Pipeline(cfg.bundle, tokenizer, None if speaks_only else lm, str(device), cfg.bf16)


def hear(cfg: Config, pipeline: Pipeline | Released, wav: Tensor | None) -> Speech | None:
    """The prompt: spoken, or a text without codes, or none."""
    if cfg.mode == "text":
        return Speech(pipeline.check_text(cfg.text), None, voice_of(cfg, pipeline, wav))
    if wav is None or cfg.mode == "zero":
        return None
    speech = pipeline.encode(wav, cfg.text or pipeline.transcribe(wav))
    if cfg.through_lm and isinstance(pipeline, Released):
        return pipeline.predicted(speech)
    return speech


def voice_of(cfg: Config, pipeline: Pipeline | Released, wav: Tensor | None) -> Tensor:
    """A voice for speech without a spoken prompt: without wav, that of the bundle's prompt.wav."""
    return pipeline.voice(audio.read(cfg.bundle / "prompt.wav", RATE) if wav is None else wav)


def swap(cfg: Config, pipeline: Pipeline | Released, speech: Speech) -> None:
    """The four mixtures of `speech` and --swap, drawn with the same random numbers."""
    other = check_wav(audio.read(cfg.swap, RATE), str(cfg.swap))
    theirs = pipeline.encode(other, cfg.text or pipeline.transcribe(other))
    first, last = span(cfg)
    kept, chosen, rest = (
        speech.words[: first - 1],
        speech.words[first - 1 : last],
        speech.words[last:],
    )
    mixed = mixtures(speech, theirs, first, last)
    print(f"swapped       {' '.join([*kept, '[', *chosen, ']', *rest])}")
    for name, mixture in mixed.items():
        torch.manual_seed(cfg.seed)
        rng = torch.Generator(pipeline.device).manual_seed(cfg.seed)
        wav, stopped = pipeline.speak(mixture, rng)
        out = cfg.out.with_stem(f"{cfg.out.stem}_{name}")
        audio.write(out, wav, audio.VOCODER_RATE)
        seconds = len(wav) / audio.VOCODER_RATE
        print(f"{name:13} {seconds:.2f} s in {out}{'' if stopped else ', cut at its limit'}")


def parts_of(
    cfg: Config, pipeline: Pipeline | Released, speech: Speech | None, wav: Tensor | None
) -> Iterator[Speech]:
    """What is to be said: with --stream word by word while the LM goes on, else all at once."""
    if speech is not None and cfg.reconstruct:
        yield speech
        return
    voice = voice_of(cfg, pipeline, wav) if speech is None else speech.voice
    rng = torch.Generator(pipeline.device).manual_seed(cfg.seed)
    penalty, heat = cfg.repetition_penalty, cfg.code_temperature
    sampling = Sampling(cfg.temperature, cfg.top_p, penalty, heat)
    given: tuple[Any, ...] = speech, span(cfg)[0], sampling, voice, rng
    more: dict[str, Any] = {}
    if cfg.mode == "instruct":
        more = {"around": (cfg.prefix, cfg.suffix), "stop": cfg.stop or None}
    before = None if cfg.new_only or cfg.mode != "audio" else speech  # is said again
    said, rest = list[str](), ""
    if cfg.stream:
        replies = pipeline.reply_stream(*given, **more)
    else:
        replies = iter([pipeline.reply(*given, **more)])
    for new, ended in replies:
        said, rest = [*said, new.glue, *new.words], "" if ended else " ..."
        yield new if before is None else before.join(new)
        before = None
    print(f"continuation  {' '.join(filter(None, said))}{rest}", flush=True)


def play(cfg: Config, sound: Iterator[tuple[Tensor, bool]], loaded: float) -> tuple[float, bool]:
    """Write each piece as it comes -> seconds, and whether all of them ended by themselves."""
    wav, stopped = next(sound)  # what goes wrong before leaves an older file as it was
    start, waited = time.monotonic(), 0.0
    with opened(cfg.out) as out:
        out.write(wav)
        for wav, ended in sound:
            dry = start + waited + out.samples / out.rate  # then a player has nothing left
            waited += max(0.0, time.monotonic() - dry)
            stopped &= ended
            out.write(wav)
    print(f"first audio   {start - loaded:.2f} s after loading; a player then waits "
          f"{waited:.2f} s for more")  # fmt: skip
    return out.samples / out.rate, stopped


@contextmanager
def opened(out: Path) -> Iterator[audio.WavStream]:
    """A growing wav in a file, or in the standard output."""
    if out != STDOUT:
        with open(out, "wb") as file:
            yield audio.WavStream(file, audio.VOCODER_RATE)
        return
    try:  # unbuffered: when a player is closed, nothing is left that would be flushed later
        with open(1, "wb", buffering=0, closefd=False) as pipe:
            yield audio.WavStream(cast(BinaryIO, pipe), audio.VOCODER_RATE, pipe=True)
    except BrokenPipeError as e:
        raise OSError("--out -: whoever listened has gone") from e


def speak(cfg: Config, device: torch.device, start: float) -> None:
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    wav = None if cfg.wav is None else check_wav(audio.read(cfg.wav, RATE), str(cfg.wav))
    pipeline = open_system(cfg, device)
    if cfg.compile:
        pipeline.compile_steps()
    loaded = time.monotonic()
    speech = hear(cfg, pipeline, wav)
    if speech is not None:
        lasts = f"   ({len(wav) / RATE:.2f} s)" if wav is not None else ""
        print(f"prompt        {speech.text}{lasts}", flush=True)
    if speech is not None and cfg.swap != Path():
        swap(cfg, pipeline, speech)
        return
    parts, rng = parts_of(cfg, pipeline, speech, wav), torch.Generator(device).manual_seed(cfg.seed)
    if cfg.stream:
        seconds, stopped = play(cfg, pipeline.stream(parts, rng), loaded)
    else:
        (whole,) = parts
        spoken, stopped = pipeline.speak(whole, rng)
        seconds = len(spoken) / audio.VOCODER_RATE
        if cfg.out == STDOUT:
            with opened(cfg.out) as out:
                out.write(spoken)
        else:
            audio.write(cfg.out, spoken, audio.VOCODER_RATE)
    spent = time.monotonic() - loaded
    print(f"audio         {seconds:.2f} s in {cfg.out}{'' if stopped else ', cut at its limit'}")
    print(f"time          {loaded - start:.1f} s to load, {spent:.1f} s to speak: "
          f"{spent / seconds:.2f} x real time")  # fmt: skip


def main() -> None:
    start = time.monotonic()
    public = any(word.split("=")[0] == "--model" for word in sys.argv)
    names = ("taste", "tiny") if public else ("tiny", "taste")  # the first one is the default
    cfg = parse(Config, {name: PRESETS[name] for name in names}, __doc__)
    check(cfg)
    device = pick_device(cfg.device)
    with (
        redirect_stdout(sys.stderr if cfg.out == STDOUT else sys.stdout),
        torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16),
    ):
        speak(cfg, device, start)


if __name__ == "__main__":
    run(main)
