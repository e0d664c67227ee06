"""public.py: files of every public kind, whole and damaged, and the two commands."""

import base64
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import public
import whisper_dec
from flow import Flow
from hift import HiFT
from public import assemble, check, convert, open_public
from s3_units import S3Units
from spoken_lm import SpokenLM
from text import train_sentencepiece
from tokenizer import SpeechTokenizer
from weights import read_config, read_tensors, save_model

GOLDEN = Path(__file__).parent / "golden"
COSY = GOLDEN / "cosyvoice"


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def weights_of(file: str) -> dict[str, Tensor]:
    return {k[2:]: v for k, v in load_file(COSY / f"{file}.safetensors").items() if k[:2] == "w."}


def taste() -> dict[str, Tensor]:
    """The small TASTE of the golden files, its two large tables filled in."""
    tensors = load_file(GOLDEN / "taste/full_weights.safetensors")
    for name in [k.removesuffix(".rows") for k in tensors if k.endswith(".rows")]:
        rows, ids = tensors.pop(f"{name}.rows"), tensors.pop(f"{name}.row_ids")
        size = 51866 if "segmenter" in name else 128256
        tensors[name] = torch.zeros(size, rows.shape[1]).index_copy(0, ids, rows)
    return tensors


def manifest(name: str) -> dict[str, Tensor]:
    """All tensors of a released file, without their numbers."""
    if name == "voice_generator":
        parts = {part: manifest(part) for part in ("flow", "hift")}
        return {f"{part}.{k}": v for part, own in parts.items() for k, v in own.items()}
    if (path := COSY / f"manifest_{name}.json").exists():
        rows = {k: (v["dtype"], v["shape"]) for k, v in read_json(path).items() if k != "_meta"}
    else:
        rows = read_json(GOLDEN / f"manifests/{name}.json")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int64": torch.int64}
    return {k: torch.empty(s, dtype=kinds[d], device="meta") for k, (d, s) in rows.items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def total(models: dict[str, nn.Module]) -> dict[str, int]:
    return {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}


# --- every public file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("taste", {"encoder": 636968960, "tokenizer": 273516035, "spoken_lm": 1284711682}),
        ("voice_generator", {"flow": 104874752, "hift": 20460591}),
        ("flow", {"flow": 104874752}),
        ("hift", {"hift": 20460591}),
        ("s3", {"s3": 123466240}),
        ("campplus", {"speaker": 6848544}),
    ],
)
def test_every_released_name_and_shape_has_its_place(name: str, sizes: dict[str, int]) -> None:
    assert total(assemble(manifest(name), {}, name)) == sizes


def test_a_head_of_its_own_and_other_spellings_of_taste() -> None:
    released = manifest("taste")
    lm = "spoken_lm.language_model.base_model.model."
    head = {f"{lm}lm_head.weight": released[f"{lm}model.embed_tokens.weight"]}
    models = assemble(released | head, {}, "taste")
    assert total(models)["spoken_lm"] == 1284711682 + 128256 * 2048
    plain = {
        k.replace(".default.", ".").replace("base_model.model.", ""): v for k, v in released.items()
    }
    assert assemble(plain, {}, "adapter names of peft").keys() == models.keys()


@pytest.mark.parametrize("head", ["latent", "token", "token_mse"])
def test_heads_of_taste(head: str) -> None:
    tensors, name = taste(), "spoken_lm.extract_for_bridge_out_llm."
    if head != "latent":
        for key in ("fc_mu.weight", "fc_mu.bias", *(["b_logvar"] if head == "token" else [])):
            del tensors[name + key]
        tensors |= {
            f"{name}linear.weight": torch.ones(96, 32),
            f"{name}linear.bias": torch.ones(96),
        }
    lm = assemble(tensors, {}, "x", 8)["spoken_lm"]
    assert isinstance(lm, SpokenLM)
    assert lm.config.head == head
    assert (lm.config.lora_rank, lm.config.lora_alpha) == (4, 8)


@torch.no_grad()
def test_taste_opens_and_gives_the_public_numbers(tmp_path: Path) -> None:
    tensors, g = taste(), load_file(GOLDEN / "taste/full_forward.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    models = open_public(tmp_path, head=8)
    encoder, tokenizer, lm = models["encoder"], models["tokenizer"], models["spoken_lm"]
    assert isinstance(tokenizer, SpeechTokenizer)
    assert isinstance(lm, SpokenLM)
    assert lm.quantizer is tokenizer.quantizer
    last, taps = encoder(g["audio_features"].mT, taps=(2,))
    keep = torch.arange(9) < g["asr_token_lengths"][:, None]
    ids, word_ids = g["asr_token_ids"], g["asr_word_ids"].long().masked_fill(~keep, -1)
    z = tokenizer.aggregator(ids, word_ids, last, taps[2][:, None])
    close(z[keep], g["z_unquantised"][keep])
    assert torch.equal(tokenizer.quantizer.encode(z, keep)[keep], g["asr_indices"][keep])
    units = tokenizer.unit_decoder(
        ids, keep, g["audio_unit_embeds"], g["speaker_embeds"],
        g["speech_token_ids"].masked_fill(
            torch.arange(17) >= g["speech_token_lengths"][:, None], -1
        ),
    )  # fmt: skip
    for b in range(3):  # the public code pads on the right, ours on the left
        n, start = int(g["speech_token_lengths"][b]) + 1, int(g["asr_token_lengths"][b]) + 2
        theirs = g["stage1_speech_logits"][b, start : start + n]
        close(units.logits[b, :n].log_softmax(-1), theirs.log_softmax(-1))


def opened(tmp_path: Path, file: str, name: str, head: int) -> dict[str, nn.Module]:
    torch.save(weights_of(file), tmp_path / name)
    return open_public(tmp_path / name, head=head)


@torch.no_grad()
def test_cosyvoice_files_give_the_public_numbers(tmp_path: Path) -> None:
    g = load_file(COSY / "flow.safetensors")
    flow = opened(tmp_path, "flow", "flow.pt", 16)["flow"]
    assert isinstance(flow, Flow)
    mel, _ = flow.sample(
        g["inf.token"], torch.tensor([50]), g["inf.embedding"], noise=g["inf.z_noprompt"]
    )
    close(mel, g["inf.mel_noprompt_taste_nearest"])
    g = load_file(COSY / "hift.safetensors")
    hift = opened(tmp_path, "hift", "hift.pt", 64)["hift"]
    assert isinstance(hift, HiFT)
    close(hift.decode(g["in.mel"], g["src.source"][:, 0]), g["out.wav"])
    g = load_file(COSY / "campplus.safetensors")
    voice = opened(tmp_path, "campplus", "campplus_cn_common.bin", 64)["speaker"]
    close(voice(g["in.fbank0"][None]), g["out.emb0"])
    g = load_file(COSY / "s3_tokenizer.safetensors")
    units = opened(tmp_path, "s3_tokenizer", "s3.pt", 16)["s3"]
    assert torch.equal(units(g["in.mel"], g["in.mel_len"])[1], g["out.code_len"])
    assert torch.equal(units(g["in.mel"][:1])[0], g["out.codes"][:1])
    slow = opened(tmp_path, "s3_tokenizer", "speech_tokenizer_v1_25hz.pt", 16)["s3"]
    assert slow(g["in.mel"])[0].shape == (2, 51)
    (tmp_path / "campplus.onnx").write_bytes(b"to be converted first")
    folder = open_public(tmp_path, head=16)  # all of it, as `hf download` leaves it
    assert folder.keys() == {"flow", "hift", "speaker", "s3"}


def test_the_vocoder_of_taste(tmp_path: Path) -> None:
    parts = {part: weights_of(part) for part in ("flow", "hift")}
    both = {f"{part}.{k}": v for part, own in parts.items() for k, v in own.items()}
    (tmp_path / "cosyvoice").mkdir()
    torch.save(both, tmp_path / "cosyvoice/voice_generator.pth")
    models = open_public(tmp_path, torch.float16, head=16)
    assert [type(m) for m in models.values()] == [Flow, HiFT]
    assert {p.dtype for m in models.values() for p in m.parameters()} == {torch.float16}


# --- Whisper and Llama, as transformers writes them ----------------------------------------------

WHISPER = dict(
    vocab_size=60, num_mel_bins=6, d_model=24, encoder_layers=2, encoder_attention_heads=3,
    encoder_ffn_dim=20, decoder_layers=3, decoder_attention_heads=2, decoder_ffn_dim=40,
    max_source_positions=13, max_target_positions=20, pad_token_id=0, bos_token_id=1,
    eos_token_id=1, decoder_start_token_id=2, begin_suppress_tokens=None, suppress_tokens=None,
)  # fmt: skip


def whisper(seed: int = 0) -> Any:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    model.model.decoder.embed_positions.weight.data *= 5  # it says something else at each step
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", ["50MB", "20KB"])
@torch.no_grad()
def test_whisper_folders_transcribe_like_transformers(
    tmp_path: Path, dtype: torch.dtype, shards: str
) -> None:
    theirs = whisper().to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "50MB")
    stored = open_public(tmp_path)
    assert {p.dtype for p in stored["encoder"].parameters()} == {dtype}
    models: dict[str, Any] = open_public(tmp_path, torch.float32)
    mel, prefix = torch.randn(3, 6, 26), [2, 7]
    last, _ = models["encoder"](mel)
    ours = whisper_dec.transcribe(models["decoder"], last, prefix=prefix, eos=1, max_new=12)
    theirs = theirs.float()
    close(last, theirs.model.encoder(mel).last_hidden_state)
    ids = torch.tensor([prefix] * 3)
    for _ in range(12):
        step = theirs(mel, decoder_input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], 1)
    rows = [row[: row.index(1)] if 1 in row else row for row in ids[:, 2:].tolist()]
    assert ours == rows
    assert len({i for row in rows for i in row}) > 3


def test_a_relative_of_whisper_is_refused(tmp_path: Path) -> None:
    whisper().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    for key, value in {"activation_function": "relu", "scale_embedding": True}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"Whisper\): encoder: config\.json: {key}="):
            open_public(tmp_path)


def openai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> those of openai's .pt files"""
    new = {}
    for key, value in state.items():
        for a, b in (
            ("model.", ""), (".layers.", ".blocks."), ("self_attn_layer_norm", "attn_ln"),
            ("encoder_attn_layer_norm", "cross_attn_ln"), ("final_layer_norm", "mlp_ln"),
            ("self_attn", "attn"), ("encoder_attn", "cross_attn"), ("q_proj", "query"),
            ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"), ("fc1", "mlp.0"),
            ("fc2", "mlp.2"), ("embed_tokens", "token_embedding"),
            ("embed_positions.weight", "positional_embedding"),
            ("encoder.layer_norm", "encoder.ln_post"), ("decoder.layer_norm", "decoder.ln"),
        ):  # fmt: skip
            key = key.replace(a, b)
        new[key] = value
    return new


@pytest.mark.parametrize("zipped", [True, False])
def test_openais_own_file(tmp_path: Path, zipped: bool) -> None:
    theirs = whisper(1)
    state = theirs.state_dict()
    del state["proj_out.weight"]
    file = {"dims": {"n_mels": 6}, "model_state_dict": openai_names(state)}
    torch.save(file, tmp_path / "tiny.pt", _use_new_zipfile_serialization=zipped)
    theirs.save_pretrained(tmp_path / "hf")
    ours, same = open_public(tmp_path / "tiny.pt", head=8), open_public(tmp_path / "hf")
    for part in ("encoder", "decoder"):
        a, b = ours[part].state_dict(), same[part].state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_llama_folders(tmp_path: Path, tied: bool) -> None:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = hf.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    lm: Any = open_public(tmp_path)["llm"]
    ids = torch.randint(50, (2, 9))
    close(lm.logits(lm(ids)), theirs(ids).logits)


# --- what is wrong with a file -------------------------------------------------------------------


def test_one_error_names_all_differences_of_all_parts(tmp_path: Path) -> None:
    tensors, tower = taste(), "audio_tower.audio_joint_encoder_segmenter."
    del tensors[f"{tower}audio_encoder.encoder.layers.1.fc1.bias"]
    del tensors["spoken_lm.fuse_for_bridge_in_llm.linear.bias"]
    tensors["speech_decoder.llm_decoder.bias"] = torch.zeros(7)
    tensors["audio_tower.vq.rvq.project_out.bias"] = torch.zeros(32, dtype=torch.int32)
    tensors["spoken_lm.surprise"], tensors["audio_tower.other"] = torch.zeros(2, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"\(TASTE\): 7 problems") as e:
        open_public(tmp_path, head=8)
    assert str(e.value).split("\n  ")[1:] == [
        "audio_tower.other: maps to nothing, expected one free name",
        "encoder.blocks.1.mlp.0.bias: in the model, not in the file",
        "spoken_lm.audio.bias: in the model, not in the file",
        "spoken_lm.quantizer.project_out.bias: torch.int32 in the file, torch.float32 here",
        "spoken_lm.surprise: maps to nothing, expected one free name",
        "tokenizer.quantizer.project_out.bias: torch.int32 in the file, torch.float32 here",
        "tokenizer.unit_decoder.head.bias: [7] in the file, [41] here",
    ]


KINDS = {"flow": "encoder_proj.bias", "hift": "conv_post.bias",
         "campplus": "head.bn1.bias", "s3_tokenizer": "encoder.conv1.bias"}  # fmt: skip


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("fault", ["missing", "extra", "misshaped", "float8", "int64"])
def test_a_wrong_tensor_in_each_kind_of_file(tmp_path: Path, file: str, fault: str) -> None:
    tensors, name = weights_of(file), KINDS[file]
    match fault:
        case "missing":
            del tensors[name]
        case "extra":
            tensors["extra"] = torch.zeros(2)
        case "misshaped":
            tensors[name] = torch.zeros(3, 3, 3, 3)
        case "float8":
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        case "int64":
            tensors[name] = tensors[name].long()
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt \(.*\): 1 problems\n  ") as e:
        open_public(tmp_path / "x.pt", head=16)
    assert {"missing": "not in the file", "extra": "maps to nothing", "misshaped": "[3, 3, 3, 3]",
            "float8": "float8_e4m3fn in", "int64": "int64 in"}[fault] in str(e.value)  # fmt: skip


def test_sizes_that_cannot_be_name_the_file_and_the_rest(tmp_path: Path) -> None:
    tensors = weights_of("flow") | {
        "input_embedding.weight": torch.zeros(3, 3),
        "new": torch.ones(1),
    }
    torch.save(tensors, tmp_path / "flow.pt")
    with pytest.raises(
        ValueError, match=r"flow\.pt \(CosyVoice flow\): flow: the flow needs width"
    ) as e:
        open_public(tmp_path / "flow.pt", head=16)
    assert "\n  new: maps to nothing" in str(e.value)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name", ["flow.pt", "voice_generator.pth", "campplus.bin", "pytorch_model.bin"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, name: str, zipped: bool) -> None:
    mark, path = tmp_path / "executed", tmp_path / "model" / name
    path.parent.mkdir()
    file = weights_of("flow") | {"extra": Bomb(mark)}
    torch.save(file, path, _use_new_zipfile_serialization=zipped)
    whole = path.parent if name == "pytorch_model.bin" else path
    with pytest.raises(ValueError, match=r"damaged or not a weight file"):
        open_public(whole)
    assert check(path.parent)[1]
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the same file does harm elsewhere
    assert mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "flow.pt"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (save_file if "safe" in name else torch.save)(weights_of("flow"), path)
    whole = path.read_bytes()
    for n in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged or not a weight file"):
            open_public(path)


def test_shards_hold_what_the_index_says(tmp_path: Path) -> None:
    whisper().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = read_json(index)
    where = dict(good["weight_map"])
    (first, file), (second, _) = sorted(where.items())[:2]
    where["model.new"] = where.pop(first)
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match="2 problems") as e:
        open_public(tmp_path)
    assert f"{first}: in {file}, the index has it elsewhere" in str(e.value)
    assert f"model.new: in the index, not in {file}" in str(e.value)
    for odd in ("../model.safetensors", 3, None, ["a"]):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {second: odd}}))
        with pytest.raises(ValueError, match="is no name of a file in this folder"):
            open_public(tmp_path)


def test_unknown_files(tmp_path: Path) -> None:
    torch.save({"llm.weight": torch.zeros(2)}, tmp_path / "llm.pt")
    with pytest.raises(ValueError, match=r"llm\.pt: no public file that is known; it has \['llm"):
        open_public(tmp_path / "llm.pt")
    with pytest.raises(ValueError, match="no weights of a known kind"):
        open_public(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such weight file"):
        open_public(tmp_path / "flow.pt")


# --- loading costs what the file costs -----------------------------------------------------------


def test_models_take_the_tensors_of_the_file(tmp_path: Path) -> None:
    """No copy, no rounding, and none left without storage."""
    tensors = taste()
    table = "spoken_lm.language_model.base_model.model.model.embed_tokens.weight"
    tensors[table] = tensors[table].bfloat16()
    torch.save(tensors, tmp_path / "taste.pt")
    models = open_public(tmp_path / "taste.pt", head=8)
    lm = models["spoken_lm"]
    assert isinstance(lm, SpokenLM)
    assert lm.llm.embed.weight.dtype == torch.bfloat16
    assert lm.audio.weight.dtype == torch.float32
    state = {k: v for m in models.values() for k, v in m.state_dict().items()}
    assert not any(v.is_meta for v in state.values())
    learns = {k for k, p in lm.named_parameters() if p.requires_grad}
    assert learns == {
        k for k, p in SpokenLM(lm.config, lm.quantizer).named_parameters() if p.requires_grad
    }
    file = read_tensors(tmp_path / "taste.pt")
    one: Any = assemble(file, {}, "x", 8)["spoken_lm"]
    assert (
        one.audio.weight.data_ptr()
        == file["spoken_lm.fuse_for_bridge_in_llm.linear.weight"].data_ptr()
    )


# --- commands ------------------------------------------------------------------------------------


def command(*argv: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["public.py", *map(str, argv)])
        public.run(public.main)


def test_check_says_what_is_there_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {part: weights_of(part) for part in ("flow", "hift")}
    both = {f"{part}.{k}": v for part, own in parts.items() for k, v in own.items()}
    whisper().half().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "cosyvoice").mkdir()
    (tmp_path / "campplus.onnx").write_bytes(b"\x08")
    torch.save(both, tmp_path / "cosyvoice/voice_generator.pth")
    torch.save({"llm.weight": torch.zeros(2)}, tmp_path / "llm.pt")
    command("--check", tmp_path)
    shown = capsys.readouterr().out
    assert "llm.pt: not a file that is known, it has ['llm.weight']" in shown
    theirs = whisper().model  # its token table is the decoder's output layer, too
    sizes = [sum(p.numel() for p in m.parameters()) for m in (theirs.encoder, theirs.decoder)]
    assert f": encoder {sizes[0]:,} + decoder {sizes[1]:,} parameters; stored: " in shown
    assert f"stored: {sum(sizes):,} float16; 0.00 GB" in shown
    assert "cosyvoice/voice_generator.pth: flow " in shown
    assert "campplus.onnx: ONNX: python public.py --convert" in shown
    assert "lacks llm (Llama), tokenizer (TASTE), spoken_lm (TASTE), s3 (" in shown


def test_check_ends_with_all_problems_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(weights_of("hift") | {"new": torch.zeros(1)}, tmp_path / "hift.pt")
    (tmp_path / "flow.pt").write_bytes(b"not a file")
    with pytest.raises(SystemExit) as e:
        command("--check", tmp_path)
    shown = capsys.readouterr()
    assert e.value.code == 2
    assert "hift.pt: see below" in shown.out
    assert "flow.pt: damaged" in shown.err
    assert "new: maps to nothing" in shown.err
    for argv in ([], ["--convert", "x.onnx"], ["--check", tmp_path / "none"]):
        with pytest.raises(SystemExit) as e:
            command(*argv)
        assert e.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_the_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    lines = ["the quiet captain saw seven ships near the old harbor"]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(lines, 300))
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path)
    shown, problems = check(tmp_path)
    assert not problems
    assert any(line.startswith("tokenizer: SentencePiece, ") for line in shown)
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=900, **sizes)).save_pretrained(tmp_path)
    (problem,) = check(tmp_path)[1]
    assert "the tokenizer is SentencePiece, " in problem
    assert problem.endswith("the model beside it has 900")
    rows = [base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rows))  # the other kind of that name
    assert "the tokenizer is byte-level BPE, 512 ids" in check(tmp_path)[1][0]


def test_folders_of_a_bundle_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, nn.Linear(2, 2), {"encoder": {}, "decoder": {}, "eos": 2})
    shown, problems = check(tmp_path)
    assert shown[0].endswith(": trained here, part of a bundle")
    assert not problems
    with pytest.raises(ValueError, match="to be opened with the rest of its bundle"):
        open_public(tmp_path)


def test_convert_writes_folders_that_open_again(tmp_path: Path) -> None:
    torch.save(weights_of("s3_tokenizer"), tmp_path / "s3.pt")
    command("--convert", tmp_path / "s3.pt", "--out", tmp_path / "bundle")
    folder = tmp_path / "bundle/s3"
    source = read_config(folder, "source")
    assert source["file"] == "s3.pt"
    assert len(source["sha256"]) == 64
    again, first = open_public(folder)["s3"], open_public(tmp_path / "s3.pt")["s3"]
    assert isinstance(again, S3Units)
    assert again.cfg == first.cfg
    a, b = again.state_dict(), first.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    whisper().save_pretrained(tmp_path / "whisper")
    with pytest.raises(ValueError, match="no conversion is needed"):
        convert(tmp_path / "whisper/model.safetensors", tmp_path / "out")
