"""The three forms in which samples are kept: the same PNGs, whatever happened on the way."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.errors import LdmError
from pipelines.sampling import sample_folder as sample_store
from pipelines.sampling.sample_folder import STORES, SampleFolder, image_path

CLASSES = ("cat", "dog", "emu")
ABOUT = (4, "samples of a test", CLASSES)


@pytest.fixture(autouse=True)
def four_a_thousand(monkeypatch):
    monkeypatch.setattr(sample_store, "THOUSAND", 4)


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8))


def label(i: int) -> int:
    return i % 3


def store_of(out, files, rank=0, world=1):
    out.mkdir(parents=True, exist_ok=True)
    return STORES[files](out, label, rank, world)


def make(out, files, n, stop_after=None, world=1):
    """Sample 0 … n−1 as so many processes would, in batches of three, or stop in the midst."""
    stores = [store_of(out, files, rank, world) for rank in range(world)]
    missing = stores[0].missing(n)
    for store in stores:
        store.begin(missing)
    for turn, first in enumerate(range(0, len(missing), 3)):
        store = stores[turn % world]
        for i in missing[first : first + 3]:
            if stop_after is not None and i >= stop_after:
                return
            store.write(i, picture(i))
        store.tidy()
    for store in stores:
        store.finish()
    stores[0].conclude(*ABOUT)


def read(out, files, n) -> list[np.ndarray]:
    mark = {"files": files, "n": n}
    (out / "samples.json").write_text(json.dumps(mark))
    folder = SampleFolder(out)
    assert len(folder) == n
    return [folder.load(i) for i in range(n)]


def content(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("files", STORES)
def test_what_is_read_is_what_was_written(tmp_path, files):
    make(tmp_path, files, 10)
    assert not store_of(tmp_path, files).missing(10)
    for i, image in enumerate(read(tmp_path, files, 10)):
        assert np.array_equal(image, np.asarray(picture(i)))
    names = {
        "png": {f"{i // 4:05d}/img{i:08d}.png" for i in range(10)},
        "zip": {"samples.zip"},
        "shards": {"manifest.json"}
        | {f"train-{k:05d}.{end}" for k in range(3) for end in ("tar", "tar.json")},
    }
    assert content(tmp_path).keys() == names[files] | {"samples.json"}
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [
        tmp_path / f"{k:05d}" for k in range(3) if files == "png"
    ] or files == "png"


@pytest.mark.parametrize("files", STORES)
@pytest.mark.parametrize("world", [2, 3])
def test_more_processes_write_the_same_bytes(tmp_path, files, world):
    make(tmp_path / "one", files, 21)
    make(tmp_path / "more", files, 21, world=world)
    assert content(tmp_path / "one") == content(tmp_path / "more")


@pytest.mark.parametrize("files", STORES)
@pytest.mark.parametrize("stop_after", [0, 1, 4, 7, 9])
def test_stopped_and_gone_on_with(tmp_path, files, stop_after):
    make(tmp_path / "whole", files, 10)
    make(tmp_path / "stopped", files, 10, stop_after)
    assert store_of(tmp_path / "stopped", files).missing(10)
    make(tmp_path / "stopped", files, 10)
    assert content(tmp_path / "whole") == content(tmp_path / "stopped")


@pytest.mark.parametrize("files", STORES)
def test_more_images_later(tmp_path, files):
    make(tmp_path / "whole", files, 11)
    for n in (1, 6, 3, 11):
        make(tmp_path / "grown", files, n)
    assert content(tmp_path / "whole") == content(tmp_path / "grown")


@pytest.mark.parametrize("files", ["zip", "shards"])
@pytest.mark.parametrize("name", ["rmtree", "replace", "write_json"])
def test_a_kill_while_packing_loses_nothing(tmp_path, monkeypatch, files, name):
    """Before a folder is removed, before a pack gets its name, before its note is written."""
    make(tmp_path / "whole", files, 10)
    make(tmp_path / "killed", files, 6)

    class Kill(BaseException):
        pass

    def kill(*_args, **_kwargs):
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        if name == "replace":
            original = sample_store.write_atomically

            def before_rename(path, write):
                if path.suffix == ".png":
                    return original(path, write)
                return original(path, lambda file: (write(file), kill()))

            patch.setattr(sample_store, "write_atomically", before_rename)
        else:
            patch.setattr(sample_store.shutil if name == "rmtree" else sample_store, name, kill)
        make(tmp_path / "killed", files, 10)
        if files == "zip":  # which has no note
            kill()
    assert not list((tmp_path / "killed").rglob("*.partial"))
    make(tmp_path / "killed", files, 10)
    assert content(tmp_path / "whole") == content(tmp_path / "killed")


def test_shards_are_a_data_set_with_classes(tmp_path):
    make(tmp_path, "shards", 10)
    source = open_source(DataConfig(source=str(tmp_path), labels=True), "train", 4)
    assert source.classes == CLASSES and len(source) == 10
    assert [source.label(i) for i in range(10)] == [label(i) for i in range(10)]
    assert np.array_equal(source.load(9), np.asarray(picture(9)))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["size"] == 4 and manifest["source"] == "samples of a test"
    sizes = [shard["bytes"] for shard in manifest["splits"]["train"]["shards"]]
    assert sizes == [(tmp_path / f"train-{k:05d}.tar").stat().st_size for k in range(3)]


def test_shards_that_are_not_complete_are_no_data_set(tmp_path):
    make(tmp_path, "shards", 6)
    make(tmp_path, "shards", 10, stop_after=8)
    with pytest.raises(LdmError, match="is not complete"):
        open_source(DataConfig(source=str(tmp_path)), "train", 4)
    (tmp_path / "samples.json").write_text('{"n": 10, "files": "shards"}')
    with pytest.raises(LdmError, match="holds 6 of its 10 samples: run the `ldm sample`"):
        SampleFolder(tmp_path)


def test_the_zip_is_edms(tmp_path):
    make(tmp_path, "zip", 6)
    with zipfile.ZipFile(tmp_path / "samples.zip") as archive:
        infos = archive.infolist()
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert labels == [[f"{i // 4:05d}/img{i:08d}.png", label(i)] for i in range(6)]
    source = open_source(DataConfig(source=str(tmp_path / "samples.zip")), "all", 4)
    assert np.array_equal(source.load(5), np.asarray(picture(5)))


def test_images_of_no_class(tmp_path):
    """A zip says nothing of classes, for EDM would take −1 as the last; a shard leaves them out."""
    for files in ("zip", "shards"):
        store = STORES[files](tmp_path / files, lambda i: i - 1)
        store.begin([0, 1])
        for i in range(2):
            store.write(i, picture(i))
        store.finish()
        store.conclude(*ABOUT)
    with zipfile.ZipFile(tmp_path / "zip" / "samples.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png", "00000/img00000001.png"]
    data = DataConfig(source=str(tmp_path / "shards"))
    assert len(open_source(data, "train", 4)) == 2
    with pytest.raises(LdmError, match="has no class"):
        open_source(data.model_copy(update={"labels": True}), "train", 4)


def test_without_classes_there_are_none(tmp_path):
    for files in ("zip", "shards"):
        store = STORES[files](tmp_path / files)
        store.begin([0])
        store.write(0, picture(0))
        store.finish()
        store.conclude(4, "a test", ())
    with zipfile.ZipFile(tmp_path / "zip" / "samples.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png"]
    assert "classes" not in json.loads((tmp_path / "shards" / "manifest.json").read_text())


def test_a_damaged_zip_is_told(tmp_path):
    make(tmp_path, "zip", 3)
    path = tmp_path / "samples.zip"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(LdmError, match=r"samples.zip is damaged: delete it and sample again"):
        store_of(tmp_path, "zip").missing(3)


def test_a_damaged_shard_is_told(tmp_path):
    make(tmp_path, "shards", 6)
    path = tmp_path / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(LdmError, match=r"train-00001.tar is damaged: delete it and sample again"):
        store_of(tmp_path, "shards").missing(6)
    path.unlink()
    make(tmp_path, "shards", 6)
    assert not store_of(tmp_path, "shards").missing(6)


@pytest.mark.parametrize(
    "damage", ["lost", "{", "[]", '{"name": "train-00000.tar"}', "of another", "older"]
)
def test_a_shards_description_is_written_anew(tmp_path, damage):
    make(tmp_path, "shards", 6)
    whole, path = content(tmp_path), tmp_path / "train-00000.tar.json"
    if damage == "lost":
        path.unlink()
    elif damage == "of another":
        path.write_bytes((tmp_path / "train-00001.tar.json").read_bytes())
    elif damage == "older":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bytes": 1024, "count": 1}))
    else:
        path.write_text(damage)
    make(tmp_path, "shards", 6)
    assert content(tmp_path) == whole


def test_a_folder_is_not_packed_before_it_is_complete(tmp_path):
    store = store_of(tmp_path, "shards")
    store.begin(list(range(8)))
    for i in (0, 1, 2, 4, 5, 6, 7):
        store.write(i, picture(i))
    store.tidy()
    assert not list(tmp_path.glob("*.tar"))
    store.write(3, picture(3))
    store.tidy()
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert not image_path(tmp_path, 0).parent.exists()
