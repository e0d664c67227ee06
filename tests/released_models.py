"""The released system at toy size: the golden TASTE weights under their public names, read through
the project's own name tables, and small random models for what those files do not hold."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import aggregator
import rvq
import unit_decoder
import whisper_enc
from aggregator import AggregatorConfig
from flow import TINY as FLOW
from flow import Flow
from hift import TINY as HIFT
from hift import HiFT
from llm import LlamaConfig
from released import PREFIX, Models
from rvq import RVQConfig
from speaker import TINY as SPEAKER
from speaker import CAMPlus
from spoken_lm import SpokenLMConfig, from_public
from text import Tokenizer
from tokenizer import SpeechTokenizer, TokenizerConfig
from unit_decoder import UnitDecoderConfig
from vocoder import Vocoder
from weights import load_strict, rename
from whisper_dec import DecoderConfig, WhisperDecoder
from whisper_enc import EncoderConfig, WhisperEncoder

GOLDEN = Path(__file__).parent / "golden" / "taste"
TRACES = [f"gen_{mode}_greedy" for mode in ("audio", "text", "zero", "instruct")]
TRACES += ["gen_audio_sampled"]
PROMPT = ["one", "two", "three", "four"]  # what the words of the golden prompt are called here
LLAMA = LlamaConfig(
    vocab=128256, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64, rope_bf16=True,
    max_tokens=4096,
)  # fmt: skip
LM = SpokenLMConfig(LLAMA, lora_rank=4, lora_alpha=8, audio_dim=32, n_codes=24, latent_dim=16)
UNITS = UnitDecoderConfig(
    vocab=128, units=40, audio_dim=32, speaker_dim=12, embed_dim=24, branch_width=48, width=48,
    heads=4, ffn=64, text_blocks=2, audio_blocks=2, lm_blocks=2,
)  # fmt: skip
TOKENIZER = TokenizerConfig(
    AggregatorConfig(51866, 32, 4, 2, 64, 64, value_layers=(2,)),
    UNITS, "rvq", rvq=RVQConfig(dim=32, codebook_dim=16, codebook_size=24),
)  # fmt: skip
ENCODER = EncoderConfig(16, 32, 4, 4, 64, 40)  # hears 0.8 s


class Toy(Tokenizer):
    """One of the tokenizers of the golden traces: a table of words."""

    def __init__(self, words: dict[str, list[int]], texts: list[str]) -> None:
        self.words, self.texts = words, texts
        names = ("endoftext", *PREFIX)
        self.special = {f"<|{name}|>": i for i, name in enumerate(names, start=50257)}

    def encode(self, line: str, special: bool = False) -> list[int]:
        if special and line.startswith("<"):
            return [int(i) for i in line[1:-1].split("><")]
        return self.words.get(line) or [5 + sum(map(ord, line)) % 36]  # ids that both have

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.texts[i] if i < len(self.texts) else "#" for i in ids)


def tokenizers() -> tuple[Toy, Toy]:
    """Whisper's and Llama's. A word of n letters has 1 + (n + 1) % 3 toy Whisper ids."""
    prompt = load_file(GOLDEN / "gen_audio_greedy.safetensors")
    tables: list[dict[str, list[int]]] = [{}, {}]
    for table, kind in zip(tables, ("asr", "llm"), strict=True):
        stream, word_ids = prompt[f"{kind}_token_ids"][0], prompt[f"{kind}_word_ids"][0]
        for i, word in enumerate(PROMPT):
            table[f" {word}"] = stream[word_ids == i].tolist()
    for name in TRACES:
        about = json.loads((GOLDEN / f"{name}.json").read_text())
        final = load_file(GOLDEN / f"{name}.safetensors")["final_asr_token_ids"][0].tolist()
        at = 7 if about["mode"] == "audio" else 0
        for word in about["generated_text"].split():
            size = 1 + (len(word) + 1) % 3
            ids = tables[0].setdefault(f" {word}", final[at : at + size])
            assert ids == final[at : at + size]
            at += size
        assert at == len(final)
    return Toy(tables[0], []), Toy(tables[1], about["toy_llm_vocab"])


def public_tensors() -> dict[str, Tensor]:
    """The golden checkpoint; two of its tables are stored by the rows that are not zero."""
    tensors = load_file(GOLDEN / "full_weights.safetensors")
    for name in [k.removesuffix(".row_ids") for k in tensors if k.endswith(".row_ids")]:
        rows, ids = tensors.pop(f"{name}.rows"), tensors.pop(f"{name}.row_ids")
        vocab = LLAMA.vocab if name.startswith("spoken_lm") else 51866
        tensors[name] = torch.zeros(vocab, rows.shape[1]).index_copy(0, ids, rows)
    return tensors


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build() -> Models:
    tensors, (asr_tokens, lm_tokens) = public_tensors(), tokenizers()
    encoder, tokenizer = WhisperEncoder(ENCODER), SpeechTokenizer(TOKENIZER)
    load_strict(encoder, rename(tensors, whisper_enc.NAMES, whisper_enc.SKIP))
    load_strict(tokenizer.aggregator, rename(tensors, aggregator.NAMES, aggregator.SKIP))
    books = rename(part(tensors, "audio_tower.vq."), rvq.NAMES, rvq.SKIP)
    assert tokenizer.quantizer is not None
    load_strict(tokenizer.quantizer, books)
    load_strict(tokenizer.unit_decoder, rename(tensors, unit_decoder.NAMES, unit_decoder.SKIP))
    lm = from_public(part(tensors, "spoken_lm."), LM, tokenizer.quantizer)
    torch.manual_seed(0)
    speaker = CAMPlus(replace(SPEAKER, dim=12))
    flow = Flow(replace(FLOW, units=40, speaker=12, blocks=1, steps=2))
    vocoder = Vocoder(flow, HiFT(replace(HIFT, channels=16, f0_channels=16)).fold())
    asr = WhisperDecoder(DecoderConfig(51866, 32, 4, 1, 64, 64))
    for model in (encoder, tokenizer, speaker, vocoder, asr):
        model.eval().requires_grad_(False)
    return Models(encoder, asr, asr_tokens, encoder, tokenizer, lm, lm_tokens, speaker, vocoder)
