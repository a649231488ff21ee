import urllib.error
import warnings

import pytest
import torch


@pytest.fixture(scope="package")
def random_lpips():
    """The lpips package's network: its own linear layers on a random backbone."""
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in an outdated way
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub, and no network."""

    def no_network(*_args, **_kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder
