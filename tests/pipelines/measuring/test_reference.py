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
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from ldm.metrics import frechet_distance, inception
from ldm.metrics.features import FeatureSet
from pipelines.fid import measure_fid
from pipelines.measuring import reference as references
from pipelines.measuring.reference import (
    PUBLISHED,
    ImageReference,
    identify,
    open_statistics,
    statistics_folders,
    statistics_path,
)
from pipelines.measuring.statistics import SetStatistics, compare_sets
from tests.ldm.metrics.fake_inception import FakeInception, save_fake_inception, save_script
from tests.pipelines.measuring.fid_sides import (
    SIZE,
    direct_features,
    enlarged,
    pictures,
    to_nchw,
    write_folder,
)

DIM = 8


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "ADDRESS", "file:///nowhere")
    return tmp_path / "cache" / "statistics"


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
    together = np.concatenate([shares[0][:3], shares[1][:3], shares[0][3:]])
    assert np.array_equal(together, alone)
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


def test_data_that_changes_meanwhile_is_an_error(folder):
    reference = opened(folder)
    (folder / "004.png").unlink()
    with pytest.raises(LdmError, match=r"004.png no longer exists"):
        reference.content()


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
def extractor(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    return inception.load_inception(save_fake_inception(tmp_path, DIM), "cpu")


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
    assert sum(seen) == 12 and first.origin["kept"] is False
    second = statistics(reference, Spy())
    assert sum(seen) == 12 and second.origin["kept"] is True
    (path,) = cache.iterdir()
    assert first.origin["statistics"] == second.origin["statistics"] == str(path)
    assert first.hashes == second.hashes
    assert second.count == 12

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
    assert found.origin == {} and not cache.exists()


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
    assert again.origin["kept"] is False and again.hashes == first.hashes
    said = capsys.readouterr().out
    assert said.startswith("note: ") and "computing the reference's statistics again" in said
    assert statistics(reference, extractor).origin["kept"] is True


def test_a_full_disk_stops_no_measurement(reference, extractor, cache, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    found = statistics(reference, extractor)
    assert found.count == 12 and found.origin["statistics"] is None
    said = capsys.readouterr().out
    assert "note: the reference's statistics are not kept: could not write" in said
    assert list(cache.iterdir()) == []


def test_kept_statistics_name_their_reference(reference, extractor, cache):
    statistics(reference, extractor)
    _, about = FeatureSet.load(next(cache.iterdir()))
    json.dumps(about)
    assert about["reference"]["what"] == reference.what
    assert about["identity"]["content"] == reference.content()
    assert about["created"]


# ------------------------------------------------------------------------ statistics in files
@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    return save_fake_inception(tmp_path, DIM)


@pytest.fixture
def published(weights, monkeypatch):
    """As if the small network were the published one."""
    extractor = inception.load_inception(weights, "cpu")
    monkeypatch.setattr(inception, "SHA256", extractor.sha256)
    assert extractor.is_published
    return extractor


@pytest.fixture
def samples(tmp_path):
    return write_folder(tmp_path / "samples", pictures(10, 0))


@pytest.fixture
def kept(tmp_path, samples, weights, cache):
    """What a measurement leaves of its reference."""
    data = DataConfig(source=str(write_folder(tmp_path / "data", pictures(12, 1, 1.3))), workers=0)
    result = measure_fid(samples, data, "all", weights=weights, device="cpu")
    (path,) = cache.iterdir()
    return path, result


def write_published(folder, name: str, seed: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    features = np.random.default_rng(seed).standard_normal((99, DIM))
    np.savez(folder / name, mu=features.mean(0), sigma=np.cov(features.T))
    return features


# ------------------------------------------------------------------------------ clean-fid's
@pytest.mark.parametrize(
    ("name", "mode", "file"),
    [
        ("ffhq256", "clean", "ffhq_clean_trainval70k_256.npz"),
        ("ffhq1024", "clean", "ffhq_clean_trainval70k_1024.npz"),
        ("ffhq256-50k", "legacy-tensorflow", "ffhq_legacy_tensorflow_trainval_256.npz"),
    ],
)
def test_published_statistics_are_found_by_name(cache, weights, published, name, mode, file):
    features = write_published(cache, file)
    found = open_statistics(name, inception.load_inception(weights, "cpu", mode))
    assert np.allclose(found.known.features.statistics.mean, features.mean(0))
    assert np.allclose(found.known.features.statistics.covariance, np.cov(features.T))
    assert len(found) == PUBLISHED[name].images and found.resolution == int(name[4:].split("-")[0])
    assert len(found.about["statistics_sha256"]) == 64
    assert found.about["statistics"] == str(cache / file)


def test_clean_fids_own_folder_is_searched(tmp_path, published, monkeypatch):
    assert statistics_folders()[1].parts[-2:] == ("cleanfid", "stats")
    folders = [tmp_path / "none", tmp_path / "theirs"]
    monkeypatch.setattr(references, "statistics_folders", lambda: folders)
    write_published(folders[1], "ffhq_clean_trainval70k_256.npz")
    assert open_statistics("ffhq256", published).known.features.dim == DIM


def test_published_statistics_give_fid_alone(tmp_path, cache, published, weights, monkeypatch):
    features = write_published(cache, "ffhq_clean_trainval70k_256.npz")
    large = tmp_path / "large"
    large.mkdir()
    images = [np.asarray(Image.fromarray(one).resize((256, 256))) for one in pictures(9, 2)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(large / f"{i}.png")
    result = measure_fid(large, reference="ffhq256", weights=weights, device="cpu", bootstrap=3)
    ours = direct_features(np.stack(images), DIM)
    direct = frechet_distance(ours.mean(0), np.cov(ours.T), features.mean(0), np.cov(features.T))
    assert result["fid"] == pytest.approx(direct, rel=1e-4)
    assert result["fid_interval"]["low"] <= result["fid"]
    assert result["kid"] is result["precision"] is result["swd"] is None
    assert result["reference"]["what"] == "FFHQ at 256² as clean-fid has it: 70000 images"
    assert result["reference"]["count"] == 70_000
    assert result["warnings"] == [
        "no SWD: it compares patches of images, and the reference is statistics without images; "
        "give the images with --data"
    ]
    assert result["written"] == str(large / "fid-ffhq256.json")
    json.dumps(result)


def test_published_statistics_that_cannot_be_fetched_are_an_error(cache, published):
    with pytest.raises(LdmError) as error:
        open_statistics("ffhq1024", published)
    text = str(error.value)
    assert (
        "\n" not in text and f"put the file at {cache / 'ffhq_clean_trainval70k_1024.npz'}" in text
    )
    assert "--data" in text


def test_damaged_published_statistics_are_an_error(cache, published):
    write_published(cache, "ffhq_clean_trainval70k_256.npz")
    path = cache / "ffhq_clean_trainval70k_256.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LdmError, match="is damaged: delete it to have it fetched again"):
        open_statistics("ffhq256", published)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(LdmError, match="holds 3 features, not 8"):
        open_statistics("ffhq256", published)
    np.savez(path, mu=np.full(DIM, np.nan), sigma=np.eye(DIM))
    with pytest.raises(LdmError, match="is damaged"):
        open_statistics("ffhq256", published)


def test_published_statistics_refuse_another_network(weights):
    other = inception.load_inception(weights, "cpu")
    with pytest.raises(
        LdmError,
        match="are of the published Inception, and the samples' features of another extractor",
    ):
        open_statistics("ffhq256", other)


# --------------------------------------------------------------------------------- our own
def test_kept_statistics_stand_for_the_images(tmp_path, samples, weights, kept):
    path, first = kept
    again = measure_fid(samples, reference=str(path), weights=weights, device="cpu")
    for name in ("fid", "kid", "precision", "recall"):
        assert again[name] == pytest.approx(first[name], rel=1e-9)
    assert again["swd"] is None, "there are no images"
    assert again["reference"]["what"] == first["reference"]["what"]
    assert again["reference"]["content"] == first["reference"]["content"]


def test_copies_are_found_without_the_images(tmp_path, samples, weights, kept):
    Image.fromarray(pictures(12, 1, 1.3)[5]).save(samples / "copy.png")
    with pytest.raises(LdmError, match=r"1 of 11 samples \(such as .*copy.png\) are images of"):
        measure_fid(samples, reference=str(kept[0]), weights=weights, device="cpu")


def test_kept_statistics_refuse_another_extractor(tmp_path, samples, weights, kept):
    path, _ = kept
    with pytest.raises(LdmError) as error:
        measure_fid(
            samples, reference=str(path), weights=weights, device="cpu", mode="legacy-tensorflow"
        )
    text = str(error.value)
    assert "\n" not in text and "are of another extractor (clean, SHA-256" in text
    network = FakeInception(DIM)
    network.layers.weight += 1
    other = save_script(network, tmp_path / "other.pt")
    with pytest.raises(LdmError, match="are of another extractor"):
        measure_fid(samples, reference=str(path), weights=other, device="cpu")


def test_kept_statistics_refuse_another_size(tmp_path, weights, kept):
    (tmp_path / "large").mkdir()
    for i, picture in enumerate(pictures(9, 2)):
        Image.fromarray(picture).resize((32, 32)).save(tmp_path / "large" / f"{i}.png")
    with pytest.raises(LdmError, match=r"are 24×24 and the samples 32×32: FID between sizes"):
        measure_fid(tmp_path / "large", reference=str(kept[0]), weights=weights, device="cpu")


def test_files_that_are_no_statistics_are_errors(tmp_path, published):
    with pytest.raises(UsageError, match="no reference 'ffhq512': give ffhq256, ffhq1024"):
        open_statistics("ffhq512", published)
    with pytest.raises(UsageError, match="images are given with --data"):
        open_statistics(str(tmp_path), published)
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(DIM), sigma=np.eye(DIM))
    with pytest.raises(LdmError, match="is damaged or no file of features: delete it"):
        open_statistics(str(path), published)
