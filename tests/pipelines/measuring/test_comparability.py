"""Comparisons that mean nothing are refused in one line; told to go on, they carry it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig
from ldm.data.prepare import prepare
from ldm.errors import LdmError
from ldm.metrics import inception
from pipelines.fid import fid_of_samples, measure_fid
from tests.ldm.metrics.fake_inception import save_fake_inception
from tests.pipelines.measuring.fid_sides import (
    SIZE,
    enlarged,
    pictures,
    write_folder,
    write_samples,
)

DIM = 8
OURS, THEIRS = pictures(10, 0), pictures(12, 1, 1.3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    return save_fake_inception(tmp_path, DIM)


@pytest.fixture
def samples(tmp_path):
    return write_samples(tmp_path / "samples", OURS, tmp_path / "data")


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data", THEIRS)


@pytest.fixture
def refused(samples, weights):
    """The line that a comparison is refused with; with --force it is measured, and carries it."""

    def call(folder=samples, forced=True, **given) -> str:
        options = {"weights": weights, "device": "cpu"} | given
        with pytest.raises(LdmError) as error:
            fid_of_samples(folder, **options)
        text = str(error.value)
        assert "\n" not in text and not (folder / "fid.json").exists()
        if forced:
            doubt = text.removesuffix("; --force measures all the same")
            assert doubt != text
            result = fid_of_samples(folder, **options, force=True)
            assert doubt in result["warnings"] and result["fid"] is not None
            assert doubt in json.loads(Path(result["written"]).read_text())["warnings"]
        return text

    return call


def source(path, **settings) -> DataConfig:
    return DataConfig(source=str(path), workers=0, **settings)


def test_a_sound_comparison_has_no_doubts(samples, data, weights):
    result = measure_fid(samples, source(data), "train", weights, "cpu")
    assert len(result["warnings"]) == 1 and "not the published" in result["warnings"][0]
    assert result["forced"] is False


def test_fewer_images_than_features(tmp_path, data, refused):
    text = refused(split="val")
    assert text.startswith("FID over 10 samples and 3 images is biased upwards, and below 8")
    few = write_samples(tmp_path / "few", OURS[:7], tmp_path / "data")
    assert "FID over 7 samples and 9 images" in refused(few, split="train")


def test_all_that_was_trained_on(tmp_path, samples, data, refused, weights):
    mark = json.loads((samples / "samples.json").read_text())
    mark["data"]["held_out"] = 0
    (samples / "samples.json").write_text(json.dumps(mark))
    text = refused()
    assert "are all images that the model was trained on, none is held out" in text
    assert "if that is meant, as in many papers, say --split train" in text
    for split in ("train", "all"):
        said = fid_of_samples(samples, split=split, weights=weights, device="cpu")
        assert len(said["warnings"]) == 1 and said["reference"]["split_asked"] == split
    (samples / "fid.json").unlink()
    assert "trained on" in refused(data=str(data), forced=False)


def test_other_filters(tmp_path, samples, weights, refused):
    large = write_folder(tmp_path / "large", enlarged(THEIRS))
    for name in ("box", "lanczos"):
        prepare(large, tmp_path / name, SIZE, name, held_out=1, workers=0)
    mark = json.loads((samples / "samples.json").read_text())
    mark["data"] = {"source": str(tmp_path / "box"), "workers": 0}
    (samples / "samples.json").write_text(json.dumps(mark))
    text = refused(data=str(tmp_path / "lanczos"))
    assert "were brought down by lanczos, and what the samples were learnt from by box" in text
    same = fid_of_samples(samples, str(tmp_path / "box"), weights=weights, device="cpu")
    assert len(same["warnings"]) == 1 and same["samples"]["filter"] == "box"
    mark["data"]["source"] = str(tmp_path / "gone")  # what is not known is not held against them
    (samples / "samples.json").write_text(json.dumps(mark))
    unknown = fid_of_samples(samples, str(tmp_path / "lanczos"), weights=weights, device="cpu")
    assert len(unknown["warnings"]) == 1 and unknown["samples"]["filter"] is None


def test_windows_against_whole_images(tmp_path, samples, data, weights, refused):
    large = write_folder(tmp_path / "large", enlarged(THEIRS))

    def learnt(source, crop) -> None:
        mark = json.loads((samples / "samples.json").read_text())
        mark["data"] = {"source": str(source), "crop": crop, "held_out": 3, "workers": 0}
        (samples / "samples.json").write_text(json.dumps(mark))

    def sound(**given) -> bool:
        result = fid_of_samples(samples, **given, weights=weights, device="cpu")
        return len(result["warnings"]) == 1

    learnt(large, "random")
    text = refused()
    assert text.startswith(f"{large}, all: 12 images, centre-cropped, brought down by lanczos are")
    assert "learnt from windows of larger ones at native size (data.crop=random)" in text
    assert "give --data of such windows, 24×24 each; --force" in text
    assert sound(data=str(data)), "of this size they may be such windows"
    assert sound(data="photos"), "these are windows themselves"
    for source, crop in ((large, "center"), (data, "random"), ("photos", "random")):
        learnt(source, crop)
        assert sound(data=str(large)), (source, crop)


def test_samples_that_were_prepared_themselves(tmp_path, refused):
    mine, large = (
        write_folder(tmp_path / name, enlarged(images))
        for name, images in (("mine", OURS), ("large", THEIRS))
    )
    prepare(mine, tmp_path / "made", SIZE, "bicubic", workers=0)
    prepare(large, tmp_path / "lanczos", SIZE, "lanczos", held_out=1, workers=0)
    text = refused(tmp_path / "made", data=str(tmp_path / "lanczos"))
    assert "brought down by lanczos" in text and "by bicubic" in text


def test_compressed_images(tmp_path, samples, weights, refused):
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for i, picture in enumerate(THEIRS):
        Image.fromarray(picture).save(folder / f"{i:02}.jpg", quality=90)
    text = refused(data=str(folder))
    assert "00.jpg is compressed, as it is compared, and samples are not" in text
    large = tmp_path / "large"
    large.mkdir()
    for i, picture in enumerate(THEIRS.repeat(3, 1).repeat(3, 2)):
        Image.fromarray(picture).save(large / f"{i:02}.jpg", quality=90)
    fine = fid_of_samples(samples, str(large), weights=weights, device="cpu")
    assert len(fine["warnings"]) == 1, "brought down, there is little left of the compression"


def test_samples_that_are_images_of_the_reference(tmp_path, samples, data, weights, refused):
    folder = write_samples(tmp_path / "copies", np.concatenate([OURS, THEIRS[2:4]]), None)
    text = refused(folder, data=str(data), split="train")
    assert text.startswith(f"2 of 12 samples ({folder}/00000/img00000010.png, for one) are images")
    # the same pixels in another file, of another format
    (data / "002.png").unlink()
    Image.fromarray(THEIRS[2]).save(data / "002.bmp")
    assert "2 of 12 samples" in refused(folder, data=str(data), split="train")


def test_other_sizes_are_refused_in_any_case(tmp_path, samples, weights):
    prepare(
        write_folder(tmp_path / "big", THEIRS.repeat(2, 1).repeat(2, 2)),
        tmp_path / "48", 48, held_out=1, workers=0,
    )  # fmt: skip
    with pytest.raises(LdmError, match="prepared at 48×48 and the samples are 24×24"):
        measure_fid(samples, source(tmp_path / "48"), None, weights, "cpu", force=True)


def test_samples_compressed_are_refused_in_any_case(tmp_path, data, weights):
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for i, picture in enumerate(OURS):
        Image.fromarray(picture).save(folder / f"{i}.jpg")
    with pytest.raises(LdmError, match="holds compressed images"):
        measure_fid(folder, source(data), None, weights, "cpu", force=True)
