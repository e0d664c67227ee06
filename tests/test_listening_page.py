"""listening_page.py and evaluate.py --html: a page that needs nothing but its own folder."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import soundfile
from conftest import HEARD

import common
import evaluate
from listening_page import Page, reports, slug

PLAIN = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Tags with their attributes, and whether they were closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words = list[tuple[str, dict]](), list[str](), list[str]()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in PLAIN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def folder(
    tiny_bundle: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "copy.md").write_text("| copy | WER |\n| --- | --- |\n| HiFT <1> | 3.1 ± 0.7 % |\n")
    flags = ["--html", tmp_path / "page", "--bundle", tiny_bundle, "--out", tables, "--shown", 2]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--threads", "1"])
    common.run(evaluate.main)
    return tmp_path / "page"


def test_the_page(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = Reader(text)
    assert "script" not in {name for name, _ in page.tags}
    assert "://" not in text  # nothing comes from elsewhere
    for tag in ("audio", "img"):
        for attrs in page.all(tag):
            assert (folder / attrs["src"]).stat().st_size > 0
            assert attrs["aria-label" if tag == "audio" else "alt"]
    players = page.all("audio")
    assert len(players) == 2 * 5 + 2 * 6  # 2 utterances by 5 systems; 2 tokenizers, 6 mixtures
    assert all("controls" in attrs for attrs in players)
    assert soundfile.info(folder / players[0]["src"]).subtype == "PCM_16"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len({*ids})
    links = [attrs["href"] for attrs in page.all("a")]
    assert {link.removeprefix("#") for link in links} == {*ids}
    for attrs in page.all("div"):
        assert attrs["class"] != "wide" or (attrs["tabindex"] == "0" and attrs["aria-label"])
    said = " ".join(page.words)
    assert f"Heard: {HEARD}" in said
    assert "HiFT <1>" in said
    assert "true change, B less A" in said
    assert page.all("html") == [{"lang": "en"}]


def test_reports_keep_every_cell(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(
        "| part | a | b |\n| --- | --- | --- |\n| one |  | 1 |\n| two | 2 |  |\n\n* a note\n"
    )
    page = Page(tmp_path / "page")
    reports(page, tmp_path)
    (table, note) = page.parts[1:]
    assert table.count("<td>") == 4
    assert "<td></td><td>1</td>" in table
    assert note == "<p>* a note</p>"


def test_names_of_files_are_plain() -> None:
    assert slug("S3 units") == "s3_units"
    assert slug("text only") == "text_only"
