"""Numbers on images: how close a reconstruction is, and how close two sets of images are.

The reconstruction's distance that a network judges (LPIPS) is a loss too, and lives with the
losses; what makes features of images, which needs weights, is in `ldm.metrics.extractors`.
"""

from ldm.metrics.feature_set import FeatureSet
from ldm.metrics.frechet import FeatureStatistics, frechet_distance
from ldm.metrics.kid import KernelDistance, kernel_distance
from ldm.metrics.mmd import rbf_mmd
from ldm.metrics.precision_recall import PrecisionRecall, precision_recall
from ldm.metrics.reconstruction import psnr, ssim
from ldm.metrics.wasserstein import PatchDescriptors, sliced_wasserstein

__all__ = [
    "FeatureSet",
    "FeatureStatistics",
    "KernelDistance",
    "PatchDescriptors",
    "PrecisionRecall",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "psnr",
    "rbf_mmd",
    "sliced_wasserstein",
    "ssim",
]
