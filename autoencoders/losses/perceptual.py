"""Perceptual losses: LPIPS and ESRGAN's, and the torchvision networks whose features they compare.

The networks' weights are read from torch hub's folder, where torchvision keeps them too, and
downloaded into it when missing.
"""

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.checkpoint import read_tensors
from ldm.errors import LdmError
from ldm.hub import find_or_fetch

PUBLISHED = {
    "VGG-16": "VGG16_Weights.IMAGENET1K_V1",
    "VGG-19": "VGG19_Weights.IMAGENET1K_V1",
    "AlexNet": "AlexNet_Weights.IMAGENET1K_V1",
    "SqueezeNet 1.1": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}
"""Torchvision's names of the networks' weights."""
LPIPSNetwork = Literal["vgg", "alex", "squeeze"]
BACKBONES = {"vgg": "VGG-16", "alex": "AlexNet", "squeeze": "SqueezeNet 1.1"}
SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}
"""Side of the smallest images that each can take, pixels: a pooling more would leave nothing."""
CONV5_4 = 34
"""Index of the fourth convolution before the fifth pooling in torchvision's VGG-19."""
# of ImageNet's images in [0, 1], which the networks were trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------- backbones
def backbone_url(network: str) -> str:
    """Address of the published weights of one of `PUBLISHED`."""
    from torchvision.models import get_weight

    return get_weight(PUBLISHED[network]).url


def backbone_path(network: str) -> Path:
    """Path of a network's weights in torch hub's folder, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / backbone_url(network).rpartition("/")[2]


def has_backbone(network: str) -> bool:
    """True if the weights are on this machine; nothing is downloaded."""
    return backbone_path(network).is_file()


def backbone_file(network: str, instead: str) -> Path:
    """Path of a network's weights, downloaded if missing; an error ends in the advice `instead`."""
    path = backbone_path(network)
    # as everywhere in torch hub, a file's name ends in the first digits of its SHA-256
    digits = path.stem.rpartition("-")[2]
    return find_or_fetch(path.name, backbone_url(network), digits, [path.parent], instead)


def _fill_backbone(backbone: nn.Module, network: str, path: Path) -> None:
    """Load torchvision's file into a backbone."""
    tensors = read_tensors(path)
    weights: dict[str, Tensor] = {}
    try:
        for name in backbone.state_dict():
            # the lpips package cuts the layers into slices: slice<n>.<layer>.…
            theirs = re.sub(r"^(slice\d+\.)?", "features.", name)
            weights[name] = tensors[theirs]
        backbone.load_state_dict(weights, assign=True)
    except (KeyError, RuntimeError, TypeError) as error:
        raise LdmError(f"{path} is not torchvision's {network}: delete or replace it") from error


def _on(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to the device unless all of it is there.

    Parameters under `FakeTensorMode`, as in a dry run, cannot be moved, not even to where they are.
    """
    tensors = (*network.parameters(), *network.buffers())
    return network if all(t.device == device for t in tensors) else network.to(device)


# ----------------------------------------------------------------------------------- LPIPS
class LPIPS:
    """Mean perceptual distance of two batches of images (Zhang et al. 2018, arXiv 1801.03924).

    Deliberately no `nn.Module`: its weights reach no optimiser and no checkpoint, and no `train()`
    turns its dropout on.

    Images of another number of channels than three are compared channel by channel, each repeated
    to three; the distance is the mean.

    Args:
        network: an `lpips.LPIPS`; its backbone and linear layers are used.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)
        self.smallest = SMALLEST[getattr(network, "pnet_type", "vgg")]

    def __call__(self, recon: Tensor, images: Tensor) -> Tensor:
        """Two batches (B, C, H, W) in [−1, 1] → scalar, in float32 under autocast too."""
        return self.each(recon, images).mean()

    def each(self, recon: Tensor, images: Tensor) -> Tensor:
        """Distance of each pair: two batches (B, C, H, W) in [−1, 1] → (B,), in float32.

        Raises:
            LdmError: a side is below `smallest`.
        """
        net: Any = _on(self.network, recon.device)
        if min(images.shape[-2:]) < self.smallest:
            height, width = images.shape[-2:]
            raise LdmError(
                f"images of {height}×{width} pixels are too small for LPIPS, which needs "
                f"{self.smallest}×{self.smallest}: use larger ones, or do without it"
            )
        with torch.autocast(recon.device.type, enabled=False):
            pair = [net.net(net.scaling_layer(in_colour(x.float()))) for x in (recon, images)]
            layers = zip(net.lins, *pair, strict=True)
            # Zhang et al. 2018, Equation 1: a mean over places, a sum over layers
            distances: Any = sum(
                lin((_unit(a) - _unit(b)).square()).mean(dim=(1, 2, 3)) for lin, a, b in layers
            )
        return distances if images.shape[1] == 3 else distances.view(len(images), -1).mean(1)


def in_colour(images: Tensor) -> Tensor:
    """Images (B, C, H, W) for networks of colour: as they are if C is 3, else each channel as an
    image of its own, repeated to three: (B·C, 3, H, W)."""
    if images.shape[1] == 3:
        return images
    return images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)


def _unit(features: Tensor, eps: float = 1e-10) -> Tensor:
    """Features (B, C, h, w) as unit vectors over the channels.

    ε stands inside the root: outside, as in the lpips package, the gradient is NaN where the
    squares of small features underflow.
    """
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps)


def load_lpips(
    device: str | torch.device = "cpu",
    network: LPIPSNetwork = "vgg",
    instead: str = "turn the loss off with loss.lpips=0",
) -> LPIPS:
    """Load LPIPS with its published weights, on torchvision's backbone.

    Args:
        network: the backbone: VGG-16, AlexNet or SqueezeNet 1.1.
        instead: advice that ends the error line when there are no weights.

    Raises:
        LdmError: the backbone's weights are damaged, or missing and cannot be downloaded.
    """
    path = backbone_file(BACKBONES[network], instead)
    with torch.random.fork_rng(devices=[]):
        net = random_lpips(network)
    _fill_backbone(net.net, BACKBONES[network], path)
    return LPIPS(net.to(device))


def random_lpips(network: LPIPSNetwork, **options: bool) -> Any:
    """Build the network of the lpips package on a backbone of random weights."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        return lpips.LPIPS(net=network, pnet_rand=True, verbose=False, **options)


def find_lpips(device: str | torch.device = "cpu", network: LPIPSNetwork = "vgg") -> LPIPS | None:
    """`load_lpips` if the backbone's weights are on this machine already, else None."""
    return load_lpips(device, network) if has_backbone(BACKBONES[network]) else None


# ---------------------------------------------------------------------------------- ESRGAN
class ESRGANPerceptual:
    """ESRGAN's perceptual loss (Wang et al. 2018, arXiv 1809.00219; LiteVAE's Table 14).

    Mean absolute difference of VGG-19's features before the last activation: after it most are
    zero, and tell the generator little. No `nn.Module`, like `LPIPS`.

    Args:
        features: VGG-19 up to its convolution 5_4.
    """

    def __init__(self, features: nn.Module) -> None:
        self.network = nn.Sequential(Normalise(), features).eval().requires_grad_(False)

    def __call__(self, recon: Tensor, images: Tensor) -> Tensor:
        """Two batches (B, C, H, W) in [−1, 1] → scalar, in float32 under autocast too."""
        network = _on(self.network, recon.device)
        recon, images = in_colour(recon), in_colour(images)
        with torch.autocast(recon.device.type, enabled=False):
            # Wang et al. 2018, Section 3.3: ‖φ(x̂) − φ(x)‖₁, φ before activation
            return (network(recon) - network(images)).abs().mean()


class Normalise(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → normalised as the classifier's training images."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # buffers, since a GPU would wait for constants made in a step
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return ((images.float() + 1) / 2 - self.mean) / self.std


def load_esrgan(
    device: str | torch.device = "cpu", instead: str = "turn the loss off with loss.esrgan=0"
) -> ESRGANPerceptual:
    """Load ESRGAN's loss on torchvision's published VGG-19.

    Args:
        instead: advice that ends the error line when there are no weights.

    Raises:
        LdmError: the weights are damaged, or missing and cannot be downloaded.
    """
    from torchvision.models import vgg19

    path = backbone_file("VGG-19", instead)
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the file
        features = vgg19().features[: CONV5_4 + 1]
    _fill_backbone(features, "VGG-19", path)
    return ESRGANPerceptual(features.to(device))
