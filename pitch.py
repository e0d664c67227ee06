"""Fundamental frequency and voicing: YIN's difference function, the best path through its dips.

    d(t)  = sum_{j<W} (x_j - x_{j+t})^2                 difference function at lag t, by FFT
    d'(t) = d(t) t / sum_{i<=t} d(i)                    cumulative mean normalized difference
    path  = argmin sum_f  cost(s_f) + step(s_{f-1}, s_f)    Viterbi; s_f: a dip of d', or unvoiced
    F0    = rate / t*, the vertex of a parabola through the dip

    wav (..., S) --frames--> (..., F, W + lags) --d'--> (..., F, lags) --dips--> (..., F, K + 1)
                 --path--> f0 (..., F) Hz, 0 where unvoiced

A frame alone often fits the octave below or above as well; the path keeps to its neighbours'.
Frame f is centred on sample f * hop, as in the mel front-ends of audio.py.
[de Cheveigne & Kawahara 2002, JASA 111(4), steps 2, 3, 5; a path instead of the threshold of step 4
as in pYIN: Mauch & Dixon 2014]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST, HIGHEST = 60.0, 420.0  # Hz, the range that is searched
WINDOW_S = 0.030  # seconds of signal that d(t) sums over
DIPS = 8  # K, the lowest of a frame that are followed
UNVOICED = 0.6  # cost of an unvoiced frame; of a voiced one: d', 0 (periodic) to about 1 (noise)
SWITCH = 0.4  # of a step between voiced and unvoiced; cheap switches would be a way round a leap
LEAP = 2.0  # of a step by an octave
OCTAVE = 0.05  # of a dip, for each octave below HIGHEST: multiples of a period fit as well
SILENCE = 1e-3  # root mean square below which a frame is unvoiced; full scale is 1


def difference(frames: Tensor, window: int, lags: int) -> Tensor:
    """frames (..., window + lags) -> d' (..., lags), normalized difference at lags 0 .. lags-1."""
    n = 1 << (2 * window + lags - 1).bit_length()
    head = torch.fft.rfft(frames[..., :window], n)
    corr = torch.fft.irfft(torch.fft.rfft(frames, n) * head.conj(), n)[..., :lags]  # (..., lags)
    power = F.pad(frames.double().square().cumsum(-1), (1, 0))
    energy = (power[..., window : window + lags] - power[..., :lags]).float()  # (..., lags)
    d = (energy[..., :1] + energy - 2 * corr).clamp(min=0)
    d[..., 0] = 0
    lag = torch.arange(lags, device=d.device)
    return torch.where(lag == 0, 1.0, d * lag / d.cumsum(-1).clamp(min=1e-9))


def pitch(wav: Tensor, rate: int, hop: int) -> Tensor:
    """wav (..., S) -> f0 (..., S // hop) in Hz, 0 where unvoiced. rate in Hz, hop in samples."""
    window, lags = round(WINDOW_S * rate), int(rate / LOWEST) + 2
    size = window + lags
    n = wav.shape[-1] // hop
    if n == 0 or wav.numel() == 0:  # an FFT of no frames is an error
        return wav.new_zeros(*wav.shape[:-1], n, dtype=torch.float)
    padded = F.pad(wav.float(), (size // 2, size))  # frame f starts size // 2 before its centre
    frames = padded.unfold(-1, size, hop)[..., :n, :]  # (..., F, size)
    frames = frames - frames.mean(-1, keepdim=True)
    d = difference(frames, window, lags)  # (..., F, lags)
    dip = torch.zeros_like(d, dtype=torch.bool)
    dip[..., 1:-1] = (d[..., 1:-1] < d[..., :-2]) & (d[..., 1:-1] <= d[..., 2:])
    dip[..., : int(rate / HIGHEST)] = False
    dip &= frames.square().mean(-1, keepdim=True).sqrt() > SILENCE
    depth, lag = torch.where(dip, d, torch.inf).topk(DIPS, -1, largest=False)  # (..., F, K)
    lag = lag.clamp(1, lags - 2)
    left, mid, right = (d.gather(-1, lag + i) for i in (-1, 0, 1))
    shift = 0.5 * (left - right) / (left - 2 * mid + right).clamp(min=1e-9)  # vertex of a parabola
    f0 = rate / (lag + shift.clamp(-0.5, 0.5))  # (..., F, K)
    cost = depth + OCTAVE * (HIGHEST / f0).log2()
    f0, cost = F.pad(f0, (0, 1)), F.pad(cost, (0, 1), value=UNVOICED)  # the last state: unvoiced
    chosen = best_path(*(x.reshape(-1, n, DIPS + 1) for x in (cost, f0)))  # (B, F)
    return f0.gather(-1, chosen.view(*f0.shape[:-1], 1)).squeeze(-1)  # (..., F)


def best_path(cost: Tensor, f0: Tensor) -> Tensor:
    """cost, f0 (B, F, K) of the states of each frame, f0 0: unvoiced -> cheapest states (B, F)."""
    voiced, octave = f0 > 0, f0.clamp(min=1).log2()  # (B, F, K)
    total, back = cost[:, 0], []  # (B, K)
    for f in range(1, cost.shape[1]):
        both = voiced[:, f - 1, :, None] & voiced[:, f, None]  # (B, K before, K now)
        change = voiced[:, f - 1, :, None] != voiced[:, f, None]
        leap = (octave[:, f - 1, :, None] - octave[:, f, None]).abs()
        total, came = (total[..., None] + LEAP * leap * both + SWITCH * change).min(1)  # (B, K)
        total = total + cost[:, f]
        back.append(came)
    state = [total.argmin(-1, keepdim=True)]  # (B, 1), from the last frame to the first
    for came in reversed(back):
        state.append(came.gather(-1, state[-1]))
    return torch.cat(state[::-1], -1)


if __name__ == "__main__":
    rate, hop = 16000, 160
    hz = torch.linspace(100, 200, rate)  # a second of glide
    phase = (hz / rate).cumsum(0)
    tone = sum(torch.sin(2 * torch.pi * k * phase) / k for k in range(1, 6))
    f0 = pitch(torch.as_tensor(tone), rate, hop)
    print(
        f"glide 100 -> 200 Hz: frames {f0.shape[0]}, f0 at 0.25/0.5/0.75 s: {f0[25::25].tolist()}"
    )
