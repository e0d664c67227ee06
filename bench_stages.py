"""The stages that bench.py times: what we run, and what a user would run instead on the same input.

    Case.ours() and Case.peer() give the same tensor; bench.py refuses to time them otherwise

A peer is a library (bench_peers.py) or, where none has the stage, the way in which it is published:
without a cache, or with one call for each branch of the guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bench_peers
import fsq
import llm
import lora
import rvq
import s3_units
import unit_decoder
import whisper_dec
import whisper_enc
from bench_peers import named
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
from whisper_dec import DecoderConfig, WhisperDecoder, transcribe
from whisper_enc import EncoderConfig, WhisperEncoder

RANK = 64  # of LoRA [TASTE]
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")  # that it adapts


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
    words: int = 32  # of an utterance, of which 16 are quantized: 12 s each
    skip: int = 20  # what has no cache is timed at every so many steps


FULL = Sizes(
    EncoderConfig(), DecoderConfig(layers=32), LlamaConfig(), S3Config(), RVQConfig(), FSQConfig(),
    UnitDecoderConfig(), FlowConfig(), HiFTConfig(),
)  # fmt: skip
SMALL = replace(  # whisper-small and SmolLM2-135M
    FULL, encoder=EncoderConfig(80, 768, 12, 12, 3072), rvq=RVQConfig(768), fsq=FSQConfig(768),
    decoder=DecoderConfig(51865, 768, 12, 12, 3072),
    llm=LlamaConfig(49152, 576, 30, 9, 3, 64, 1536, 1e5, None, max_tokens=8192),
)  # fmt: skip
TINY = Sizes(
    replace(whisper_enc.TINY, strides=(1, 2), max_frames=1500),  # 50 Hz: the peer has no other
    whisper_dec.TINY, llm.TINY, replace(s3_units.TINY, max_frames=1500), rvq.TINY, fsq.TINY,
    unit_decoder.TINY, FLOW, HIFT,
)  # fmt: skip
SIZES = {"full": FULL, "small": SMALL, "tiny": TINY}


@dataclass
class Case:
    """One line of the table."""

    what: str
    model: nn.Module
    ours: Callable[[], Tensor]
    reads: int = 0  # bytes of weights and of kept keys that a call cannot avoid to read
    peer: Callable[[], Tensor] | None = None
    peer_name: str = ""
    peer_share: float = 1.0  # of its work that the peer does: its time is divided by it
    tolerance: float = 1e-4  # of floats, relative to the largest; integers: share that differs


Stage = Callable[[Sizes, torch.device, bool], Case]


def size(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(x.nbytes for x in {x.data_ptr(): x for x in model.state_dict().values()}.values())


# --- hear ----------------------------------------------------------------------------------------


def encoder(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """30 s of log-mel -> last."""
    enc, dec = sizes.encoder, replace(sizes.decoder, width=sizes.encoder.width)
    mel = torch.randn(1, enc.n_mels, 3000, device=device)
    if peers:
        model, peer = bench_peers.encoder(enc, dec, device)
    else:
        model, peer = WhisperEncoder(enc).to(device).eval(), None
    case = Case("30 s through the Whisper encoder", model, lambda: model(mel)[0], size(model))
    if peer is not None:
        case.peer = lambda: peer(mel).last_hidden_state
        case.peer_name = named("transformers", "SDPA")
    return case


def transcription(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Encoder states -> ids, greedy; nothing ends it early."""
    cfg, n, prefix = sizes.decoder, sizes.tokens, [1, 2, 3, 4]
    states = torch.randn(1, 1500, cfg.width, device=device)
    if peers:
        small = replace(sizes.encoder, layers=1, width=cfg.width)
        model, peer = bench_peers.decoder(small, cfg, device)
    else:
        model, peer = WhisperDecoder(cfg).to(device).eval(), None

    def ours() -> Tensor:
        return torch.tensor(transcribe(model, states, prefix=prefix, eos=-1, max_new=n))

    # each step reads keys and values of the audio, but not the layers that made them
    read = n * (size(model) + 2 * cfg.layers * cfg.width * (1500 - cfg.width) * 4)
    case = Case(f"{n} tokens by the Whisper decoder, from 30 s", model, ours, read)
    if peer is not None:
        from transformers import GenerationMixin
        from transformers.modeling_outputs import BaseModelOutput

        def theirs() -> Tensor:
            ids = GenerationMixin.generate(
                peer, encoder_outputs=BaseModelOutput(states), do_sample=False, num_beams=1,
                decoder_input_ids=torch.tensor([prefix], device=device), max_new_tokens=n,
            )  # fmt: skip
            return ids[:, -n:].cpu()

        case.peer, case.peer_name = theirs, named("transformers", "SDPA, generate")
    return case


def s3(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """30 s of log-mel -> units."""
    mel = torch.randn(1, sizes.s3.n_mels, 3000, device=device)
    lengths = torch.tensor([3000], device=device)
    if peers:
        model, peer = bench_peers.s3(sizes.s3, device)
    else:
        model, peer = S3Units(sizes.s3).to(device).eval(), None
    case = Case("30 s into S3 units", model, lambda: model(mel, lengths)[0], size(model))
    if peer is not None:
        case.peer = lambda: peer.quantize(mel, lengths)[0]
        case.peer_name = named("s3tokenizer")
    return case


# --- quantize ------------------------------------------------------------------------------------


def gradient(x: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Forward and backward -> the gradient of x (B, N, D)."""
    x = x.detach().requires_grad_()
    y = embed(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    return x.grad


def residual(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """A training step, in which the codebooks move."""
    cfg = replace(sizes.rvq, kmeans_iters=0, quantize_dropout=False)
    x = torch.randn(16, sizes.words, cfg.dim, device=device)
    model, peer = bench_peers.residual(cfg, device) if peers else (RVQ(cfg).to(device), None)
    ours = partial(gradient, x, lambda x: model(x).embedding)
    case = Case(f"RVQ of {x[..., 0].numel()} words, forward and backward", model, ours)
    if peer is not None:
        case.peer = partial(gradient, x, lambda x: peer(x)[0])
        case.peer_name = named("vector-quantize-pytorch")
    return case


def finite(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    x = torch.randn(16, sizes.words, sizes.fsq.dim, device=device)
    if peers:
        model, peer = bench_peers.finite(sizes.fsq, device)
    else:
        model, peer = FSQ(sizes.fsq).to(device), None
    ours = partial(gradient, x, lambda x: model(x).embedding)
    case = Case(f"FSQ of {x[..., 0].numel()} words, forward and backward", model, ours)
    if peer is not None:
        case.peer = partial(gradient, x, lambda x: peer(x)[0])
        how = f"codebooks of {bench_peers.GROUP} channels"
        case.peer_name = named("vector-quantize-pytorch", how)
    return case


# --- language model ------------------------------------------------------------------------------


def decode(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Greedy, cached, the prompt included."""
    cfg, n = sizes.llm, sizes.tokens
    prompt = torch.randint(cfg.vocab, (1, n), device=device)
    model, peer = bench_peers.llama(cfg, device) if peers else (Llama(cfg).to(device).eval(), None)

    def ours() -> Tensor:
        ids, caches = [prompt], model.new_caches(2 * n)
        for _ in range(n):
            hidden = model(ids[-1], caches=caches)
            ids.append(model.logits(hidden[:, -1:]).argmax(-1))
        return torch.cat(ids, 1)

    case = Case(f"{n} tokens by the Llama, after {n}", model, ours, n * size(model))
    if peer is not None:
        from transformers import DynamicCache

        def theirs() -> Tensor:
            ids, cache = [prompt], DynamicCache()
            for _ in range(n):
                out = peer(ids[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids.append(out.logits.argmax(-1))
            return torch.cat(ids, 1)

        case.peer, case.peer_name = theirs, named("transformers", "SDPA")
    return case


def lora_step(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Forward and backward of the Llama with LoRA on all layers -> gradient of the first A."""
    cfg, n = sizes.llm, 2 * sizes.tokens
    ids = torch.randint(cfg.vocab, (1, n), device=device)
    model, peer = bench_peers.llama(cfg, device) if peers else (Llama(cfg).to(device), None)
    lora.add_lora(model, LAYERS, RANK, alpha=2 * RANK)
    for layer in lora.lora_layers(model):
        nn.init.normal_(layer.B, std=0.02)  # 0 would hide A

    def step(net: nn.Module, logits: Callable[[], Tensor], first: nn.Parameter) -> Tensor:
        net.zero_grad()
        F.cross_entropy(logits()[0, :-1].float(), ids[0, 1:]).backward()
        assert first.grad is not None
        return first.grad

    first = lora.lora_parameters(model)[0]
    ours = partial(step, model, lambda: model.logits(model(ids)), first)
    case = Case(f"LoRA on the Llama, {n} tokens, forward and backward", model.train(), ours)
    if peer is not None:
        peer = bench_peers.adapted(model, peer, RANK)
        theirs = next(p for p in peer.parameters() if p.requires_grad)
        case.peer = partial(step, peer, lambda: peer(ids).logits, theirs)
        case.peer_name = named("peft")
    return case


# --- speak ---------------------------------------------------------------------------------------


def units(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Greedy units of a sentence; what is published reads the whole prefix for each."""
    cfg, n = sizes.unit_decoder, sizes.units
    text = torch.randint(cfg.vocab, (1, 30), device=device)
    audio, voice = torch.randn(1, 30, cfg.audio_dim), torch.randn(1, cfg.speaker_dim)
    audio, voice = audio.to(device), voice.to(device)
    model = UnitDecoder(cfg).to(device).eval()

    def generate() -> Tensor:
        said, _ = model.generate(text, None, audio, voice, greedy=True, min_len=n, max_len=n)
        return said[0]

    def ours() -> Tensor:
        return generate()[sizes.skip - 1 :: sizes.skip]

    read = n * (size(model.lm) + size(model.head))
    case = Case(f"{n} units, 30 text tokens", model, ours, read)
    if peers:
        prompt, _ = model.prompt(text, None, audio, voice)
        history = model.unit_embed(generate())[None]  # (1, U, C)

        def theirs() -> Tensor:
            at = range(sizes.skip - 1, n, sizes.skip)
            rows = [model.lm(torch.cat([prompt, history[:, :i]], 1))[:, -1] for i in at]
            return model.head(torch.cat(rows))[:, :-1].argmax(-1)

        case.peer, case.peer_name, case.peer_share = theirs, "no cache", 1 / sizes.skip
    return case


def vocoder(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Units -> wav; what is published calls the estimator twice a step, and folds nothing."""
    count = round(sizes.seconds * sizes.flow.unit_rate)
    said = torch.randint(sizes.flow.units, (count,), device=device)
    voice, lengths = torch.randn(sizes.flow.speaker, device=device), said.new_tensor([count])
    flow, hift, folded = Flow(sizes.flow), HiFT(sizes.hift), HiFT(sizes.hift)
    folded.load_state_dict(hift.state_dict())
    model, hift = Vocoder(flow, folded.fold()).to(device).eval(), hift.to(device).eval()

    def ours() -> Tensor:
        torch.manual_seed(0)
        return model(said, voice, torch.Generator().manual_seed(0))

    # the F0 is added up to a phase over the whole wav, and so are differences of rounding
    case = Case(f"{sizes.seconds:g} s of units to wav", model, ours, size(model), tolerance=5e-3)
    if peers:
        both = flow.velocity

        def one_by_one(x: Tensor, keep: Tensor | None, *rest: Tensor) -> Tensor:
            items = zip(*(y.split(1) for y in (x, *rest)), strict=True)
            return torch.cat([both(y, None, *more) for y, *more in items])

        def theirs() -> Tensor:
            torch.manual_seed(0)
            flow.velocity = one_by_one  # type: ignore[assignment, method-assign]
            rng = torch.Generator().manual_seed(0)
            mel, _ = flow.sample(said[None], lengths, voice[None], rng=rng)
            flow.velocity = both  # type: ignore[method-assign]
            return hift(mel)[0]

        case.peer, case.peer_name = theirs, "a call for each branch of the guidance"
    return case


STAGES: dict[str, tuple[Stage, ...]] = {
    "encoder": (encoder,), "decode": (decode,), "transcribe": (transcription,), "s3": (s3,),
    "rvq": (residual,), "fsq": (finite,), "lora": (lora_step,), "unit_decoder": (units,),
    "vocoder": (vocoder,),
}  # fmt: skip
