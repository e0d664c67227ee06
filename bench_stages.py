"""The stages that bench.py times: what we run, and what a user would run instead on the same input.

    Case.ours() and Case.peer() give the same tensor; bench.py refuses to time them otherwise

A peer is a library (bench_peers.py) or, where none has the stage, the plain way: the published
system generates words without a cache, and calls the estimator for each branch of the guidance.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bench_peers
import lora
from bench_case import Case, Sizes, Stage, middles, size, twin
from bench_peers import named
from continuation import Prompt, Sampling, generate_all
from flow import Flow
from fsq import FSQ
from hift import HiFT
from llm import Llama
from rvq import RVQ
from s3_units import S3Units
from spoken_lm import SpokenLM, SpokenLMConfig
from unit_decoder import UnitDecoder
from vocabulary import VocabularySets
from vocoder import Vocoder
from whisper_dec import WhisperDecoder, transcribe
from whisper_enc import WhisperEncoder

RANK = 64  # of LoRA [TASTE]
GREEDY = Sampling(0.0, repetition_penalty=100.0)  # random weights would repeat one token
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")  # that it adapts


# --- hear ----------------------------------------------------------------------------------------


def encoder(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """30 s of log-mel each -> last."""
    enc, dec = sizes.encoder, replace(sizes.decoder, width=sizes.encoder.width)
    mel = torch.randn(sizes.recordings, enc.n_mels, 3000, device=device)
    if peers:
        model, peer = bench_peers.encoder(enc, dec, device)
    else:
        model, peer = WhisperEncoder(enc).to(device).eval(), None
    many = f"{len(mel)} times " if len(mel) > 1 else ""
    case = Case(
        f"{many}30 s through the Whisper encoder", model, lambda: model(mel)[0], size(model)
    )
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
    """Forward, and backward from ones -> the gradient of x (B, N, D)."""
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

    def both(x: Tensor) -> Tensor:
        out = model(x)
        return out.embedding.sum() + out.loss

    def theirs(x: Tensor) -> Tensor:
        y = peer(x)[0]
        return y.sum() + F.mse_loss(y, x.detach())  # it has no loss of its own

    ours = partial(gradient, x, both)
    case = Case(f"FSQ of {x[..., 0].numel()} words, forward and backward", model, ours)
    if peer is not None:
        case.peer = partial(gradient, x, theirs)
        how = f"codebooks of {bench_peers.GROUP} channels"
        case.peer_name = named("vector-quantize-pytorch", how)
    return case


# --- language model ------------------------------------------------------------------------------


def decode(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """The best logits of greedy steps, cached, the prompt included."""
    cfg, n = sizes.llm, sizes.tokens
    prompt = torch.randint(cfg.vocab, (1, n), device=device)
    model, peer = bench_peers.llama(cfg, device) if peers else (Llama(cfg).to(device).eval(), None)

    def ours() -> Tensor:
        ids, caches, best = prompt, model.new_caches(2 * n), []
        for _ in range(n):
            hidden = model(ids, caches=caches)
            top, ids = model.logits(hidden[:, -1:]).max(-1)
            best.append(top)
        return torch.cat(best, 1)  # (1, n)

    case = Case(f"{n} tokens by the Llama, after {n}", model, ours, n * size(model))
    if peer is not None:
        from transformers import DynamicCache

        def theirs() -> Tensor:
            ids, cache, best = prompt, DynamicCache(), []
            for _ in range(n):
                out = peer(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                top, ids = out.logits.max(-1)
                best.append(top)
            return torch.cat(best, 1)

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


class Words:
    """Every token is a word."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)


def talk(sizes: Sizes, device: torch.device) -> tuple[SpokenLM, Llama, Callable[[int], Tensor]]:
    """The spoken LM; its Llama as published, with LoRA beside its layers; and what goes on from
    so many prompts (B, N), greedy."""
    q = sizes.rvq
    config = SpokenLMConfig(
        sizes.llm, sos=1, audio_dim=q.dim, n_codebooks=q.quantizers, n_codes=q.codebook_size,
        latent_dim=q.codebook_dim,
    )  # fmt: skip
    model = SpokenLM(config, RVQ(q)).to(device).eval()
    public = twin(model.llm)
    lora.fold(model.llm)  # with a fresh B, which is 0, the weights stay those of the twin
    sets = VocabularySets.of(Words(), sizes.llm.vocab)
    codes = torch.randint(q.codebook_size, (30, q.quantizers))
    prompt = Prompt(torch.randint(sizes.llm.vocab, (30,)), torch.arange(30), codes)

    def go_on(batch: int) -> Tensor:
        told = [prompt] * batch, GREEDY, sizes.said, sizes.said
        halved = model.llm.embed.weight.dtype == torch.bfloat16  # then both sides are
        with torch.autocast(device.type, torch.bfloat16, enabled=halved):
            return torch.stack([x.ids for x in generate_all(model, sets, *told)])

    return model, public, go_on


def spoken_lm(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Text logits of some rows; what is published reads all rows for each, and says all logits."""
    model, public, go_on = talk(sizes, device)
    read: list[Tensor] = []
    hidden: list[Tensor] = []
    at = middles(sizes.said, sizes.skip)

    def remember(llm: nn.Module, args: object, kwargs: dict[str, Tensor], out: Tensor) -> None:
        read.append(kwargs["embeddings"])
        hidden.append(out[:, -1:])

    def ours() -> Tensor:
        read.clear()
        hidden.clear()
        with_hook = model.llm.register_forward_hook(remember, with_kwargs=True)
        go_on(1)
        with_hook.remove()
        return model.llm.logits(torch.cat(hidden, 1)[:, [*at]])

    n = sizes.said
    case = Case(f"{n} words by the spoken LM, after 30", model, ours, n * size(model.llm))
    if peers:

        def theirs() -> Tensor:
            rows = (public(embeddings=torch.cat(read[: i + 1], 1)) for i in at)
            return torch.cat([public.logits(x)[:, -1:] for x in rows], 1)

        case.peer, case.peer_name, case.peer_share = theirs, "no cache, as published", len(at) / n
    return case


def together(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    model, _, go_on = talk(sizes, device)
    n, B = sizes.said, sizes.batch
    what = f"{n} words for each of {B} prompts"
    case = Case(what, model, partial(go_on, B), n * size(model.llm))
    if peers:
        case.peer, case.peer_name = lambda: go_on(1).expand(B, -1), "one by one, cached"
        case.peer_share = 1 / B
    return case


# --- speak ---------------------------------------------------------------------------------------


def units(sizes: Sizes, device: torch.device, peers: bool) -> Case:
    """Greedy units of a sentence; without a cache each reads the whole prefix."""
    cfg, n = sizes.unit_decoder, sizes.units
    text = torch.randint(cfg.vocab, (1, 30), device=device)
    audio, voice = torch.randn(1, 30, cfg.audio_dim), torch.randn(1, cfg.speaker_dim)
    audio, voice = audio.to(device), voice.to(device)
    model = UnitDecoder(cfg).to(device).eval()

    def generate() -> Tensor:
        said, _ = model.generate(text, None, audio, voice, greedy=True, min_len=n, max_len=n)
        return said[0]

    at = middles(n, sizes.skip)

    def ours() -> Tensor:
        return generate()[[*at]]

    read = n * (size(model.lm) + size(model.head))
    case = Case(f"{n} units, 30 text tokens", model, ours, read)
    if peers:
        prompt, _ = model.prompt(text, None, audio, voice)
        history = model.unit_embed(generate())[None]  # (1, U, C)
        plain = twin(model)

        def theirs() -> Tensor:
            rows = [plain.lm(torch.cat([prompt, history[:, :i]], 1))[:, -1] for i in at]
            return plain.head(torch.cat(rows))[:, :-1].argmax(-1)

        case.peer, case.peer_name, case.peer_share = theirs, "no cache", len(at) / n
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
        plain = twin(flow)
        both = plain.velocity

        def one_by_one(x: Tensor, keep: Tensor | None, *rest: Tensor) -> Tensor:
            items = zip(*(y.split(1) for y in (x, *rest)), strict=True)
            return torch.cat([both(y, None, *more) for y, *more in items])

        def theirs() -> Tensor:
            torch.manual_seed(0)
            rng = torch.Generator().manual_seed(0)
            mel, _ = plain.sample(said[None], lengths, voice[None], rng=rng)
            return hift(mel)[0]

        plain.velocity = one_by_one  # type: ignore[assignment, method-assign]
        case.peer, case.peer_name = theirs, "a call for each branch of the guidance"
    return case


STAGES: dict[str, tuple[Stage, ...]] = {
    "encoder": (encoder,), "decode": (decode,), "transcribe": (transcription,), "s3": (s3,),
    "rvq": (residual,), "fsq": (finite,), "lora": (lora_step,), "spoken_lm": (spoken_lm, together),
    "unit_decoder": (units,), "vocoder": (vocoder,),
}  # fmt: skip
