import os
import pickle
import shutil

import numpy as np
import pytest
from webdataset import TarWriter

import ldm.data.shard_index as shard_index
from ldm.data.dataset import open_images
from ldm.data.prepare import prepare
from ldm.data.shard_index import FEW, INDEX
from ldm.data.shards import open_shards
from ldm.errors import LdmError
from ldm.hub import cache_folder
from tests.ldm.data.pictures import encode, labels_of, noise, png_folder


def shard(path, numbers, classes=None):
    path.parent.mkdir(exist_ok=True, parents=True)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for n in numbers:
            sample = {"__key__": f"{n:04d}", "png": encode(noise(n))}
            if classes is not None:
                sample["json"] = b'{"label": "%s"}' % classes[n % len(classes)].encode()
            writer.write(sample)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        shard(tmp_path / "data" / f"{name}.tar", range(ord(name), ord(name) + 3))
    return tmp_path / "data"


@pytest.fixture
def scanned(monkeypatch):
    """Names of the shards that are read for an index."""
    names, scan = [], shard_index.index_shard

    def spy(path, *rest):
        names.append(path.name)
        return scan(path, *rest)

    monkeypatch.setattr(shard_index, "index_shard", spy)
    return names


def kept():
    (found,) = cache_folder().glob("indexes/*/*.index")
    return found


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_shards_are_read_for_their_index_once(folder, scanned):
    first = open_shards(folder)
    assert scanned == ["a.tar", "b.tar", "c.tar"]
    again = open_shards(folder)
    assert len(scanned) == 3 and names(again) == names(first)
    np.testing.assert_array_equal(again.load(4), noise(ord("b") + 1))


def test_only_new_and_changed_shards_are_read_again(folder, scanned):
    open_shards(folder)
    shard(folder / "b.tar", [7])
    shard(folder / "aa.tar", [8, 9])
    scanned.clear()
    source = open_shards(folder)
    assert scanned == ["aa.tar", "b.tar"]
    shown = [name.rpartition("data/")[2] for name in names(source)]
    assert shown[3:6] == ["aa.tar/0008.png", "aa.tar/0009.png", "b.tar/0007.png"]
    np.testing.assert_array_equal(source.load(6), noise(ord("c")))


def test_a_shard_of_equal_size_and_later_time_is_read_again(folder, scanned):
    open_shards(folder)
    before = (folder / "a.tar").stat()
    shard(folder / "a.tar", [1, 2, 3])
    assert (folder / "a.tar").stat().st_size == before.st_size
    os.utime(folder / "a.tar", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    scanned.clear()
    assert open_shards(folder).name(0).endswith("0001.png") and scanned == ["a.tar"]


def test_an_interruption_keeps_what_is_indexed(folder, scanned):
    good = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(good[:1000])
    with pytest.raises(LdmError, match=r"b\.tar is truncated"):
        open_shards(folder)
    (folder / "b.tar").write_bytes(good)
    scanned.clear()
    assert len(open_shards(folder)) == 9 and scanned == ["b.tar", "c.tar"]
    shard(folder / "aa.tar", [1]).write_bytes(good[:1000])
    with pytest.raises(LdmError, match=r"aa\.tar is truncated"):
        open_shards(folder)
    (folder / "aa.tar").unlink()
    scanned.clear()
    assert len(open_shards(folder)) == 9 and scanned == []


def test_worker_processes_index_many_shards_in_order(tmp_path):
    many = tmp_path / "many"
    for n in range(FEW + 3):
        shard(many / f"{n:02d}.tar", [n])
    assert [name[-8:-4] for name in names(open_shards(many))] == [
        f"{n:04d}" for n in range(FEW + 3)
    ]


def test_a_source_travels_to_workers_as_a_path(tmp_path):
    shard(tmp_path / "data" / "a.tar", range(200))
    source = open_shards(tmp_path / "data")
    travelling = pickle.dumps(source)
    assert len(travelling) < 1500
    np.testing.assert_array_equal(pickle.loads(travelling).load(150), noise(150))


def test_a_run_goes_on_when_others_open_more_shards(folder):
    source = open_shards(folder)
    shard(folder / "aa.tar", [1])
    open_shards(folder)
    open_shards(folder, labels=False)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).load(8), noise(ord("c") + 2))


def test_an_index_written_anew_while_in_use_is_refused(folder):
    travelling = pickle.dumps(open_shards(folder))
    path = kept()
    shard(folder / "a.tar", [1])
    open_shards(folder)._index.path.replace(path)
    with pytest.raises(LdmError, match=r"changed while it was in use .*: run the same command"):
        pickle.loads(travelling)


@pytest.mark.parametrize("part", ["tail", "end", "start", "nothing"])
def test_a_damaged_index_is_made_again_or_named(folder, part):
    open_shards(folder)
    path = kept()
    data = bytearray(path.read_bytes())
    at = {"tail": len(data) - 100, "end": len(data) - 3, "start": 20, "nothing": None}[part]
    if at is None:
        data = b""
    else:
        data[at] ^= 1
    path.write_bytes(data)
    source = open_shards(folder)
    if part == "start":  # of a block, which is looked at when it is used
        with pytest.raises(LdmError, match=r"is damaged: delete it, and it is made again"):
            source.load(0)
    else:
        np.testing.assert_array_equal(source.load(0), noise(ord("a")))


def test_names_of_classes_follow_the_shards(tmp_path, scanned):
    folder = tmp_path / "data"
    shard(folder / "a.tar", range(2), ["dog", "cat"])
    shard(folder / "b.tar", range(3), ["owl", "cat", "ant"])
    source = open_shards(folder, labels=True)
    assert source.classes == ("ant", "cat", "dog", "owl") and labels_of(source) == [2, 1, 3, 1, 0]
    assert labels_of(open_shards(folder)) == [-1] * 5 and len(scanned) == 2, "it serves both"
    (folder / "a.tar").unlink()
    source = open_shards(folder, labels=True)
    assert source.classes == ("ant", "cat", "owl") and labels_of(source) == [2, 1, 0]
    assert len(scanned) == 2
    assert labels_of(pickle.loads(pickle.dumps(source))) == [2, 1, 0]


def test_labels_are_read_when_they_are_requested(tmp_path, scanned):
    shard(tmp_path / "data" / "a.tar", range(2), ["dog", "cat"])
    open_shards(tmp_path / "data")
    assert labels_of(open_shards(tmp_path / "data", labels=True)) == [1, 0] and len(scanned) == 2


def test_what_was_left_out_is_said_at_every_opening(tmp_path):
    shard(tmp_path / "data" / "a.tar", range(2), ["dog"])
    for _ in range(2):
        assert open_shards(tmp_path / "data")._index.left_out == {
            "a.tar": {".json": [2, "0000.json"]}
        }


def test_prepared_shards_have_their_index_beside_them_in_every_copy(tmp_path, scanned):
    png_folder(tmp_path / "images", [noise(n) for n in range(20)])
    prepare(tmp_path / "images", tmp_path / "data", size=16, held_out=2, workers=0)
    assert (tmp_path / "data" / INDEX).is_file()
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "data")
    scanned.clear()
    copy = open_images(tmp_path / "copy")
    assert len(copy) == 20 and scanned == [] and copy.load(19).shape == (16, 16, 3)
    assert not (cache_folder() / "indexes").exists()


def test_other_shards_in_the_place_of_prepared_ones_are_read_again(tmp_path, scanned):
    for first, images in ((0, "one"), (100, "other")):
        png_folder(tmp_path / images, [noise(first + n) for n in range(4)])
        prepare(tmp_path / images, tmp_path / f"{images}-data", 16, held_out=1, workers=0)
    index = (tmp_path / "one-data" / INDEX).read_bytes()
    (tmp_path / "other-data" / INDEX).write_bytes(index)
    scanned.clear()
    assert len(open_images(tmp_path / "other-data")) == 4 and len(scanned) == 2


def test_without_a_cache_the_index_is_made_at_each_start(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        source = open_shards(folder)
        np.testing.assert_array_equal(source.load(8), noise(ord("c") + 2))
    assert "cannot be written: the index of" in caplog.text
    assert pickle.loads(pickle.dumps(source)).name(8) == source.name(8)
