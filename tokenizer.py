"""The speech tokenizer: one set of codes per word, from which a unit decoder says the words again.

    z      = words(Aggregator(text, deep frames, shallow frames))     one vector per word
    codes  = quantize(z)                                              RVQ: TASTE, FSQ: TASLA
    units ~ UnitDecoder(text, dequantize(codes), voice)               S3 units of the same speech
    loss   = CE(units) + lambda * quantizer loss                      TASLA 4.3; TASTE lambda = 1
             + guided attention + prosody of codes, pitch of units    ours, where these are known

    last, taps (B, T, C) --aggregator--> tokens (B, N, C) --mean per word--> z (B, W, C)
      --quantizer--> codes (B, W, Q), embedding (B, W, C) --repeat--> (B, N, C) --> units (B, U)

The frozen encoder stays outside: it is given, not learned. A word's codes are quantized once and
repeated over its text tokens, which is the same as quantizing the pooled tokens one by one.
[TASTE: Tseng et al. 2025, arXiv:2504.07053; TASLA: Hsu et al. 2025, arXiv:2510.14934]
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

import aggregator as agg
import audio
import s3_units
import speaker
import text
import unit_decoder as ud
import whisper_dec
import whisper_enc
from fsq import FSQ, FSQConfig
from fsq import TINY as TINY_FSQ
from rvq import RVQ, RVQConfig
from rvq import TINY as TINY_RVQ
from synth import Utterance
from weights import as_config, load_model, load_strict, read_config, read_tensors

QUANTIZERS = ("fsq", "rvq", "none")
GUIDE_WEIGHT = 0.3  # of guided attention, where word times are known
PROSODY = ("rate", "pitch", "volume")  # what is known of a word of the built-in corpus
LEAST_SEEN = 6  # times, for a unit whose pitch is known
PROSODY_GAIN = 5.0  # how loud it is in a word's vector, whose channels have deviation 1
PROSODY_WEIGHT = PITCH_WEIGHT = 3.0  # of its error in the codes, of the pitch of the units


@dataclass(frozen=True)
class TokenizerConfig:
    """quantizer: fsq | rvq | none (continuous). The two that are not used keep their defaults."""

    aggregator: agg.AggregatorConfig
    unit_decoder: ud.UnitDecoderConfig
    quantizer: str = "fsq"
    fsq: FSQConfig = TINY_FSQ
    rvq: RVQConfig = TINY_RVQ
    recon_weight: float = 0.25  # lambda

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer={self.quantizer!r}: wanted one of {QUANTIZERS}")


@dataclass
class TokenizerBatch:
    """What one training step sees. Padding: ids 0, word_ids -1, units -1, keep False."""

    ids: Tensor  # (B, N) text tokens
    word_ids: Tensor  # (B, N) 0-based word of each token
    last: Tensor  # (B, T, C) encoder output
    taps: dict[int, Tensor]  # layer -> (B, T, C)
    keep: Tensor | None  # (B, T) real frames
    voice: Tensor  # (B, X) speaker vectors
    units: Tensor  # (B, U) S3 units
    spans: Tensor | None = None  # (B, N, T) bool: frames in which the token's word is spoken
    prosody: Tensor | None = None  # (B, W, 3) PROSODY of each word, in standard deviations
    unit_pitch: Tensor | None = None  # (K,) what each unit means, see unit_pitch

    def to(self, device: torch.device) -> "TokenizerBatch":
        def move(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: v.to(device) for k, v in x.items()}
            return x if x is None else x.to(device)

        return TokenizerBatch(**{k: move(v) for k, v in vars(self).items()})


@dataclass
class TokenizerOutput:
    loss: Tensor  # the sum that is minimized
    ce: Tensor  # of units, nats
    recon: Tensor  # quantizer loss
    guide: Tensor  # -log attention inside the spoken word; 0 without spans
    prosody: Tensor  # mean squared error of PROSODY in the codes; 0 where it is not known
    pitch: Tensor  # mean squared error of the pitch that is expected; 0 without unit_pitch
    codes: Tensor | None  # (B, W, Q)
    units: ud.UnitDecoderOutput
    maps: Tensor | None = None  # cross-attention (B, L, H, N, T)


def read_prosody(z: Tensor) -> Tensor:
    """z (B, W, C), a word's vector -> (B, W, 3): its first channels are taught to be PROSODY.

    Ours. What is quiet beside the words, as pitch is in the states of a small recognizer, codes
    learn late and the unit decoder never follows."""
    z = nn.functional.layer_norm(z.float(), z.shape[-1:])
    return z[..., : len(PROSODY)] / PROSODY_GAIN


def unit_pitch(
    truths: Sequence[Utterance], said: Iterable[Tensor], count: int, unit_s: float
) -> Tensor:
    """Utterances and their units (U_i,) of unit_s seconds -> the pitch for which each unit stands,
    (count,): the mean of the words in which it is heard, in standard deviations of what is said;
    0 for units that are too rare to know."""
    total, seen = torch.zeros(2, count, dtype=torch.float64)
    for truth, units in zip(truths, said, strict=True):
        at = (torch.arange(len(units)) + 0.5) * unit_s
        word = torch.searchsorted(torch.tensor(truth.starts_s), at, right=True) - 1
        inside = (word >= 0) & (at < torch.tensor(truth.ends_s)[word.clamp(min=0)])
        pitch = truth.prosody[word[inside], PROSODY.index("pitch")].double()
        heard = units[inside].long()
        total.index_add_(0, heard, pitch)
        seen.index_add_(0, heard, torch.ones_like(pitch))
    seen[seen < LEAST_SEEN] = 0
    share, mean = seen / seen.sum().clamp(min=1), total / seen.clamp(min=1)  # (count,)
    off = (mean - mean @ share).masked_fill(seen == 0, 0.0)
    return (off / (off.square() @ share).sqrt().clamp(min=1e-3)).float()


def pitch_error(logits: Tensor, units: Tensor, unit_pitch: Tensor) -> Tensor:
    """logits (B, U, K+1), units (B, U) padded with -1, unit_pitch (K,) -> mean squared error of the
    pitch that the decoder expects. Ours: a cross-entropy says little of so small a difference."""
    expected = logits[..., :-1].softmax(-1) @ unit_pitch  # (B, U)
    return (expected - unit_pitch[units.clamp(min=0)]).square()[units >= 0].mean()


class SpeechTokenizer(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_codes = False
        self.aggregator = agg.Aggregator(config.aggregator)
        self.quantizer: FSQ | RVQ | None = None
        if config.quantizer == "fsq":
            self.quantizer = FSQ(config.fsq)
        elif config.quantizer == "rvq":
            self.quantizer = RVQ(config.rvq)
        self.unit_decoder = ud.UnitDecoder(config.unit_decoder)

    def train(self, mode: bool = True) -> Self:
        """keep_codes: what makes the codes stays as it is, RVQ's moving averages among it."""
        super().train(mode)
        for part in (self.aggregator, self.quantizer):
            if part is not None and self.keep_codes:
                part.eval()
        return self

    def words(
        self,
        ids: Tensor,
        word_ids: Tensor,
        last: Tensor,
        taps: Mapping[int, Tensor],
        keep: Tensor | None,
        need_maps: bool = True,
    ) -> tuple[Tensor, Tensor, agg.Maps | None]:
        """-> z (B, W, C) one vector per word, its keep (B, W), maps of where each token looked, for
        which fused attention has to be given up."""
        found = self.aggregator(ids, word_ids, last, taps, keep, need_weights=need_maps)
        z, maps = found if need_maps else (found, None)
        return *agg.word_vectors(z, word_ids), maps

    def forward(
        self, batch: TokenizerBatch, text_only: bool = False, history_keep: Tensor | None = None,
        continuous: bool = False,
    ) -> TokenizerOutput:  # fmt: skip
        """One training step's losses; text_only leaves the audio branch out (the baseline of the
        papers, and the start of training), continuous only the quantizer (TASTE's second stage).
        history_keep: see UnitDecoder.forward."""
        codes = maps = audio = None
        recon = guide = prosody = pitch = batch.voice.new_zeros(())
        need_maps = batch.spans is not None or not self.training
        if not text_only:
            heard = batch.last, batch.taps, batch.keep
            z, word_keep, maps = self.words(batch.ids, batch.word_ids, *heard, need_maps)
            if self.quantizer is not None and not continuous:
                z, codes, recon = self.quantizer(z, word_keep)
            if batch.prosody is not None:
                prosody = (read_prosody(z) - batch.prosody).square()[word_keep].mean()
            audio = agg.spread(z, batch.word_ids)  # (B, N, C)
        units = self.unit_decoder(
            batch.ids, batch.word_ids >= 0, audio, batch.voice, batch.units, history_keep, need_maps
        )
        if batch.spans is not None:
            guide = self.guide(batch.spans, batch.word_ids >= 0, maps, units)
        if batch.unit_pitch is not None and not text_only:  # text cannot tell it
            pitch = pitch_error(units.logits[:, :-1], batch.units, batch.unit_pitch)
        loss = units.loss + self.config.recon_weight * recon + GUIDE_WEIGHT * guide
        loss = loss + PROSODY_WEIGHT * prosody + PITCH_WEIGHT * pitch
        parts = units.loss, recon, guide, prosody, pitch
        return TokenizerOutput(loss, *parts, codes, units, None if maps is None else maps.frames)

    @torch.no_grad()
    def start(self, batch: TokenizerBatch) -> None:
        """Before the first step with codes: fit FSQ's range to what the aggregator gives. RVQ does
        so by itself."""
        if isinstance(self.quantizer, FSQ):
            heard = batch.ids, batch.word_ids, batch.last, batch.taps, batch.keep
            self.quantizer.start(*self.words(*heard)[:2])

    def guide(
        self, spans: Tensor, keep: Tensor, maps: agg.Maps | None, units: ud.UnitDecoderOutput
    ) -> Tensor:
        """spans (B, N, T), keep (B, N): a token should hear the frames of its word, and half the
        heads of one block should look at the word whose unit is to be predicted.

        Ours, not the papers': it needs word times, which the built-in corpus has, and gives in
        minutes what they get from hundreds of hours."""
        said = units.maps[len(units.maps) // 2]  # (B, H, 1+U, N)
        n = min(spans.shape[2], said.shape[2])  # rows: units are as many a second as frames
        spoken = (spans & keep[..., None])[..., :n].mT  # (B, n, N)
        loss = guided_attention(said[:, : said.shape[1] // 2, :n], spoken, spoken.any(2))
        return loss if maps is None else loss + guided_attention(maps.frames[:, -1], spans, keep)

    @torch.no_grad()
    def encode(
        self,
        ids: Tensor,
        word_ids: Tensor,
        last: Tensor,
        taps: Mapping[int, Tensor],
        keep: Tensor | None = None,
    ) -> Tensor:
        """-> codes (B, W, Q) int64, -1 where an item has no such word. No quantizer: ValueError."""
        if self.quantizer is None:
            raise ValueError("this tokenizer has quantizer='none': it makes no codes")
        z, word_keep, _ = self.words(ids, word_ids, last, taps, keep)
        return self.quantizer.encode(z, word_keep)

    def embed(self, codes: Tensor, word_ids: Tensor) -> Tensor:
        """codes (B, W, Q), word_ids (B, N) -> what the unit decoder hears, (B, N, C)."""
        if self.quantizer is None:
            raise ValueError("this tokenizer has quantizer='none': it has no codes to embed")
        return agg.spread(self.quantizer.decode(codes), word_ids)

    @torch.no_grad()
    def decode(
        self, ids: Tensor, word_ids: Tensor, codes: Tensor | None, voice: Tensor, **sampling: Any
    ) -> tuple[list[Tensor], Tensor]:
        """codes (B, W, Q), None = text only -> B unit sequences, and whether each ended by itself.

        sampling: see UnitDecoder.generate."""
        audio = None if codes is None else self.embed(codes, word_ids)
        return self.unit_decoder.generate(ids, word_ids >= 0, audio, voice, **sampling)


def guided_attention(maps: Tensor, spans: Tensor, keep: Tensor) -> Tensor:
    """maps (..., H, I, J) of I queries over J keys, spans (..., I, J) bool: what each query ought
    to look at, keep (..., I) -> -log of the mass there, heads averaged; mean over kept queries."""
    inside = (maps.mean(-3) * spans).sum(-1)  # (..., I)
    return -inside.clamp(min=1e-4).log()[keep].mean()


def load_tokenizer(folder: Path) -> SpeechTokenizer:
    """A tokenizer folder that train_tokenizer.py wrote, in eval mode."""
    values = read_config(folder, "tokenizer")
    classes = {
        "aggregator": agg.AggregatorConfig,
        "unit_decoder": ud.UnitDecoderConfig,
        "fsq": FSQConfig,
        "rvq": RVQConfig,
    }
    if missing := classes.keys() - values.keys():
        raise ValueError(f"{folder}/config.json: lacks {sorted(missing)} of the tokenizer")
    parts: dict[str, Any] = {
        name: as_config(cls, values[name], str(folder)) for name, cls in classes.items()
    }
    model = SpeechTokenizer(as_config(TokenizerConfig, values | parts, str(folder)))
    load_model(model, folder)
    return model


class UnitFrontend(nn.Module):
    """Two frozen models of a bundle folder that need no text: S3 units, which the unit decoder
    learns to say, and the voice."""

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        s3, voice = bundle / "s3", bundle / "speaker"
        self.s3 = s3_units.S3Units(as_config(s3_units.S3Config, read_config(s3), str(s3)))
        load_model(self.s3, s3)
        config = as_config(speaker.CAMPlusConfig, read_config(voice), str(voice))
        self.speaker = load_model(speaker.CAMPlus(config), voice)
        self.eval().requires_grad_(False)
        files = [bundle / part / "model.safetensors" for part in ("s3", "speaker")]
        digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        self.digest = "-".join(d[:12] for d in digests)  # features made by other weights are stale

    @torch.inference_mode()
    def features(self, wav: Tensor) -> dict[str, Tensor]:
        """wav (S,) at 16 kHz -> mel (F, M), units (U,), voice (1, X)."""
        device = self.speaker.out.weight.device
        mel = audio.whisper_mel(wav.to(device), self.s3.cfg.n_mels)  # (M, F)
        bank = audio.kaldi_fbank(wav).to(device)
        units = self.s3.encode(mel)
        return {"mel": mel.T, "units": units, "voice": self.speaker((bank - bank.mean(0))[None])}


class Recognizer(NamedTuple):
    """Speech recognition: the encoder feeds the aggregator, the decoder is where it starts."""

    encoder: whisper_enc.WhisperEncoder
    decoder: whisper_dec.WhisperDecoder
    tokens: text.Tokenizer
    prefix: tuple[int, ...]  # text ids in front of every transcript
    eos: int
    window: int = 0  # mel frames to which everything is padded; 0: nothing is, masks hide padding


def read_recognizer(folder: Path) -> Recognizer:
    """The folder `asr` of a bundle that train_tiny.py made."""
    asr = read_config(folder)
    if missing := {"encoder", "decoder", "prefix_ids", "eos"} - asr.keys():
        raise ValueError(f"{folder}/config.json: lacks {sorted(missing)}")
    encoder = whisper_enc.WhisperEncoder(as_config(whisper_enc.EncoderConfig, asr["encoder"]))
    decoder = whisper_dec.WhisperDecoder(as_config(whisper_dec.DecoderConfig, asr["decoder"]))
    pair = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    load_strict(pair, read_tensors(folder), str(folder))
    tokens = text.load_tokenizer(folder / "tokenizer.model")
    return Recognizer(encoder, decoder, tokens, tuple(asr["prefix_ids"]), int(asr["eos"]))


class Frontend(UnitFrontend):
    """All frozen models that the tokenizer stands on: also speech recognition."""

    def __init__(self, bundle: Path, asr: Recognizer | None = None) -> None:
        """asr: a public recognizer, see shards.open_frontend; None: the one of the bundle."""
        super().__init__(bundle)
        asr = asr or read_recognizer(bundle / "asr")
        self.encoder, self.decoder, self.tokens, self.prefix, self.eos, self.window = asr
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def hear(
        self, mel: Tensor, mel_keep: Tensor, layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor], Tensor]:
        """mel (B, M, F), mel_keep (B, F) -> last (B, T, C), taps, keep (B, T)."""
        keep = mel_keep[:, :: self.encoder.cfg.stride]
        if not self.window:
            return *self.encoder(mel, mel_keep, taps=layers), keep
        silence = mel.amax((1, 2), True) - audio.WHISPER_RANGE / 4  # the floor of the log-mel
        mel = torch.where(mel_keep[:, None], mel, silence)
        mel = torch.cat([mel, silence.expand(*mel.shape[:2], self.window - mel.shape[2])], 2)
        last, taps = self.encoder(mel, taps=layers)  # it was trained without a mask
        T = keep.shape[1]
        return last[:, :T], {k: tap[:, :T] for k, tap in taps.items()}, keep

    @torch.inference_mode()
    def transcribe(self, mel: Tensor, mel_keep: Tensor, max_new: int = 60) -> list[str]:
        """mel (B, M, F), mel_keep (B, F) -> texts."""
        last, _, keep = self.hear(mel, mel_keep, ())
        rows = whisper_dec.transcribe(
            self.decoder, last, keep, prefix=self.prefix, eos=self.eos, max_new=max_new
        )
        return [self.tokens.decode(row).strip() for row in rows]
