"""What stands in for published networks where a smoke test does without them.

Random weights where a loss or LPIPS looks for a VGG; a few mean colours in place of Inception's
features. Nothing is fetched, and no number that they give is shown: they mean nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.losses.trunks import PUBLISHED, has_trunk

LAYERS = {"VGG-16": "D", "VGG-19": "E"}
"""The letters under which their paper, and torchvision, have them (Simonyan & Zisserman 2015)."""
FEATURES = f"{__name__}:mean_colours"
"""As `load_extractor` takes it."""


@contextmanager
def random_trunk(network: str, wanted: bool = True) -> Iterator[None]:
    """Inside, a network of `LAYERS` is found with random weights, always the same.

    Where the published ones are on this machine, they are.

    Args:
        wanted: False: nothing is changed.
    """
    if not wanted or has_trunk(network):
        yield
        return
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = _torch_home(network).name
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_HOME"]
        else:
            os.environ["TORCH_HOME"] = before


@cache
def _torch_home(network: str) -> TemporaryDirectory:
    """A folder with one network's weights, for as long as this process lives."""
    from torchvision.models import get_weight
    from torchvision.models.vgg import cfgs, make_layers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = make_layers(cfgs[LAYERS[network]])
        for part in features:
            if isinstance(part, nn.Conv2d):  # so that features neither vanish nor explode
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    home = TemporaryDirectory(prefix="ldm-stand-in-")
    folder = Path(home.name) / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights, folder / Path(get_weight(PUBLISHED[network]).url).name)
    return home


def mean_colours() -> Callable[[Tensor], Tensor]:
    """Features (B, 12) of images (B, 3, H, W) uint8: the mean colours of their quarters."""
    return lambda images: F.adaptive_avg_pool2d(images.float(), 2).flatten(1)
