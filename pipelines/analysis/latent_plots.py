"""The two pictures of `pipelines.analysis.latents`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import NullLocator
from torch import Tensor

from pipelines.analysis.latent_statistics import LatentStatistics
from pipelines.analysis.plots import DIM, INK, WIDTH, colour, drawing, name_rows, show_image

Rows = dict[str, list[Tensor]]
"""By model: images, reconstructions, latents by channels and by PCA, each (B, 3, H, W)."""

COLUMNS = ("image", "reconstruction", "latent,\nchannels 1-3", "latent,\nPCA")
FEW = 12  # channels, each of which has a tick
VERY_FEW = 6  # and whose correlations have room for numbers


def draw_sheet(path: Path, rows: Rows, what: str) -> None:
    """A row for every image and model; models stand together, so that they can be compared."""
    count = len(next(iter(rows.values()))[0])
    under = (
        f"The first images of {what}, the posteriors' modes. Three channels, or the first three "
        "principal components, as red, green and blue, each stretched from its 1st to its 99th "
        "percentile."
    )
    cell = (WIDTH - 0.6) / len(COLUMNS) - 0.1
    height = count * len(rows) * (cell + 0.12) + 0.55
    title = "Do the latents look like the image?"
    with drawing(path, title, under, height) as figure:
        grid = figure.subplots(count * len(rows), len(COLUMNS), squeeze=False)
        for row, (image, name) in enumerate((i, n) for i in range(count) for n in rows):
            for axes, pictures in zip(grid[row], rows[name], strict=True):
                show_image(axes, pictures[image])
        for axes, column in zip(grid[0], COLUMNS, strict=True):
            axes.set_title(column)
        name_rows(grid[:, 0], [name for _ in range(count) for name in rows], cell)


def draw_statistics(path: Path, found: dict[str, LatentStatistics], what: str) -> None:
    """Four panels a model."""
    under = (
        f"{what[0].upper()}{what[1:]}. Draws from the posteriors (the spectrum: their means). "
        "Dashed: N(0,\u00a01), which the KL term draws them to; grey in the spectrum: the images' "
        "luma at the latents' resolution, scaled to the same sum."
    )
    title = "Statistics of the latents, channel by channel"
    with drawing(path, title, under, 6.0 * len(found)) as figure:
        parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
        for i, (part, (name, statistics)) in enumerate(zip(parts, found.items(), strict=True)):
            if len(found) > 1:
                part.suptitle(name, x=0.012, ha="left", fontsize=12, fontweight="bold")
            _draw_model(part, statistics, colour(i))


def _draw_model(part: SubFigure, s: LatentStatistics, shade: str) -> None:
    (moments, kl), (spectrum, correlation) = part.subplots(2, 2)
    channels = np.arange(1, len(s.mean) + 1)
    few = len(channels) <= FEW

    moments.axhline(0, color=DIM, linewidth=0.9)
    for level in (-1, 1):
        moments.axhline(level, color=DIM, linewidth=0.9, linestyle=(0, (4, 3)))
    size = {"capsize": 3} if few else {"markersize": 2.5, "elinewidth": 1}
    moments.errorbar(channels, s.mean, s.std, color=shade, fmt="o", label="latents", **size)
    moments.errorbar(
        channels + 0.25, s.mean, s.posterior_std, color=INK, fmt="none",
        elinewidth=3 if few else 1, label="one posterior's own",
    )  # fmt: skip
    moments.set(title="Mean ± standard deviation", xlabel="channel", ylabel="latent value")
    moments.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")

    kl.bar(channels, s.kl, color=shade)
    kl.set(title="KL to N(0, 1)", xlabel="channel", ylabel="nats per latent value")
    kl.grid(axis="y")
    kl.set_axisbelow(True)

    _draw_spectrum(spectrum, s, shade)
    last = len(channels) + 0.5
    shown = correlation.imshow(
        s.correlation, cmap="RdBu_r", vmin=-1, vmax=1, extent=(0.5, last, last, 0.5)
    )
    correlation.set(title="Correlation r of channels", xlabel="channel", ylabel="channel")
    correlation.spines[:].set_visible(False)
    if len(channels) <= VERY_FEW:
        for row, column in np.ndindex(s.correlation.shape):
            r = s.correlation[row, column].item()
            how = {"color": "white" if abs(r) > 0.6 else INK, "size": 8}
            correlation.text(column + 1, row + 1, f"{r:.2f}", ha="center", va="center", **how)
    part.colorbar(shown, ax=correlation, shrink=0.9)
    if few:
        moments.set_xticks(channels)
        kl.set_xticks(channels)
        correlation.set_xticks(channels)
        correlation.set_yticks(channels)


def _draw_spectrum(axes: Axes, s: LatentStatistics, shade: str) -> None:
    """Every channel thin, their mean thick, and the images in grey."""
    for power in s.spectrum:
        axes.plot(s.frequencies, power, color=shade, linewidth=0.8, alpha=0.45)
    mean = s.spectrum.mean(0)
    axes.plot(s.frequencies, mean, color=shade, linewidth=2.2, label=f"latents (α = {s.slope:.1f})")
    # the images' power is in other units: only the shape of its curve is to be compared
    scaled = s.image_spectrum * (mean.mean() / s.image_spectrum.mean())
    label = f"images (α = {s.image_slope:.1f})"
    axes.plot(s.frequencies, scaled, color=DIM, linewidth=1.5, label=label)
    axes.set(
        xscale="log", yscale="log", title=r"Spectrum: power ∝ frequency$^{\,-\alpha}$",
        xlabel="cycles per latent", ylabel="power",
    )  # fmt: skip
    halves = [2**-k for k in range(1, 12) if 2**-k >= 0.99 * s.frequencies[0].item()]
    axes.set_xticks(halves, ["½", "¼", "⅛", *(f"1/{1 / f:.0f}" for f in halves[3:])][: len(halves)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(which="major")
    axes.legend(fontsize=8)
