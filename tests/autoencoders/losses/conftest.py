import warnings

import pytest
import torch


@pytest.fixture(scope="package")
def random_lpips():
    """The lpips package's network: its own linear layers on a random trunk."""
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in an outdated way
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
