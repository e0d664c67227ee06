"""The presets on public folders with random weights: features, three steps, codes, three more.

At a toy size; slow: at their full size.

    SPEECH=LibriSpeech/ python -m pytest -m slow tests/test_full_training.py -s

Needs 8 GB of disk and 14 GB of memory. Without SPEECH, a LibriSpeech folder, the speech is a buzz.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import ROOT, speech
from safetensors.torch import save_file
from test_full_size import LLAMA, WHISPER, save_tokenizer

from s3_units import S3Config, S3Units
from speaker import TINY as SPEAKER
from speaker import CAMPlus, CAMPlusConfig
from weights import save_model

SIZES = {  # whisper and LM, as their config.json says it
    "full": (dict(d_model=1280, encoder_layers=32, decoder_layers=2, encoder_attention_heads=20,
                  decoder_attention_heads=20, encoder_ffn_dim=5120, decoder_ffn_dim=5120,
                  num_mel_bins=128, vocab_size=51866),
             dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                  num_key_value_heads=8, intermediate_size=8192, vocab_size=128256)),
    "small": (dict(d_model=768, encoder_layers=12, decoder_layers=12, encoder_attention_heads=12,
                   decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
                   num_mel_bins=80, vocab_size=51865),
              dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                   num_key_value_heads=3, intermediate_size=1536, vocab_size=49152)),
    "toy": (dict(d_model=64, encoder_layers=4, decoder_layers=3, encoder_attention_heads=1,
                 decoder_attention_heads=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
                 num_mel_bins=80, vocab_size=51866),
            dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1,
                 num_key_value_heads=1, intermediate_size=64, vocab_size=512)),
}  # fmt: skip


def bundle(folder: Path, size: str) -> Path:
    """Public folders as they are downloaded, and `s3` and `speaker` as --convert writes them."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    whisper, llama = SIZES[size]
    lm = hf.LlamaConfig(**llama, tie_word_embeddings=True, bos_token_id=0)
    asr = hf.WhisperConfig(**whisper)
    kinds = [("asr", hf.WhisperForConditionalGeneration, asr, torch.float16, WHISPER),
             ("lm", hf.LlamaForCausalLM, lm, torch.bfloat16, LLAMA)]  # fmt: skip
    for name, cls, config, dtype, special in kinds:
        with torch.device("meta"):
            shapes = cls(config).state_dict()
        state = {
            k: torch.empty(v.shape, dtype=dtype).normal_(std=0.02)
            for k, v in shapes.items()
            if k not in ("proj_out.weight", "lm_head.weight")
        }
        save_tokenizer(folder / name, special if max(special) < config.vocab_size else {})
        save_file(state, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config.to_dict()))
    toy = size == "toy"
    s3 = S3Config(width=64, heads=1, layers=1, ffn=64, codes=512) if toy else S3Config()
    voice = SPEAKER if toy else CAMPlusConfig()
    save_model(folder / "s3", S3Units(s3), s3, torch.float16)
    save_model(folder / "speaker", CAMPlus(voice), voice, torch.float16)
    return folder


def librispeech(folder: Path, count: int = 3) -> Path:
    """Utterances of up to 8 s: of SPEECH, or a buzz."""
    given = os.environ.get("SPEECH")
    names = sorted(Path(given).rglob("*.flac"))[:count] if given else []
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        wav, rate = soundfile.read(names[i]) if names else (speech(4.0 + i % 3 / 2).numpy(), 16000)
        soundfile.write(folder / f"1-1-{i:04d}.flac", wav[: 8 * rate], rate)
        lines.append(f"1-1-{i:04d} THIS IS WHAT THE LION SAID TO THE OLD CAPTAIN ON HIS SHIP")
    (folder / "1-1.trans.txt").write_text("\n".join(lines))
    return folder


def done(script: str, *argv: object) -> str:
    """Run a script; its time and its peak of memory go to the screen."""
    code = ("import re, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="
            "'__main__'); print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status')"
            ".read())[1])")  # fmt: skip
    start, command = time.monotonic(), [sys.executable, "-c", code, script, *map(str, argv)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    *said, peak = found.stdout.splitlines()
    spent = time.monotonic() - start
    print(f"\n{script}: {spent:.0f} s, {int(peak.split()[1]) / 1e6:.1f} GB\n  " + "\n  ".join(said))
    return found.stdout


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("tasla", "toy"),
        pytest.param("small", "small", marks=pytest.mark.slow),
        pytest.param("tasla", "full", marks=pytest.mark.slow),
        pytest.param("taste", "full", marks=pytest.mark.slow),
    ],
)
def test_preset(preset: str, size: str, tmp_path: Path) -> None:
    toy = size == "toy"
    models, features, codes = bundle(tmp_path / "bundle", size), tmp_path / "f", tmp_path / "c"
    common = ["--preset", preset, "--bundle", models, "--device", "cpu"]
    layers = ["--layers", "1,2,4"] if toy else []
    spoken = librispeech(tmp_path / "speech")
    done("prepare.py", *common, "--corpus", "librispeech", "--data", spoken, *layers, "--out",
         features)  # fmt: skip
    here = [*common, "--data", features, "--dev", features, "--threads", 1, "--no-epochs",
            "--no-mfu", "--log-every", 1, "--eval-every", 0, "--steps", 3]  # fmt: skip
    sizes = [*layers, "--size", "tiny"] if toy else []
    out = done("train_tokenizer.py", *here, *sizes, "--text-steps", 0, "--continuous-steps", 0,
               "--micro", 1, "--batch", 2, "--keep", 1, "--out", tmp_path / "t")  # fmt: skip
    assert "3/3 | loss" in out
    done("prepare.py", *common, "--corpus", "features", "--data", features, "--tokenizer",
         tmp_path / "t", "--out", codes)  # fmt: skip
    here[here.index(features)] = here[here.index(features)] = codes
    out = done("train_lm.py", *here, "--tokenizer", tmp_path / "t", "--micro", 1, "--batch", 2,
               "--out", tmp_path / "lm")  # fmt: skip
    assert "3/3 | loss" in out
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["spoken_lm"]["lora_rank"] == 64


@pytest.mark.slow
def test_fifty_steps_of_small_learn(tmp_path: Path) -> None:
    """A dozen utterances, warmed up in 10 steps instead of 5000."""
    models, features = bundle(tmp_path / "bundle", "small"), tmp_path / "f"
    spoken = librispeech(tmp_path / "speech", 12)
    common = ["--preset", "small", "--bundle", models, "--device", "cpu"]
    done("prepare.py", *common, "--corpus", "librispeech", "--data", spoken, "--out", features)
    done("train_tokenizer.py", *common, "--data", features, "--dev", features, "--threads", 2,
         "--no-epochs", "--no-mfu", "--log-every", 1, "--eval-every", 0, "--text-steps", 0,
         "--continuous-steps", 0, "--steps", 50, "--warmup", 10, "--micro", 1, "--frames", 0,
         "--batch", 4, "--keep", 1, "--out", tmp_path / "t")  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "t" / "log.jsonl").read_text().splitlines()]
    losses = [row["ce"] for row in rows if "ce" in row]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
