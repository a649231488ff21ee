"""Metrics: reconstructions against their images, and sets of images against each other.

Inception, which some need, is in `ldm.metrics.inception`; LPIPS in `autoencoders.losses`.
"""

from ldm.metrics.features import FeatureSet, FeatureStatistics
from ldm.metrics.fid import PrecisionRecall, frechet_distance, precision_recall
from ldm.metrics.mmd import KernelDistance, kernel_distance, rbf_mmd
from ldm.metrics.reconstruction import psnr, ssim
from ldm.metrics.swd import PatchDescriptors, sliced_wasserstein

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
