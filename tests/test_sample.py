"""sample.py and evaluate.py on untrained models: every way to call them, every bad input."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import HEARD, ROOT, speech
from safetensors.torch import save_file

import audio
import common
import evaluate
import pipeline
import sample
from continuation import Sampling
from metrics import mean_and_error, ratio_and_error
from pipeline import Speech
from speaker import TINY as SPEAKER
from weights import LARGE

WAY = ("--reconstruct", "--threads", "1")  # the fastest


@pytest.fixture
def call(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str, Path]]:
    """call(*flags) -> exit code, stdout, stderr, where the sound is; sample.py in this process."""

    def run(*argv: object, bundle: Path = tiny_bundle, out: str = "out/x.wav") -> tuple:
        (tmp_path / "out").mkdir(exist_ok=True)
        path = tmp_path / out
        flags = ("--bundle", bundle, "--out", path, "--threads", 1)
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, (*flags, *argv))])
        code = 0
        try:
            common.run(sample.main)
        except SystemExit as e:
            code = int(e.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err, path

    return run


def is_sound(path: Path) -> bool:
    info = soundfile.info(path)
    wav = audio.read(path, None)
    kind = (info.samplerate, info.channels, info.subtype) == (22050, 1, "PCM_16")
    return kind and len(wav) > 1000 and bool(wav.isfinite().all()) and float(wav.abs().max()) > 0


def is_refused(result: tuple[int, str, str, Path], *fragments: str) -> bool:
    """Exit code 2, one line that names the cause, no file, not even a part of one."""
    code, _, err, path = result
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for fragment in fragments:
        assert fragment in err
    return not path.exists() and not list((path.parent.parent / "out").iterdir())


# --- what works ----------------------------------------------------------------------------------


def test_from_a_recording(call: Callable, tiny_bundle: Path) -> None:
    code, out, err, path = call(tiny_bundle / "prompt.wav", "--words", 1)
    assert (code, err) == (0, "")
    assert f"prompt        {HEARD}   (2.00 s)" in out
    assert "continuation  " in out
    assert "x real time" in out
    assert is_sound(path)


def test_with_its_text(call: Callable, tiny_bundle: Path) -> None:
    code, out, _, path = call(
        tiny_bundle / "prompt.wav", "--text", "Two dogs run.", "--words", 1, "--temperature", 0
    )
    assert code == 0
    assert "prompt        two dogs run.   (2.00 s)" in out
    assert is_sound(path)


def test_without_a_prompt(call: Callable) -> None:
    code, out, _, path = call("--words", 1)
    assert code == 0
    assert out.startswith("continuation  ")
    assert is_sound(path)


def test_reconstruct_needs_no_spoken_lm(call: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_of(tiny_bundle, tmp_path, without="spoken_lm")
    code, out, _, path = call(tiny_bundle / "prompt.wav", *WAY, bundle=bundle)
    assert code == 0
    assert "continuation" not in out
    assert is_sound(path)


def test_same_seed_same_bytes(call: Callable, tiny_bundle: Path) -> None:
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = (tiny_bundle / "prompt.wav", "--text", "two dogs run.", "--words", 1)
        made.append(call(*flags, "--seed", seed, out=f"out/{name}.wav")[3].read_bytes())
    assert made[0] == made[1] != made[2]


def test_other_tokenizers(call: Callable, tiny_bundle: Path) -> None:
    prompt = tiny_bundle / "prompt.wav"
    code, _, _, path = call(prompt, *WAY, "--tokenizer", tiny_bundle / "tokenizer_rvq")
    assert code == 0
    assert is_sound(path)


def write(path: Path, wav: torch.Tensor, rate: int, **kind: str) -> Path:
    soundfile.write(path, wav.numpy(), rate, **kind)
    return path


@pytest.mark.parametrize(
    ("name", "rate", "kind"),
    [
        ("a.wav", 8000, {"subtype": "PCM_16"}),
        ("a.wav", 48000, {"subtype": "PCM_16"}),
        ("a.wav", 44100, {"subtype": "PCM_24"}),
        ("a.wav", 16000, {"subtype": "FLOAT"}),
        ("a.flac", 16000, {}),
        ("a.ogg", 16000, {}),
        ("a.mp3", 16000, {}),
        ("a.WAV", 16000, {}),
    ],
)
def test_every_kind_of_file(
    name: str, rate: int, kind: dict[str, str], call: Callable, tmp_path: Path
) -> None:
    code, out, err, path = call(write(tmp_path / name, speech(1.0, rate), rate, **kind), *WAY)
    assert (code, err) == (0, "")
    assert f"prompt        {HEARD}" in out
    assert is_sound(path)


def test_channels_are_averaged(call: Callable, tmp_path: Path) -> None:
    wav, rest = speech(1.0), torch.randn(16000, 7) * 0.01
    rest[:, -1] = -rest[:, :-1].sum(1)
    many = torch.cat([wav[:, None], wav[:, None] + rest], 1)
    one = audio.read(call(write(tmp_path / "1.wav", wav, 16000, subtype="FLOAT"), *WAY)[3])
    eight = audio.read(call(write(tmp_path / "8.wav", many, 16000, subtype="FLOAT"), *WAY)[3])
    torch.testing.assert_close(one, eight, atol=1e-3, rtol=0)


def test_a_long_recording(call: Callable, tmp_path: Path) -> None:
    code, out, err, path = call(write(tmp_path / "long.wav", speech(45.0), 16000), *WAY)
    assert (code, err) == (0, "")
    assert out.count(HEARD) >= 6  # pieces of at most 8 s, of which each was heard
    assert is_sound(path)


def test_a_long_recording_can_be_continued(call: Callable, tmp_path: Path) -> None:
    flags = ("--words", 1, "--text", "two dogs run. a cat sleeps.")
    assert call(write(tmp_path / "long.wav", speech(20.0), 16000), *flags)[0] == 0


@pytest.mark.parametrize("seconds", [8.01, 9.0, 15.9, 16.1, 45.0])
def test_cut_loses_nothing_and_leaves_no_scrap(seconds: float) -> None:
    wav = speech(seconds)
    pieces = pipeline.cut(wav)
    assert torch.equal(torch.cat(pieces), wav)
    assert all(2 * 16000 <= len(p) <= 8 * 16000 for p in pieces)


def test_what_is_said_between_pauses() -> None:
    rate, hum = 16000, 0.5 * torch.sin(torch.arange(16000) / 20)
    silence = 1e-4 * torch.randn(2 * rate, generator=torch.Generator().manual_seed(0))
    quiet, short = silence[:rate], silence[: rate // 5]  # 0.2 s is no pause
    kept, end = 1600, 3 * rate + rate // 5  # 100 ms of a pause stay on both sides
    wav = torch.cat([quiet, hum, short, hum, quiet, hum, short])  # no pause: 0.2 s at the end
    first, second = pipeline.between_pauses(wav)
    assert first == (rate - kept, end + kept)
    assert second == (end + rate - kept, len(wav))
    for whole in (hum, torch.zeros(5), silence):
        assert pipeline.between_pauses(whole) == [(0, len(whole))]


def test_silence_around_a_recording_changes_no_code(tiny_bundle: Path) -> None:
    system = pipeline.Pipeline(tiny_bundle, tiny_bundle / "tokenizer")
    silence = torch.zeros(16000)
    hum = speech(1.5)
    plain = system.encode(torch.cat([silence[:1600], hum, silence[:1600]]), "two dogs")
    around = system.encode(torch.cat([silence, hum, silence]), "two dogs")
    assert plain.codes is not None
    assert around.codes is not None
    assert torch.equal(plain.codes, around.codes)
    assert torch.equal(plain.voice, around.voice)


def test_a_batch_transcribes_as_single_items(tiny_bundle: Path) -> None:
    frontend = pipeline.Frontend(tiny_bundle)
    wavs = [speech(s) for s in (1.0, 9.5, 0.5)]
    heard = pipeline.transcribe(frontend, wavs, size=3)
    assert heard == [pipeline.transcribe(frontend, [wav])[0] for wav in wavs]
    assert heard == [HEARD, f"{HEARD} {HEARD}", HEARD]


def test_a_batch_says_what_single_items_say(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "TOP_K", 1)  # no chance
    system = pipeline.Pipeline(tiny_bundle, tiny_bundle / "tokenizer")
    decoder = system.tokenizer.unit_decoder
    decoder.head.bias.data[-1] = -1  # a model that does not stop at once
    for block in (*decoder.text.blocks, *decoder.lm.blocks):  # and that cares what it says
        block.attn.out.weight.data *= 100
    texts = ("two dogs run.", "the child sees a big red ball.", "a cat sleeps.")
    pieces = [system.encode(speech(s), t) for s, t in zip((1.0, 2.5, 0.5), texts, strict=True)]
    limit = partial(system.tokenizer.decode, max_len=12)
    monkeypatch.setattr(system.tokenizer, "decode", limit)
    together = system.units(pieces, None)
    for piece, (units, ended) in zip(pieces, together, strict=True):
        ((alone, alone_ended),) = system.units([piece], None)
        assert units.tolist() == alone.tolist()
        assert ended == alone_ended
    assert len({tuple(units.tolist()) for units, _ in together}) == 3


# --- bf16 ----------------------------------------------------------------------------------------


def test_in_bf16_all_stages_are_near_and_what_is_exact_stays(tiny_bundle: Path) -> None:
    folders = tiny_bundle, tiny_bundle / "tokenizer", tiny_bundle / "spoken_lm", "cpu"
    fp32, bf16 = pipeline.Pipeline(*folders), pipeline.Pipeline(*folders, bf16=True)
    halved = [bf16.tokenizer.unit_decoder, bf16.lm.llm, bf16.frontend.encoder, bf16.vocoder.flow]
    exact = [bf16.lm.quantizer, bf16.lm.head, bf16.frontend.speaker, bf16.vocoder.hift]
    for part in halved:
        large = {p.dtype for m in part.modules() if isinstance(m, LARGE) for p in m.parameters()}
        assert large == {torch.bfloat16}
    assert {x.dtype for part in exact for x in part.state_dict().values()} <= {
        torch.float32,
        torch.int64,
    }
    mel, keep = pipeline.mels(fp32.frontend, [speech(1.5)])
    layers = fp32.tokenizer.config.aggregator.value_layers
    ids, word_ids = fp32.ids([["two", "dogs", "run."]])
    units, voice, found = torch.arange(20), torch.ones(SPEAKER.dim), []
    for system in (fp32, bf16):
        torch.manual_seed(0)
        rng = torch.Generator().manual_seed(0)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=system.bf16):
            heard = system.frontend.hear(mel, keep, layers)
            token = system.tokenizer.aggregator(ids, word_ids, *heard)
            hidden = system.lm.llm(torch.arange(12)[None])
            logits = system.lm.llm.logits(hidden)
            sound, _ = system.vocoder.flow.sample(units[None], torch.tensor([20]), voice[None],
                                                  rng=rng)  # fmt: skip
            wav = system.vocoder(units, voice, rng)
        found.append([heard[0], token, logits, sound])
        assert wav.dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        assert (theirs - ours).abs().max() > 0
        torch.testing.assert_close(
            theirs.float(), ours, rtol=0, atol=0.05 * float(ours.abs().max())
        )


def test_bf16_from_the_command_line(call: Callable, tiny_bundle: Path) -> None:
    code, out, err, path = call(tiny_bundle / "prompt.wav", "--bf16", "--words", 1)
    assert (code, err) == (0, "")
    assert "x real time" in out
    assert is_sound(path)


@pytest.mark.parametrize("flags", [("--words", 1), ("--stream", "--words", 1), ("--reconstruct",)])
def test_what_is_repeated_is_compiled(
    flags: tuple, call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the compiler makes of it is looked at in test_kv_cache.py."""
    plain = call(tiny_bundle / "prompt.wav", *flags, out="out/plain.wav")
    compiled = list[str]()

    def mark(run: Callable, **_: object) -> Callable:
        compiled.append(type(getattr(run, "__self__", None)).__name__)
        return run

    monkeypatch.setattr(torch, "compile", mark)
    found = call(tiny_bundle / "prompt.wav", *flags, "--compile")
    assert found[0] == 0
    wanted = {"Stack", "WhisperEncoder", "WhisperDecoder", "Estimator"}
    wanted |= {"Llama"} if "--words" in flags else set()
    assert set(compiled) == wanted
    lines = [[x for x in out.splitlines() if x.startswith(("prompt", "continuation"))]
             for _, out, *_ in (plain, found)]  # fmt: skip
    assert lines[0] == lines[1]
    assert len(audio.read(found[3], None)) == len(audio.read(plain[3], None))


# --- streaming -----------------------------------------------------------------------------------


def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of at most three words, so that a short answer has several."""
    monkeypatch.setattr(pipeline.pieces, "__defaults__", ((".",), 3, 1))


@pytest.mark.parametrize(
    "argv", [("--words", 5), ("--words", 5, "--new-only"), ("--reconstruct",), ()], ids=str
)
def test_the_stream_is_the_whole_to_the_bit(
    argv: tuple[object, ...], call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talkative(monkeypatch)
    prompt = (tiny_bundle / "prompt.wav",) if argv else ()
    code, whole, _, path = call(*prompt, *argv)
    assert code == 0
    code, streamed, err, other = call(*prompt, *argv, "--stream", out="out/y.wav")
    assert (code, err) == (0, "")
    assert other.read_bytes() == path.read_bytes()
    lines = [line for line in whole.splitlines() if line.startswith(("prompt", "continuation"))]
    assert [x for x in streamed.splitlines() if x in lines] == lines
    assert "first audio   " in streamed
    assert "first audio" not in whole


def test_the_stream_says_the_prompt_first(
    call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()

    def units(system: pipeline.Pipeline, parts: list[Speech], rng: torch.Generator) -> object:
        said.extend(word for part in parts for word in part.words)
        return its_own(system, parts, rng)

    its_own = pipeline.Pipeline.units
    monkeypatch.setattr(pipeline.Pipeline, "units", units)
    prompt, flags = tiny_bundle / "prompt.wav", ("--text", "two dogs", "--stream", "--words", 1)
    _, out, *_ = call(prompt, *flags)
    new = re.findall(r"continuation  (.*?)(?: \.\.\.)?\n", out)[0]
    assert " ".join(said) in (f"two dogs {new}", f"two dogs{new}")  # new may begin with a full stop
    said.clear()
    call(prompt, *flags, "--new-only")
    assert said == new.removeprefix(". ").split()


def test_a_reply_that_comes_in_parts_is_the_whole_reply(tiny_bundle: Path) -> None:
    system = pipeline.Pipeline(tiny_bundle, tiny_bundle / "tokenizer", tiny_bundle / "spoken_lm")
    few = system.sets.word_start & (system.sets.word_start.cumsum(0) <= 1)  # else "." is too rare
    banned = system.sets.banned | (system.sets.word_start & ~few)
    system.sets = replace(system.sets, banned=banned)
    prompt, glues = system.encode(speech(1.0), "two dogs run"), set[str]()
    for seed, start in itertools.product(range(12), (prompt, None)):
        rngs = [torch.Generator().manual_seed(seed) for _ in range(2)]
        given = start, 2, Sampling(9.0, 1.0, 1.0, 1.0), prompt.voice
        whole, ended = system.reply(*given, rngs[0])
        parts = [*system.reply_stream(*given, rngs[1])]
        assert [end for _, end in parts] == [False] * (len(parts) - 1) + [ended]
        assert (parts[0][0].words, parts[0][0].glue) == ([], whole.glue)
        joined, want = prompt, prompt.join(whole)
        for part, _ in parts:
            joined = joined.join(part)
        assert joined.codes is not None
        assert want.codes is not None
        assert joined.words == want.words
        assert torch.equal(joined.codes, want.codes)
        glues.add(whole.glue)
    assert glues == {"", "."}


def test_a_sentence_is_written_before_the_next_words_are_made(
    call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened, in order: words become known, sound is written."""
    talkative(monkeypatch)
    events = list[str]()

    def known(*given: Any) -> Iterator[tuple[Speech, bool]]:
        for part, ended in its_own(*given):
            events.extend("w" * len(part.words))
            yield part, ended

    def write(out: audio.WavStream, wav: torch.Tensor) -> None:
        events.append("S")
        its_write(out, wav)

    its_own, its_write = pipeline.known, audio.WavStream.write
    monkeypatch.setattr(pipeline, "known", known)
    monkeypatch.setattr(audio.WavStream, "write", write)
    flags = ("--text", "two dogs run", "--words", 6, "--stream", "--new-only")
    assert call(tiny_bundle / "prompt.wav", *flags)[0] == 0
    order = "".join(events)
    assert order.index("S") <= 3
    assert "w" in order[order.index("S") :]
    assert order.count("S") >= 3


def test_an_interrupted_stream_leaves_a_wav_of_what_was_said(
    call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talkative(monkeypatch)
    flags = (tiny_bundle / "prompt.wav", "--text", "two dogs run. a cat sleeps.", "--reconstruct")
    whole = audio.read(call(*flags, out="out/y.wav")[3], None)
    said = list[int]()

    def units(*given: Any) -> object:
        said.append(1)
        if len(said) == 2:
            raise KeyboardInterrupt
        return its_own(*given)

    its_own = pipeline.Pipeline.units
    monkeypatch.setattr(pipeline.Pipeline, "units", units)
    code, _, err, path = call(*flags, "--stream")
    assert (code, err) == (130, "interrupted\n")
    begun = audio.read(path, None)
    assert 1000 < len(begun) < len(whole)
    assert torch.equal(begun, whole[: len(begun)])


def test_an_error_before_the_first_sound_leaves_an_older_file(
    call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.wav").write_bytes(b"older")

    def broken(*_: object) -> None:
        raise ValueError("no units to speak")

    monkeypatch.setattr(pipeline.Pipeline, "units", broken)
    code, _, err, path = call("--stream")
    assert (code, err) == (2, "error: no units to speak\n")
    assert path.read_bytes() == b"older"


def test_through_a_pipe(tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "sample.py", "--bundle", tiny_bundle, "--threads", 1]
    command += [tiny_bundle / "prompt.wav", "--reconstruct", "--out", "-"]
    words = [str(word) for word in command]
    whole = subprocess.run(words, cwd=ROOT, capture_output=True)
    assert whole.returncode == 0
    assert b"audio         " in whole.stderr
    (tmp_path / "x.wav").write_bytes(whole.stdout)
    assert len(audio.read(tmp_path / "x.wav", None)) > 1000
    streamed = subprocess.run([*words, "--stream"], cwd=ROOT, capture_output=True)
    assert streamed.stdout == whole.stdout
    with subprocess.Popen(
        [*words, "--stream"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as player:
        assert player.stdout is not None
        assert player.stderr is not None
        player.stdout.close()  # before anything is said
        told = player.stderr.read().decode()
        assert player.wait() == 2
    assert told.endswith("error: --out -: whoever listened has gone\n")
    assert "Traceback" not in told


def spoken(*parts: str, glue: str = "") -> list[Speech]:
    voice = torch.zeros(2)
    made = [Speech(x.split(), torch.zeros(len(x.split()), 3).long(), voice) for x in parts]
    return [made[0], *(replace(part, glue=glue) for part in made[1:2]), *made[2:]]


@pytest.mark.parametrize(
    ("parts", "pieces"),
    [
        (spoken("a b. c"), ["a b.", "c"]),
        (spoken("a b", "c. d", "e"), ["a b c.", "d e"]),
        (spoken("a b", "c", glue="."), ["a b.", "c"]),  # it ends a sentence of the prompt
        (spoken("a b c d", "e. f."), ["a b c", "d e.", "f."]),
        (spoken("", "a"), ["a"]),
        ([Speech([], None, torch.zeros(2)), *spoken("a b.", "c")], ["a b.", "c"]),  # no prompt
        (spoken(""), []),
    ],
)
def test_pieces_do_not_depend_on_how_the_words_come(parts: list[Speech], pieces: list[str]) -> None:
    found = [*pipeline.pieces(parts, longest=3)]
    assert [piece.text for piece in found] == pieces
    assert all(p.codes is not None and len(p.codes) == len(p.words) for p in found)
    together = parts[0]
    for part in parts[1:]:
        together = together.join(part)
    assert [piece.text for piece in pipeline.pieces([together], longest=3)] == pieces


def test_clauses_have_some_words() -> None:
    (speech,) = spoken("so, a big dog runs, and a cat sleeps here. yes.")
    found = [piece.text for piece in pipeline.pieces([speech], (",", "."), 12, 3)]
    assert found == ["so, a big dog runs,", "and a cat sleeps here.", "yes."]


def test_several_replies_are_those_of_single_prompts(tiny_bundle: Path) -> None:
    system = pipeline.Pipeline(tiny_bundle, tiny_bundle / "tokenizer", tiny_bundle / "spoken_lm")
    short = system.encode(speech(1.0), "two dogs run.")
    prompts = [None, short, system.encode(speech(2.5), "the child sees a big red ball"), short]
    calm, voices = Sampling(0.0, 1.0, 1.2, 0.0), [torch.full((4,), i / 9) for i in range(4)]
    together = system.reply_all(prompts, 2, calm, voices)
    for prompt, voice, (new, ended) in zip(prompts, voices, together, strict=True):
        alone, alone_ended = system.reply(prompt, 2, calm, voice)
        assert (new.words, new.glue, ended) == (alone.words, alone.glue, alone_ended)
        assert new.codes is not None
        assert alone.codes is not None
        assert torch.equal(new.codes, alone.codes)
        assert new.voice is voice
    assert len({new.text for new, _ in together}) > 1


# --- what is refused -----------------------------------------------------------------------------


def test_two_real_processes(tiny_bundle: Path, tmp_path: Path) -> None:
    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "sample.py", "--bundle", tiny_bundle, "--threads", 1, *argv]
        return subprocess.run(
            [str(word) for word in command], cwd=ROOT, capture_output=True, text=True
        )

    good = run(tiny_bundle / "prompt.wav", "--words", 1, "--out", tmp_path / "x.wav")
    assert (good.returncode, good.stderr) == (0, "")
    assert is_sound(tmp_path / "x.wav")
    bad = run(tmp_path / "none.wav", "--out", tmp_path / "y.wav")
    assert bad.returncode == 2
    assert bad.stderr == f"error: {tmp_path}/none.wav: no such audio file\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.wav"]


def nan_at(i: int) -> torch.Tensor:
    wav = speech(1.0)
    wav[i] = math.nan
    return wav


RECORDINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such audio file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "not audio": (lambda path: path.write_bytes(b"hello " * 99), "not audio"),
    "empty": (lambda path: path.write_bytes(b""), "not audio"),
    "no samples": (lambda path: write(path, speech(0), 16000), "holds no samples"),
    "one sample": (lambda path: write(path, torch.ones(1), 16000), "lasts 0.000 s"),
    "short": (lambda path: write(path, speech(0.05), 16000), "lasts 0.050 s"),
    "NaN": (lambda path: write(path, nan_at(5), 16000, subtype="FLOAT"), "NaN or infinite"),
    "silent": (lambda path: write(path, torch.zeros(16000), 16000), "is silent"),
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_that_cannot_be_used(name: str, call: Callable, tmp_path: Path) -> None:
    make, message = RECORDINGS[name]
    make(tmp_path / "in.wav")
    assert is_refused(call(tmp_path / "in.wav", "--text", "a dog"), "in.wav", message)


def test_the_current_folder_is_no_recording(call: Callable) -> None:
    assert is_refused(call("."), "is a folder")


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--preset", "huge"], "--preset"),
        (["--wordz", "3"], "--wordz"),
        (["--words", "three"], "--words"),
        (["--words", "0"], "--words 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--code-temperature", "-0.1"], "--code-temperature -0.1"),
        (["--top-p", "0"], "--top-p 0"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--threads", "0"], "--threads 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        (["--device", "gpu"], "--device gpu"),
        (["--reconstruct"], "need a recording"),
        (["--text", "two dogs"], "need a recording"),
        (["--swap", "b.wav", "--stream", "--words", "1"], "--swap"),
    ],
)
def test_flags_that_cannot_be_used(argv: list[str], fragment: str, call: Callable) -> None:
    assert is_refused(call(*argv), fragment)


@pytest.mark.parametrize("said", ["naïve dogs", "你好", "2 dogs", "dog|cat", "   "])
def test_text_that_the_tokenizer_lacks(said: str, call: Callable, tiny_bundle: Path) -> None:
    assert is_refused(call(tiny_bundle / "prompt.wav", "--text", said), "--text" * (said == "   "))


def test_text_too_long_for_the_recording(call: Callable, tiny_bundle: Path) -> None:
    assert is_refused(call(tiny_bundle / "prompt.wav", "--text", "a dog " * 100), "shorten")


@pytest.mark.parametrize("out", ["none/x.wav", "file/x.wav", "out/x.mp3", "out", "out/"])
def test_places_that_cannot_be_written(out: str, call: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    code, _, err, _ = call(out=out)
    assert code == 2
    assert err.startswith("error: --out")
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_where_the_file_should_go(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "out" / "x.wav").mkdir(parents=True)
    code, _, err, path = call("--words", 1)
    assert code == 2
    assert err.startswith("error: ")
    assert [p.name for p in path.parent.iterdir()] == ["x.wav"]


def copy_of(bundle: Path, tmp_path: Path, without: str) -> Path:
    """A bundle of links to the real one."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for part in bundle.iterdir():
        if part.name != without:
            (folder / part.name).symlink_to(part)
    return folder


PARTS = ("asr", "s3", "speaker", "flow", "hift", "tokenizer", "spoken_lm")


@pytest.mark.parametrize("part", [*PARTS, "lm", "prompt.wav"])
def test_a_bundle_without_a_part(
    part: str, call: Callable, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = copy_of(tiny_bundle, tmp_path, without=part)
    assert is_refused(call(bundle=bundle), str(bundle / part))


def test_no_bundle(call: Callable, tmp_path: Path) -> None:
    assert is_refused(call(bundle=tmp_path / "none"), "none", "config.json")


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def foreign(folder: Path) -> None:
    save_file({f"layer.{i}": torch.zeros(2) for i in range(9)}, folder / "model.safetensors")


def half_a_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text()[:30])


def other_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 768}')


DAMAGE = {f.__name__: f for f in (cut_short, foreign, half_a_config, other_config)}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part(
    part: str, damage: str, call: Callable, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = copy_of(tiny_bundle, tmp_path, without=part)
    shutil.copytree(tiny_bundle / part, bundle / part)
    DAMAGE[damage](bundle / part)
    assert is_refused(call(bundle=bundle), str(bundle / part))


def test_a_spoken_lm_of_another_tokenizer(call: Callable, tiny_bundle: Path) -> None:
    assert is_refused(call("--tokenizer", tiny_bundle / "tokenizer_rvq"))


# --- swap ----------------------------------------------------------------------------------------


def test_swap_writes_four_mixtures(call: Callable, tiny_bundle: Path, tmp_path: Path) -> None:
    prompt, other = tiny_bundle / "prompt.wav", tmp_path / "b.wav"
    audio.write(other, speech(1.2), 16000)
    flags = ("--swap", other, "--text", "Two dogs run.", "--words")
    code, out, _, path = call(prompt, *flags, "2:3")
    assert code == 0
    assert "two [ dogs run. ]" in out
    files = [path.with_name(f"x_{name}.wav") for name in ("a", "a_with_b", "b", "b_with_a")]
    assert all(map(is_sound, files))
    assert not path.exists()
    before = [file.read_bytes() for file in files]
    assert call(prompt, *flags, "2:3")[0] == 0
    assert [file.read_bytes() for file in files] == before  # same seed, same sound


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--words", "2:6"], "words 2:6 of 5"),
        (["--words", "0:2"], "--words 0:2: wanted FIRST:LAST"),
        (["--words", "3:2"], "--words 3:2: wanted FIRST:LAST"),
        (["--words", "2-3"], "--words 2-3: wanted FIRST:LAST"),
        (["--words", "1", "--reconstruct"], "--reconstruct"),
        (["--words", "1", "--mode", "zero"], "--mode"),
        (["--words", "1", "--text", "?"], "the word '?'"),
    ],
)
def test_swap_refuses(
    flags: list[str], told: str, call: Callable, tiny_bundle: Path, tmp_path: Path
) -> None:
    prompt = tiny_bundle / "prompt.wav"
    code, _, err, path = call(prompt, "--swap", prompt, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert told in err
    assert not [*path.parent.glob("*.wav")]


def test_swap_of_other_words_or_no_recording(
    call: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tiny_bundle / "prompt.wav"
    assert "no such audio file" in call(prompt, "--swap", "none.wav", "--words", "1")[2]
    assert "--swap needs a recording" in call("--swap", prompt, "--words", "1")[2]
    assert "--words 2:3" in call(prompt, "--words", "2:3")[2]  # means a number without --swap
    heard = iter(["two dogs run.", "two dogs sing."])
    monkeypatch.setattr(pipeline.Pipeline, "transcribe", lambda *args: next(heard))
    code, _, err, _ = call(prompt, "--swap", prompt, "--words", "1")
    assert code == 2
    assert "'two dogs run.' and 'two dogs sing.'" in err


# --- evaluate.py ---------------------------------------------------------------------------------


@pytest.fixture
def measure(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict]:
    def run(bundle: Path, *argv: object) -> dict:
        flags = ("--bundle", bundle, "--out", tmp_path / "report", "--threads", 1, "--runs",
                 tmp_path / "runs", *argv)  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        common.run(evaluate.main)
        (file,) = (tmp_path / "report").glob("*.json")
        assert file.with_suffix(".md").stat().st_size
        return json.loads(file.read_text())["parts"]

    return run


def test_evaluate_measures_every_part(
    measure: Callable, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = measure(
        tiny_bundle, "--items", 3, "--prompts", 2, "--seeds", 2, "--swaps", 2, "--pairs", 2,
        "--unit-lm", tiny_bundle / "none", "--cascade", tiny_bundle / "none", "--embeddings",
        tiny_bundle / "none",
    )  # fmt: skip
    assert list(parts) == list(evaluate.PARTS)
    assert "| reconstruction | WER |" in capsys.readouterr().out
    assert parts["asr"]["known voices"] == parts["copy"]["original"]
    for row in ("TASLA", "TASTE"):
        found = {name: value for name, (value, _) in parts["reconstruction"][row].items()}
        assert found["bit/word"] == 36
        assert found["bit/s"] == pytest.approx(36 * found["words/s"])
        channels = sum(v for k, v in found.items() if "channel" in k)
        assert found["entropy/word"] == pytest.approx(channels)
        assert 0 < channels < 36
    copied = parts["copy"]["Griffin-Lim, 32 iterations"]
    assert copied["F0-PCC frames"][0] > 0.9  # it keeps pitch and time
    assert copied["same duration"][0] > 0.9
    assert set(parts["units"]) == {*evaluate.TOKENIZERS, "majority", "repeat_last"}
    assert list(parts["continuation"]) == ["recording", "another recording", "joint, tokens"]
    row = parts["continuation"]["joint, tokens"]
    assert 0 <= row["grammatical, meant"][0] <= 1
    assert row["x real time"][0] > 0


def test_evaluate_one_part_loads_only_what_it_needs(
    measure: Callable, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for part in ("asr", "s3", "speaker"):
        (bundle / part).symlink_to(tiny_bundle / part)
    parts = measure(bundle, "--only", "asr", "--items", 2)
    assert list(parts) == ["asr"]


@pytest.mark.parametrize(
    "argv", [["--items", "0"], ["--only", "asr,copy"], ["--seeds", "x"], ["--bundle", "none"]]
)
def test_evaluate_refuses(
    argv: list[str], measure: Callable, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        measure(tiny_bundle, *argv)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_ratio_and_error_of_equal_weights_is_the_mean() -> None:
    values = [0.5, 0.1, math.nan, 0.7]
    assert ratio_and_error(values, [1] * 4) == pytest.approx(mean_and_error(values))
    assert ratio_and_error([1.0, 3.0], [2.0, 2.0]) == pytest.approx((1.0, 0.5))
    assert all(math.isnan(x) for x in ratio_and_error([1.0], [0.0]))


def test_error_of_a_ratio_against_many_redrawn_samples() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(3, 11, 4000)
    errors = rng.binomial(words, 0.2)
    picks = rng.integers(0, 4000, (2000, 200))
    spread = (errors[picks].sum(1) / words[picks].sum(1)).std()
    first = ratio_and_error(errors[:200].tolist(), words[:200].tolist())[1]
    assert first == pytest.approx(spread, rel=0.2)


def test_scores_pool_seeds_by_utterance() -> None:
    scores = evaluate.Scores()
    for i, text, heard in (
        (0, "a dog", "a dog"),
        (1, "a cat sleeps", "a dog"),
        (0, "a dog", "dog"),
    ):
        scores.words("WER", i, text, heard)
    value, error = scores.figures()["WER"]
    assert value == pytest.approx(3 / 7)
    rest = (1 - 4 * 3 / 7) ** 2 + (2 - 3 * 3 / 7) ** 2
    assert error == pytest.approx((2 * rest) ** 0.5 / 7)
