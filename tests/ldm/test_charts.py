"""Figures of one style: PNGs with a title, and SVG lines placed by their values."""

import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest
import torch
from PIL import Image

from ldm.charts import COLOURS, DPI, WIDTH, colour, drawing, lines_svg, show_image


def test_the_title_is_above_the_drawing(tmp_path):
    path = tmp_path / "x.png"
    with drawing(path, "A title", "and what is under it, " * 12, height=2) as figure:
        axes = figure.subplots()
        show_image(axes, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 4, 4))
        words = [text.get_window_extent() for text in figure.texts]
    with Image.open(path) as picture:
        assert picture.width == WIDTH * DPI
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 22)}
    assert (255, 0, 0) in colours
    lowest = min(box.y0 for box in words)
    assert len(words) > 2 and axes.get_window_extent().y1 < lowest
    for above, below in pairwise(words):
        assert above.y0 >= below.y1 - 1  # lines do not lie over one another
    assert max(box.x1 for box in words) < figure.bbox.width


def test_a_drawing_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), drawing(tmp_path / "x.png", "t", "u", 1):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def line(svg: str, shade: str) -> list[tuple[float, float]]:
    """Points of the line with a colour, in the units of the SVG."""
    paths = ET.fromstring(svg.replace("xlink:", "")).iter("path")
    (path,) = [path for path in paths if f"stroke: {shade}" in path.get("style", "")]
    numbers = [float(word) for word in re.findall(r"-?[\d.]+", path.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_svg_is_well_formed_transparent_and_reproducible():
    lines = {"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}
    svg = lines_svg(lines, {"a": "#112233", "b": "#445566"}, "images & more", log=False)
    (low_x, low_y), (high_x, high_y) = line(svg, "#112233")
    assert high_x > low_x and high_y < low_y  # y points down
    assert "images &amp; more" in svg and "<text" in svg  # text stays text
    assert "http" not in svg  # nothing for a browser to load
    assert svg == lines_svg(lines, {"a": "#112233", "b": "#445566"}, "images & more", log=False)


def test_a_single_point_is_drawn_as_a_dot():
    svg = lines_svg({"a": [(5, 2.0)]}, {"a": "#112233"}, "x", log=False)
    assert "<use" in svg and "fill: #112233" in svg


def test_log_scale_spaces_decades_evenly():
    svg = lines_svg({"a": [(0, 0.01), (1, 0.1), (2, 1.0)]}, {"a": "#112233"}, "x", log=True)
    heights = [y for _, y in line(svg, "#112233")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.01)


def test_colours_are_distinct():
    colours = [colour(i) for i in range(20)]
    assert len(set(colours)) == 20 and all(re.fullmatch("#[0-9a-f]{6}", c) for c in colours)
    assert tuple(colours[: len(COLOURS)]) == COLOURS
    values = [torch.tensor(list(bytes.fromhex(c[1:])), dtype=torch.float) for c in colours]
    # in red, green and blue of 0 to 255 together: a second orange was 22 from the first
    assert all((a - b).norm() > 35 for a, b in combinations(values, 2))
