"""Score what any codec made of a folder of recordings: files of equal names, one table.

    ref/**/NAME.wav, hyp/**/NAME.wav --16 kHz--> measures of metrics.py --> OUT/HYP.jsonl
    all lines --mean, standard error--> OUT/scores.md, .csv, .json, beside the paper's values

A pair that stands in the .jsonl with the same bytes and settings is not measured again. What is
said comes from *.trans.txt of LibriSpeech or from NAME.txt beside the recording; if a text is
missing, WER is counted against what is heard in the recording, and the table says so.
[TASLA, Hsu et al. 2025, arXiv:2510.14934, appendix A: "unified path-based pipeline"; tables 1 to 3]
"""

import csv
import hashlib
import io
import json
import math
import shlex
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import audio
import text
import whisper_dec
from common import progress
from data import AUDIO_SUFFIXES, json_row, librispeech
from metrics import (
    PROSODY,
    RULES,
    TRACKERS,
    Figures,
    contours,
    edit_distance,
    mean_and_error,
    prosody,
    ratio_and_error,
    similarity,
)
from pipeline import cut, transcribe
from public import open_public
from released import PREFIX, window_s
from tokenizer import Frontend, UnitFrontend
from weights import read_json, write_atomic

RATE = audio.WHISPER_RATE
BETTER = PROSODY | {"WER": "down", "Spk. Sim.": "up", "UTMOS22": "up", "UTMOSv2": "up"}

# measures of table 1 in the order of PROSODY; S3 topline, text-only, TASTE, TASLA
_TABLE1 = {
    "LibriSpeech": """6.94 0.91 0.92 0.95 5.41 0.15 0.03  10.08 0.33 0.89 0.81 7.06 0.25 0.32
                      8.63 0.80 0.91 0.88 5.79 0.19 0.08  6.97 0.87 0.90 0.92 6.67 0.17 0.05""",
    "VoxCeleb": """5.31 0.86 0.94 0.94 4.46 0.17 0.03  8.73 0.19 0.90 0.57 6.48 0.33 0.35
                   7.68 0.64 0.93 0.74 5.16 0.26 0.13  6.53 0.71 0.93 0.81 4.92 0.22 0.09""",
    "Expresso": """8.57 0.91 0.82 0.93 7.19 0.13 0.04  8.95 0.21 0.68 0.80 11.77 0.27 0.45
                   8.90 0.73 0.76 0.86 8.73 0.20 0.19  7.87 0.84 0.82 0.91 7.43 0.15 0.10""",
}
# table 2, LibriSpeech: WER, UTMOSv2, speaker similarity
_TABLE2 = {
    "ground truth": (0.05, 3.41, math.nan), "EnCodec, 1500 bit/s": (0.07, 1.40, 0.63),
    "SpeechTokenizer, 1000 bit/s": (0.11, 1.72, 0.34), "BigCodec, 1040 bit/s": (0.05, 3.29, 1.00),
    "DualCodec, 1225 bit/s": (0.04, 3.16, 0.88), "Mimi, 1100 bit/s": (0.04, 3.01, 0.93),
    "S3 topline": (0.04, 3.40, 0.87), "text-only": (0.23, 3.42, 0.77),
    "TASTE": (0.10, 3.51, 0.85), "TASLA": (0.12, 3.43, 0.87),
}  # fmt: skip
_SHALLOW = {  # table 3, LibriSpeech; its UTMOS of text-only and TASTE are those of table 2, swapped
    "Ene. RMSE": 7.65, "F0-PCC": 0.86, "Phr. Cos.": 0.91, "Ene. PCC": 0.92, "UTMOSv2": 3.44,
    "WER": 0.10,
}  # fmt: skip


def paper() -> dict[str, Figures]:
    """The paper's tables 1, 2 (LibriSpeech) and 3: row -> figures, without errors."""
    rows: dict[str, Figures] = {}
    for corpus, numbers in _TABLE1.items():
        values = iter(map(float, numbers.split()))
        for name in ("S3 topline", "text-only", "TASTE", "TASLA"):
            row = {measure: (next(values), math.nan) for measure in PROSODY}
            rows[f"{corpus}: {name}"] = row
    for name, triple in _TABLE2.items():
        quality = zip(("WER", "UTMOSv2", "Spk. Sim."), triple, strict=True)
        known = {k: (v, math.nan) for k, v in quality if not math.isnan(v)}
        rows.setdefault(f"LibriSpeech: {name}", {}).update(known)
    rows["LibriSpeech: TASLA, shallow layers"] = {k: (v, math.nan) for k, v in _SHALLOW.items()}
    return rows


@dataclass(frozen=True)
class Judges:
    """Who measures. Empty paths and commands: that column is left out."""

    tracker: str = "yin"  # of TRACKERS
    rules: str = "basic"  # of RULES, for WER
    asr: Path = Path()  # a bundle of ours, or a folder of a public Whisper
    speaker: Path = Path()  # a bundle of ours, or a public CAM++
    utmos22: str = ""  # a command, or a TorchScript file: score = model(wav (1, S), 16000)
    utmosv2: str = ""

    def describe(self) -> list[str]:
        """One line for every way in which this differs from the paper's measuring."""
        crepe = self.tracker.startswith("crepe")
        lines = [
            f"F0 and voicing: {self.tracker}" + ("" if crepe else " (pitch.py); the paper: CREPE"),
            "MFCCs: 13, of Whisper's log-mel; eps 1e-5; GPE above 20 %; Legendre degree 3",
        ]
        if self.asr != Path():
            lines.append(f"WER: by {self.asr}, {self.rules} rules; the paper: whisper-large-v3")
        if self.speaker != Path():
            lines.append(f"Spk. Sim.: CAM++ of {self.speaker}; the paper: CosyVoice's")
        lines += [f"UTMOS22: {self.utmos22}, not the paper's measure"] if self.utmos22 else []
        return lines + ([f"UTMOSv2: {self.utmosv2}"] if self.utmosv2 else [])


class Ears:
    """The models of the judges, each loaded when it is first needed."""

    def __init__(self, judges: Judges) -> None:
        self.judges = judges
        if judges.tracker not in TRACKERS or judges.rules not in RULES:
            raise ValueError(f"tracker {judges.tracker!r}, rules {judges.rules!r}: wanted one of "
                             f"{[*TRACKERS]} and of {[*RULES]}")  # fmt: skip
        self.rules = RULES[judges.rules]()

    @cached_property
    def recognize(self) -> Callable[[Tensor], str]:
        folder = self.judges.asr
        if (folder / "asr").is_dir():
            frontend = Frontend(folder)
            return lambda wav: transcribe(frontend, [wav])[0]
        return whisper(folder)

    @cached_property
    def voice(self) -> Callable[[Tensor], Tensor]:
        """wav (S,) -> (X,)"""
        path = self.judges.speaker
        if (path / "speaker").is_dir():
            frontend = UnitFrontend(path)
            return lambda wav: frontend.features(wav)["voice"][0]
        parts = open_public(path, torch.float32)
        if "speaker" not in parts:
            raise ValueError(f"{path}: holds {sorted(parts)}, wanted a CAM++ speaker model")
        model = parts["speaker"].eval()

        @torch.inference_mode()
        def voice(wav: Tensor) -> Tensor:
            bank = audio.kaldi_fbank(wav)
            return model((bank - bank.mean(0))[None])[0]

        return voice

    def mos(self, how: str, path: Path) -> float:
        """The last number that the command prints when it is given the file; or of TorchScript."""
        if Path(how).suffix in (".pt", ".pth", ".jit"):
            model = torch.jit.load(how, map_location="cpu").eval()
            with torch.inference_mode():
                return float(model(audio.read(path, RATE)[None], RATE))
        done = subprocess.run([*shlex.split(how), str(path)], capture_output=True, text=True)
        try:
            return float(done.stdout.split()[-1])
        except (IndexError, ValueError) as e:
            said = f"{done.stdout[-80:]!r} {done.stderr[-80:]!r}"
            raise ValueError(f"{how} {path}: printed {said}, wanted a number at the end") from e

    def score(self, ref: Path, hyp: Path, said: str) -> dict[str, Any]:
        """One pair -> measures; WER as edits and words; None: undefined. said: "" if unknown."""
        a, b = audio.read(ref, RATE), audio.read(hyp, RATE)
        found: dict[str, Any] = dict(
            prosody(contours(a, self.judges.tracker), contours(b, self.judges.tracker)),
            duration=len(b) / len(a),
        )
        if self.judges.asr != Path():
            wanted = self.rules(said or self.recognize(a)).split()
            heard = self.rules(self.recognize(b)).split()
            found["WER"] = (edit_distance(wanted, heard), len(wanted))
        if self.judges.speaker != Path():
            found["Spk. Sim."] = similarity(self.voice(a), self.voice(b))
        for name, how in (("UTMOS22", self.judges.utmos22), ("UTMOSv2", self.judges.utmosv2)):
            if how:
                found[name] = self.mos(how, hyp)
        undefined = {k for k, v in found.items() if isinstance(v, float) and math.isnan(v)}
        return found | dict.fromkeys(undefined)


def whisper(folder: Path) -> Callable[[Tensor], str]:
    """A public Whisper: wav (S,) at 16 kHz, any length -> text."""
    parts, tokens = open_public(folder, torch.float32), text.load_tokenizer(folder)
    if gap := {"encoder", "decoder"} - parts.keys():
        raise ValueError(f"{folder}: lacks {sorted(gap)}; python public.py --check {folder}")
    encoder: Any = parts["encoder"].eval()
    decoder: Any = parts["decoder"].eval()
    rules = folder / "generation_config.json"
    never = read_json(rules) if rules.is_file() else {}
    prefix = [tokens.special[f"<|{name}|>"] for name in PREFIX]
    window, special = window_s(encoder), {*tokens.special.values()}

    @torch.inference_mode()
    def recognize(wav: Tensor) -> str:
        lines = []
        for piece in cut(wav, window):
            keys, _ = encoder(audio.whisper_mel(piece, encoder.cfg.n_mels, window)[None])
            (ids,) = whisper_dec.transcribe(
                decoder, keys, prefix=prefix, eos=tokens.special["<|endoftext|>"],
                max_new=decoder.cfg.max_tokens - len(prefix),
                suppress=never.get("suppress_tokens") or (),
                suppress_first=never.get("begin_suppress_tokens") or (),
            )  # fmt: skip
            lines.append(tokens.decode(i for i in ids if i not in special).strip())
        return " ".join(filter(None, lines))

    return recognize


# --- folders -------------------------------------------------------------------------------------


def recordings(folder: Path) -> dict[str, Path]:
    """Audio files below a folder by their path in it without suffix; ValueError: one name twice."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder).with_suffix(""))
        if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith("."):
            continue
        if name in found:
            raise ValueError(f"{folder}: both {found[name].name} and {path.name}; keep one")
        found[name] = path
    return found


def transcripts(folder: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """What is said in each recording, where it is written: see the top of this file."""
    known: dict[str, str] = {}
    if next(folder.rglob("*.trans.txt"), None):
        known = {item.key: item.text for item in librispeech(folder)}
    beside = {n: p.with_suffix(".txt") for n, p in files.items() if p.with_suffix(".txt").is_file()}
    texts = {name: known[path.stem] for name, path in files.items() if path.stem in known}
    return texts | {name: path.read_text().strip() for name, path in beside.items()}


def score_folder(ref: Path, hyp: Path, judges: Judges, out: Path) -> tuple[list[Any], list[str]]:
    """-> measures of every pair, notes. Each pair is written to out/HYP.jsonl once it is measured.

    ValueError: no pairs; a file that is no audio, after the others were kept."""
    ours, theirs = recordings(ref), recordings(hyp)
    names = [name for name in ours if name in theirs]
    if not names:
        raise ValueError(
            f"{hyp}: none of its {len(theirs)} recordings is named as one of the {len(ours)} in "
            f"{ref}; what counts is the path below the folder, without suffix"
        )
    notes, texts = [], transcripts(ref, ours)
    if len(names) < len(ours):
        missing = [name for name in ours if name not in theirs]
        notes.append(f"{hyp}: lacks {len(missing)} of {len(ours)}, such as {missing[0]}")
    whole = all(texts.get(name) for name in names)
    if judges.asr != Path() and not whole:
        notes.append(f"{ref}: without transcripts; WER is against what is heard in the recordings")
    log, ears = out / f"{hyp.resolve().name}.jsonl", Ears(judges)
    done, rows = finished(log), []
    with open(log, "a") as file:
        for name in progress(f"scoring {hyp.name}", names):
            said = texts[name] if whole else ""
            key = fingerprint(ours[name], theirs[name], judges, said)
            if key not in done:
                done[key] = ears.score(ours[name], theirs[name], said)
                file.write(json.dumps({"name": name, "key": key, "found": done[key]}) + "\n")
                file.flush()
            rows.append(done[key])
    return rows, notes


def finished(log: Path) -> dict[str, Any]:
    """What an earlier run measured, by fingerprint; a last line that was cut off is cut away."""
    if not log.exists():
        return {}
    lines = log.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        write_atomic(log, "".join(lines).encode())
    rows = [json_row(line, f"{log}: line {i}") for i, line in enumerate(lines, 1)]
    return {row["key"]: row["found"] for row in rows}


def fingerprint(ref: Path, hyp: Path, judges: Judges, said: str) -> str:
    digest = hashlib.sha256(json.dumps([asdict(judges), said], default=str).encode())
    for path in (ref, hyp):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


# --- tables --------------------------------------------------------------------------------------


def figures(rows: list[dict[str, Any]]) -> tuple[Figures, dict[str, int]]:
    """Measures of many pairs -> means with standard errors over pairs, and how many are defined."""
    values, counts = Figures(), dict[str, int]()
    for name in dict.fromkeys(name for row in rows for name in row):
        column = [row[name] for row in rows]
        if name == "WER":
            values[name] = ratio_and_error(*zip(*column, strict=True))
            counts[name] = sum(words > 0 for _, words in column)
        else:
            values[name] = mean_and_error([math.nan if v is None else v for v in column])
            counts[name] = sum(v is not None for v in column)
    return values, counts


def cell(value: float, error: float = math.nan) -> str:
    """0.912, 0.004 -> '0.912 ± 0.004'; NaN -> 'undefined'"""
    if math.isnan(value):
        return "undefined"
    return f"{value:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def markdown(title: str, rows: Mapping[str, Figures], names: Iterable[str]) -> str:
    """A row per system, a column per measure with the direction that is better."""
    arrows, names = {"up": " ↑", "down": " ↓"}, [*names]
    heads = [name + arrows.get(BETTER.get(name, ""), "") for name in names]
    lines = [f"| {title} | " + " | ".join(heads) + " |", "| --- " * (len(names) + 1) + "|"]
    for system, row in rows.items():
        cells = (cell(*row[name]) if name in row else "" for name in names)
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def score_folders(ref: Path, hyps: list[Path], judges: Judges, out: Path) -> str:
    """-> the Markdown of one table, a row for each folder; also written, see write_scores."""
    systems, notes = dict[str, Any](), list[str]()
    if len({hyp.resolve().name for hyp in hyps}) < len(hyps):
        raise ValueError(f"{', '.join(map(str, hyps))}: folders of equal names; rename one")
    out.mkdir(parents=True, exist_ok=True)
    for hyp in hyps:
        systems[hyp.resolve().name], more = score_folder(ref, hyp, judges, out)
        notes += [note for note in more if note not in notes]
    return write_scores(out, systems, judges, notes)


def write_scores(
    out: Path, systems: Mapping[str, list[dict[str, Any]]], judges: Judges, notes: list[str]
) -> str:
    """out/scores.md, .csv and .json -> the Markdown."""
    found = {name: figures(rows) for name, rows in systems.items()}
    names = [*dict.fromkeys(m for values, _ in found.values() for m in values)]
    here = {name: values for name, (values, _) in found.items()}
    theirs = {k: v for k, v in paper().items() if v.keys() & {*names}}
    told = [*notes, *judges.describe()]
    for name, (_, counts) in found.items():
        gaps = {m: len(systems[name]) - n for m, n in counts.items() if n < len(systems[name])}
        listed = "".join(f"; {m} undefined for {n}" for m, n in gaps.items())
        told.append(f"{name}: {len(systems[name])} pairs, standard errors over pairs{listed}")
    text = markdown("measured here", here, names) + "\n" + markdown("the paper", theirs, names)
    text += "\n" + "".join(f"* {line}\n" for line in told)
    table, blocks = io.StringIO(), {"here": here, "paper": theirs}
    sheet = csv.writer(table, lineterminator="\n")
    sheet.writerow(["block", "system", "measure", "value", "standard_error", "defined"])
    for block, rows in blocks.items():
        for system, row in rows.items():
            for measure, (value, error) in row.items():
                n = found[system][1][measure] if block == "here" else ""
                shown = "undefined" if math.isnan(value) else value
                sheet.writerow(
                    [block, system, measure, shown, "" if math.isnan(error) else error, n]
                )
    defined = {name: pair[1] for name, pair in found.items()}
    values = {**blocks, "defined": defined, "judges": asdict(judges), "notes": told}
    write_atomic(out / "scores.json", as_json(values))
    write_atomic(out / "scores.csv", table.getvalue().encode())
    write_atomic(out / "scores.md", text.encode())
    return text


def as_json(values: Any) -> bytes:
    """Undefined numbers become null."""
    return json.dumps(values, indent=1, default=str).replace("NaN", "null").encode()
