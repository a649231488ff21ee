"""Torchvision's image classifiers, whose features the perceptual losses compare.

Their weights are looked for, and kept, in torch hub's folder, where torchvision itself keeps them.

LPIPS as a loss (Zhang et al. 2018, arXiv 1801.03924).

ESRGAN's perceptual loss (Wang et al. 2018, arXiv 1809.00219; LiteVAE's Table 14).
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

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


def backbone_file(network: str, instead: str) -> Path:
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


def has_backbone(network: str) -> bool:
    """Whether the weights are on this machine; nothing is fetched."""
    return (_folder() / _url(network).rpartition("/")[2]).is_file()


def fill_backbone(
    backbone: nn.Module, network: str, path: Path, rename: Callable[[str], str]
) -> None:
    """The tensors of torchvision's file into a module that has some of them.

    Args:
        rename: a tensor's name in the backbone → in the file, `features.<layer>.…`.

    Raises:
        LdmError: the file is damaged, or holds another network.
    """
    tensors = read_tensors(path)
    try:
        backbone.load_state_dict(
            {name: tensors[rename(name)] for name in backbone.state_dict()}, assign=True
        )
    except (KeyError, RuntimeError, TypeError) as error:
        raise LdmError(f"{path} holds no {network} of torchvision: delete or replace it") from error


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _url(network: str) -> str:
    from torchvision.models import get_weight

    return get_weight(PUBLISHED[network]).url


Network = Literal["vgg", "alex", "squeeze"]
BACKBONES = {"vgg": "VGG-16", "alex": "AlexNet", "squeeze": "SqueezeNet 1.1"}


class LPIPS:
    """Perceptual distance of two batches of images, averaged: a frozen function of them.

    Not an `nn.Module`, on purpose: whatever holds it, its weights reach no optimiser and no
    checkpoint, and no `train()` wakes its dropout.

    Args:
        network: an `lpips.LPIPS`, whose backbone and linear layers are used.
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
    """LPIPS with its published weights; the backbone is torchvision's, from torch hub's folder.

    Args:
        network: the backbone: VGG-16, AlexNet or SqueezeNet 1.1.
        instead: what to do without the weights, as the end of the error line.

    Raises:
        LdmError: the backbone's weights are neither there nor to be fetched, or damaged.
    """
    import lpips

    path = backbone_file(BACKBONES[network], instead)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        net = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    # the package cuts the layers into slices: slice<n>.<layer>.…
    fill_backbone(
        net.net, BACKBONES[network], path, lambda name: f"features.{name.partition('.')[2]}"
    )
    return LPIPS(net.to(device))


def find_lpips(device: str | torch.device = "cpu", network: Network = "vgg") -> LPIPS | None:
    """`load_lpips` where the backbone's weights are on this machine already, else None.

    Raises:
        LdmError: the file is there, and damaged.
    """
    return load_lpips(device, network) if has_backbone(BACKBONES[network]) else None


CONV5_4 = 34
"""Index of the fourth convolution before the fifth pooling in torchvision's VGG-19."""
# of ImageNet's images in [0, 1], which the network was trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ESRGANPerceptual:
    """Mean absolute difference of VGG-19's features before the last activation.

    Before it they are dense: after it most are zero, and tell the generator little. Like `LPIPS`
    a frozen function, no `nn.Module`: its weights reach no optimiser and no checkpoint.

    Args:
        features: VGG-19 up to its convolution 5_4.
    """

    def __init__(self, features: nn.Module) -> None:
        self.features = features.eval().requires_grad_(False)

    def __call__(self, recon: Tensor, images: Tensor) -> Tensor:
        """(B, 3, H, W) and the same, in [−1, 1] → scalar, in float32 under autocast too."""
        network = self.features.to(recon.device)
        with torch.autocast(recon.device.type, enabled=False):
            # Wang et al. 2018, Section 3.3: ‖φ(x̂) − φ(x)‖₁, φ before activation
            return (network(_normalise(recon)) - network(_normalise(images))).abs().mean()


def _normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] → as the classifier was trained to see them."""
    mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.float() + 1) / 2 - mean) / std


def load_esrgan(
    device: str | torch.device = "cpu", instead: str = "turn the loss off with loss.esrgan=0"
) -> ESRGANPerceptual:
    """ESRGAN's loss on torchvision's published VGG-19, from torch hub's folder.

    Args:
        instead: what to do without the weights, as the end of the error line.

    Raises:
        LdmError: the weights are neither there nor to be fetched, or damaged.
    """
    from torchvision.models import vgg19

    path = backbone_file("VGG-19", instead)
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the file
        features = vgg19().features[: CONV5_4 + 1]
    fill_backbone(features, "VGG-19", path, lambda name: f"features.{name}")
    return ESRGANPerceptual(features.to(device))
