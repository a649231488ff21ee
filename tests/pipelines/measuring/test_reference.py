"""References: the images of a data set, the statistics kept of them, and statistics in files."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from ldm.data import DataConfig
from ldm.data.dataset import content_identity
from ldm.data.prepare import prepare
from ldm.errors import LdmError
from ldm.metrics import inception
from ldm.metrics.features import FeatureSet
from pipelines.measuring import reference as references
from pipelines.measuring.reference import ImageReference, identify, statistics_path
from pipelines.measuring.statistics import SetStatistics, compare_sets
from tests.pipelines.measuring.fid_sides import SIZE, enlarged, pictures, to_nchw, write_folder

pytestmark = pytest.mark.usefixtures("cache")


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


def test_the_description_names_the_downsampling(tmp_path):
    large = write_folder(tmp_path / "large", enlarged(THEIRS))
    assert (
        opened(large).what == f"{large}, train: 10 images, centre-cropped, downsampled by lanczos"
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
    assert np.array_equal(shares[0], alone[::2]) and np.array_equal(shares[1], alone[1::2])
    assert all(len(b.k) for rank in (0, 1) for b in reference.batches(6, rank, 2)), "no empty one"


def test_a_part_holds_the_chosen_images(folder):
    part = opened(folder).part(np.array([1, 4, 8]))
    assert len(part) == 3 and np.array_equal(pixels(part), THEIRS[[1, 4, 8]])


def test_a_part_counts_corrupt_images_among_the_whole(tmp_path):
    folder = write_folder(tmp_path / "data", pictures(110, seed=2))
    (folder / "004.png").write_bytes(b"no picture")
    whole = ImageReference(DataConfig(source=str(folder), workers=0), "all", SIZE, samples=5)
    assert sum(len(batch.k) for batch in whole.batches(50)) == 109
    part = whole.part(np.array([1, 4, 8]))
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
def content(reference: ImageReference) -> str:
    return content_identity(reference.source, len(reference))


def test_content_is_of_the_bytes_wherever_they_lie(tmp_path, folder):
    before = content(opened(folder))
    assert len(before) == 64 and content(opened(folder)) == before
    shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "003.png", (0, 0))
    assert content(opened(tmp_path / "elsewhere")) == before
    assert content(opened(folder, "all")) != before
    assert content(opened(folder, limit=9)) != before


def test_content_changes_with_every_byte(folder):
    before, held_out = content(opened(folder)), content(opened(folder, "val"))
    changed = bytearray((folder / "004.png").read_bytes())
    changed[-20] ^= 1
    (folder / "004.png").write_bytes(changed)
    assert content(opened(folder)) != before
    assert content(opened(folder, "val")) == held_out, "a file of the other split"


def test_content_changes_with_the_order(folder):
    before = content(opened(folder))
    (folder / "003.png").rename(folder / "x.png")
    (folder / "004.png").rename(folder / "003.png")
    (folder / "x.png").rename(folder / "004.png")
    assert content(opened(folder)) != before


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
        content(opened(packed, split, limit))
        for split, limit in (("train", None), ("train", 5), ("all", None), ("val", None))
    }
    assert len(contents) == 4
    before = content(opened(packed))
    file = packed if kind == "zip" else packed / "train-00001.tar"
    data = file.read_bytes()
    place = data.index(b"\x89PNG") + 60
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert content(opened(packed)) != before


def test_data_that_changes_meanwhile_is_an_error(folder):
    reference = opened(folder)
    (folder / "004.png").unlink()
    with pytest.raises(LdmError, match=r"could not read .*004.png \(No such .*\): do not change"):
        content(reference)


# ------------------------------------------------------------------------------ its filter
def test_the_filter_is_given_where_it_is_known(tmp_path, folder):
    assert opened(folder).filter is None, "of the very size: who knows"
    write_folder(tmp_path / "big", THEIRS.repeat(2, 1).repeat(2, 2))
    assert opened(tmp_path / "big").filter == "lanczos", "downsampled here"
    prepare(tmp_path / "big", tmp_path / "shards", SIZE, "box", held_out=2, workers=0)
    reference = opened(tmp_path / "shards", crop="random")  # a setting of training alone
    assert reference.filter == "box" and reference.about["filter"] == "box"
    assert reference.about["prepared"]["size"] == SIZE


def test_most_images_decide_the_filter(tmp_path):
    write_folder(tmp_path / "data", THEIRS)
    Image.new("RGB", (60, 60)).save(tmp_path / "data" / "zz.png")
    assert opened(tmp_path / "data").filter is None


# --------------------------------------------------------------------------- kept statistics
@pytest.fixture
def extractor(weights):
    return inception.FeatureExtractor(weights, "cpu")


def statistics(reference: ImageReference, extractor) -> SetStatistics:
    return reference.statistics(PartialState(cpu=True), extractor, swd_images=6, batch_size=5)


@pytest.fixture
def reference(tmp_path):
    return open_split(write_folder(tmp_path / "data", THEIRS))


def open_split(folder, split="all") -> ImageReference:
    return ImageReference(DataConfig(source=str(folder), workers=0), split, SIZE, 10)


def test_features_are_computed_once(reference, extractor, cache):
    seen: list[int] = []

    class Spy(inception.FeatureExtractor):
        def __init__(self):
            self.__dict__ |= extractor.__dict__

        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    first = statistics(reference, Spy())
    (path,) = cache.iterdir()
    origin = {"kept": False, "statistics": str(path), "content": content(reference)}
    assert sum(seen) == 12 and reference.about | origin == reference.about
    second = statistics(reference, Spy())
    origin["kept"] = True
    assert sum(seen) == 12 and reference.about | origin == reference.about
    assert first.hashes == second.hashes
    assert second.features.count == 12

    images = to_nchw(pictures(9, 3))
    ours = SetStatistics(9, SIZE, extractor, 6)
    ours.update(images, torch.arange(9), extractor)
    one, other = (compare_sets(ours, theirs, "cpu") for theirs in (first, second))
    assert one["swd"] == other["swd"] and one["swd_images"] == 6
    assert (one["precision"], one["recall"]) == (other["precision"], other["recall"])
    for name in ("fid", "kid"):
        assert one[name] == pytest.approx(other[name], rel=1e-9)


def test_whatever_changes_the_features_changes_the_key(tmp_path, reference, extractor, monkeypatch):
    def path(of: ImageReference):
        return statistics_path(identify(of, extractor))

    paths = {path(reference), path(open_split(tmp_path / "data", "train"))}
    (tmp_path / "data" / "000.png").write_bytes((tmp_path / "data" / "001.png").read_bytes())
    changed = open_split(tmp_path / "data")
    paths.add(path(changed))
    monkeypatch.setattr(extractor, "mode", "legacy-tensorflow")
    paths.add(path(changed))
    monkeypatch.setattr(extractor, "sha256", "0" * 64)
    paths.add(path(changed))
    monkeypatch.setattr(references, "version", lambda name: "0")
    paths.add(path(changed))
    assert len(paths) == 6


def test_statistics_of_deep_images_are_computed_once(tmp_path, extractor, cache):
    (tmp_path / "deep").mkdir()
    for i, picture in enumerate(THEIRS):
        Image.fromarray(picture[..., 0].astype(np.uint16) * 16).save(tmp_path / f"deep/{i:02}.png")
    config = DataConfig(source=str(tmp_path / "deep"), workers=0, channels=1, range=(0, 4080))
    reference = ImageReference(config, "all", SIZE, 10)
    for kept in (False, True):
        statistics(reference, extractor)
        assert reference.about["kept"] is kept
    found = identify(reference, extractor)
    assert found is not None and (found["dtype"], found["range"]) == ("uint16", [0, 4080])


def test_statistics_that_are_not_kept(tmp_path, reference, extractor, cache):
    photos = ImageReference(DataConfig(), "all", SIZE, 20)
    assert identify(photos, extractor) is None
    assert identify(ImageReference(DataConfig(), "val", SIZE, 20), extractor) is None
    few = open_split(write_folder(tmp_path / "few", THEIRS[:7]))
    assert identify(few, extractor) is None
    assert identify(reference, None) is None

    class Own:
        name, sha256, dim, is_published = "own:one", "0" * 64, 3, False

        def __call__(self, images):
            return images.float().mean((2, 3))

    found = statistics(reference, Own())
    assert found.features.count == 12 and "kept" not in reference.about and not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "other", "prints"])
def test_damaged_statistics_are_reported_and_computed_again(
    reference, extractor, cache, capsys, damage
):
    first = statistics(reference, extractor)
    (path,) = cache.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        features, about = FeatureSet.load(path)
        if damage == "other":
            about["identity"]["content"] = "0" * 64
        else:
            about["fingerprints"] = "?"
        features.save(path, about)
    again = statistics(reference, extractor)
    assert reference.about["kept"] is False and again.hashes == first.hashes
    said = capsys.readouterr().out
    assert said.startswith("note: ") and "computing the reference's statistics again" in said
    statistics(reference, extractor)
    assert reference.about["kept"] is True


def test_a_full_disk_stops_no_measurement(reference, extractor, cache, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    found = statistics(reference, extractor)
    assert found.features.count == 12 and reference.about["statistics"] is None
    said = capsys.readouterr().out
    assert "note: the reference's statistics are not kept: could not write" in said
    assert list(cache.iterdir()) == []


def test_kept_statistics_name_their_reference(reference, extractor, cache):
    statistics(reference, extractor)
    _, about = FeatureSet.load(next(cache.iterdir()))
    json.dumps(about)
    assert about["reference"]["what"] == reference.what
    assert about["identity"]["content"] == content(reference)
    assert about["created"]
