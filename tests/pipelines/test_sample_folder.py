"""Folders of samples: which images count, and which folders are refused."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from ldm.errors import LdmError
from pipelines.sample import image_path
from pipelines.sample_folder import SampleFolder, newest_samples


def write(path, size=16, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size if isinstance(size, tuple) else (size, size)
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(path)


@pytest.fixture
def sampled(tmp_path):
    """What `ldm sample --n 3` leaves: three images in two folders, a mark, and a sheet."""
    folder = tmp_path / "samples [1]"
    for i in (0, 999, 1000):
        write(image_path(folder, i), level=i % 256)
    write(folder / "grid.png", size=40)
    (folder / "samples.json").write_text(json.dumps({"n": 3, "seed": 7}))
    return folder


def refused(path, limit=None) -> str:
    with pytest.raises(LdmError) as error:
        SampleFolder(path, limit)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_numbered_images_count_and_the_sheet_does_not(sampled):
    folder = SampleFolder(sampled)
    assert len(folder) == 3
    assert folder.resolution == 16
    assert folder.made_with == {"n": 3, "seed": 7}
    assert [int(folder.load(i)[0, 0, 0]) for i in range(3)] == [0, 999 % 256, 1000 % 256]
    assert folder.name(2) == f"{sampled}/00001/img00001000.png"


def test_any_folder_of_pngs(tmp_path):
    for name in ("b.png", "deep/er/a.PNG", "grid.png"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    folder = SampleFolder(tmp_path)
    assert [folder.name(i).removeprefix(f"{tmp_path}/") for i in range(len(folder))] == [
        "b.png",
        "deep/er/a.PNG",
        "grid.png",
    ]
    assert folder.made_with is None


def test_limit_takes_the_first(sampled):
    assert len(SampleFolder(sampled, limit=2)) == 2
    assert len(SampleFolder(sampled, limit=99)) == 3


def test_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        LdmError, match="no samples under runs/: give their folder, or `ldm sample`"
    ):
        newest_samples()
    for age, name in enumerate(["c", "a", "b"]):
        mark = tmp_path / "runs" / name / "samples" / "seed0" / "samples.json"
        mark.parent.mkdir(parents=True)
        mark.write_text("{}")
        os.utime(mark, (1000 - age, 1000 - age))
    assert newest_samples().parent.parent.name == "c"


# ---------------------------------------------------------------------------------- errors
def test_no_folder(tmp_path):
    assert refused(tmp_path / "x") == (
        f"no folder of samples at {tmp_path / 'x'}: make one with `ldm sample`"
    )


def test_fewer_than_two(tmp_path, sampled):
    write(tmp_path / "one" / "a.png")
    assert "gives 1 PNG image(s) to measure" in refused(tmp_path / "one")
    assert "gives 1 PNG image(s) to measure" in refused(sampled, limit=1)


def test_sampling_that_was_not_finished(sampled):
    (sampled / "samples.json").write_text(json.dumps({"n": 50}))
    assert "holds 3 of its 50 samples: run the `ldm sample` that began it again" in refused(sampled)
    assert len(SampleFolder(sampled, limit=3)) == 3
    assert "holds 3 of its 50 samples" in refused(sampled, limit=4)


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_damaged_mark(sampled, text):
    (sampled / "samples.json").write_text(text)
    assert "samples.json is damaged: delete it" in refused(sampled)


def test_compressed_images(tmp_path):
    for name in ("a.png", "b.png", "deep/c.JPEG"):
        write(tmp_path / name)
    text = refused(tmp_path)
    assert "holds compressed images (deep/c.JPEG)" in text
    assert text.endswith("write samples as PNG")


def test_several_folders_of_samples(sampled):
    text = refused(sampled.parent)
    assert text.endswith(f"holds folders of samples, give one of them: {sampled}")


def test_images_that_are_not_square(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path / name, size=(20, 10))
    assert refused(tmp_path) == f"{tmp_path}/a.png is 20×10: samples must be square"


def test_images_of_several_sizes(tmp_path):
    write(tmp_path / "a.png", size=16)
    write(tmp_path / "b.png", size=24)
    folder = SampleFolder(tmp_path)
    with pytest.raises(LdmError, match=r"b.png is 24×24 and .*a.png 16×16: samples of several"):
        folder.load(1)


def test_a_damaged_image(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    folder = SampleFolder(tmp_path)
    with pytest.raises(LdmError, match=r"b.png is damaged \(.*\): delete it and sample it again"):
        folder.load(1)
    (tmp_path / "a.png").write_bytes(b"")
    assert "a.png is damaged" in refused(tmp_path)
