"""One self-contained HTML page: pictures inside, curves as SVG, readable in dark and in light."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from ldm.files import write_atomically
from ldm.images import grid, to_pil

COLOURS = ("#3b7dd8", "#d9622b", "#2f9e6e", "#a44fc0", "#b8860b")
Points = Sequence[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #667085; --paper: #fbfaf8; --card: #fff;
        --line: #e3e1dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --dim: #9aa3b2; --paper: #14161b; --card: #1c1f26; --line: #2e333d; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.02em }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem }
p { margin: .4rem 0 1rem; max-width: 46rem } .lead, figcaption, .dim { color: var(--dim) }
figure { margin: 1rem 0; overflow-x: auto } figcaption { font-size: .88rem; margin-top: .4rem }
img { max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 6px;
      display: block }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
         margin: 1.4rem 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
        padding: .8rem 1rem } .tile b { display: block; font-size: 1.55rem; letter-spacing: -.02em }
.tile span { color: var(--dim); font-size: .85rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
          gap: 1rem }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
         padding: .8rem } .chart h3 { margin: 0 0 .3rem; font-size: .95rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim); font-size: 11px }
svg .grid { stroke: var(--line) }
table { border-collapse: collapse; width: 100%; font-size: .93rem } td, th { text-align: left;
        padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
      padding: .9rem 1rem; overflow-x: auto; font-size: .88rem }
"""


def write_page(path: Path, title: str, lead: str, sections: Sequence[str]) -> Path:
    """Write the page whole: a title, a leading sentence, and sections of HTML."""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>{"".join(sections)}</main></body></html>\n'
    )
    write_atomically(path, lambda file: file.write(html.encode()))
    return path


def section(title: str, text: str, *parts: str) -> str:
    """A heading, a paragraph in plain words, and what it speaks of."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def tiles(numbers: Mapping[str, str]) -> str:
    """The few numbers that matter, large: {what it is: its value}."""
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in numbers.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def picture(images: Tensor, columns: int, caption: str, zoom: int = 2) -> str:
    """A sheet of float images (N, 3, H, W) in [−1, 1], embedded as PNG, shown `zoom` times."""
    image, file = to_pil(grid(images, columns)), io.BytesIO()
    image.save(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{image.width * zoom}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns: what, and its value."""
    cells = (f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def commands(lines: Sequence[str]) -> str:
    """Commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def charts(*drawn: str) -> str:
    """Charts side by side."""
    return f'<div class="charts">{"".join(drawn)}</div>'


def chart(title: str, series: Mapping[str, Points], x_name: str, log: bool = False) -> str:
    """Lines through (x, y) points as an SVG; `log` scales y by its logarithm."""
    width, height, left, right, top, bottom = 420, 230, 48, 10, 10, 34
    scale = math.log10 if log else float
    shown = {
        name: [(x, scale(y)) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        for name, points in series.items()
    }
    every = [point for points in shown.values() for point in points]
    if not every:
        return ""
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_low, y_high = min(y for _, y in every), max(y for _, y in every)
    x_span, y_span = x_high - x_low or 1, y_high - y_low or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / x_span * (width - left - right),
            top + (1 - (y - y_low) / y_span) * (height - top - bottom),
        )

    parts = []
    for level in _ticks(y_low, y_high, log):
        y = place(x_low, scale(level))[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{level:.4g}</text>')
    below = height - bottom + 16
    for x, anchor, label in (
        (left, "start", f"{x_low:,.0f}"),
        ((left + width - right) / 2, "middle", escape(x_name)),
        (width - right, "end", f"{x_high:,.0f}"),
    ):
        parts.append(f'<text x="{x}" y="{below}" text-anchor="{anchor}">{label}</text>')
    for i, (name, points) in enumerate(shown.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{path}"/>'
        )
        if len(shown) > 1:
            x = left + i * (width - left) / len(shown)
            parts.append(f'<rect x="{x}" y="{height - 11}" width="9" height="9" fill="{colour}"/>')
            parts.append(f'<text x="{x + 13}" y="{height - 3}">{escape(name)}</text>')
    return (
        f'<div class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg></div>'
    )


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values between two (of logarithms, if `log`): about five, 1, 2 or 5 times a power."""
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        values = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        return [value for value in values if low <= math.log10(value) <= high]
    rough = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]
