"""Which size a public model has, told by the shapes of its tensors.

    {our name: tensor} of a part --tables: which axis is which field--> config --> model, no storage

A public file rarely says how large its model is, and where a config.json does, each system has
words of its own; the shapes always tell. What they do not tell is the default of our config: that
of the released files. A tensor that is missing gives the default size too, so that load_strict
names it with all others. Attention heads have 64 channels in all these systems, but for the unit
decoder and the flow's encoder, whose position biases show them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import aggregator as agg
import flow
import hift
import llm
import rvq
import s3_units
import speaker
import spoken_lm
import unit_decoder
import whisper_dec
import whisper_enc
from tokenizer import SpeechTokenizer, TokenizerConfig

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)
# field of a config: "tensor axis", or how many numbers there are at the #
ENCODER = dict(n_mels="conv1.weight 1", width="conv1.weight 0", layers="blocks.#.",
               ffn="blocks.0.mlp.0.weight 0", max_frames="positions 0")  # fmt: skip
DECODER = dict(vocab="tokens.weight 0", width="tokens.weight 1", layers="blocks.#.",
               ffn="blocks.0.mlp.0.weight 0", max_tokens="positions 0")  # fmt: skip
BOOKS = dict(dim="project_in.weight 1", codebook_dim="project_in.weight 0",
             codebook_size="layers.0.count 1", quantizers="layers.#.")  # fmt: skip
UNIT_DECODER = dict(
    vocab="text_embed.weight 0", units="unit_embed.weight 0", audio_dim="audio_in.weight 1",
    speaker_dim="speaker.weight 1", embed_dim="text_embed.weight 1", width="marks.weight 1",
    branch_width="text_out.weight 1", heads="lm.blocks.0.attn.bias_u 0",
    ffn="lm.blocks.0.fc1.weight 0", text_blocks="text.blocks.#.", audio_blocks="audio.blocks.#.",
    lm_blocks="lm.blocks.#.",
)  # fmt: skip
LLAMA = dict(vocab="embed.weight 0", width="embed.weight 1", layers="layers.#.",
             ffn="layers.0.ffn.gate.base.weight 0")  # fmt: skip
S3 = dict(n_mels="conv1.weight 1", width="conv1.weight 0", layers="blocks.#.",
          ffn="blocks.0.up.weight 0", max_frames="positions 0", codes="codebook 0")  # fmt: skip
SPEAKER = dict(dim="out.weight 0", init_channels="tdnn.weight 0",
               head_channels="head.conv1.weight 0",
               growth="blocks.1.layers.1.local.weight 0")  # fmt: skip
FLOW = dict(
    units="encoder.embed.weight 0", width="encoder.embed.weight 1", blocks="encoder.blocks.#.",
    heads="encoder.blocks.0.bias_u 0", ffn="encoder.blocks.0.ff1.weight 0",
    mels="speaker.weight 0", speaker="speaker.weight 1", mid_stages="estimator.mid.#.",
    stage_blocks="estimator.mid.0.blocks.#.",
)  # fmt: skip
HIFT = dict(channels="pre.bias 0", f0_channels="f0.out.weight 1")
WHISPER = {"model_type": "whisper", "activation_function": "gelu", "scale_embedding": False}


@dataclass
class Part:
    """The tensors of one part of the system, and what else tells its sizes."""

    ours: dict[str, Tensor]  # by our names; build() adds and drops what the model wants so
    config: Mapping[str, Any]  # config.json beside the file
    head: int  # channels of an attention head
    models: Mapping[str, nn.Module]  # the parts before this one

    def size(self, where: str, prefix: str = "") -> int | None:
        """An entry of the tables; None if the tensor is not there."""
        if "#" in where:
            row = re.escape(prefix + where).replace(r"\#", r"(\d+)")
            return len({m[1] for name in self.ours if (m := re.match(row, name))}) or None
        name, axis = where.split()
        shape = self.ours[prefix + name].shape if prefix + name in self.ours else ()
        return shape[int(axis)] if int(axis) < len(shape) else None

    def heads(self, where: str, key: str = "") -> int | None:
        return self.config.get(key) or (self.size(where) or 0) // self.head or None

    def fill(
        self, cls: Callable[..., Config], table: Mapping[str, str], prefix: str = "", **more: Any
    ) -> Config:
        sizes = {field: self.size(where, prefix) for field, where in table.items()} | more
        return cls(**{k: v for k, v in sizes.items() if v is not None})


def hollow(build: Callable[..., Model], *args: Any) -> Model:
    """The model without storage: load_strict lets it take the tensors of the file."""
    with torch.device("meta"):
        return build(*args)


def refuse(config: Mapping[str, Any]) -> None:
    """ValueError: a relative of Whisper that our encoder and decoder do not compute."""
    for key, ours in WHISPER.items() if "encoder_attention_heads" in config else ():
        if config.get(key, ours) != ours:
            raise ValueError(f"config.json: {key}={config[key]!r}, only {ours!r} is supported")


def encoder(p: Part) -> nn.Module:
    refuse(p.config)
    heads = p.heads("conv1.weight 0", "encoder_attention_heads")
    config = p.fill(whisper_enc.EncoderConfig, ENCODER, heads=heads)
    return hollow(whisper_enc.WhisperEncoder, config)


def decoder(p: Part) -> nn.Module:
    heads = p.heads("tokens.weight 1", "decoder_attention_heads")
    config = p.fill(whisper_dec.DecoderConfig, DECODER, heads=heads)
    return hollow(whisper_dec.WhisperDecoder, config)


def text_lm(p: Part) -> nn.Module:
    """Here config.json decides: nothing else tells the rotary positions."""
    config, p.ours = llm.settle_head(llm.LlamaConfig.from_hf(p.config), p.ours)
    return hollow(llm.Llama, config)


def tokenizer(p: Part) -> nn.Module:
    inner = "aggregator.decoder."
    words = p.fill(agg.AggregatorConfig, DECODER, inner, heads=p.heads(f"{inner}tokens.weight 1"))
    units = p.fill(unit_decoder.UnitDecoderConfig, UNIT_DECODER, "unit_decoder.")
    books = p.fill(rvq.RVQConfig, BOOKS, "quantizer.")
    config = TokenizerConfig(words, units, "rvq", rvq=books, recon_weight=1.0)
    return hollow(SpeechTokenizer, config)


def spoken(p: Part) -> nn.Module:
    """Rotary positions, LoRA's alpha and the word delay are those of the released model."""
    q, k, A = (f"llm.layers.0.attention.{x} 0" for x in ("q.base.weight", "k.base.weight", "q.A"))
    sizes = dict(heads=p.heads(q), kv_heads=p.heads(k), head_dim=p.head, rope_bf16=True)
    config = p.fill(llm.LlamaConfig, LLAMA, "llm.", **sizes)
    config, p.ours = llm.settle_head(config, p.ours, "llm.")
    head = "latent"
    if "head.linear.weight" in p.ours:  # b_logvar beside it has no use
        head = "token" if p.ours.pop("head.logvar", None) is None else "token_mse"
    quantizer = p.models["tokenizer"].quantizer
    assert isinstance(quantizer, rvq.RVQ)
    rank = p.size(A) or 64
    whole = spoken_lm.SpokenLMConfig(
        config, lora_rank=rank, lora_alpha=2.0 * rank, audio_dim=quantizer.config.dim, head=head,
        n_codebooks=quantizer.n_codebooks, n_codes=quantizer.n_codes,
        latent_dim=quantizer.config.codebook_dim,
    )  # fmt: skip
    return hollow(spoken_lm.SpokenLM, whole, quantizer)


def units(p: Part) -> nn.Module:
    heads, strides = p.heads("conv1.weight 0"), p.config.get("strides")
    config = p.fill(s3_units.S3Config, S3, heads=heads, strides=strides)
    p.ours = s3_units.complete(p.ours, config.codes)
    return hollow(s3_units.S3Units, config)


def voice(p: Part) -> nn.Module:
    counts = [p.size(f"blocks.{i}.layers.#.") for i in (1, 2, 3)]
    blocks = tuple((n, 1 if i == 0 else 2) for i, n in enumerate(counts) if n)  # n, dilation
    inner, growth = (p.size(f"blocks.1.layers.1.{x}.weight 0") for x in ("squeeze", "local"))
    bottleneck = inner // growth if inner and growth else None
    more: dict[str, Any] = dict(blocks=blocks or None, bottleneck=bottleneck)
    model = hollow(speaker.CAMPlus, p.fill(speaker.CAMPlusConfig, SPEAKER, **more))
    p.ours = speaker.complete(p.ours, model)
    return model


def mel(p: Part) -> nn.Module:
    levels = range(p.size("estimator.down.#.") or 0)
    channels = tuple(p.size(f"estimator.down.{i}.skip.bias 0") or 0 for i in levels)
    heads = p.heads("estimator.mid.0.blocks.0.q.weight 0")
    more: dict[str, Any] = dict(channels=channels or None, estimator_heads=heads, head_width=p.head)
    return hollow(flow.Flow, p.fill(flow.FlowConfig, FLOW, **more))


def wave(p: Part) -> nn.Module:
    """Weights split as for training: fold() makes it faster, and needs their size once more."""
    model = hollow(hift.HiFT, p.fill(hift.HiFTConfig, HIFT))
    p.ours = hift.respell(p.ours, model.state_dict().keys())
    return model


BUILD = {
    "encoder": encoder, "decoder": decoder, "llm": text_lm, "tokenizer": tokenizer,
    "spoken_lm": spoken, "s3": units, "speaker": voice, "flow": mel, "hift": wave,
}  # fmt: skip
