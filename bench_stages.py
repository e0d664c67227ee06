"""The stages that bench.py times: what we run, what a user would otherwise run, on the same input.

    peer weights --our public loaders--> our model      the two share every weight, nothing is copied
    Case.ours() and Case.peer() give the same tensor    bench.py refuses to time them otherwise

A peer is a library that is installed for the tests only (transformers, peft, s3tokenizer,
vector-quantize-pytorch), or, where no library has the stage, the published way to run it: without
a cache, or with one call for each branch of the guidance. Libraries are imported when asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fsq
import llm
import lora
import rvq
import s3_units
import unit_decoder
import whisper_dec
import whisper_enc
from flow import TINY as FLOW
from flow import Flow, FlowConfig
from fsq import FSQ, FSQConfig
from hift import TINY as HIFT
from hift import HiFT, HiFTConfig
from llm import Llama, LlamaConfig
from rvq import RVQ, RVQConfig
from s3_units import S3Config, S3Units
from unit_decoder import UnitDecoder, UnitDecoderConfig
from vocoder import Vocoder
from weights import Names, load_strict, rename
from whisper_dec import DecoderConfig, WhisperDecoder, transcribe
from whisper_enc import EncoderConfig, WhisperEncoder


@dataclass(frozen=True)
class Sizes:
    """The models of a preset, and how much they are given."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    llm: LlamaConfig
    s3: S3Config
    rvq: RVQConfig
    fsq: FSQConfig
    unit_decoder: UnitDecoderConfig
    flow: FlowConfig
    hift: HiFTConfig
    tokens: int = 32  # to generate, after a prompt of as many
    units: int = 500  # to generate
    seconds: float = 3.0  # to vocode
    words: int = 32  # of an utterance, and 16 utterances in a batch, to quantize
    skip: int = 20  # the uncached loop is timed at every so many units


WHISPER_SMALL = EncoderConfig(80, 768, 12, 12, 3072)
SMOLLM = LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, 10000.0, None, max_tokens=2048)
FULL = Sizes(
    EncoderConfig(), DecoderConfig(layers=32), LlamaConfig(), S3Config(), RVQConfig(), FSQConfig(),
    UnitDecoderConfig(), FlowConfig(), HiFTConfig(),
)  # fmt: skip
SMALL = replace(
    FULL, encoder=WHISPER_SMALL, decoder=DecoderConfig(51865, 768, 12, 12, 3072), llm=SMOLLM,
    rvq=RVQConfig(dim=768), fsq=FSQConfig(dim=768),
)  # fmt: skip
TINY = Sizes(
    replace(whisper_enc.TINY, strides=(1, 2), max_frames=1500),  # 50 Hz: the peer can do no other
    whisper_dec.TINY, llm.TINY, replace(s3_units.TINY, strides=(2, 2), max_frames=1500), rvq.TINY, fsq.TINY,
    unit_decoder.TINY, FLOW, HIFT, seconds=3.0,
)  # fmt: skip
SIZES = {"full": FULL, "small": SMALL, "tiny": TINY}


@dataclass
class Case:
    """One line of the table."""

    what: str
    model: nn.Module
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor] | None = None
    peer_name: str = ""
    reads: int = 0  # bytes of weights and of kept keys that a call cannot avoid to read
    peer_share: float = 1.0  # of its work that the peer does, its time is divided by it
    tolerance: float = 1e-4  # of floats, relative to the largest


Stage = Callable[[Sizes, torch.device, bool], Case]


def size(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(x.nbytes for x in {x.data_ptr(): x for x in model.state_dict().values()}.values())


def package(name: str) -> str:
    return f"{name} {version(name)}"


def adopt(
    model: nn.Module, peer: nn.Module, names: Names, skip: tuple[str, ...] = (), at: str = ""
) -> None:
    """Give our model, built on meta, the very weights of the peer, whose names follow `at`."""
    state = {at + name: x.detach() for name, x in peer.state_dict().items()}
    load_strict(model, rename(state, names, skip))
    model.eval()


# --- hear ----------------------------------------------------------------------------------------


def whisper_config(enc: EncoderConfig, dec: DecoderConfig) -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=dec.vocab, num_mel_bins=enc.n_mels, d_model=dec.width, encoder_layers=enc.layers,
        encoder_attention_heads=enc.heads, encoder_ffn_dim=enc.ffn, decoder_layers=dec.layers,
        decoder_attention_heads=dec.heads, decoder_ffn_dim=dec.ffn, max_target_positions=dec.max_tokens,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1,
        attn_implementation="sdpa",
    )  # fmt: skip


def encoder(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """30 s of log-mel -> last."""
    cfg, mel = sizes.encoder, torch.randn(1, sizes.encoder.n_mels, 3000, device=device)
    with torch.device("meta" if peers else device):
        model = WhisperEncoder(cfg).eval()
    case = Case("30 s through the Whisper encoder", model, lambda: model(mel)[0])
    if peers:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Peer

        with device:
            peer = Peer(whisper_config(cfg, replace(sizes.decoder, width=cfg.width))).eval()
        adopt(model, peer, whisper_enc.NAMES, at="encoder.")
        case.peer_name = package("transformers") + ", SDPA"
        case.peer = lambda: peer(mel).last_hidden_state
    return case


def transcription(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Encoder states -> ids, greedy; nothing ends it early."""
    cfg, n = sizes.decoder, sizes.tokens
    states, prefix = torch.randn(1, 1500, cfg.width, device=device), [1, 2, 3, 4]
    with torch.device("meta" if peers else device):
        model = WhisperDecoder(cfg).eval()

    def ours() -> Tensor:
        return torch.tensor(transcribe(model, states, prefix=prefix, eos=-1, max_new=n))

    case = Case(f"{n} tokens by the Whisper decoder, from 30 s", model, ours)
    if peers:
        from transformers import GenerationMixin, WhisperForConditionalGeneration
        from transformers.modeling_outputs import BaseModelOutput

        config = whisper_config(replace(sizes.encoder, layers=1, width=cfg.width), cfg)
        with device:
            peer = WhisperForConditionalGeneration(config).eval()
        adopt(model, peer, whisper_dec.NAMES, whisper_dec.SKIP)

        def theirs() -> Tensor:
            ids = GenerationMixin.generate(
                peer, encoder_outputs=BaseModelOutput(states), do_sample=False, num_beams=1,
                decoder_input_ids=torch.tensor([prefix], device=device), max_new_tokens=n,
            )  # fmt: skip
            return ids[:, -n:].cpu()

        case.peer, case.peer_name = theirs, package("transformers") + ", SDPA, generate"
    # each step reads keys and values of the audio, but not the layers that made them
    case.reads = n * (size(model) + 2 * cfg.layers * cfg.width * (1500 - cfg.width) * 4)
    return case


def s3(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """30 s of log-mel -> units."""
    cfg, mel = sizes.s3, torch.randn(1, sizes.s3.n_mels, 3000, device=device)
    lengths = torch.tensor([3000], device=device)
    with torch.device("meta" if peers else device):
        model = S3Units(cfg).eval()
    case = Case("30 s into S3 units", model, lambda: model(mel, lengths)[0])
    if peers:
        from s3tokenizer.model import ModelConfig, S3Tokenizer

        kind = "speech_tokenizer_v1" + ("_25hz" if cfg.strides == (2, 2) else "")
        config = ModelConfig(cfg.n_mels, 1500, cfg.width, cfg.heads, cfg.layers, cfg.codes)
        with device:
            peer = S3Tokenizer(kind, config).eval()
        peer.quantizer._codebook.embed.normal_(std=cfg.width**-0.5)
        ours = s3_units.complete(rename(peer.state_dict(), s3_units.NAMES), cfg.codes)
        load_strict(model, ours)
        case.peer_name = package("s3tokenizer")
        case.peer = lambda: peer.quantize(mel, lengths)[0]
    return case


# --- quantize ------------------------------------------------------------------------------------


def train_step(model: nn.Module, x: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Forward and backward -> the gradient of x."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = embed(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return x.grad


def vectors(sizes: Sizes, dim: int, device: torch.device) -> Tensor:
    return torch.randn(16, sizes.words, dim, device=device)


def residual(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """A training step, in which the codebooks move."""
    cfg = replace(sizes.rvq, kmeans_iters=0, quantize_dropout=False)
    x, model = vectors(sizes, cfg.dim, device), RVQ(cfg).to(device)
    ours = partial(train_step, model, x, lambda x: model(x).embedding)
    case = Case(f"RVQ of {x.shape[0] * x.shape[1]} words, forward and backward", model, ours)
    if peers:
        from vector_quantize_pytorch import ResidualVQ

        peer = ResidualVQ(
            dim=cfg.dim, codebook_dim=cfg.codebook_dim, codebook_size=cfg.codebook_size,
            num_quantizers=cfg.quantizers, decay=cfg.decay, kmeans_init=False,
            rotation_trick=False,  # as TASTE trained
        ).to(device)  # fmt: skip
        # the public checkpoint, an older version's, keeps its flags as floats
        state = {f"rvq.{k}": x if x.ndim else x[None].float() for k, x in peer.state_dict().items()}
        load_strict(model, rename(state, rvq.NAMES, rvq.SKIP))
        case.peer_name = package("vector-quantize-pytorch")
        case.peer = partial(train_step, peer, x, lambda x: peer(x)[0])
    return case


def finite(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """A training step with the codes. Of all channels at once the peer has none: 8^64 overflows."""
    cfg = sizes.fsq
    x, model = vectors(sizes, cfg.dim, device), FSQ(cfg).to(device)
    ours = partial(train_step, model, x, lambda x: model(x).embedding)
    case = Case(f"FSQ of {x.shape[0] * x.shape[1]} words, forward and backward", model, ours)
    if peers:
        from vector_quantize_pytorch import FSQ as Peer

        levels, groups = [cfg.levels] * 4, cfg.d // 4
        peer = Peer(levels, dim=cfg.dim, num_codebooks=groups, preserve_symmetry=True).to(device)
        model.encoder.load_state_dict(peer.project_in.state_dict())
        model.decoder.load_state_dict(peer.project_out.state_dict())
        case.peer_name = package("vector-quantize-pytorch") + f", {groups} codebooks of 4 channels"
        case.peer = partial(train_step, peer, x, lambda x: peer(x)[0])
    return case


# --- language model ------------------------------------------------------------------------------


def llama_peer(cfg: LlamaConfig, device: torch.device) -> tuple[Llama, Any]:
    """The same weights twice: ours, and transformers' LlamaForCausalLM."""
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
        attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        peer = LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        model = Llama(cfg)
    state = {name: x.detach() for name, x in peer.state_dict().items()}
    load_strict(model, llm.settle_head(cfg, rename(state, llm.NAMES))[1])
    return model.eval(), peer


def decode(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Greedy, cached, the prompt included."""
    cfg, n = sizes.llm, sizes.tokens
    prompt = torch.randint(cfg.vocab, (1, n), device=device)
    model, peer = llama_peer(cfg, device) if peers else (Llama(cfg).to(device).eval(), None)

    def ours() -> Tensor:
        ids, caches = [prompt], model.new_caches(2 * n)
        for _ in range(n):
            hidden = model(ids[-1], caches=caches)
            ids.append(model.logits(hidden[:, -1:]).argmax(-1))
        return torch.cat(ids, 1)

    case = Case(f"{n} tokens by the Llama, after {n}", model, ours, reads=n * size(model))
    if peer is not None:
        from transformers import DynamicCache

        def theirs() -> Tensor:
            ids, cache = [prompt], DynamicCache()
            for _ in range(n):
                out = peer(ids[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids.append(out.logits.argmax(-1))
            return torch.cat(ids, 1)

        case.peer, case.peer_name = theirs, package("transformers") + ", SDPA"
    return case


def lora_step(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Forward and backward of the Llama with LoRA on all layers -> gradient of the first A."""
    cfg, n = sizes.llm, 2 * sizes.tokens
    ids = torch.randint(cfg.vocab, (1, n), device=device)
    model, peer = llama_peer(cfg, device) if peers else (Llama(cfg).to(device), None)
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    lora.add_lora(model, targets, rank=64, alpha=128)
    for layer in lora.lora_layers(model):
        nn.init.normal_(layer.B, std=0.02)  # 0 would hide A

    def ours() -> Tensor:
        model.zero_grad()
        logits = model.logits(model(ids))
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        return lora.lora_layers(model)[0].A.grad

    case = Case(f"LoRA on the Llama, {n} tokens, forward and backward", model.train(), ours)
    if peer is not None:
        from peft import LoraConfig, get_peft_model

        names = [f"{x}_proj" for x in targets]
        config = LoraConfig(r=64, lora_alpha=128, target_modules=names, lora_dropout=0.0)
        adapted = get_peft_model(peer, config).train()
        parts = [(x, y) for x, y in adapted.named_parameters() if "lora_" in x]
        mine = lora.lora_state(model)
        with torch.no_grad():
            for name, p in parts:
                p.copy_(mine[rename(rename({name: p}, lora.NAMES), llm.NAMES).popitem()[0]])

        def theirs() -> Tensor:
            adapted.zero_grad()
            logits = adapted(ids).logits
            F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
            return parts[0][1].grad

        case.peer, case.peer_name = theirs, package("peft")
    return case


# --- speak ---------------------------------------------------------------------------------------


def units(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Greedy units of a sentence; what is published reads the whole prefix for each."""
    cfg, n = sizes.unit_decoder, sizes.units
    text = torch.randint(cfg.vocab, (1, 30), device=device)
    audio, voice = torch.randn(1, 30, cfg.audio_dim), torch.randn(1, cfg.speaker_dim)
    audio, voice = audio.to(device), voice.to(device)
    model = UnitDecoder(cfg).to(device).eval()

    def ours() -> Tensor:
        said, _ = model.generate(text, None, audio, voice, greedy=True, min_len=n, max_len=n)
        return said[0][sizes.skip - 1 :: sizes.skip]

    read = n * (size(model.lm) + size(model.head))
    case = Case(f"{n} units, 30 text tokens", model, ours, reads=read)
    if peers:
        known, _ = model.generate(text, None, audio, voice, greedy=True, min_len=n, max_len=n)
        prompt, _ = model.prompt(text, None, audio, voice)
        history = model.unit_embed(known[0])[None]

        def theirs() -> Tensor:
            at = range(sizes.skip - 1, n, sizes.skip)
            rows = [model.lm(torch.cat([prompt, history[:, :i]], 1))[:, -1] for i in at]
            return model.head(torch.cat(rows))[:, :-1].argmax(-1)

        case.peer, case.peer_name, case.peer_share = theirs, "uncached", 1 / sizes.skip
    return case


def vocoder(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Units -> wav; what is published calls the estimator twice a step, and folds nothing."""
    count = round(sizes.seconds * sizes.flow.unit_rate)
    said = torch.randint(sizes.flow.units, (count,), device=device)
    voice = torch.randn(sizes.flow.speaker, device=device)
    flow, hift, folded = Flow(sizes.flow), HiFT(sizes.hift), HiFT(sizes.hift)
    folded.load_state_dict(hift.state_dict())
    model, hift = Vocoder(flow, folded.fold()).to(device).eval(), hift.to(device).eval()
    lengths = torch.tensor([count], device=device)

    def ours() -> Tensor:
        torch.manual_seed(0)
        return model(said, voice, rng=torch.Generator().manual_seed(0))

    case = Case(f"{sizes.seconds:g} s of units to wav", model, ours, tolerance=1e-3)
    if peers:
        velocity = flow.velocity

        def one_by_one(x: Tensor, keep: Tensor | None, *rest: Tensor) -> Tensor:
            parts = zip(*(y.split(1) for y in (x, *rest)), strict=True)
            return torch.cat([velocity(y, None, *more) for y, *more in parts])

        def theirs() -> Tensor:
            torch.manual_seed(0)
            flow.velocity = one_by_one
            rng = torch.Generator().manual_seed(0)
            mel, _ = flow.sample(said[None], lengths, voice[None], rng=rng)
            flow.velocity = velocity
            return hift(mel)[0]

        case.peer, case.peer_name = theirs, "eager, a call for each branch of the guidance"
    return case


STAGES: dict[str, tuple[Stage, ...]] = {
    "encoder": (encoder,), "decode": (decode,), "transcribe": (transcription,), "s3": (s3,),
    "rvq": (residual,), "fsq": (finite,), "lora": (lora_step,), "unit_decoder": (units,),
    "vocoder": (vocoder,),
}  # fmt: skip
