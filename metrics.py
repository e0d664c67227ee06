"""How well speech was reproduced: words, pitch, and the time base that compares two recordings.

    WER    = (substitutions + deletions + insertions) / words of the reference
    F0-PCC = Pearson correlation of the two F0 contours (Hz) over frames that both call voiced,
             after the hypothesis was warped onto the reference by DTW over MFCCs

Undefined cases (no reference words, fewer than MIN_VOICED jointly voiced frames) are NaN, never 0.
The F0 tracker is pitch.py (YIN, Viterbi); voicing depends on it, so name it beside figures.
[TASLA, Hsu et al. 2025, arXiv:2510.14934, appendix C]
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from audio import WHISPER_HOP, WHISPER_RATE, whisper_mel
from pitch import pitch

MIN_VOICED = 10  # frames of 10 ms
MFCCS = 13


def plain_words(text: str) -> list[str]:
    """Lower-case words without punctuation: what WER compares."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return kept.split()


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


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two series (n,); NaN if one of them is constant or too short."""
    if len(a) < MIN_VOICED:
        return math.nan
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 1e-9 else math.nan


def f0_correlation(reference: Tensor, hypothesis: Tensor, warp: bool = True) -> float:
    """F0-PCC of two waves (S,) at 16 kHz. warp=False compares frame by frame, for copies that
    should have kept the time base."""
    f0_a, f0_b = (pitch(w, WHISPER_RATE, WHISPER_HOP) for w in (reference, hypothesis))  # (F,)
    if min(len(f0_a), len(f0_b)) < 2:
        return math.nan  # too short for a log-mel
    if warp:
        path = dtw(mfcc(reference)[: len(f0_a)], mfcc(hypothesis)[: len(f0_b)])
        f0_a, f0_b = f0_a[path[:, 0]], f0_b[path[:, 1]]  # (P,)
    else:
        n = min(len(f0_a), len(f0_b))
        f0_a, f0_b = f0_a[:n], f0_b[:n]
    both = (f0_a > 0) & (f0_b > 0)
    return correlation(f0_a[both], f0_b[both])


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


if __name__ == "__main__":
    print("WER:", wer(["the cat sees two dogs."], ["the cat saw two two dogs"]))
    t = torch.arange(16000) / 16000
    glide = [torch.sin(2 * torch.pi * (120 * t + k * t**2)) for k in (30, 36)]
    print(f"F0-PCC of two rising glides: {f0_correlation(glide[0], glide[1]):.3f}")
