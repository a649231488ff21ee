import math
import xml.etree.ElementTree as ET

from pipelines.report import page as chart


def lines_of(drawn: str) -> tuple[ET.Element, list[list[tuple[float, float]]]]:
    """The SVG of a chart, and the points of its lines."""
    svg = ET.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    lines = [e.attrib["points"].split() for e in svg if e.tag == "polyline"]
    return svg, [[tuple(map(float, p.split(","))) for p in line] for line in lines]


def test_a_chart_is_well_formed_and_within_its_frame():
    drawn = chart.chart("loss & more", {"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}, "images")
    svg, (points, dot) = lines_of(drawn)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    assert points[0][1] > points[1][1]  # a higher value stands higher
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert dot[0] == dot[1]  # one point is seen, too
    assert "loss &amp; more" in drawn


def test_lines_are_named_with_where_they_end_in_their_colours():
    series = {"a<": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)], "none": []}
    drawn = chart.chart("t", series, "x", colours={"a<": "red", "b": "blue", "none": "grey"})
    legend = drawn[drawn.index('<div class="legend">') : drawn.index("<svg")]
    assert 'background:red"></span>a&lt; 3</span>' in legend and "b 2</span>" in legend
    assert "none" not in legend and 'stroke="blue"' in drawn
    assert "at the end 1<" in chart.chart("t", {"a": [(0, 1.0)]}, "x")
    assert len({chart.colour(i) for i in range(20)}) == 20


def test_a_logarithm_spaces_decades_evenly_and_drops_what_has_none():
    drawn = chart.chart("l", {"a": [(0, 0.01), (1, 0.1), (2, 1.0), (3, 0.0)]}, "x", log=True)
    _, (points,) = lines_of(drawn)
    heights = [y for _, y in points]
    assert len(heights) == 3
    assert abs((heights[0] - heights[1]) - (heights[1] - heights[2])) < 0.2


def test_ticks_are_round_within_and_few():
    assert chart._ticks(23.17, 27.0, log=False) == [24.0, 25.0, 26.0, 27.0]
    assert chart._ticks(-0.557, 0.57, log=False) == [-0.5, 0.0, 0.5]
    assert chart._ticks(math.log10(0.033), math.log10(0.477), log=True) == [0.05, 0.1, 0.2]
    assert chart._ticks(2.0, 2.0, log=False) == [2.0]
    assert chart._ticks(-6.2, 0.1, log=True) == [10.0**n for n in range(-6, 1)]
    assert 3 <= len(chart._ticks(-30.0, 20.0, log=True)) <= 7 + 6
    assert chart._ticks(math.log10(0.21), math.log10(0.29), log=True) == [0.22, 0.24, 0.26, 0.28]


def test_a_note_stands_below_the_lines():
    drawn = chart.chart("t", {"a": [(0, 1.0)]}, "x", note="mind <this>")
    assert drawn.endswith('</svg><p class="dim">mind &lt;this&gt;</p></div>')


def test_a_chart_of_nothing_is_nothing():
    assert chart.chart("none", {"a": [(0, float("nan"))]}, "x") == ""
    assert chart.chart("none", {"a": [(0, 0.0)]}, "x", log=True) == ""
    assert "<polyline" in chart.chart("one", {"a": [(5, 2.0)]}, "x")
