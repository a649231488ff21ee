"""FID and SWD of folders against a direct computation, on a tiny network instead of Inception."""

import json

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from scipy import linalg, ndimage

from ldm.data import DataConfig, batches, open_source
from ldm.errors import LdmError, UsageError
from ldm.metrics import inception, sliced_wasserstein
from ldm.seeds import generator
from pipelines.fid import fid_of_samples, measure_fid
from pipelines.sample_store import STORES, image_path
from tests.ldm.metrics.fake_inception import Layers, save_fake_inception

SIZE = 24
DIM = 32


def pictures(count: int, seed: int, blur: float = 1.0) -> np.ndarray:
    """Blurred colour noise (count, SIZE, SIZE, 3) uint8."""
    noise = np.random.default_rng(seed).standard_normal((count, SIZE, SIZE, 3))
    noise = ndimage.gaussian_filter(noise, (0, blur, blur, 0))
    return (noise / noise.std() * 60 + 128).clip(0, 255).astype(np.uint8)


@pytest.fixture
def samples(tmp_path):
    """Ten samples as `ldm sample` writes them, and what it says of them."""
    folder = tmp_path / "samples"
    for i, picture in enumerate(pictures(10, seed=0)):
        path = image_path(folder, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    Image.fromarray(pictures(1, seed=9)[0]).save(folder / "grid.png")
    data = {"source": str(tmp_path / "data"), "held_out": 3, "workers": 0}
    mark = {"format": 1, "n": 10, "seed": 0, "model": {"sha256": "abc"}, "data": data}
    (folder / "samples.json").write_text(json.dumps(mark))
    return folder


@pytest.fixture
def reference(tmp_path) -> DataConfig:
    """A folder of 15 images, 3 of them held out."""
    (tmp_path / "data").mkdir()
    for i, picture in enumerate(pictures(15, seed=1, blur=1.3)):
        Image.fromarray(picture).save(tmp_path / "data" / f"{i:03d}.png")
    return DataConfig(source=str(tmp_path / "data"), held_out=3, workers=0)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of Inception's interface, with fewer features: matrix roots of 2048 take seconds."""
    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    (tmp_path / "weights").mkdir()
    return save_fake_inception(tmp_path / "weights", DIM)


@pytest.fixture
def no_inception(tmp_path, monkeypatch):
    """A machine on which Inception is in none of the folders and not to be fetched."""
    monkeypatch.setattr(inception, "weight_folders", lambda: [tmp_path / "cache"])
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "file:///nowhere/inception.pt")


def direct_fid(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The definition in float64: clean-fid's resizer, numpy's covariance, scipy's matrix root."""
    resize, layers = build_resizer("clean"), Layers(DIM)
    sides = []
    for images in (ours, theirs):
        resized = np.stack([resize(image) for image in images])
        inputs = torch.from_numpy((resized - 128) / 128).permute(0, 3, 1, 2)
        sides.append(layers(inputs).double().numpy())
    # in the span of all features, since a general root of a singular matrix is ill-conditioned
    basis = linalg.orth(np.concatenate(sides).T)
    (mean_a, cov_a), (mean_b, cov_b) = (
        ((side @ basis).mean(0), np.cov(side @ basis, rowvar=False)) for side in sides
    )
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def to_nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------- numbers
def test_fid_is_the_direct_computation(samples, reference, weights):
    result = measure_fid(samples, reference, weights=weights, device="cpu", batch_size=4)
    expected = direct_fid(pictures(10, seed=0), pictures(15, seed=1, blur=1.3)[:12])
    assert result["fid"] == pytest.approx(expected, rel=1e-4)
    assert result["samples"]["count"] == 10
    assert result["reference"]["count"] == 12


@pytest.mark.parametrize("files", ["zip", "shards"])
def test_samples_in_other_forms(tmp_path, samples, reference, weights, files):
    packed = tmp_path / "packed"
    store = STORES[files](packed)
    store.begin(range(10))
    for i, picture in enumerate(pictures(10, seed=0)):
        store.write(i, Image.fromarray(picture))
    store.finish()
    mark = json.loads((samples / "samples.json").read_text()) | {"files": files}
    (packed / "samples.json").write_text(json.dumps(mark))
    one, other = (measure_fid(s, reference, "train", weights, "cpu") for s in (samples, packed))
    assert one["fid"] == other["fid"] and one["swd"] == other["swd"]


def test_the_held_out_split(samples, reference, weights):
    result = measure_fid(samples, reference, "val", weights, "cpu")
    expected = direct_fid(pictures(10, seed=0), pictures(15, seed=1, blur=1.3)[12:])
    assert result["fid"] == pytest.approx(expected, rel=1e-4)


def test_the_batch_size_changes_nothing(samples, reference, weights):
    one, other = (
        measure_fid(samples, reference, weights=weights, device=torch.device("cpu"), batch_size=b)
        for b in (3, 64)
    )
    assert one["fid"] == pytest.approx(other["fid"], rel=1e-6)
    assert one["swd"] == pytest.approx(other["swd"], rel=1e-9)


def test_a_set_against_itself_is_at_zero(tmp_path, reference, weights):
    folder = tmp_path / "data"
    everything = reference.model_copy(update={"held_out": 0})
    result = measure_fid(folder, everything, "all", weights, "cpu")
    assert result["fid"] < 1e-3
    assert result["swd"] == {"24": 0.0, "mean": 0.0}


def test_swd_is_that_of_equally_many_images(samples, reference, weights):
    """With ten of each, drawing images at random can only change their order."""
    limited = measure_fid(samples, reference, weights=weights, device="cpu", limit=10)
    assert limited["swd_images"] == 10
    assert limited["reference"]["count"] == 10
    direct = sliced_wasserstein(
        to_nchw(pictures(10, seed=0)), to_nchw(pictures(15, seed=1, blur=1.3)[:10])
    )
    assert limited["swd"] == pytest.approx(direct, rel=1e-9)


def test_swd_draws_from_the_whole_of_the_larger_set(samples, reference, weights, monkeypatch):
    """A data set may be sorted by class: its first images are not a fair part of it."""
    monkeypatch.setattr("pipelines.fid.SWD_IMAGES", 3)
    result = measure_fid(samples, reference, weights=weights, device="cpu", batch_size=2)
    assert result["swd_images"] == 3
    assert result["samples"]["count"] == 10  # FID is over all
    theirs, ours = pictures(15, seed=1, blur=1.3), pictures(10, seed=0)
    picks = [np.sort(generator(0, "swd images", 0).permutation(n)[:3]) for n in (10, 12)]
    assert not np.array_equal(picks[1], [0, 1, 2])
    direct = sliced_wasserstein(to_nchw(ours[picks[0]]), to_nchw(theirs[picks[1]]))
    assert result["swd"] == pytest.approx(direct, rel=1e-9)


def test_photographs_are_random_crops(samples, weights):
    config = DataConfig(flip=True, workers=0)
    result = measure_fid(samples, config, "train", weights, "cpu", batch_size=4)
    assert result["reference"]["what"] == "photos, train: 10 random crops, seed 0"
    source = open_source(config, "train", SIZE)
    stream = batches(source, DataConfig(flip=False), SIZE, 0, 0, 10, 10)
    crops = next(iter(stream)).images.permute(0, 2, 3, 1).numpy()
    assert result["fid"] == pytest.approx(direct_fid(pictures(10, seed=0), crops), rel=1e-4)


# ------------------------------------------------------------------------------ provenance
def test_what_is_written(samples, reference, weights):
    result = measure_fid(samples, reference, weights=weights, device="cpu")
    assert json.loads((samples / "fid.json").read_text()) == result
    assert result["samples"]["made_with"]["model"] == {"sha256": "abc"}
    assert result["reference"]["split"] == "train"
    assert result["reference"]["data"]["source"] == reference.source
    assert result["reference"]["prepared"] is None
    assert result["resolution"] == SIZE
    assert len(result["extractor"]["sha256"]) == 64
    assert {"torch", "clean-fid", "pillow"} <= result["versions"].keys()
    assert result["created"]
    assert result["fid_missing"] is None


def test_measuring_again_does_not_count_its_own_file(samples, reference, weights):
    first = measure_fid(samples, reference, weights=weights, device="cpu")
    assert measure_fid(samples, reference, weights=weights, device="cpu")["fid"] == first["fid"]


def test_the_preparation_of_the_reference_is_told(tmp_path, samples, reference, weights):
    from ldm.data.prepare import prepare

    prepare(reference.source, tmp_path / "shards", SIZE, "box", held_out=3, workers=0)
    config = DataConfig(source=str(tmp_path / "shards"), workers=0)
    result = measure_fid(samples, config, weights=weights, device="cpu")
    assert result["reference"]["count"] == 12
    assert result["reference"]["prepared"] == {
        "size": SIZE, "filter": "box", "crop": "center", "source": "data",
    }  # fmt: skip


def test_few_images_and_another_network_are_noted(samples, reference, weights, capsys):
    result = measure_fid(samples, reference, weights=weights, device="cpu")
    few, other = result["warnings"]
    assert few.startswith("FID over 10 samples and 12 images is biased upwards")
    assert other.startswith("the network is not the published Inception")
    assert few in capsys.readouterr().out


# ------------------------------------------------------------------------- without Inception
def test_without_inception_the_rest_is_measured(samples, reference, no_inception):
    with pytest.raises(LdmError) as error:
        measure_fid(samples, reference, device="cpu")
    text = str(error.value)
    assert "\n" not in text
    assert "give it with --weights PATH; without FID, SWD " in text
    assert text.endswith(f"was measured and is in {samples / 'fid.json'}")

    written = json.loads((samples / "fid.json").read_text())
    assert written["fid"] is None
    assert "could not be fetched" in written["fid_missing"]
    assert written["extractor"] is None
    assert written["warnings"] == []
    assert written["swd"]["mean"] > 0
    assert f"SWD {written['swd']['mean']:.3f} (×10³)" in text


def test_weights_asked_for_must_be_there(samples, reference, tmp_path):
    with pytest.raises(LdmError, match=r"no Inception weights at .*x.pt"):
        measure_fid(samples, reference, weights=tmp_path / "x.pt", device="cpu")
    assert not (samples / "fid.json").exists()


# ----------------------------------------------------------------------------- left out
def test_the_newest_samples_and_their_own_data(samples, reference, weights, monkeypatch, capsys):
    home = samples.parent
    (home / "runs" / "x").mkdir(parents=True)
    samples.rename(home / "runs" / "x" / "samples")
    monkeypatch.chdir(home)
    result = fid_of_samples(weights=weights, device="cpu")
    assert result["reference"]["count"] == 12
    assert "measuring runs/x/samples against the train split of" in capsys.readouterr().out


def test_other_data_than_their_own(samples, weights):
    result = fid_of_samples(samples, "photos", weights=weights, device="cpu")
    assert result["reference"]["what"].startswith("photos, train")


def test_samples_that_do_not_say_their_data(tmp_path, reference):
    with pytest.raises(UsageError, match="does not say what data to compare with: give --data"):
        fid_of_samples(tmp_path / "data")


# ---------------------------------------------------------------------------------- errors
def test_numbers_that_make_no_sense(samples, reference):
    with pytest.raises(UsageError, match="batch size 0"):
        measure_fid(samples, reference, batch_size=0)
    with pytest.raises(UsageError, match="limit 1: a covariance needs two"):
        measure_fid(samples, reference, limit=1)


def test_a_reference_of_one_image(samples, reference, weights):
    one = reference.model_copy(update={"held_out": 1})
    with pytest.raises(LdmError, match=r"val: 1 images, .*needs two images or more"):
        measure_fid(samples, one, "val", weights, "cpu")


def test_a_reference_of_smaller_images(tmp_path, reference, weights):
    (tmp_path / "large").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / "large" / f"{name}.png")
    with pytest.raises(LdmError, match="is 24×24, smaller than"):
        measure_fid(tmp_path / "large", reference, weights=weights, device="cpu")


def test_a_reference_prepared_at_another_size(tmp_path, samples, reference, weights):
    from ldm.data.prepare import prepare

    prepare(reference.source, tmp_path / "shards", 16, held_out=3, workers=0)
    config = DataConfig(source=str(tmp_path / "shards"), workers=0)
    with pytest.raises(LdmError, match="prepared at 16×16, and 24×24 is asked for"):
        measure_fid(samples, config, weights=weights, device="cpu")
