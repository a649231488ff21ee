"""Where an analysis writes, and its CSVs and pictures."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.charts import DPI, WIDTH, drawing, show_image
from pipelines.analysis.subjects import analysis_folder, write_csv


def test_beside_the_model_unless_told(tmp_path):
    file = tmp_path / "ckpt.pt"
    file.touch()
    assert analysis_folder(None, file) == analysis_folder(None, tmp_path) == tmp_path / "analysis"
    assert analysis_folder(Path("elsewhere"), file) == Path("elsewhere")


def test_numbers_come_back_from_a_csv(tmp_path):
    rows = [("a, b", 1, 1 / 3, None), ('"c"', 2, 1e-12, -2.5)]
    path = write_csv(tmp_path / "deep" / "x.csv", ("name", "k", "x", "y"), rows)
    with path.open(encoding="utf-8", newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["name", "k", "x", "y"]
    assert first[:2] == ["a, b", "1"] and first[3] == ""
    assert float(first[2]) == pytest.approx(1 / 3, rel=1e-8)
    assert second[0] == '"c"' and float(second[2]) == pytest.approx(1e-12, rel=1e-8)


def test_a_picture_has_its_words_above_what_is_drawn(tmp_path):
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
