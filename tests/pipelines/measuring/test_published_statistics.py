"""Statistics in files: those that clean-fid publishes, and those that were kept."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from ldm.metrics import features, frechet_distance, inception
from ldm.metrics.features import PUBLISHED, statistics_folders
from pipelines.fid import measure_fid
from pipelines.measuring.reference import open_statistics
from tests.ldm.metrics.fake_inception import FakeInception, save_script
from tests.pipelines.measuring.fid_sides import DIM, direct_features, pictures, write_folder

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def published(weights, monkeypatch):
    """As if the small network were the published one."""
    extractor = inception.FeatureExtractor(weights, "cpu")
    monkeypatch.setattr(inception, "SHA256", extractor.sha256)
    assert extractor.is_published
    return extractor


@pytest.fixture
def samples(tmp_path):
    return write_folder(tmp_path / "samples", pictures(10, 0))


@pytest.fixture
def kept(tmp_path, samples, weights, cache):
    """A reference's statistics as a measurement keeps them."""
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
    found = open_statistics(name, inception.FeatureExtractor(weights, "cpu", mode))
    assert np.allclose(found.known.features.statistics.mean, features.mean(0))
    assert np.allclose(found.known.features.statistics.covariance, np.cov(features.T))
    _, resolution, images, _ = PUBLISHED[name]
    assert len(found) == images and found.resolution == resolution == int(name[4:].split("-")[0])
    assert len(found.about["statistics_sha256"]) == 64
    assert found.about["statistics"] == str(cache / file)


def test_clean_fids_own_folder_is_searched(tmp_path, published, monkeypatch):
    assert statistics_folders()[1].parts[-2:] == ("cleanfid", "stats")
    folders = [tmp_path / "none", tmp_path / "theirs"]
    monkeypatch.setattr(features, "statistics_folders", lambda: folders)
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
    other = inception.FeatureExtractor(weights, "cpu")
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
        measure_fid(
            tmp_path / "large", reference=str(kept[0]), weights=weights, device="cpu", force=True
        )


def test_files_that_are_no_statistics_are_errors(tmp_path, published):
    with pytest.raises(UsageError, match="no reference 'ffhq512': give ffhq256, ffhq1024"):
        open_statistics("ffhq512", published)
    with pytest.raises(UsageError, match="images are given with --data"):
        open_statistics(str(tmp_path), published)
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(DIM), sigma=np.eye(DIM))
    with pytest.raises(LdmError, match=r"is damaged.*: give another --reference"):
        open_statistics(str(path), published)


@pytest.mark.parametrize("given", [{"reference": "nothere.npz"}, {"data": "nothere"}])
def test_what_was_given_is_checked_before_weights_are_fetched(samples, monkeypatch, given):
    def fetched(*_args):
        pytest.fail("the weights were looked for first")

    monkeypatch.setattr(inception, "FeatureExtractor", fetched)
    with pytest.raises(LdmError, match="nothere"):
        measure_fid(samples, device="cpu", **given)


def test_damage_is_named_before_missing_weights(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK")
    with pytest.raises(LdmError, match="give another --reference"):
        open_statistics(str(path), None, "no Inception weights")
    with pytest.raises(LdmError, match="ffhq256: no Inception weights"):
        open_statistics("ffhq256", None, "no Inception weights")
