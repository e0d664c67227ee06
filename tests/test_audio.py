"""audio.py against the golden front-ends and librosa; file formats; every message."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

import audio

GOLDEN = Path(__file__).parent / "golden"
COSY = load_file(GOLDEN / "cosyvoice/mel.safetensors")
TASTE = load_file(GOLDEN / "taste/mel_frontend.safetensors")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# --- front-ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_mels", [80, 128])
def test_whisper_mel_is_the_public_one(n_mels: int) -> None:
    close(audio.whisper_mel(COSY["in.wav16k"], n_mels), COSY[f"out.whisper_logmel_{n_mels}"])
    filters = audio.mel_filters(16000, 400, n_mels)
    close(filters, COSY[f"aux.whisper_filters_{n_mels}"], 1e-6)


def test_whisper_mel_of_taste_is_padded_to_30_s() -> None:
    mel = audio.whisper_mel(TASTE["wav"], 128, pad_s=30).T  # (F, M)
    assert mel.shape == (3000, 128)
    close(mel[:230], TASTE["feats_first_230"])
    assert (mel[230:] - TASTE["tail_value"]).abs().max() < 1e-5
    close(audio.whisper_mel(TASTE["wav"], 128).T, TASTE["s3_logmel_no_padding"])


@pytest.mark.parametrize(("fmax", "name"), [(8000.0, "8000"), (None, "None")])
def test_vocoder_mel_is_the_public_one(fmax: float | None, name: str) -> None:
    close(audio.vocoder_mel(COSY["in.wav22k"], fmax), COSY[f"out.mel22k_fmax{name}"])


def test_vocoder_filters_and_resampling_are_the_public_ones() -> None:
    filters = audio.mel_filters(22050, 1024, 80, fmax=8000.0)
    close(filters, COSY["aux.mel22k_filters_fmax8000"], 1e-6)
    close(audio.resample(COSY["in.wav16k"], 16000, 22050)[:4000], COSY["aux.resample_16k_to_22k"])


def test_kaldi_fbank_is_the_public_one() -> None:
    fbank = audio.kaldi_fbank(COSY["in.wav16k"])
    assert (fbank - COSY["out.kaldi_fbank"]).abs().max() < 1e-3
    cmn = fbank - fbank.mean(0)
    assert (cmn - COSY["out.kaldi_fbank_cmn"]).abs().max() < 1e-3


@pytest.mark.parametrize(
    "args",
    [(16000, 400, 80, 0, 8000), (22050, 1024, 80, 0, 11025), (24000, 2048, 100, 30, 9999)],
    ids=str,
)
def test_filters_are_those_of_librosa(args: tuple[int, int, int, float, float]) -> None:
    librosa = pytest.importorskip("librosa")
    rate, n_fft, n_mels, fmin, fmax = args
    theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax)
    close(audio.mel_filters(*args), torch.tensor(theirs), 1e-6)


@pytest.mark.parametrize("size", [400, 479, 480, 481, 7777, 16000])
def test_front_ends_equal_librosa_at_other_lengths(size: int) -> None:
    librosa = pytest.importorskip("librosa")
    wav = noise(size, seed=size)
    mel = librosa.feature.melspectrogram(
        y=wav.numpy(), sr=16000, n_fft=400, hop_length=160, n_mels=80, pad_mode="reflect"
    )[:, : size // 160]
    log = np.log10(np.maximum(mel, 1e-10))
    close(audio.whisper_mel(wav), torch.tensor((np.maximum(log, log.max() - 8) + 4) / 4))


@pytest.mark.parametrize("size", [1, 100, 159, 160, 200, 201, 319, 320, 1599, 1601])
def test_frame_counts_down_to_one_sample(size: int) -> None:
    wav = noise(2, size)
    assert audio.whisper_mel(wav).shape == (2, 80, max(1, size // 160))
    assert audio.vocoder_mel(wav).shape == (2, 80, max(1, size // 256))
    assert audio.kaldi_fbank(wav[0]).shape == (1 + max(0, size - 400) // 160, 80)
    for mel in (audio.whisper_mel(wav), audio.vocoder_mel(wav), audio.kaldi_fbank(wav[0])):
        assert mel.isfinite().all()


def test_the_floor_is_per_utterance() -> None:
    loud, soft = noise(1600), noise(1600, seed=1) * 1e-6
    soft[800:] = 0
    batch = audio.whisper_mel(torch.stack([loud, soft]))
    torch.testing.assert_close(batch[0], audio.whisper_mel(loud), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch[1], audio.whisper_mel(soft), rtol=0, atol=1e-6)
    assert batch[1].min() < batch[0].min() - 1  # a floor of the batch would lift it


def test_a_padded_batch_holds_the_single_results() -> None:
    wavs = [noise(n, seed=n) for n in (1, 3333, 801)]
    mel, lengths = audio.whisper_mel_batch(wavs)
    assert lengths.tolist() == [1, 20, 5]
    for row, wav, n in zip(mel, wavs, lengths.tolist(), strict=True):
        torch.testing.assert_close(row[:, :n], audio.whisper_mel(wav), rtol=0, atol=0)
        assert (row[:, n:] == 0).all()


@pytest.mark.parametrize("front_end", [audio.whisper_mel, audio.vocoder_mel])
def test_leading_axes_are_kept(front_end: Callable[[Tensor], Tensor]) -> None:
    wav = noise(2, 3, 1000)
    mel = front_end(wav)
    assert mel.shape[:3] == (2, 3, 80)
    torch.testing.assert_close(mel[1, 2], front_end(wav[1, 2]), rtol=0, atol=1e-5)


def test_padding_to_30_s_cuts_longer_audio() -> None:
    wav = noise(16000)
    torch.testing.assert_close(
        audio.whisper_mel(wav, pad_s=0.5), audio.whisper_mel(wav[:8000]), rtol=0, atol=0
    )


def test_vocoder_mel_has_gradients_also_at_silence() -> None:
    wav = noise(1, 600).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: audio.vocoder_mel(x)[:, ::20], wav, atol=1e-4)
    silence = torch.zeros(1000, requires_grad=True)
    audio.vocoder_mel(silence).sum().backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


def test_autocast_and_half_input_do_not_make_mels_coarse() -> None:
    wav = noise(4000)
    plain = audio.whisper_mel(wav), audio.vocoder_mel(wav), audio.kaldi_fbank(wav)
    with torch.autocast("cpu", torch.bfloat16):
        cast = audio.whisper_mel(wav), audio.vocoder_mel(wav), audio.kaldi_fbank(wav)
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert audio.vocoder_mel(wav.bfloat16()).dtype == torch.float32


def test_a_cache_filled_by_inference_serves_training() -> None:
    audio.mel_filters.cache_clear()
    audio._hann.cache_clear()
    with torch.inference_mode():
        audio.vocoder_mel(noise(1000), 7000.0)
    wav = noise(1000).requires_grad_()
    audio.vocoder_mel(wav, 7000.0).sum().backward()
    assert wav.grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: audio.whisper_mel(torch.zeros(0)), r"S > 0, got \[0\]"),
        (lambda: audio.vocoder_mel(torch.tensor(1.0)), r"got \[\]"),
        (lambda: audio.kaldi_fbank(torch.zeros(1, 500)), r"one utterance.*\[1, 500\]"),
        (lambda: audio.whisper_mel_batch([]), "at least one"),
        (lambda: audio.mel_filters(16000, 400, 80, fmax=9000.0), "<= 8000 Hz.*fmax=9000"),
        (lambda: audio.resample(torch.zeros(9), 0, 16000), "got 0 -> 16000"),
        (lambda: audio.resample(torch.zeros(9), 22051, 16000), "common divisor"),
    ],
)
def test_messages_of_the_front_ends(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_16", 4e-5),
        ("a.wav", "PCM_24", 2e-7),
        ("a.wav", "PCM_U8", 1e-2),
        ("a.wav", "FLOAT", 1e-7),
        ("a.wav", "DOUBLE", 1e-7),
        ("a.flac", "PCM_16", 4e-5),
        ("a.flac", "PCM_24", 2e-7),
        ("a.ogg", "VORBIS", 0.05),
        ("a.mp3", "MPEG_LAYER_III", 0.05),
        ("a.raw", "PCM_16", 4e-5),  # a wav behind a misleading name
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_reads_formats(
    tmp_path: Path, name: str, subtype: str, tolerance: float, channels: int
) -> None:
    time = torch.arange(24000) / 24000
    data = torch.stack([torch.sin(2 * torch.pi * f * time) / 2 for f in (300, 700)[:channels]], 1)
    kind = {"raw": "WAV"}.get(name[2:], name[2:].upper())
    soundfile.write(tmp_path / name, data.numpy(), 24000, format=kind, subtype=subtype)
    wav, rate = audio.read_with_rate(tmp_path / name)
    assert (wav.dtype, rate, wav.shape) == (torch.float32, 24000, (24000,))
    assert (wav - data.mean(1)).abs().max() < tolerance


def test_reads_eight_channels_as_their_mean(tmp_path: Path) -> None:
    data = noise(500, 8)
    soundfile.write(tmp_path / "a.wav", data.numpy(), 16000, subtype="FLOAT")
    torch.testing.assert_close(audio.read(tmp_path / "a.wav"), data.mean(1))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_reads_at_the_rate_that_is_asked_for(tmp_path: Path, rate: int) -> None:
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate) / 2
    soundfile.write(tmp_path / "a.wav", tone.numpy(), rate, subtype="FLOAT")
    wav = audio.read(str(tmp_path / "a.wav"))
    assert wav.shape == (16000,)
    wanted = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000) / 2
    assert (wav - wanted)[200:-200].abs().max() < 5e-3
    assert audio.read(tmp_path / "a.wav", None).shape == (rate,)


def test_one_sample_is_a_file(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", torch.tensor([0.5]), 16000)
    assert audio.read(tmp_path / "a.wav").tolist() == [0.5]
    assert audio.read(tmp_path / "a.wav", 48000).shape == (3,)


def test_sixteen_bits_survive_reading_and_writing(tmp_path: Path) -> None:
    pcm = np.arange(-(2**15), 2**15, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", pcm, 16000, subtype="PCM_16")
    audio.write(tmp_path / "b.wav", audio.read(tmp_path / "a.wav"), 16000)
    assert soundfile.info(tmp_path / "b.wav").subtype == "PCM_16"
    again, rate = soundfile.read(tmp_path / "b.wav", dtype="int16")
    assert rate == 16000
    assert (again == pcm).all()


def test_write_clips_and_detaches(tmp_path: Path) -> None:
    wav = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], requires_grad=True)
    audio.write(tmp_path / "a.wav", wav, 22050)
    back = audio.read(tmp_path / "a.wav", None)
    torch.testing.assert_close(back, wav.detach().clamp(-1, 1), rtol=0, atol=4e-5)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"hello, this is text\n" * 50], ids=len)
def test_read_refuses_what_is_not_audio(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.wav: not audio"):
        audio.read(tmp_path / "a.wav")


def test_read_refuses_missing_folder_empty_and_not_finite(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.wav: no such audio file"):
        audio.read(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="is a folder"):
        audio.read(tmp_path)
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(ValueError, match="holds no samples"):
        audio.read(tmp_path / "a.wav")
    for bad in (np.nan, np.inf):
        soundfile.write(tmp_path / "b.wav", np.array([0, bad]), 16000, subtype="FLOAT")
        with pytest.raises(ValueError, match=r"b\.wav: holds samples that are NaN or infinite"):
            audio.read(tmp_path / "b.wav")


def test_write_refuses_and_leaves_nothing_behind(tmp_path: Path) -> None:
    wav = torch.zeros(9)
    with pytest.raises(ValueError, match="NaN"):
        audio.write(tmp_path / "a.wav", torch.tensor([0.0, torch.nan]), 16000)
    with pytest.raises(ValueError, match=r"got \[1, 9\]"):
        audio.write(tmp_path / "a.wav", wav[None], 16000)
    with pytest.raises(ValueError, match=r"got \[0\]"):
        audio.write(tmp_path / "a.wav", wav[:0], 16000)
    with pytest.raises(ValueError, match=r"only \.wav"):
        audio.write(tmp_path / "a.mp3", wav, 16000)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        audio.write(tmp_path / "no" / "a.wav", wav, 16000)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(OSError, match=r"folder\.wav: cannot be written"):
        audio.write(tmp_path / "folder.wav", wav, 16000)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder.wav"]


@pytest.mark.parametrize("broken", [(Path, "write_bytes"), (audio.os, "replace")], ids=str)
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[object, str]
) -> None:
    audio.write(tmp_path / "a.wav", torch.full((5,), 0.25), 16000)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*broken, full_disk)
    with pytest.raises(OSError, match=r"a\.wav: cannot be written \(No space left"):
        audio.write(tmp_path / "a.wav", torch.zeros(5), 16000)
    monkeypatch.undo()
    assert audio.read(tmp_path / "a.wav").tolist() == [0.25] * 5
    assert len(list(tmp_path.iterdir())) == 1


def test_a_growing_wav_is_whole_after_each_write(tmp_path: Path) -> None:
    wav, path = torch.rand(900) * 2 - 1, tmp_path / "a.wav"
    with open(path, "wb") as file:
        out = audio.WavStream(file, 22050)
        for first in (0, 300, 600):
            out.write(wav[first : first + 300])
            heard, rate = audio.read_with_rate(path)
            assert rate == 22050
            assert len(heard) == first + 300
    audio.write(tmp_path / "b.wav", wav, 22050)
    assert path.read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_wav_in_a_pipe_has_no_length_and_can_be_read(tmp_path: Path) -> None:
    wav, buffer = torch.rand(900) * 2 - 1, io.BytesIO()
    out = audio.WavStream(buffer, 22050, pipe=True)
    for first in (0, 300, 600):
        out.write(wav[first : first + 300])
    audio.write(tmp_path / "b.wav", wav, 22050)
    assert buffer.getvalue()[44:] == (tmp_path / "b.wav").read_bytes()[44:]
    assert buffer.getvalue()[40:44] == b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(buffer.getvalue())
    assert torch.equal(audio.read(tmp_path / "a.wav", None), audio.read(tmp_path / "b.wav", None))
    with pytest.raises(ValueError, match="NaN or infinite"):
        out.write(torch.full((5,), math.nan))


def test_crossfade_goes_on_without_a_jump() -> None:
    tone = torch.sin(torch.arange(1000.0) / 9)
    fade = audio.Crossfade(50)
    pieces = [fade.push(tone[:400]), fade.push(tone[350:700]), fade.push(tone[650:]), fade.held]
    assert [len(piece) for piece in pieces] == [350, 300, 300, 50]  # at once all but the overlap
    torch.testing.assert_close(torch.cat(pieces), tone, rtol=0, atol=1e-6)
    step = audio.Crossfade(50)
    joined = torch.cat([step.push(torch.ones(100)), step.push(-torch.ones(100)), step.held])
    assert joined[:50].eq(1).all()
    assert joined[-50:].eq(-1).all()
    assert joined.diff().abs().max() < 0.07  # 2 in one step, if it were cut
