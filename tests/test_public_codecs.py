"""public_codecs.py: tiny random EnCodec and Mimi, against transformers' own encode and decode."""

import builtins
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import speech

import audio
import common
import public_codecs

transformers = pytest.importorskip("transformers")
ENCODEC = dict(num_filters=4, hidden_size=16, codebook_dim=16, num_residual_layers=1)
MIMI = dict(
    num_filters=4, hidden_size=16, codebook_dim=8, vector_quantization_hidden_dimension=8,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    intermediate_size=16, num_quantizers=4, codebook_size=64, upsample_groups=16,
)  # fmt: skip


@pytest.fixture(params=["encodec", "encodec stereo", "mimi"])
def codec(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, dict[str, Any], int]:
    """Model, its folder, its argument for some bits a second that are not its default, the bits."""
    torch.manual_seed(0)
    argument: dict[str, Any]
    if request.param == "mimi":
        model = transformers.MimiModel(transformers.MimiConfig(**MIMI))
        argument, bits = {"num_quantizers": 3}, 225  # 12.5 Hz, 3 codes of 6 bits
    else:
        stereo = dict(
            audio_channels=2, normalize=True, chunk_length_s=0.5, overlap=0.01, sampling_rate=48000,
            target_bandwidths=[3.0, 6.0], use_causal_conv=False, norm_type="time_group_norm",
        )  # fmt: skip
        kind = stereo if "stereo" in request.param else {}
        model = transformers.EncodecModel(transformers.EncodecConfig(**ENCODEC, **kind))
        argument, bits = {"bandwidth": 6.0}, 6000
    for name, x in model.state_dict().items():  # random codebooks: else all codes are 0
        if "embed" in name:
            x.normal_()
    model.eval().save_pretrained(tmp_path / "codec")
    return model, tmp_path / "codec", argument, bits


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    (tmp_path / "in" / "a").mkdir(parents=True)
    audio.write(tmp_path / "in" / "a" / "one.wav", speech(0.7), 16000)
    audio.write(tmp_path / "in" / "two.wav", 0.5 * speech(0.4, 24000), 24000)

    def call(*argv: object) -> None:
        flags = ["--data", tmp_path / "in", "--out", tmp_path / "out", "--threads", 1, *argv]
        monkeypatch.setattr(sys, "argv", ["public_codecs.py", *map(str, flags)])
        common.run(public_codecs.main)

    return call


@pytest.mark.parametrize("ask", [False, True])
def test_what_comes_back_is_what_transformers_decodes(
    codec: tuple[Any, Path, dict[str, Any], int], ask: bool, call: Callable, tmp_path: Path
) -> None:
    model, folder, argument, bits = codec
    call("--model", folder, *(["--bits", bits] if ask else []))
    rate, channels = model.config.sampling_rate, model.config.audio_channels
    for name in ("a/one", "two"):
        wav = audio.read(tmp_path / "in" / f"{name}.wav", rate)
        found, own = audio.read_with_rate(tmp_path / "out" / f"{name}.wav")
        assert own == rate
        assert len(found) == len(wav)
        x = wav.expand(1, channels, -1).contiguous()
        with torch.inference_mode():
            codes = model.encode(x, torch.ones_like(x).bool(), **(argument if ask else {}))
            rest = {k: codes[k] for k in ("audio_scales", "last_frame_pad_length") if k in codes}
            wanted = model.decode(codes.audio_codes, **rest).audio_values[0].mean(0)[: len(wav)]
        assert wanted.std() > 0
        # one step of 16 bits, and 1e-4 for sums of fp32 in another order
        assert (found - wanted.clamp(-1, 1)).abs().max() < 1 / 32768 + 1e-4 * wanted.abs().max()


def test_bits_matter_and_a_second_run_makes_nothing_again(
    codec: tuple[Any, Path, dict[str, Any], int], call: Callable, tmp_path: Path
) -> None:
    _, folder, _, bits = codec
    call("--model", folder, "--bits", bits)
    first = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.wav")}
    assert len(first) == 2
    lost = tmp_path / "out" / "two.wav"
    lost.unlink()
    call("--model", folder)
    again = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.wav")}
    assert [p for p in first if again[p] != first[p]] == [lost]  # with other bits


def test_what_is_refused(
    codec: tuple[Any, Path, dict[str, Any], int], call: Callable, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refused(*argv: object) -> str:
        with pytest.raises(SystemExit) as e:
            call(*argv)
        assert e.value.code == 2
        return capsys.readouterr().err

    folder = codec[1]
    assert "--bits 1: this " in refused("--model", folder, "--bits", 1)
    assert "no such folder" in refused("--model", folder, "--data", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no recordings" in refused("--model", folder, "--data", tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "of type 'llama', wanted one of" in refused("--model", other)
    plain = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return plain(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install transformers" in refused("--model", folder)
