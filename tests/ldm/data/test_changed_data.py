"""The images of a run are recognised when it resumes."""

import json
import shutil

import pytest
from accelerate import PartialState

from ldm.data import DataConfig, check_data, open_source, sources
from ldm.data.dataset import IDENTITY, open_images
from ldm.errors import LdmError
from tests.ldm.data.pictures import coordinates, encode
from tests.ldm.data.test_labels import in_folder, in_tar, in_zip

FILES = {f"{n}.png": encode(coordinates(n)) for n in range(4)}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()

    def check(path, **config):
        data = DataConfig(source=str(path), held_out=1, **config)
        check_data(PartialState(), folder, open_source(data, "train", 16), data)

    return check


@pytest.mark.parametrize("container", [in_folder, in_zip, in_tar])
def test_other_images_are_refused_unless_told(tmp_path, run, container, monkeypatch, caplog):
    monkeypatch.setattr(sources, "_told", set())
    path = container(tmp_path / "data", FILES)
    run(path)
    run(path)
    del path
    other = dict(list(FILES.items())[:-1])
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    path = container(tmp_path / "data", other)
    for _ in range(2):
        with pytest.raises(LdmError, match=r"list of images in .*/data\S* is not that with which"):
            run(path)
    run(path, changed="ok")
    assert "goes on with another list of images" in caplog.text
    run(path)


def test_a_folder_may_be_moved_and_copied(tmp_path, run):
    path = in_folder(tmp_path / "data", FILES)
    run(path)
    run(path.rename(tmp_path / "elsewhere"))


def test_a_part_is_known_by_its_whole(tmp_path):
    path = in_folder(tmp_path / "data", FILES)
    config = DataConfig(source=str(path), held_out=1)
    whole = open_images(path).identity()
    assert {open_source(config, split, 16).identity() for split in ("train", "val")} == {whole}
    assert open_source(DataConfig(), "train", 64).identity() != whole


def test_a_damaged_record_is_one_clear_line(tmp_path, run):
    path = in_folder(tmp_path / "data", FILES)
    (tmp_path / "run" / IDENTITY).write_text("{")
    with pytest.raises(LdmError, match=r"data\.json .*delete it to go on unchecked"):
        run(path)
    (tmp_path / "run" / IDENTITY).unlink()
    run(path)
    assert len(json.loads((tmp_path / "run" / IDENTITY).read_text("utf-8"))["sha256"]) == 64
