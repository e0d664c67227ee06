"""metrics.py against jiwer, a plain DTW and librosa; F0-PCC on known pitch; undefined is NaN."""

import math
from random import Random

import pytest
import torch
from torch import Tensor

import metrics
from metrics import (
    dtw,
    edit_distance,
    f0_correlation,
    mean_and_error,
    plain_words,
    ratio_and_error,
    wer,
)

RATE = 16000
NAN = math.nan


def random_texts(n: int, seed: int) -> list[str]:
    rng = Random(seed)
    return [" ".join(rng.choices("a b cat dog sees", k=rng.randint(1, 12))) for _ in range(n)]


def random_rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def glide(start: float, end: float, seconds: float = 1.0) -> Tensor:
    """A vowel-like tone (S,) whose F0 moves from start to end Hz; a noise burst marks each end."""
    n = int(seconds * RATE)
    hz = torch.linspace(start, end, n, dtype=torch.double)
    phase = (hz / RATE).cumsum(0)
    t = torch.linspace(0, 1, n, dtype=torch.double)
    waves = [torch.sin(2 * math.pi * k * phase) / k ** (1 + t) for k in range(1, 9)]  # timbre moves
    hiss = 0.1 * torch.randn(1600, generator=torch.Generator().manual_seed(0))
    return torch.cat([hiss, 0.2 * torch.stack(waves).sum(0).float(), hiss])


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("ab", "ba", 2),  # a swap is two edits
    ],
)
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == edits
    assert edit_distance(list(a), list(b)) == edits


def test_edit_distance_is_a_metric() -> None:
    x, y, z = (random_texts(30, seed) for seed in range(3))
    for a, b, c in zip(x, y, z, strict=True):
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
        assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize("seed", range(3))
def test_wer_is_jiwers(seed: int) -> None:
    jiwer = pytest.importorskip("jiwer")
    references, hypotheses = random_texts(40, seed), random_texts(40, seed + 100)
    hypotheses[3] = ""
    assert wer(references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses))


def test_wer_counts_words_without_case_and_stops() -> None:
    assert plain_words("The  cat's tail, it\nMoved!") == ["the", "cat's", "tail", "it", "moved"]
    assert wer(["The cat sees."], ["the CAT, sees"]) == 0
    assert wer(["a b c d"], ["a x d"]) == 0.5
    assert wer(["a"], ["x y z"]) == 3  # insertions count: above 1 is possible
    assert wer(["a b c", "d"], ["a b c", "e"]) == 0.25  # over all words, not mean of texts


def test_wer_of_no_words_is_nan_and_pairs_must_match() -> None:
    assert math.isnan(wer([], []))
    assert math.isnan(wer([" ... "], ["a"]))
    with pytest.raises(ValueError, match="shorter"):
        wer(["a", "b"], ["a"])


# --- time ----------------------------------------------------------------------------------------


def plain_dtw(a: Tensor, b: Tensor) -> tuple[float, list[list[int]]]:
    """Cell by cell, as in the textbook."""
    cost = [[math.dist(x, y) for y in b.tolist()] for x in a.tolist()]
    total: dict[tuple[int, int], float] = {(-1, -1): 0.0}
    for i in range(len(a)):
        for j in range(len(b)):
            before = [total.get(k, math.inf) for k in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
            total[i, j] = cost[i][j] + min(before)
    path = [(len(a) - 1, len(b) - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        cells = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        path.append(min(cells, key=lambda cell: total.get(cell, math.inf)))
    return total[len(a) - 1, len(b) - 1], [[*cell] for cell in path[::-1]]


SIZES = [(1, 1), (1, 6), (6, 1), (2, 3), (9, 9), (17, 5), (12, 31)]


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_dtw_is_the_textbooks(n: int, m: int) -> None:
    a, b = random_rows(n, n), random_rows(m, 100 + m)
    assert dtw(a, b).tolist() == plain_dtw(a, b)[1]


@pytest.mark.slow  # numba compiles it
@pytest.mark.parametrize(("n", "m"), [(9, 9), (40, 25)])
def test_dtw_is_librosas(n: int, m: int) -> None:
    librosa = pytest.importorskip("librosa")
    a, b = random_rows(n, 1), random_rows(m, 2)
    total, path = librosa.sequence.dtw(a.T.double().numpy(), b.T.double().numpy())
    assert dtw(a, b).tolist() == path[::-1].tolist()
    assert plain_dtw(a, b)[0] == pytest.approx(total[-1, -1])


def test_dtw_steps_and_ends() -> None:
    path = dtw(random_rows(23, 5), random_rows(31, 6))
    assert path[0].tolist() == [0, 0]
    assert path[-1].tolist() == [22, 30]
    steps = {(*step,) for step in path.diff(dim=0).tolist()}
    assert steps <= {(1, 0), (0, 1), (1, 1)}


def test_dtw_undoes_a_stretch() -> None:
    a = random_rows(12, 7)
    index = torch.arange(12).repeat_interleave(torch.randint(1, 4, (12,)))
    assert torch.equal(dtw(a, a), torch.arange(12)[:, None].expand(12, 2))
    assert torch.equal(dtw(a, a[index])[:, 0], index)


# --- pitch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("warp", [True, False])
def test_f0_correlation_of_a_copy_and_of_another_key(warp: bool) -> None:
    wav = glide(110, 220)
    assert f0_correlation(wav, wav, warp) == pytest.approx(1)
    assert f0_correlation(wav, 0.2 * wav, warp) > 0.999  # loudness does not matter
    assert f0_correlation(wav, glide(140, 260), warp) > 0.9  # nor key, nor range


@pytest.mark.parametrize("warp", [True, False])
def test_f0_correlation_of_the_inverted_contour_is_negative(warp: bool) -> None:
    assert f0_correlation(glide(110, 220), glide(220, 110), warp) < -0.5


def test_a_stretched_copy_needs_the_warp() -> None:
    slow = torch.cat([torch.zeros(8000), glide(110, 220, 1.6)])
    warped = f0_correlation(glide(110, 220), slow)
    assert warped > 0.95
    assert f0_correlation(slow, glide(110, 220)) == pytest.approx(warped, abs=0.03)


@pytest.mark.parametrize("warp", [True, False])
@pytest.mark.parametrize("seconds", [0, 0.005, 0.011, 0.03, 0.5])
def test_f0_correlation_without_voice_is_nan(seconds: float, warp: bool) -> None:
    n = int(seconds * RATE)
    hiss = 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(1))
    for a, b in ((hiss, hiss), (hiss, glide(110, 220)), (glide(110, 220), torch.zeros(n))):
        assert math.isnan(f0_correlation(a, b, warp))


def test_correlation() -> None:
    a, b = random_rows(50, 1)[:, 0], random_rows(50, 2)[:, 0]
    want = float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])
    assert metrics.correlation(a, b) == pytest.approx(want)
    assert metrics.correlation(a, 200 - 3 * a) == pytest.approx(-1)
    assert math.isnan(metrics.correlation(a, torch.full_like(a, 7)))
    assert math.isnan(metrics.correlation(a[:9], b[:9]))  # fewer than MIN_VOICED


def test_mfcc_is_the_dct_of_the_log_mel() -> None:
    fft = pytest.importorskip("scipy.fft")
    wav = glide(110, 220)
    mel = metrics.whisper_mel(wav).T  # (F, M)
    want = torch.as_tensor(fft.dct(mel.numpy(), type=2, axis=1)) / 2  # scipy has a factor of 2
    torch.testing.assert_close(metrics.mfcc(wav), want[:, :13], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "mean", "error"),
    [([1.0, 3.0], 2.0, 1.0), ([1.0, NAN, 3.0], 2.0, 1.0), ([4.0, NAN], 4.0, NAN), ([], NAN, NAN)],
)
def test_mean_and_error(values: list[float], mean: float, error: float) -> None:
    assert mean_and_error(values) == pytest.approx((mean, error), nan_ok=True)


def test_ratio_and_error() -> None:
    parts, wholes = [1.0, 0.0, 3.0, NAN, 0.0], [4.0, 2.0, 10.0, 5.0, 0.0]  # edits, words
    ratio, error = ratio_and_error(parts, wholes)
    assert ratio == pytest.approx(4 / 16)
    assert 0 < error < 0.25
    assert ratio_and_error([2.0] * 9, [4.0] * 9) == pytest.approx((0.5, 0))
    assert ratio_and_error([0.0, NAN], [0.0, 1.0]) == pytest.approx((NAN, NAN), nan_ok=True)


def test_the_error_of_a_ratio_is_that_of_repeated_samples() -> None:
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(3, 12, (400, 200), generator=rng).double()
    edits = torch.binomial(words, torch.full_like(words, 0.1), generator=rng)
    found = [ratio_and_error(e.tolist(), w.tolist()) for e, w in zip(edits, words, strict=True)]
    ratios, errors = torch.tensor(found, dtype=torch.double).T
    assert ratios.mean() == pytest.approx(0.1, rel=0.02)
    assert errors.mean() == pytest.approx(float(ratios.std()), rel=0.15)
