"""Measure every part of the system on held-out sentences, with standard errors over utterances.

    python evaluate.py                     all parts; a table here and in runs/evaluate/report.md
    python evaluate.py --only copy         one part, to runs/evaluate/copy.md
    python evaluate.py --html DIR          a page to listen to, with the tables that lie in --out
    python evaluate.py --ref DIR --hyp DIR,DIR    any codec's output, by file names: see scoring.py

    asr             original recordings, voices known and unknown
    copy            mel of the original -> HiFT or Griffin-Lim -> wav
    topline         S3 units of the original -> flow -> HiFT
    reconstruction  wav + true text -> codes -> units -> flow -> HiFT, by three tokenizers
    units           share of S3 units predicted right, voices unknown; hidden: without the history
    continuation    three spoken words go on, by several systems: see continuations.py
    layers          what MLDA mixes, and where each word looks: see layer_report.py
    likelihood      natural recordings against changed ones, by the spoken LM: see likelihood.py
    swap            codes of single words exchanged between two readings: see token_swap.py

WER is counted by the bundle's own recognizer: the WER of the originals is the floor. Prosody is
that of metrics.py, after DTW; `F0-PCC frames` compares frame by frame. Same duration: words that
last as long as in truth, give or take 50 ms, by the times that the DTW carries over.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import audio
import continuations
import layer_report
import likelihood as lik
import synth
import token_swap
from common import clock, flag, parse, pick_device, positive, progress, run
from data import Item, builtin, digest, unit_features, unit_hits
from listening_page import write_page
from metrics import (
    PROSODY,
    RULES,
    TRACKERS,
    Contours,
    Scores,
    bitrate,
    carry_times,
    contours,
    dtw,
    duration_consistency,
    prosody,
    ratio_and_error,
    similarity,
)
from pipeline import RATE, Pipeline, transcribe
from scoring import Figures, Judges, as_json, markdown, paper, score_folders
from tokenizer import Frontend, load_tokenizer
from vocoder import Vocoder, griffin_lim, load_hift, load_vocoder
from weights import write_atomic

PARTS = (
    "asr",
    "copy",
    "topline",
    "reconstruction",
    "units",
    "continuation",
    "layers",
    "swap",
    "likelihood",
)
TOKENIZERS = {"TASLA": "tokenizer", "TASTE": "tokenizer_rvq", "text only": "text_only"}
BATCH = 25  # utterances that are spoken at once


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("runs/evaluate"), "folder of the reports")
    bundle: Path = flag(Path("weights/tiny"), "all models, see train_tiny.py")
    only: str = flag("all", "which part", ("all", *PARTS))
    items: int = flag(200, "utterances of each split, 200 at most")
    ref: Path = flag(Path(), "recordings to compare with --hyp, instead of all parts")
    hyp: str = flag("", "with --ref: folder of what a codec made of them; several with commas")
    tracker: str = flag("yin", "of F0: yin is pitch.py; crepe needs torchcrepe", TRACKERS)
    rules: str = flag("basic", "of Whisper for WER; english needs whisper-normalizer", RULES)
    asr: Path = flag(Path(), "with --ref: bundle or public Whisper that counts WER; default: none")
    speaker: Path = flag(Path(), "with --ref: bundle or public CAM++ for voices; default: none")
    utmos22: str = flag("", "with --ref: command that prints it for a wav, or TorchScript file")
    utmosv2: str = flag("", "the same for UTMOSv2, which is another scale")
    runs: Path = flag(Path("runs/compare"), "for layers: trainings whose accuracy is drawn")
    prompts: int = flag(100, "spoken prompts that are continued")
    unit_lm: Path = flag(Path("runs/unit_lm"), "for continuation: folder of train_unit_lm.py")
    cascade: Path = flag(Path("runs/text_only"), "the same: of train_tokenizer.py --text-only")
    embeddings: Path = flag(Path("runs/lm_rvq"), "the same: of train_lm.py --head latent on RVQ")
    html: Path = flag(Path(), "folder of a static page: players, pictures, tables of --out")
    shown: int = flag(12, "utterances on that page")
    swaps: int = flag(200, "single words that are swapped")
    pairs: int = flag(100, "pairs of each built-in task of likelihood")
    score: str = flag("mean", "of log likelihoods over tokens, or their sum", lik.SCORES)
    salmon: Path = flag(Path(), "for likelihood: folder of SALMon, with its tasks in it")
    storycloze: Path = flag(Path(), "for likelihood: folder of a spoken StoryCloze")
    seeds: int = flag(1, "how often what is drawn is drawn anew; pooled by utterance")
    threads: int = flag(2, "CPU threads")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


class System:
    """The models and recordings, each loaded when a part first asks for it."""

    def __init__(self, cfg: Config, split: str = "test") -> None:
        self.cfg, self.bundle, self.device = cfg, cfg.bundle, pick_device(cfg.device)
        self.split = split

    @cached_property
    def frontend(self) -> Frontend:
        return Frontend(self.bundle).to(self.device)

    @cached_property
    def vocoder(self) -> Vocoder:
        return load_vocoder(self.bundle).to(self.device)

    def items(self, split: str) -> list[Item]:
        corpus = synth.load(n_train=1)  # the other splits do not depend on it
        return builtin(corpus, split)[: self.cfg.items]

    @cached_property
    def test(self) -> list[Item]:
        return self.items(self.split)

    def coded(self) -> dict[str, str]:
        """The tokenizers that make codes."""
        return {k: folder for k, folder in shipped(self.bundle).items() if k != "text only"}

    @cached_property
    def originals(self) -> list[Tensor]:
        """test at 16 kHz, (S,) each"""
        return [item.wav(RATE) for item in self.test]

    @cached_property
    def contours(self) -> list[Contours]:
        return [contours(wav, self.cfg.tracker) for wav in self.originals]

    @cached_property
    def voices(self) -> list[Tensor]:
        """of the split, (X,) each"""
        return [self.frontend.features(wav)["voice"][0] for wav in self.originals]

    @cached_property
    def floor(self) -> Figures:
        return self.word_errors(self.test, self.originals)

    def word_errors(self, items: list[Item], wavs: list[Tensor]) -> Figures:
        scores = Scores()
        for i, heard in enumerate(transcribe(self.frontend, wavs)):
            scores.words("WER", i, items[i].text, heard)
        return scores.figures()

    def rngs(self) -> Iterator[torch.Generator]:
        """One generator per seed; HiFT's phases come from the global one."""
        for seed in range(self.cfg.seeds):
            torch.manual_seed(seed)
            yield torch.Generator(self.device).manual_seed(seed)

    def compare(self, scores: Scores, copies: list[Tensor], timed: bool = True) -> None:
        """copies of the split (S,), 22.05 kHz: words, prosody, voice; timed: pitch by frame."""
        wavs = [audio.resample(copy, audio.VOCODER_RATE, RATE) for copy in copies]
        for i, (wav, heard) in enumerate(zip(wavs, transcribe(self.frontend, wavs), strict=True)):
            scores.words("WER", i, self.test[i].text, heard)
            copy = contours(wav, self.cfg.tracker)
            for measure, value in prosody(self.contours[i], copy).items():
                scores.add(measure, i, value)
            if len(self.contours[i].f0) and len(copy.f0):
                true = self.test[i].truth.starts_s, self.test[i].truth.ends_s
                found = carry_times(dtw(self.contours[i].mfcc, copy.mfcc), *true)
                same, _ = duration_consistency(torch.tensor(true).T, found)
                scores.add("same duration", i, same * len(found), len(found))
            if timed:
                same_time = prosody(self.contours[i], copy, warp=False)
                scores.add("F0-PCC frames", i, same_time["F0-PCC"])
            voice = self.frontend.features(wav)["voice"][0]
            scores.add("Spk. Sim.", i, similarity(self.voices[i], voice))


def asr(system: System) -> dict[str, Figures]:
    unknown = system.items("test_voices")
    errors = system.word_errors(unknown, [item.wav(RATE) for item in unknown])
    return {"known voices": system.floor, "unknown voices": errors}


def copy(system: System) -> dict[str, Figures]:
    hift = load_hift(system.bundle)
    torch.manual_seed(0)  # of HiFT's phases
    ways = {"HiFT": lambda mel: hift(mel[None])[0], "Griffin-Lim, 32 iterations": griffin_lim}
    out = {"original": system.floor}
    for name, way in ways.items():
        scores, copies = Scores(), list[Tensor]()
        for i, item in enumerate(progress(name, system.test)):
            mel = audio.vocoder_mel(item.wav(audio.VOCODER_RATE))  # (80, F)
            with torch.inference_mode():
                copies.append(way(mel))
            scores.add("mel L1", i, float((audio.vocoder_mel(copies[-1]) - mel).abs().mean()))
        system.compare(scores, copies)
        out[name] = scores.figures()
    return out


def topline(system: System) -> dict[str, Figures]:
    """`x real time` is flow and HiFT, one utterance after the other."""
    scores = Scores()
    for rng in system.rngs():
        copies = []
        for i, wav in enumerate(progress("topline", system.originals)):
            found = system.frontend.features(wav)
            start = time.monotonic()
            copies.append(system.vocoder(found["units"], found["voice"][0], rng).cpu())
            spent = time.monotonic() - start
            scores.add("x real time", i, spent, len(copies[-1]) / audio.VOCODER_RATE)
        system.compare(scores, copies)
    return {"original": system.floor, "S3 units": scores.figures()}


def shipped(bundle: Path) -> dict[str, str]:
    """The tokenizers that this bundle has; the others are named, not silently left out."""
    for name, folder in TOKENIZERS.items():
        if not (bundle / folder).is_dir():
            print(f"{name}: no folder {bundle / folder}, left out")
    return {name: folder for name, folder in TOKENIZERS.items() if (bundle / folder).is_dir()}


def reconstruction(system: System) -> dict[str, Figures]:
    out = {"original": system.floor}
    for name, folder in shipped(system.bundle).items():
        out[name] = reconstruct(system, system.bundle / folder, name, name != "text only")
    return out


def reconstruct(system: System, tokenizer: Path, name: str, coded: bool) -> Figures:
    """The split through the codes of this tokenizer; coded False: from text and voice alone."""
    pipeline = Pipeline(system.bundle, tokenizer, device=str(system.device))
    pairs = list(zip(system.originals, system.test, strict=True))
    speeches = [pipeline.encode(w, item.text) for w, item in progress(f"{name}, codes", pairs)]
    scores, rate = Scores(), Figures()
    if coded and pipeline.tokenizer.quantizer is not None:
        codes = torch.cat([speech.codes for speech in speeches if speech.codes is not None])
        total = sum(map(len, system.originals)) / RATE
        rate = bitrate(codes, pipeline.tokenizer.quantizer.n_codes, total)
    else:
        speeches = [replace(speech, codes=None) for speech in speeches]
    for rng in system.rngs():
        copies: list[Tensor] = []
        for first in progress(f"{name}, speech in batches", range(0, len(speeches), BATCH)):
            for wav, ended in pipeline.speak_all(speeches[first : first + BATCH], rng):
                i, seconds = len(copies), len(wav) / audio.VOCODER_RATE
                scores.add("ended", i, ended)
                scores.add("duration", i, seconds / (len(system.originals[i]) / RATE))
                copies.append(wav)
        system.compare(scores, copies, timed=False)
    return scores.figures() | rate


def units(system: System) -> dict[str, Figures]:
    items, out = system.items("test_voices"), dict[str, Figures]()
    store = unit_features(items, system.frontend, digest(items), "units of test_voices")
    for name, folder in progress("units", list(shipped(system.bundle).items())):
        model = load_tokenizer(system.bundle / folder).to(system.device)
        hits = unit_hits(model, items, store, system.frontend, name == "text only")
        total = hits.pop("total").tolist()
        found = {k: ratio_and_error(h.tolist(), total) for k, h in hits.items()}
        out |= {name: {"accuracy": found[name]} for name in ("majority", "repeat_last")}
        hidden = found["masked_accuracy"]
        out[name] = {"accuracy": found["accuracy"], "hidden": hidden, "nats/unit": found["ce"]}
    return out


def continuation(system: System) -> dict[str, Figures]:
    """`x real time`: from the prompt to the finished wav, one after the other."""
    cfg, folder = system.cfg, system.cfg.out / "continuation"
    folders = cfg.unit_lm, cfg.cascade, cfg.embeddings
    found = continuations.systems(cfg.bundle, *folders, str(system.device))
    prompts = continuations.cut_prompts(system.test, cfg.prompts)
    return continuations.measure(found, prompts, system.frontend, system.rngs, cfg.tracker, folder)


def layers(system: System) -> dict[str, Figures]:
    """Pictures of the first utterances go to OUT/pictures, and of all runs, if there are any."""
    out, pictures = dict[str, Figures](), system.cfg.out / "pictures"
    for name, folder in system.coded().items():
        pipeline = Pipeline(system.bundle, system.bundle / folder, device=str(system.device))
        found = layer_report.measure(pipeline, system.originals, system.test, pictures / folder)
        out |= {f"{name}{row}": figures for row, figures in found.items()}
    layer_report.save_curves(system.cfg.runs, pictures / "accuracy.png")
    return out | layer_report.paper_figures()


def swap(system: System) -> dict[str, Figures]:
    """Changes of the swapped word against the true ones, and of the others."""
    out = dict[str, Figures]()
    tests = token_swap.trials(system.test, system.cfg.swaps)
    found = {"espeak-ng": token_swap.espeak_effect(tests)}
    for name, folder in system.coded().items():
        pipeline = Pipeline(system.bundle, system.bundle / folder, device=str(system.device))
        found[name] = token_swap.system_effect(pipeline, tests, seed=0)
    for name, rows in found.items():
        out |= {f"{name}: {row}": figures for row, figures in rows.items()}
    return out


def likelihood(system: System) -> dict[str, Figures]:
    cfg, path = system.cfg, (system.bundle / TOKENIZERS["TASLA"], system.bundle / "spoken_lm")
    pipeline = Pipeline(system.bundle, *path, device=str(system.device))
    return lik.measure(pipeline, system.test, cfg.pairs, cfg.score, cfg.salmon, cfg.storycloze)


def show(measure: str, value: float, error: float) -> str:
    """0.0312, 0.004 -> '3.1 ± 0.4 %'"""
    is_share = re.search("WER|accuracy|hidden|ended|grammatical|right sign|same", measure)
    if math.isnan(value):
        return "undefined"
    scale, digits, end = (100, 1, " %") if is_share else (1, 2, "")
    spread = "" if math.isnan(error) else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{spread}{end}"


def table(part: str, rows: dict[str, Figures]) -> str:
    """One Markdown table: a row per system, a column per measure; single channels are left out."""
    names = dict.fromkeys(m for row in rows.values() for m in row if "channel" not in m)
    lines = [f"| {part} | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for system, row in rows.items():
        cells = (show(m, *row[m]) if m in row else "" for m in names)
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def compare_folders(cfg: Config) -> None:
    """--ref --hyp: see scoring.py"""
    if cfg.ref == Path() or not cfg.hyp:
        raise ValueError("--ref and --hyp go together: recordings, and what a codec made of them")
    judges = Judges(cfg.tracker, cfg.rules, cfg.asr, cfg.speaker, cfg.utmos22, cfg.utmosv2)
    print(score_folders(cfg.ref, [Path(name) for name in cfg.hyp.split(",")], judges, cfg.out))
    print(f"written to {cfg.out / 'scores'}.json, .csv and .md")


def page(system: System) -> None:
    """--html: see listening_page.py"""
    pipelines = {
        name: Pipeline(system.bundle, system.bundle / folder, device=str(system.device))
        for name, folder in shipped(system.bundle).items()
    }
    if not pipelines:
        raise ValueError(f"{system.bundle}: no tokenizer to listen to; see train_tokenizer.py")
    path = write_page(system.cfg.html, pipelines, system.test, system.cfg.shown, system.cfg.out)
    print(f"written to {path}")


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    positive(cfg, "shown", "items", "prompts", "swaps", "pairs", "seeds", "threads")
    torch.set_num_threads(cfg.threads)
    if cfg.ref != Path() or cfg.hyp:
        compare_folders(cfg)
        return
    system, report = System(cfg), dict[str, dict[str, Figures]]()
    if cfg.html != Path():
        page(system)
        return
    cfg.out.mkdir(parents=True, exist_ok=True)
    functions = (asr, copy, topline, reconstruction, units, continuation, layers, swap, likelihood)
    measure = {f.__name__: f for f in functions}
    for name in PARTS if cfg.only == "all" else (cfg.only,):
        start = time.monotonic()
        report[name] = measure[name](system)
        spent = clock(time.monotonic() - start)
        print(f"\n{table(name, report[name])}\n{name} took {spent}\n", flush=True)
    name = "report" if cfg.only == "all" else cfg.only
    write_atomic(cfg.out / f"{name}.json", as_json({"config": vars(cfg), "parts": report}))
    tables = "\n".join(table(part, rows) for part, rows in report.items())
    if {"topline", "reconstruction"} & report.keys():
        tables += "\n" + markdown("the papers' values", paper(), [*PROSODY, "WER", "Spk. Sim."])
        tables += (
            f"\nF0 here: {cfg.tracker}; the paper: CREPE. Their WER is a share, not per cent.\n"
        )
    write_atomic(cfg.out / f"{name}.md", tables.encode())
    print(f"written to {cfg.out / name}.json and .md")


if __name__ == "__main__":
    run(main)
