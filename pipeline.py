"""The whole system from a bundle folder: hear, encode, continue, speak.

    wav (S,) 16 kHz --transcribe--> text --encode--> Speech(words, codes (W, Q), voice (X,))
    Speech --reply--> more words and codes, same voice      the spoken LM, see spoken_lm.py
    Speech --speak--> wav (S',) 22.05 kHz                   unit decoder, flow, HiFT

Long recordings are cut at their quietest moments, long texts at sentence ends, because the models
know pieces of a few seconds; every piece goes through the same path and the results are joined.
"""

from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import audio
import text
from continuation import Prompt, Sampling, VocabularySets, generate
from data import keep_mask, pad
from llm import LlamaConfig
from spoken_lm import SpokenLM, SpokenLMConfig
from tokenizer import Frontend, load_tokenizer
from vocoder import load_vocoder
from weights import as_config, load_model, read_config

RATE = audio.WHISPER_RATE
SHORTEST_S = 0.2  # seconds; less cannot hold a word
WINDOW_S = 8.0  # longest piece that is heard at once
WORDS = 10  # longest piece that is spoken at once, as in the training corpus
SILENCE_RMS = 1e-3  # of full scale
PAUSE_S = 0.1  # between two pieces that are spoken one after the other
TOP_K, TEMPERATURE = 25, 0.2  # of the units, by WER on dev; the published code draws at 1.0
SAMPLING = Sampling(0.8, 0.95, 1.0, 0.5)  # of words and codes


@dataclass(frozen=True)
class Speech:
    """Words with their codes, in a voice: what the spoken LM reads and writes."""

    words: list[str]
    codes: Tensor | None  # (W, Q) int64; None: text only
    voice: Tensor  # (X,)
    glue: str = ""  # ends the last word of what it is joined to

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def join(self, other: "Speech") -> "Speech":
        """Both, one after the other, in the voice of the other."""
        words = [*self.words[:-1], *(w + other.glue for w in self.words[-1:]), *other.words]
        codes = None
        if self.codes is not None and other.codes is not None:
            codes = torch.cat([self.codes.to(other.codes.device), other.codes])
        return Speech(words, codes, other.voice)

    def part(self, first: int, last: int) -> "Speech":
        codes = None if self.codes is None else self.codes[first:last]
        return replace(self, words=self.words[first:last], codes=codes)


def check_wav(wav: Tensor, name: str) -> Tensor:
    """wav (S,) at 16 kHz, or ValueError: too short or silent."""
    if len(wav) < SHORTEST_S * RATE:
        raise ValueError(
            f"{name} lasts {len(wav) / RATE:.3f} s, wanted at least {SHORTEST_S} s of speech"
        )
    if wav.square().mean().sqrt() < SILENCE_RMS:
        raise ValueError(f"{name} is silent; wanted a recording of speech")
    return wav


def cut(wav: Tensor, window_s: float = WINDOW_S) -> list[Tensor]:
    """wav (S,) -> pieces of at most window_s, cut where the energy of 50 ms is lowest."""
    pieces, size, hop = [], int(window_s * RATE), RATE // 20
    while len(wav) > size:
        last = min(size, len(wav) - size // 4)  # leaves a quarter at least
        second_half = wav[size // 2 : last].unfold(0, hop, hop).square().sum(-1)  # (n,)
        at = size // 2 + int(second_half.argmin()) * hop + hop // 2
        pieces.append(wav[:at])
        wav = wav[at:]
    return [*pieces, wav]


def sentences(words: list[str], longest: int = WORDS) -> list[tuple[int, int]]:
    """Spans of words to speak at once: to a full stop, or to `longest` words."""
    spans, first = [], 0
    for i, word in enumerate(words, 1):
        if word.endswith(".") or i - first == longest or i == len(words):
            spans.append((first, i))
            first = i
    return spans


def share(words: list[str], heard: list[str]) -> list[list[str]]:
    """Split words over pieces of a recording, in proportion to the words recognized in each."""
    counts = torch.tensor([float(len(text.split_words(line))) for line in heard]) + 1e-3
    ends = (counts.cumsum(0) / counts.sum() * len(words)).round().long().tolist()
    return [words[a:b] for a, b in pairwise([0, *ends])]


def mels(frontend: Frontend, wavs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """wavs (S_i,) at 16 kHz -> mel (B, M, F), keep (B, F)"""
    device = frontend.speaker.out.weight.device
    mel, lengths = audio.whisper_mel_batch(wavs, frontend.encoder.cfg.n_mels)
    return mel.to(device), keep_mask(lengths).to(device)


def transcribe(frontend: Frontend, wavs: list[Tensor], size: int = 25) -> list[str]:
    """wavs (S_i,) at 16 kHz, any length -> texts; pieces of similar length in batches of `size`."""
    pieces = [(len(piece), i, piece) for i, wav in enumerate(wavs) for piece in cut(wav)]
    order = sorted(range(len(pieces)), key=lambda k: pieces[k][0])
    said = [""] * len(pieces)
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        heard = frontend.transcribe(*mels(frontend, [pieces[k][2] for k in batch]))
        for k, line in zip(batch, heard, strict=True):
            said[k] = line
    rows: list[list[str]] = [[] for _ in wavs]
    for (_, i, _), line in zip(pieces, said, strict=True):
        rows[i].append(line)
    return [" ".join(filter(None, row)) for row in rows]


class Pipeline:
    def __init__(
        self, bundle: Path, tokenizer: Path, spoken_lm: Path | None = None, device: str = "cpu"
    ) -> None:
        """bundle: asr, s3, speaker, flow, hift, lm; tokenizer and spoken_lm: folders of
        train_tokenizer.py and train_lm.py; without spoken_lm, reply() is not there."""
        self.device = torch.device(device)
        self.frontend = Frontend(bundle).to(self.device)
        self.tokenizer = load_tokenizer(tokenizer).to(self.device)
        self.vocoder = load_vocoder(bundle).to(self.device)
        if spoken_lm is not None:
            self.lm = self.load_spoken_lm(spoken_lm)
            self.lm_tokens = text.load_tokenizer(bundle / "lm" / "tokenizer.model")
            self.sets = VocabularySets.of(self.lm_tokens, self.lm.config.llm.vocab)

    def load_spoken_lm(self, folder: Path) -> SpokenLM:
        values = read_config(folder, "spoken_lm")
        llm = as_config(LlamaConfig, values["llm"], str(folder))
        config = as_config(SpokenLMConfig, values | {"llm": llm}, str(folder))
        if self.tokenizer.quantizer is None:
            raise ValueError(f"{folder}: the tokenizer makes no codes to go on from")
        model = SpokenLM(config, self.tokenizer.quantizer)
        load_model(model, folder)
        return model.to(self.device)

    def transcribe(self, wav: Tensor) -> str:
        """wav (S,) at 16 kHz, any length -> text."""
        return transcribe(self.frontend, [wav])[0]

    def voice(self, wav: Tensor) -> Tensor:
        """wav (S,) at 16 kHz -> (X,)"""
        return self.frontend.features(wav)["voice"][0]

    def encode(self, wav: Tensor, said: str) -> Speech:
        """wav (S,) at 16 kHz and what is said in it -> Speech.

        Of a long recording each piece gets as many words as its share of what was recognized."""
        words, codes = self.check_text(said), []
        pieces = cut(wav)
        heard = transcribe(self.frontend, pieces) if len(pieces) > 1 else [said]
        for piece, part in zip(pieces, share(words, heard), strict=True):
            if part:
                codes.append(self.encode_piece(piece, part))
        return Speech(words, torch.cat(codes), self.voice(wav))

    @torch.inference_mode()
    def encode_piece(self, wav: Tensor, words: list[str]) -> Tensor:
        """wav (S,), its words -> codes (W, Q)"""
        mel, keep = mels(self.frontend, [wav])
        layers = self.tokenizer.config.aggregator.value_layers
        last, taps, frame_keep = self.frontend.hear(mel, keep, layers)
        ids, word_ids = self.ids([words])
        return self.tokenizer.encode(ids, word_ids, last, taps, frame_keep)[0]

    def ids(self, pieces: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Words of each piece -> text ids (B, N), 0 at padding, and word ids (B, N), then -1."""
        tokens = self.frontend.tokens
        rows = [text.align_words(" ".join(words), tokens, tokens) for words in pieces]
        ids, _ = pad([torch.tensor(row.asr_ids) for row in rows])
        word_ids, _ = pad([torch.tensor(row.asr_word_ids) for row in rows], -1)
        return ids.to(self.device), word_ids.to(self.device)

    def check_text(self, said: str) -> list[str]:
        """Words that the tiny tokenizers know in full, or ValueError that names one that is not."""
        words = text.split_words(said.lower())
        if not words:
            raise ValueError("no words: none were heard, or --text is empty; give --text WORDS")
        for word in words:
            if "⁇" in self.frontend.tokens.decode(self.frontend.tokens.encode(" " + word)):
                raise ValueError(
                    f"the word {word!r} has characters that this tokenizer lacks; write it with "
                    "letters a to z (numbers as words) and full stops"
                )
        return words

    @torch.inference_mode()
    def units(self, pieces: list[Speech], rng: torch.Generator | None) -> list[tuple[Tensor, bool]]:
        """Short pieces, all with codes or all without -> for each units (U,), and whether the
        decoder ended by itself."""
        ids, word_ids = self.ids([piece.words for piece in pieces])
        known = [piece.codes for piece in pieces if piece.codes is not None]
        codes = pad(known)[0].to(self.device) if known else None  # (B, W, Q)
        voices = torch.stack([piece.voice for piece in pieces]).to(self.device)
        units, stopped = self.tokenizer.decode(
            ids, word_ids, codes, voices,
            top_k=TOP_K, temperature=TEMPERATURE, min_len=4, rng=rng,
        )  # fmt: skip
        return list(zip(units, stopped.tolist(), strict=True))

    def speak(self, speech: Speech, rng: torch.Generator | None = None) -> tuple[Tensor, bool]:
        """-> wav (S,) at 22.05 kHz, and whether every piece ended by itself."""
        return self.speak_all([speech], rng)[0]

    def speak_all(
        self, speeches: list[Speech], rng: torch.Generator | None = None
    ) -> list[tuple[Tensor, bool]]:
        """Several at once, which is faster; all with codes or all without -> for each as speak."""
        spans = [sentences(speech.words) for speech in speeches]
        pieces = [s.part(*span) for s, own in zip(speeches, spans, strict=True) for span in own]
        units = iter(self.units(pieces, rng))
        pause, out = int(PAUSE_S * audio.VOCODER_RATE), []
        for speech, own in zip(speeches, spans, strict=True):
            voice, said = speech.voice.to(self.device), list(islice(units, len(own)))
            wavs = [F.pad(self.vocoder(u, voice, rng).cpu(), (0, pause)) for u, _ in said]
            out.append((torch.cat(wavs)[:-pause], all(ended for _, ended in said)))
        return out

    @torch.inference_mode()
    def reply(
        self,
        prompt: Speech | None,
        extra_words: int,
        sampling: Sampling,
        voice: Tensor,
        rng: torch.Generator | None = None,
    ) -> tuple[Speech, bool]:
        """Go on from the prompt, or begin -> the new words with their codes, and whether they came
        to an end by themselves."""
        start = Prompt()
        if prompt is not None:
            row = text.align_words(prompt.text, self.lm_tokens, self.lm_tokens)
            ids, word_ids = torch.tensor(row.llm_ids), torch.tensor(row.llm_word_ids)
            start = Prompt(ids, word_ids if prompt.codes is not None else None, prompt.codes)
        out = generate(self.lm, self.sets, start, sampling, extra_words, rng=rng)
        return Speech(out.words, out.codes.cpu(), voice, out.glue), out.ended
