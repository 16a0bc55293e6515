"""The demo's picture: the photograph, what a few latents attend to in it, and bars of time and memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.cases import Case
from perceiver_kernels.benchmarking.compare import PerceiverRun, Result
from perceiver_kernels.benchmarking.plain import ExpertCrossAttention, PlainPerceiver, axis_tables, encode

MAPS = 3
# A map is only looked at: pixels and cells of its longer side, and latents whose weights are held at once.
SEEN_PIXELS, MAP_CELLS, LATENTS_AT_ONCE = 1024, 96, 16
OURS, OTHERS, INK = "#d1495b", "#9aa5b1", "#2f3542"


def draw(path: Path, case: Case, pixels: Tensor, whole: list[Result], layers: list[Result]) -> None:
    """Writes the picture to `path`, its format by its ending."""
    figure = Figure(figsize=(13, 6.4), layout="constrained", facecolor="white")
    images, bars = figure.subfigures(2, 1, height_ratios=(1.5, 1), squeeze=False)[:, 0]
    show_images(images, case, pixels)
    panels = bars.subplots(1, 3, sharey=True)
    show_bars(panels[0], "one Perceiver", whole, medians(whole), tables.seconds)
    show_bars(panels[1], "its encoder cross-attention", layers, medians(layers), tables.seconds)
    show_bars(panels[2], "peak extra memory", whole, [result.memory for result in whole], tables.size)
    figure.savefig(path, dpi=110)


def medians(results: list[Result]) -> list[float | None]:
    return [result.timing.median if result.timing else None for result in results]


def show_images(figure: Any, case: Case, pixels: Tensor) -> None:
    """The photograph, and over a grey copy of it the attention of the latents that attend least evenly."""
    photograph, *panels = figure.subplots(1, 1 + MAPS)
    photograph.imshow(pixels.numpy())
    photograph.set_title(f"{case.shape[0]} x {case.shape[1]}, every pixel attended", color=INK, fontsize=10)
    grey = pixels.mean(-1).numpy()
    extent = (-0.5, case.shape[1] - 0.5, case.shape[0] - 0.5, -0.5)
    for panel, (latent, weights) in zip(panels, attention_maps(case, pixels), strict=True):
        panel.imshow(grey, cmap="gray", vmin=-0.3, vmax=1.3)
        panel.imshow(weights.numpy(), cmap="inferno", alpha=0.65, extent=extent, interpolation="bilinear")
        title = f"latent {latent}: {weights.min():.1f} to {weights.max():.1f} x the mean weight"
        panel.set_title(title, color=INK, fontsize=10)
    for panel in (photograph, *panels):
        panel.set_axis_off()


def attention_maps(case: Case, pixels: Tensor) -> list[tuple[int, Tensor]]:
    """Latents by number, each with the mean attention weight of every cell of pixels, in units of the overall mean.

    Weights are those of the model that was measured; of a large photograph they are taken at every k-th pixel. They
    come of random parameters, so they mean nothing: shown are the latents whose maps vary most.
    """
    cross = ExpertCrossAttention(case)
    perceiver = PlainPerceiver(case, cross)
    stride = math.ceil(max(case.shape) / SEEN_PIXELS)
    image = (pixels[None] * 2 - 1)[:, ::stride, ::stride]
    PerceiverRun(perceiver, case, image)  # loads the weights
    height, width = image.shape[1:3]
    cell = math.ceil(max(height, width) / MAP_CELLS)
    attention, head = cross.layer.fn, slice(0, case.head_dim)
    with torch.no_grad():
        tokens = encode(image, [table[::stride] for table in axis_tables(case)])
        keys = attention.to_kv(cross.layer.norm_context(tokens))[0, :, head]
        queries = attention.to_q(cross.layer.norm(perceiver.latents))[:, head] * case.head_dim**-0.5
        maps = []
        for block in queries.split(LATENTS_AT_ONCE):
            weights = (block @ keys.T).softmax(dim=-1) * len(keys)
            weights = weights.unflatten(-1, (height, width))
            maps.append(F.adaptive_avg_pool2d(weights, (math.ceil(height / cell), math.ceil(width / cell))))
    cells = torch.cat(maps)
    chosen = cells.flatten(1).std(dim=-1, correction=0).topk(min(MAPS, len(cells))).indices.tolist()
    return [(latent, cells[latent]) for latent in chosen]


def show_bars(panel: Any, title: str, results: list[Result], values: list[float | None], show: Any) -> None:
    """One horizontal bar per provider, its figure beside it; who did not run says why instead."""
    known = [value or 0.0 for value in values]
    colors = [OURS if result.provider == "ours" else OTHERS for result in results]
    panel.barh(range(len(results)), known, color=colors, height=0.6)
    for line, (result, value) in enumerate(zip(results, values, strict=True)):
        label = result.refused or show(value)
        panel.annotate(label, (known[line], line), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    panel.set_yticks(range(len(results)), [result.provider for result in results])
    panel.set_xlim(0, 1.35 * max(known, default=0.0) or 1.0)
    panel.set_xticks([])
    panel.set_title(title, color=INK, fontsize=10)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    panel.tick_params(length=0, colors=INK)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()
