import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.report import page


def decoded(html: str) -> list[np.ndarray]:
    found = re.findall(r"base64,([^\"]+)", html)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_page_is_one_file_with_escaped_text(tmp_path):
    picture = page.picture(torch.zeros(4, 3, 8, 8), 2, "a <b> & c")
    path = page.write_page(
        tmp_path / "p.html", "<title>", "lead",
        [page.tiles({"x": "1"}), page.section("s", "t", picture), page.commands(["a > b"]),
         page.table([("k", "<v>")]), page.note("<n>"), page.folded("<f>", "body"),
         page.table([["<c>"]], ["<h>"]), page.chip("red", "<i>")],
    )  # fmt: skip
    text = path.read_text("utf-8")
    assert "data:image/png;base64," in text and "http" not in text
    assert "a &lt;b&gt; &amp; c" in text and "&lt;title&gt;" in text
    assert not re.search(r"<[vnfhci]>", text)


def test_markup_is_not_escaped_again():
    chip = page.chip("red", "a & b")
    table = page.table([["x", "1"]], ["run", chip])
    assert f"<th>{chip}</th>" in table and "a &amp; b" in table


def test_a_note_has_its_subject_below():
    assert page.note(page.under("a & b", "c < d")) == (
        '<p class="note">a &amp; b<br><span class="dim">c &lt; d</span></p>'
    )
    assert page.note("a") == '<p class="note">a</p>'


def test_row_borders_scroll_with_the_sticky_column():
    """Collapsed borders belong to no cell, and stay behind; the next cell paints over one below."""
    (cells,) = re.findall(r"td, th \{(.*?)\}", page.STYLE, re.DOTALL)
    assert "position: sticky" in page.STYLE and "border-collapse: separate" in page.STYLE
    assert "border-top: 1px" in cells and "border-bottom" not in cells


def test_strips_keep_pixels_and_one_width():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    html = page.strips([("few", images), ("small", images[:, :, :8, :8])])
    few = decoded(html)[:2]
    assert (few[1] == ((images[1] + 1) * 127.5).round().permute(1, 2, 0).numpy()).all()
    assert [int(w) for w in re.findall(r'width="(\d+)"', html)] == [160] * 4
    assert 'width="256"' in page.strips([("large", torch.zeros(1, 3, 256, 256))])


def test_a_png_file_is_embedded_unchanged(tmp_path):
    path = tmp_path / "x & y.png"
    Image.new("RGB", (4, 2), (1, 2, 3)).save(path)
    html = page.png(path)
    assert path.read_bytes() == base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))
    assert "x &amp; y.png" in html
    with pytest.raises(OSError):
        page.png(tmp_path / "nowhere.png")


def test_chart_legend_has_last_values_in_their_colours():
    series = {"a<": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)], "none": []}
    drawn = page.chart("t & u", series, "x", colours={"a<": "red", "b": "blue", "none": "grey"})
    legend = drawn[drawn.index('<div class="legend">') : drawn.index("<svg")]
    assert "t &amp; u" in drawn and "none" not in legend
    assert 'background:red"></span>a&lt; 3</span>' in legend and "b 2</span>" in legend
    assert "last 1<" in page.chart("t", {"a": [(0, 1.0)]}, "x")


def test_chart_note_is_below_the_lines():
    drawn = page.chart("t", {"a": [(0, 1.0)]}, "x", note="mind <this>")
    assert drawn.rstrip().endswith('<p class="dim">mind &lt;this&gt;</p></div>')


def test_chart_without_points_is_empty():
    assert page.chart("none", {"a": [(0, float("nan"))]}, "x") == ""
    assert page.chart("none", {"a": [(0, 0.0)]}, "x", log=True) == ""
    assert "<svg" in page.chart("one", {"a": [(5, 2.0)]}, "x")
