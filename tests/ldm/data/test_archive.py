import io
import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest

from ldm.data.sources import ZipSource
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError
from tests.ldm.data.pictures import encode, noise, zip_file


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
    with pytest.raises(LdmError, match=r"images\.zip is truncated or no zip archive: copy it"):
        ZipSource(edm_zip)


def test_a_zip_without_images_says_what_is_read(tmp_path):
    path = zip_file(tmp_path / "empty.zip", {"a.txt": b""})
    with pytest.raises(LdmError, match=r"empty\.zip holds no images: \.png"):
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
    def read(self, name):
        raise EOFError

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(CorruptImage, match="EOFError"):
        ZipSource(edm_zip).load(0)
