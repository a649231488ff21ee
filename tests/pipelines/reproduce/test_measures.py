"""Latents of a row: over the split that its recipe says, of images that were not trained on."""

import numpy as np
import pytest

from ldm.errors import LdmError
from pipelines.reproduce.measures import Tools, measure
from pipelines.reproduce.plan import Plan, find_scale
from pipelines.reproduce.rows import Model
from pipelines.reproduce.tables import find_tables
from tests.ldm.data.pictures import noise, png_folder
from tests.pipelines.analysis.subjects import save

[TABLE] = find_tables("t6")


@pytest.fixture
def data(tmp_path):
    return png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])


def latents(data, model, tmp_path, *settings, force=False):
    plan = Plan(find_scale("smoke"), [str(data)], settings, tmp_path / "out")
    tools = Tools(plan.scale.measuring, force=force)
    return measure(TABLE, plan.jobs(TABLE)[0], Model(model / "ckpt.pt", "0" * 64, True), tools)


def test_a_checkpoint_is_measured_over_the_rows_own_split(data, tmp_path):
    found = latents(data, save(tmp_path / "model"), tmp_path, "data.held_out=5", "data.workers=0")
    assert found.count == 5 and list(found.each["k"]) == [0, 1, 2, 3, 4]
    for sigma in (25, 50, 100, 250, 500):
        shares = found.each[f"mmd_{sigma}"]
        expected = shares.mean(), shares.std(ddof=1) / np.sqrt(5)
        assert found.numbers[f"mmd_{sigma}"] == pytest.approx(expected)
    assert found.notes[0].startswith(
        f"Latents of 5 held-out images of {data} at 64², all there are of 32 asked for, "
    )
    assert (found.force, found.extractor) == (None, None)


def test_images_that_a_checkpoint_was_trained_on_are_refused(data, tmp_path):
    """As the tables of reconstructions do."""
    elsewhere = tmp_path / "elsewhere"  # with copies under other names
    elsewhere.mkdir()
    for path in data.iterdir():
        (elsewhere / f"copy-{path.name}").write_bytes(path.read_bytes())
    (elsewhere / "other.png").write_bytes((elsewhere / "copy-0000.png").read_bytes())
    model = save(tmp_path / "model", data=str(elsewhere), resolution=64)
    asked = (data, model, tmp_path, "data.held_out=4", "data.workers=0")
    with pytest.raises(LdmError, match=r"4 of 4 images of .*/data, val, are also training images"):
        latents(*asked)
    found = latents(*asked, force=True)
    assert found.force is True and any("are also training images" in note for note in found.notes)
