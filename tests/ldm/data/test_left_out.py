"""The kind of a data set's files is decided once, and files that are left out are named."""

import gzip
import logging
import os
import tarfile

import pytest

from ldm.data import DataConfig, open_source, sources
from ldm.data.dataset import find_kind, open_images
from ldm.data.transforms import FORMATS
from ldm.errors import LdmError
from pipelines.sampling.sample_folder import SampleFolder
from tests.ldm.data.pictures import coordinates, encode
from tests.ldm.data.test_labels import in_folder, in_tar, in_zip

PNG = encode(coordinates(0))


@pytest.fixture(autouse=True)
def notes(monkeypatch, caplog):
    """The notes of a test, which are told again in every test."""
    monkeypatch.setattr(sources, "_told", set())
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("container", [in_folder, in_zip, in_tar])
def test_files_that_are_no_images_are_counted_by_their_suffixes(tmp_path, notes, container):
    files = {"1.png": PNG, "2.jp2": b"", "3.JP2": b"", "4.heic": b"", "._1.png": b"", "README": b""}
    path = container(tmp_path / "data", files)
    assert len(open_images(path)) == 1
    [note] = notes.messages
    assert note.startswith(f"{path}: 1 images (left out: 2 .jp2, ")
    for part in ("1 .heic", "1 hidden", "1 without a suffix", "such as 2.jp2)"):
        assert part in note
    open_source(DataConfig(source=str(path), held_out=0), "all", 16)
    assert len(notes.messages) == 1, "once"


@pytest.mark.parametrize("container", [in_folder, in_zip, in_tar])
def test_nothing_is_said_where_nothing_is_left_out(tmp_path, notes, container):
    files = {"1.png": PNG, "dataset.json": b"{}"} if container != in_tar else {"1.png": PNG}
    assert len(open_images(container(tmp_path / "data", files | {"1.cls": b"1"}))) == 1
    assert not notes.messages


def test_other_processes_say_nothing(tmp_path, notes, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    open_images(in_folder(tmp_path / "data", {"1.png": PNG, "2.jp2": b""}))
    assert not notes.messages


def test_members_with_two_dots_and_links_are_named(tmp_path, notes):
    path = in_tar(tmp_path / "a", {"1.png": PNG, "1.seg.png": PNG, "v1.2.png": PNG})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        tar.addfile(link)
    assert len(open_images(path)) == 1
    [note] = notes.messages
    assert "2 images with two dots in their names, 1 links, such as 1.seg.png" in note


def test_folders_that_cannot_be_read_are_named(tmp_path, notes, monkeypatch):
    path = in_folder(tmp_path / "data", {"1.png": PNG, "closed/2.png": PNG})
    scan = os.scandir

    def refuse(folder):
        if os.fspath(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert len(open_images(path)) == 1
    assert f"1 folders that cannot be read, such as {path}/closed" in notes.text


SUFFIXES = {
    ".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".apng": "PNG", ".dib": "BMP", ".gif": "GIF",
    ".avif": "AVIF",
}  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "kind"), [(s, kind) for s, kind in SUFFIXES.items() if kind in FORMATS]
)
def test_suffixes_of_all_formats_are_read(tmp_path, suffix, kind):
    path = in_folder(tmp_path / "data", {f"1{suffix}": encode(coordinates(0), kind)})
    assert open_images(path).load(0).shape == (48, 40, 3)


# --------------------------------------------------------------------------- images beside tars
def test_a_stray_tar_does_not_take_the_place_of_images(tmp_path, notes):
    path = in_folder(tmp_path / "data", {f"x/{n}.png": PNG for n in range(3)})
    in_tar(path / "backup", {"1.png": PNG})
    assert find_kind(path) == "images" and len(open_images(path)) == 3
    assert f"{path}: read as images; its shards (backup.tar) are left out" in notes.messages


def test_a_preview_does_not_take_the_place_of_shards(tmp_path, notes):
    path = in_folder(tmp_path / "data", {"preview.png": PNG})
    for number in range(3):
        in_tar(path / f"{number:05d}", {f"{number}.png": PNG})
    assert find_kind(path) == "shards" and len(open_images(path)) == 3
    assert f"{path}: read as shards; its images (preview.png) are left out" in notes.messages


def test_hidden_copies_of_shards_and_samples_do_not_count(tmp_path):
    path = in_folder(tmp_path / "data", {"._00000.tar": b"macOS"})
    in_tar(path / "00000", {"0.png": PNG})
    assert len(open_images(path)) == 1
    square = encode(coordinates(0, 32, 32))
    pngs = {"0.png": square, "1.png": square, "._0.png": b"macOS", ".x/1.png": PNG}
    assert len(SampleFolder(in_folder(tmp_path / "samples", pngs))) == 2


def test_suffixes_in_upper_case(tmp_path):
    tar = in_tar(tmp_path / "a", {"0.png": PNG}).rename(tmp_path / "A.TAR")
    archive = in_zip(tmp_path / "b", {"0.png": PNG}).rename(tmp_path / "B.ZIP")
    assert len(open_images(tar)) == len(open_images(archive)) == 1
    folder = tmp_path / "shards"
    folder.mkdir()
    tar.rename(folder / "A.TAR")
    assert len(open_images(folder)) == 1


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tars_are_not_read_but_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(in_tar(tmp_path / "x", {"0.png": PNG}).read_bytes()))
    with pytest.raises(LdmError, match=rf"{name} is compressed: unpack it by gunzip first"):
        open_images(path)
