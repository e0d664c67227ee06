"""A page to listen to and look at: one folder, opened from the file system, without scripts.

    items --original, S3 units, each tokenizer--> players, what was heard, log-mels
          --layer_report--> attention maps, layer weights     --token_swap--> mixtures, swap matrix
    OUT/*.md of earlier parts --> tables        all --> DIR/index.html, audio/, pictures/

Everything works by keyboard: players and links are the browser's own, wide tables scroll with the
arrow keys once they have the focus. Every picture has its content as text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import audio
import layer_report
import token_swap
from common import progress
from data import Item
from pipeline import RATE, Pipeline, transcribe
from weights import write_atomic

DPI = 80
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem; }
a:focus-visible, audio:focus-visible, .wide:focus-visible { outline: 3px solid #1a73e8; }
.skip { position: absolute; left: -99rem; } .skip:focus { left: 1rem; top: 1rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0; }
.grid { display: grid; align-items: start; gap: 1rem; margin: .5rem 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.large { grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
figure > * { max-width: 100%; } audio { width: 100%; } img { height: auto; background: #fff; }
figcaption { margin-bottom: .5rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .5rem 0; }
td { font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th:first-child { text-align: left; } thead th { background: var(--soft); vertical-align: bottom; }
"""


class Page:
    """HTML that grows, and the files beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parts, self.links = folder, list[str](), dict[str, str]()
        for name in ("audio", "pictures"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def section(self, anchor: str, title: str, said: str = "") -> None:
        self.links[anchor] = title
        self.parts.append(f'<h2 id="{anchor}">{escape(title)}</h2>')
        if said:
            self.parts.append(f"<p>{escape(said)}</p>")

    def picture(self, figure: Figure, name: str, alt: str) -> str:
        figure.savefig(self.folder / "pictures" / f"{name}.png", dpi=DPI)
        width, height = (round(DPI * float(x)) for x in figure.get_size_inches())
        return (f'<img src="pictures/{name}.png" alt="{escape(alt)}" width="{width}" '
                f'height="{height}" loading="lazy">')  # fmt: skip

    def player(self, wav: Tensor, name: str, label: str) -> str:
        """wav (S,) at 22.05 kHz"""
        audio.write(self.folder / "audio" / f"{name}.wav", wav, audio.VOCODER_RATE)
        return (f'<audio controls preload="metadata" src="audio/{name}.wav" '
                f'aria-label="{escape(label)}"></audio>')  # fmt: skip

    def grid(self, figures: Iterable[tuple[str, str]], kind: str = "") -> None:
        """Captions with what stands below them. kind: "large" for pictures with small print."""
        cells = (f"<figure><figcaption>{escape(c)}</figcaption>{x}</figure>" for c, x in figures)
        self.parts.append(f'<div class="grid {kind}">{"".join(cells)}</div>')

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> None:
        """The first cell of each row names it."""
        heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        lines = (
            f'<tr><th scope="row">{escape(first)}</th>' + "".join(map(cell, rest)) + "</tr>"
            for first, *rest in rows
        )
        name = escape(caption)
        self.parts.append(
            f'<h3>{name}</h3><div class="wide" role="region" tabindex="0" aria-label="{name}">'
            f'<table aria-label="{name}"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    def write(self, title: str, intro: str) -> Path:
        """DIR/index.html, completely or not at all."""
        links = "".join(f'<li><a href="#{a}">{escape(t)}</a></li>' for a, t in self.links.items())
        body = "\n".join(self.parts)
        text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><a class="skip" href="#main">Skip to the content</a>
<header><h1>{escape(title)}</h1><p>{escape(intro)}</p></header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="main">
{body}
</main></body></html>
"""
        write_atomic(self.folder / "index.html", text.encode())
        return self.folder / "index.html"


def cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def mel_picture(wav: Tensor) -> Figure:
    """wav (S,) at 22.05 kHz"""
    figure = Figure(figsize=(4, 1.4), layout="constrained")
    axis, mel = figure.subplots(), audio.vocoder_mel(wav)
    extent = (0, len(wav) / audio.VOCODER_RATE, 0, 1)
    axis.imshow(mel.numpy(), aspect="auto", origin="lower", extent=extent, vmin=-11.5, vmax=1)
    axis.set(yticks=[], xlabel="s")
    return figure


def same_draws(pipeline: Pipeline) -> torch.Generator:
    torch.manual_seed(0)  # of HiFT's phases
    return torch.Generator(pipeline.device).manual_seed(0)


def sounds(item: Item, pipelines: Mapping[str, Pipeline]) -> dict[str, Tensor]:
    """One utterance by every system -> wavs (S,) at 22.05 kHz."""
    wav, first = item.wav(RATE), next(iter(pipelines.values()))
    found = first.frontend.features(wav)
    units = first.vocoder(found["units"], found["voice"][0], same_draws(first)).cpu()
    out = {"original": item.wav(audio.VOCODER_RATE), "S3 units": units}
    for name, pipeline in pipelines.items():
        speech = pipeline.encode(wav, item.text)
        if name == "text only":
            speech = replace(speech, codes=None)
        out[name] = pipeline.speak(speech, same_draws(pipeline))[0]
    return out


def utterance(page: Page, item: Item, pipelines: Mapping[str, Pipeline]) -> None:
    """Players, what is heard, mels, and what each tokenizer with codes looked at."""
    page.section(item.key, f"{item.key}: {item.text}", f"voice {item.speaker}")
    said, first = sounds(item, pipelines), next(iter(pipelines.values()))
    at_16k = [audio.resample(wav, audio.VOCODER_RATE, RATE) for wav in said.values()]
    cells = []
    for (name, wav), heard in zip(said.items(), transcribe(first.frontend, at_16k), strict=True):
        seconds, file = f"{len(wav) / audio.VOCODER_RATE:.2f} s", f"{item.key}_{slug(name)}"
        alt = f"log-mel spectrogram of {name}, {seconds}"
        media = page.player(wav, file, f"{name}: {item.text}")
        cells.append((f"{name}, {seconds}. Heard: {heard or 'nothing'}",
                      media + page.picture(mel_picture(wav), file, alt)))  # fmt: skip
    page.grid(cells)
    looks = []
    for name, pipeline in pipelines.items():
        if name == "text only":
            continue
        one = layer_report.hear(pipeline, item.wav(RATE), item.text.split())
        mass = layer_report.attention_figures([one], [item])["mass in the word"][0]
        file, layers = f"{item.key}_{slug(name)}", pipeline.tokenizer.config.aggregator.value_layers
        alt = f"attention of each word over time; {mass:.0%} lies inside the word's true times"
        picture = layer_report.attention_map(one, item)
        looks.append((f"{name}: {alt}", page.picture(picture, f"{file}_attention", alt)))
        if one.weights is not None:
            means = zip(layers, one.weights.mean(1).tolist(), strict=True)
            alt = "layer weights over time; means " + ", ".join(f"{k}: {w:.2f}" for k, w in means)
            picture = layer_report.dynamics(one, item, layers)
            looks.append((f"{name}: {alt}", page.picture(picture, f"{file}_layers", alt)))
    page.grid(looks, "large")


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def swaps(page: Page, name: str, pipeline: Pipeline, trial: token_swap.Trial) -> None:
    """The four mixtures of one word, and how long each word gets when each is swapped."""
    words, at = trial.a.text.split(), trial.word
    page.section(f"swap_{slug(name)}", f"Token swap, {name}",
                 f"Two readings of: {trial.a.text} What is exchanged is the code of word "
                 f"{at + 1}, {words[at]!r}.")  # fmt: skip
    a, b = (pipeline.encode(wav, trial.a.text) for wav in (trial.wav_a, trial.wav_b))
    cells = []
    for kind, wav in (("recording of A", trial.wav_a), ("recording of B", trial.wav_b)):
        file, loud = f"swap_{slug(kind)}", audio.resample(wav, RATE, audio.VOCODER_RATE)
        cells.append((kind, page.player(loud, file, kind)))
    labels = {"a": "A, its codes", "a_with_b": f"A, code of B in {words[at]!r}",
              "b": "B, its codes", "b_with_a": f"B, code of A in {words[at]!r}"}  # fmt: skip
    for kind, speech in token_swap.mixtures(a, b, at + 1, at + 1).items():
        wav, _ = pipeline.speak(speech, same_draws(pipeline))
        file = f"swap_{slug(name)}_{kind}"
        cells.append((labels[kind], page.player(wav, file, labels[kind])))
    page.grid(cells)
    found, true = token_swap.matrix(pipeline, trial)
    rows = [
        [f"{word} swapped", *(f"{1000 * x:+.0f}" for x in row.tolist())]
        for word, row in zip(words, found, strict=True)
    ]
    rows.append(["true change, B less A", *(f"{1000 * x:+.0f}" for x in true.tolist())])
    title = f"Swap matrix, {name}: how much longer each word gets, in ms"
    page.table(["", *words], rows, title)


def reports(page: Page, folder: Path) -> None:
    """The tables of all *.md in a folder of evaluate.py."""
    for file in sorted(folder.glob("*.md")):
        page.section(f"table_{slug(file.stem)}", f"Table: {file.stem}")
        for block in re.split(r"\n\s*\n", file.read_text()):
            lines = [line for line in block.splitlines() if line.strip()]
            if len(lines) > 2 and lines[0].startswith("|"):
                head, _, *body = [[x.strip() for x in line[1:-1].split("|")] for line in lines]
                page.table(head, body, head[0])
            else:
                page.parts += [f"<p>{escape(line)}</p>" for line in lines]


def write_page(
    folder: Path, pipelines: Mapping[str, Pipeline], items: Sequence[Item], shown: int, tables: Path
) -> Path:
    """pipelines by name, at least one; the first `shown` items; folder of reports
    -> DIR/index.html"""
    page, chosen = Page(folder), items[:shown]
    (trial,) = token_swap.trials(items, 1)
    for item in progress("page", chosen):
        utterance(page, item, pipelines)
    for name, pipeline in pipelines.items():
        if name != "text only":
            swaps(page, name, pipeline, trial)
    reports(page, tables)
    return page.write(
        "nanoTASTE: listen and look",
        f"{len(chosen)} held-out sentences of the built-in corpus: the original, its S3 units "
        "spoken again (what any tokenizer can reach), and each tokenizer through its codes, drawn "
        "with the same random numbers everywhere. What is heard is transcribed by the "
        "bundle's own recognizer.",
    )
