"""What measures: found, left out with its reason, or insisted on."""

import pytest
import torch
from accelerate import PartialState

from ldm.errors import LdmError, UsageError
from ldm.metrics import inception
from pipelines.measuring import metrics as instruments
from pipelines.measuring.metrics import FEATURES, NOT_ASKED, find_instruments
from tests.ldm.metrics.fake_inception import save_fake_inception
from tests.pipelines.measuring.reconstructed import DIM
from tests.pipelines.measuring.reconstructed import FEATURES as THUMBNAILS

CPU = torch.device("cpu")


def find(fid=True, weights=None, features=None, mode="clean"):
    return find_instruments(fid, weights, features, mode, 32, CPU, PartialState(cpu=True))


@pytest.fixture(autouse=True)
def nothing_there(tmp_path, monkeypatch):
    """A machine with no weights, on which none can be fetched."""

    def missing(device, instead):
        raise LdmError(f"vgg16 is not on this machine: {instead}")

    monkeypatch.setattr(instruments, "load_lpips", missing)
    monkeypatch.setattr(inception, "weight_folders", lambda: [tmp_path / "cache"])
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "file:///nowhere/inception.pt")


def test_what_cannot_be_had_is_left_out_and_named():
    found = find()
    assert found.lpips is None and found.extractor is None
    assert found.missing["lpips"] == "vgg16 is not on this machine: go without it, as here"
    assert found.missing.keys() == {"lpips", *FEATURES}
    assert "inception-2015-12-05.pt is not on this machine" in found.missing["rfid"]


def test_what_is_there_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(instruments, "load_lpips", lambda device, instead: "lpips")
    found = find(weights=save_fake_inception(tmp_path))
    assert found.lpips == "lpips" and found.extractor.dim == 2048 and found.missing == {}
    assert find(features=THUMBNAILS).extractor.dim == DIM


def test_no_fid_looks_for_no_inception(monkeypatch):
    monkeypatch.setattr(instruments, "find_extractor", None)  # calling it would be an error
    found = find(fid=False)
    assert found.extractor is None
    assert {found.missing[name] for name in FEATURES} == {NOT_ASKED}


def test_what_is_asked_for_must_be_there(tmp_path):
    with pytest.raises(LdmError, match=r"no Inception weights at .*x.pt"):
        find(weights=tmp_path / "x.pt")
    with pytest.raises(UsageError, match="no module 'nowhere'"):
        find(features="nowhere:function")
    with pytest.raises(UsageError, match="mode 'tensorflow' does not exist"):
        find(mode="tensorflow")


@pytest.mark.parametrize("given", [{"features": THUMBNAILS}, {"mode": "legacy-tensorflow"}])
def test_words_that_contradict(given):
    with pytest.raises(UsageError, match="--no-fid leaves out what"):
        find(fid=False, **given)
