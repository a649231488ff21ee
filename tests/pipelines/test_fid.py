"""FID and SWD of samples against a direct computation, on a tiny network instead of Inception."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import DataConfig, batches, open_source
from ldm.errors import UsageError
from ldm.metrics import kernel_distance, precision_recall, sliced_wasserstein
from ldm.seeds import generator
from pipelines.fid import measure_fid
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import SampleStore
from tests.pipelines.measuring.fid_sides import (
    SIZE,
    direct_features,
    direct_fid,
    enlarged,
    pictures,
    to_nchw,
    write_folder,
)
from tests.pipelines.untrained import make_model
from tests.small import ldm

OURS = pictures(10, seed=0)
THEIRS = pictures(15, seed=1, blur=1.3)


pytestmark = pytest.mark.usefixtures("cache")


# --------------------------------------------------------------------------------- numbers
def test_fid_is_the_direct_computation(samples, reference, measure):
    result = measure(samples, reference, batch_size=4)
    assert result["fid"] == pytest.approx(direct_fid(OURS, THEIRS[:12]), rel=1e-4)
    assert result["samples"]["count"] == 10
    assert result["reference"]["count"] == 12


def test_kid_precision_and_recall_are_those_of_the_features(samples, reference, measure):
    result = measure(samples, reference)
    ours, theirs = direct_features(OURS), direct_features(THEIRS[:12])
    kernel, closeness = kernel_distance(ours, theirs), precision_recall(theirs, ours)
    assert result["kid"] == pytest.approx(kernel.mean, rel=1e-4)
    assert result["kid_std"] == pytest.approx(kernel.std, rel=1e-4, abs=1e-12)
    assert (result["precision"], result["recall"]) == closeness


def test_a_mode_resizes_in_its_own_way(samples, reference, measure):
    clean, legacy = (
        measure(samples, reference, mode=mode) for mode in ("clean", "legacy-tensorflow")
    )
    assert clean["fid"] != legacy["fid"]
    assert clean["fid"] == pytest.approx(legacy["fid"], rel=0.2)
    assert (clean["mode"], legacy["mode"]) == ("clean", "legacy-tensorflow")
    assert "legacy" in legacy["extractor"]["name"]


@pytest.mark.parametrize("files", ["zip", "shards"])
def test_samples_in_archives_give_the_same_numbers(tmp_path, samples, reference, measure, files):
    packed = tmp_path / "packed"
    store = SampleStore(packed, files)
    for i, picture in enumerate(OURS):
        store.write(i, Image.fromarray(picture))
    store.finish(picture.shape[0], "samples of a test", ())
    given = packed / {"zip": "samples.zip", "shards": "train-00000.tar"}[files]
    other = measure(given, reference)  # as anybody may have written it
    assert other["samples"]["made_with"] is None
    mark = json.loads((samples / "samples.json").read_text()) | {"files": files}
    (packed / "samples.json").write_text(json.dumps(mark))
    for result in (other, measure(packed, reference)):
        one = measure(samples, reference)
        assert one["fid"] == result["fid"] and one["swd"] == result["swd"]
        assert one["samples"]["fingerprint"] == result["samples"]["fingerprint"]
    written = given.with_name(f"{given.name}.fid.json")
    assert json.loads(written.read_text())["fid"] == other["fid"]


def test_the_held_out_split_alone_is_measured(samples, reference, measure):
    result = measure(samples, reference, "val")
    assert result["fid"] == pytest.approx(direct_fid(OURS, THEIRS[12:]), rel=1e-4)
    assert result["precision"] is None, "three images span no manifold"


def test_the_split_is_all_where_none_is_named(samples, reference, measure):
    result = measure(samples, reference, None)
    assert result["fid"] == pytest.approx(direct_fid(OURS, THEIRS), rel=1e-4)
    assert ", all: 15 images" in result["reference"]["what"]
    assert result["reference"]["split_asked"] is None


def test_the_batch_size_changes_nothing(samples, reference, measure):
    one, other = (
        measure(samples, reference, device=torch.device("cpu"), batch_size=b) for b in (3, 64)
    )
    assert one["fid"] == pytest.approx(other["fid"], rel=1e-6)
    assert one["swd"] == pytest.approx(other["swd"], rel=1e-9)


def test_a_set_against_itself_is_at_zero(tmp_path, reference, measure):
    everything = reference.model_copy(update={"held_out": 0})
    result = measure(tmp_path / "data", everything, "all")
    assert result["fid"] < 1e-3
    # its patches are drawn twice, as published
    assert result["swd"]["mean"] > 0
    assert any(text.startswith("15 of 15 samples") for text in result["warnings"])


def test_swd_is_that_of_equally_many_images(samples, reference, measure):
    """With ten of each, drawing images at random can only change their order."""
    limited = measure(samples, reference, limit=10)
    assert limited["swd_images"] == 10
    assert limited["reference"]["count"] == 10
    direct = sliced_wasserstein(to_nchw(OURS), to_nchw(THEIRS[:10]))
    assert limited["swd"] == pytest.approx(direct, rel=1e-9)


def test_swd_draws_from_the_whole_of_the_larger_set(samples, reference, measure, monkeypatch):
    """A data set may be sorted by class: its first images are not a fair part of it."""
    monkeypatch.setattr("pipelines.fid.SWD_IMAGES", 3)
    result = measure(samples, reference, batch_size=2)
    assert result["swd_images"] == 3
    assert result["samples"]["count"] == 10  # FID is over all
    picks = [np.sort(generator(0, "swd images", 0).permutation(n)[:3]) for n in (10, 12)]
    assert not np.array_equal(picks[1], [0, 1, 2])
    direct = sliced_wasserstein(to_nchw(OURS[picks[0]]), to_nchw(THEIRS[picks[1]]))
    assert result["swd"] == pytest.approx(direct, rel=1e-9)


def test_photographs_are_measured_as_random_crops(samples, measure):
    config = DataConfig(flip=True, workers=0)
    result = measure(samples, config, batch_size=4)
    assert result["reference"]["what"] == "photos, train: 10 random crops, seed 0"
    source = open_source(config, "train", SIZE)
    stream = batches(source, DataConfig(flip=False), SIZE, 0, 0, 10, 10)
    crops = next(iter(stream)).images.permute(0, 2, 3, 1).numpy()
    assert result["fid"] == pytest.approx(direct_fid(OURS, crops), rel=1e-4)


def test_the_interval_lies_about_the_fid(samples, reference, measure):
    result = measure(samples, reference, bootstrap=5)
    interval = result["fid_interval"]
    assert interval["low"] < result["fid"] < interval["high"] and interval["draws"] == 5
    assert measure(samples, reference)["fid_interval"] is None
    assert measure(samples, reference, bootstrap=5)["fid_interval"] == interval


def test_a_users_own_extractor(tmp_path, samples, reference, monkeypatch, capsys):
    (tmp_path / "my_features.py").write_text(
        "def eyes():\n    return lambda images: images.float().mean((2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = measure_fid(samples, reference, "train", features="my_features:eyes", device="cpu")
    a, b = (side.reshape(len(side), -1, 3).mean(1) for side in (OURS, THEIRS[:12]))
    gap = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    assert result["fid"] > gap and result["extractor"]["dim"] == 3
    assert result["mode"] is None
    assert "not with published FIDs and KIDs" in result["warnings"][0]
    assert "note: the features are of my_features:eyes, not" in capsys.readouterr().out


# ------------------------------------------------------------------------ straight from a model
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), 0, ("cat", "dog"))


def test_images_of_a_model_are_those_that_it_writes(tmp_path, model, weights):
    options = {"weights": weights, "device": "cpu", "batch_size": 4, "force": True}
    settings = {"n": 6, "seed": 3, "steps": 2, "precision": "fp32"}
    direct = measure_fid(model=model, data="photos", sampling=settings, **options)
    folder = sample_images(
        model, 6, tmp_path / "out", 3, steps=2, batch_size=4, device="cpu", precision="fp32"
    )
    written = measure_fid(folder, "photos", **options)
    assert direct["samples"]["fingerprint"] == written["samples"]["fingerprint"]
    assert direct["fid"] == written["fid"] and direct["swd"] == written["swd"]
    now, before = (result["samples"]["made_with"] for result in (direct, written))
    assert {key: now[key] for key in now if key != "n"} == {
        key: before[key] for key in now if key != "n"
    }
    path = model / "fid" / "seed3-steps2-n6.json"
    assert json.loads(path.read_text())["fid"] == direct["fid"]
    assert list(model.iterdir()) != [] and not list(model.rglob("*.png"))


def test_a_limit_is_of_the_images_of_a_model_too(model, weights, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def note(path, n=50_000, **settings):
        asked.append(n)
        raise Stop

    monkeypatch.setattr("pipelines.fid.ModelSamples", note)
    for sampling in ({}, {"n": 9}, {"n": 3}):
        with pytest.raises(Stop):
            measure_fid(model=model, data="photos", limit=5, sampling=sampling, device="cpu")
    assert asked == [5, 5, 3]


def test_options_that_exclude_each_other_are_refused(samples, model):
    for given, told in (
        ({"samples": samples, "model": model}, "samples and --model exclude each other"),
        ({"data": "photos", "reference": "ffhq256"}, "--data and --reference exclude"),
        ({"split": "all", "reference": "ffhq256"}, "--split and --reference exclude"),
        ({"samples": samples, "sampling": {"n": 3}}, "--n needs a model to sample from"),
        ({"model": model, "sampling": {"n": 0}}, "--n 0: it must be at least 1"),
        ({"model": model, "sampling": {"guidance": -1.0}}, "'guidance'"),
    ):
        with pytest.raises(UsageError, match=told):
            measure_fid(**given, device="cpu")


# ------------------------------------------------------------------------------ provenance
def test_the_result_holds_all_that_numbers_depend_on(samples, reference, measure):
    result = measure(samples, reference)
    written = json.loads((samples / "fid.json").read_text())
    assert result == written | {"written": str(samples / "fid.json")}
    assert result["samples"]["made_with"]["model"] == {"sha256": "abc"}
    assert result["reference"]["split"] == result["reference"]["split_asked"] == "train"
    assert result["reference"]["data"]["source"] == reference.source
    assert result["reference"]["prepared"] is None
    assert result["resolution"] == SIZE
    assert len(result["extractor"]["sha256"]) == 64
    assert {"torch", "clean-fid", "pillow"} <= result["versions"].keys()
    assert result["created"] and result["forced"]
    assert result["fid_missing"] is None


def test_the_result_may_be_written_elsewhere(tmp_path, samples, reference, measure):
    result = measure(samples, reference, out=tmp_path / "there" / "x.json")
    assert json.loads((tmp_path / "there" / "x.json").read_text())["fid"] == result["fid"]
    assert not (samples / "fid.json").exists()


def test_measuring_again_does_not_count_its_own_file(samples, reference, measure):
    first = measure(samples, reference)
    assert measure(samples, reference)["fid"] == first["fid"]


def test_the_result_holds_the_reference_preparation(tmp_path, samples, measure):
    from ldm.data.prepare import prepare

    whole = write_folder(tmp_path / "whole", enlarged(pictures(15, 3)))
    prepare(whole, tmp_path / "shards", SIZE, "box", held_out=3, workers=0)
    config = DataConfig(source=str(tmp_path / "shards"), workers=0)
    result = measure(samples, config)
    assert result["reference"]["count"] == 12
    assert result["reference"]["prepared"] == {
        "size": SIZE, "filter": "box", "crop": "center", "source": "whole",
    }  # fmt: skip
    assert result["reference"]["filter"] == "box"


def test_another_network_is_noted(samples, reference, measure, capsys):
    *_, other = measure(samples, reference)["warnings"]
    assert other.startswith("the network is not the published Inception")
    assert other in capsys.readouterr().out


# -------------------------------------------------------------------------------- processes
@pytest.mark.slow
def test_two_processes_measure_the_same(tmp_path, samples, reference):
    (tmp_path / "thumbnails.py").write_text(
        "from torch.nn.functional import adaptive_avg_pool2d as pool\n"
        "def four():\n    return lambda images: pool(images.float().mean(1), 2).flatten(1)\n"
    )
    results = []
    for processes in (1, 2):
        done = ldm(
            "fid", samples, "--data", reference.source, "--features", "thumbnails:four",
            "--batch-size", "3", cwd=tmp_path, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("written") == 1
        (written,) = samples.glob("fid*.json")
        results.append(json.loads(written.read_text()))
    one, other = results
    assert one["samples"] == other["samples"] and one["swd"] == other["swd"]
    for name in ("fid", "kid", "precision", "recall"):
        assert one[name] == pytest.approx(other[name], rel=1e-9)


def test_an_interval_is_for_one_process(samples, reference, monkeypatch):
    class Two:
        num_processes, process_index, is_main_process, device = 2, 0, True, torch.device("cpu")

    monkeypatch.setattr("pipelines.fid.join_processes", lambda device: (Two, Two.device))
    with pytest.raises(UsageError, match="--bootstrap is for one process"):
        measure_fid(samples, reference, device="cpu", bootstrap=9)
