"""The style of all figures: a title, quiet axes, one palette; PNG, or SVG for pages."""

import colorsys
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from torch import Tensor

from ldm.files import write_atomically
from ldm.images import to_pil

WIDTH = 8.0  # inches: in a picture of 1000 pixels, 10 points are 17 pixels high
DPI = 150
# distinct on light and dark backgrounds, and for most kinds of colour vision
COLOURS = (
    "#3b7dd8", "#d9622b", "#2f9e6e", "#a44fc0", "#b8860b", "#d6478a", "#2aa3b5", "#7a7f8c",
)  # fmt: skip
GREY = "#7f8794"  # readable on light and dark pages
SVG_FILE = re.compile(r"<metadata>.*?</metadata>|^.*?(?=<svg)| xmlns(:\w+)?=\"[^\"]*\"", re.DOTALL)
Points = Sequence[tuple[float, float]]
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, DIM = "#1d2330", "#5b6472"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": "#9aa3b2",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d8dbe0",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}


@contextmanager
def drawing(path: Path, title: str, under: str, height: float) -> Iterator[Figure]:
    """Provide a figure to draw on, and write it to `path` as a PNG, atomically, at the end.

    The title and the data and method `under` it are wrapped, and stand above the drawing, which is
    `height` inches high.
    """
    under = under[0].upper() + under[1:]
    texts: list[tuple[str, dict[str, Any]]] = [
        *((line, {"fontsize": 13, "weight": "bold"}) for line in textwrap.wrap(title, 78)),
        *((line, {"fontsize": 9.5, "color": DIM}) for line in textwrap.wrap(under, 112)),
    ]
    heights = [1.45 * style["fontsize"] / 72 for _, style in texts]  # 72 points to the inch
    whole = height + 0.2 + sum(heights)
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1, height / whole), w_pad=0.08, h_pad=0.08)
        figure = Figure(figsize=(WIDTH, whole), layout=layout)
        FigureCanvasAgg(figure)
        down = 0.1
        for (line, style), inches in zip(texts, heights, strict=True):
            figure.text(0.1 / WIDTH, 1 - down / whole, line, va="top", **style)
            down += inches
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def colour(index: int) -> str:
    """Return the colour of the index-th line as #rrggbb: the palette, then darker, then lighter."""
    times, place = divmod(index, len(COLOURS))
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(COLOURS[place]))
    if times % 2:
        lightness *= 0.65 ** (times // 2 + 1)
    else:
        lightness = 1 - (1 - lightness) * 0.65 ** (times // 2)
    return to_hex(colorsys.hls_to_rgb(hue, lightness, saturation))


def line_style(index: int) -> dict[str, Any]:
    """Return the colour and the marker of the index-th line; either identifies it."""
    return {"color": colour(index), "marker": MARKERS[index % len(MARKERS)]}


def lines_svg(lines: Mapping[str, Points], colours: Mapping[str, str], x: str, log: bool) -> str:
    """Draw lines through (x, y) points as an SVG element for light and dark pages.

    `x` is the label of the x axis; `log` makes the y axis logarithmic.
    """
    with rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": "ldm", "font.size": 9}):
        figure = Figure(figsize=(4.4, 2.4), layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            single = "o" if len(points) == 1 else None  # a line needs two points
            axes.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.6, marker=single)
        axes.set(xlabel=x, yscale="log" if log else "linear")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.label.set_color(GREY)
        axes.tick_params(which="both", colors=GREY)
        axes.spines[:].set_color(GREY)
        axes.grid(axis="y", color=GREY, alpha=0.3)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    # inside a page, an SVG needs neither the declarations of an XML file nor metadata
    return SVG_FILE.sub("", text.getvalue()).strip()


def show_image(axes: Axes, image: Tensor) -> None:
    """Show a float image (3, H, W) in [−1, 1] with square pixels."""
    axes.imshow(to_pil(image), interpolation="nearest")


def picture_rows(
    figure: Figure, names: list[str], images: int, titles: Sequence[str], height: float
) -> NDArray[np.object_]:
    """Return axes for pictures (images, names, titles), without ticks: a row per image and name.

    The titles stand above the columns, the names vertically to the left of rows of `height` inches.
    """
    grid = figure.subplots(images * len(names), len(titles), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    points = 9.5
    letters = max(int(height * 72 / (0.72 * points)), 1)  # bold ones are as wide
    for axes, name in zip(grid[:, 0], names * images, strict=True):
        lines = [line for part in name.split("\n") for line in textwrap.wrap(part, letters)]
        axes.set_ylabel("\n".join(lines[:3]), fontsize=points, fontweight="bold", labelpad=6)
    return grid.reshape(images, len(names), len(titles))
