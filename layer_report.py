"""What MLDA mixes and where the aggregator looks: figures and pictures like the paper's 2 to 4.

    wav, words --encoder, aggregator--> layer weights w (S, T), attention of each word (W, T)
    F_t = |m_t - m_{t-1}|_2     spectral flux of mel magnitudes, mean over the frame of the encoder
    H_t = - sum_l w_l log w_l   ENL = exp(mean H), the effective number of layers
    mass = attention inside the true times of the word; centre error = |its mean time - the middle|

Attention: heads of the last block and tokens of a word averaged. A frame is inside a word if they
overlap. `flat` is what attention that looks everywhere alike would have.
Flux and weights are correlated over all frames, and over means of utterances as in figure 2.
[TASLA, Hsu et al. 2025, arXiv:2510.14934, sec. 6.2 and appendix D]
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from aggregator import members
from common import progress
from data import UNIT_S, Item
from metrics import Figures, correlation, mean_and_error
from pipeline import Pipeline, mels

PAPER = {  # weight and correlation of w_0 .. w_3 with the flux; H and ENL
    "mean weight": (0.573, 0.325, 0.100, 0.0017), "flux r": (-0.116, 0.464, -0.379, -0.183),
}  # fmt: skip
SHOWN, DPI = 4, 90  # utterances that get pictures; of the pictures
PAPER_ENTROPY, PAPER_LAYERS = 0.484, 1.62


class Heard(NamedTuple):
    """One utterance as the tokenizer heard it."""

    mel: Tensor  # (M, F) log10, as Whisper's front-end scales it
    flux: Tensor  # (T,), the first is 0
    attention: Tensor  # (W, T), rows sum to 1
    weights: Tensor | None  # (S, T), columns sum to 1; None without MLDA


@torch.inference_mode()
def hear(pipeline: Pipeline, wav: Tensor, words: list[str]) -> Heard:
    """wav (S,) at 16 kHz, at most pipeline.WINDOW_S long, and its words."""
    mel, keep = mels(pipeline.frontend, [wav])
    layers = pipeline.tokenizer.config.aggregator.value_layers
    last, taps, frame_keep = pipeline.frontend.hear(mel, keep, layers)
    ids, word_ids = pipeline.ids([words])
    _, _, maps = pipeline.tokenizer.words(ids, word_ids, last, taps, frame_keep)
    assert maps is not None  # need_maps is given
    tokens = maps.frames[0, -1].mean(0)  # (N, T)
    member = members(word_ids, len(words))[0].to(tokens.dtype)  # (W, N)
    attention = member @ tokens / member.sum(1, keepdim=True)  # (W, T)
    flux = spectral_flux(mel[0], attention.shape[1])
    weights = None if maps.layers is None else maps.layers[0].cpu()
    return Heard(mel[0].cpu(), flux.cpu(), attention.cpu(), weights)


def spectral_flux(mel: Tensor, frames: int) -> Tensor:
    """mel (M, F) of Whisper's front-end -> (frames,): mean of F_t over each encoder frame."""
    magnitude = 10 ** (2 * mel - 2)  # undoes (log10 power + 4) / 4, and takes the root
    flux = magnitude.diff(dim=1, prepend=magnitude[:, :1]).norm(dim=0)  # (F,)
    stride = -(-len(flux) // frames)
    padded = torch.nn.functional.pad(flux, (0, frames * stride - len(flux)), value=math.nan)
    return padded.view(frames, stride).nanmean(1)


def inside(item: Item, frames: int) -> Tensor:
    """(W, frames) bool: encoder frames that overlap the word."""
    edges = torch.arange(frames + 1, dtype=torch.double) / round(1 / UNIT_S)
    times = torch.tensor([item.truth.starts_s, item.truth.ends_s], dtype=torch.double)
    starts, ends = times[..., None]  # (W, 1) each
    return (edges[1:] > starts) & (edges[:-1] < ends)


def attention_figures(heard: Sequence[Heard], items: Sequence[Item]) -> Figures:
    """Against true word times; each utterance counts once."""
    mass, flat, error = [], [], []
    for one, item in zip(heard, items, strict=True):
        T = one.attention.shape[1]
        spans, truth = inside(item, T), item.truth  # (W, T)
        mass.append(float((one.attention * spans).sum(1).mean()))
        flat.append(float(spans.double().mean()))
        centre = one.attention @ ((torch.arange(T) + 0.5) * UNIT_S)  # (W,)
        middle = (torch.tensor(truth.starts_s) + torch.tensor(truth.ends_s)) / 2
        error.append(1000 * float((centre - middle).abs().mean()))
    rows = {"mass in the word": mass, "flat": flat, "centre error, ms": error}
    return {name: mean_and_error(values) for name, values in rows.items()}


def layer_figures(heard: Sequence[Heard], layers: Sequence[int]) -> dict[str, Figures]:
    """ "all layers": H in nats and ENL; for each value layer its mean weight and correlations.

    Standard errors over utterances. ValueError without MLDA."""
    known = [one.weights for one in heard if one.weights is not None]
    if len(known) < len(heard) or not known:
        raise ValueError("this tokenizer has one value layer: there are no weights to report")
    entropy = [float(-(w * w.clamp(min=1e-12).log()).sum(0).mean()) for w in known]
    h, h_error = mean_and_error(entropy)
    out: dict[str, Figures] = {
        "all layers": {"H": (h, h_error), "ENL": (math.exp(h), math.exp(h) * h_error)}
    }
    flux = torch.cat([one.flux[1:] for one in heard])
    weights = torch.cat([w[:, 1:] for w in known], 1)  # (S, all T)
    means = utterance_means(heard)  # (n, 1 + S)
    for s, layer in enumerate(layers):
        out[f"layer {layer}"] = {
            "mean weight": mean_and_error([float(w[s].mean()) for w in known]),
            "flux r": (correlation(weights[s], flux), math.nan),
            "flux r, utterances": (correlation(means[:, 1 + s], means[:, 0]), math.nan),
        }
    return out


def utterance_means(heard: Sequence[Heard]) -> Tensor:
    """(n, 1 + S): mean flux, then the mean weight of each layer."""
    rows = [torch.cat([one.flux[1:].mean()[None], one.weights.mean(1)])
            for one in heard if one.weights is not None]  # fmt: skip
    return torch.stack(rows).double()


def paper_figures() -> dict[str, Figures]:
    out: dict[str, Figures] = {
        "paper, all layers": {"H": (PAPER_ENTROPY, math.nan), "ENL": (PAPER_LAYERS, math.nan)}
    }
    for i, layer in enumerate((8, 16, 24, 32)):
        out[f"paper, layer {layer}"] = {k: (v[i], math.nan) for k, v in PAPER.items()}
    return out


def measure(
    pipeline: Pipeline, wavs: Sequence[Tensor], items: Sequence[Item], out: Path
) -> dict[str, Figures]:
    """wavs (S,) at 16 kHz of items -> rows: "" for attention and, with MLDA, one for each layer.
    Pictures go to `out`."""
    pairs = list(zip(wavs, items, strict=True))
    heard = [hear(pipeline, wav, i.text.split()) for wav, i in progress("layers", pairs)]
    rows = {"": attention_figures(heard, items)}
    layers = pipeline.tokenizer.config.aggregator.value_layers
    if len(layers) > 1:
        rows |= {f", {row}": found for row, found in layer_figures(heard, layers).items()}
    save(heard, items, layers, out)
    return rows


# --- pictures ------------------------------------------------------------------------------------


def scatter(heard: Sequence[Heard], layers: Sequence[int]) -> Figure:
    """Figure 2: mean weight over mean flux, one point an utterance, with its regression line."""
    means = utterance_means(heard)
    figure = Figure(figsize=(3 * len(layers), 3), layout="constrained")
    for s, (axis, layer) in enumerate(
        zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True)
    ):
        x, y = means[:, 0], means[:, 1 + s]
        spread = x - x.mean()
        slope = float(spread @ y) / max(float(spread @ spread), 1e-12)
        axis.scatter(x.numpy(), y.numpy(), s=8)
        axis.plot(x.numpy(), (y.mean() + slope * spread).numpy(), color="tab:red")
        axis.set(title=f"layer {layer}, r = {correlation(y, x):.2f}", xlabel="mean spectral flux")
    figure.axes[0].set_ylabel("mean weight")
    return figure


def accuracies(log: Path) -> list[tuple[int, float]]:
    """log.jsonl of a training -> (step, share of units right)"""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [(row["step"], row["accuracy"]) for row in rows if "accuracy" in row]


def curves(logs: Mapping[str, Path]) -> Figure:
    """Figure 3: share of S3 units predicted right in training, from log.jsonl of each run."""
    figure = Figure(figsize=(6, max(3.5, 1 + 0.25 * len(logs))), layout="constrained")
    axis = figure.subplots()
    for name, log in logs.items():
        axis.plot(*zip(*accuracies(log), strict=True), label=name)
    axis.set(xlabel="step", ylabel="S3 units right")
    axis.legend()
    return figure


def dynamics(heard: Heard, item: Item, layers: Sequence[int]) -> Figure:
    """Figure 4: log-mel, spectral flux and layer weights over time; lines where words begin."""
    rows = 2 if heard.weights is None else 3
    figure = Figure(figsize=(5.2, 1.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    seconds = len(heard.flux) * UNIT_S
    axes[0].imshow(heard.mel.numpy(), aspect="auto", origin="lower", extent=(0, seconds, 0, 1))
    axes[0].set(yticks=[], ylabel="log-mel")
    time = ((torch.arange(len(heard.flux)) + 0.5) * UNIT_S).numpy()
    axes[1].plot(time, heard.flux.numpy())
    axes[1].set_ylabel("flux")
    if heard.weights is not None:
        for layer, row in zip(layers, heard.weights, strict=True):
            axes[2].plot(time, row.numpy(), label=f"layer {layer}")
        axes[2].set(ylabel="weight", ylim=(0, 1))
        figure.legend(loc="outside lower center", ncols=len(layers), fontsize="small")
    axes[-1].set_xlabel("s")
    for start, word in zip(item.truth.starts_s, item.text.split(), strict=True):
        for axis in axes:
            axis.axvline(start, color="gray", linewidth=0.5)
        axes[0].text(start, 1.04, word, fontsize="small")
    return figure


def attention_map(heard: Heard, item: Item) -> Figure:
    """Where each word looks (rows) over time, its true times as a frame."""
    W, T = heard.attention.shape
    figure = Figure(figsize=(5.2, 0.6 + 0.25 * W), layout="constrained")
    axis = figure.subplots()
    extent = (0, T * UNIT_S, W - 0.5, -0.5)
    axis.imshow(heard.attention.numpy(), aspect="auto", cmap="Blues", extent=extent)
    for w, (start, end) in enumerate(zip(item.truth.starts_s, item.truth.ends_s, strict=True)):
        sides = (
            (start, start, end, end, start),
            (w - 0.45, w + 0.45, w + 0.45, w - 0.45, w - 0.45),
        )
        axis.plot(*sides, color="tab:red", linewidth=0.8)
    axis.set(yticks=range(W), yticklabels=item.text.split(), xlabel="s")
    return figure


def save(heard: Sequence[Heard], items: Sequence[Item], layers: Sequence[int], out: Path) -> None:
    """Figures 2 and 4 and attention maps, the latter two of the first SHOWN utterances."""
    out.mkdir(parents=True, exist_ok=True)
    if len(layers) > 1:
        scatter(heard, layers).savefig(out / "layers_and_flux.png", dpi=DPI)
    for one, item in list(zip(heard, items, strict=True))[:SHOWN]:
        dynamics(one, item, layers).savefig(out / f"{item.key}.png", dpi=DPI)
        attention_map(one, item).savefig(out / f"{item.key}_attention.png", dpi=DPI)


def save_curves(runs: Path, out: Path) -> None:
    """Figure 3 of all runs/NAME/log.jsonl; those without accuracy are named, not silently lost."""
    logs = {log.parent.name: log for log in sorted(runs.glob("*/log.jsonl"))}
    for name in [name for name, log in logs.items() if not accuracies(log)]:
        print(f"{logs.pop(name)}: has no accuracy, left out; it was written by an older training")
    if logs:
        out.parent.mkdir(parents=True, exist_ok=True)
        curves(logs).savefig(out, dpi=DPI)
