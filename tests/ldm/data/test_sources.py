import io
import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest

from ldm.data import DataConfig, open_source
from ldm.data.dataset import split_indices, take_split
from ldm.data.sources import (
    FolderSource,
    ZipSource,
)
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import Coded, CodedClasses, class_folder, encode, noise, zip_file


def test_images_are_found_however_deep_and_sorted_by_relative_path(tmp_path):
    for number, name in enumerate(["b/2.png", "a.JPG", "b/10.png", "b/c/1.webp", "z.npy"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, noise(number).transpose(2, 0, 1)[None])
        else:
            format = {".png": "PNG", ".JPG": "JPEG", ".webp": "WEBP"}[path.suffix]
            path.write_bytes(encode(noise(number), format))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.JPG").write_bytes(b"macOS leaves these")
    source = FolderSource(tmp_path)
    names = ["a.JPG", "b/10.png", "b/2.png", "b/c/1.webp", "z.npy"]
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path}/{n}" for n in names]
    np.testing.assert_array_equal(source.load(1), noise(2))
    np.testing.assert_array_equal(source.load(4), noise(4))


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(encode(noise(0)))
    images = tmp_path / "images"
    images.mkdir()
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "loop").symlink_to(images)
    source = FolderSource(images)
    assert [source.name(i) for i in range(len(source))] == [f"{images}/linked/1.png"]


def test_a_file_that_is_gone_counts_as_corrupt(tmp_path):
    (tmp_path / "1.png").write_bytes(encode(noise(0)))
    source = FolderSource(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(CorruptImage, match="No such file"):
        source.load(0)


def test_a_folder_without_images_says_what_is_read(tmp_path):
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(
        LdmError,
        match=r"holds no images .left out: 1 \.csv, such as labels\.csv.: \.png .*\.npy are",
    ):
        FolderSource(tmp_path)


@pytest.fixture
def edm_zip(tmp_path):
    """As EDM's dataset tool lays it out, the members out of order."""
    array = io.BytesIO()
    np.save(array, noise(2).transpose(2, 0, 1))
    members = {
        "00001/img00000001.png": encode(noise(1)),
        "dataset.json": b'{"labels": null}',
        "00000/img00000000.png": encode(noise(0)),
        "__MACOSX/00000/._img00000000.png": b"",
        "00002/img00000002.npy": array.getvalue(),
    }
    return zip_file(tmp_path / "images.zip", members)


def check_pixels(source):
    for index in (2, 0, 1):
        np.testing.assert_array_equal(source.load(index), noise(index))


def test_a_zip_is_read_in_the_order_of_names(edm_zip):
    source = ZipSource(edm_zip)
    assert len(source) == 3
    assert source.name(0) == f"{edm_zip}/00000/img00000000.png"
    check_pixels(source)


def test_an_open_zip_survives_pickling_and_forking(edm_zip):
    source = ZipSource(edm_zip)
    check_pixels(source)
    check_pixels(pickle.loads(pickle.dumps(source)))
    handle = source._handle
    child = multiprocessing.get_context("fork").Process(target=check_handle, args=(source, handle))
    child.start()
    check_pixels(source)
    child.join()
    assert child.exitcode == 0


def check_handle(source, parents_handle):
    check_pixels(source)
    assert source._handle is not parents_handle


def test_a_damaged_member_is_corrupt(edm_zip):
    data = bytearray(edm_zip.read_bytes())
    start = data.index(b"IDAT")
    data[start + 20 : start + 200] = bytes(180)
    edm_zip.write_bytes(data)
    with pytest.raises(CorruptImage):
        ZipSource(edm_zip).load(1)


def test_an_encrypted_member_is_corrupt(edm_zip):
    data = bytearray(edm_zip.read_bytes())
    # the first bit of the flags: 6 bytes into a local header, 8 into one of the directory
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    edm_zip.write_bytes(data)
    with pytest.raises(CorruptImage, match="encrypted"):
        ZipSource(edm_zip).load(1)


def test_a_truncated_zip_is_one_clear_line(edm_zip):
    edm_zip.write_bytes(edm_zip.read_bytes()[:-300])
    with pytest.raises(LdmError, match=r"images\.zip is truncated .+ archive \(.+\): copy it"):
        ZipSource(edm_zip)


def test_a_zip_without_images_says_what_is_read(tmp_path):
    path = zip_file(tmp_path / "empty.zip", {"a.txt": b""})
    with pytest.raises(
        LdmError, match=r"empty\.zip holds no images .left out: 1 \.txt, such as a\.txt.: \.png"
    ):
        ZipSource(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
def test_damage_in_any_compression_is_corrupt(tmp_path, method):
    """Bytes zeroed, and for 99 a method that zipfile does not know."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if method == 99 else method) as archive:
        archive.writestr("a.png", encode(noise(0)))
    data = bytearray(path.read_bytes())
    if method == 99:
        # the method: 8 bytes into a local header, 10 into one of the directory
        for signature, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
            data[data.index(signature) + place] = 99
    else:
        data[45:400] = bytes(355)
    path.write_bytes(data)
    with pytest.raises(CorruptImage):
        ZipSource(path).load(0)


def test_a_member_that_ends_too_early_is_corrupt(edm_zip, monkeypatch):
    def read(self, size):
        raise EOFError

    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    with pytest.raises(CorruptImage, match="EOFError"):
        ZipSource(edm_zip).load(0)


def test_labels_default_to_none():
    assert Coded(2).label(1) == -1
    assert CodedClasses(2).label(1) == 1


FILES = {"dog/1.png": noise(0), "cat/2.png": noise(1), "cat/deep/1.png": noise(2)}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_and_zips(tmp_path, kind):
    if kind == "folder":
        path, source = class_folder(tmp_path / "a", FILES), FolderSource
    else:
        members = {f"a/{name}": encode(image) for name, image in FILES.items()}
        path, source = zip_file(tmp_path / "a.zip", members | {"readme.txt": b""}), ZipSource
    images = source(path, labels=True)
    assert images.classes == ("cat", "dog")
    again = pickle.loads(pickle.dumps(images))
    for index, (label, number) in enumerate([(0, 1), (0, 2), (1, 0)]):
        assert type(images.label(index)) is int
        assert images.label(index) == again.label(index) == label
        np.testing.assert_array_equal(images.load(index), noise(number))
    without = source(path)
    assert (without.classes, without.label(0)) == ((), -1)
    assert [without.name(i) for i in range(3)] == [images.name(i) for i in range(3)]


def test_a_folder_without_classes_is_one_clear_line(tmp_path):
    folder = class_folder(tmp_path / "a", {"1.png": noise(0), "2.png": noise(1)})
    assert len(open_source(DataConfig(source=str(folder)), "all", 32)) == 2
    with pytest.raises(UsageError, match=r"^.*/a/1\.png has no class: .* omit labels$"):
        open_source(DataConfig(source=str(folder), labels=True), "all", 32)


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_every_split_knows_all_classes(tmp_path, split):
    folder = class_folder(tmp_path / "a", {f"{c}/{n}.png": noise(n) for c in "ab" for n in (0, 1)})
    source = open_source(DataConfig(source=str(folder), labels=True, held_out=1), split, 32)
    assert source.classes == ("a", "b")
    for index in range(len(source)):
        assert source.classes[source.label(index)] == source.name(index)[-7]
    assert open_source(DataConfig(source=str(folder)), split, 32).classes == ()


def test_the_last_by_name():
    assert split_indices(10, 3, evenly=False) == (range(7), range(7, 10))


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (10, 0), (10, 3), (97, 96), (30, 7)])
def test_each_image_is_in_one_split_and_both_are_in_order(count, held_out, evenly):
    train, val = (list(part) for part in split_indices(count, held_out, evenly))
    assert len(val) == held_out
    assert (train, val) == (sorted(train), sorted(val))
    assert sorted(train + val) == list(range(count))


def test_evenly_means_every_so_many_th():
    assert split_indices(20, 4, evenly=True)[1].tolist() == [4, 9, 14, 19]
    assert split_indices(20, 1, evenly=True)[1].tolist() == [19]
    assert split_indices(10, 3, evenly=True)[1].tolist() == [2, 5, 9]


def test_evenly_gives_each_class_its_share_to_one_image():
    sizes = [1300, 732, 40, 1, 900]
    labels = np.repeat(range(5), sizes)
    val = split_indices(len(labels), 100, evenly=True)[1]
    held_out = np.bincount(labels[val], minlength=5)
    assert (abs(held_out - 100 * np.array(sizes) / len(labels)) < 1).all()


def test_a_part_keeps_classes_and_labels():
    part = take_split(CodedClasses(20), "val", 4, evenly=True)
    assert part.classes == ("a", "b", "c")
    assert [part.label(i) for i in range(4)] == [1, 0, 2, 1]
    assert [part.load(i)[0, 0, 0] for i in range(4)] == [4, 9, 14, 19]
    assert part.name(3) == "image 19"
