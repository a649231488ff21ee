"""The parts of a self-contained HTML page: text, tables, embedded pictures and charts."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from torch import Tensor

from ldm.charts import Points, colour, lines_svg
from ldm.files import write_atomically
from ldm.images import grid, to_pil

STYLE = (resources.files("pipelines.report") / "page.css").read_text("utf-8")


class Markup(str):
    """HTML, which is not escaped again."""


def write_page(path: Path, title: str, lead: str, sections: Sequence[str]) -> Path:
    """Write the page atomically: a title, a leading sentence, and sections of HTML."""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>{"".join(sections)}</main></body></html>\n'
    )
    write_atomically(path, html.encode(errors="backslashreplace"))
    return path


def section(title: str, text: str, *parts: str) -> str:
    """Return a section: heading, paragraph, content."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def folded(title: str, *parts: str) -> str:
    """Return content that is folded away under a title."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def note(text: str) -> str:
    """Return a highlighted note."""
    return f'<p class="note">{_cell(text)}</p>'


def chip(colour: str, name: str) -> Markup:
    """Return a name with a patch of its colour."""
    return Markup(f'<span class="chip" style="background:{colour}"></span>{escape(name)}')


def tiles(numbers: Mapping[str, str]) -> str:
    """Return the most important numbers in large type: {name: value}."""
    cells = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in numbers.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def commands(lines: Sequence[str]) -> str:
    """Return a block of commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


# ------------------------------------------------------------------------------------ tables
def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return a table; with a header, its first column stays in view when it scrolls sideways."""
    body = "".join(f"<tr>{''.join(f'<td>{_cell(text)}</td>' for text in row)}</tr>" for row in rows)
    if not header:
        return f'<div class="scroll"><table>{body}</table></div>'
    head = "".join(f"<th>{_cell(text)}</th>" for text in header)
    return (
        f'<div class="scroll"><table class="columns"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def under(text: str, below: str) -> Markup:
    """Return text with a description below in small print, for a cell or a note."""
    return Markup(f'{_cell(text)}<br><span class="dim">{escape(below)}</span>')


def breakable(key: str) -> Markup:
    """Return a dotted key that may be broken after each dot."""
    return Markup(escape(key).replace(".", ".<wbr>"))


def _cell(text: str) -> str:
    return text if isinstance(text, Markup) else escape(text)


# ---------------------------------------------------------------------------------- charts
def charts(*drawn: str) -> str:
    """Return charts side by side; "" if all are empty."""
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def chart(
    title: str,
    series: Mapping[str, Points],
    x_name: str,
    log: bool = False,
    colours: Mapping[str, str] | None = None,
    note: str = "",
) -> str:
    """Return a chart of lines through (x, y) points, with their last values; "" without points.

    A logarithmic y axis leaves out the points without a logarithm. A note stands below the chart.
    """
    colours = colours or {name: colour(i) for i, name in enumerate(series)}
    shown = {
        name: kept
        for name, points in series.items()
        if (kept := [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)])
    }
    if not shown:
        return ""
    legend = "".join(
        f"<span>{chip(colours[name], name if len(colours) > 1 else 'last')} "
        f"{points[-1][1]:.4g}</span>"
        for name, points in shown.items()
    )
    below = f'<p class="dim">{escape(note)}</p>' if note else ""
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
        f"{lines_svg(shown, colours, x_name, log)}{below}</div>"
    )


# -------------------------------------------------------------------------------- pictures
def picture(images: Tensor, columns: int, caption: str) -> str:
    """Embed float images (N, 3, H, W) in [−1, 1] as one PNG, shown at twice its size."""
    sheet = grid(images, columns)
    return _figure(_encode(sheet), caption, sheet.shape[-1] * 2)


def png(path: Path) -> str:
    """Embed a picture file; OSError if it cannot be read."""
    return _figure(path.read_bytes(), path.name)


def strips(rows: Sequence[tuple[str, Tensor]]) -> str:
    """Embed rows of captions and float images (N, 3, H, W) in [−1, 1] that scroll together.

    Images are shown at one size, small ones enlarged by an integer factor.
    """
    widest = max(images.shape[-1] for _, images in rows)
    width = widest * max(1, round(160 / widest))
    figures = []
    for caption, images in rows:
        row = "".join(_embed(_encode(image), "", width) for image in images)
        text = f"<figcaption>{_cell(caption)}</figcaption>"
        figures.append(f'<figure>{text}<div class="row">{row}</div></figure>')
    return f'<div class="strips">{"".join(figures)}</div>'


def _figure(image: bytes, caption: str, width: int | None = None) -> str:
    picture = _embed(image, caption, width)
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _encode(image: Tensor) -> bytes:
    """Encode a float image (3, H, W) in [−1, 1] as PNG."""
    file = io.BytesIO()
    to_pil(image).save(file, format="png", optimize=True)
    return file.getvalue()


def _embed(image: bytes, alt: str, width: int | None) -> str:
    wide = f' width="{width}"' if width else ""
    text = base64.b64encode(image).decode()
    return f'<img src="data:image/png;base64,{text}"{wide} alt="{escape(alt)}">'
