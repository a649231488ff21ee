"""Reference batches of ADM's evaluator: by its definitions, from its files, and in its layout."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LdmError, UsageError
from ldm.metrics import features, frechet_distance, inception, precision_recall
from ldm.metrics.features import ReferenceBatch
from pipelines.fid import measure_fid
from pipelines.sample import sample_images
from tests.ldm.metrics.fake_inception import WholeInception, save_whole_inception
from tests.ldm.metrics.test_dinov2 import write_dinov2
from tests.pipelines.measuring.fid_sides import DIM, SIZE, pictures, to_nchw, write_folder

pytestmark = pytest.mark.usefixtures("cache")
GRID, CLASSES = 2, 10
OURS, THEIRS = pictures(16, 0), pictures(30, 1, 1.3)


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A small network in place of the published one, with 8 and 28 features and 10 classes."""
    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    monkeypatch.setitem(inception.OUTPUTS, "sfid", ("spatial features", 7 * GRID**2))
    monkeypatch.setitem(inception.OUTPUTS, "is", ("class probabilities", CLASSES))
    path = save_whole_inception(tmp_path, DIM, GRID, CLASSES)
    extractor = inception.FeatureExtractor(path, "cpu")
    monkeypatch.setattr(inception, "SHA256", extractor.sha256)
    return path


@pytest.fixture
def samples(tmp_path):
    return write_folder(tmp_path / "samples", OURS)


@pytest.fixture
def measure(whole, samples):
    def call(reference, **options):
        return measure_fid(samples, reference=str(reference), weights=whole, device="cpu",
                           batch_size=7, **options)  # fmt: skip

    return call


def direct(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled and spatial features, and class probabilities, as ADM has them: channels last."""
    network = WholeInception(DIM, GRID, CLASSES)
    x = (inception.resize_as_tensorflow(to_nchw(images).float(), 299) - 128) / 128
    with torch.no_grad():
        maps = network.layers.mixed_6.conv(network.layers[:3](x))[:, :7]
        pooled = network.layers(x)
        p = (pooled @ network.output.weight.T).softmax(1)
    spatial = maps.permute(0, 2, 3, 1).flatten(1)
    return tuple(each.double().numpy() for each in (pooled, spatial, p))


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.mean(0), np.cov(rows, rowvar=False)


def write_batch(path, *kinds, images=THEIRS, whole=THEIRS, save=np.savez, **more):
    """A file with images, mean and covariance of pooled (fid) or spatial features (sfid)."""
    pooled, spatial, _ = direct(whole)
    parts = {
        "images": {"arr_0": images},
        "fid": dict(zip(("mu", "sigma"), moments(pooled), strict=True)),
        "sfid": dict(zip(("mu_s", "sigma_s"), moments(spatial), strict=True)),
    }
    arrays = {name: array for kind in kinds for name, array in parts[kind].items()}
    save(path, **arrays | more)
    return path


def expected(ours: np.ndarray, theirs: np.ndarray, output: int) -> float:
    return frechet_distance(*moments(direct(ours)[output]), *moments(direct(theirs)[output]))


# --------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numbers_are_those_of_adms_definitions(tmp_path, measure, save):
    """Statistics of a whole data set, and images of a part of it for precision and recall."""
    other = pictures(34, 3, 1.1)
    batch = write_batch(tmp_path / "b.npz", "images", "fid", "sfid", whole=other, save=save)
    result = measure(batch, force=True)
    assert result["fid"] == pytest.approx(expected(OURS, other, 0), rel=1e-3)
    assert result["sfid"] == pytest.approx(expected(OURS, other, 1), rel=1e-3)
    p = direct(OURS)[2]
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert result["is"] == pytest.approx(score, rel=1e-4)
    closeness = precision_recall(direct(THEIRS)[0], direct(OURS)[0])
    assert (result["precision"], result["recall"]) == closeness
    assert result["neighbours"] == {"samples": 16, "reference": 30}
    assert result["kid"] is not None and result["swd_images"] == 16
    assert result["mode"] == "legacy-tensorflow"
    assert result["reference"]["given"] == ["fid", "sfid"] and result["reference"]["count"] == 30
    assert len(result["reference"]["batch_sha256"]) == 64
    assert result["extractors"]["sfid"]["dim"] == 28
    assert any(text.startswith("16 samples: papers with ADM's") for text in result["warnings"])
    assert "-b.npz-" in result["written"]


def test_images_alone_are_measured_once_and_kept(tmp_path, measure, cache, monkeypatch):
    batch = write_batch(tmp_path / "b.npz", "images")
    first = measure(batch, force=True)
    assert first["fid"] == pytest.approx(expected(OURS, THEIRS, 0), rel=1e-3)
    assert first["sfid"] == pytest.approx(expected(OURS, THEIRS, 1), rel=1e-3)
    assert first["reference"]["kept"] is False and len(list(cache.iterdir())) == 2
    seen, run = [], inception.FeatureExtractor._run
    monkeypatch.setattr(
        inception.FeatureExtractor, "_run", lambda self, x: seen.append(len(x)) or run(self, x)
    )
    again = measure(batch, force=True)
    assert sum(seen) == len(OURS) and again["reference"]["kept"] is True
    for name in ("fid", "sfid", "is", "kid", "precision", "recall"):
        assert again[name] == pytest.approx(first[name], rel=1e-9)
    assert again["swd"] == first["swd"]
    clean = measure(batch, mode="clean", force=True)
    assert clean["mode"] == "clean" and clean["fid"] != first["fid"]


def test_statistics_alone_give_fid_sfid_and_the_inception_score(tmp_path, measure):
    result = measure(write_batch(tmp_path / "b.npz", "fid", "sfid"), force=True)
    assert result["fid"] == pytest.approx(expected(OURS, THEIRS, 0), rel=1e-3)
    assert result["sfid"] == pytest.approx(expected(OURS, THEIRS, 1), rel=1e-3)
    assert result["is"] > 1 and result["kid"] is result["precision"] is result["swd"] is None
    assert any(text.startswith("no SWD") for text in result["warnings"])
    with pytest.raises(LdmError, match=r"holds no images \(arr_0\), so omit .*: kid, recall"):
        measure(tmp_path / "b.npz", metrics=("fid", "kid", "recall"))
    with pytest.raises(LdmError, match=r"so omit these metrics: sfid"):
        measure(write_batch(tmp_path / "c.npz", "fid"), metrics=("fid", "sfid"), mode="clean")


def test_copies_of_a_batch_are_found(tmp_path, measure, samples):
    Image.fromarray(THEIRS[3]).save(samples / "copy.png")
    with pytest.raises(LdmError, match=r"1 of 17 samples \(such as .*copy.png\) are images of"):
        measure(write_batch(tmp_path / "b.npz", "images", "fid"), metrics=("fid",))


def test_fd_dinov2_and_other_metrics_are_chosen(tmp_path, measure, samples, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_dinov2(tmp_path / "hub" / "checkpoints" / "dinov2_vitl14_pretrain.pth", 64, 1)
    batch = write_batch(tmp_path / "b.npz", "images")
    with pytest.raises(
        LdmError, match=r"^FD-DINOv2 over 16 samples and 30 images .* fewer than 64, one"
    ):
        measure(batch, metrics=("fd-dinov2",))
    result = measure(batch, metrics=("fd-dinov2",), force=True)
    assert result["fd_dinov2"] > 0 and result["fid"] is result["swd"] is None
    assert result["extractor"] is None and result["extractors"]["fd_dinov2"]["dim"] == 64
    assert result["written"].endswith("-fd-dinov2.json")
    itself = measure(write_batch(tmp_path / "o.npz", "images", images=OURS),
                     metrics=("fd-dinov2", "sfid"), force=True)  # fmt: skip
    assert itself["fd_dinov2"] < 1e-3 and itself["sfid"] < 1e-3


def test_further_metrics_of_a_data_set(tmp_path, whole, samples):
    data = write_folder(tmp_path / "data", THEIRS)
    how = {"weights": whole, "device": "cpu", "mode": "legacy-tensorflow", "force": True}
    for kept in (False, True):
        result = measure_fid(samples, str(data), metrics=("sfid", "is", "fid"), **how)
        assert result["sfid"] == pytest.approx(expected(OURS, THEIRS, 1), rel=1e-3)
        assert result["kid"] is result["precision"] is result["swd"] is None
        assert result["reference"]["kept"] is kept


# --------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("array", "text"),
    [
        ({"arr_0": np.zeros((4, SIZE, SIZE, 3), np.float32)}, "arr_0 is float32 (4, 24, 24, 3)"),
        ({"arr_0": np.zeros((4, SIZE, SIZE), np.uint8)}, "not images: uint8 (N, H, W, 3)"),
        ({"arr_0": np.zeros((4, 3, SIZE, SIZE), np.uint8)}, "not images"),
        ({"arr_0": np.zeros((1, SIZE, SIZE, 3), np.uint8)}, "holds 1 images, not 2 to 1,000,000"),
        ({"arr_0": np.array([{}, {}], object)}, "is damaged or no .npz of arrays"),
        ({"arr_0": THEIRS, "arr_1": np.zeros(3, int)}, "arr_1 is int64 (3,), not classes"),
        ({"arr_0": THEIRS, "arr_1": np.zeros(30)}, "arr_1 is float64 (30,), not classes"),
        ({"mu": np.zeros(3)}, "mu and sigma are not floats (8,) and (8, 8)"),
        ({"mu": np.zeros(DIM), "sigma": np.eye(3)}, "mu and sigma are not floats"),
        ({"mu": np.zeros(DIM), "sigma": np.eye(DIM, dtype=int)}, "mu and sigma are not floats"),
        ({"mu": np.full(DIM, np.nan), "sigma": np.eye(DIM)}, "hold a NaN or an infinity"),
        ({"x": np.zeros(3)}, "is damaged"),
    ],
)
def test_files_that_are_no_batches_are_refused_in_one_line(tmp_path, measure, array, text):
    path = tmp_path / "bad.npz"
    np.savez(path, **array)
    with pytest.raises(LdmError) as error:
        measure(path, mode="clean" if "mu" in array else None)
    assert text in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_batches_that_do_not_compare_are_refused(tmp_path, measure):
    batch = write_batch(tmp_path / "b.npz", "images", "fid")
    with pytest.raises(
        LdmError, match=r"resized as in TensorFlow, .* omit --mode, or these metrics: fid"
    ):
        measure(batch, mode="clean")
    large = write_batch(tmp_path / "l.npz", "images", images=THEIRS.repeat(2, 1).repeat(2, 2))
    with pytest.raises(LdmError, match=r"are 48×48 and the samples 24×24"):
        measure(large)
    with pytest.raises(UsageError, match="no metric 'fud': choose from fid, sfid, is, kid"):
        measure(batch, metrics=("fud",))
    with pytest.raises(UsageError, match="--features replaces Inception, of which sfid is"):
        measure(batch, metrics=("sfid",), features="a:b")


def test_another_network_is_refused(tmp_path, measure, monkeypatch):
    batch = write_batch(tmp_path / "b.npz", "fid", "sfid")
    monkeypatch.setattr(inception, "SHA256", "0" * 64)
    with pytest.raises(LdmError, match="are of the published Inception, and the"):
        measure(batch)


def test_mean_and_covariance_alone_need_a_mode_and_leave_a_note(tmp_path, measure):
    batch = write_batch(tmp_path / "b.npz", "fid")
    with pytest.raises(UsageError, match="not how their images were resized: give --mode clean or"):
        measure(batch)
    result = measure(batch, mode="clean")
    assert result["mode"] == "clean" and result["fid"] > 0
    assert result["warnings"][-1].startswith("the resizing, image size and count of")


def test_few_samples_are_refused_for_each_frechet_distance_alone(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(inception.FeatureExtractor, "dim", 8)
    spatial = write_batch(tmp_path / "s.npz", "sfid")
    with pytest.raises(LdmError, match=r"^sFID over 16 samples is biased upwards, .* than 28, one"):
        measure(spatial)
    images = write_batch(tmp_path / "b.npz", "images", images=THEIRS[:6])
    with pytest.raises(LdmError, match=r"^FID over 16 samples and 6 images is biased"):
        measure(images, metrics=("fid",))
    few = measure(images, metrics=("is", "precision", "kid"))
    assert few["precision"] is not None and few["fid"] is None


def test_statistics_that_are_not_used_do_not_bind_the_mode(tmp_path, measure):
    batch = write_batch(tmp_path / "b.npz", "images", "fid")
    result = measure(batch, metrics=("kid", "precision"), mode="clean")
    assert result["kid"] is not None and result["reference"]["given"] == []


def test_the_inception_score_does_without_a_pass_over_the_reference(tmp_path, measure, monkeypatch):
    batch = write_batch(tmp_path / "b.npz", "images")
    monkeypatch.setattr(ReferenceBatch, "load", None)
    assert measure(batch, metrics=("is",))["is"] > 1


def test_batches_of_too_large_images_are_refused(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(features, "MAX_PIXELS", 100)
    with pytest.raises(LdmError, match="arr_0 holds images of more than 100 pixels"):
        measure(write_batch(tmp_path / "b.npz", "images"))


def test_kept_statistics_of_sfid_are_named(tmp_path, measure, cache):
    measure(write_batch(tmp_path / "b.npz", "images"), metrics=("sfid",), force=True)
    [kept] = cache.iterdir()
    with pytest.raises(LdmError, match=r"are those of sFID \(28 features\), not of FID \(8\)"):
        measure(kept, mode="legacy-tensorflow")


# ------------------------------------------------------------------------ labels and exports
def test_samples_are_written_for_adms_evaluator_and_read_back(tmp_path, conditional):
    path = tmp_path / "x" / "samples.npz"
    out = sample_images(conditional, 7, tmp_path / "out", steps=1, device="cpu", precision="fp32",
                        labels="balanced", files="zip", npz=path)  # fmt: skip
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (7, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert json.loads((out / "samples.json").read_text())["labels"] == "balanced"
    batch = ReferenceBatch(path, "")
    assert [batch.label(i) for i in range(7)] == labels.tolist()
    assert (batch.load(4) == images[4]).all() and (batch.load(1) == images[1]).all()
    with pytest.raises(UsageError, match=r"--npz x.zip: give a name that ends in .npz"):
        sample_images(conditional, 7, tmp_path / "out", steps=1, device="cpu", npz="x.zip")
    written = path.read_bytes()
    with pytest.raises(LdmError, match=r"samples.npz exists: give --npz another file, or delete"):
        sample_images(conditional, 8, tmp_path / "8", steps=1, device="cpu", npz=path)
    assert path.read_bytes() == written and not (tmp_path / "8").exists()


def test_classes_of_both_sides_are_in_the_result(tmp_path, conditional, whole):
    how = {"steps": 1, "device": "cpu", "precision": "fp32"}
    out = sample_images(conditional, 9, tmp_path / "out", labels="balanced", **how)
    images = pictures(12, 5).repeat(2, 1).repeat(2, 2)[:, :32, :32]
    batch = write_batch(tmp_path / "b.npz", "images", images=images, arr_1=np.arange(12) // 8)
    options = {"reference": str(batch), "weights": whole, "device": "cpu", "force": True}
    result = measure_fid(out, **options)
    assert result["samples"]["labels"] == {"classes": 3, "images": [3, 3]}
    assert result["reference"]["labels"] == {"classes": 2, "images": [4, 8]}
    note = "the samples are of 3 classes, balanced, and the reference's images of 2 classes, not"
    assert any(text.startswith(note) for text in result["warnings"])
    sampling = {"n": 9, "steps": 1, "precision": "fp32", "labels": ["balanced"]}
    again = measure_fid(model=conditional, sampling=sampling, **options)
    assert again["samples"]["labels"] == result["samples"]["labels"]
    assert again["samples"]["fingerprint"] == result["samples"]["fingerprint"]
    assert again["written"].split("/")[-1].startswith("seed0-steps1-balanced-n9-")
