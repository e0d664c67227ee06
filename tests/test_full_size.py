"""Released files at their full size, with random weights: what opening them costs, and the whole
program on them. Needs 11 GB of disk, and 22 GB of memory for the whole program.

    python -m pytest -m slow tests/test_full_size.py -s
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_public import manifest
from torch import Tensor

ROOT = Path(__file__).parent.parent
MEASURE = """
import json, re, sys, time
from pathlib import Path
import torch
import public

def peak():  # not getrusage's: a new process starts with the peak of the one that made it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def times():
    return [round(f() - t, 1) for f, t in zip((time.monotonic, time.process_time), start)]

torch.empty(1, device="meta").normal_() * torch.ones(1, device="meta")  # does late imports
open("/proc/self/clear_refs", "w").write("5")  # the peak of the imports is not that of loading
before, start = peak(), (time.monotonic(), time.process_time())
models = public.open_public(sys.argv[1])
open_s, opened = times(), peak() - before
for model in models.values():
    for x in model.state_dict().values():
        x.sum()  # the first use of every weight brings it into memory
print(json.dumps({"parts": [*models], "open_s": open_s, "read_s": times(),
                  "opened": opened, "read": peak() - before}))
"""


SPEAK = """
import re, runpy, sys
from pathlib import Path
sys.argv = ["sample.py", *sys.argv[1:]]
runpy.run_path("sample.py", run_name="__main__")
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(f"peak          {int(peak) / 1e6:.1f} GB")
"""
WHISPER = {50257: "endoftext", 50258: "startoftranscript", 50259: "en"}
WHISPER |= {50360: "transcribe", 50364: "notimestamps"}
LLAMA = {128000: "begin_of_text", 128001: "end_of_text"}


def save_tokenizer(folder: Path, special: dict[int, str]) -> None:
    """A byte-level BPE of little text; the ids between it and the special ones are holes."""
    lib = pytest.importorskip("tokenizers")
    tokens = lib.ByteLevelBPETokenizer()
    tokens.train_from_iterator(["the brave lion eats those big fresh peaches. it is so."] * 20, 400)
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    saved["added_tokens"] = [
        {"id": i, "content": f"<|{name}|>", "special": True, **flags} for i, name in special.items()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(saved))


def random(name: str) -> dict[str, Tensor]:
    """Each tensor of a released file in its shape and dtype; variances are positive."""
    torch.manual_seed(0)
    found = {
        k: torch.empty(v.shape, dtype=v.dtype).normal_(std=0.02)
        if v.is_floating_point()
        else torch.zeros(v.shape, dtype=v.dtype)
        for k, v in names(name).items()
    }
    return {k: v.abs() if k.endswith("running_var") else v for k, v in found.items()}


def names(name: str) -> dict[str, Tensor]:
    if name == "taste":  # as on its model page: 2.46 B, so lm_head is stored, too
        table = "spoken_lm.language_model.base_model.model.model.embed_tokens.weight"
        taste = manifest(name)
        return taste | {table.replace("model.embed_tokens", "lm_head"): taste[table]}
    if name == "whisper":
        hf = pytest.importorskip("transformers")
        config = hf.WhisperConfig(
            vocab_size=51866, num_mel_bins=128, d_model=1280, encoder_layers=32,
            encoder_attention_heads=20, encoder_ffn_dim=5120, decoder_layers=32,
            decoder_attention_heads=20, decoder_ffn_dim=5120,
        )  # fmt: skip
        with torch.device("meta"):
            state = hf.WhisperForConditionalGeneration(config).half().state_dict()
        return {k: v for k, v in state.items() if k != "proj_out.weight"}
    return manifest(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "most"),
    [
        ("taste", "model.safetensors", 1.3),
        ("whisper", "model.safetensors", 1.3),
        ("voice_generator", "voice_generator.pth", 1.1),
        ("flow", "flow.pt", 1.1),
        ("hift", "hift.pt", 1.1),
        ("s3", "speech_tokenizer_v1.pt", 1.1),
        ("campplus", "campplus_cn_common.bin", 1.1),
    ],
)
def test_opening_costs_what_the_file_costs(
    tmp_path: Path, name: str, file: str, most: float
) -> None:
    path, tensors = tmp_path / file, random(name)
    if name == "taste":
        lm = "spoken_lm.language_model.base_model.model."
        tensors[f"{lm}lm_head.weight"] = tensors[f"{lm}model.embed_tokens.weight"].clone()
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    del tensors
    command = [sys.executable, "-c", MEASURE, str(path)]
    size = path.stat().st_size
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        path.unlink()
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{name}: {size / 1e9:.2f} GB, {' + '.join(cost['parts'])}")
    for step in ("open", "read"):  # opened, and every weight read once
        wall, cpu = cost[f"{step}_s"]
        peak = cost["opened" if step == "open" else "read"] / size
        print(f"  {step}: {wall} s, {cpu} s of one core, peak {peak:.2f} x the file")
    small = 30e6  # what the allocator and the names take, whatever the size
    assert cost["read"] <= most * size + small


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_program(precision: str, tmp_path: Path) -> None:
    """A spoken prompt of 3 s through whisper-large-v3, TASTE and its vocoder."""
    taste, whisper = tmp_path / "taste", tmp_path / "whisper"
    for folder in (taste / "cosyvoice", whisper):
        folder.mkdir(parents=True)
    save_file(random("taste"), taste / "model.safetensors")
    save_file(random("whisper"), whisper / "model.safetensors")
    torch.save(random("voice_generator"), taste / "cosyvoice" / "voice_generator.pth")
    torch.save(random("campplus"), taste / "campplus_cn_common.bin")
    save_tokenizer(taste / "llama_tokenizer", LLAMA)
    save_tokenizer(whisper, WHISPER)
    out = tmp_path / "out.wav"
    flags = ["--text", "their brave lion", "--words", "2", "--out", str(out)]
    command = [sys.executable, "-c", SPEAK, str(ROOT / "weights/tiny/prompt.wav"), *flags]
    command += ["--model", str(taste), "--asr", str(whisper)]
    command += ["--bf16"] if precision == "bf16" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"\n{done.stdout}")
    assert out.stat().st_size > 44
