"""Numbers on images: how close a reconstruction is, and how close two sets of images are.

The reconstruction's distance that a network judges (LPIPS) is a loss too, and lives with the
losses; Inception features, which need weights, are in `ldm.metrics.inception`.
"""

from ldm.metrics.frechet import FeatureStatistics, frechet_distance
from ldm.metrics.reconstruction import psnr, ssim
from ldm.metrics.wasserstein import PatchDescriptors, sliced_wasserstein

__all__ = [
    "FeatureStatistics",
    "PatchDescriptors",
    "frechet_distance",
    "psnr",
    "sliced_wasserstein",
    "ssim",
]
