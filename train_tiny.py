"""Train every foundation model of the tiny bundle on the built-in corpus, each step resumable.

    python train_tiny.py                    all of them, in order, into weights/tiny
    python train_tiny.py --only hift        one of them; run again after an interruption: it goes on

    asr      Whisper encoder + decoder        words, phones, word-aligned attention
    s3       S3 units, 25 Hz                  phones, relative pitch, voicing, log-mel of each unit
    speaker  CAM++                            which voice
    f0       mel -> F0, a part of HiFT        mean error in Hz
    flow     units + voice -> mel             direct regression with pitch, then flow matching
    hift     mel -> wav                       STFT and mel distance, discriminators if asked
    lm       Llama over text                  next token

The tokenizer and the spoken LM on top are trained by train_tokenizer.py and train_lm.py.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import audio
import synth
import text
from common import Log, cosine, flag, parse, pick_device, run, seed_step
from data import (
    BOS,
    EOS,
    UNK,
    Batches,
    Item,
    Ragged,
    builtin,
    digest,
    keep_mask,
    pad,
    prepare,
    unit_features,
    word_spans,
)
from flow import SILENCE, UNCONDITIONAL, Flow
from flow import TINY as FLOW
from hift import TINY as HIFT
from hift import (
    TINY_JUDGES,
    HiFT,
    Judges,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    stft_loss,
)
from llm import TINY as LM
from llm import Llama
from metrics import correlation, f0_correlation, mean_and_error, wer
from pitch import pitch
from s3_units import TINY as S3
from s3_units import S3Units
from speaker import TINY as SPEAKER
from speaker import CAMPlus
from tokenizer import UnitFrontend
from vocoder import load_flow
from weights import load_checkpoint, load_model, save_checkpoint, save_model, write_atomic
from whisper_dec import TINY as DECODER
from whisper_dec import WhisperDecoder, transcribe
from whisper_enc import TINY as ENCODER
from whisper_enc import WhisperEncoder

FRAME_S = 0.01  # seconds per mel frame
STAGES = ("asr", "s3", "speaker", "f0", "flow", "hift", "lm")
TOKENIZERS = {"asr": 512, "lm": 320}  # pieces: two vocabularies, as in the real systems
FP16 = torch.float16  # of the files; everything computes in fp32
MU_SHARE = 0.5  # of flow's steps, the first ones, that only regress the mel
MATCHED = 2000  # utterances whose mels the flow makes for hift
STEPS = {
    "asr": 10000,
    "s3": 5000,
    "speaker": 500,
    "f0": 2500,
    "flow": 16000,
    "hift": 6000,
    "lm": 3000,
}


@dataclass(frozen=True)
class Config:
    out: Path = flag(Path("weights/tiny"), "the bundle: one model folder per stage")
    runs: Path = flag(Path("runs/tiny"), "checkpoints and logs")
    only: str = flag("all", "which model to train", choices=("all", *STAGES))
    utterances: int = flag(8000, "training utterances of the built-in corpus")
    adversarial: float = flag(0.0, "share of HiFT's steps, the last ones, with discriminators")
    scale: float = flag(1.0, "multiplies the number of steps of every stage")
    seed: int = flag(0, "weights, batches and dropout follow from (seed, step)")
    save_every: int = flag(500, "steps between two checkpoints")
    threads: int = flag(2, "CPU threads")
    bf16: bool = flag(True, "bf16 autocast for the transformers")
    device: str = flag("auto", "auto, cpu or cuda")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}}


@dataclass
class Corpus:
    """One split of the built-in corpus with its features at hand."""

    corpus: synth.Corpus
    items: list[Item]
    store: Ragged  # mel (F, 80) fp16, f0 (F,) Hz fp16, phones (F,) int16; 100 frames a second
    asr: text.Tokenizer

    def mel(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """-> mel (B, 80, F), lengths (B,)"""
        mel, lengths = pad([self.store.get("mel", i).float() for i in indices])
        return mel.transpose(1, 2), lengths

    def frames(self, name: str, indices: list[int]) -> Tensor:
        """A per-frame target at the rate of units: (B, T), -1 at padding."""
        return pad([self.store.get(name, i)[2::4].float() for i in indices], -1)[0]


def tokenizer(cfg: Config, name: str) -> text.Tokenizer:
    """The tokenizer of "asr" or "lm", trained on sentences of the grammar if not there yet."""
    path = cfg.out / name / "tokenizer.model"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = synth.texts(20000, 0)
        write_atomic(path, text.train_sentencepiece(lines, TOKENIZERS[name], byte_fallback=False))
    return text.load_tokenizer(path)


def load_corpus(cfg: Config, split: str, asr: text.Tokenizer) -> Corpus:
    corpus = synth.load(n_train=cfg.utterances)
    items = builtin(corpus, split)

    def compute(item: Item) -> dict[str, Tensor]:
        wav = item.wav(audio.WHISPER_RATE)
        mel = audio.whisper_mel(wav).T  # (F, 80)
        f0 = pitch(wav, audio.WHISPER_RATE, audio.WHISPER_HOP)
        phones = synth.phone_frames(item.truth, 1 / FRAME_S, len(mel))
        return {"mel": mel.half(), "f0": f0[: len(mel)].half(), "phones": phones.short()}

    store = prepare(items, compute, f"train_tiny 2 {digest(items)}", f"features of {split}")
    return Corpus(corpus, items, store, asr)


def fit(
    cfg: Config,
    name: str,
    state: dict[str, Any],
    update: Callable[[int, int], dict[str, Tensor]],
    check: Callable[[], dict[str, float]],
) -> None:
    """Run update(step, steps) to the end of STEPS[name], from the newest checkpoint if any."""
    steps, run_dir = max(2, round(STEPS[name] * cfg.scale)), cfg.runs / name
    first = load_checkpoint(run_dir, state)["step"] if [*run_dir.glob("step_*")] else 0
    log = Log(run_dir, name, steps, first)
    for step in range(first + 1, steps + 1):
        seed_step(cfg.seed, step)
        values = update(step, steps)
        if step % 50 == 0 or step == steps:
            log.row(step, **values)
        if step % cfg.save_every == 0 or step == steps:
            log.row(step, **check())
            save_checkpoint(run_dir, state, {"step": step, "config": vars(cfg)})


def descend(loss: Tensor, opt: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> Tensor:
    """One optimizer step at `lr`; returns the gradient norm. A non-finite loss is an error."""
    parameters = [p for group in opt.param_groups for p in group["params"]]
    for group in opt.param_groups:
        group["lr"] = lr * group.get("scale", 1)
    opt.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip, error_if_nonfinite=True)
    opt.step()
    return norm


def asr_batch(corpus: Corpus, indices: list[int], broken_off: float) -> tuple[Tensor, ...]:
    """-> mel (B, 80, F), lengths (B,), ids (B, N + 1) bos .. eos with -1 at padding, span (B, N, T)
    bool: frames of the word whose token position n predicts, phones (B, T).

    broken_off: share of items that end after a random word, as spoken prompts do."""
    mels, ids, spans, phones = [], [], [], []
    for i in indices:
        said, words = corpus.items[i].truth, text.split_words(corpus.items[i].text)
        mel, phone = corpus.store.get("mel", i).float(), corpus.store.get("phones", i)[2::4].long()
        if torch.rand(()) < broken_off:
            words = words[: int(torch.randint(1, len(words) + 1, ()))]
            end = round((said.ends_s[len(words) - 1] + 0.05 * float(torch.rand(()))) / FRAME_S)
            mel = mel[:end]
        frames = ENCODER.frames(len(mel))
        row = text.align_words(" ".join(words), corpus.asr, corpus.asr)
        span = word_spans(said, row.asr_word_ids, frames)
        mels.append(mel)
        ids.append(torch.tensor([BOS, *row.asr_ids, EOS]))
        spans.append(F.pad(span, (0, 0, 0, 1), value=True))  # eos may look anywhere
        phones.append(phone[:frames])
    mel, lengths = pad(mels)
    T = ENCODER.frames(mel.shape[1])
    span = pad([F.pad(x, (0, T - x.shape[1])) for x in spans])[0]
    return mel.transpose(1, 2), lengths, pad(ids, -1)[0], span, pad(phones, -1)[0]


def worn(mel: Tensor) -> Tensor:
    """mel (B, M, F) in Whisper's units, 0.25 = 10 dB -> the same blurred, jittered and in steady
    noise of random colour, 30 to 90 dB below the loudest bin: no vocoder is as clean as espeak."""
    B = len(mel)
    blurred = F.avg_pool2d(mel[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    mel = mel.lerp(blurred, (2 * torch.rand(B, 1, 1) - 1).clamp(min=0))  # half of them stay sharp
    mel = mel + 0.12 * torch.rand(B, 1, 1) * torch.randn_like(mel)
    level = mel.amax((1, 2), keepdim=True) - 0.75 - 1.5 * torch.rand(B, 1, 1)
    colour = 0.5 * torch.randn(B, 8, 1).repeat_interleave(mel.shape[1] // 8, 1)  # (B, M, 1)
    noise = level + colour + 0.1 * torch.randn_like(mel)
    return torch.logaddexp(4 * math.log(10) * mel, 4 * math.log(10) * noise) / (4 * math.log(10))


def train_asr(cfg: Config, device: torch.device) -> None:
    """Cross-entropy + phones from the middle layer + two heads that must look at the word.

    Without the last two a corpus of hours does not teach attention to align."""
    asr = tokenizer(cfg, "asr")
    train, dev = load_corpus(cfg, "train", asr), load_corpus(cfg, "dev", asr)
    enc, dec = WhisperEncoder(ENCODER).to(device), WhisperDecoder(DECODER).to(device)
    phone = nn.Linear(ENCODER.width, len(synth.PHONES)).to(device)
    model = nn.ModuleDict({"enc": enc, "dec": dec, "phone": phone})
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    batches = Batches(train.store.lengths("mel"), 16, cfg.seed)

    def update(step: int, steps: int) -> dict[str, Tensor]:
        mel, lengths, ids, span, phones = asr_batch(train, batches(step), 0.25)
        mel = worn(mel)
        target, inputs = ids[:, 1:], ids[:, :-1].clamp(min=0)
        dropped = (torch.rand(inputs.shape) < 0.25) & (inputs != BOS)
        inputs = inputs.masked_fill(dropped, UNK)  # listen, do not guess from the words before
        mel_keep = keep_mask(lengths)
        keep = mel_keep[:, :: ENCODER.stride]
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            last, taps = enc(mel.to(device), mel_keep.to(device), taps=(2,))
            hidden, maps = dec(inputs.to(device), last, keep=keep.to(device), need_weights=True)
            logits, phone_logits = dec.logits(hidden), phone(taps[2])
        inside = (maps[:, -1, :2] * span[:, None].to(device)).sum(-1)  # (B, 2, N)
        words = (target >= 0)[:, None].expand_as(inside).to(device)
        losses = {
            "ce": cross_entropy(logits, target.to(device)),
            "phone": cross_entropy(phone_logits, phones.to(device)),
            "guide": -inside.clamp(min=1e-4).log()[words].mean(),
        }
        total = losses["ce"] + losses["phone"] + 0.3 * losses["guide"]
        norm = descend(total, opt, cosine(step, steps, 1.5e-3, 200))
        return losses | {"norm": norm}

    def check() -> dict[str, float]:
        model.eval()
        said = [
            t for part in chunks(range(len(dev.items)), 50) for t in recognize(enc, dec, dev, part)
        ]
        model.train()
        return {"dev_wer": wer([item.text for item in dev.items], said)}

    fit(cfg, "asr", {"model": model, "opt": opt}, update, check)
    pair = nn.ModuleDict({"encoder": enc, "decoder": dec})
    config = {
        "encoder": asdict(ENCODER),
        "decoder": asdict(DECODER),
        "prefix_ids": [BOS],
        "eos": EOS,
    }
    save_model(cfg.out / "asr", pair, config, FP16)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """logits (B, N, V), target (B, N) with -1 = no target -> mean, in nats, in fp32."""
    n = min(logits.shape[1], target.shape[1])
    return F.cross_entropy(
        logits[:, :n].float().flatten(0, 1), target[:, :n].flatten(), ignore_index=-1
    )


def chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]


@torch.inference_mode()
def recognize(
    enc: WhisperEncoder, dec: WhisperDecoder, corpus: Corpus, indices: list[int]
) -> list[str]:
    mel, lengths = corpus.mel(indices)
    mel_keep = keep_mask(lengths)
    device = next(enc.parameters()).device
    last, _ = enc(mel.to(device), mel_keep.to(device))
    keep = mel_keep[:, :: ENCODER.stride].to(device)
    rows = transcribe(dec, last, keep, prefix=(BOS,), eos=EOS, max_new=40)
    return [corpus.asr.decode(row) for row in rows]


class UnitHeads(nn.Module):
    """What supervises the units: one alone must tell its phone, five in a row (of 25 Hz) pitch
    relative to the voice and voicing, and with the voice known, four log-mel frames each.

    Departs from CosyVoice, where recognition is the only teacher: at this size such units keep
    no pitch, and then no tokenizer above them can. Told the voice, the mel costs no bits for it."""

    def __init__(self, voices: int) -> None:
        super().__init__()
        C = S3.width
        self.phone, self.voice = nn.Linear(C, len(synth.PHONES)), nn.Embedding(voices, C)
        self.pitch = nn.Conv1d(C, 2, 5, padding=2)
        self.mel = nn.Sequential(
            nn.Conv1d(C, 2 * C, 5, padding=2), nn.GELU(), nn.Conv1d(2 * C, 4 * S3.n_mels, 1)
        )

    def forward(self, q: Tensor, voice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, C), voice (B,) -> phone logits (B, T, P), pitch (B, T, 2), mel (B, T, 4 M)."""
        q = q * S3.width**0.5  # unit variance
        told = (q + self.voice(voice)[:, None]).mT
        return self.phone(q), self.pitch(q.mT).mT, self.mel(told).mT


def train_s3(cfg: Config, device: torch.device) -> None:
    """Vector quantization in the middle of a network that tells what UnitHeads ask for."""
    asr = tokenizer(cfg, "asr")
    train, dev = load_corpus(cfg, "train", asr), load_corpus(cfg, "dev", asr)
    model = S3Units(S3).to(device)
    centre = voice_pitch(train)
    voices = {voice: i for i, voice in enumerate(centre)}
    heads = UnitHeads(len(voices)).to(device)
    opt = torch.optim.AdamW([*model.parameters(), *heads.parameters()], betas=(0.9, 0.98))
    batches = Batches(train.store.lengths("mel"), 16, cfg.seed)

    def targets(corpus: Corpus, indices: list[int]) -> tuple[Tensor, ...]:
        f0 = corpus.frames("f0", indices)  # (B, T), -1 at padding
        own = torch.stack([centre[corpus.items[i].speaker] for i in indices])[:, None]
        relative = (f0.clamp(min=1).log() - own) * 4  # about unit variance
        return corpus.frames("phones", indices).long(), f0, relative

    def losses_of(corpus: Corpus, indices: list[int]) -> dict[str, Tensor]:
        mel, lengths = corpus.mel(indices)
        mel = F.pad(mel, (0, -mel.shape[2] % 4))
        phones, f0, relative = (t.to(device) for t in targets(corpus, indices))
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            h, keep = model.features(mel.to(device), lengths.to(device))
        _, q, commit = model.quantize(h, keep)
        voice = torch.tensor([voices[corpus.items[i].speaker] for i in indices], device=device)
        phone, pitch_out, echo = heads(q, voice)
        n = phones.shape[1]
        wanted = mel.to(device).unflatten(2, (-1, 4)).permute(0, 2, 3, 1).flatten(2)  # (B, T, 4 M)
        real, voiced = f0 >= 0, f0 > 0
        pred, voicing = pitch_out[:, :n, 0], pitch_out[:, :n, 1]
        return {
            "phone": cross_entropy(phone, phones),
            "f0": (pred - relative)[voiced].square().mean(),
            "voicing": F.binary_cross_entropy_with_logits(voicing[real], voiced[real].float()),
            "mel": (echo - wanted)[keep].abs().mean(),
            "commit": commit,
        }

    def update(step: int, steps: int) -> dict[str, Tensor]:
        losses = losses_of(train, batches(step))
        total = (
            losses["phone"]
            + losses["f0"]
            + 0.5 * losses["voicing"]
            + 3 * losses["mel"]
            + losses["commit"]
        )
        descend(total, opt, cosine(step, steps, 1.5e-3, 200))
        return losses

    @torch.no_grad()
    def check() -> dict[str, float]:
        model.eval()
        parts = [losses_of(dev, part) for part in chunks(range(len(dev.items)), 50)]
        units = [model(*dev.mel(part))[0] for part in chunks(range(len(dev.items)), 50)]
        model.train()
        used = torch.cat([u[u >= 0] for u in units]).bincount(minlength=S3.codes).float()
        share = used[used > 0] / used.sum()
        means = {f"dev_{k}": float(torch.stack([p[k] for p in parts]).mean()) for k in parts[0]}
        return means | {"perplexity": float((-(share * share.log()).sum()).exp())}

    fit(cfg, "s3", {"model": model, "heads": heads, "opt": opt}, update, check)
    save_model(cfg.out / "s3", model, S3, FP16)


def voice_pitch(corpus: Corpus) -> dict[str, Tensor]:
    """Mean log F0 of each voice, from its first 40 utterances."""
    found: dict[str, list[Tensor]] = {}
    for i, item in enumerate(corpus.items):
        if len(parts := found.setdefault(item.speaker, [])) < 40:
            f0 = corpus.store.get("f0", i).float()
            parts.append(f0[f0 > 0].log())
    return {voice: torch.cat(parts).mean() for voice, parts in found.items()}


def train_speaker(cfg: Config, device: torch.device) -> None:
    """Which of the training voices is it? Crops of 1 to 2 s; the classifier is thrown away."""
    train = load_corpus(cfg, "train", tokenizer(cfg, "asr"))
    voices = {voice: i for i, voice in enumerate(sorted({item.speaker for item in train.items}))}
    model, head = CAMPlus(SPEAKER).to(device), nn.Linear(SPEAKER.dim, len(voices)).to(device)
    opt = torch.optim.AdamW([*model.parameters(), *head.parameters()], weight_decay=0.01)

    def batch(frames: int) -> tuple[Tensor, Tensor]:
        indices = torch.randint(len(train.items), (24,)).tolist()
        banks = [fbank(train.items[i].wav(audio.WHISPER_RATE)) for i in indices]
        crops = [crop(bank.repeat(-(-frames // len(bank)), 1), frames) for bank in banks]
        labels = torch.tensor([voices[train.items[i].speaker] for i in indices])
        return torch.stack(crops).to(device), labels.to(device)

    def update(step: int, steps: int) -> dict[str, Tensor]:
        x, labels = batch(100 + 10 * (step % 10))
        scores = 12 * F.linear(F.normalize(model(x)), F.normalize(head.weight))  # cosine softmax
        loss = F.cross_entropy(scores, labels)
        descend(loss, opt, cosine(step, steps, 3e-3, 50))
        return {"ce": loss, "accuracy": (scores.argmax(-1) == labels).float().mean()}

    fit(cfg, "speaker", {"model": model, "head": head, "opt": opt}, update, dict)
    save_model(cfg.out / "speaker", model, SPEAKER, FP16)


def fbank(wav: Tensor) -> Tensor:
    """wav (S,) at 16 kHz -> (F, 80), each bin's mean over time removed: what CAM++ takes."""
    bank = audio.kaldi_fbank(wav)
    return bank - bank.mean(0)


def crop(x: Tensor, n: int) -> Tensor:
    """x (S, ...) -> n consecutive rows from a random place."""
    first = int(torch.randint(len(x) - n + 1, ()))
    return x[first : first + n]


def vocoder_features(items: list[Item]) -> Ragged:
    """mel (F, 80) fp16 and f0 (F,) Hz of all utterances at the vocoder's frame rate."""

    def compute(item: Item) -> dict[str, Tensor]:
        wav = item.wav(audio.VOCODER_RATE)
        return {"mel": audio.vocoder_mel(wav).T.half(), "f0": mel_pitch(wav[None])[0].half()}

    tag = f"vocoder 2 {digest(items)}"
    return prepare(items, compute, tag, f"vocoder features of {items[0].key[:-6]}")


def train_f0(cfg: Config, device: torch.device) -> None:
    """HiFT's F0 predictor. No gradient of the waveform reaches it, so it is trained by itself."""
    corpus = synth.load(n_train=cfg.utterances)
    train, dev = (vocoder_features(builtin(corpus, name)) for name in ("train", "dev"))
    model = HiFT(HIFT).f0.to(device)
    out: dict[str, Any] = {"params": model.out.parameters(), "scale": 50}  # large, as its Hz are
    opt = torch.optim.Adam([{"params": model.convs.parameters()}, out], betas=(0.9, 0.99))
    batches = Batches(train.lengths("f0"), 16, cfg.seed)

    def guess(store: Ragged, indices: list[int]) -> tuple[Tensor, Tensor]:
        """-> predicted, true F0 (B, F), true -1 at padding"""
        mel = pad([store.get("mel", i).float() for i in indices], SILENCE)[0].mT
        f0 = pad([store.get("f0", i).float() for i in indices], -1)[0]
        return model(mel.to(device)), f0.to(device)

    def update(step: int, steps: int) -> dict[str, Tensor]:
        found, f0 = guess(train, batches(step))
        loss = (found - f0)[f0 >= 0].abs().mean()  # Hz
        norm = descend(loss / 100, opt, cosine(step, steps, 2e-3, 50))
        return {"hz": loss, "norm": norm}

    @torch.no_grad()
    def check() -> dict[str, float]:
        rows = [(f, g) for i in range(len(dev)) for f, g in [guess(dev, [i])]]
        found = [correlation(g[g > 0].cpu(), f[g > 0].cpu()) for f, g in rows]
        gross = torch.cat([((f - g).abs() > 0.2 * g)[g > 0] for f, g in rows])
        return {"dev_f0": mean_and_error(found)[0], "dev_gross": float(gross.float().mean())}

    fit(cfg, "f0", {"model": model, "opt": opt}, update, check)
    save_model(cfg.runs / "f0", model, HIFT, FP16)  # flow learns pitch from it, hift contains it


def train_flow(cfg: Config, device: torch.device) -> None:
    """Units and voice vectors of the models above -> mel: first mu, then the flow on top of it.

    mu should also have the pitch that the F0 predictor of HiFT reads in true mels: harmonics are a
    small part of |mu - x|, and regression blurs them first."""
    corpus, frontend = synth.load(n_train=cfg.utterances), UnitFrontend(cfg.out)
    stores = {}
    for name in ("train", "dev"):
        items = builtin(corpus, name)
        heard = unit_features(items, frontend, digest(items), f"units of {name}")
        stores[name] = heard, vocoder_features(items)
    model, predictor = Flow(FLOW).to(device), HiFT(HIFT).f0.to(device)
    load_model(predictor, cfg.runs / "f0").requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    batches = Batches(stores["train"][0].lengths("units"), 16, cfg.seed)

    def losses_of(split: str, indices: list[int], only_mu: bool) -> dict[str, Tensor]:
        heard, said = stores[split]
        units, unit_len = pad([heard.get("units", i).long() for i in indices])
        mel, mel_len = pad([said.get("mel", i).float() for i in indices], SILENCE)
        voice = torch.cat([heard.get("voice", i) for i in indices])
        f0 = pad([said.get("f0", i).float() for i in indices], -1)[0].to(device)
        units, unit_len, mel, mel_len, voice = (
            x.to(device) for x in (units, unit_len, mel.mT, mel_len, voice)
        )
        if only_mu:
            made, keep = model.mu(units, unit_len, mel_len, voice)
            seen = torch.ones_like(keep)
            found = {"prior": (made - (mel - FLOW.mel_mean) / FLOW.mel_std).abs().mT[keep].mean()}
        else:
            seen = torch.rand(len(units), 1, device=device) > UNCONDITIONAL
            out = model.loss(units, unit_len, mel, mel_len, voice, cfg_keep=seen[:, 0])
            made, keep, found = out.end, keep_mask(mel_len), {"flow": out.flow}
        mel = (FLOW.mel_mean + FLOW.mel_std * made).masked_fill(~keep[:, None], SILENCE)
        with torch.autocast(device.type, enabled=False):
            hz = predictor(mel)
        return found | {"pitch": (hz - f0)[keep & seen].abs().mean() / 100}

    def update(step: int, steps: int) -> dict[str, Tensor]:
        first = round(MU_SHARE * steps)
        begin, end = (0, first) if step <= first else (first, steps)
        for part in (model.encoder, model.project, model.regulator):
            part.requires_grad_(step <= first)  # mu stays, and with it what hift learns of it
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            losses = losses_of("train", batches(step), step <= first)
        lr = cosine(step - begin, end - begin, 1.5e-3, 200, floor=0.1)
        norm = descend(torch.stack([*losses.values()]).sum(), opt, lr)
        return losses | {"norm": norm}

    @torch.no_grad()
    def check() -> dict[str, float]:
        model.eval()
        parts = [
            losses_of("dev", part, True) | losses_of("dev", part, False)
            for part in chunks(range(len(stores["dev"][0])), 25)
        ]
        model.train()
        return {f"dev_{k}": float(torch.stack([p[k] for p in parts]).mean()) for k in parts[0]}

    fit(cfg, "flow", {"model": model, "opt": opt}, update, check)
    save_model(cfg.out / "flow", model, FLOW, FP16)


def flow_features(cfg: Config, items: list[Item]) -> Ragged:
    """mel (F, 80) fp16 of the units of each utterance, frame by frame beside the true one: what
    HiFT is given in use. [HiFi-GAN, arXiv:2010.05646, sec. 4.4: fine-tuning on such mels]"""
    frontend, flow = UnitFrontend(cfg.out), load_flow(cfg.out)
    weights = hashlib.sha256((cfg.out / "flow" / "model.safetensors").read_bytes()).hexdigest()

    def compute(item: Item) -> dict[str, Tensor]:
        heard = frontend.features(item.wav(audio.WHISPER_RATE))
        units, frames = heard["units"], audio.vocoder_mel(item.wav(audio.VOCODER_RATE)).shape[1]
        lengths, mel_len = torch.tensor([len(units)]), torch.tensor([frames])
        mel, _ = flow.sample(units[None], lengths, heard["voice"], mel_len=mel_len)
        return {"mel": mel[0].T.half()}

    tag = f"flow 1 {digest(items)} {frontend.digest} {weights[:16]} {flow.config}"
    return prepare(items, compute, tag, f"mels of the flow for {items[0].key[:-6]}")


def train_hift(cfg: Config, device: torch.device) -> None:
    """True F0 drives the source; STFT and mel distance, and discriminators if --adversarial. In the
    second half of the steps every second mel is the flow's."""
    train, dev = (builtin(synth.load(n_train=cfg.utterances), name) for name in ("train", "dev"))
    made = flow_features(cfg, train[:MATCHED])
    model, judges = HiFT(HIFT).to(device), Judges(TINY_JUDGES).to(device)
    opt = torch.optim.Adam(model.parameters(), betas=(0.8, 0.99))
    judge_opt = torch.optim.Adam(judges.parameters(), betas=(0.8, 0.99))

    def update(step: int, steps: int) -> dict[str, Tensor]:
        true = 8 if 2 * step > steps else 16
        wav, mel = (x.to(device) for x in random_crops(train, made, true, 16 - true))
        fake = model(mel, f0=mel_pitch(wav))
        full = audio.vocoder_mel(torch.cat([wav, fake]), None)
        losses = {"stft": stft_loss(fake, wav), "mel": (full[:16] - full[16:]).abs().mean()}
        total = losses["stft"] + losses["mel"]
        lr = cosine(step, steps, 2.5e-3, 20, floor=0.1)
        if step > steps - round(cfg.adversarial * steps):
            judged = discriminator_loss(judges(wav), judges(fake.detach()))
            descend(judged, judge_opt, 5e-4, clip=5.0)
            says = judges(fake)
            losses |= {"judges": judged, "gan": adversarial_loss(says)}
            total = 10 * total + losses["gan"] + feature_loss(judges(wav), says)
        losses["norm"] = descend(total, opt, lr, clip=5.0)
        return losses

    @torch.no_grad()
    def check() -> dict[str, float]:
        found = []
        for item in dev[:20]:
            wav = item.wav(audio.VOCODER_RATE)[None].to(device)
            copy = model(audio.vocoder_mel(wav), f0=mel_pitch(wav))[0].cpu()
            copy = audio.resample(copy, audio.VOCODER_RATE, audio.WHISPER_RATE)
            found.append(f0_correlation(item.wav(audio.WHISPER_RATE), copy, warp=False))
        return {"dev_f0": mean_and_error(found)[0]}

    state = {"model": model, "judges": judges, "opt": opt, "judge_opt": judge_opt}
    fit(cfg, "hift", state, update, check)
    load_model(model.f0, cfg.runs / "f0")
    save_model(cfg.out / "hift", model.fold(), HIFT, FP16)


def random_crops(items: list[Item], made: Ragged, true: int, other: int) -> tuple[Tensor, Tensor]:
    """wav (B, 32 frames) at 22.05 kHz from random places, mel (B, 80, 32): `true` ones of the wav,
    then `other` ones that the flow made."""
    wavs, mels, size = [], [], 32 * audio.VOCODER_HOP
    for k in range(true + other):
        i = int(torch.randint(len(items) if k < true else len(made), ()))
        wav = items[i].wav(audio.VOCODER_RATE)
        first = int(torch.randint(max(1, len(wav) // audio.VOCODER_HOP - 32), ()))
        wav = wav[first * audio.VOCODER_HOP :][:size]
        wavs.append(F.pad(wav, (0, size - len(wav))))
        mels.append(audio.vocoder_mel(wavs[-1]))  # (80, 32)
        if k >= true:
            mel = made.get("mel", i).float().T[:, first : first + 32]
            mels[-1] = F.pad(mel, (0, 32 - mel.shape[1]), value=SILENCE)
    return torch.stack(wavs), torch.stack(mels)


def mel_pitch(wav: Tensor) -> Tensor:
    """wav (B, S) at 22.05 kHz -> f0 (B, F) Hz at the middle of each frame of audio.vocoder_mel,
    which lies half a hop later than that of pitch()."""
    half = audio.VOCODER_HOP // 2
    return pitch(F.pad(wav[:, half:], (0, half)), audio.VOCODER_RATE, audio.VOCODER_HOP)


def train_lm(cfg: Config, device: torch.device) -> None:
    """Next-token prediction over fresh sentences of the grammar: none is seen twice by plan."""
    lm = tokenizer(cfg, "lm")
    held_out = synth.load(n_train=cfg.utterances).held_out()
    model = Llama(LM).to(device)
    opt = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        """Streams of several documents: bos, then words one by one, as in the spoken LM."""
        texts = synth.texts(4 * 48, seed, held_out)
        rows = [" ".join(texts[i : i + 4]) for i in range(0, len(texts), 4)]
        ids = pad(
            [
                torch.tensor([BOS, *(p for w in text.split_words(row) for p in lm.encode(" " + w))])
                for row in rows
            ],
            -1,
        )[0]
        return ids[:, :-1].clamp(min=0).to(device), ids[:, 1:].to(device)

    def update(step: int, steps: int) -> dict[str, Tensor]:
        inputs, target = batch(step + 10**6 * cfg.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
            logits = model.logits(model(inputs))
        loss = cross_entropy(logits, target)
        norm = descend(loss, opt, cosine(step, steps, 2e-3, 200))
        return {"ce": loss, "norm": norm}

    fit(cfg, "lm", {"model": model, "opt": opt}, update, dict)
    save_model(cfg.out / "lm", model, LM, FP16)


def main() -> None:
    cfg = parse(Config, PRESETS, __doc__)
    torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    trainers = train_asr, train_s3, train_speaker, train_f0, train_flow, train_hift, train_lm
    for name, train in zip(STAGES, trainers, strict=True):
        if cfg.only in ("all", name):
            torch.manual_seed(cfg.seed)
            train(cfg, device)


if __name__ == "__main__":
    run(main)
