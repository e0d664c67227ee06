"""pitch.py on signals whose F0 is known, in Hz; noise and silence; batches."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pitch import HIGHEST, LEAP, LOWEST, SWITCH, best_path, pitch

SETUPS = [(16000, 160), (22050, 256), (24000, 480), (8000, 80)]  # rate in Hz, hop in samples
EDGE = 4  # frames at either end whose window sticks out


def tone(hz: float | Tensor, rate: int, seconds: float = 0.5, partials: int = 6) -> Tensor:
    """Harmonic tone (S,) whose F0 is `hz`, one value or one a sample; amplitude about 0.3."""
    n = len(hz) if isinstance(hz, Tensor) else int(rate * seconds)
    phase = (torch.as_tensor(hz) * torch.ones(n, dtype=torch.double) / rate).cumsum(0)
    waves = [torch.sin(2 * math.pi * k * phase) / k for k in range(1, partials + 1)]
    return 0.2 * torch.stack(waves).sum(0).float()


def noise(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rate", "hop"), SETUPS)
@pytest.mark.parametrize("hz", [65.0, 100.0, 137.5, 220.0, 310.0, 400.0])
def test_a_steady_tone(rate: int, hop: int, hz: float) -> None:
    f0 = pitch(tone(hz, rate), rate, hop)
    assert f0.shape == (rate // 2 // hop,)
    assert f0.dtype == torch.float32
    assert (f0[EDGE:-EDGE] - hz).abs().max() < (2e-3 if rate == 8000 else 5e-4) * hz


@pytest.mark.parametrize(("rate", "hop"), SETUPS)
@pytest.mark.parametrize("ends", [(90.0, 300.0), (250.0, 80.0)])
def test_a_glide(rate: int, hop: int, ends: tuple[float, float]) -> None:
    hz = torch.linspace(*ends, rate, dtype=torch.double)  # a second
    f0 = pitch(tone(hz, rate), rate, hop)
    at = torch.arange(len(f0)) * hop - (rate / LOWEST - rate / f0) / 2  # high tones use the start
    truth = hz[at[EDGE:-EDGE].round().long()]
    assert (f0[EDGE:-EDGE] - truth).abs().max() < 1  # Hz; a frame of 10 ms is 2 Hz


@pytest.mark.parametrize("partials", [1, 2, 12])
def test_no_octave_errors_whatever_the_timbre(partials: int) -> None:
    for hz in (70.0, 140.0, 280.0):
        f0 = pitch(tone(hz, 16000, partials=partials), 16000, 160)
        assert (f0[EDGE:-EDGE] - hz).abs().max() < 0.01 * hz


@pytest.mark.parametrize(("rate", "hop"), SETUPS)
def test_noise_and_silence_are_unvoiced(rate: int, hop: int) -> None:
    assert (pitch(noise(rate), rate, hop) > 0).float().mean() < 0.02
    assert not pitch(torch.zeros(rate), rate, hop).any()
    constant = pitch(torch.full((rate,), 0.4), rate, hop)
    assert not constant[EDGE:-EDGE].any()  # silent, too, but for the steps at its ends
    assert not pitch(1e-4 * tone(120.0, rate), rate, hop).any()  # below SILENCE


def test_voiced_between_unvoiced() -> None:
    parts = [0.1 * noise(8000), tone(150.0, 16000), torch.zeros(8000)]
    f0 = pitch(torch.cat(parts), 16000, 160)  # (150,)
    assert not f0[: 50 - EDGE].any()
    assert (f0[50 + EDGE : 100 - EDGE] - 150).abs().max() < 0.1
    assert not f0[100 + EDGE :].any()


@pytest.mark.parametrize("gain", [0.05, 3.0, -1.0])
def test_gain_and_offset_do_not_change_it(gain: float) -> None:
    wav = tone(torch.linspace(100, 200, 8000, dtype=torch.double), 16000) + 0.02 * noise(8000)
    f0 = pitch(wav, 16000, 160)
    assert (f0 > 0).float().mean() > 0.9
    torch.testing.assert_close(pitch(gain * wav, 16000, 160), f0, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        pitch(wav + 0.1, 16000, 160)[EDGE:-EDGE], f0[EDGE:-EDGE], rtol=1e-3, atol=0
    )


def test_a_batch_is_its_single_items() -> None:
    rows = [tone(90.0, 16000), tone(200.0, 16000), noise(8000), torch.zeros(8000)]
    single = torch.stack([pitch(x, 16000, 160) for x in rows])
    batched = pitch(torch.stack(rows).view(2, 2, -1), 16000, 160)  # (2, 2, F)
    assert torch.equal(batched.view(4, -1), single)


def test_only_lowest_to_highest_is_found() -> None:
    for hz in (LOWEST + 2, HIGHEST - 5):
        assert (pitch(tone(hz, 16000), 16000, 160)[EDGE:-EDGE] - hz).abs().max() < 0.01 * hz
    f0 = pitch(tone(40.0, 16000, partials=1), 16000, 160)
    assert not f0[EDGE:-EDGE].any()


@pytest.mark.parametrize("samples", [0, 100, 159, 160, 161, 400])
def test_short_waves(samples: int) -> None:
    assert pitch(noise(samples), 16000, 160).shape == (samples // 160,)
    assert pitch(noise(2, samples), 16000, 160).shape == (2, samples // 160)


def test_the_path_keeps_to_the_octave_of_its_neighbours() -> None:
    """Frames 20 to 24 lose their odd partials: alone they are an octave higher."""
    hz = 110.0
    plain, even = tone(hz, 16000, 0.5), tone(2 * hz, 16000, 0.5)
    wav = plain.clone()
    wav[3200:4000] = even[3200:4000] + 0.1 * plain[3200:4000]
    f0 = pitch(wav, 16000, 160)[EDGE:-EDGE]
    assert (f0 - hz).abs().max() < 0.1 * hz


def test_best_path_is_the_cheapest_of_all() -> None:
    """Against every path that there is: 3 states, 5 frames."""
    g = torch.Generator().manual_seed(0)
    cost = torch.rand(4, 5, 3, generator=g)
    f0 = 100 + 200 * torch.rand(4, 5, 3, generator=g)
    f0[..., -1] = 0

    def price(row: int, path: tuple[int, ...]) -> float:
        total = sum(float(cost[row, f, s]) for f, s in enumerate(path))
        for f in range(1, 5):
            a, b = float(f0[row, f - 1, path[f - 1]]), float(f0[row, f, path[f]])
            total += SWITCH * ((a > 0) != (b > 0))
            total += LEAP * abs(math.log2(a / b)) if a and b else 0.0
        return total

    found = best_path(cost, f0).tolist()
    for row in range(4):
        cheapest = min(itertools.product(range(3), repeat=5), key=lambda path: price(row, path))
        assert tuple(found[row]) == cheapest
