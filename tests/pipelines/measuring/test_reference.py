"""What samples are compared with: which images, and what tells one data set from another."""

import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig
from ldm.data.prepare import prepare
from ldm.errors import LdmError
from pipelines.measuring.reference import ImageReference
from tests.pipelines.measuring.fid_sides import SIZE, enlarged, pictures, write_folder

THEIRS = pictures(12, seed=1)


def opened(path, split="train", limit=None, **settings) -> ImageReference:
    config = DataConfig(source=str(path), held_out=2, workers=0, **settings)
    return ImageReference(config, split, SIZE, samples=99, limit=limit)


def pixels(reference: ImageReference, **share) -> np.ndarray:
    batches = list(reference.batches(3 * share.get("world", 1), **share))
    images = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in batches])
    ks = np.concatenate([batch.k.numpy() for batch in batches])
    return images[np.argsort(ks)]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", THEIRS)


def test_images_are_those_of_the_split(folder):
    assert np.array_equal(pixels(opened(folder)), THEIRS[:10])
    assert np.array_equal(pixels(opened(folder, "val")), THEIRS[10:])
    limited = opened(folder, "all", limit=7)
    assert len(limited) == 7 and np.array_equal(pixels(limited), THEIRS[:7])
    assert limited.what == f"{folder}, all: 7 images, centre-cropped"


def test_images_that_are_resized_say_so(tmp_path):
    large = write_folder(tmp_path / "large", enlarged(THEIRS))
    assert (
        opened(large).what == f"{large}, train: 10 images, centre-cropped, brought down by lanczos"
    )


def test_processes_share_the_images(folder):
    shares = [pixels(opened(folder), rank=rank, world=2) for rank in (0, 1)]
    assert np.array_equal(np.concatenate([shares[0][:3], shares[1][:3]]), THEIRS[:6])
    assert sum(map(len, shares)) == 10


def test_crops_of_photographs_are_as_many_as_samples():
    config = DataConfig(flip=True, workers=0)
    reference = ImageReference(config, "train", SIZE, samples=7)
    alone = pixels(reference)
    assert alone.shape == (7, SIZE, SIZE, 3) and reference.filter is None
    shares = [pixels(reference, rank=rank, world=2) for rank in (0, 1)]
    together = np.concatenate([shares[0][:3], shares[1][:3], shares[0][3:]])
    assert np.array_equal(together, alone)
    assert all(len(b.k) for rank in (0, 1) for b in reference.batches(6, rank, 2)), "no empty one"


def test_a_part_is_those_images(folder):
    import torch

    part = opened(folder).part(torch.tensor([1, 4, 8]))
    assert len(part) == 3 and np.array_equal(pixels(part), THEIRS[[1, 4, 8]])


def test_a_corrupt_image_is_one_of_the_whole_also_in_a_part(tmp_path):
    import torch

    folder = write_folder(tmp_path / "data", pictures(110, seed=2))
    (folder / "004.png").write_bytes(b"no picture")
    whole = ImageReference(DataConfig(source=str(folder), workers=0), "all", SIZE, samples=5)
    assert sum(len(batch.k) for batch in whole.batches(50)) == 109
    part = whole.part(torch.tensor([1, 4, 8]))
    assert np.concatenate([batch.k for batch in part.batches(3)]).tolist() == [0, 2]


def test_corrupt_images_are_counted_among_those_that_are_read(tmp_path):
    """Of a data set of hundreds, the first few, of which none may be missing."""
    folder = write_folder(tmp_path / "data", pictures(210, seed=2))
    for name in ("000.png", "001.png"):
        (folder / name).write_bytes(b"no picture")
    assert len(pixels(opened(folder, "all"))) == 208
    with pytest.raises(LdmError, match="2 of 3 images are corrupt"):
        pixels(opened(folder, "all", limit=3))


# ------------------------------------------------------------------------------ its content
def test_content_is_of_the_bytes_wherever_they_lie(tmp_path, folder):
    content = opened(folder).content()
    assert len(content) == 64 and opened(folder).content() == content
    shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "003.png", (0, 0))
    assert opened(tmp_path / "elsewhere").content() == content
    assert opened(folder, "all").content() != content
    assert opened(folder, limit=9).content() != content


def test_content_changes_with_every_byte(folder):
    content, held_out = opened(folder).content(), opened(folder, "val").content()
    changed = bytearray((folder / "004.png").read_bytes())
    changed[-20] ^= 1
    (folder / "004.png").write_bytes(changed)
    assert opened(folder).content() != content
    assert opened(folder, "val").content() == held_out, "a file of the other split"


def test_content_changes_with_the_order(folder):
    content = opened(folder).content()
    (folder / "003.png").rename(folder / "x.png")
    (folder / "004.png").rename(folder / "003.png")
    (folder / "x.png").rename(folder / "004.png")
    assert opened(folder).content() != content


@pytest.mark.parametrize("kind", ["zip", "shards"])
def test_content_of_archives(tmp_path, folder, kind):
    packed = tmp_path / ("x.zip" if kind == "zip" else "shards")
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
    else:
        prepare(folder, packed, SIZE, held_out=2, shard_size=4, workers=0)
    contents = {
        opened(packed, split, limit).content()
        for split, limit in (("train", None), ("train", 5), ("all", None), ("val", None))
    }
    assert len(contents) == 4
    before = opened(packed).content()
    file = packed if kind == "zip" else packed / "train-00001.tar"
    data = file.read_bytes()
    place = data.index(b"\x89PNG") + 60
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert opened(packed).content() != before


def test_data_that_changes_meanwhile_is_one_line(folder):
    reference = opened(folder)
    (folder / "004.png").unlink()
    with pytest.raises(LdmError, match=r"004.png is not there any more"):
        reference.content()


# ------------------------------------------------------------------------------ its filter
def test_the_filter_is_told_where_it_is_known(tmp_path, folder):
    assert opened(folder).filter is None, "of the very size: who knows"
    write_folder(tmp_path / "big", THEIRS.repeat(2, 1).repeat(2, 2))
    assert opened(tmp_path / "big").filter == "lanczos", "brought down here"
    prepare(tmp_path / "big", tmp_path / "shards", SIZE, "box", held_out=2, workers=0)
    reference = opened(tmp_path / "shards", crop="random")  # a setting of training alone
    assert reference.filter == "box" and reference.about()["filter"] == "box"
    assert reference.prepared["size"] == SIZE


def test_images_of_several_sizes_are_told_by_most(tmp_path):
    write_folder(tmp_path / "data", THEIRS)
    Image.new("RGB", (60, 60)).save(tmp_path / "data" / "zz.png")
    assert opened(tmp_path / "data").filter is None
