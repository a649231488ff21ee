"""Images of a folder of samples in three forms: written, packed, resumed, damaged."""

import json
import zipfile
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig, open_source, shards
from ldm.data.shards import ShardSource
from ldm.data.sources import ZipSource
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError
from pipelines.sampling import sample_folder
from pipelines.sampling.sample_folder import Files, SampleFolder, SampleStore, image_name
from tests.pipelines.untrained import CLASSES

ABOUT = (4, "samples of a test", CLASSES)
FORMS = get_args(Files)


@pytest.fixture(autouse=True)
def four_a_thousand(monkeypatch):
    monkeypatch.setattr(sample_folder, "THOUSAND", 4)


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8))


def label(i: int) -> int:
    return i % 3


def store_of(out, files):
    out.mkdir(parents=True, exist_ok=True)
    return SampleStore(out, files, label)


def make(out, files, n, stop_after=None, world=1):
    """Write images 0 … n−1 from several processes, in batches of three, or stop before the end."""
    stores = [store_of(out, files) for _ in range(world)]
    missing = stores[0].missing(n)
    if missing:
        stores[0].begin()
    for turn, first in enumerate(range(0, len(missing), 3)):
        for i in missing[first : first + 3]:
            if stop_after is not None and i >= stop_after:
                return
            stores[turn % world].write(i, picture(i))
        stores[0].tidy()
    stores[0].finish(*ABOUT)


def read(out, files, n) -> list[np.ndarray]:
    (out / "samples.json").write_text(json.dumps({"files": files, "n": n}))
    folder = SampleFolder(out)
    assert len(folder) == n
    return [folder.load(i) for i in range(n)]


def content(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("files", FORMS)
def test_images_survive_a_round_trip(tmp_path, files):
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


@pytest.mark.parametrize("files", FORMS)
@pytest.mark.parametrize("world", [2, 3])
def test_more_processes_write_the_same_bytes(tmp_path, files, world):
    make(tmp_path / "one", files, 21)
    make(tmp_path / "more", files, 21, world=world)
    assert content(tmp_path / "one") == content(tmp_path / "more")


@pytest.mark.parametrize("files", FORMS)
@pytest.mark.parametrize("stop_after", [0, 1, 4, 7, 9])
def test_stopped_and_resumed_gives_the_same_bytes(tmp_path, files, stop_after):
    make(tmp_path / "whole", files, 10)
    make(tmp_path / "stopped", files, 10, stop_after)
    assert store_of(tmp_path / "stopped", files).missing(10)
    make(tmp_path / "stopped", files, 10)
    assert content(tmp_path / "whole") == content(tmp_path / "stopped")


@pytest.mark.parametrize("files", FORMS)
def test_growing_a_folder_gives_the_same_bytes(tmp_path, files):
    make(tmp_path / "whole", files, 11)
    for n in (1, 6, 3, 11):
        make(tmp_path / "grown", files, n)
    assert content(tmp_path / "whole") == content(tmp_path / "grown")


@pytest.mark.parametrize("files", ["zip", "shards"])
@pytest.mark.parametrize("name", ["rmtree", "replace", "write_json"])
def test_kill_while_packing_loses_nothing(tmp_path, monkeypatch, files, name):
    """Killed before a folder is removed, an archive renamed, or its note written."""
    make(tmp_path / "whole", files, 10)
    make(tmp_path / "killed", files, 6)

    class Kill(BaseException):
        pass

    def kill(*_args, **_kwargs):
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        if name == "replace":
            original = sample_folder.write_atomically

            def before_rename(path, write):
                if path.suffix == ".png":
                    return original(path, write)
                return original(path, lambda file: (write(file), kill()))

            for module in (sample_folder, shards):
                patch.setattr(module, "write_atomically", before_rename)
        elif name == "rmtree":
            patch.setattr(sample_folder.shutil, name, kill)
        else:
            patch.setattr(shards, name, kill)
        make(tmp_path / "killed", files, 10)
        if files == "zip":  # which has no note
            kill()
    assert not list((tmp_path / "killed").rglob("*.partial"))
    make(tmp_path / "killed", files, 10)
    assert content(tmp_path / "whole") == content(tmp_path / "killed")


def test_shards_are_a_labelled_data_set(tmp_path):
    make(tmp_path, "shards", 10)
    source = open_source(DataConfig(source=str(tmp_path), labels=True), "train", 4)
    assert source.classes == CLASSES and len(source) == 10
    assert [source.label(i) for i in range(10)] == [label(i) for i in range(10)]
    assert np.array_equal(source.load(9), np.asarray(picture(9)))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["size"] == 4 and manifest["source"] == "samples of a test"
    sizes = [shard["bytes"] for shard in manifest["splits"]["train"]["shards"]]
    assert sizes == [(tmp_path / f"train-{k:05d}.tar").stat().st_size for k in range(3)]


def test_incomplete_shards_are_refused(tmp_path):
    make(tmp_path, "shards", 6)
    make(tmp_path, "shards", 10, stop_after=8)
    with pytest.raises(LdmError, match="is not complete"):
        open_source(DataConfig(source=str(tmp_path)), "train", 4)
    (tmp_path / "samples.json").write_text('{"n": 10, "files": "shards"}')
    with pytest.raises(LdmError, match="holds 6 of its 10 samples: run the same `ldm sample`"):
        SampleFolder(tmp_path)


def test_zip_has_the_layout_of_edm(tmp_path):
    make(tmp_path, "zip", 6)
    with zipfile.ZipFile(tmp_path / "samples.zip") as archive:
        infos = archive.infolist()
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        labels = json.loads(archive.read("dataset.json"))["labels"]
    assert labels == [[f"{i // 4:05d}/img{i:08d}.png", label(i)] for i in range(6)]
    source = open_source(DataConfig(source=str(tmp_path / "samples.zip")), "all", 4)
    assert np.array_equal(source.load(5), np.asarray(picture(5)))


def test_unlabelled_images_have_no_label_on_disk(tmp_path):
    """A zip omits all labels, since EDM reads −1 as the last class; a shard omits those labels."""
    for files in ("zip", "shards"):
        store = SampleStore(tmp_path / files, files, lambda i: i - 1)
        for i in range(2):
            store.write(i, picture(i))
        store.finish(*ABOUT)
    with zipfile.ZipFile(tmp_path / "zip" / "samples.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png", "00000/img00000001.png"]
    data = DataConfig(source=str(tmp_path / "shards"))
    assert len(open_source(data, "train", 4)) == 2
    with pytest.raises(LdmError, match=r"has no \.cls or \.json member"):
        open_source(data.model_copy(update={"labels": True}), "train", 4)


def test_only_shards_have_a_manifest_of_ours(tmp_path):
    for files in FORMS:
        (tmp_path / "manifest.json").touch()
        SampleStore(tmp_path, files).begin()
        assert (tmp_path / "manifest.json").exists() == (files != "shards")


def test_no_classes_are_written_without_classes(tmp_path):
    for files in ("zip", "shards"):
        store = SampleStore(tmp_path / files, files)
        store.write(0, picture(0))
        store.finish(4, "a test", ())
    with zipfile.ZipFile(tmp_path / "zip" / "samples.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png"]
    assert "classes" not in json.loads((tmp_path / "shards" / "manifest.json").read_text())


def test_damaged_zip_is_refused(tmp_path):
    make(tmp_path, "zip", 3)
    path = tmp_path / "samples.zip"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(LdmError, match=r"samples.zip is damaged: delete it and sample again"):
        store_of(tmp_path, "zip").missing(3)


@pytest.mark.parametrize(("files", "name"), [("zip", "samples.zip"), ("shards", "train-00000.tar")])
def test_damaged_image_in_an_archive_is_refused(tmp_path, monkeypatch, files, name):
    def fail(*_):
        raise CorruptImage("bad checksum")

    make(tmp_path, files, 3)
    monkeypatch.setattr({"zip": ZipSource, "shards": ShardSource}[files], "read", fail)
    with pytest.raises(LdmError, match=rf"{name} is damaged: delete it and sample again"):
        make(tmp_path, files, 4)


def test_damaged_shard_is_refused(tmp_path):
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
def test_lost_or_damaged_sidecar_is_rewritten(tmp_path, damage):
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


def test_folder_is_packed_once_complete(tmp_path):
    store = store_of(tmp_path, "shards")
    for i in (0, 1, 2, 4, 5, 6, 7):
        store.write(i, picture(i))
    store.tidy()
    assert [tar.name for tar in tmp_path.glob("*.tar")] == ["train-00001.tar"]
    store.write(3, picture(3))
    store.tidy()
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert not (tmp_path / image_name(0)).parent.exists()
