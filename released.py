"""The released system, Llama-1B-TASTE-V0, built from its loaded models: hear, encode, go on, speak.

    wav (S,) 16 kHz --Whisper--> words (W) --> ids under Whisper's and under Llama's tokenizer
    wav --log-mel of 30 s--> encoder --last, tap 6--> aggregator, RVQ --> codes (W, Q)
    words, codes --spoken LM--> more of both --unit decoder--> units (U,) --flow, HiFT--> wav

The same calls as Pipeline. faithful: the numbers of the published `inference_completion` and
`inference_reconstruction`, at batch 1 in fp32. Not faithful: the same weights without what is wrong
there; README.md says what that is. Both: a recording longer than the 30 s that Whisper hears is cut
at its quietest moments, and a text longer than the published unit decoder can speak at sentence
ends; and every loop ends. The published code puts words after 30 s on no sound at all.
[TASTE: Tseng et al. 2025, arXiv:2504.07053; numbers: TASTE-SpokenLM 301bce2]
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import audio
import lora
import text
import whisper_dec
from continuation import Prompt, Sampling, converse, generate
from pipeline import Speech, compile_steps, cut, known, pieces, ready, share
from public import open_public
from speaker import CAMPlus
from spoken_lm import IGNORE, SpokenLM
from tokenizer import SpeechTokenizer
from vocabulary import VocabularySets
from vocoder import Vocoder
from weights import read_json
from whisper_dec import WhisperDecoder
from whisper_enc import WhisperEncoder

SAMPLING = Sampling(temperature=0.5, top_p=0.3, repetition_penalty=1.1, faithful=True)  # its README
WORDS = 8  # new ones at least, its README
POSITIONS = 5000  # rows of the published unit decoder's position table
MAX_RATIO = 20  # units for each position of its prompt, at most
CLAUSE_ENDS, SHORTEST, LONGEST = tuple(".,;:?!"), 3, 12  # words of a clause that is spoken alone
FADE = 220  # samples, 10 ms, of a clause into the next
PREFIX = ("startoftranscript", "en", "transcribe", "notimestamps")


@dataclass
class Models:
    """What the released system is made of: all in eval mode, on one device."""

    asr_encoder: WhisperEncoder  # whisper-large-v3, which writes down what is said
    asr_decoder: WhisperDecoder
    asr_tokens: text.Tokenizer  # also those of the aggregator and the unit decoder
    encoder: WhisperEncoder  # distil-large-v3, below the aggregator
    tokenizer: SpeechTokenizer  # aggregator, RVQ, unit decoder
    lm: SpokenLM  # with the quantizer of the tokenizer
    lm_tokens: text.Tokenizer
    speaker: CAMPlus
    vocoder: Vocoder
    suppress: Sequence[int] = ()  # of Whisper's generation_config.json: never recognized,
    suppress_first: Sequence[int] = ()  # and not as the first token


def open_models(model: Path, asr: Path, device: torch.device, bf16: bool = False) -> Models:
    """model: Llama-1B-TASTE-V0, with its cosyvoice/ and llama_tokenizer/, its speaker_embed.onnx
    converted into a folder beside them (see public.py); asr: whisper-large-v3.

    In fp32, or halved, see Pipeline. ValueError: parts are missing, or do not fit."""
    parts, heard = (open_public(folder, None if bf16 else torch.float32) for folder in (model, asr))
    wanted = {"encoder", "tokenizer", "spoken_lm", "speaker", "flow", "hift"}
    for folder, gap in (
        (model, wanted - parts.keys()),
        (asr, {"encoder", "decoder"} - heard.keys()),
    ):
        if gap:
            raise ValueError(f"{folder}: lacks {sorted(gap)}; python public.py --check {folder}")
    llama, rules = model / "llama_tokenizer", asr / "generation_config.json"
    never = read_json(rules) if rules.is_file() else {}
    models: dict[str, Any] = {k: ready(v, bf16) for k, v in parts.items() if k in wanted}
    whisper: dict[str, Any] = {k: ready(v, bf16) for k, v in heard.items()}
    for part in (*models.values(), *whisper.values()):
        part.to(device).eval()
    if not bf16:  # a sum in bf16 would lose most of the LoRA: it stays beside its layers
        lora.fold(models["spoken_lm"])
    return Models(
        whisper["encoder"],
        whisper["decoder"],
        text.load_tokenizer(asr),
        models["encoder"], models["tokenizer"], models["spoken_lm"],
        text.load_tokenizer(llama if llama.is_dir() else model),
        models["speaker"],
        Vocoder(models["flow"], models["hift"].fold()),
        never.get("suppress_tokens") or (),
        never.get("begin_suppress_tokens") or (),
    )  # fmt: skip


class Tidy:
    """A tokenizer whose texts are cleaned up as transformers does for Llama 3 and Whisper."""

    # Quirk: " ." and " 's" begin no word, because their space is gone; the tokenizer_config.json of
    # both say so [transformers 4.51.1, clean_up_tokenization; its issue 32575].
    GLUED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")

    def __init__(self, tokens: text.Tokenizer) -> None:
        self.tokens, self.special = tokens, tokens.special

    def decode(self, ids: Iterable[int]) -> str:
        line = self.tokens.decode(ids)
        for glued in self.GLUED:
            line = line.replace(glued, glued.strip())
        return line


class Released:
    def __init__(self, models: Models, faithful: bool = True, short: bool = False) -> None:
        """short: recordings are heard without silence behind them, which is quicker, and not what
        the weights were trained on."""
        self.models, self.faithful, self.short = models, faithful, short
        llm = models.lm.llm
        self.device = llm.embed.weight.device
        llm.config = replace(llm.config, rope_bf16=faithful)  # see llm.frequencies
        self.asr_tokens = Tidy(models.asr_tokens) if faithful else models.asr_tokens
        tokens = Tidy(models.lm_tokens) if faithful else models.lm_tokens
        self.sets = VocabularySets.of(tokens, llm.config.vocab, faithful)

    def compile_steps(self) -> None:
        """See pipeline.compile_steps."""
        m = self.models
        heard = m.asr_encoder, m.asr_decoder, m.encoder
        compile_steps(*heard, m.tokenizer, m.lm, m.vocoder)

    def mel(self, wav: Tensor, encoder: WhisperEncoder) -> Tensor:
        """wav (S,) at 16 kHz -> (1, M, F), all that the encoder can take; the rest is cut off."""
        # Quirk: silence up to 30 s is heard like sound, there is no mask.
        wav = wav[: round(window_s(encoder) * audio.WHISPER_RATE)]
        pad_s = None if self.short else window_s(encoder)
        mel = audio.whisper_mel(wav, encoder.cfg.n_mels, pad_s)
        return mel[None].to(self.device, encoder.conv1.weight.dtype)

    @torch.inference_mode()
    def transcribe(self, wav: Tensor) -> str:
        """wav (S,) at 16 kHz, any length -> text."""
        lines = [self.transcribe_piece(p) for p in cut(wav, window_s(self.models.asr_encoder))]
        return " ".join(filter(None, lines))

    def transcribe_piece(self, wav: Tensor) -> str:
        m, names = self.models, self.models.asr_tokens.special
        prefix = [names[f"<|{name}|>"] for name in PREFIX]
        keys, _ = m.asr_encoder(self.mel(wav, m.asr_encoder))
        (ids,) = whisper_dec.transcribe(
            m.asr_decoder, keys, prefix=prefix, eos=names["<|endoftext|>"],
            max_new=m.asr_decoder.cfg.max_tokens - len(prefix),
            suppress=m.suppress, suppress_first=m.suppress_first,
        )  # fmt: skip
        special = {*names.values()}
        return self.asr_tokens.decode(i for i in ids if i not in special).strip()

    def check_text(self, said: str) -> list[str]:
        """What is said -> words, an empty one between two blanks if faithful; ValueError: none."""
        words = text.split_words(said, public=self.faithful)
        if not words:
            raise ValueError("no words: none were heard, or --text is empty; give --text WORDS")
        return words

    def ids(self, words: list[str], tokens: text.Tokenizer) -> tuple[Tensor, Tensor]:
        """Each word alone with a space before it -> ids, word ids (1, N)"""
        own = [tokens.encode(f" {word}") for word in words]
        word_ids = [w for w, ids in enumerate(own) for _ in ids]
        if {*word_ids} != {*range(len(words))}:
            raise ValueError(f"the tokenizer has no ids for one of the words {words}")
        pair = torch.tensor([[i for ids in own for i in ids], word_ids], device=self.device)
        return pair[:1], pair[1:]

    def voice(self, *wavs: Tensor) -> Tensor:
        """Recordings (S,) at 16 kHz of one speaker -> (X,), their mean, of length 1."""
        banks = [audio.kaldi_fbank(wav).to(self.device) for wav in wavs]
        with torch.inference_mode():
            voices = [self.models.speaker((bank - bank.mean(0))[None])[0] for bank in banks]
        return F.normalize(torch.stack(voices).mean(0), dim=0)

    def encode(self, wav: Tensor, said: str) -> Speech:
        """wav (S,) at 16 kHz, any length, and what is said in it -> Speech."""
        words, pieces = self.check_text(said), cut(wav, window_s(self.models.encoder))
        heard = [self.transcribe(piece) for piece in pieces] if len(pieces) > 1 else [said]
        codes = [
            self.encode_mel(self.mel(piece, self.models.encoder), part)
            for piece, part in zip(pieces, share(words, heard), strict=True)
            if part
        ]
        return Speech(words, torch.cat(codes), self.voice(wav))

    @torch.inference_mode()
    def encode_mel(self, mel: Tensor, words: list[str]) -> Tensor:
        """mel (1, M, F), the words in it -> codes (W, Q)"""
        m = self.models
        last, taps = m.encoder(mel, taps=m.tokenizer.config.aggregator.value_layers)
        return m.tokenizer.encode(*self.ids(words, m.asr_tokens), last, taps)[0]

    def start(
        self,
        prompt: Speech | None,
        sampling: Sampling,
        around: tuple[str, str] | None,
        stop: str | None,
    ) -> tuple[SpokenLM, VocabularySets, Prompt, Sampling, int | None]:
        """What generation needs; the last one is the id of stop."""
        tokens, start, sets = self.models.lm_tokens, Prompt(), self.sets
        if prompt is not None:
            (ids,), (word_ids,) = self.ids(prompt.words, tokens)
            start = Prompt(ids, word_ids if prompt.codes is not None else None, prompt.codes)
        if around is not None:
            both = [torch.tensor(tokens.encode(x, special=True), dtype=torch.long) for x in around]
            start = replace(start, prefix=both[0], suffix=both[1])
        if stop is not None and stop not in tokens.special:
            raise ValueError(f"stop={stop!r} is no special token of this tokenizer")
        end = None if stop is None else tokens.special[stop]
        if end is not None and not self.faithful:  # the public rules never ban but <|end_of_text|>
            sets = replace(sets, banned=sets.banned.index_fill(0, torch.tensor(end), False))
        return self.models.lm, sets, start, replace(sampling, faithful=self.faithful), end

    def reply(
        self,
        prompt: Speech | None,
        extra_words: int,
        sampling: Sampling,
        voice: Tensor,
        rng: torch.Generator | None = None,
        around: tuple[str, str] | None = None,
        stop: str | None = None,
    ) -> tuple[Speech, bool]:
        """Go on from the prompt -> the new words with their codes, and whether they ended by
        themselves. No prompt: zero mode; without codes: text; around: the texts before and behind
        it, instruct; else audio. stop: the token that ends an instructed answer.

        ValueError: the prompt does not fit, or no such token."""
        lm, sets, start, sampling, end = self.start(prompt, sampling, around, stop)
        out = generate(lm, sets, start, sampling, extra_words, rng=rng, stop=end)
        return Speech(out.words, out.codes.to(self.device), voice, out.glue), out.ended

    def reply_stream(
        self,
        prompt: Speech | None,
        extra_words: int,
        sampling: Sampling,
        voice: Tensor,
        rng: torch.Generator | None = None,
        around: tuple[str, str] | None = None,
        stop: str | None = None,
    ) -> Iterator[tuple[Speech, bool]]:
        """The same reply word by word: see pipeline.known()."""
        lm, sets, start, sampling, end = self.start(prompt, sampling, around, stop)
        talks = converse(lm, sets, [start], sampling, extra_words, rng=rng, stop=end)
        return known(talks, sets.tokenizer, voice)

    @torch.inference_mode()
    def predicted(self, speech: Speech) -> Speech:
        """The same words, with the codes that the spoken LM expects when it knows all before."""
        if speech.codes is None:
            raise ValueError("speech without codes: there is nothing to predict")
        lm = self.models.lm
        out = lm(*self.ids(speech.words, self.models.lm_tokens), speech.codes[None])
        asked = out.layout.code_labels[0, :, 0] != IGNORE  # (R,)
        return replace(speech, codes=lm.head.say(out.hidden[0, asked], lm.quantizer, 0.0, None))

    def spans(self, words: list[str]) -> list[tuple[int, int]]:
        """Words to speak at once: all that the published unit decoder could, cut at sentence ends
        if possible."""
        most = POSITIONS // (1 + MAX_RATIO) - 3  # tokens
        word_ids = self.ids(words, self.models.asr_tokens)[1][0]
        sizes = torch.bincount(word_ids).tolist()
        spans, first = [], 0
        while first < len(words):
            last = first + 1
            while last < len(words) and sum(sizes[first : last + 1]) <= most:
                last += 1
            ends = [i for i in range(first + 1, last + 1) if words[i - 1].endswith((".", "?", "!"))]
            if last < len(words) and ends:
                last = ends[-1]
            spans.append((first, last))
            first = last
        return spans

    def units(
        self, speech: Speech, rng: torch.Generator | None = None, **sampling: Any
    ) -> list[tuple[Tensor, bool]]:
        """-> for each span units (U,) and whether they ended by themselves. sampling: see
        UnitDecoder.generate; its defaults are the published ones."""
        out = []
        for span in self.spans(speech.words):
            part = speech.part(*span)
            codes = None if part.codes is None else part.codes[None]
            ids, word_ids = self.ids(part.words, self.models.asr_tokens)
            (units,), stopped = self.models.tokenizer.decode(
                ids, word_ids, codes, part.voice[None], rng=rng, **sampling
            )
            out.append((units, bool(stopped)))
        return out

    def speak(
        self, speech: Speech, rng: torch.Generator | None = None, **sampling: Any
    ) -> tuple[Tensor, bool]:
        """-> wav (S,) at 22.05 kHz, and whether every span ended by itself."""
        said = self.units(speech, rng, **sampling)
        wavs = [self.models.vocoder(units, speech.voice, rng).cpu() for units, _ in said]
        return torch.cat(wavs), all(ended for _, ended in said)

    def stream(
        self, parts: Iterable[Speech], rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, bool]]:
        """Parts of one utterance as they come -> wav (S,) at 22.05 kHz of each clause as soon as
        its words are there, and whether it ended by itself.

        Not what speak() says: there the unit decoder and the flow know the whole text."""
        fade = audio.Crossfade(FADE)
        for piece in pieces(parts, CLAUSE_ENDS, LONGEST, SHORTEST):
            for units, ended in self.units(piece, rng):
                wav = self.models.vocoder(units, piece.voice.to(self.device), rng)
                yield fade.push(wav.cpu()), ended
        yield fade.held, True


def window_s(encoder: WhisperEncoder) -> float:
    """Seconds that an encoder takes at once."""
    frames = encoder.cfg.max_frames * encoder.cfg.stride
    return frames * audio.WHISPER_HOP / audio.WHISPER_RATE
