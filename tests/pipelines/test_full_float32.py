"""Every job that measures, and sampling, compute in full float32, and leave the settings alone."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ldm.data import DataConfig, open_source
from ldm.device import _tf32_switches, allows_tf32, full_float32
from ldm.run_folder import provenance
from pipelines.analysis.features import analyze_features
from pipelines.analysis.latents import analyze_latents
from pipelines.analysis.mmd import MmdSettings, analyze_mmd
from pipelines.analysis.subjects import open_analysis
from pipelines.evaluate import evaluate_checkpoints
from pipelines.fid import measure_fid
from pipelines.neighbours import find_neighbours
from pipelines.sample import sample_images
from pipelines.validation import evaluate_autoencoder
from tests.pipelines.measuring.reconstructed import (
    FEATURES,
    crops,
    random_autoencoder,
    save_images,
    save_run,
)
from tests.pipelines.untrained import load

pytestmark = pytest.mark.usefixtures("no_lpips", "cache")


def settings() -> list:
    return [getattr(owner, name) for owner, name, _ in _tf32_switches()]


def is_on() -> bool:
    return any(value in (True, "tf32") for value in settings())


@pytest.fixture
def gpu(monkeypatch):
    """Settings of a user who wants speed, recorded as on a machine with a GPU."""
    monkeypatch.setattr("ldm.run_folder.allows_tf32", is_on)
    before = settings()
    for owner, name, off in _tf32_switches():
        setattr(owner, name, "tf32" if off == "ieee" else True)
    yield settings()
    for (owner, name, _), value in zip(_tf32_switches(), before, strict=True):
        setattr(owner, name, value)


def test_settings_are_restored_after_an_error(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert allows_tf32() and provenance()["tf32"]
    with pytest.raises(ZeroDivisionError), full_float32():
        assert not allows_tf32() and not provenance()["tf32"]
        1 / 0  # noqa: B018
    assert settings() == gpu


def sample(model, folder):
    sample_images(model, 2, folder / "samples", steps=2, device="cpu", precision="fp32")


def sample_by_hand(model, folder):
    pipe = load(model)
    pipe.edit(pipe(n=1, steps=2), steps=2)


def fid(model, folder):
    options = {"features": FEATURES, "force": True, "device": "cpu"}
    sampling = {"n": 4, "steps": 2, "precision": "fp32"}
    result = measure_fid(model=model, data=str(folder / "data"), sampling=sampling, **options)
    assert result["tf32"] is False


def eval_ae(model, folder):
    run, data = save_run(folder / "run"), str(folder / "data")
    options = {"split": "all", "resolutions": [32], "features": FEATURES, "device": "cpu"}
    (found,) = evaluate_checkpoints([run], data, **options)
    assert found.about["tf32"] is False


def validation(model, folder):
    source = open_source(DataConfig(source=str(folder / "data")), "all", 32)
    evaluate_autoencoder(random_autoencoder(), source, 32, 4, torch.device("cpu"))


def neighbours(model, folder):
    sample(model, folder)
    options = {"data": str(folder / "data"), "count": 1, "nearest": 1, "device": "cpu"}
    assert find_neighbours(folder / "samples", **options)["tf32"] is False


def analyses(model, folder):
    run, data = save_run(folder / "run"), str(folder / "data")
    opened = open_analysis([run], data, "all", 32, "cpu")
    analyze_mmd(*opened, MmdSettings(n=4, draws=2), out=folder / "mmd")
    analyze_latents(*opened, n=4, count=1, out=folder / "latents")
    analyze_features(*opened, count=1, out=folder / "features")


@pytest.mark.parametrize(
    "job", [sample, sample_by_hand, fid, eval_ae, validation, neighbours, analyses]
)
def test_networks_compute_in_full_float32(job, model, tmp_path, gpu):
    save_images(tmp_path / "data", crops(16))
    seen = []
    hook = register_module_forward_pre_hook(lambda *_: seen.append(is_on()))
    try:
        job(model, tmp_path)
    finally:
        hook.remove()
    assert seen and not any(seen)
    assert settings() == gpu
