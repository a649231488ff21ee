"""Torchvision's image classifiers, whose features the perceptual losses compare.

Their weights are looked for, and kept, in torch hub's folder, where torchvision itself keeps them.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import read_tensors
from ldm.errors import LdmError
from ldm.weights import find_or_fetch

PUBLISHED = {
    "VGG-16": "VGG16_Weights.IMAGENET1K_V1",
    "VGG-19": "VGG19_Weights.IMAGENET1K_V1",
    "AlexNet": "AlexNet_Weights.IMAGENET1K_V1",
    "SqueezeNet 1.1": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}
"""The networks, and what torchvision calls their weights."""


def trunk_file(network: str, instead: str) -> Path:
    """The published weights of one of `PUBLISHED`, fetched where they are not on this machine.

    Args:
        instead: what to do without the weights, as the end of the error line.

    Raises:
        LdmError: the file is neither there nor to be fetched.
    """
    name = _url(network).rpartition("/")[2]
    # torch hub's custom: a file's name ends in the first digits of its SHA-256
    digits = Path(name).stem.rpartition("-")[2]
    return find_or_fetch(name, _url(network), digits, [_folder()], instead)


def has_trunk(network: str) -> bool:
    """Whether the weights are on this machine; nothing is fetched."""
    return (_folder() / _url(network).rpartition("/")[2]).is_file()


def fill_trunk(trunk: nn.Module, network: str, path: Path, rename: Callable[[str], str]) -> None:
    """The tensors of torchvision's file into a module that has some of them.

    Args:
        rename: a tensor's name in the trunk → in the file, `features.<layer>.…`.

    Raises:
        LdmError: the file is damaged, or holds another network.
    """
    tensors = read_tensors(path)
    try:
        trunk.load_state_dict(
            {name: tensors[rename(name)] for name in trunk.state_dict()}, assign=True
        )
    except (KeyError, RuntimeError, TypeError) as error:
        raise LdmError(f"{path} holds no {network} of torchvision: delete or replace it") from error


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _url(network: str) -> str:
    from torchvision.models import get_weight

    return get_weight(PUBLISHED[network]).url
