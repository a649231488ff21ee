"""The look that all pictures of analyses share: a sentence on top, quiet axes, few colours."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ldm.files import write_atomically
from ldm.images import to_uint8

WIDTH = 8.0  # inches: at 1000 pixels a letter of 10 points is 17 pixels high
DPI = 150
# told apart by those who see no red or no green, and in grey
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d8f", "#e9a13b", "#6b4c9a", "#7a7a7a")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, DIM = "#1d2330", "#5b6472"
STYLE = {
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
TITLE_POINTS, UNDER_POINTS, LETTERS = 13, 9.5, 112  # a line of the text under the title


@contextmanager
def drawing(path: Path, title: str, under: str, height: float) -> Iterator[Figure]:
    """A figure to draw on, written to `path` as a PNG, whole or not at all, when that is done.

    Args:
        title: what is seen, in a sentence.
        under: of what, and how it was measured; wrapped.
        height: of what is drawn, in inches, the title aside.
    """
    titles = textwrap.wrap(title, 78)
    lines = [line for part in under.split("\n") for line in textwrap.wrap(part, LETTERS)]
    # 1.45 and 1.4 lines of 72 points to the inch
    above = (1.45 * TITLE_POINTS * len(titles) + 1.4 * UNDER_POINTS * len(lines)) / 72 + 0.2
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height + above), layout="constrained")
        FigureCanvasAgg(figure)
        edges = {"w_pad": 0.08, "h_pad": 0.08}
        figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + above)), **edges)
        down = 0.1
        for texts, points, spacing, how in (
            (titles, TITLE_POINTS, 1.45, {"weight": "bold"}),
            (lines, UNDER_POINTS, 1.4, {"color": DIM}),
        ):
            for text in texts:
                figure.text(
                    0.1 / WIDTH, 1 - down / (height + above), text, fontsize=points, va="top", **how
                )
                down += spacing * points / 72
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def colour(index: int) -> str:
    """Of the index-th model."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Of the index-th model, so that lines are told apart without their colours."""
    return MARKERS[index % len(MARKERS)]


def show_image(axes: Axes, image: Tensor) -> None:
    """A float image (3, H, W) in [−1, 1], its pixels as squares, without ticks."""
    axes.imshow(to_uint8(image).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    bare(axes)


def bare(axes: Axes) -> None:
    """No ticks and no frame: what is shown is a picture."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def name_rows(all_axes: Sequence[Axes], names: Sequence[str], height: float) -> None:
    """Names at the left of the first pictures of rows, read upwards; long ones in several lines.

    Args:
        height: of a row, inches.
    """
    points = 9.5
    letters = max(int(height * 72 / (0.72 * points)), 1)  # bold ones are as wide
    for axes, name in zip(all_axes, names, strict=True):
        lines = [line for part in name.split("\n") for line in textwrap.wrap(part, letters)]
        axes.set_ylabel("\n".join(lines[:3]), fontsize=points, fontweight="bold", labelpad=6)
