"""LPIPS with a VGG-16 trunk, as a loss (Zhang et al. 2018, arXiv 1801.03924)."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_tensors
from ldm.errors import LdmError
from ldm.weights import find_or_fetch

VGG_HASH = "397923af"


class LPIPS:
    """Perceptual distance of two batches of images, averaged: a frozen function of them.

    Not an `nn.Module`, on purpose: whatever holds it, its weights reach no optimiser and no
    checkpoint, and no `train()` wakes its dropout.

    Args:
        network: an `lpips.LPIPS`, whose trunk and linear layers are used.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def __call__(self, recon: Tensor, images: Tensor) -> Tensor:
        """(B, 3, H, W) and the same, in [−1, 1] → scalar."""
        net = self.network.to(recon.device)
        pair = [net.net(net.scaling_layer(x)) for x in (recon, images)]
        layers = zip(net.lins, *pair, strict=True)
        return sum(lin((_unit(a) - _unit(b)).square()).mean() for lin, a, b in layers)


def _unit(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features (B, C, h, w) as unit vectors in the channels.

    The package adds its ε outside the root, whose gradient is not a number where the squares of
    faint features vanish.
    """
    # Zhang et al. 2018, Equation 1
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps)


def load_lpips(
    device: str | torch.device = "cpu", instead: str = "turn the loss off with loss.lpips=0"
) -> LPIPS:
    """LPIPS with its published weights; the VGG-16 trunk is torchvision's, from torch hub's folder.

    Args:
        instead: what to do without the weights, as the end of the error line.

    Raises:
        LdmError: the trunk's weights are neither there nor to be fetched, or damaged.
    """
    import lpips
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    path = find_or_fetch(
        name=url.rpartition("/")[2],
        url=url,
        hash_prefix=VGG_HASH,
        folders=[Path(torch.hub.get_dir()) / "checkpoints"],
        instead=instead,
    )
    trunk = read_tensors(path)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    _fill_trunk(network.net, trunk, path)
    return LPIPS(network.to(device))


def _fill_trunk(trunk: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Torchvision's `features.<layer>.…` into the package's `slice<n>.<layer>.…`."""
    try:
        trunk.load_state_dict(
            {name: weights[f"features.{name.partition('.')[2]}"] for name in trunk.state_dict()}
        )
    except (KeyError, RuntimeError, TypeError) as error:
        raise LdmError(f"{path} holds no VGG-16 of torchvision: delete or replace it") from error
