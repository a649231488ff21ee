"""Comparisons that mean nothing are refused in one line; with --force the line is stored."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.data.loader import find_filter, read_preparation
from ldm.data.prepare import prepare
from ldm.errors import LdmError
from pipelines.fid import find_compressed, find_limits, measure_fid, samples_preparation
from pipelines.measuring.statistics import MeasureOptions
from tests.pipelines.measuring.fid_sides import (
    SIZE,
    enlarged,
    pictures,
    write_folder,
    write_samples,
)

OURS, THEIRS = pictures(10, 0), pictures(12, 1, 1.3)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data", THEIRS)


@pytest.fixture
def refused(samples, weights):
    """The error of a refused comparison; with --force it is measured, and stores the issue."""

    def call(folder=samples, forced=True, **given) -> str:
        options = {"weights": weights, "device": "cpu"} | given
        with pytest.raises(LdmError) as error:
            measure_fid(folder, **options)
        text = str(error.value)
        assert "\n" not in text and not (folder / "fid.json").exists()
        if forced:
            issue = text.removesuffix("; --force measures anyway")
            assert issue != text
            result = measure_fid(folder, **options, force=True)
            assert issue in result["warnings"] and result["fid"] is not None
            assert issue in json.loads(Path(result["written"]).read_text())["warnings"]
        return text

    return call


def source(path, **settings) -> DataConfig:
    return DataConfig(source=str(path), workers=0, **settings)


def test_a_sound_comparison_has_no_issues(samples, data, weights):
    result = measure_fid(samples, source(data), "train", weights=weights, device="cpu")
    assert len(result["warnings"]) == 1 and "not the published" in result["warnings"][0]
    assert result["forced"] is False


def test_fewer_images_than_features_are_refused(tmp_path, data, refused):
    text = refused(split="val")
    assert text.startswith(
        "FID over 10 samples and 3 images is biased upwards, and with fewer than 8"
    )
    few = write_samples(tmp_path / "few", OURS[:7], tmp_path / "data")
    assert "FID over 7 samples and 9 images" in refused(few, split="train")


def test_all_training_images_as_reference_are_refused(tmp_path, samples, data, refused, weights):
    mark = json.loads((samples / "samples.json").read_text())
    mark["data"]["held_out"] = 0
    (samples / "samples.json").write_text(json.dumps(mark))
    text = refused()
    assert "are all images that the model was trained on, and none is held out" in text
    assert "if that is intended, as in many papers, give --split train" in text
    for split in ("train", "all"):
        said = measure_fid(samples, split=split, weights=weights, device="cpu")
        assert len(said["warnings"]) == 1 and said["reference"]["split_asked"] == split
    (samples / "fid.json").unlink()
    assert "trained on" in refused(data=str(data), forced=False)


def test_other_filters_are_refused(tmp_path, samples, weights, refused):
    large = write_folder(tmp_path / "large", enlarged(THEIRS))
    for name in ("box", "lanczos"):
        prepare(large, tmp_path / name, SIZE, name, held_out=1, workers=0)
    mark = json.loads((samples / "samples.json").read_text())
    mark["data"] = {"source": str(tmp_path / "box"), "workers": 0}
    (samples / "samples.json").write_text(json.dumps(mark))
    text = refused(data=str(tmp_path / "lanczos"))
    assert "were downsampled by lanczos, and the samples' training images by box" in text
    same = measure_fid(samples, str(tmp_path / "box"), weights=weights, device="cpu")
    assert len(same["warnings"]) == 1 and same["samples"]["filter"] == "box"
    mark["data"]["source"] = str(tmp_path / "gone")  # an unknown filter is no issue
    (samples / "samples.json").write_text(json.dumps(mark))
    unknown = measure_fid(samples, str(tmp_path / "lanczos"), weights=weights, device="cpu")
    assert len(unknown["warnings"]) == 1 and unknown["samples"]["filter"] is None


def test_crops_against_whole_images_are_refused(tmp_path, samples, data, weights, refused):
    large = write_folder(tmp_path / "large", enlarged(THEIRS))

    def learnt(source, crop) -> None:
        mark = json.loads((samples / "samples.json").read_text())
        mark["data"] = {"source": str(source), "crop": crop, "held_out": 3, "workers": 0}
        (samples / "samples.json").write_text(json.dumps(mark))

    def sound(**given) -> bool:
        result = measure_fid(samples, **given, weights=weights, device="cpu")
        return len(result["warnings"]) == 1

    learnt(large, "random")
    text = refused()
    assert text.startswith(f"{large}, all: 12 images, centre-cropped, downsampled by lanczos are")
    assert "trained on crops of larger ones at native size (data.crop=random)" in text
    assert "give --data of such crops, 24×24 each; --force" in text
    assert sound(data=str(data)), "of this size they may be such crops"
    assert sound(data="photos"), "these are crops themselves"
    for source, crop in ((large, "center"), (data, "random"), ("photos", "random")):
        learnt(source, crop)
        assert sound(data=str(large)), (source, crop)


def test_the_filter_of_prepared_samples_is_their_own(tmp_path, refused):
    mine, large = (
        write_folder(tmp_path / name, enlarged(images))
        for name, images in (("mine", OURS), ("large", THEIRS))
    )
    prepare(mine, tmp_path / "made", SIZE, "bicubic", workers=0)
    prepare(large, tmp_path / "lanczos", SIZE, "lanczos", held_out=1, workers=0)
    text = refused(tmp_path / "made", data=str(tmp_path / "lanczos"))
    assert "downsampled by lanczos" in text and "by bicubic" in text


def test_compressed_reference_images_are_refused(tmp_path, samples, weights, refused):
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for i, picture in enumerate(THEIRS):
        Image.fromarray(picture).save(folder / f"{i:02}.jpg", quality=90)
    text = refused(data=str(folder))
    assert "00.jpg is compressed at the size of the comparison, and the samples are not" in text
    large = tmp_path / "large"
    large.mkdir()
    for i, picture in enumerate(THEIRS.repeat(3, 1).repeat(3, 2)):
        Image.fromarray(picture).save(large / f"{i:02}.jpg", quality=90)
    fine = measure_fid(samples, str(large), weights=weights, device="cpu")
    assert len(fine["warnings"]) == 1, "downsampling leaves little of the compression"


def test_copies_of_reference_images_are_refused(tmp_path, samples, data, weights, refused):
    folder = write_samples(tmp_path / "copies", np.concatenate([OURS, THEIRS[2:4]]), None)
    text = refused(folder, data=str(data), split="train")
    assert text.startswith(f"2 of 12 samples (such as {folder}/00000/img00000010.png) are images")
    # the same pixels in another file, of another format
    (data / "002.png").unlink()
    Image.fromarray(THEIRS[2]).save(data / "002.bmp")
    assert "2 of 12 samples" in refused(folder, data=str(data), split="train")


def test_force_does_not_help_against_other_sizes(tmp_path, samples, weights):
    prepare(
        write_folder(tmp_path / "big", THEIRS.repeat(2, 1).repeat(2, 2)),
        tmp_path / "48", 48, held_out=1, workers=0,
    )  # fmt: skip
    with pytest.raises(LdmError, match="prepared at 48×48 and the samples are 24×24"):
        measure_fid(samples, source(tmp_path / "48"), weights=weights, device="cpu", force=True)


def test_force_does_not_help_against_compressed_samples(tmp_path, data, weights):
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for i, picture in enumerate(OURS):
        Image.fromarray(picture).save(folder / f"{i}.jpg")
    with pytest.raises(LdmError, match="holds compressed images"):
        measure_fid(folder, source(data), weights=weights, device="cpu", force=True)


# ----------------------------------------------------------------------------------- issues
def test_force_overrides_refusals():
    assert MeasureOptions().refuse([]) == []
    with pytest.raises(LdmError, match=r"^a doubt; --force measures anyway$"):
        MeasureOptions().refuse(["a doubt", "another"])
    assert MeasureOptions(force=True).refuse(["a doubt", "another"]) == ["a doubt", "another"]


def test_another_network_than_inception_limits_the_numbers():
    reference = SimpleNamespace(source="images")

    def limits(is_published, mode=None):
        other = SimpleNamespace(name="a:b", is_published=is_published, mode=mode)
        return list(find_limits(reference, other))

    assert limits(True, "clean") == list(find_limits(reference, None)) == []
    [note] = limits(False)
    assert "the features are of a:b" in note
    [note] = limits(False, "clean")
    assert "not the published Inception" in note


# ----------------------------------------------------------------- facts about a data set
IMAGES = pictures(4, 0)


def config(path, **settings) -> DataConfig:
    return DataConfig(source=str(path), held_out=1, workers=0, **settings)


def training_filter(data: DataConfig, resolution: int) -> str | None:
    samples = SimpleNamespace(made_with={}, resolution=resolution)
    found, crops = samples_preparation(samples, data)
    assert not crops or data.crop == "random"
    return found


def test_preparation_is_read_from_the_manifest(tmp_path):
    folder = write_folder(tmp_path / "data", enlarged(IMAGES))
    assert read_preparation(config(folder)) is None and read_preparation(DataConfig()) is None
    prepare(folder, tmp_path / "shards", SIZE, "box", held_out=1, workers=0)
    for path in (tmp_path / "shards", tmp_path / "shards" / "train-00000.tar"):
        assert read_preparation(config(path))["filter"] == "box"


def test_the_filter_of_training_images_is_known_while_they_are_there(tmp_path):
    folder = write_folder(tmp_path / "data", enlarged(enlarged(IMAGES)))
    prepare(folder, tmp_path / "shards", 2 * SIZE, "box", held_out=1, workers=0)
    assert training_filter(config(tmp_path / "shards"), SIZE) == "box, then lanczos"
    assert training_filter(config(tmp_path / "shards"), 2 * SIZE) == "box"
    assert training_filter(config(folder), SIZE) == "lanczos"
    assert training_filter(config(folder), 4 * SIZE) is None
    assert training_filter(config(folder, crop="random"), SIZE) is None
    assert training_filter(config(tmp_path / "gone"), SIZE) is None
    assert training_filter(DataConfig(), SIZE) is None


def test_shards_that_were_not_resized_have_no_filter(tmp_path):
    prepare(write_folder(tmp_path / "data", IMAGES), tmp_path / "s", SIZE, held_out=1, workers=0)
    source = open_source(config(tmp_path / "s"), "train", SIZE)
    assert find_filter(config(tmp_path / "s"), source, SIZE) is None


def test_a_compressed_image_of_the_very_size_is_found(tmp_path):
    folder = write_folder(tmp_path / "data", IMAGES)
    (folder / "broken.jpg").write_bytes(b"no image")
    large = np.asarray(Image.fromarray(IMAGES[0]).resize((50, 40)))
    Image.fromarray(large).save(folder / "large.jpg")
    source = open_source(config(folder), "all", SIZE)
    assert find_compressed(source, SIZE) is None
    assert find_compressed(source, 40) == f"{folder}/large.jpg"
