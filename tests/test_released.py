"""released.py: the published generation traces, from their mels, words and voices to units, and
what it does beyond them."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import speech as buzz
from released_models import GOLDEN, PROMPT, TRACES, Toy, build, public_tensors
from safetensors.torch import load_file
from torch import Tensor, nn

import audio
import common
import continuation
import lora
import released
import sample
from aggregator import spread
from continuation import Sampling
from lora import LoRALinear
from pipeline import Speech, ready
from released import Models, Released, Tidy, open_models
from spoken_lm import IGNORE, LatentHead

GREEDY = Sampling(top_p=0.0)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(scope="module")
def models() -> Models:
    return build()


@pytest.fixture
def system(models: Models) -> Released:
    return Released(models)


@pytest.fixture(scope="module")
def forward() -> dict[str, Tensor]:
    return load_file(GOLDEN / "full_forward.safetensors")


def prompt_of(system: Released, mode: str, trace: dict[str, Tensor]) -> Speech | None:
    voice = trace["speaker_embeds"][0]
    if mode in ("zero", "text"):
        return None if mode == "zero" else Speech(PROMPT, None, voice)
    return Speech(PROMPT, system.encode_mel(trace["audio_features"].mT, PROMPT), voice)


@torch.inference_mode()
@pytest.mark.parametrize("name", TRACES)
def test_golden_trace(name: str, system: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, about = (
        load_file(GOLDEN / f"{name}.safetensors"),
        json.loads((GOLDEN / f"{name}.json").read_text()),
    )
    mode, lm, steps = about["mode"], system.models.lm, list[Tensor]()
    hook = lm.llm.register_forward_hook(lambda *call: steps.append(call[2][0, -1]))
    sampling, odds, around = GREEDY, list[Tensor](), None
    if name == "gen_audio_sampled":
        sampling = Sampling(0.7, 0.8, 1.3)

        def replay(logits: Tensor, temperature: float, **_: object) -> Tensor:
            odds.append((logits / temperature).softmax(-1)[0])
            return trace["step_text_ids"][len(odds) - 1][None]

        monkeypatch.setattr(continuation, "pick", replay)
    if mode == "instruct":
        rows = (trace[f"instruct_{x}_ids"].tolist() for x in ("prefix", "suffix"))
        before, after = ("".join(f"<{i}>" for i in row) for row in rows)
        around = before, after
    prompt, voice = prompt_of(system, mode, trace), trace["speaker_embeds"][0]
    new, ended = system.reply(prompt, 3, sampling, voice, around=around)
    hook.remove()

    assert ended
    assert new.text == about["generated_text"]
    used = trace["used_rows"]
    close(lm.llm.logits(torch.stack(steps))[:, used], trace["step_text_logits_used_rows"])
    assert isinstance(lm.head, LatentHead)
    close(lm.head.latent(lm.head(torch.stack(steps))), trace["step_z"])
    if odds:
        close(torch.stack(odds)[:, used], trace["step_probs_used_rows"][: len(odds)])
    theirs = trace["generated_llm_indices"][0]
    assert new.codes is not None
    assert torch.equal(new.codes, theirs[theirs[:, 0] != IGNORE])

    whole = prompt.join(new) if prompt is not None and mode == "audio" else new
    assert whole.codes is not None
    ids, word_ids = system.ids(whole.words, system.models.asr_tokens)
    assert torch.equal(ids, trace["final_asr_token_ids"])
    embedding = system.models.tokenizer.embed(whole.codes[None], word_ids)
    close(embedding, trace["final_audio_unit_embeds"])
    ((units, _),) = system.units(whole, greedy=True)
    assert torch.equal(units, trace["speech_token_ids"][0].long())


@torch.inference_mode()
def test_golden_forward(models: Models, forward: dict[str, Tensor]) -> None:
    """A padded batch through the aggregator, the quantizer and both ways to the unit decoder."""
    g, (model, lm) = forward, (models.tokenizer, models.lm)
    keep = torch.arange(9) < g["asr_token_lengths"][:, None]
    word_ids = g["asr_word_ids"].long().masked_fill(~keep, IGNORE)
    last, taps = models.encoder(g["audio_features"].mT, taps=(2,))
    heard = g["asr_token_ids"], word_ids, last, taps
    close(model.aggregator(*heard)[keep], g["z_unquantised"][keep])
    codes = model.encode(*heard)
    assert torch.equal(spread(codes.float(), word_ids).long()[keep], g["asr_indices"][keep])
    units = g["speech_token_ids"].masked_fill(
        torch.arange(17) >= g["speech_token_lengths"][:, None], IGNORE
    )

    llm_keep = torch.arange(9) < g["llm_token_lengths"][:, None]
    llm_words = g["llm_word_ids"].long().masked_fill(~llm_keep, IGNORE)
    first, llm_first = (x.diff(dim=1, prepend=x[:, :1] - 1) > 0 for x in (word_ids, llm_words))
    pairs = (llm_words[:, :, None] == word_ids[:, None]) & llm_first[:, :, None] & first[:, None]
    assert torch.equal(pairs & (word_ids >= 0)[:, None], g["asr_to_llm_map"].bool())
    out = lm(g["llm_token_ids"], llm_words, codes, faithful=True)
    close(out.loss, g["taslm_loss"])
    asked = out.layout.code_labels[..., 0] != IGNORE
    assert torch.equal(out.layout.code_labels, g["taslm_taste_labels"])
    said = lm.head.say(out.hidden, lm.quantizer, 0.0, None)
    assert torch.equal(said[out.layout.keep], g["taslm_taste_pred"][out.layout.keep])
    expected = torch.full_like(codes, IGNORE)
    expected[codes[..., 0] != IGNORE] = said[asked]  # row by row, the words in order
    for stage, used in (("stage1", codes), ("stage2", expected)):
        theirs = g[f"{stage}_speech_labels"]
        embedding = model.embed(used, word_ids)
        if stage == "stage1":
            close(embedding[keep], g["audio_unit_embeds"][keep])
            close(embedding, g["audio_unit_embeds_from_llm_indices"])
        said_units = model.unit_decoder(
            g["asr_token_ids"], keep, embedding, g["speaker_embeds"], units
        )
        real = said_units.target != IGNORE
        assert torch.equal(said_units.target[real], theirs[theirs != IGNORE])
        close(said_units.logits[real], g[f"{stage}_speech_logits"][theirs != IGNORE])


def test_golden_reconstructions(system: Released, forward: dict[str, Tensor]) -> None:
    """Codes of the tokenizer, and codes as the spoken LM expects them."""
    g = forward
    codes = system.encode_mel(g["audio_features"][:1].mT, PROMPT)
    said = Speech(PROMPT, codes, g["speaker_embeds"][0])
    for way, whole in (("autoencoder", said), ("taslm", system.predicted(said))):
        ((units, _),) = system.units(whole, greedy=True)
        assert torch.equal(units, g[f"recon_{way}_speech_token_ids"][0].long())


# ---- beyond the golden files


def test_every_public_tensor_has_its_place(models: Models) -> None:
    """All of the golden checkpoint is used but the RVQ's dead MLPs; lm_head is tied."""
    parts = (models.encoder, models.tokenizer, models.lm)
    ours = {id(p): p.numel() for m in parts for p in (*m.parameters(), *m.buffers())}
    public = {k: v for k, v in public_tensors().items() if ".mlps." not in k}
    assert sum(ours.values()) == sum(v.numel() for v in public.values())


def heard_as(words: list[str], models: Models) -> Models:
    """The same with a recognizer that hears these words in everything."""
    asr = build().asr_decoder
    tokens = models.asr_tokens
    assert isinstance(tokens, Toy)
    said = [i for word in words for i in tokens.encode(f" {word}")]
    said = [*said, tokens.special["<|endoftext|>"]]
    with torch.no_grad():
        asr.tokens.weight[said] = 5 * torch.eye(32)[: len(said)] if len(said) <= 32 else 0
        rows = range(3, 3 + len(said))  # the last of the prefix predicts the first
        asr.positions[rows] = 300 * asr.tokens.weight[said]
    texts = [f"#{i}" for i in range(128)]
    for word in words:
        first, *rest = tokens.encode(f" {word}")
        texts[first] = f" {word}"
        for i in rest:
            texts[i] = ""
    return replace(models, asr_decoder=asr, asr_tokens=Toy(tokens.words, texts))


def test_transcribes_and_speaks_recordings_of_any_length(models: Models) -> None:
    system = Released(heard_as(["one", "three"], models))
    for seconds, times in ((1 / 16000, 1), (0.8, 1), (0.81, 2), (2.0, 3)):
        wav = buzz(seconds)
        text = system.transcribe(wav)
        assert len(text.split()) >= 2 * times
        assert {*text.split()} == {"one", "three"}
        said = system.encode(wav, text)
        assert said.codes is not None
        assert len(said.words) == len(said.codes) == len(text.split())
        assert (said.codes >= 0).all()
        assert said.voice.isfinite().all()
    sound, _ = system.speak(
        said.part(0, 2), torch.Generator().manual_seed(0), max_len=20, min_len=4
    )
    assert sound.isfinite().all()
    assert len(sound)


def test_one_window_is_not_touched(models: Models) -> None:
    system = Released(heard_as(["one"], models))
    wav = buzz(0.8)
    codes = system.encode(wav, "two four").codes
    assert codes is not None
    assert torch.equal(codes, system.encode_mel(system.mel(wav, models.encoder), ["two", "four"]))


@torch.inference_mode()
def test_short_hears_what_is_there_and_no_silence(models: Models) -> None:
    long, short = Released(models), Released(models, short=True)
    rate = audio.WHISPER_RATE
    for seconds in (0.3, 1.005, 1.28, 2.0):
        wav = torch.randn(round(seconds * rate)) * 0.1
        padded, heard = (x.mel(wav, models.encoder) for x in (long, short))
        frames = min(len(wav) // audio.WHISPER_HOP, padded.shape[2])
        assert heard.shape == (*padded.shape[:2], frames)
        codes = short.encode_mel(heard, PROMPT)
        assert codes.shape == (len(PROMPT), 4)
        assert torch.equal(codes, long.encode_mel(padded, PROMPT)) or frames < padded.shape[2]


def test_voice_is_the_mean_of_recordings_of_length_one(system: Released) -> None:
    wavs = [buzz(1.0), buzz(0.7)[3000:]]
    one, other = (system.voice(wav) for wav in wavs)
    assert one.norm().item() == pytest.approx(1, abs=1e-5)
    assert system.voice(*wavs).norm().item() == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(one, other)


def test_tidy_is_the_clean_up_of_transformers() -> None:
    from transformers import PreTrainedTokenizerBase

    letters = Toy({}, [*map(chr, range(128))])
    clean: Any = PreTrainedTokenizerBase.clean_up_tokenization
    for line in (
        " a .b",
        " it 's",
        " she said ' no '",
        " 'sword' ?",
        " can n't , I 'm !",
        " 've re",
    ):
        assert Tidy(letters).decode(map(ord, line)) == clean(None, line) != line


def test_fixed_says_what_the_published_rules_ban(models: Models) -> None:
    tokens = models.lm_tokens
    assert isinstance(tokens, Toy)
    question = Toy(tokens.words, [*tokens.texts[:45], "?", " ."])
    models = replace(models, lm_tokens=question)
    faithful, fixed = Released(models), Released(models, faithful=False)
    assert faithful.sets.banned[45]
    assert not fixed.sets.banned[45]
    assert fixed.sets.sentence_end[45] > faithful.sets.sentence_end[45]
    assert not faithful.sets.word_start[46]  # its space is tidied away
    assert fixed.sets.word_start[46]


def test_fixed_has_exact_rotary_frequencies(models: Models) -> None:
    assert Released(models).models.lm.llm.config.rope_bf16
    assert not Released(models, faithful=False).models.lm.llm.config.rope_bf16
    Released(models)  # shared with the other tests


def test_quirk_two_blanks_make_an_empty_word(models: Models) -> None:
    assert Released(models, faithful=False).check_text(" one  two\n") == ["one", "two"]
    assert Released(models).check_text(" one  two\n") == ["one", "", "two"]


def test_a_text_is_spoken_at_once_unless_it_is_too_long(system: Released) -> None:
    assert system.spans(PROMPT * 10) == [(0, 40)]
    words = [*PROMPT[:3], "four."] * 60  # 7 tokens each time
    assert isinstance(system.models.asr_tokens, Toy)
    system.models.asr_tokens.words[" four."] = [93]
    spans = system.spans(words)
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    assert spans[-1][1] == 240
    assert all(b % 4 == 0 and (b - a) // 4 * 7 <= 235 for a, b in spans)
    assert len(spans) == 2


def test_wrong_inputs_are_named(system: Released) -> None:
    with pytest.raises(ValueError, match="no words"):
        system.encode(buzz(0.5), "  ")
    with pytest.raises(ValueError, match="no special token"):
        system.reply(None, 3, GREEDY, torch.zeros(12), stop="<|eot|>")
    with pytest.raises(ValueError, match="nothing to predict"):
        system.predicted(Speech(PROMPT, None, torch.zeros(12)))
    voice = torch.zeros(12)
    with pytest.raises(ValueError, match="go around a speech"):
        system.reply(Speech(PROMPT, None, voice), 3, GREEDY, voice, around=("<1>", "<2>"))


# ---- sample.py --model


@pytest.fixture
def call(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str, Path]]:
    """call(*flags) -> exit code, stdout, stderr, where the sound is."""
    toy = heard_as(["one", "three"], models)
    monkeypatch.setattr(sample, "open_models", lambda *_: toy)
    audio.write(tmp_path / "in.wav", buzz(0.8), audio.WHISPER_RATE)

    def go(*argv: object, wav: bool = True) -> tuple[int, str, str, Path]:
        path, code = tmp_path / "x.wav", 0
        flags: list[object] = ["--out", path, "--threads", 1, *argv]
        given = [tmp_path / "in.wav"] if wav else []
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*given, *flags])])
        try:
            common.run(sample.main)
        except SystemExit as e:
            code = int(e.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err, path

    return go


PUBLIC = ("--model", "taste", "--asr", "whisper", "--words", 2)
INSTRUCT = ("--mode", "instruct", "--prefix", "<30><12><33>", "--suffix", "<9><27>")


@pytest.mark.parametrize(
    ("argv", "prompt"),
    [
        ([], "one three"),
        (["--fixed", "--new-only"], "one three"),
        (["--text", "two  four", "--top-p", 0], "two  four"),
        (["--mode", "text", "--text", "two one"], "two one"),
        (["--mode", "zero"], None),
        ([*INSTRUCT, "--stop", "<|endoftext|>"], "one three"),
        (["--reconstruct"], "one three"),
        (["--reconstruct", "--through-lm"], "one three"),
        (["--stream"], "one three"),
        (["--short-window"], "one three"),
        (["--stream", *INSTRUCT], "one three"),
    ],
)
def test_every_way_to_run_it(
    argv: list[object], prompt: str | None, call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[list[str]] = []

    def speak(system: Released, speech: Speech, rng: torch.Generator) -> tuple[Tensor, bool]:
        spoken.append(speech.words)
        return its_own(system, speech, rng)

    its_own = Released.speak
    monkeypatch.setattr(Released, "speak", speak)
    code, out, err, path = call(*PUBLIC, *argv)
    assert (code, err) == (0, "")
    assert (f"prompt        {prompt}   (0.80 s)\n" in out) == (prompt is not None)
    assert ("continuation" in out) == ("--reconstruct" not in argv)
    assert len(audio.read(path, None)) > 256
    old = (prompt or "").split(" ")
    alone = prompt is None or {"--new-only", "--mode"} & {*argv}
    if "--stream" in argv:
        assert "first audio" in out
        return
    assert (spoken[0][: len(old)] == old) == (not alone)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--model", "taste"], "--model and --asr"),
        (["--asr", "whisper"], "--model and --asr"),
        (["--fixed"], "--fixed needs --model"),
        (["--through-lm", "--reconstruct"], "--through-lm needs --model"),
        (["--short-window"], "--short-window needs --model"),
        (INSTRUCT, "needs --model"),
        ([*PUBLIC, "--through-lm"], "--reconstruct"),
        ([*PUBLIC, "--mode", "text"], "needs --text"),
        ([*PUBLIC, "--mode", "zero", "--reconstruct"], "leave out --mode zero"),
        ([*PUBLIC, "--prefix", "a", "--suffix", "b"], "--mode instruct"),
        ([*PUBLIC, *INSTRUCT[:4]], "--suffix"),
        ([*PUBLIC, "--stop", "<|eot_id|>"], "--mode instruct"),
        ([*PUBLIC, *INSTRUCT, "--stop", "<|eot|>"], "no special token"),
        ([*PUBLIC, "--mode", "sing"], "--mode"),
        ([*PUBLIC, "--fixed", "--top-p", 0], "--top-p 0"),
        ([*PUBLIC, "--repetition-penalty", 0], "--repetition-penalty 0"),
    ],
)
def test_flags_that_do_not_go_together(argv: list[object], fragment: str, call: Callable) -> None:
    code, _, err, path = call(*argv)
    assert code == 2
    assert err.startswith("error: ")
    assert fragment in err
    assert err.count("\n") == 1
    assert not path.exists()


def test_the_released_system_needs_a_voice(call: Callable) -> None:
    assert "for its voice" in call(*PUBLIC, "--mode", "zero", wav=False)[2]


def test_the_published_settings_are_the_defaults(
    call: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def reply(_: Released, *given: object) -> None:
        seen.extend(given)
        raise ValueError("enough")

    monkeypatch.setattr(Released, "reply", reply)
    assert "enough" in call("--model=taste", "--asr", "whisper", "--mode", "zero")[2]
    assert seen[:3] == [None, 8, Sampling(0.5, 0.3, 1.1)]


def test_models_are_put_together_or_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, cpu = build(), torch.device("cpu")
    taste = {"encoder": m.encoder, "tokenizer": m.tokenizer, "spoken_lm": m.lm}
    taste |= {"speaker": m.speaker, "flow": m.vocoder.flow, "hift": m.vocoder.hift}
    parts = {"taste": taste, "whisper": {"encoder": m.asr_encoder, "decoder": m.asr_decoder}}
    asked = list[torch.dtype | None]()

    def opened(path: Path, dtype: torch.dtype | None) -> dict[str, nn.Module]:
        asked.append(dtype)
        return dict(parts[path.name])

    monkeypatch.setattr(released, "open_public", opened)
    monkeypatch.setattr(
        released.text, "load_tokenizer", lambda p: {"whisper": m.asr_tokens}.get(p.name, p)
    )
    for name in ("taste/llama_tokenizer", "whisper"):
        (tmp_path / name).mkdir(parents=True)
    rules = {"suppress_tokens": [1, 2], "begin_suppress_tokens": [220, 50257]}
    (tmp_path / "whisper" / "generation_config.json").write_text(json.dumps(rules))
    made = open_models(tmp_path / "taste", tmp_path / "whisper", cpu)
    assert made.lm is m.lm
    assert made.encoder is m.encoder
    assert made.asr_decoder is m.asr_decoder
    assert made.vocoder.flow is m.vocoder.flow
    assert made.asr_tokens is m.asr_tokens
    assert made.lm_tokens == tmp_path / "taste" / "llama_tokenizer"
    assert (made.suppress, made.suppress_first) == ([1, 2], [220, 50257])
    assert not any(isinstance(x, LoRALinear) for x in made.lm.modules())  # folded in
    assert asked == [torch.float32] * 2
    taste["spoken_lm"] = build().lm
    halved = open_models(tmp_path / "taste", tmp_path / "whisper", cpu, bf16=True)
    assert asked[2:] == [None] * 2  # as they are stored
    assert halved.encoder.conv1.weight.dtype == torch.bfloat16
    assert any(isinstance(x, LoRALinear) for x in halved.lm.modules())
    del parts["taste"]["speaker"]
    with pytest.raises(ValueError, match=r"taste: lacks \['speaker'\]"):
        open_models(tmp_path / "taste", tmp_path / "whisper", cpu)


def test_halved_it_hears_goes_on_and_speaks() -> None:
    m = build()
    for part in (m.asr_encoder, m.asr_decoder, m.encoder, m.tokenizer, m.lm, m.vocoder):
        ready(part, bf16=True)
    assert {layer.base.weight.dtype for layer in lora.lora_layers(m.lm.llm)} == {torch.bfloat16}
    assert {x.dtype for x in (m.lm.audio.weight, *m.lm.head.parameters())} == {torch.float32}
    for faithful in (True, False):
        system = Released(m, faithful)
        with torch.autocast("cpu", torch.bfloat16):
            assert isinstance(system.transcribe(buzz(1.0)), str)
            prompt = system.encode(buzz(1.0), " ".join(PROMPT))
            new, _ = system.reply(prompt, 3, GREEDY if faithful else Sampling(), prompt.voice)
            wav, _ = system.speak(prompt.join(new), max_ratio=2.0)
        assert wav.isfinite().all()
        assert wav.dtype == torch.float32
