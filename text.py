"""Text to ids and back with two tokenizers at once, grouped into the same words.

    encode   text -> pieces (a regex) -> bytes of each -> merge the pair of lowest rank, repeat
    align    word w -> asr ids and llm ids of " w"; every id remembers the number of its word

    text --split_words--> words (W) -+-- asr.encode --> asr_ids (N),  asr_word_ids (N)  in 0 .. W-1
                                     '-- llm.encode --> llm_ids (N'), llm_word_ids (N') in 0 .. W-1

Two kinds of tokenizer: byte-level BPE (Whisper, Llama 3, SmolLM2), written out here, and
SentencePiece (Llama 2, TinyLlama and our own tiny ones). In both, encode(text) adds nothing: no
special tokens and no space in front. [Sennrich et al. 2016, arXiv:1508.07909; Kudo and
Richardson 2018, arXiv:1808.06226; words: TASTE, arXiv:2504.07053, sec. 3.1]
"""

import base64
import heapq
import io
import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece

# How text is cut before merging. \s, \p{L} and \p{N} are Unicode's, see splitter.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # and Whisper
LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"""
LLAMA3 += r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_MIN = 100_000  # tokens; a rank file this large is Llama 3's, a smaller one Whisper's
# Of Whisper large-v3, in the order of their ids; earlier models lack the last.
LANGUAGES = """en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu
ta no th ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl
mr pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw
ln ha ba jw su yue"""
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # not \x1c, unlike re
# What is appended to a protobuf is merged into it: this turns add_dummy_prefix (field 3) and
# remove_extra_whitespaces (field 4) of the normalizer_spec (field 3) off and changes nothing else.
KEEP_SPACES = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])
WANTED = (
    "expected tokenizer.model, tokenizer.json, *.tiktoken, or vocab.json with merges.txt beside; "
    "if it starts with 'version https', it is a Git LFS pointer: fetch the file itself"
)
TRAINING: dict[str, Any] = {  # of a SentencePiece model
    "model_type": "bpe",
    "character_coverage": 1.0,  # every character of the corpus is a piece
    "normalization_rule_name": "identity",  # the default rewrites the text
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "max_sentence_length": 2**20,  # bytes; longer lines would be dropped without a word
    "minloglevel": 2,
}


class Tokenizer:
    """What the two kinds share. vocab_size is the highest id + 1, special tokens included."""

    special: dict[str, int]  # <|endoftext|> and the like, by name
    token_bytes: dict[int, bytes]  # by id; not str: a character may be spread over several ids
    vocab_size: int

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of the text and nothing else; `special`: names of special tokens become their id."""
        if not special or not self.special:
            return self._encode(text)
        names = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        known = {name: [i] for name, i in self.special.items()}
        return [i for part in parts for i in known.get(part) or self._encode(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; broken UTF-8 gives U+FFFD. ValueError: an id that does not exist."""
        ids = [int(i) for i in ids]
        if odd := [i for i in ids if i not in self.token_bytes]:
            raise ValueError(f"id {odd[0]} is not in this vocabulary of {self.vocab_size}")
        return b"".join(self.token_bytes[i] for i in ids).decode(errors="replace")

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError


@lru_cache(maxsize=32)
def _category(name: str) -> str:
    """'L' or 'Nd' -> the ranges of that Unicode category, to stand inside [...]."""
    found = [i for i in range(0x110000) if unicodedata.category(chr(i)).startswith(name)]
    if not found:
        raise ValueError(f"\\p{{{name}}} is not a Unicode category")
    first = [i for i, before in zip(found, [-2, *found], strict=False) if i != before + 1]
    last = [i for i, after in zip(found, [*found[1:], -2], strict=True) if i != after - 1]
    return "".join(rf"\U{a:08x}-\U{b:08x}" for a, b in zip(first, last, strict=True))


def splitter(pattern: str) -> re.Pattern[str]:
    r"""A pre-tokenizer's regex -> one whose .split(text) gives the pieces, none of it lost.

    The standard `re` has no \p{..} and another \s: both become explicit ranges, exact for every
    character that this Python's Unicode version knows. ValueError: cannot be translated."""
    out, inside = [], False
    for token in re.findall(r"\\p\{\w+\}|\\.|[^\\]", pattern, re.DOTALL):
        if token == r"\s" or token.startswith(r"\p{"):
            ranges = SPACE if token == r"\s" else _category(token[3:-1])
            out.append(ranges if inside else f"[{ranges}]")
        elif token == r"\S" and not inside:
            out.append(f"[^{SPACE}]")
        elif token in (r"\S", r"\p", r"\P", r"\w", r"\W", r"\b", "[" if inside else ""):
            raise ValueError(f"cannot translate {token} in the regex {pattern!r}")
        else:
            inside = token == "[" or (inside and token != "]")
            out.append(token)
    if (compiled := re.compile(f"({''.join(out)})")).groups > 1:
        raise ValueError(f"cannot translate a regex with groups that capture: {pattern!r}")
    return compiled


@dataclass(eq=False, repr=False)
class BytePairTokenizer(Tokenizer):
    """Byte-level BPE: in each piece the pair of lowest rank merges first, on a tie the leftmost."""

    ids: dict[bytes, int]
    patterns: list[str]  # cut the text into pieces, one regex after the other
    merges: dict[tuple[bytes, bytes], int] | None = None  # rank of a pair; None: the id of its sum
    special: dict[str, int] = field(default_factory=dict)
    whole: bool = True  # a piece that is a token needs no merging
    unk: int | None = None
    nfc: bool = False  # compose accents first

    def __post_init__(self) -> None:
        self.splitters = [splitter(pattern) for pattern in self.patterns]
        self.token_bytes = {i: token for token, i in self.ids.items()}
        self.token_bytes |= {i: name.encode() for name, i in self.special.items()}
        self.vocab_size = max(self.token_bytes) + 1

    def _encode(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for cut in self.splitters:
            pieces = [part for piece in pieces for part in cut.split(piece) if part]
        return [i for piece in pieces for i in self._encode_piece(piece.encode())]

    def _encode_piece(self, piece: bytes) -> list[int]:
        if self.whole and piece in self.ids:
            return [self.ids[piece]]
        tokens = self._merge(piece)
        if self.unk is None and (odd := [t for t in tokens if t not in self.ids]):
            raise ValueError(f"byte {odd[0]!r} is not in the vocabulary and there is no <unk>")
        return [self.ids.get(token, self.unk or 0) for token in tokens]

    def _merge(self, piece: bytes) -> list[bytes]:
        """O(n log n): a heap of (rank, place) of pairs; a pair that changed since is skipped."""
        parts = [piece[i : i + 1] for i in range(len(piece))]
        after = list(range(1, len(parts) + 1))  # the place of the next living part
        before = list(range(-1, len(parts) - 1))
        heap: list[tuple[int, int, bytes, bytes]] = []

        def offer(i: int, j: int) -> None:
            if i < 0 or j >= len(parts):
                return
            a, b = parts[i], parts[j]
            rank = self.ids.get(a + b) if self.merges is None else self.merges.get((a, b))
            if rank is not None:
                heapq.heappush(heap, (rank, i, a, b))

        for i, j in enumerate(after):
            offer(i, j)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if parts[i] != left or j >= len(parts) or parts[j] != right:
                continue
            parts[i], parts[j], after[i] = left + right, b"", after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            offer(before[i], i)
            offer(i, after[i])
        return [part for part in parts if part]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (its bytes in .model), made exact: decode(encode(text)) == text.

    Public models (Llama 2) put a space before the text by themselves; here the text decides:
    encode(" " + text) gives their ids. Their "▁" is the space, so a "▁" in the text becomes one.
    unk: the id of what a model without byte pieces does not know; it decodes to "⁇"."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model + KEEP_SPACES)
        except RuntimeError as e:
            raise ValueError(f"not a SentencePiece model, or damaged ({e})") from e
        self.vocab_size, self.unk = int(self._sp.vocab_size()), int(self._sp.unk_id())
        pieces = {i: self._sp.id_to_piece(i) for i in range(self.vocab_size)}
        self.special = {piece: i for i, piece in pieces.items() if self._sp.is_control(i)}
        self.token_bytes = {i: self._as_bytes(i, piece) for i, piece in pieces.items()}

    def __reduce__(self) -> tuple[type, tuple[bytes]]:  # for the workers of a DataLoader
        return type(self), (self.model,)

    def _as_bytes(self, i: int, piece: str) -> bytes:
        if self._sp.is_byte(i):  # "<0xE4>"
            return bytes([int(piece[3:5], 16)])
        return ("⁇" if self._sp.is_unknown(i) else piece.replace("▁", " ")).encode()

    def _encode(self, text: str) -> list[int]:
        return list(self._sp.encode(text.encode()))  # bytes: lone surrogates fail with a message


def train_sentencepiece(lines: Iterable[str], vocab_size: int, byte_fallback: bool = True) -> bytes:
    """Train a BPE model on the words of `lines` -> its bytes. Same input, same model.

    vocab_size is an upper bound: a corpus with fewer pieces in it gives the largest model that it
    has. byte_fallback: 256 byte pieces, so that any text survives; without, unknown characters
    become <unk>. ValueError: no words, or a size below the characters (and bytes) needed."""
    text = [" " + " ".join(words) for line in lines if (words := split_words(line))]
    if not text:
        raise ValueError("no words to train a tokenizer on, expected lines of text")
    model = io.BytesIO()
    sizes: dict[str, Any] = dict(vocab_size=vocab_size, byte_fallback=byte_fallback)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=model, **sizes, **TRAINING
        )
    except RuntimeError as e:
        if largest := re.search(r"too high .* value <= (\d+)", str(e)):
            return train_sentencepiece(text, int(largest[1]), byte_fallback)
        least = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(e))
        need = f"this text needs at least {least[1]} pieces" if least else str(e)
        raise ValueError(f"cannot train a tokenizer with {sizes}: {need}") from e
    return model.getvalue()


def load_tokenizer(path: str | Path, vocab: int | None = None) -> Tokenizer:
    """A tokenizer file, or a model folder with one in it. The content decides, not the name.

    SentencePiece models; rank files of Whisper (*.tiktoken) and Llama 3 (tokenizer.model);
    tokenizer.json and vocab.json + merges.txt of byte-level BPE. vocab: ids of the model, which
    tell the specials of Whisper before large-v3."""
    path = Path(path)
    if path.is_dir():
        return load_tokenizer(_find(path), vocab)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file")
    data = path.read_bytes()
    try:
        if data.startswith(b"\n"):  # field 1 of a protobuf
            return SentencePieceTokenizer(data)
        if data.lstrip().startswith(b"{"):
            spec = json.loads(data)
            return _from_json(spec) if "model" in spec else _from_vocab(path, spec)
        if re.match(rb"[A-Za-z0-9+/]*=* \d+\r?\n", data):
            return _from_ranks(data, path.name, vocab)
    except (ValueError, KeyError, TypeError, re.error) as e:
        raise ValueError(f"{path}: damaged, or no tokenizer that is understood ({e!r})") from e
    raise ValueError(f"{path}: not a tokenizer (starts with {data[:20]!r}), {WANTED}")


def _find(folder: Path) -> Path:
    # tokenizer.model first: beside it, the tokenizer.json of Llama 2 is not byte-level
    for name in ("tokenizer.model", "tokenizer.json", "*.tiktoken", "vocab.json", "*.model"):
        if found := sorted(folder.glob(name)):
            return found[0]
    raise FileNotFoundError(f"{folder}: no tokenizer in this folder, {WANTED}")


def _from_ranks(data: bytes, name: str, vocab: int | None) -> BytePairTokenizer:
    """Lines of `base64 rank`; special tokens are not in the file, they follow the last rank."""
    rows = [line.split() for line in data.splitlines() if line]
    ids = {base64.b64decode(token): int(rank) for token, rank in rows}  # Whisper's last one is ""
    llama, start = len(ids) > LLAMA3_MIN or name == "tokenizer.model", max(ids.values()) + 1
    names = _llama3_special() if llama else _whisper_special()
    if not llama and (start == 50256 or vocab == start + len(names) - 1):  # 50256: English only
        names.remove("<|yue|>")
    special = {name: i for i, name in enumerate(names, start)}
    return BytePairTokenizer(ids, [LLAMA3 if llama else GPT2], special=special)


def _whisper_special() -> list[str]:
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    names = ["endoftext", "startoftranscript", *LANGUAGES.split(), *tasks]
    return [f"<|{name}|>" for name in names] + [f"<|{i / 50:.2f}|>" for i in range(1501)]  # seconds


def _llama3_special() -> list[str]:
    """256 names as in the tokenizer.json of Llama 3.2."""
    spare = iter(f"reserved_special_token_{i}" for i in range(256))
    names = ["begin_of_text", "end_of_text", next(spare), next(spare), "finetune_right_pad_id"]
    names += [next(spare), "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    return [f"<|{name}|>" for name in [*names, *spare][:256]]


def _letters() -> dict[str, int]:
    """How JSON files write bytes: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in plain)
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _from_json(spec: dict[str, Any]) -> BytePairTokenizer:
    """tokenizer.json of a byte-level BPE. All of its added tokens count as special."""
    model, normalizer = spec["model"], spec.get("normalizer")
    kind, suffix = model.get("type", "BPE"), model.get("end_of_word_suffix")
    if kind != "BPE" or model.get("continuing_subword_prefix") or suffix:
        raise ValueError(f"only byte-level BPE is understood, got {kind} with suffix {suffix!r}")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"unknown normalizer {normalizer}; is there a tokenizer.model beside it?")
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    letters, vocab = _letters(), model["vocab"]
    tokens = {t: bytes(letters[c] for c in t) for t in vocab if t not in special}
    ids = {token: vocab[t] for t, token in tokens.items()}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = {(tokens[a], tokens[b]): rank for rank, (a, b) in enumerate(pairs)}
    if lost := [a + b for a, b in merges if a + b not in ids]:
        raise ValueError(f"the sum of a merge is not in the vocabulary: {lost[0]!r}")
    whole, unk = bool(model.get("ignore_merges")), (vocab | special).get(model.get("unk_token"))
    patterns, nfc = _patterns(spec["pre_tokenizer"]), normalizer is not None
    return BytePairTokenizer(ids, patterns, merges, special, whole, unk, nfc)


def _patterns(step: dict[str, Any]) -> list[str]:
    match step:
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            return [pattern for inner in steps for pattern in _patterns(inner)]
        case {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }:
            return [regex]
        case {"type": "Digits", "individual_digits": alone}:
            return [r"\p{N}" if alone else r"\p{N}+"]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [GPT2] if step.get("use_regex", True) else []
    raise ValueError(f"unknown pre-tokenizer {step}, only byte-level BPE is understood")


def _from_vocab(path: Path, vocab: dict[str, int]) -> BytePairTokenizer:
    """vocab.json with merges.txt; special: added_tokens.json, and words that no merge makes."""
    files = path.with_name("merges.txt"), path.with_name("added_tokens.json")
    if not files[0].is_file():
        raise ValueError("a vocab.json needs merges.txt beside it")
    lines = files[0].read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    made = {a + b for a, b in pairs} | _letters().keys() | {""}
    special = {token: i for token, i in vocab.items() if token not in made}
    if files[1].is_file():
        special |= json.loads(files[1].read_bytes())
    added = [{"content": token, "id": i} for token, i in special.items()]
    step = {"type": "ByteLevel", "add_prefix_space": False}
    model = {"vocab": vocab, "merges": pairs}
    return _from_json({"model": model, "added_tokens": added, "pre_tokenizer": step})


@dataclass
class WordIds:
    """One text of W words under two tokenizers; word ids count from 0 and never fall."""

    words: list[str]
    asr_ids: list[int]  # (N,), as asr_word_ids
    asr_word_ids: list[int]
    llm_ids: list[int]  # (N',), as llm_word_ids
    llm_word_ids: list[int]


def split_words(text: str, public: bool = False) -> list[str]:
    """Cut at runs of blanks: "a  b" -> ["a", "b"].

    public: the published rule cuts at each single blank, "a  b" -> ["a", "", "b"], and the empty
    word becomes the token of a lone space, with codes of its own. We only do it when asked."""
    return re.split(r"\s", text.strip()) if public and text.strip() else text.split()


def align_words(
    text: str, asr: Tokenizer, llm: Tokenizer, lead_space: bool = True, public: bool = False
) -> WordIds:
    """Each word alone, with a space before it, under both tokenizers; no special tokens.

    lead_space=False: the first word has none, as in the training data of the public system, while
    its inference gives it one. ValueError: no words, or a word without ids."""
    words = split_words(text, public)
    if not words:
        raise ValueError(f"expected a text with at least one word, got {text!r}")
    spaced = [" " + w if i or lead_space else w for i, w in enumerate(words)]
    columns: list[list[int]] = []
    for tokenizer in (asr, llm):
        ids = [tokenizer.encode(word) for word in spaced]
        if empty := [w for w, own in zip(spaced, ids, strict=True) if not own]:
            raise ValueError(f"the tokenizer has no ids for the word {empty[0]!r} of {text!r}")
        columns += [i for own in ids for i in own], [w for w, own in enumerate(ids) for _ in own]
    return WordIds(words, *columns)


if __name__ == "__main__":
    line = "the quiet captain saw seven ships near the old harbor"
    asr, llm = (SentencePieceTokenizer(train_sentencepiece([line], n)) for n in (300, 330))
    aligned = align_words("the ships saw Zoë", asr, llm)
    print("asr", [asr.decode([i]) for i in aligned.asr_ids], aligned.asr_word_ids)
    print("llm", [llm.decode([i]) for i in aligned.llm_ids], aligned.llm_word_ids)
