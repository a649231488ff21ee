"""The loss by noise level: a mean over all σ hides which of them is still being learnt."""

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from ldm.files import write_atomically

EDGES = (0.0, 0.1, 0.3, 1.0, 3.0, inf)
"""Between them lie 18, 32, 34, 13 and 3 % of the training noise levels of EDM's defaults."""


def band_names() -> dict[tuple[float, float], str]:
    """The bands, and their names in the metrics."""
    return {
        (low, high): f"loss_sigma_{low:g}_to_{high:g}" if high < inf else f"loss_sigma_over_{low:g}"
        for low, high in pairwise(EDGES)
    }


def band_losses(loss: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Mean loss of each band of σ in a batch; NaN where a band has none of its images.

    Args:
        loss, sigma: of each image, (b,).
    """
    means = {}
    for (low, high), name in band_names().items():
        inside = (low <= sigma) & (sigma < high)
        # no indexing, which would make the host wait for the device
        means[name] = torch.where(inside, loss, 0).sum() / inside.sum()
    return means


def draw_bands(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw each band's loss over images seen, from the rows of a metrics.jsonl, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ("#1b6ca8", "#2a9d8f", "#8ab17d", "#e9a13b", "#d1495b")
    for ((low, high), name), colour in zip(band_names().items(), colours, strict=True):
        points = [(row["images_seen"], row[name]) for row in rows if name in row]
        if points:
            label = f"σ ≥ {low:g}" if high == inf else f"{low:g} ≤ σ < {high:g}"
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.3)
    axes.set(xlabel="images seen", ylabel="λ(σ) ‖D(x; σ) − z‖²", yscale="log")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
