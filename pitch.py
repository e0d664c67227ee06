"""Fundamental frequency and voicing by YIN, batched over frames.

    d(t)  = sum_{j<W} (x_j - x_{j+t})^2                 difference function at lag t, by FFT
    d'(t) = d(t) t / sum_{i<=t} d(i)                    cumulative mean normalized difference
    F0    = rate / t*,  t* = first local minimum of d' below FIRST; none: the lowest minimum, if it
            is below VOICED; none: unvoiced, F0 = 0

    wav (..., S) --frames--> (..., F, W + lags) --d'--> (..., F, lags) --first dip--> f0 (..., F) Hz

Frame f is centred on sample f * hop, as in the mel front-ends of audio.py.
[de Cheveigne & Kawahara 2002, JASA 111(4), steps 2 to 5]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST, HIGHEST = 60.0, 420.0  # Hz, the range that is searched
WINDOW_S = 0.030  # seconds of signal that d(t) sums over
FIRST, VOICED = 0.2, 0.5  # of d', between 0 (periodic) and about 1 (noise)
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
    low = torch.where(dip, d, torch.inf)  # (..., F, lags)
    first, lowest = (low < FIRST).int().argmax(-1), low.argmin(-1)  # (..., F) lags
    best = torch.where((low < FIRST).any(-1), first, lowest).clamp(1, lags - 2)[..., None]
    left, mid, right = (d.gather(-1, best + i) for i in (-1, 0, 1))
    shift = 0.5 * (left - right) / (left - 2 * mid + right).clamp(min=1e-9)  # vertex of a parabola
    f0 = rate / (best + shift.clamp(-0.5, 0.5))
    voiced = (low.amin(-1, keepdim=True) < VOICED) & (
        frames.square().mean(-1, keepdim=True).sqrt() > SILENCE
    )
    return median3((f0 * voiced).squeeze(-1))  # (..., F)


def median3(x: Tensor) -> Tensor:
    """x (..., F): median of each value and its two neighbours, which removes single outliers."""
    if x.shape[-1] < 3:
        return x
    padded = torch.cat([x[..., :1], x, x[..., -1:]], -1)
    return padded.unfold(-1, 3, 1).median(-1).values


if __name__ == "__main__":
    rate, hop = 16000, 160
    hz = torch.linspace(100, 200, rate)  # a second of glide
    phase = (hz / rate).cumsum(0)
    tone = sum(torch.sin(2 * torch.pi * k * phase) / k for k in range(1, 6))
    f0 = pitch(torch.as_tensor(tone), rate, hop)
    print(
        f"glide 100 -> 200 Hz: frames {f0.shape[0]}, f0 at 0.25/0.5/0.75 s: {f0[25::25].tolist()}"
    )
