"""Sound in and out: wav files, resampling, and the three log-mel front-ends of the public systems.

    whisper_mel   log10 power,   Slaney mel, centred frames,    16 kHz, 100 Hz  (TASTE, S3 units)
    vocoder_mel   ln amplitude,  Slaney mel, frames not centred, 22.05 kHz      (flow, HiFT)
    kaldi_fbank   ln power,      HTK mel, whole frames only,     16 kHz         (CAM++)

    file --read--> wav (S,) in [-1, 1] --resample--> wav (S',) --*_mel--> (M, F)
                                                         '-----kaldi_fbank--> (F, M)

Everything runs in fp32 (fp64 if given), also under autocast: a log of a bf16 power is too coarse.
[Radford et al. 2022, arXiv:2212.04356, sec. 2.2; Kong et al. 2020, arXiv:2010.05646, sec. 3]
"""

import io
import math
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F
from torchaudio.compliance import kaldi

WHISPER_RATE = 16000  # Hz
WHISPER_FFT = 400  # samples, 25 ms; the window has the same length
WHISPER_HOP = 160  # samples, 10 ms
WHISPER_FLOOR = 1e-10  # of the power, before log10
WHISPER_RANGE = 8.0  # log10 units that an utterance keeps below its loudest bin: 80 dB
WHISPER_PAD_S = 30.0  # seconds, what Whisper and TASTE pad to; S3 units do not

VOCODER_RATE = 22050  # Hz
VOCODER_FFT = 1024  # samples, 46 ms; the window has the same length
VOCODER_HOP = 256  # samples, 11.6 ms
VOCODER_MELS = 80
VOCODER_EPS = 1e-9  # of the power, inside the root: keeps the gradient finite at silence
VOCODER_FLOOR = 1e-5  # of the mel amplitude, before ln

KALDI_FRAME = 400  # samples, 25 ms at 16 kHz
KALDI_MELS = 80

MAX_KERNEL = 10**8  # taps of a resampling kernel; 44.1 kHz -> 16 kHz needs 75 thousand


def read_with_rate(path: str | Path) -> tuple[Tensor, int]:
    """wav, flac, ogg or mp3 -> mono wav (S,) float32 (mean of the channels), its rate in Hz.

    FileNotFoundError: no such file. ValueError: a folder, not audio, empty, not finite."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected one audio file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file")
    try:  # from memory: by name, libsndfile would take a .raw file for headerless samples
        data, rate = soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as e:
        why = getattr(e, "error_string", e)  # without the address of an object, as in str(e)
        raise ValueError(
            f"{path}: not audio that can be read: wav, flac, ogg or mp3 ({why})"
        ) from e
    if len(data) == 0:
        raise ValueError(f"{path}: holds no samples")
    if not np.isfinite(data).all():
        raise ValueError(f"{path}: holds samples that are NaN or infinite; write the file anew")
    return torch.from_numpy(data.mean(axis=1)), int(rate)  # (S, channels) -> (S,)


def read(path: str | Path, rate: int | None = WHISPER_RATE) -> Tensor:
    """An audio file -> mono wav (S,) float32 at `rate` Hz; None keeps the rate of the file.

    Errors as in read_with_rate."""
    wav, own = read_with_rate(path)
    return wav if rate is None else resample(wav, own, rate)


def write(path: str | Path, wav: Tensor, rate: int) -> None:
    """wav (S,) -> a mono 16-bit .wav file, clipped to [-1, 1], completely or not at all.

    ValueError: not (S,), empty, not finite, not a .wav name. OSError: the folder is missing or
    cannot be written to. A file that `read` returned is written back to the bit if it had 16."""
    path = Path(path)
    if path.suffix.lower() != ".wav":
        raise ValueError(f"{path}: only .wav files are written, give a name that ends in .wav")
    if wav.ndim != 1 or len(wav) == 0:
        raise ValueError(f"{path}: expected samples of shape (S,), S > 0, got {[*wav.shape]}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist, make it first")
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm16(wav, str(path)), rate, format="WAV", subtype="PCM_16")
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")
    try:
        partial.write_bytes(buffer.getvalue())
        os.replace(partial, path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({e.strerror})") from e


def pcm16(wav: Tensor, name: str) -> np.ndarray:
    """wav (S,) -> int16, clipped to [-1, 1]; NaN or infinite values: ValueError."""
    if not wav.isfinite().all():
        raise ValueError(f"{name}: not written, the samples hold NaN or infinite values")
    pcm = (wav.detach().cpu().float() * 2**15).round().clamp(-(2**15), 2**15 - 1)
    return pcm.numpy().astype("<i2")


class WavStream:
    """A mono 16-bit .wav that is whole after each write, whatever happens next.

    On a pipe the header cannot be corrected later: it says that the length is unknown, as other
    programs write it and players take it."""

    UNKNOWN = 2**32 - 1

    def __init__(self, file: BinaryIO, rate: int, pipe: bool = False) -> None:
        self.file, self.rate, self.pipe, self.samples = file, rate, pipe, 0
        file.write(self.header())

    def header(self) -> bytes:
        size = self.UNKNOWN if self.pipe else 2 * self.samples
        kind = struct.pack("<IHHIIHH", 16, 1, 1, self.rate, 2 * self.rate, 2, 16)
        whole = struct.pack("<I", min(36 + size, self.UNKNOWN))
        return b"RIFF" + whole + b"WAVEfmt " + kind + b"data" + struct.pack("<I", size)

    def write(self, wav: Tensor) -> None:
        """Append wav (S,), and hand it on to whoever reads."""
        self.file.write(pcm16(wav, "the stream").tobytes())
        self.file.flush()
        self.samples += len(wav)
        if not self.pipe:
            self.file.seek(0)
            self.file.write(self.header())
            self.file.seek(0, os.SEEK_END)
            self.file.flush()


class Crossfade:
    """Waves that come one by one -> one sound without clicks: the last samples of each are faded
    into the first of the next."""

    def __init__(self, overlap: int) -> None:
        """overlap: samples, of which every wave must have as many at least."""
        self.overlap, self.rise = overlap, torch.linspace(0, math.pi / 2, overlap).sin() ** 2
        self.held = torch.zeros(0)

    def push(self, wav: Tensor) -> Tensor:
        """The next wav (S,) -> what is certain by now; the rest is held back."""
        if len(self.held):
            mixed = self.held * self.rise.flip(0) + wav[: self.overlap] * self.rise
            wav = torch.cat([mixed, wav[self.overlap :]])
        self.held = wav[-self.overlap :]
        return wav[: -self.overlap]


def resample(wav: Tensor, source: int, target: int) -> Tensor:
    """wav (..., S) at `source` Hz -> (..., ceil(S * target / source)) at `target` Hz.

    Windowed sinc (Hann, 6 zero crossings, roll-off 0.99), as the public systems use it."""
    if source < 1 or target < 1:
        raise ValueError(f"rates are positive numbers of Hz, got {source} -> {target}")
    if source == target:
        return wav
    up, down = target // math.gcd(source, target), source // math.gcd(source, target)
    if up * down > MAX_KERNEL:
        raise ValueError(
            f"{source} -> {target} Hz: the rates have too small a common divisor to resample in "
            "one step; convert the audio to a usual rate such as 16000 Hz first"
        )
    return torchaudio.functional.resample(wav, source, target)  # (..., S')


@lru_cache(maxsize=64)
def mel_filters(
    rate: int,
    n_fft: int,
    n_mels: int,
    fmin: float = 0.0,
    fmax: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """(n_mels, n_fft // 2 + 1): triangles on Slaney's scale with unit area; fmax None: rate / 2.

    Cached: do not write into it. The scale is linear below 1 kHz and logarithmic above."""
    fmax = rate / 2 if fmax is None else fmax
    if n_mels < 1 or not 0 <= fmin < fmax <= rate / 2:
        raise ValueError(
            f"expected n_mels > 0 and 0 <= fmin < fmax <= {rate / 2:g} Hz, "
            f"got n_mels={n_mels}, fmin={fmin}, fmax={fmax}"
        )
    mels = np.linspace(_to_mel(fmin), _to_mel(fmax), n_mels + 2)
    hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft  # Hz
    left, centre, right = hz[:-2, None], hz[1:-1, None], hz[2:, None]  # (M, 1)
    rise, fall = (bins - left) / (centre - left), (right - bins) / (right - centre)
    filters = np.maximum(0, np.minimum(rise, fall)) * 2 / (right - left)  # (M, bins)
    with torch.inference_mode(False):  # else a cache filled by inference breaks training
        return torch.tensor(filters, dtype=dtype, device=device)


def _to_mel(hz: float) -> float:
    """Slaney: 200/3 Hz per mel up to 1 kHz, that is mel 15; then 27 mels per factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


@lru_cache(maxsize=16)
def _hann(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.hann_window(size, dtype=dtype, device=device)  # periodic


def _rows(wav: Tensor, shortest: int) -> Tensor:
    """(..., S) -> (B, S) in fp32 or fp64, zeros appended up to the length that reflection needs."""
    if wav.ndim == 0 or wav.shape[-1] == 0:
        raise ValueError(f"expected samples of shape (..., S), S > 0, got {[*wav.shape]}")
    wav = wav if wav.dtype == torch.float64 else wav.float()
    return F.pad(wav.reshape(-1, wav.shape[-1]), (0, max(0, shortest - wav.shape[-1])))


def whisper_mel(wav: Tensor, n_mels: int = 80, pad_s: float | None = None) -> Tensor:
    """wav (..., S) at 16 kHz -> (..., n_mels, F), F = max(1, S // 160), about -1 .. 1.5.

    pad_s: zero-pad or cut to that many seconds first; Whisper and TASTE use 30, S3 units None.
    The floor is 8 below the maximum of each utterance, never of the batch. Up to 200 samples are
    too few to reflect at the ends, so zeros follow them. Rows of a padded batch differ from single
    ones at their ends, see whisper_mel_batch."""
    if pad_s is not None:
        size = round(pad_s * WHISPER_RATE)
        wav = F.pad(wav[..., :size], (0, max(0, size - wav.shape[-1])))  # (..., size)
    rows = _rows(wav, WHISPER_FFT // 2 + 1)
    with torch.autocast(rows.device.type, enabled=False):
        window = _hann(WHISPER_FFT, rows.dtype, rows.device)
        spectrum = torch.stft(
            rows, WHISPER_FFT, WHISPER_HOP, window=window, pad_mode="reflect", return_complex=True
        )[..., :-1]  # (B, 201, F)
        power = spectrum.real**2 + spectrum.imag**2
        filters = mel_filters(
            WHISPER_RATE, WHISPER_FFT, n_mels, dtype=rows.dtype, device=rows.device
        )
        log = (filters @ power).clamp(min=WHISPER_FLOOR).log10()  # (B, M, F)
        log = log.maximum(log.amax((-2, -1), keepdim=True) - WHISPER_RANGE)
    return ((log + 4) / 4).reshape(*wav.shape[:-1], n_mels, -1)  # (..., M, F)


def whisper_mel_batch(wavs: list[Tensor], n_mels: int = 80) -> tuple[Tensor, Tensor]:
    """wavs (S_i,) at 16 kHz -> mel (B, M, F), lengths (B,): each row as alone, then 0.0."""
    if not wavs:
        raise ValueError("expected at least one utterance, got an empty list")
    mels = [whisper_mel(wav, n_mels) for wav in wavs]
    lengths = torch.tensor([mel.shape[-1] for mel in mels])
    longest = int(lengths.max())
    batch = torch.stack([F.pad(mel, (0, longest - mel.shape[-1])) for mel in mels])  # (B, M, F)
    return batch, lengths.to(batch.device)


def vocoder_mel(wav: Tensor, fmax: float | None = 8000.0) -> Tensor:
    """wav (..., S) at 22.05 kHz -> (..., 80, F), F = max(1, S // 256), natural log, >= -11.52.

    Differentiable. fmax 8000 Hz is what flow and HiFT read, None (11025 Hz) what HiFT's training
    loss compares. Up to 384 samples are too few to reflect at the ends, so zeros follow them."""
    pad = (VOCODER_FFT - VOCODER_HOP) // 2
    rows = _rows(wav, pad + 1)
    with torch.autocast(rows.device.type, enabled=False):
        window = _hann(VOCODER_FFT, rows.dtype, rows.device)
        rows = F.pad(rows, (pad, pad), mode="reflect")  # (B, S + 768)
        spectrum = torch.stft(
            rows, VOCODER_FFT, VOCODER_HOP, window=window, center=False, return_complex=True
        )  # (B, 513, F)
        amplitude = (spectrum.real**2 + spectrum.imag**2 + VOCODER_EPS).sqrt()
        filters = mel_filters(
            VOCODER_RATE, VOCODER_FFT, VOCODER_MELS, 0.0, fmax, rows.dtype, rows.device
        )
        log = (filters @ amplitude).clamp(min=VOCODER_FLOOR).log()  # (B, 80, F)
    return log.reshape(*wav.shape[:-1], VOCODER_MELS, -1)  # (..., 80, F)


def kaldi_fbank(wav: Tensor) -> Tensor:
    """wav (S,) at 16 kHz, not scaled to int16 -> (F, 80), F = 1 + (S - 400) // 160, natural log.

    No mean is subtracted here: speaker.py subtracts the mean over time. Fewer than 400 samples
    get zeros appended up to one frame."""
    if wav.ndim != 1:
        raise ValueError(f"expected one utterance of shape (S,), got {[*wav.shape]}")
    rows = _rows(wav, KALDI_FRAME)  # (1, S)
    with torch.autocast(rows.device.type, enabled=False):
        return kaldi.fbank(
            rows, num_mel_bins=KALDI_MELS, sample_frequency=WHISPER_RATE, dither=0.0
        )  # (F, 80)


if __name__ == "__main__":
    tone = torch.sin(2 * math.pi * 440 * torch.arange(VOCODER_RATE) / VOCODER_RATE)  # 1 s
    wav = resample(tone, VOCODER_RATE, WHISPER_RATE)
    print("wav", [*tone.shape], "at 22.05 kHz ->", [*wav.shape], "at 16 kHz, 0 parameters")
    print("whisper_mel", [*whisper_mel(wav).shape], "or", [*whisper_mel(wav, 128, pad_s=30).shape])
    print("vocoder_mel", [*vocoder_mel(tone).shape], "kaldi_fbank", [*kaldi_fbank(wav).shape])
