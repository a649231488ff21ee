"""LPIPS as a loss (Zhang et al. 2018, arXiv 1801.03924)."""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from autoencoders.losses.trunks import fill_trunk, has_trunk, trunk_file

Network = Literal["vgg", "alex", "squeeze"]
TRUNKS = {"vgg": "VGG-16", "alex": "AlexNet", "squeeze": "SqueezeNet 1.1"}


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
        """(B, 3, H, W) and the same, in [−1, 1] → scalar, in float32 under autocast too."""
        return self.each(recon, images).mean()

    def each(self, recon: Tensor, images: Tensor) -> Tensor:
        """The distance of every pair, (B,); otherwise as a call."""
        net = self.network.to(recon.device)
        with torch.autocast(recon.device.type, enabled=False):
            pair = [net.net(net.scaling_layer(x.float())) for x in (recon, images)]
            layers = zip(net.lins, *pair, strict=True)
            # Zhang et al. 2018, Equation 1: a mean over places, a sum over layers
            return sum(
                lin((_unit(a) - _unit(b)).square()).mean(dim=(1, 2, 3)) for lin, a, b in layers
            )


def _unit(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features (B, C, h, w) as unit vectors in the channels.

    The package adds its ε outside the root, whose gradient is not a number where the squares of
    faint features vanish.
    """
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps)


def load_lpips(
    device: str | torch.device = "cpu",
    network: Network = "vgg",
    instead: str = "turn the loss off with loss.lpips=0",
) -> LPIPS:
    """LPIPS with its published weights; the trunk is torchvision's, from torch hub's folder.

    Args:
        network: the trunk: VGG-16, AlexNet or SqueezeNet 1.1.
        instead: what to do without the weights, as the end of the error line.

    Raises:
        LdmError: the trunk's weights are neither there nor to be fetched, or damaged.
    """
    import lpips

    path = trunk_file(TRUNKS[network], instead)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        net = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    # the package cuts the layers into slices: slice<n>.<layer>.…
    fill_trunk(net.net, TRUNKS[network], path, lambda name: f"features.{name.partition('.')[2]}")
    return LPIPS(net.to(device))


def find_lpips(device: str | torch.device = "cpu", network: Network = "vgg") -> LPIPS | None:
    """`load_lpips` where the trunk's weights are on this machine already, else None.

    Raises:
        LdmError: the file is there, and damaged.
    """
    return load_lpips(device, network) if has_trunk(TRUNKS[network]) else None
