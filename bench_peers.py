"""The same weights in two implementations: ours, and the library's that a user would pick instead.

    library(sizes), random weights --its names, our public loaders--> our model

Where the model is large, the two share their weights: nothing is copied. The libraries are those of
requirements-dev.txt. Each is imported when it is asked for: ModuleNotFoundError where it is absent.
"""

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import llm
import lora
import rvq
import s3_units
import whisper_dec
import whisper_enc
from fsq import FSQ, FSQConfig
from llm import Llama, LlamaConfig
from rvq import RVQ, RVQConfig
from s3_units import S3Config, S3Units
from weights import load_strict, rename
from whisper_dec import DecoderConfig, WhisperDecoder
from whisper_enc import EncoderConfig, WhisperEncoder

SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}
GROUP = 4  # channels of a codebook of the peer of FSQ


def named(library: str, how: str = "") -> str:
    """transformers -> 'transformers 5.23.0, SDPA'"""
    return f"{library} {version(library)}{', ' if how else ''}{how}"


def state(peer: nn.Module, at: str = "") -> dict[str, Tensor]:
    return {at + name: x.detach() for name, x in peer.state_dict().items()}


def whisper_config(enc: EncoderConfig, dec: DecoderConfig) -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=dec.vocab, num_mel_bins=enc.n_mels, d_model=dec.width, encoder_layers=enc.layers,
        encoder_attention_heads=enc.heads, encoder_ffn_dim=enc.ffn, decoder_layers=dec.layers,
        decoder_attention_heads=dec.heads, decoder_ffn_dim=dec.ffn,
        max_target_positions=dec.max_tokens, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, **SDPA,
    )  # fmt: skip


def encoder(enc: EncoderConfig, dec: DecoderConfig, device: torch.device) -> tuple[Any, Any]:
    """Ours, and transformers' WhisperEncoder."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Peer

    with device:
        peer = Peer(whisper_config(enc, dec)).eval()
    with torch.device("meta"):
        model = WhisperEncoder(enc).eval()
    load_strict(model, rename(state(peer, "encoder."), whisper_enc.NAMES))
    return model, peer


def decoder(enc: EncoderConfig, dec: DecoderConfig, device: torch.device) -> tuple[Any, Any]:
    """Ours, and transformers' WhisperForConditionalGeneration, whose encoder is not asked."""
    from transformers import WhisperForConditionalGeneration

    with device:
        peer = WhisperForConditionalGeneration(whisper_config(enc, dec)).eval()
    with torch.device("meta"):
        model = WhisperDecoder(dec).eval()
    load_strict(model, rename(state(peer), whisper_dec.NAMES, whisper_dec.SKIP))
    return model, peer


def s3(cfg: S3Config, device: torch.device) -> tuple[Any, Any]:
    """Ours, and s3tokenizer's S3Tokenizer."""
    from s3tokenizer.model import ModelConfig, S3Tokenizer

    kind = "speech_tokenizer_v1" + ("_25hz" if cfg.strides == (2, 2) else "")
    config = ModelConfig(cfg.n_mels, cfg.max_frames, cfg.width, cfg.heads, cfg.layers, cfg.codes)
    with device:
        peer, model = S3Tokenizer(kind, config).eval(), S3Units(cfg).eval()
    peer.quantizer._codebook.embed.normal_(std=cfg.width**-0.5)
    s3_units.load_public(model, state(peer))
    return model, peer


def residual(cfg: RVQConfig, device: torch.device) -> tuple[Any, Any]:
    """Ours, and vector-quantize-pytorch's ResidualVQ, set as TASTE trained it."""
    from vector_quantize_pytorch import ResidualVQ

    peer = ResidualVQ(
        dim=cfg.dim, codebook_dim=cfg.codebook_dim, codebook_size=cfg.codebook_size,
        num_quantizers=cfg.quantizers, decay=cfg.decay, kmeans_init=False, rotation_trick=False,
    ).to(device)  # fmt: skip
    model = RVQ(cfg).to(device)
    # the public checkpoint, an older version's, keeps its flags as floats
    theirs = {k: x if x.ndim else x[None].float() for k, x in state(peer, "rvq.").items()}
    load_strict(model, rename(theirs, rvq.NAMES, rvq.SKIP))
    return model, peer


def finite(cfg: FSQConfig, device: torch.device) -> tuple[Any, Any]:
    """Ours, and vector-quantize-pytorch's FSQ, in as many codebooks as its numbers of codes need:
    one for all channels would have 8^64 codes."""
    from vector_quantize_pytorch import FSQ as Peer

    levels, groups = [cfg.levels] * GROUP, cfg.d // GROUP
    peer = Peer(levels, dim=cfg.dim, num_codebooks=groups, preserve_symmetry=True)
    model = FSQ(cfg).to(device)
    model.encoder.load_state_dict(peer.project_in.state_dict())
    model.decoder.load_state_dict(peer.project_out.state_dict())
    return model, peer.to(device)


def llama(cfg: LlamaConfig, device: torch.device) -> tuple[Any, Any]:
    """Ours, and transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_factor is not None:
        rope |= {
            "rope_type": "llama3", "factor": cfg.rope_factor, "low_freq_factor": cfg.rope_low,
            "high_freq_factor": cfg.rope_high,
            "original_max_position_embeddings": cfg.rope_original,
        }  # fmt: skip
    config = Config(
        vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=cfg.ffn,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_tokens, tie_word_embeddings=True, rope_parameters=rope,
        **SDPA,
    )  # fmt: skip
    with device:
        peer = LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        model = Llama(cfg).eval()
    load_strict(model, llm.settle_head(cfg, rename(state(peer), llm.NAMES))[1])
    return model, peer


def adapted(model: Llama, peer: Any, rank: int) -> Any:
    """The peer of `model`, which has LoRA on all layers, with peft's, and the same A and B."""
    from peft import LoraConfig, get_peft_model

    targets = {name.rsplit(".", 2)[1] for name in lora.lora_state(model)}
    scale = lora.lora_layers(model)[0].scale
    config = LoraConfig(
        r=rank, lora_alpha=round(scale * rank), target_modules=[f"{x}_proj" for x in targets],
        lora_dropout=0.0,
    )  # fmt: skip
    peer, ours = get_peft_model(peer, config).train(), lora.lora_state(model)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if p.requires_grad:
                p.copy_(ours[next(iter(rename(rename({name: p}, lora.NAMES), llm.NAMES)))])
    return peer
