"""Ten samples, a reference of fifteen images, and FID between them."""

import pytest

from ldm.data import DataConfig
from ldm.metrics import inception
from pipelines.fid import measure_fid
from tests.pipelines.measuring.fid_sides import pictures, write_folder, write_samples


@pytest.fixture
def samples(tmp_path):
    """Ten samples as `ldm sample` writes them, and what it says of them."""
    return write_samples(tmp_path / "samples", pictures(10, seed=0), tmp_path / "data")


@pytest.fixture
def reference(tmp_path) -> DataConfig:
    """A folder of 15 images, 3 of them held out."""
    folder = write_folder(tmp_path / "data", pictures(15, seed=1, blur=1.3))
    return DataConfig(source=str(folder), held_out=3, workers=0)


@pytest.fixture
def measure(weights):
    """`measure_fid` of few images, against what was trained on, on a CPU."""

    def call(samples, reference, split="train", **options):
        given = {"weights": weights, "device": "cpu", "force": True} | options
        return measure_fid(samples, reference, split, **given)

    return call


@pytest.fixture
def no_inception(tmp_path, monkeypatch):
    """A machine on which Inception is in none of the folders and not to be fetched."""
    monkeypatch.setattr(inception, "weight_folders", lambda: [tmp_path / "cache"])
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "file:///nowhere/inception.pt")
