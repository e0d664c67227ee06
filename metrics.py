"""How well speech was reproduced: words, pitch, energy, phrase shape, durations, voice, bits.

    wav --contours--> mfcc (F, 13), f0 (F,) Hz, rms (F,)      100 frames a second
    reference, hypothesis --DTW over mfcc--> hypothesis frame of each reference frame t = 1 .. L

    F0-PCC = Pearson(f_ref, f_hyp), GPE = mean [|f_hyp / f_ref - 1| > 0.2]: where both are voiced
    VDE = mean [voiced_ref != voiced_hyp]
    E = 20 log10 max(rms, eps): Ene. RMSE = sqrt(mean (E_ref - E_hyp)^2), Ene. PCC = Pearson
    c = Legendre fit, degree 3, to 12 log2(f / 55): Phr. Cos. and Phr. L2 of c_ref and c_hyp
    WER = (substitutions + deletions + insertions) / words of the reference

What is undefined is NaN, never 0 or 1: silence as a reference, nothing voiced, no reference words.
Voicing depends on the F0 tracker, so it is named beside figures. Open in the paper, our choice:
of several hypothesis frames for one t the middle one; eps; 25 ms windows; beyond the first and the
last voiced frame the phrase holds its F0. [TASLA, Hsu et al. 2025, arXiv:2510.14934, appendix C]
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from audio import WHISPER_HOP, WHISPER_RATE, whisper_mel
from pitch import HIGHEST, LOWEST, pitch

Figures = dict[str, tuple[float, float]]  # measure -> value, standard error (NaN: none)
MIN_VOICED = 10  # frames of 10 ms
MFCCS = 13
RMS_WINDOW = 400  # samples, 25 ms at 16 kHz
EPS = 1e-5  # of the frame RMS, -100 dB of full scale
GROSS = 0.2  # relative error above which a pitch is grossly wrong
DEGREE = 3  # of the Legendre fit
SAME_DURATION_S = 0.05  # TASTE's window, arXiv:2504.07053; its published scripts take 0.02
PERIODICITY = 0.21  # of CREPE, above which a frame is voiced: torchcrepe's own example

PROSODY = {  # measure -> better: up, down
    "Ene. RMSE": "down", "F0-PCC": "up", "Phr. Cos.": "up", "Ene. PCC": "up", "Phr. L2": "down",
    "VDE": "down", "GPE": "down",
}  # fmt: skip


# --- words ---------------------------------------------------------------------------------------


def basic_rules(text: str) -> str:
    """Whisper's basic normalisation: lower case, nothing in brackets; marks, symbols and
    punctuation are blanks. [Radford 2022, arXiv:2212.04356, appendix C; TASTE's WER]"""
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text.lower())
    text = unicodedata.normalize("NFKC", re.sub(r"\([^)]+?\)", "", text))
    kept = (" " if unicodedata.category(c)[0] in "MSP" else c for c in text)
    return " ".join("".join(kept).lower().split())


def english_rules() -> Callable[[str], str]:
    """Whisper's English normalisation, which also spells numbers, contractions and British words
    one way; needs `pip install whisper-normalizer`, else ValueError."""
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as e:
        raise ValueError(
            "English rules need another package: pip install whisper-normalizer"
        ) from e
    return EnglishTextNormalizer()


RULES: dict[str, Callable[[], Callable[[str], str]]] = {
    "basic": lambda: basic_rules,
    "english": english_rules,
}


def plain_words(text: str) -> list[str]:
    """Words as Whisper's basic rules leave them: what WER compares."""
    return basic_rules(text).split()


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Fewest substitutions, deletions and insertions that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate over all pairs of texts, 0.03 = 3 %. NaN if the references have no words."""
    pairs = [(plain_words(r), plain_words(h)) for r, h in zip(references, hypotheses, strict=True)]
    total = sum(len(r) for r, _ in pairs)
    return sum(edit_distance(r, h) for r, h in pairs) / total if total else math.nan


# --- the shared time base ------------------------------------------------------------------------


def mfcc(wav: Tensor) -> Tensor:
    """wav (S,) at 16 kHz -> (F, 13) cepstra at 100 Hz: DCT-II of the Whisper log-mel."""
    mel = whisper_mel(wav).T  # (F, M)
    n = torch.arange(mel.shape[1]) + 0.5
    basis = torch.cos(math.pi / mel.shape[1] * n[:, None] * torch.arange(MFCCS))  # (M, 13)
    return mel @ basis


def dtw(a: Tensor, b: Tensor) -> Tensor:
    """a (n, C), b (m, C) -> path (P, 2) of index pairs, cheapest by Euclidean distance.

    Steps (1,0), (0,1), (1,1) of equal weight; the cost is filled along anti-diagonals."""
    cost = torch.cdist(a.double(), b.double()).numpy()
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        best = np.minimum(np.minimum(total[i - 1, j], total[i, j - 1]), total[i - 1, j - 1])
        total[i, j] = cost[i - 1, j - 1] + best
    i, j, path = n, m, []
    while i and j:
        path.append((i - 1, j - 1))
        step = int(np.argmin((total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])))
        i, j = i - (step < 2), j - (step != 1)
    return torch.tensor(path[::-1])


def onto(path: Tensor) -> Tensor:
    """DTW path (P, 2) -> of each reference frame the middle one of its hypothesis frames (L,)."""
    _, counts = path[:, 0].unique_consecutive(return_counts=True)
    return path[counts.cumsum(0) - (counts + 2) // 2, 1]


def carry_times(path: Tensor, starts_s: Sequence[float], ends_s: Sequence[float]) -> Tensor:
    """Word times of the reference, in s, and the DTW path (P, 2) from it to a hypothesis
    -> those of the hypothesis (W, 2): start, end."""
    frame_s, at = WHISPER_HOP / WHISPER_RATE, onto(path)
    edges = torch.tensor([starts_s, ends_s], dtype=torch.double).T / frame_s  # (W, 2)
    low = edges.floor().long().clamp(0, len(at) - 1)
    high = (low + 1).clamp(max=len(at) - 1)
    return (at[low] + (at[high] - at[low]) * (edges - low).clamp(0, 1)) * frame_s


# --- prosody, C.2 --------------------------------------------------------------------------------


def crepe(wav: Tensor, model: str = "full") -> Tensor:
    """wav (S,) at 16 kHz -> f0 (F,) Hz, 0 where unvoiced, by CREPE [Kim et al. 2018].

    Needs `pip install torchcrepe`, which brings the weights, else ValueError."""
    try:
        import torchcrepe
    except ImportError as e:
        raise ValueError("this F0 tracker needs another package: pip install torchcrepe") from e
    frames = len(wav) // WHISPER_HOP
    if not frames:
        return wav.new_zeros(0)
    f0, periodicity = torchcrepe.predict(
        wav[None], WHISPER_RATE, WHISPER_HOP, LOWEST, HIGHEST, model,
        return_periodicity=True, batch_size=512,
    )  # fmt: skip
    smooth = periodicity.unfold(1, 3, 1).median(2).values  # (1, F - 2)
    voiced = F.pad(smooth, (1, 1)) > PERIODICITY
    return (f0 * voiced)[0, :frames]


TRACKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "yin": lambda wav: pitch(wav, WHISPER_RATE, WHISPER_HOP),  # YIN, Viterbi: pitch.py
    "crepe": crepe,
    "crepe-tiny": lambda wav: crepe(wav, "tiny"),
}


def frame_rms(wav: Tensor) -> Tensor:
    """wav (S,) at 16 kHz -> root mean square (F,) of 25 ms around sample 160 f, F = S // 160."""
    frames = len(wav) // WHISPER_HOP
    padded = F.pad(wav.float(), (RMS_WINDOW // 2, RMS_WINDOW))
    return padded.unfold(0, RMS_WINDOW, WHISPER_HOP)[:frames].square().mean(1).sqrt()


class Contours(NamedTuple):
    """What appendix C.2 compares, 100 frames a second."""

    mfcc: Tensor  # (F, 13)
    f0: Tensor  # (F,) Hz, 0 where unvoiced
    rms: Tensor  # (F,)


def contours(wav: Tensor, tracker: str = "yin") -> Contours:
    """wav (S,) at 16 kHz; less than two frames (20 ms) are no contour: F = 0."""
    if len(wav) < 2 * WHISPER_HOP:
        return Contours(wav.new_zeros(0, MFCCS), wav.new_zeros(0), wav.new_zeros(0))
    return Contours(mfcc(wav), TRACKERS[tracker](wav), frame_rms(wav))


def decibels(rms: Tensor) -> Tensor:
    return 20 * rms.double().clamp(min=EPS).log10()


def aligned(ref: Contours, hyp: Contours) -> Contours:
    """The hypothesis on the time base of the reference."""
    at = onto(dtw(ref.mfcc, hyp.mfcc))  # (L,)
    return Contours(*(x[at] for x in hyp))


def prosody(ref: Contours, hyp: Contours, warp: bool = True) -> dict[str, float]:
    """The measures of PROSODY; NaN where undefined. warp=False compares frame by frame, for copies
    that should have kept the time base.

    A silent reference leaves all undefined, as do less than two frames; VDE needs something voiced
    in one of the two, GPE a frame in which both are, F0-PCC and the phrase MIN_VOICED of them."""
    if min(len(ref.f0), len(hyp.f0)) < 2 or float(ref.rms.max()) <= EPS:
        return dict.fromkeys(PROSODY, math.nan)
    if warp:
        hyp = aligned(ref, hyp)
    n = min(len(ref.f0), len(hyp.f0))
    f0, f0_hyp = ref.f0[:n], hyp.f0[:n]
    db, db_hyp = decibels(ref.rms[:n]), decibels(hyp.rms[:n])
    voiced, voiced_hyp = f0 > 0, f0_hyp > 0
    both = voiced & voiced_hyp
    gross = (f0_hyp / f0.clamp(min=EPS) - 1).abs() > GROSS
    c, c_hyp = phrase(f0), phrase(f0_hyp)
    return {
        "Ene. RMSE": float((db - db_hyp).square().mean().sqrt()),
        "F0-PCC": correlation(f0[both], f0_hyp[both]),
        "Phr. Cos.": float(F.cosine_similarity(c, c_hyp, 0)),
        "Ene. PCC": correlation(db, db_hyp),
        "Phr. L2": float((c - c_hyp).norm()),
        "VDE": share(voiced != voiced_hyp) if bool((voiced | voiced_hyp).any()) else math.nan,
        "GPE": share(gross[both]),
    }


def share(x: Tensor) -> float:
    """Part of x (n,) bool that is true; NaN of nothing."""
    return float(x.double().mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two series (n,); NaN if one of them is constant or too short."""
    if len(a) < MIN_VOICED:
        return math.nan
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-9 else math.nan


def phrase(f0: Tensor) -> Tensor:
    """f0 (L,) Hz -> coefficients (4,) of P_0 .. P_3 on [-1, 1] over L, fitted to semitones above
    55 Hz; gaps are interpolated. NaN if less than MIN_VOICED frames are voiced."""
    (at,) = np.nonzero(f0.numpy() > 0)
    if len(at) < MIN_VOICED:
        return torch.full((DEGREE + 1,), math.nan, dtype=torch.double)
    semitones = 12 * np.log2(f0.double().numpy()[at] / 55)
    whole = np.interp(np.arange(len(f0)), at, semitones)
    x = np.linspace(-1, 1, len(f0))
    return torch.from_numpy(np.polynomial.legendre.legfit(x, whole, DEGREE))


def f0_correlation(reference: Tensor, hypothesis: Tensor, warp: bool = True) -> float:
    """F0-PCC of two waves (S,) at 16 kHz, by the built-in tracker. warp: see prosody."""
    return prosody(contours(reference), contours(hypothesis), warp)["F0-PCC"]


# --- durations, voice, bits ----------------------------------------------------------------------


def duration_consistency(
    ref: Tensor, hyp: Tensor, tolerance_s: float = SAME_DURATION_S
) -> tuple[float, float]:
    """Word times (W, 2) of the same words, in s -> share of words that last as long as in the
    reference, give or take the tolerance, and the mean absolute difference in s. No words: NaN.

    [TASTE, Tseng et al. 2025, arXiv:2504.07053, duration consistency]"""
    if ref.shape != hyp.shape:
        raise ValueError(f"{len(ref)} words against {len(hyp)}: durations need the same words")
    change = (ref.diff(dim=1) - hyp.diff(dim=1)).abs().double()
    return share(change <= tolerance_s), float(change.mean())


def similarity(ref: Tensor, hyp: Tensor) -> float:
    """Cosine of two voice vectors (X,); NaN if one of them is 0."""
    scale = float(ref.double().norm() * hyp.double().norm())
    return float(ref.double() @ hyp.double()) / scale if scale else math.nan


def nominal_bits(codebooks: int, levels: int) -> float:
    """Bits of one token by the formula of both papers: Q log2 K."""
    return codebooks * math.log2(levels)


def entropies(codes: Tensor, levels: int) -> Tensor:
    """codes (n, Q) -> empirical entropy of each codebook or channel (Q,), in bits.

    The plug-in estimate is low by about (K - 1) / (2 ln 2 n) bit; no codes: NaN."""
    counts = torch.stack([c.bincount(minlength=levels) for c in codes.cpu().T])  # (Q, K)
    odds = counts.double() / len(codes) if len(codes) else counts.double() * math.nan
    return -(odds * odds.clamp(min=1e-12).log2()).sum(1)


def bitrate(codes: Tensor, levels: int, seconds: float) -> Figures:
    """codes (n, Q) of all words in so many seconds: tokens a second as measured, bits by formula,
    and the entropy of the channels, each and added up."""
    entropy, nominal = entropies(codes, levels), nominal_bits(codes.shape[1], levels)
    rate = len(codes) / seconds
    values = {
        "words/s": rate, "bit/word": nominal, "bit/s": rate * nominal,
        "entropy/word": float(entropy.sum()),
        **{f"entropy of channel {q}": float(h) for q, h in enumerate(entropy)},
    }  # fmt: skip
    return {name: (value, math.nan) for name, value in values.items()}


# --- averages ------------------------------------------------------------------------------------


def ratio_and_error(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """sum(parts) / sum(wholes) over items, and its standard error over items (linearized, so that
    long items count for more). Items with a NaN or with nothing in `wholes` are left out."""
    pairs = [(p, w) for p, w in zip(parts, wholes, strict=True) if w and not math.isnan(p)]
    if not pairs:
        return math.nan, math.nan
    x = torch.tensor(pairs, dtype=torch.double)
    n, total = len(x), x[:, 1].sum()
    ratio = x[:, 0].sum() / total
    if n < 2:
        return float(ratio), math.nan
    rest = (x[:, 0] - ratio * x[:, 1]).square().sum()
    return float(ratio), float((rest * n / (n - 1)).sqrt() / total)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the values that are defined (not NaN)."""
    x = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.double)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


class Scores:
    """Measures of one system, each a ratio of two sums over utterances (and seeds)."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, tuple[float, float]]] = {}

    def add(self, measure: str, i: int, part: float, whole: float = 1.0) -> None:
        """One value of utterance i; a NaN (undefined) is left out."""
        rows = self.sums.setdefault(measure, {})
        old = rows.get(i, (0.0, 0.0))
        rows[i] = old if math.isnan(part) else (old[0] + part, old[1] + whole)

    def words(self, measure: str, i: int, text: str, heard: str) -> None:
        wanted, got = plain_words(text), plain_words(heard)
        self.add(measure, i, edit_distance(wanted, got), len(wanted))

    def figures(self) -> Figures:
        columns = {name: zip(*rows.values(), strict=True) for name, rows in self.sums.items()}
        return {name: ratio_and_error(*columns[name]) for name in columns}


if __name__ == "__main__":
    print("WER:", wer(["the cat sees two dogs."], ["the cat saw two two dogs"]))
    t = torch.arange(16000) / 16000
    low, high = (contours(torch.sin(2 * torch.pi * (120 * t + k * t**2))) for k in (30, 36))
    print("two rising glides, F0 by yin:")
    print(" | ".join(f"{name} {value:.3f}" for name, value in prosody(low, high).items()))
