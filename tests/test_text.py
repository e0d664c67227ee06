"""text.py against tiktoken, tokenizers, sentencepiece and the golden word ids of Whisper."""

import base64
import json
import pickle
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

import text
from text import BytePairTokenizer, SentencePieceTokenizer, Tokenizer, align_words, load_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "golden/taste/tokenizer_asr.json").read_text())
# the part of Whisper's public vocabulary that the golden texts merge through; _ is the space
WHISPER = """_t:256 _a:257 _th:258 in:259 er:260 _w:261 _s:262 ou:263 _the:264 re:265 en:268 _c:269
it:270 nd:273 _d:274 _m:275 _h:276 an:282 _f:283 or:284 ll:285 _I:286 _l:287 _and:293 _in:294 as:296
_n:297 om:298 ic:299 ve:303 ow:305 le:306 _it:309 ot:310 's:311 _T:314 ere:323 ac:326 id:327 ke:330
am:335 _B:363 _an:364 _r:367 ce:384 _H:389 _was:390 un:409 ie:414 _ch:417 _O:422 _P:430 _fr:431
ge:432 _L:441 _lo:450 ab:455 _there:456 _It:467 ide:482 _from:490 ain:491 her:511 end:521 ud:532
ck:547 ag:559 _no:572 ice:573 'll:603 ach:608 ace:617 _He:634 _sp:637 ble:638 _mo:705 ne:716
ance:719 _her:720 other:802 _Be:879 ell:898 _love:959 _another:1071 ike:1123 _One:1485 _Like:1743
row:1892 _space:1901 llo:1913 _hit:2045 _Pr:2114 _hu:2137 _mov:2402 _Hello:2425 _dou:2482 _huge:2603
_chance:2931 orrow:3162 _movie:3169 _double:3834 _tab:4421 ham:4822 _rain:4830 _Tom:5041 una:5051
_Pre:6001 jud:9218 ello:11216 _Beach:14866 One:15426 Hello:15947 _Tomorrow:17499 _Beck:19184
Tom:23442 _Lag:24886 ride:25502 _Pride:30319 _Bend:32451"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHISPERS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SENTENCES = """The old harbour was quiet that evening, and seven ships weren't expected before 1930.
Der große Kapitän aß süße Äpfel, während draußen 12345 Vögel über die Straße flogen.
Où est passé l'élève qui avait reçu ça hier, près de la forêt enneigée d'Épinal ?
¿Cuándo volverá el niño de la montaña? Mañana, quizás, según dijo su compañera.
A irmã não queria pão, só maçãs; às três horas já estavam à mesa outra vez.
Zażółć gęślą jaźń, powiedział źle ubrany chłopiec, który łowił ryby w środę.
Příliš žluťoučký kůň běžel přes řeku a děti se mu smály až do večera.
Şişman çocuk ığdır'da güneşli bir öğleden sonra üzüm yedi, sonra eve döndü.
Hän söi äidin leipomia pullia yöllä, vaikka lääkäri oli kieltänyt häntä.
Hôm nay trời đẹp quá, chúng tôi muốn đi dạo quanh hồ rồi uống cà phê sữa đá.
Съешь ещё этих мягких французских булок, сказала бабушка и налила чаю.
Щовечора їхній ґанок пахнув яблуками, а дівчинка співала про зорі.
Ο γέρος ψαράς κοίταξε τη θάλασσα και είπε ότι αύριο θα έχει φουρτούνα.
ذهب الولد إلى المدرسة صباحًا، ثمّ عاد مع أصدقائه في الساعة الخامسة.
הילדה הקטנה קנתה לחם וחלב בשוק, ואחר כך חזרה הביתה ברגל.
बच्चे आज स्कूल नहीं गए क्योंकि रात भर ज़ोर की बारिश होती रही।
วันนี้อากาศดีมาก เราจึงไปเดินเล่นที่สวนสาธารณะใกล้บ้าน
오늘은 날씨가 좋아서 친구와 함께 강가를 천천히 걸었습니다.
きのう友だちと図書館へ行って、むずかしい漢字を100個も書きました。
昨天晚上下了一场大雪，孩子们高兴地在院子里堆雪人、打雪仗。"""
CORPUS = [
    "The captain's ship, he'll say, sailed 1234 miles; it was 5 o'clock.",
    "Größe naïve Øresund 中文字符很多 日本語のテキスト русский язык ελληνικά",
    "   indented\n\n\tdef f(x):\n        return x ** 2  # ... !!! ???",
] * 3
ODD = "aZé 's'LL're'VE ſ K²½٣१ \n\r\t\x1c\x85\xa0\u3000\u200b🙂-.,!12345"  # blanks, digits, folds
KINDS = ["gpt2", "llama3", "smollm", "nfc"]


def random_texts(n: int = 300) -> Iterator[str]:
    rng = random.Random(0)
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] != "C"]
    bmp = [c for c in known if c < "\u2000"]  # old enough for every Unicode version
    for i in range(n):
        pool = [bmp, ODD, ODD + "".join(rng.choices(known, k=3))][i % 3]
        yield "".join(rng.choices(pool, k=rng.randint(1, 60)))


def json_tokenizer(kind: str, corpus: list[str] = CORPUS, size: int = 500) -> Any:
    """A small byte-level BPE trained with the `tokenizers` library."""
    hf = pytest.importorskip("tokenizers")
    cut, isolated = hf.pre_tokenizers, "isolated"
    plain = cut.ByteLevel(add_prefix_space=False)
    llama = cut.Split(hf.Regex(LLAMA3), isolated, False)
    tokenizer = hf.Tokenizer(hf.models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = {
        "llama3": cut.Sequence([llama, cut.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "smollm": cut.Sequence([cut.Digits(individual_digits=True), plain]),
    }.get(kind, plain)
    if kind == "nfc":
        tokenizer.normalizer = hf.normalizers.NFC()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=cut.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def rank_tokenizers(path: Path, **training: Any) -> tuple[Tokenizer, Any]:
    """A rank file, opened by us and by tiktoken."""
    tiktoken = pytest.importorskip("tiktoken")
    spec = json.loads(json_tokenizer("gpt2", **training).to_str())
    letters = text._letters()
    tokens = [bytes(letters[c] for c in t) for t in spec["model"]["vocab"] if t[:2] != "<|"]
    ranks = {token: i for i, token in enumerate(tokens)}
    rows = [base64.b64encode(token).decode() + f" {i}\n" for token, i in ranks.items()]
    path.write_text("".join(rows))
    ours = load_tokenizer(path.parent)
    regex = LLAMA3 if path.name == "tokenizer.model" else WHISPERS
    return ours, tiktoken.Encoding(
        "test", pat_str=regex, mergeable_ranks=ranks, special_tokens=ours.special
    )


def whisper_file(path: Path) -> Path:
    letters = {chr(b): i for i, b in enumerate(text._letters().values())}  # ids 0 .. 255
    ranks = {letter.encode("latin1"): i for letter, i in letters.items()}
    ranks |= {
        t.replace("_", " ").encode(): int(i) for t, i in (r.split(":") for r in WHISPER.split())
    }
    rows = [base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items()]
    path.write_bytes(b"".join(rows) + b"= 50256\n")  # the public file ends like this
    return path


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(whisper_file(tmp_path_factory.mktemp("whisper") / "a.tiktoken"))


@pytest.fixture(scope="session")
def tiny() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(text.train_sentencepiece(CORPUS, 500))


# --- byte-level BPE ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["text"][:12])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_words_are_those_of_the_public_system(
    whisper: Tokenizer, case: dict[str, Any], mode: str
) -> None:
    lead_space = mode == "inference"
    ours = align_words(case["text"], whisper, whisper, lead_space, public=True)
    spaced = [" " * (i > 0 or lead_space) + word for i, word in enumerate(ours.words)]
    assert spaced == case[mode]["words"]
    assert ours.asr_ids == ours.llm_ids == case[mode]["ids"]
    assert ours.asr_word_ids == ours.llm_word_ids == case[mode]["word_ids"]


def test_special_tokens_of_whisper(whisper: Tokenizer) -> None:
    assert whisper.vocab_size == GOLDEN["n_vocab"] == 51866
    assert GOLDEN["special_tokens"].items() <= whisper.special.items()
    prefix = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    assert whisper.encode(prefix, special=True) == GOLDEN["prefix"]
    assert max(whisper.encode(prefix)) < 50257
    assert whisper.special["<|30.00|>"] == 51865
    assert whisper.decode([2425, 50256, 50257]) == " Hello<|endoftext|>"


@pytest.mark.parametrize(
    ("ranks", "vocab", "languages"),
    [(50257, None, 100), (50257, 51866, 100), (50257, 51865, 99), (50256, 51864, 99),
     (50256, None, 99)],
)  # fmt: skip
def test_special_tokens_of_earlier_whispers(
    tmp_path: Path, ranks: int, vocab: int | None, languages: int
) -> None:
    """Ids before large-v3 are one lower from the tasks on [openai/whisper, tokenizer.py]."""
    rows = [base64.b64encode(i.to_bytes(2, "big") + b"x") + b" %d\n" % i for i in range(ranks)]
    (tmp_path / "a.tiktoken").write_bytes(b"".join(rows))
    special = load_tokenizer(tmp_path, vocab).special
    assert special["<|startoftranscript|>"] == ranks + 1
    assert special["<|transcribe|>"] == ranks + 2 + languages + 1
    assert max(special.values()) + 1 == (vocab or ranks + languages + 1509)


@pytest.fixture(scope="module")
def polyglot() -> list[str]:
    """5000 words of 20 languages in lines, with the signs and cases that writers use."""
    rng = random.Random(1)
    words = [word for line in SENTENCES.splitlines() for word in line.split()]
    ends = ["", "", "", "", ",", ".", "?!", ":", "...", ") ", "\n", " -- ", "\u3002", "'s"]
    cases: list[Any] = [
        str,
        str,
        str,
        str.upper,
        str.capitalize,
        lambda w: f"({w}",
        lambda w: f"{w}{w}",
    ]
    many = [rng.choice(cases)(rng.choice(words)) + rng.choice(ends) for _ in range(5000)]
    return [" ".join(many[i : i + 25]) for i in range(0, len(many), 25)]


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_words_of_many_languages_as_tokenizers(
    tmp_path: Path, kind: str, polyglot: list[str]
) -> None:
    theirs = json_tokenizer(kind, corpus=SENTENCES.splitlines(), size=3000)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for line in polyglot:
        assert ours.encode(line) == theirs.encode(line).ids
    if kind == "gpt2":
        theirs.model.save(str(tmp_path))
        (tmp_path / "tokenizer.json").unlink()
        again = load_tokenizer(tmp_path)  # vocab.json and merges.txt
        assert [again.encode(line) for line in polyglot] == [ours.encode(x) for x in polyglot]


@pytest.mark.parametrize("name", ["a.tiktoken", "tokenizer.model"])
def test_thousands_of_words_of_many_languages_as_tiktoken(
    tmp_path: Path, name: str, polyglot: list[str]
) -> None:
    ours, theirs = rank_tokenizers(tmp_path / name, corpus=SENTENCES.splitlines(), size=3000)
    for line in polyglot:
        ids = ours.encode(line)
        assert ids == theirs.encode(line, disallowed_special=())
        assert ours.decode(ids) == line


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_thousands_of_words_of_many_languages_as_sentencepiece(
    tmp_path: Path, model_type: str, polyglot: list[str]
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES.splitlines()), model_prefix=str(tmp_path / "m"),
        vocab_size=1500, model_type=model_type, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "m.model").rename(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for line in polyglot:
        assert ours.encode(" " + line) == theirs.encode(line)
        assert ours.decode(ours.encode(line)) == line


@pytest.mark.parametrize("name", ["a.tiktoken", "tokenizer.model"])
def test_equals_tiktoken(tmp_path: Path, name: str) -> None:
    ours, theirs = rank_tokenizers(tmp_path / name)
    assert ours.vocab_size == theirs.n_vocab
    for line in [*CORPUS, *random_texts()]:
        ids = ours.encode(line)
        assert ids == theirs.encode(line, disallowed_special=())
        assert ours.decode(ids) == line


def test_special_tokens_of_llama_3() -> None:
    names = text._llama3_special()
    assert len(set(names)) == 256
    ids = {name: 128000 + i for i, name in enumerate(names)}
    assert ids["<|end_of_text|>"] == 128001
    assert ids["<|finetune_right_pad_id|>"] == 128004
    assert ids["<|eot_id|>"] == 128009
    assert ids["<|reserved_special_token_247|>"] == 128255


@pytest.mark.parametrize("kind", KINDS)
def test_equals_tokenizers_on_tokenizer_json(tmp_path: Path, kind: str) -> None:
    theirs = json_tokenizer(kind)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == theirs.get_vocab_size()
    for line in [*CORPUS, "e\u0301 a\u030a", *random_texts()]:
        if kind == "nfc" and max(line) >= "\u0590":
            continue  # composition beyond it changed between versions of Unicode
        assert ours.encode(line) == theirs.encode(line).ids
        if kind != "nfc":
            assert ours.decode(ours.encode(line)) == line
    marked = "<|im_start|> hi<|endoftext|>"
    assert ours.special == {"<|endoftext|>": 0, "<|im_start|>": 1}
    assert ours.encode(marked, special=True) == theirs.encode(marked).ids
    assert not {0, 1} & set(ours.encode(marked))


def test_vocab_and_merges_equal_tokenizer_json(tmp_path: Path) -> None:
    theirs = json_tokenizer("gpt2")
    theirs.model.save(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "vocab.json"]
    (tmp_path / "added_tokens.json").write_text('{"<|extra|>": 500}')
    ours = load_tokenizer(tmp_path)
    assert ours.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|extra|>": 500}
    for line in [*CORPUS, *random_texts(60)]:
        assert ours.encode(line) == theirs.encode(line).ids


def test_merges_are_of_pairs_not_of_sums() -> None:
    ids = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    merges = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"ab", b"c"): 2}
    assert BytePairTokenizer(ids, [text.GPT2], merges, whole=False).encode("abc") == [0, 4]
    assert BytePairTokenizer(ids, [text.GPT2], merges, whole=True).encode("abc") == [5]
    assert BytePairTokenizer(ids, [text.GPT2]).encode("cabcab") == [2, 5, 3]


@pytest.mark.parametrize("ignore", [True, False])
def test_ignore_merges_of_llama_3(ignore: bool) -> None:
    model = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [], "ignore_merges": ignore}
    spec = {"model": model, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    assert text._from_json(spec).encode("ab") == ([2] if ignore else [0, 1])


def test_the_longest_special_name_wins() -> None:
    tokenizer = BytePairTokenizer({b"x": 0}, [text.GPT2], special={"<a>": 1, "<a>x": 2})
    assert tokenizer.encode("<a>xx<a>", special=True) == [2, 0, 1]


def test_a_byte_that_the_vocabulary_lacks_is_unknown_or_an_error() -> None:
    with pytest.raises(ValueError, match="byte b'z' is not in the vocabulary"):
        BytePairTokenizer({b"a": 0}, [text.GPT2]).encode("az")
    assert BytePairTokenizer({b"a": 0}, [text.GPT2], unk=7).encode("az") == [0, 7]


def test_a_word_of_a_hundred_thousand_letters_takes_no_minute(whisper: Tokenizer) -> None:
    assert whisper.decode(whisper.encode("ther" * 25000)) == "ther" * 25000


@pytest.mark.parametrize("regex", [r"\P{L}+", r"(\p{L})+", r"[\S]", r"[[a]b]", r"\p{Xx}", r"\w+"])
def test_regexes_that_cannot_be_translated_say_so(regex: str) -> None:
    with pytest.raises(ValueError, match=r"cannot translate|not a Unicode category"):
        text.splitter(regex)


def test_unknown_ids_and_lone_surrogates_are_errors(
    whisper: Tokenizer, tiny: SentencePieceTokenizer
) -> None:
    for tokenizer in (whisper, tiny):
        for odd in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match=rf"id {odd} is not in this vocabulary of"):
                tokenizer.decode([odd])
        with pytest.raises(ValueError, match="surrogates not allowed"):
            tokenizer.encode("a\ud800")
        assert tokenizer.encode("") == []
        assert tokenizer.decode([]) == ""


# --- SentencePiece -------------------------------------------------------------------------------


def test_sentencepiece_keeps_every_text(tiny: SentencePieceTokenizer) -> None:
    for line in [*CORPUS, *random_texts(), " a", "a ", "  a  b ", "\n", " "]:
        assert tiny.decode(tiny.encode(line)) == line.replace("▁", " ")
    assert tiny.decode(tiny.encode(" captain")) == " captain"
    assert tiny.encode(" captain")[0] != tiny.encode("captain")[0]


def test_training_is_deterministic_and_hits_the_size() -> None:
    for size in (400, 512):
        model = text.train_sentencepiece(CORPUS, size)
        assert model == text.train_sentencepiece(CORPUS, size)
        assert SentencePieceTokenizer(model).vocab_size == size


def test_a_small_corpus_gives_the_largest_model_that_it_has() -> None:
    tokenizer = SentencePieceTokenizer(text.train_sentencepiece(["a ship", "a ship"], 512))
    assert 260 < tokenizer.vocab_size < 300
    assert len(tokenizer.encode(" ship")) == 1


@pytest.mark.parametrize("size", [96, 192])
def test_without_byte_fallback_unknown_characters_are_unk(size: int) -> None:
    lines = ["the quiet captain saw seven ships near the old harbor", "birds sang above hills"] * 9
    tokenizer = SentencePieceTokenizer(text.train_sentencepiece(lines, size, byte_fallback=False))
    assert tokenizer.vocab_size <= size
    assert tokenizer.decode(tokenizer.encode(" captain")) == " captain"
    assert tokenizer.encode("ü") == [tokenizer.unk]
    assert tokenizer.decode(tokenizer.encode(" ü")) == " ⁇"


def test_public_models_with_a_prefix_of_their_own() -> None:
    model = text.io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = SentencePieceTokenizer(model.getvalue())
    assert ours.encode(" The captain sailed") == theirs.encode("The captain sailed")
    assert ours.decode(ours.encode("captain  x")) == "captain  x"
    assert ours.special == {"<s>": 1, "</s>": 2}
    assert ours.encode("<s> a", special=True) == [1, *ours.encode(" a")]
    assert 1 not in ours.encode("<s> a")


def test_a_copy_in_another_process_is_the_same(tiny: SentencePieceTokenizer) -> None:
    again = pickle.loads(pickle.dumps(tiny))
    assert again.encode("  captain") == tiny.encode("  captain")


def test_messages_of_training() -> None:
    with pytest.raises(ValueError, match="no words"):
        text.train_sentencepiece(["", "  "], 300)
    with pytest.raises(ValueError, match=r"'vocab_size': 100.*needs at least \d+ pieces"):
        text.train_sentencepiece(CORPUS, 100)


# --- files ---------------------------------------------------------------------------------------


def test_the_content_decides(tmp_path: Path, tiny: SentencePieceTokenizer) -> None:
    (tmp_path / "lm.bin").write_bytes(tiny.model)
    assert isinstance(load_tokenizer(str(tmp_path / "lm.bin")), SentencePieceTokenizer)
    (tmp_path / "tokenizer.model").write_bytes(tiny.model)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    assert load_tokenizer(tmp_path).encode(" captain") == tiny.encode(" captain")
    whisper_file(tmp_path / "tokenizer.model")  # as Llama 3 names its rank file
    assert "<|begin_of_text|>" in load_tokenizer(tmp_path).special


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer"),
        (b"hello\n", "not a tokenizer .starts with b'hello"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\n\x05abc", "not a SentencePiece model"),
        (b"YQ== 0\nnonsense\n", "damaged"),
        (b"{", "damaged"),
        (b'{"a": 0}', "needs merges.txt beside it"),
        (b'{"model": {"type": "Unigram", "vocab": []}}', "only byte-level BPE.*Unigram"),
        (b'{"model": {"vocab": {}, "merges": []}, "pre_tokenizer": null}', "unknown pre-tokenizer"),
        (b'{"model": {}, "normalizer": {"type": "Prepend"}}', "unknown normalizer"),
        (b'{"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}', "sum of a merge"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        load_tokenizer(tmp_path / "file")
    assert str(e.value).startswith(str(tmp_path / "file"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.model: no such tokenizer file"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="no tokenizer in this folder, expected"):
        load_tokenizer(tmp_path)


# --- words ---------------------------------------------------------------------------------------


def test_words() -> None:
    assert text.split_words(" a  b\tc\n") == ["a", "b", "c"]
    assert text.split_words(" a  b\tc\n", public=True) == ["a", "", "b", "c"]
    assert text.split_words(" ") == text.split_words("", public=True) == []


def test_two_tokenizers_share_the_words(whisper: Tokenizer, tiny: SentencePieceTokenizer) -> None:
    ours = align_words("The captain  sailed far.", whisper, tiny)
    assert ours.words == ["The", "captain", "sailed", "far."]
    for ids, word_ids, tokenizer in (
        (ours.asr_ids, ours.asr_word_ids, whisper),
        (ours.llm_ids, ours.llm_word_ids, tiny),
    ):
        assert len(ids) == len(word_ids)
        assert sorted(word_ids) == word_ids
        for w, word in enumerate(ours.words):
            own = [i for i, n in zip(ids, word_ids, strict=True) if n == w]
            assert tokenizer.decode(own) == " " + word
    bare = align_words("The captain", whisper, tiny, lead_space=False)
    assert tiny.decode(bare.llm_ids) == whisper.decode(bare.asr_ids) == "The captain"


def test_a_text_without_words_is_refused(tiny: SentencePieceTokenizer) -> None:
    with pytest.raises(ValueError, match=r"at least one word, got '  '"):
        align_words("  ", tiny, tiny)
