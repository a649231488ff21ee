"""Every number of autoencoders in files against its definition, and the result written."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from scipy import linalg

from autoencoders import load_autoencoder
from ldm.checkpoint import load_model
from ldm.config import to_tree
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from ldm.metrics import inception, sliced_wasserstein
from pipelines import evaluate
from pipelines.evaluate import NO_FID, OF_FEATURES, evaluate_checkpoints, load_metrics
from pipelines.measuring import statistics
from pipelines.measuring.statistics import MeasureOptions
from tests.ldm.metrics.fake_inception import save_fake_inception
from tests.pipelines.measuring.reconstructed import (
    DIM,
    FEATURES,
    by_scikit_image,
    crops,
    save_images,
    save_run,
    thumbnails,
)
from tests.pipelines.measuring.two_processes import GOOD, ONE_SMALL
from tests.small import ROOT

pytestmark = pytest.mark.usefixtures("no_lpips")


@pytest.fixture
def folder(tmp_path):
    """As many images as there are features, and four more."""
    return save_images(tmp_path / "data", crops(DIM + 4))


def measure(*models, **options):
    return evaluate_checkpoints(models, **{"device": "cpu", "batch_size": 5, **options})


def rounded(run) -> tuple[np.ndarray, np.ndarray]:
    """A folder's images, and their reconstructions made one by one: uint8 (n, 32, 32, 3)."""
    ae, pairs = load_autoencoder(run), []
    for image in crops(DIM + 4):
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            recon = ae.decode(ae.encode(x).mean)
        levels = ((recon + 1) * 127.5).round().clamp(0, 255).byte()
        pairs.append((image, levels[0].permute(1, 2, 0).numpy()))
    return tuple(np.stack(side) for side in zip(*pairs, strict=True))


def test_every_number_against_the_definitions(tmp_path, folder, monkeypatch):
    def distance(recon, images):
        return (recon - images).abs().mean(dim=(1, 2, 3))

    lpips = SimpleNamespace(each=distance)
    monkeypatch.setattr(evaluate, "load_lpips", lambda device, instead: lpips)
    run = save_run(tmp_path / "run")
    (found,) = measure(
        run, data=str(folder), split="all", resolutions=[32], features=FEATURES, weights=None
    )
    images, recon = rounded(run)
    psnr, ssim = by_scikit_image(list(images), list(recon))
    numbers = found.numbers
    assert (numbers["psnr"], numbers["ssim"]) == pytest.approx((psnr, ssim), abs=1e-4)
    apart = np.abs(images.astype(float) - recon).mean() / 127.5
    assert numbers["lpips"] == pytest.approx(apart, abs=1e-6)
    assert found.each["k"].tolist() == list(range(found.count))
    for name in ("psnr", "ssim", "lpips"):
        assert found.each[name].mean(dtype=float) == pytest.approx(numbers[name], rel=1e-12)

    nchw = [torch.from_numpy(side).permute(0, 3, 1, 2) for side in (images, recon)]
    a, b = (thumbnails()(side).double().numpy() for side in nchw)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    rfid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert numbers["rfid"] == pytest.approx(rfid, rel=1e-4)

    kernels = [(x @ y.T / DIM + 1) ** 3 for x, y in ((a, a), (b, b), (b, a))]
    n = len(a)
    within = [(k.sum() - np.trace(k)) / (n * (n - 1)) for k in kernels[:2]]
    assert numbers["kid"] == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-4)
    assert numbers["swd"] == pytest.approx(sliced_wasserstein(*nchw[::-1])["mean"], rel=1e-4)

    def share_within(some, others):
        """Of `some` that are nearer to one of `others` than its third nearest neighbour is."""
        apart = np.linalg.norm(others[:, None] - others[None], axis=2)
        radii = np.sort(apart, axis=1)[:, 3]
        return np.mean((np.linalg.norm(some[:, None] - others[None], axis=2) <= radii).any(1))

    closeness = (share_within(b, a), share_within(a, b))
    assert (numbers["precision"], numbers["recall"]) == pytest.approx(closeness)


def test_the_result_holds_all_that_numbers_depend_on(tmp_path, folder):
    run = save_run(tmp_path / "run")
    (found,) = measure(
        run / "ckpt.pt", data=str(folder), split="all", resolutions=[32], features=FEATURES
    )
    assert found.path.parent == run / "eval"
    assert found.path.name.startswith(f"{tmp_path.name}-data-")
    assert found.path.name.endswith(f"-all-32-{FEATURES.replace(':', '_')}.json")
    written = json.loads(found.path.read_text())
    assert written == found.to_tree()
    assert written["numbers"].keys() == {
        "rfid", "lpips", "psnr", "ssim", "kid", "precision", "recall", "swd",
    }  # fmt: skip
    assert written["model"]["sha256"] == load_model(run, "autoencoder").sha256
    assert written["model"]["trained"]["images_seen"] == 8
    assert written["data"] == to_tree(DataConfig(source=str(folder)))
    assert (written["split"], written["resolution"], written["count"]) == ("all", 32, DIM + 4)
    assert (written["corrupt"], written["limit"], written["processes"]) == (0, None, 1)
    assert written["extractor"]["name"] == FEATURES and len(written["extractor"]["sha256"]) == 64
    assert written["missing"] == {"lpips": "vgg16 is not on this machine"}
    assert written["numbers"]["lpips"] is None and written["lpips"] is None
    assert {"torch", "lpips", "clean-fid", "pillow"} <= written["versions"].keys()
    assert "is not the published Inception" in written["notes"][0]
    assert written["details"]["swd"]["32"] > 0 and written["details"]["swd_images"] == DIM + 4


def test_the_batch_size_changes_nothing(tmp_path, folder):
    run = save_run(tmp_path / "run")
    one, other = (
        measure(run, data=str(folder), split="all", resolutions=[32], features=FEATURES,
                batch_size=size)[0].numbers
        for size in (3, 16)
    )  # fmt: skip
    assert one.pop("lpips") is None and other.pop("lpips") is None
    assert one == pytest.approx(other, rel=1e-6)


def test_several_models_and_resolutions_in_one_file(tmp_path):
    runs = [save_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    out = tmp_path / "all.json"
    # each once, however often it is named
    found = measure(
        *runs, runs[0], data="photos", resolutions=[16, 32, 16], limit=4, fid=False, out=out
    )
    assert [(each.model, each.resolution) for each in found] == [
        (run, resolution) for run in runs for resolution in (16, 32)
    ]
    assert len({each.numbers["psnr"] for each in found}) == 4
    assert json.loads(out.read_text())["evaluations"] == [each.to_tree() for each in found]
    assert not (runs[0] / "eval").exists()


def test_data_and_resolution_default_to_those_of_training(tmp_path, capsys):
    phases = [{"resolution": 64, "steps": 1}, {"resolution": 32, "steps": 1}]
    save_run(tmp_path, {"data": to_tree(DataConfig(workers=0)), "phases": phases})
    (found,) = measure(tmp_path / "ckpt.pt", limit=3, fid=False)
    assert (found.count, found.resolution) == (3, 32)
    assert found.path == tmp_path / "eval" / "photos-val-32-first3-no-fid.json"
    out = capsys.readouterr().out
    assert "without LPIPS: vgg16 is not on this machine" in out and "--no-fid" not in out
    assert f"measuring {tmp_path / 'ckpt.pt'} on the val split of photos at 32×32" in out


def test_the_newest_run_is_the_default(tmp_path, monkeypatch):
    run = save_run(tmp_path / "runs" / "x")
    (run / "run.json").write_text('{"kind": "autoencoder"}')
    monkeypatch.chdir(tmp_path)
    (found,) = measure(data="photos", resolutions=[16], limit=1, fid=False)
    assert found.model.name == "x" and found.count == 1


# ----------------------------------------------------------------------------- few, corrupt
def test_rfid_over_fewer_images_than_features_needs_force(tmp_path, folder, capsys):
    run = save_run(tmp_path / "run")
    options = {"data": str(folder), "split": "all", "resolutions": [32], "features": FEATURES}
    (found,) = measure(run, limit=DIM - 1, **options)
    assert found.numbers["rfid"] is None and found.numbers["kid"] is not None
    why = f"{DIM - 1} images are fewer than the {DIM} features of each"
    assert found.about["missing"]["rfid"] == f"{why}; --force measures it anyway"
    assert f"without rFID: {why}" in capsys.readouterr().out
    (forced,) = measure(run, limit=DIM - 1, force=True, **options)
    assert forced.numbers["rfid"] > 0 and "rfid" not in forced.about["missing"]
    assert forced.about["doubtful"]["rfid"].startswith(why)
    (enough,) = measure(run, limit=DIM, **options)
    assert enough.numbers["rfid"] is not None and enough.about["doubtful"] == {}


@pytest.mark.parametrize("limit", [3, 1])
def test_too_few_images_have_no_number_of_features(tmp_path, folder, capsys, limit):
    (found,) = measure(
        save_run(tmp_path / "run"), data=str(folder), split="all", resolutions=[32], limit=limit,
        features=FEATURES, force=True,
    )  # fmt: skip
    assert found.count == limit and found.numbers["psnr"] and found.numbers["swd"]
    assert found.numbers["rfid"] is None and found.about["extractor"] is None
    said = capsys.readouterr().out
    assert f"without rFID, KID, precision, recall: {limit} image(s) have too few neighb" in said


def test_a_corrupt_image_is_left_out_and_counted(tmp_path):
    folder = save_images(tmp_path / "data", crops(8, 16) * 13)
    (folder / "050.png").write_bytes(b"no picture")
    (found,) = measure(
        save_run(tmp_path / "run"), data=str(folder), split="all", resolutions=[16], fid=False,
        batch_size=26,
    )  # fmt: skip
    assert (found.count, found.about["corrupt"]) == (103, 1)
    (folder / "051.png").write_bytes(b"no picture")
    with pytest.raises(LdmError, match="2 of 104 images are corrupt"):
        measure(tmp_path / "run", data=str(folder), split="all", resolutions=[16], fid=False)


def test_corrupt_images_are_counted_among_those_that_are_measured(tmp_path):
    """Of the whole data set these three are few."""
    folder = save_images(tmp_path / "data", crops(8, 16) * 38)
    for name in ("000.png", "001.png", "002.png"):
        (folder / name).write_bytes(b"no picture")
    options = {"data": str(folder), "split": "all", "resolutions": [16], "features": FEATURES}
    run = save_run(tmp_path / "run")
    for limit in (4, 6):
        with pytest.raises(LdmError, match=f"3 of {limit} images are corrupt"):
            measure(run, limit=limit, **options)


def test_features_that_are_not_finite_are_an_error(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(
        "tests.pipelines.measuring.reconstructed.thumbnails",
        lambda: lambda images: torch.full((len(images), DIM), float("nan")),
    )
    with pytest.raises(LdmError, match="the features of image 0 hold a NaN"):
        measure(save_run(tmp_path / "run"), data=str(folder), split="all", resolutions=[32],
                features=FEATURES)  # fmt: skip
    assert not list((tmp_path / "run" / "eval").glob("*.json"))


# ---------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name", ["batch_size", "limit"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 0: must be at least 1"):
        measure(**{name: 0})


def test_images_smaller_than_the_resolution_are_refused(tmp_path, folder):
    with pytest.raises(LdmError, match="is 32×32, smaller than the 64×64 requested"):
        measure(save_run(tmp_path / "run"), data=str(folder), resolutions=[64], fid=False)


def test_a_result_that_could_not_be_written(tmp_path):
    """Said before anything is measured, not after."""
    run = save_run(tmp_path / "run")
    (run / "eval").write_text("a file where the folder would be")
    with pytest.raises(LdmError, match=r"could not write .*eval/photos-val-16.*give --out another"):
        measure(run, data="photos", resolutions=[16], fid=False)
    with pytest.raises(LdmError, match="is a folder: give a file, such as"):
        measure(run, data="photos", resolutions=[16], fid=False, out=tmp_path)


def test_two_results_in_one_place_are_refused_before_any_is_measured(tmp_path):
    run = save_run(tmp_path / "run")
    options = {"data": "photos", "resolutions": [16], "fid": False, "limit": 1}
    with pytest.raises(UsageError, match=r"would both be written to .*photos-val-16-first1-no-fid"):
        measure(run, run / "ckpt.pt", **options)
    assert not (run / "eval").exists()
    assert len(measure(run, run / "ckpt.pt", out=tmp_path / "both.json", **options)) == 2


# ------------------------------------------------------------------------------- metrics
def load(**options):
    return load_metrics(MeasureOptions(**options), 32, torch.device("cpu"), PartialState(cpu=True))


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """A machine with no weights, on which none can be fetched."""

    def missing(device, instead):
        raise LdmError(f"vgg16 is not on this machine: {instead}")

    monkeypatch.setattr(evaluate, "load_lpips", missing)
    monkeypatch.setattr(inception, "weight_folders", lambda: [tmp_path / "cache"])
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "file:///nowhere/inception.pt")


def test_unavailable_metrics_are_left_out_with_the_reason(no_weights):
    found = load()
    assert found.lpips is None and found.extractor is None
    assert found.missing["lpips"] == "vgg16 is not on this machine: continue without it, as here"
    assert found.missing.keys() == {"lpips", *OF_FEATURES}
    assert "inception-2015-12-05.pt is not on this machine" in found.missing["rfid"]


def test_available_metrics_are_loaded(no_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_lpips", lambda device, instead: "lpips")
    found = load(weights=save_fake_inception(tmp_path))
    assert found.lpips == "lpips" and found.extractor.dim == 2048 and found.missing == {}
    assert load(features=FEATURES).extractor.dim == DIM


def test_no_fid_loads_no_inception(no_weights, monkeypatch):
    monkeypatch.setattr(statistics, "find_extractor", None)  # calling it would be an error
    found = load(fid=False)
    assert found.extractor is None
    assert {found.missing[name] for name in OF_FEATURES} == {NO_FID}


def test_requested_metrics_must_be_available(no_weights, tmp_path):
    with pytest.raises(LdmError, match=r"no Inception weights at .*x.pt"):
        load(weights=tmp_path / "x.pt")
    with pytest.raises(UsageError, match="no module 'nowhere'"):
        load(features="nowhere:function")
    with pytest.raises(UsageError, match="mode 'tensorflow' does not exist"):
        load(mode="tensorflow")


# ----------------------------------------------------------------------------- processes
@pytest.mark.slow
def test_an_error_in_one_process_ends_both(tmp_path):
    """Without a launcher that would end the other one."""
    images = crops(16)
    save_images(tmp_path / GOOD, images)
    images[5] = np.zeros((16, 16, 3), np.uint8)
    small = save_images(tmp_path / ONE_SMALL, images)
    save_run(tmp_path / "run")
    trained_on = to_tree(DataConfig(source=str(small), workers=0))
    run = save_run(tmp_path / "trained_on_small", {"data": trained_on})

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.pipelines.measuring.two_processes", str(tmp_path)]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        for process in both:
            _, said = process.communicate(timeout=180)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")

    assert first.pop("main") == "KeyError: 'a bug'"
    assert second.pop("main") == "RuntimeError: process 0 failed: KeyError: 'a bug'"
    assert first.pop("model") == "RuntimeError: process 1 failed: KeyError: 'a bug'"
    assert second.pop("model") == "KeyError: 'a bug'"
    assert first == second
    too_small = f"{small}/005.png is 16×16, smaller than the 32×32"
    assert first["measure"].startswith(f"LdmError: {too_small}")
    assert first["pass"] == "LdmError: one is gone"
    unknown = f"not known whether {run} was trained on these images: "
    assert first["overlap"].startswith(unknown + too_small)
    assert first["training data"] == f"{unknown}not on this machine"
    assert first["data"] == "LdmError: not on this machine"
    assert first["at last"] == 16
