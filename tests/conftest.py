"""Fixtures of several folders: small models, and a machine on which nothing can be fetched.

Tests side by side (`pytest -n 2`) have a core each: more threads would get in the way.
"""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands inherit it
if "LDM_CACHE" not in os.environ:  # indexes of shards would be kept in the user's
    os.environ["LDM_CACHE"] = tempfile.mkdtemp(prefix="ldm-cache-")
    atexit.register(shutil.rmtree, os.environ["LDM_CACHE"], ignore_errors=True)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, commands would inherit its refusal
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of kept statistics, empty, into which none can be fetched."""
    from ldm.metrics import features

    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "ADDRESS", "file:///nowhere")
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """A file of Inception's interface, with fewer features: matrix roots of 2048 take seconds."""
    from ldm.metrics import inception
    from tests.ldm.metrics.fake_inception import save_fake_inception
    from tests.pipelines.measuring.fid_sides import DIM

    monkeypatch.setattr(inception.FeatureExtractor, "dim", DIM)
    return save_fake_inception(tmp_path, DIM)


@pytest.fixture
def asked(tmp_path, monkeypatch) -> dict[str, Any]:
    """Requests to the Hub's client, whose repositories lie in a folder."""
    from tests.fake_hub import fake_hub

    return fake_hub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def no_lpips(monkeypatch) -> None:
    """Without VGG's weights."""
    from ldm.errors import LdmError
    from pipelines import evaluate

    def missing(device, instead):
        raise LdmError("vgg16 is not on this machine")

    monkeypatch.setattr(evaluate, "load_lpips", missing)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of an untrained stage-two model."""
    from tests.pipelines.untrained import make_model

    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    """The folder of an untrained stage-two model with classes."""
    from tests.pipelines.untrained import CLASSES, make_model

    return make_model(tmp_path_factory.mktemp("classes"), 0, CLASSES)
