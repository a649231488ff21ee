"""ESRGAN's perceptual loss (Wang et al. 2018, arXiv 1809.00219; LiteVAE's Table 14)."""

import torch
from torch import Tensor, nn

from autoencoders.losses.trunks import fill_trunk, trunk_file

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

    path = trunk_file("VGG-19", instead)
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the file
        features = vgg19().features[: CONV5_4 + 1]
    fill_trunk(features, "VGG-19", path, lambda name: f"features.{name}")
    return ESRGANPerceptual(features.to(device))
