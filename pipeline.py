"""The whole system from a bundle folder: hear, encode, continue, speak.

    wav (S,) 16 kHz --transcribe--> text --encode--> Speech(words, codes (W, Q), voice (X,))
    Speech --reply--> more words and codes, same voice      the spoken LM, see spoken_lm.py
    Speech --speak--> wav (S',) 22.05 kHz                   unit decoder, flow, HiFT
    reply_stream --parts--> stream: the same, sentence by sentence while the LM goes on

Long recordings are cut at their quietest moments, long texts at sentence ends, because the models
know pieces of a few seconds; every piece goes through the same path and the results are joined.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import audio
import text
from aggregator import Aggregator
from continuation import RNG, Prompt, Sampling, Talk, converse, generate_all
from cpu_linear import quicken
from data import keep_mask, pad
from flow import Estimator, Flow
from llm import Llama, LlamaConfig
from spoken_lm import SpokenLM, SpokenLMConfig
from tokenizer import Frontend, load_tokenizer
from unit_decoder import Stack, UnitDecoder
from vocabulary import Decoder, VocabularySets
from vocoder import load_vocoder
from weights import Model, as_config, halve, load_model, read_config
from whisper_dec import WhisperDecoder
from whisper_enc import WhisperEncoder

RATE = audio.WHISPER_RATE
SHORTEST_S = 0.2  # seconds; less cannot hold a word
WINDOW_S = 8.0  # longest piece that is heard at once
WORDS = 10  # longest piece that is spoken at once, as in the training corpus
SILENCE_RMS = 1e-3  # of full scale
PAUSE_S = 0.3  # between two pieces that are spoken one after the other
FRAME = RATE // 100  # samples, 10 ms
QUIET_DB, GAP = 40, 25  # so far below the loudest frame for so many frames: a pause
KEPT = 10  # frames of a pause that stay with what was before it, and with what follows
FADE = 110  # samples, 5 ms, of a piece into a pause
TOP_K, TEMPERATURE = 25, 0.2  # of the units, by WER on dev; the published code draws at 1.0
TEXT_ONLY_TEMPERATURE = 0.6  # without codes a colder decoder repeats itself
SAMPLING = Sampling(0.8, 0.95, 1.0, 0.0)  # of words and codes; these, too, by WER on dev

# what bf16 rounds: not the units, voices, codes and phases, which it would change too much
HALVED = (WhisperEncoder, WhisperDecoder, Aggregator, UnitDecoder, Llama, Flow)


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
        codes, ours = (other.codes if other.words else self.codes), self.codes
        if self.words and other.words and codes is not None:
            codes = None if ours is None else torch.cat([ours.to(codes.device), codes])
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


def between_pauses(wav: Tensor) -> list[tuple[int, int]]:
    """wav (S,) -> first sample and end of what is said between pauses, with no more silence than
    utterances of the corpus have: behind more of it words are heard that nobody said."""
    level = F.pad(wav, (0, -len(wav) % FRAME)).view(-1, FRAME).square().mean(1)  # (T,)
    loud = (level >= level.max() / 10 ** (QUIET_DB / 10)).nonzero()[:, 0]  # (n,)
    runs = loud.tensor_split(((loud.diff() > GAP).nonzero()[:, 0] + 1).tolist())
    spans = [(int(run[0]), int(run[-1]) + 1) for run in runs]
    firsts = [a - KEPT if a > GAP else 0 for a, _ in spans]
    ends = [b + KEPT if len(level) - b > GAP else len(level) for _, b in spans]
    return [(a * FRAME, min(b * FRAME, len(wav))) for a, b in zip(firsts, ends, strict=True)]


def pieces(
    parts: Iterable[Speech], ends: tuple[str, ...] = (".",), longest: int = WORDS, least: int = 1
) -> Iterator[Speech]:
    """Parts of one utterance as they come -> what to speak at once, each as soon as it is whole: to
    a word that ends in one of `ends`, if it is the `least`-th or later, or to `longest` words."""
    waiting = None
    for part in parts:
        waiting, first = part if waiting is None else waiting.join(part), 0
        for i, word in enumerate(waiting.words, 1):
            if i - first == longest or (i - first >= least and word.endswith(ends)):
                yield waiting.part(first, i)
                first = i
        waiting = waiting.part(first, len(waiting.words))
    if waiting is not None and waiting.words:
        yield waiting


def known(
    talks: Iterator[list[Talk]], tokenizer: Decoder, voice: Tensor
) -> Iterator[tuple[Speech, bool]]:
    """One utterance that grows -> its words as soon as they have codes, and whether the utterance
    ended by itself with them. The first part has no words: its glue ends the prompt's last one."""
    told = -1
    for (talk,) in talks:
        if told < 0 and talk.words:
            yield Speech([], None, voice, talk.word(-1, tokenizer)), False
            told = 0
        if talk.ready > told >= 0:
            words = [talk.word(w, tokenizer) for w in range(told, talk.ready)]
            codes = torch.stack(talk.codes[talk.first + told :])
            yield Speech(words, codes, voice), talk.done and talk.ended
            told = talk.ready


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
    """wavs (S_i,) at 16 kHz, any length -> texts, heard from pause to pause; pieces of similar
    length in batches of `size`."""
    parts = [(i, wav[a:b]) for i, wav in enumerate(wavs) for a, b in between_pauses(wav)]
    pieces = [(len(piece), i, piece) for i, part in parts for piece in cut(part)]
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


def with_pauses(said: Iterable[tuple[Tensor, bool]]) -> Iterator[tuple[Tensor, bool]]:
    """Pieces, (S_i,) and whether each ended by itself -> the same, faded into short pauses."""
    fade, silence = audio.Crossfade(FADE), torch.zeros(int(PAUSE_S * audio.VOCODER_RATE))
    for i, (wav, ended) in enumerate(said):
        pause = fade.push(silence) if i else wav[:0]
        yield torch.cat([pause, fade.push(wav)]), ended
    yield fade.held, True


def joined(said: Iterable[tuple[Tensor, bool]]) -> tuple[Tensor, bool]:
    """Pieces -> one wav (S,), and whether all of them ended by themselves."""
    wavs, ended = zip(*said, strict=True)
    return torch.cat(wavs), all(ended)


def ready(model: Model, bf16: bool) -> Model:
    """The model itself, for inference: halved, or in fp32 with quick products on a CPU."""
    return halve(model, HALVED) if bf16 else quicken(model)


def compile_steps(*models: nn.Module) -> None:
    """From now on what these repeat is compiled: a step of the LM, of the unit decoder and of the
    recognizer (see kv_cache.Step), a step of the flow, the encoder. It takes minutes at first."""
    for part in (part for model in models for part in model.modules()):
        if isinstance(part, Llama | WhisperDecoder) or (isinstance(part, Stack) and part.is_lm):
            part.compile_steps()
        elif isinstance(part, Estimator | WhisperEncoder):
            part.compile(dynamic=True)


class Pipeline:
    def __init__(
        self,
        bundle: Path,
        tokenizer: Path,
        spoken_lm: Path | None = None,
        device: str = "cpu",
        bf16: bool = False,
    ) -> None:
        """bundle: asr, s3, speaker, flow, hift, lm; tokenizer and spoken_lm: folders of
        train_tokenizer.py and train_lm.py; without spoken_lm, reply() is not there.

        bf16: halved; then all calls belong under torch.autocast."""
        self.device, self.bf16 = torch.device(device), bf16
        self.frontend = ready(Frontend(bundle), bf16).to(self.device)
        self.tokenizer = ready(load_tokenizer(tokenizer), bf16).to(self.device)
        self.vocoder = ready(load_vocoder(bundle), bf16).to(self.device)
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
        return ready(load_model(model, folder), self.bf16).to(self.device)

    def compile_steps(self) -> None:
        """See compile_steps above."""
        lm = [self.lm] if hasattr(self, "lm") else []
        compile_steps(self.frontend, self.tokenizer, self.vocoder, *lm)

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
        sounds = between_pauses(wav)
        wav = wav[sounds[0][0] : sounds[-1][1]]
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
            top_k=TOP_K, temperature=TEMPERATURE if known else TEXT_ONLY_TEMPERATURE,
            min_len=4, rng=rng,
        )  # fmt: skip
        return list(zip(units, stopped.tolist(), strict=True))

    def stream(
        self, parts: Iterable[Speech], rng: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, bool]]:
        """Parts of one utterance as they come -> wav (S,) at 22.05 kHz of each sentence as soon as
        its words are there, and whether it ended by itself."""

        def spoken() -> Iterator[tuple[Tensor, bool]]:
            for piece in pieces(parts):
                ((units, ended),) = self.units([piece], rng)
                yield self.vocoder(units, piece.voice.to(self.device), rng).cpu(), ended

        return with_pauses(spoken())

    def speak(self, speech: Speech, rng: torch.Generator | None = None) -> tuple[Tensor, bool]:
        """-> wav (S,) at 22.05 kHz, and whether every piece ended by itself: all of stream()."""
        return joined(self.stream([speech], rng))

    def speak_all(
        self, speeches: list[Speech], rng: torch.Generator | None = None
    ) -> list[tuple[Tensor, bool]]:
        """Several at once, which is faster; all with codes or all without -> for each as speak,
        with other draws."""
        own = [[*pieces([speech])] for speech in speeches]
        units, out = iter(self.units([piece for some in own for piece in some], rng)), []
        for speech, some in zip(speeches, own, strict=True):
            voice = speech.voice.to(self.device)
            said = (
                (self.vocoder(u, voice, rng).cpu(), ended) for u, ended in islice(units, len(some))
            )
            out.append(joined(with_pauses(said)))
        return out

    def start(self, prompt: Speech | None) -> Prompt:
        """What the spoken LM reads first."""
        if prompt is None:
            return Prompt()
        row = text.align_words(prompt.text, self.lm_tokens, self.lm_tokens)
        ids, word_ids = torch.tensor(row.llm_ids), torch.tensor(row.llm_word_ids)
        return Prompt(ids, word_ids if prompt.codes is not None else None, prompt.codes)

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
        return self.reply_all([prompt], extra_words, sampling, [voice], rng)[0]

    def reply_all(
        self,
        prompts: Sequence[Speech | None],
        extra_words: int,
        sampling: Sampling,
        voices: Sequence[Tensor],
        rng: RNG = None,
    ) -> list[tuple[Speech, bool]]:
        """Several at once, which is faster -> for each as reply. rng: see converse."""
        starts = [self.start(prompt) for prompt in prompts]
        found = generate_all(self.lm, self.sets, starts, sampling, extra_words, rng=rng)
        return [
            (Speech(out.words, out.codes.cpu(), voice, out.glue), out.ended)
            for out, voice in zip(found, voices, strict=True)
        ]

    def reply_stream(
        self,
        prompt: Speech | None,
        extra_words: int,
        sampling: Sampling,
        voice: Tensor,
        rng: torch.Generator | None = None,
    ) -> Iterator[tuple[Speech, bool]]:
        """The same reply word by word: see known()."""
        starts = [self.start(prompt)]
        talks = converse(self.lm, self.sets, starts, sampling, extra_words, rng=rng)
        return known(talks, self.sets.tokenizer, voice)
