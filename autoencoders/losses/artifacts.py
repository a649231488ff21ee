"""Locally discriminative learning: what looks like the discriminator's artifacts costs more.

Liang, Zeng & Zhang 2022, "Details or Artifacts" (arXiv 2203.09195); LiteVAE's Table 15.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def ldl(recon: Tensor, images: Tensor, averaged: Tensor | None = None) -> Tensor:
    """Mean absolute difference of two (B, 3, H, W) in [−1, 1], weighed by `artifact_map`."""
    # Liang et al. 2022, Section 3.3: ‖M_refine · (x − x̂)‖₁; the map is no way round the loss
    return (artifact_map(recon, images, averaged) * (recon - images)).abs().mean()


@torch.no_grad()
def artifact_map(recon: Tensor, images: Tensor, averaged: Tensor | None = None) -> Tensor:
    """How likely each pixel is an artifact: images (B, 3, H, W) in [−1, 1] → (B, 1, H, W), ≥ 0.

    The residual of an artifact varies within a few pixels, that of a smooth error does not. The
    map grows faster than the residual, so it is taken in the paper's range, [0, 1].

    Args:
        averaged: the reconstruction by the averaged weights, which make fewer artifacts: where the
            current one is the nearer of the two there is none. None: nowhere is left out.
    """
    residual = _residual(recon, images)
    # Liang et al. 2022, Section 3.2: σ = var(R)^(1/5) of an image, M its variance in a window
    scale = residual.var(dim=(1, 2, 3), keepdim=True) ** 0.2
    local = scale * local_variance(residual)
    if averaged is None:
        return local
    # Liang et al. 2022, Section 3.2: 0 where |R₁| < |R₂|, the averaged model's residual
    return local.masked_fill(residual < _residual(averaged, images), 0)


def local_variance(x: Tensor, size: int = 7) -> Tensor:
    """Unbiased variance in a window of `size` pixels a side around each of (B, 1, H, W).

    The border reflects the image.
    """
    reach, count = size // 2, size**2
    # from the image's own mean: E[x²] − E[x]² loses its digits where the mean is far from 0
    x = F.pad(x - x.mean(dim=(2, 3), keepdim=True), (reach, reach, reach, reach), mode="reflect")
    mean, mean_square = (F.avg_pool2d(values, size, stride=1) for values in (x, x.square()))
    return (mean_square - mean.square()).clamp(min=0) * (count / (count - 1))


def _residual(recon: Tensor, images: Tensor) -> Tensor:
    """Absolute difference of (B, 3, H, W), in units of [0, 1], over the colours: (B, 1, H, W)."""
    return (recon - images).abs().sum(dim=1, keepdim=True) / 2
