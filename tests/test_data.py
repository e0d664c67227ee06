"""data.py: batches, padding, features on disk, and the three sources of utterances."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import data
import synth
from data import Batches, FrameBatches, Item, Ragged, keep_mask, pad, prepare


def item(key: str, utterance: synth.Utterance | None = None) -> Item:
    return Item(key, f"text {key}", "ann", lambda: (torch.ones(160), 16000), utterance)


def write_wav(path: Path, seconds: float = 0.1, rate: int = 16000, value: float = 0.25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * rate), value, dtype=np.float32), rate)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "features"


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(1, 4), (7, 3), (12, 4), (5, 1), (16, 16), (33, 16)])
@pytest.mark.parametrize("seed", [0, 5])
def test_every_item_once_per_epoch(n: int, size: int, seed: int) -> None:
    lengths = torch.randint(1, 99, (n,)).tolist()
    batches = Batches(lengths, size, seed)
    per_epoch = -(-n // size)
    assert batches.per_epoch == per_epoch
    for epoch in range(3):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        seen = [batches(step) for step in steps]
        assert sorted(i for batch in seen for i in batch) == list(range(n))
        sizes = sorted(len(batch) for batch in seen)
        assert sizes[1:] == [min(size, n)] * (per_epoch - 1)  # one may be smaller
        assert sizes[0] == n - min(size, n) * (per_epoch - 1)


def test_batches_follow_from_seed_and_step_in_any_order() -> None:
    lengths = list(range(1, 41))
    a, b = Batches(lengths, 4, seed=3), Batches(lengths, 4, seed=3)
    forward = [a(step) for step in range(1, 31)]
    torch.manual_seed(7)  # the global generator has no say
    assert [b(step) for step in range(30, 0, -1)] == forward[::-1]
    assert forward[:10] != forward[10:20]  # epochs differ
    assert forward != [Batches(lengths, 4, seed=4)(step) for step in range(1, 31)]


def test_similar_lengths_lie_together_but_not_in_order() -> None:
    lengths = torch.randperm(400, generator=torch.Generator().manual_seed(0)) + 100
    batches = Batches(lengths.tolist(), 8, seed=0)
    rows = [lengths[batches(step)].float() for step in range(1, 51)]
    spread = torch.stack([row.max() / row.min() for row in rows])
    assert spread.mean() < 1.25
    means = torch.stack([row.mean() for row in rows])
    assert means.diff().sign().sum().abs() < 25  # neither rising nor falling


@pytest.mark.parametrize(("lengths", "size"), [([], 4), ([5, 6], 0)])
def test_nothing_to_train_on(lengths: list[int], size: int) -> None:
    message = f"{len(lengths)} utterances in batches of {size}: nothing to train on"
    with pytest.raises(ValueError, match=message):
        Batches(lengths, size, seed=0)


# --- batches by frames ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "frames"), [(1, 400), (300, 2000), (300, 50)])
def test_every_item_once_per_epoch_within_the_budget(n: int, frames: int) -> None:
    lengths = torch.randint(30, 700, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    batches = FrameBatches(lengths, frames, seed=1)
    epochs = [
        [batches(e * batches.per_epoch + i + 1) for i in range(batches.per_epoch)] for e in (0, 1)
    ]
    assert epochs[0] != epochs[1] or n == 1
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(n))
        for batch in epoch:
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= frames
            assert min(lengths[i] for i in batch) >= longest / 1.11 - 1  # little padding


def test_batches_by_frames_follow_from_seed_and_step_in_any_order() -> None:
    lengths = torch.arange(20, 220)
    a, b = FrameBatches(lengths, 900, seed=3), FrameBatches(lengths, 900, seed=3)
    forward = [a(step) for step in range(1, 131)]
    assert [b(step) for step in range(130, 0, -1)] == forward[::-1]
    assert forward[0] != FrameBatches(lengths, 900, seed=4)(1)
    means = torch.tensor([float(lengths[row].float().mean()) for row in forward[:20]])
    assert means.diff().sign().sum().abs() < 15  # neither rising nor falling


def test_few_shapes() -> None:
    lengths = torch.randint(100, 3000, (5000,))
    batches = FrameBatches(lengths, 6000, seed=0)
    assert len(batches.buckets) < 40


@pytest.mark.parametrize(("lengths", "frames"), [([], 100), ([5], 0)])
def test_no_frames_to_train_on(lengths: list[int], frames: int) -> None:
    with pytest.raises(ValueError, match=f"in batches of {frames} frames: nothing to train on"):
        FrameBatches(lengths, frames, seed=0)


def test_padding_to_a_multiple() -> None:
    x, lengths = pad([torch.ones(3, 2), torch.ones(5, 2)], -1, multiple=4)
    assert x.shape == (2, 8, 2)
    assert lengths.tolist() == [3, 5]
    assert (x[1, 5:] == -1).all()
    assert pad([torch.ones(8)], multiple=4)[0].shape == (1, 8)


def test_pad_and_keep_mask() -> None:
    parts = [torch.arange(2.0).view(1, 2), torch.ones(3, 2), torch.zeros(0, 2)]
    x, lengths = pad(parts, -7)
    assert x.shape == (3, 3, 2)
    assert lengths.tolist() == [1, 3, 0]
    keep = keep_mask(lengths)
    assert keep.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    assert (x[~keep] == -7).all()
    assert all(torch.equal(row[k], part) for row, k, part in zip(x, keep, parts, strict=True))
    assert keep_mask(lengths, 5).shape == (3, 5)
    ids, _ = pad([torch.tensor([3]), torch.tensor([4, 5])], -1)
    assert ids.tolist() == [[3, -1], [4, 5]]
    assert ids.dtype == torch.int64


# --- features on disk ----------------------------------------------------------------------------

LENGTHS = [3, 0, 2, 5]


def compute(item: Item) -> dict[str, Tensor]:
    n, i = LENGTHS[int(item.key)], int(item.key)
    return {
        "mel": (torch.arange(2 * n).view(2, n) + 100 * i).T.half(),  # (F, 2), not contiguous
        "units": torch.arange(n + 1, dtype=torch.int16),
    }


ITEMS = [item(str(i)) for i in range(len(LENGTHS))]


def test_prepare_gives_back_what_was_computed() -> None:
    for store in (prepare(ITEMS, compute, "a"), prepare(ITEMS, compute, "a")):  # new, then read
        assert len(store) == 4
        assert store.lengths("mel") == LENGTHS
        assert store.lengths("units") == [n + 1 for n in LENGTHS]
        for i, one in enumerate(ITEMS):
            for name, want in compute(one).items():
                got = store.get(name, i)
                assert torch.equal(got, want)
                assert got.dtype == want.dtype


@pytest.mark.parametrize("n", [1, 2])
def test_one_item_and_an_empty_one(n: int) -> None:
    store = prepare(ITEMS[:n], compute, f"few {n}")
    assert [store.get("mel", i).shape for i in range(n)] == [(3, 2), (0, 2)][:n]


def test_computed_once_per_tag(cache: Path) -> None:
    calls: list[str] = []

    def counted(item: Item) -> dict[str, Tensor]:
        calls.append(item.key)
        return compute(item)

    for tag in ("a", "a", "b", "a"):
        prepare(ITEMS, counted, tag)
    assert calls == ["0", "1", "2", "3"] * 2
    assert sorted((folder / "tag.txt").read_text() for folder in cache.iterdir()) == ["a\n", "b\n"]


def test_features_are_complete_or_absent(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(item: Item) -> dict[str, Tensor]:
        if item.key == "2":
            raise InterruptedError("killed")
        return compute(item)

    with pytest.raises(InterruptedError):
        prepare(ITEMS, fails, "a")
    with monkeypatch.context() as patch:
        patch.setattr("data.os.replace", lambda *_: fails(ITEMS[2]))
        with pytest.raises(InterruptedError):
            prepare(ITEMS, compute, "a")
    assert all(folder.name.startswith(".partial_") for folder in cache.iterdir())
    assert prepare(ITEMS, compute, "a").lengths("mel") == LENGTHS


def test_two_processes_that_prepare_the_same(cache: Path) -> None:
    def slow(item: Item) -> dict[str, Tensor]:
        prepare(ITEMS, compute, "a")  # the other one is done before us
        return compute(item)

    assert prepare(ITEMS, slow, "a").lengths("mel") == LENGTHS
    assert len([*cache.iterdir()]) == 1


def test_ragged_maps_the_file_into_memory(cache: Path) -> None:
    prepare(ITEMS, compute, "a")
    store = Ragged(next(cache.iterdir()))
    assert store.names == ["mel", "units"]
    first, last = (store.get("mel", i).untyped_storage() for i in (0, 3))
    assert first.data_ptr() == last.data_ptr()  # views of the mapped file: nothing was copied


def test_digest_names_what_is_said_by_whom() -> None:
    items = [item("0"), item("1")]
    same = [item("0"), item("1")]
    assert data.digest(items) == data.digest(same)
    spoken = item("1", synth.Utterance("she sings."))
    others = [items[::-1], items[:1], [item("0"), item("2")], [item("0"), spoken]]
    assert len({data.digest(x) for x in [items, *others]}) == 5


# --- where utterances come from ------------------------------------------------------------------


def librispeech(root: Path, suffix: str = ".flac") -> None:
    for chapter, texts in (("19-198", ["HELLO THERE", "ONE  TWO"]), ("26-495", ["GO ON"])):
        folder = root / chapter.replace("-", "/")
        lines = [f"{chapter}-{i:04d} {text}" for i, text in enumerate(texts)]
        for i in range(len(texts)):
            write_wav(folder / f"{chapter}-{i:04d}{suffix}", 0.1 * (i + 1))
        (folder / f"{chapter}.trans.txt").write_text("\n".join(lines) + "\n \n")


@pytest.mark.parametrize("suffix", [".flac", ".wav"])
def test_librispeech(tmp_path: Path, suffix: str) -> None:
    librispeech(tmp_path / "dev", suffix)
    items = data.librispeech(tmp_path)
    assert [x.key for x in items] == ["19-198-0000", "19-198-0001", "26-495-0000"]
    assert [x.text for x in items] == ["hello there", "one  two", "go on"]
    assert [x.speaker for x in items] == ["19", "19", "26"]
    assert [len(x.wav(16000)) for x in items] == [1600, 3200, 1600]
    assert items[1].wav(22050).shape == (4410,)
    assert items[1].wav(16000).dtype == torch.float32


def test_librispeech_without_audio_or_transcripts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.trans\.txt below it; wanted a Libri"):
        data.librispeech(tmp_path)
    librispeech(tmp_path)
    (tmp_path / "19/198/19-198-0001.flac").unlink()
    with pytest.raises(FileNotFoundError, match=r"19-198\.trans\.txt: names 19-198-0001, but no"):
        data.librispeech(tmp_path)


ROWS = [
    {"audio": "a.wav", "text": " Hello there ", "speaker": "bob", "key": "first"},
    {"audio": "sub/b.flac", "text": "caf\u00e9 two"},
]


def as_jsonl(path: Path) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def as_tsv(path: Path) -> Path:
    path = path.with_suffix(".tsv")
    lines = [
        "audio\ttext\tspeaker\tkey",
        "a.wav\t Hello there \tbob\tfirst",
        "sub/b.flac\tcaf\u00e9 two",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("write", [as_jsonl, as_tsv])
def test_manifest(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write_wav(tmp_path / "a.wav")
    write_wav(tmp_path / "sub/b.flac", rate=8000, value=0.5)
    first, second = data.manifest(write(tmp_path / "list"))
    assert (first.key, first.text, first.speaker) == ("first", "Hello there", "bob")
    assert (second.key, second.text, second.speaker) == ("b", "caf\u00e9 two", "unknown")
    assert second.wav(8000).shape == (800,)
    assert second.wav(16000).shape == (1600,)
    torch.testing.assert_close(first.wav(16000), torch.full((1600,), 0.25))


@pytest.mark.parametrize("write", [as_jsonl, as_tsv])
def test_manifest_names_the_missing_file(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write_wav(tmp_path / "a.wav")
    with pytest.raises(FileNotFoundError, match=r"list\.\w+: entry 2 names .*sub/b\.flac, which"):
        data.manifest(write(tmp_path / "list"))
    with pytest.raises(FileNotFoundError, match=r"none\.tsv: no such manifest"):
        data.manifest(tmp_path / "none.tsv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", r"a\.tsv: empty; wanted one utterance a line"),
        ("a.jsonl", "\n \n", r"a\.jsonl: empty; wanted one utterance a line"),
        ("a.tsv", "audio\ttext\n", r"a\.tsv: empty; wanted one utterance a line"),
        ("a.tsv", "path\ttext\nb.wav\thi\n", r"entry 1 has \['path', 'text'\]; wanted audio and"),
        ("a.tsv", "audio\ttext\nb.wav\t\n", r"entry 1 has .*; wanted audio and text"),
        ("a.jsonl", '{"text": "hi"}', r"entry 1 has \['text'\]; wanted audio and text"),
        ("a.jsonl", "nonsense", r"a\.jsonl: entry 1 is not a JSON object"),
        ("a.jsonl", '{"audio": "b.wav", "text": "hi"}\n[3]', r"entry 2 is not a JSON object"),
        ("a.jsonl", '{"audio": 3, "text": "hi"}', r"entry 1 has .*; wanted audio and text"),
    ],
)
def test_bad_manifests(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_wav(tmp_path / "b.wav")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        data.manifest(tmp_path / name)


def test_builtin_items_read_the_corpus() -> None:
    said = synth.Utterance("she sings.", split="dev", offset=10, length=200)
    corpus = synth.Corpus([said], np.arange(300, dtype=np.int16))
    (got,) = data.builtin(corpus, "dev")
    assert (got.key, got.text, got.speaker) == ("dev-00000", "she sings.", said.voice)
    assert got.truth is said
    assert torch.equal(got.wav(synth.SAMPLE_RATE), corpus.audio(said))


# --- word times ----------------------------------------------------------------------------------


def test_word_spans_cover_each_word_and_a_frame_on_either_side() -> None:
    said = synth.Utterance("she sings.", starts_s=(0.0, 0.4), ends_s=(0.2, 0.8))
    spans = data.word_spans(said, [0, 1, 1], 30)  # frames of 40 ms, centred at 20, 60, .. ms
    assert spans.shape == (3, 30)
    assert spans[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert spans[1].nonzero().flatten().tolist() == list(range(9, 21))
    assert torch.equal(spans[1], spans[2])


def test_items_without_word_times_say_so() -> None:
    with pytest.raises(ValueError, match="k7: its word times are unknown; use the built-in corpus"):
        _ = item("k7").truth


def test_libritts(tmp_path: Path) -> None:
    folder = tmp_path / "19" / "198"
    for key in ("19_198_000001_000000", "19_198_000002_000000"):
        write_wav(folder / f"{key}.wav", rate=24000)
        (folder / f"{key}.normalized.txt").write_text("It is so.\n")
        (folder / f"{key}.original.txt").write_text("It is so\n")
    found = data.libritts(tmp_path)
    assert [(item.key, item.text, item.speaker) for item in found] == [
        ("19_198_000001_000000", "It is so.", "19"), ("19_198_000002_000000", "It is so.", "19")
    ]  # fmt: skip
    assert found[0].wav(16000).shape == (1600,)
    with pytest.raises(FileNotFoundError, match="wanted a LibriTTS folder"):
        data.libritts(tmp_path / "none")


def test_missing_audio_may_wait_until_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "1-1.trans.txt").write_text("1-1-0001 A DOG\n")
    (tmp_path / "all.tsv").write_text("audio\ttext\nnone.wav\ta dog\n")
    for found in (data.librispeech(tmp_path, strict=False),
                  data.manifest(tmp_path / "all.tsv", strict=False)):  # fmt: skip
        with pytest.raises(FileNotFoundError, match="no such audio file"):
            found[0].wav(16000)
