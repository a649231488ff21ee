"""Statistics of a reference are computed once, and again where anything has changed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from ldm.data import DataConfig
from ldm.metrics import inception
from ldm.metrics.features import FeatureSet
from pipelines.measuring import reference as kept_statistics
from pipelines.measuring.reference import ImageReference, identify, survey_reference
from pipelines.measuring.statistics import Tools, compare_surveys
from tests.ldm.metrics.fake_inception import save_fake_inception
from tests.pipelines.measuring.fid_sides import SIZE, pictures, to_nchw, write_folder

DIM = 8
THEIRS = pictures(12, seed=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def tools(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    extractor = inception.load_inception(save_fake_inception(tmp_path, DIM), "cpu")
    cpu = torch.device("cpu")
    return Tools(extractor, cpu, 5, 0, PartialState(cpu=True), swd_images=6)


@pytest.fixture
def reference(tmp_path):
    folder = write_folder(tmp_path / "data", THEIRS)
    return open_split(folder)


def open_split(folder, split="all") -> ImageReference:
    return ImageReference(DataConfig(source=str(folder), workers=0), split, SIZE, 10)


def count_calls(tools: Tools) -> list[int]:
    """How many images the extractor sees from here on."""
    seen: list[int] = []
    original = tools.extractor

    class Spy(inception.FeatureExtractor):
        def __init__(self):
            self.__dict__ |= original.__dict__

        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    object.__setattr__(tools, "extractor", Spy())
    return seen


def test_the_second_time_no_feature_is_computed(reference, tools, cache):
    seen = count_calls(tools)
    first = survey_reference(reference, tools, "clean")
    assert sum(seen) == 12 and first.about["kept"] is False
    second = survey_reference(reference, tools, "clean")
    assert sum(seen) == 12 and second.about["kept"] is True
    (path,) = cache.iterdir()
    assert first.about["statistics"] == second.about["statistics"] == str(path)
    assert np.array_equal(first.prints, second.prints)
    assert second.survey.count == 12

    images = to_nchw(pictures(9, 3))
    from pipelines.measuring.statistics import Surveyor

    surveyor = Surveyor(9, SIZE, tools.extractor, "cpu", 6)
    surveyor.add(images, torch.arange(9))
    one, other = (compare_surveys(surveyor.survey, seen.survey, "cpu") for seen in (first, second))
    assert one["swd"] == other["swd"] and one["swd_images"] == 6
    assert (one["precision"], one["recall"]) == (other["precision"], other["recall"])
    for name in ("fid", "kid"):
        assert one[name] == pytest.approx(other[name], rel=1e-9)


def test_whatever_changes_the_features_is_another_key(tmp_path, reference, tools, monkeypatch):
    identity = identify(reference, tools.extractor, "clean")
    paths = {kept_statistics.statistics_path(identity)}
    paths.add(kept_statistics.statistics_path(identify(reference, tools.extractor, "legacy")))
    train = open_split(tmp_path / "data", "train")
    paths.add(kept_statistics.statistics_path(identify(train, tools.extractor, "clean")))
    (tmp_path / "data" / "000.png").write_bytes((tmp_path / "data" / "001.png").read_bytes())
    changed = open_split(tmp_path / "data")
    paths.add(kept_statistics.statistics_path(identify(changed, tools.extractor, "clean")))
    monkeypatch.setattr(tools.extractor, "sha256", "0" * 64)
    paths.add(kept_statistics.statistics_path(identify(changed, tools.extractor, "clean")))
    monkeypatch.setattr(kept_statistics, "version", lambda name: "0")
    paths.add(kept_statistics.statistics_path(identify(changed, tools.extractor, "clean")))
    assert len(paths) == 6


def test_what_is_not_kept(tmp_path, reference, tools, cache):
    photos = ImageReference(DataConfig(), "all", SIZE, 20)
    assert identify(photos, tools.extractor, "clean") is None
    assert identify(ImageReference(DataConfig(), "val", SIZE, 20), tools.extractor, "clean") is None
    few = open_split(write_folder(tmp_path / "few", THEIRS[:7]))
    assert identify(few, tools.extractor, "clean") is None
    assert identify(reference, None, "clean") is None

    class Own:
        name, sha256, dim, is_published = "own:one", "0" * 64, 3, False

        def __call__(self, images):
            return images.float().mean((2, 3))

    survey = survey_reference(reference, replace(tools, extractor=Own()), "clean")
    assert survey.about == {} and not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "other", "prints"])
def test_damage_is_told_and_computed_again(reference, tools, cache, capsys, damage):
    first = survey_reference(reference, tools, "clean")
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
    again = survey_reference(reference, tools, "clean")
    assert again.about["kept"] is False and np.array_equal(again.prints, first.prints)
    said = capsys.readouterr().out
    assert said.startswith("note: ") and "computing the reference's statistics anew" in said
    assert survey_reference(reference, tools, "clean").about["kept"] is True


def test_where_there_is_no_room_the_work_goes_on(reference, tools, cache, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    seen = survey_reference(reference, tools, "clean")
    assert seen.survey.count == 12 and seen.about["statistics"] is None
    said = capsys.readouterr().out
    assert "note: the reference's statistics are not kept: could not write" in said
    assert list(cache.iterdir()) == []


def test_what_is_kept_says_what_it_is_of(reference, tools, cache):
    survey_reference(reference, tools, "clean")
    _, about = FeatureSet.load(next(cache.iterdir()))
    json.dumps(about)
    assert about["reference"]["what"] == reference.what
    assert about["identity"]["content"] == reference.content()
    assert about["created"]
