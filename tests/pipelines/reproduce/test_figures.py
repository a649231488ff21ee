"""Figures are found by name, and drawn of the rows they show."""

import pytest

from ldm.errors import LdmError, UsageError
from pipelines.reproduce.figures import FIGURES, find_figure
from pipelines.reproduce.runner import reproduce
from pipelines.reproduce.tables import all_tables
from tests.ldm.data.pictures import noise, png_folder


@pytest.mark.parametrize(
    ("word", "found"),
    [("f5", "f5"), ("F5", "f5"), ("figure 5", "f5"), ("fig. 3", "f3"), ("f1", None),
     ("f23", None), ("t5", None), ("", None)],
)  # fmt: skip
def test_figures_are_found_by_word(word, found):
    assert find_figure(word) == found


def test_figures_show_existing_rows():
    presets = {row.preset for table in all_tables() for row in table.rows}
    for figure in FIGURES.values():
        assert figure.rows and set(figure.rows.values()) <= presets
    assert list(FIGURES) == [f"f{number}" for number in range(2, 10)]


def test_figures_refuse_bad_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="f5 measures LPIPS: use --scale small"):
        reproduce("f5", "smoke")
    with pytest.raises(UsageError, match="--take is for tables"):
        reproduce("f3", "smoke", take=["x=y"])


def test_a_figure_refuses_changed_data(faked, tmp_path):
    data = png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])
    reproduce("t4", "smoke", data=[str(data)])
    (data / "0000.png").unlink()
    with pytest.raises(LdmError, match="t04/group/autoencoder was trained on other images than"):
        reproduce("f3", "smoke", data=[str(data)])
    assert len(faked.trained) == 2


@pytest.mark.slow
def test_figure_7_is_drawn_for_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [drawing] = reproduce("f7", "smoke", settings=["phases.0.steps=8"])
    assert [file.name for file in drawing.files if file.suffix == ".png"]
    assert all(file.is_file() and file.parent.name == "f7" for file in drawing.files)
    assert drawing.lines[0].startswith("# F7: ")
