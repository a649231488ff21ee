import math
import xml.etree.ElementTree as ET

import torch

from pipelines import page


def test_a_chart_is_well_formed_and_within_its_frame():
    drawn = page.chart("loss & more", {"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}, "images")
    svg = ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    lines = [e for e in svg if e.tag == "polyline"]
    points = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    assert len(lines) == 2 and points[0][1] > points[1][1]  # a higher value stands higher
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert "loss &amp; more" in drawn


def test_a_logarithm_spaces_decades_evenly_and_drops_what_has_none():
    drawn = page.chart("l", {"a": [(0, 0.01), (1, 0.1), (2, 1.0), (3, 0.0)]}, "x", log=True)
    svg = ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    (line,) = [e for e in svg if e.tag == "polyline"]
    heights = [float(p.split(",")[1]) for p in line.attrib["points"].split()]
    assert len(heights) == 3
    assert abs((heights[0] - heights[1]) - (heights[1] - heights[2])) < 0.2


def test_ticks_are_round_and_within():
    assert page._ticks(23.17, 27.0, log=False) == [24.0, 25.0, 26.0, 27.0]
    assert page._ticks(-0.557, 0.57, log=False) == [-0.5, 0.0, 0.5]
    assert page._ticks(math.log10(0.033), math.log10(0.477), log=True) == [0.05, 0.1, 0.2]
    assert page._ticks(2.0, 2.0, log=False) == [2.0]


def test_a_chart_of_nothing_is_nothing():
    assert page.chart("none", {"a": [(0, float("nan"))]}, "x") == ""
    assert "<polyline" in page.chart("one", {"a": [(5, 2.0)]}, "x")


def test_the_page_is_one_file_that_escapes_what_it_is_told(tmp_path):
    picture = page.picture(torch.zeros(4, 3, 8, 8), 2, "a <b> & c")
    path = page.write_page(
        tmp_path / "p.html", "<title>", "lead",
        [page.tiles({"x": "1"}), page.section("s", "t", picture), page.commands(["a > b"]),
         page.table([("k", "<v>")])],
    )  # fmt: skip
    text = path.read_text("utf-8")
    assert "data:image/png;base64," in text and "http" not in text
    assert "a &lt;b&gt; &amp; c" in text and "&lt;title&gt;" in text and "<v>" not in text
