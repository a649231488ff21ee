"""Lines as an SVG, to be embedded in a page.

One self-contained HTML page: pictures inside, curves as SVG, readable in dark and in light.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from ldm.files import write_atomically
from ldm.images import grid, to_pil

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


__all__ = [
    "Markup",
    "Points",
    "breakable",
    "chart",
    "charts",
    "chip",
    "colour",
    "columns",
    "commands",
    "folded",
    "note",
    "picture",
    "png",
    "section",
    "strips",
    "table",
    "tiles",
    "under",
    "write_page",
]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --dim: #5c6675; --paper: #fbfaf8; --card: #fff;
        --line: #e3e1dc; --mark: #fdf3d7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6e1; --dim: #9aa3b2; --paper: #14161b; --card: #1c1f26; --line: #2e333d;
          --mark: #3a3220; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.02em }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem }
p { margin: .4rem 0 1rem; max-width: 46rem } .lead, figcaption, .dim { color: var(--dim) }
figure { margin: 1rem 0; overflow-x: auto } figcaption { font-size: .88rem; margin-top: .4rem }
img { max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 6px;
      display: block }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
         margin: 1.4rem 0 }
.tile, .card, .chart, pre { background: var(--card); border: 1px solid var(--line);
        border-radius: 10px }
.tile { padding: .8rem 1rem } .tile b { display: block; font-size: 1.55rem; letter-spacing: -.02em }
.tile span { color: var(--dim); font-size: .85rem }
.card { padding: .9rem 1rem; margin: .75rem 0 }
.card p { margin: .2rem 0 0; font-size: .93rem; max-width: none } code { font-size: .82rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
          gap: 1rem; margin: 1rem 0 }
.chart { padding: .8rem; min-width: 0 } .chart h3 { margin: 0 0 .3rem; font-size: .95rem }
.chart p { margin: .4rem 0 0; font-size: .82rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim); font-size: 12px }
svg .grid { stroke: var(--line) }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .82rem; color: var(--dim);
          margin: .1rem 0 .4rem }
.chip { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em }
.scroll { overflow-x: auto; margin: .6rem 0 1rem }
/* in the column that stays in sight, the next cell paints over collapsed borders, and over those
   below a cell that is no whole pixels high */
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 15px;
        line-height: 23px } td, th { text-align: left; padding: 6px .8rem 6px 0;
        border-top: 1px solid var(--line); vertical-align: top }
table tr:first-child > th, table:not(.columns) tr:first-child > td { border-top: 0 }
td:last-child { overflow-wrap: anywhere }
.columns th { white-space: nowrap } .columns th, .columns td { min-width: 5.5rem }
.columns tr > :first-child { min-width: 9.5rem; position: sticky; left: 0;
        background: var(--paper); overflow-wrap: anywhere } .columns .dim { font-size: .88rem }
.columns td { font-variant-numeric: tabular-nums } .columns thead th { color: var(--dim);
        font-weight: 600; font-size: .85rem }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--dim) }
details[open] > summary { margin-bottom: .4rem }
.note { background: var(--mark); border-radius: 8px; padding: .5rem .8rem; font-size: .93rem;
        margin: .5rem 0; max-width: none; overflow-wrap: anywhere } .note .dim { font-size: .85rem }
details details { margin-left: 1rem }
.strips { overflow-x: auto; margin: 1rem 0 } .strips figure { margin: 0 0 1rem; overflow: visible }
.strips img { max-width: none; flex: none } .strips .row { display: flex; gap: 3px }
.strips figcaption { position: sticky; left: 0;
        width: min(100%, calc(100vw - 2.5rem)); margin: 0 0 .3rem }
pre { padding: .9rem 1rem; overflow-x: auto; font-size: .88rem; overflow-wrap: normal }
"""


class Markup(str):
    """Text that is HTML already, and is not escaped again."""


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


def folded(title: str, *parts: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def note(text: str, of: str = "") -> str:
    """Something that a reader must not miss, and below it in small what it is said of."""
    below = f'<br><span class="dim">{escape(of)}</span>' if of else ""
    return f'<p class="note">{escape(text)}{below}</p>'


def chip(colour: str, name: str) -> Markup:
    """A name, and the colour that stands for it."""
    return Markup(f'<span class="chip" style="background:{colour}"></span>{escape(name)}')


def under(name: Markup, text: str) -> Markup:
    """A name, and below it what is said of it, for a cell."""
    return Markup(f'{name}<br><span class="dim">{escape(text)}</span>')


def tiles(numbers: Mapping[str, str]) -> str:
    """The few numbers that matter, large: {what it is: its value}."""
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in numbers.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


# -------------------------------------------------------------------------------- pictures
def picture(images: Tensor, columns: int, caption: str, zoom: int = 2) -> str:
    """A sheet of float images (N, 3, H, W) in [−1, 1], embedded as PNG, shown `zoom` times."""
    said, sheet = escape(caption), grid(images, columns)
    image = _embed(_encode(sheet), said, sheet.shape[-1] * zoom)
    return f"<figure>{image}<figcaption>{said}</figcaption></figure>"


def png(path: Path, caption: str) -> str:
    """A picture that is there, embedded.

    Raises:
        OSError: it cannot be read.
    """
    image = _embed(path.read_bytes(), escape(caption))
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def strips(rows: Sequence[tuple[str, Tensor]]) -> str:
    """Rows of as many images below one another, which scroll sideways together.

    Args:
        rows: (caption, float images (N, 3, H, W) in [−1, 1]); all are shown at one size, enlarged
            by whole pixels where they are small.
    """
    widest = max(images.shape[-1] for _, images in rows)
    width = widest * max(1, round(160 / widest))
    figures = []
    for caption, images in rows:
        row = "".join(_embed(_encode(image), "", width) for image in images)
        said = f"<figcaption>{_cell(caption)}</figcaption>"
        figures.append(f'<figure>{said}<div class="row">{row}</div></figure>')
    return f'<div class="strips">{"".join(figures)}</div>'


def _encode(image: Tensor) -> bytes:
    """A float image (3, H, W) in [−1, 1] as PNG."""
    file = io.BytesIO()
    to_pil(image).save(file, format="png", optimize=True)
    return file.getvalue()


def _embed(data: bytes, said: str, width: int | None = None) -> str:
    wide = f' width="{width}"' if width else ""
    text = base64.b64encode(data).decode()
    return f'<img src="data:image/png;base64,{text}"{wide} alt="{said}">'


# ------------------------------------------------------------------------- tables, commands
def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns: what, and its value."""
    cells = (f"<tr><td>{breakable(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<div class="scroll"><table>{"".join(cells)}</table></div>'


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header; the first column stays in sight where the others scroll sideways."""
    head = "".join(f"<th>{_cell(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(text)}</td>' for text in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="columns"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def breakable(key: str) -> Markup:
    """A dotted key, which may go on in another line after a dot."""
    return Markup(escape(key).replace(".", ".<wbr>"))


def _cell(text: str) -> str:
    return text if isinstance(text, Markup) else escape(text)


def commands(lines: Sequence[str]) -> str:
    """Commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"
