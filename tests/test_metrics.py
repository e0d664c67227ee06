"""metrics.py on signals with known answers, and against jiwer, librosa, scipy and transformers.

Undefined is NaN. Tolerances: 1e-6 where the answer is exact; else each test says what limits it."""

import math
from random import Random

import pytest
import torch
from torch import Tensor

import metrics
from metrics import (
    PROSODY,
    Contours,
    basic_rules,
    carry_times,
    contours,
    dtw,
    duration_consistency,
    edit_distance,
    entropies,
    f0_correlation,
    frame_rms,
    mean_and_error,
    nominal_bits,
    onto,
    phrase,
    plain_words,
    prosody,
    ratio_and_error,
    similarity,
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
    assert plain_words("The  cat's tail, it\nMoved!") == [
        *("the", "cat", "s", "tail", "it", "moved")
    ]
    assert wer(["The cat sees."], ["the CAT, sees"]) == 0
    assert wer(["a b c d"], ["a x d"]) == 0.5
    assert wer(["a"], ["x y z"]) == 3  # insertions count: above 1 is possible
    assert wer(["a b c", "d"], ["a b c", "e"]) == 0.25  # over all words, not mean of texts


def test_wer_of_no_words_is_nan_and_pairs_must_match() -> None:
    assert math.isnan(wer([], []))
    assert math.isnan(wer([" ... "], ["a"]))
    with pytest.raises(ValueError, match="shorter"):
        wer(["a", "b"], ["a"])


LINES = [
    "Hello, World! [music] it's (laughs) <unk> fine",
    "naïve café Ｆｕｌｌ width ½ x² -- 100% $5.00 #1 a_b",
    "don't (a (b) c) [open <x> é e\u0301 tab\there",
    "", "...", "ÅNGSTRÖM ﬁne ß İ", "()[]<>", "A\u00a0B\u2014C 'quoted' \"text\"",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_basic_rules_are_whispers(line: str) -> None:
    theirs = pytest.importorskip("transformers.models.whisper.english_normalizer")
    assert basic_rules(line) == theirs.BasicTextNormalizer()(line).strip()


def test_english_rules_are_whispers() -> None:
    pytest.importorskip("whisper_normalizer")
    rules = metrics.RULES["english"]()
    assert rules("Mr. Colour's twenty-one dogs won't, uhm, go") == (
        "mister color is 21 dogs will not uhm go"
    )


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


def test_onto_takes_the_middle_of_each_frames_matches() -> None:
    path = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 3], [2, 3], [2, 4], [2, 5], [2, 6], [3, 6]])
    assert onto(path).tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize("factor", [0.5, 1, 1.5, 2])
def test_word_times_of_a_stretched_copy(factor: float) -> None:
    """Rows in random order of time, so that the path is certain; it moves by whole frames."""
    a = random_rows(100, 3)
    path = dtw(a, a[(torch.arange(int(100 * factor)) / factor).long()])
    found = carry_times(path, [0.1, 0.4], [0.3, 0.855])
    want = factor * torch.tensor([[0.1, 0.3], [0.4, 0.855]])
    assert (found - want).abs().max() <= 0.01 * max(1, factor)


# --- prosody, C.2 --------------------------------------------------------------------------------


def gliding(hz: Tensor, noise_from: int | None = None) -> Tensor:
    """F0 hz (S,) of each sample -> a tone (S,); from that sample on noise of the same level."""
    wav = sum(torch.sin(2 * math.pi * k * (hz / RATE).cumsum(0)) / k for k in range(1, 9))
    wav = (0.2 * torch.as_tensor(wav)).float()
    if noise_from is not None:
        rng = torch.Generator().manual_seed(0)
        wav[noise_from:] = wav.square().mean().sqrt() * torch.randn(
            len(wav) - noise_from, generator=rng
        )
    return wav


def line(start: float, end: float) -> Tensor:
    return torch.linspace(start, end, 2 * RATE, dtype=torch.double)  # 2 s


def hiss(seconds: float = 1.0, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(int(seconds * RATE), generator=g)


def test_identical_files() -> None:
    wav = torch.cat([gliding(line(100, 200)), hiss(0.5)])
    same = prosody(contours(wav), contours(wav.clone()))
    want = {"Ene. RMSE": 0, "F0-PCC": 1, "Phr. Cos.": 1, "Ene. PCC": 1}
    assert same == pytest.approx(want | {"Phr. L2": 0, "VDE": 0, "GPE": 0}, abs=1e-6)
    assert list(same) == list(PROSODY)


@pytest.mark.parametrize("db", [-20.0, -6.0, 6.0])
def test_a_gain_is_its_decibels_and_nothing_else(db: float) -> None:
    """Exact frame by frame; 0.05 dB after DTW, since loudness is part of MFCCs and moves the path
    by a frame here and there."""
    wav = torch.cat([0.2 * gliding(line(100, 200)), hiss(0.5)])
    a, b = contours(wav), contours(wav * 10 ** (db / 20))
    for warp, off in ((False, 1e-3), (True, 0.05)):
        found = prosody(a, b, warp)
        assert found["Ene. RMSE"] == pytest.approx(abs(db), abs=off)
        assert found["Ene. PCC"] == pytest.approx(1, abs=off)
        assert found["F0-PCC"] == pytest.approx(1, abs=1e-3)
        assert found["VDE"] == pytest.approx(0, abs=off)
        assert found["GPE"] == 0


@pytest.mark.parametrize("tracker", ["yin", "crepe-tiny"])
def test_the_f0_of_a_glide(tracker: str) -> None:
    """Off by 0.5 % of F0: YIN's window is not centred for every lag; 1.5 %: CREPE's bins."""
    if tracker != "yin":
        pytest.importorskip("torchcrepe")
    hz = line(110, 220)
    found = contours(gliding(hz), tracker).f0[10:-10]
    off = (found / hz[: len(hz) // 160 * 160 : 160][10:-10] - 1).abs()
    assert off.median() < (0.005 if tracker == "yin" else 0.015)
    assert (found > 0).double().mean() > 0.98


@pytest.mark.parametrize(("shift", "gpe"), [(1.15, 0.0), (1.25, 1.0), (0.85, 0.0), (0.75, 1.0)])
def test_gpe_counts_errors_above_a_fifth(shift: float, gpe: float) -> None:
    a, b = (contours(gliding(f * line(120, 200))) for f in (1, shift))
    found = prosody(a, b, warp=False)
    assert found["GPE"] == pytest.approx(gpe, abs=0.03)  # 3 of 200 frames at the ends
    assert found["F0-PCC"] > 0.999
    assert found["Phr. L2"] == pytest.approx(12 * abs(math.log2(shift)), abs=0.1)  # semitones: c_0


@pytest.mark.parametrize("part", [0.25, 0.6])
def test_vde_is_the_part_that_lost_its_voice(part: float) -> None:
    """0.04: the window of 47 ms at the edge."""
    wav = gliding(line(120, 180))
    lost = gliding(line(120, 180), noise_from=int((1 - part) * len(wav)))
    a, b = contours(wav), contours(lost)
    for ref, hyp in ((a, b), (b, a)):
        assert prosody(ref, hyp, warp=False)["VDE"] == pytest.approx(part, abs=0.04)


@pytest.mark.parametrize("factor", [0.7, 1.5])
def test_a_time_stretch_does_not_count(factor: float) -> None:
    """The DTW undoes it to within some frames: a rising tone, whose timbre moves, too."""
    a, b = glide(110, 220, 1.0), glide(110, 220, factor)
    found = prosody(contours(a), contours(b))
    assert found["F0-PCC"] > 0.98
    assert found["GPE"] == 0
    assert found["VDE"] < 0.06
    assert found["Phr. L2"] < 1  # semitone


SILENT = torch.zeros(RATE)


def test_noise_and_silence_leave_pitch_undefined() -> None:
    pitched = {"F0-PCC", "Phr. Cos.", "Phr. L2", "GPE"}
    noise = prosody(contours(hiss()), contours(hiss(seed=2)))
    assert {k for k, v in noise.items() if math.isnan(v)} >= pitched
    assert noise["Ene. RMSE"] > 0
    tone = contours(gliding(line(120, 180)))
    lost = prosody(tone, contours(SILENT))
    assert {k for k, v in lost.items() if math.isnan(v)} == pitched | {"Ene. PCC"}
    assert lost["VDE"] == pytest.approx(1, abs=0.05)  # all its frames lost their voice


def test_nothing_voiced_in_either_leaves_vde_undefined() -> None:
    row = torch.zeros(50)
    a = Contours(random_rows(50, 1), row, row + 0.1)
    assert math.isnan(prosody(a, a)["VDE"])


@pytest.mark.parametrize("ref", [SILENT, torch.zeros(0), torch.zeros(100), hiss(0.015)])
def test_an_empty_reference_leaves_all_undefined(ref: Tensor) -> None:
    for hyp in (SILENT, hiss(), ref):
        found = prosody(contours(ref), contours(hyp))
        assert list(found) == list(PROSODY)
        assert all(map(math.isnan, found.values()))


def test_frame_rms_is_librosas() -> None:
    feature = pytest.importorskip("librosa").feature
    wav = torch.cat([gliding(line(100, 200)), hiss(0.5)])
    want = feature.rms(y=wav.numpy(), frame_length=400, hop_length=160, pad_mode="constant")[0]
    found = frame_rms(wav)
    torch.testing.assert_close(found, torch.as_tensor(want[: len(found)]), rtol=1e-5, atol=1e-6)


def test_correlation_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = random_rows(50, 1)[:, 0].double(), random_rows(50, 2)[:, 0].double()
    assert metrics.correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)


def test_phrase_finds_the_polynomial() -> None:
    special = pytest.importorskip("scipy.special")
    x = torch.linspace(-1, 1, 120, dtype=torch.double)
    want = torch.tensor([14.0, 3.0, -2.0, 1.5], dtype=torch.double)  # of P_0 .. P_3, semitones
    semitones = sum(c * special.eval_legendre(d, x.numpy()) for d, c in enumerate(want.tolist()))
    f0 = 55 * 2 ** (torch.as_tensor(semitones) / 12)
    torch.testing.assert_close(phrase(f0), want)
    f0[40:60] = 0  # a gap becomes a line: off by less than half a semitone here
    assert (phrase(f0) - want).abs().max() < 0.5
    assert math.isnan(float(phrase(torch.where(torch.arange(120) < 9, f0, 0))[0]))


def test_phrase_interpolates_gaps_and_holds_the_ends() -> None:
    """Against least squares on scipy's Legendre polynomials, and numpy's interpolation."""
    special = pytest.importorskip("scipy.special")
    f0 = 100 + 40 * torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    f0[:7] = f0[30:41] = f0[70:] = 0
    full = f0.clone()
    full[:7], full[70:] = f0[7], f0[69]
    semitones = 12 * (full / 55).log2()
    steps = torch.arange(1, 12) / 12
    semitones[30:41] = semitones[29] + steps * (semitones[41] - semitones[29])
    x = torch.linspace(-1, 1, 80, dtype=torch.double).numpy()
    basis = torch.stack([torch.as_tensor(special.eval_legendre(d, x)) for d in range(4)], 1)
    want = torch.linalg.lstsq(basis, semitones[:, None]).solution[:, 0]
    torch.testing.assert_close(phrase(f0), want)


# --- durations, voice, bits ----------------------------------------------------------------------


def test_duration_consistency() -> None:
    ref = torch.tensor([[0.0, 0.2], [0.3, 0.6], [0.6, 1.0], [1.0, 1.5]])
    hyp = torch.tensor([[0.5, 0.7], [0.7, 1.04], [1.1, 1.56], [2.0, 2.2]])  # +0, +40, +60, -300 ms
    same, change = duration_consistency(ref, hyp)
    assert same == 0.5
    assert change == pytest.approx(0.1)
    assert duration_consistency(ref, hyp, 0.02)[0] == 0.25
    assert all(map(math.isnan, duration_consistency(ref[:0], hyp[:0])))
    with pytest.raises(ValueError, match="4 words against 3"):
        duration_consistency(ref, hyp[:3])


def test_similarity() -> None:
    a = random_rows(64, 1)[:, 0]
    assert similarity(a, 3 * a) == pytest.approx(1)
    assert similarity(a, -a) == pytest.approx(-1)
    assert similarity(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert math.isnan(similarity(a, 0 * a))


def test_bits() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert nominal_bits(12, 8) == 36
    assert nominal_bits(64, 8) == 192
    assert nominal_bits(4, 512) == 36
    g = torch.Generator().manual_seed(0)
    codes = torch.stack(
        [torch.arange(4000) % 8, torch.zeros(4000).long(), torch.randint(8, (4000,), generator=g)],
        1,
    )
    found = entropies(codes, 8)
    assert found[:2].tolist() == pytest.approx([3, 0], abs=1e-9)
    want = stats.entropy(codes[:, 2].bincount().numpy(), base=2)
    assert float(found[2]) == pytest.approx(want)
    assert entropies(codes[:0], 8).isnan().all()


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
