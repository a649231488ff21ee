"""Lines as an SVG, to be embedded in a page."""

import math
from collections.abc import Mapping, Sequence
from html import escape

# as far apart as eight can be, on light ground and on dark, for most kinds of eyes
COLOURS = (
    "#3b7dd8", "#d9622b", "#2f9e6e", "#a44fc0", "#b8860b", "#d6478a", "#2aa3b5", "#7a7f8c",
)  # fmt: skip
Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 218
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 22


def colour(number: int) -> str:
    """What the line of a number is drawn in, as CSS has it: no two alike."""
    if number < len(COLOURS):
        return COLOURS[number]
    return f"hsl({137.5 * number % 360:.0f} 60% 52%)"  # the golden angle: far from those before


def charts(*drawn: str) -> str:
    """Charts side by side."""
    return f'<div class="charts">{"".join(drawn)}</div>'


def chart(
    title: str,
    series: Mapping[str, Points],
    x_name: str,
    log: bool = False,
    colours: Mapping[str, str] | None = None,
    note: str = "",
) -> str:
    """Lines through (x, y) points as an SVG, named with their last value; "" where there is none.

    Args:
        log: y is scaled by its logarithm, and points without one are left out.
        colours: of each line; by default `colour` of its place.
        note: what to mind when reading it, below it.
    """
    scale = math.log10 if log else float
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        for name, points in series.items()
    }
    every = [(x, scale(y)) for points in shown.values() for x, y in points]
    if not every:
        return ""
    colours = colours or {name: colour(i) for i, name in enumerate(shown)}
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_low, y_high = min(y for _, y in every), max(y for _, y in every)
    x_span, y_span = x_high - x_low or 1, y_high - y_low or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT),
            TOP + (1 - (scale(y) - y_low) / y_span) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for level in _ticks(y_low, y_high, log):
        y = place(x_low, level)[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{level:.6g}</text>')
    foot = HEIGHT - BOTTOM + 17
    for x, anchor, label in (
        (LEFT, "start", f"{x_low:,.0f}"),
        ((LEFT + WIDTH - RIGHT) / 2, "middle", escape(x_name)),
        (WIDTH - RIGHT, "end", f"{x_high:,.0f}"),
    ):
        parts.append(f'<text x="{x}" y="{foot}" text-anchor="{anchor}">{label}</text>')
    for name, points in shown.items():
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(_line(path, colours[name], alone=len(points) == 1))
    below = f'<p class="dim">{escape(note)}</p>' if note else ""
    return (
        f'<div class="chart"><h3>{escape(title)}</h3>{_legend(shown, colours)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>{below}</div>"
    )


def _line(path: str, colour: str, alone: bool) -> str:
    """A line; one point is no line, and is shown as a dot."""
    # a cap makes a line of no length a dot
    dot = ' stroke-linecap="round"' if alone else ""
    width, path = ("6", f"{path} {path}") if alone else ("1.8", path)
    return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}"{dot} points="{path}"/>'


def _legend(shown: Mapping[str, Points], colours: Mapping[str, str]) -> str:
    """What each line is, and where it ended; one alone is what the chart's title says."""
    entries = (
        f'<span><span class="chip" style="background:{colours[name]}"></span>'
        f"{escape(name) if len(colours) > 1 else 'at the end'} {points[-1][1]:.4g}</span>"
        for name, points in shown.items()
        if points
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between two (of logarithms, if `log`): about five, 1, 2 or 5 times a power."""
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        for digits, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 4)):
            values = [digit * 10.0**decade for decade in decades[::every] for digit in digits]
            inside = [value for value in values if low <= math.log10(value) <= high]
            if len(inside) <= 7:
                break
        # less than an octave: as on a linear scale
        return inside if len(inside) > 1 else _ticks(10.0**low, 10.0**high, log=False)
    rough = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]
