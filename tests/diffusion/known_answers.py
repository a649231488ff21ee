"""Denoisers known in closed form: D(x; σ) = E[z | z + σn = x] for data of a known distribution.

Each function returns a denoiser of x (B, C, H, W) and σ () or (B,), as an exactly trained network
would be. A σ of () may be a plain number.
"""

import math

import torch
from torch import Tensor


def gaussian(mean: float, std: float):
    """Data whose values are all independently N(mean, std²)."""

    def denoise(x, sigma):
        variance = _level(sigma) ** 2
        return (std**2 * x + variance * mean) / (std**2 + variance)

    return denoise


def gaussian_path(x, sigma: float, sigma_end: float, mean: float, std: float):
    """The probability-flow ODE's solution at σ_end from x at σ, on the data of `gaussian`.

    dx/dσ = σ (x − mean) / (std² + σ²) has the solution x − mean ∝ √(std² + σ²).
    """
    return mean + (x - mean) * math.sqrt((std**2 + sigma_end**2) / (std**2 + sigma**2))


def mixture(means: Tensor, stds: Tensor, weights: Tensor):
    """Data from K Gaussians N(means[k], stds[k]² I), picked with probability weights[k].

    means is (K, C, H, W), stds and weights are (K,).
    """

    def denoise(x, sigma):
        means_, stds_, weights_ = means.to(x), stds.to(x), weights.to(x)
        variance = _level(sigma) ** 2
        variance = torch.as_tensor(variance, dtype=x.dtype).reshape(-1, 1)  # (B or 1, 1)
        total = stds_**2 + variance  # (B or 1, K)
        off = x[:, None] - means_  # (B, K, C, H, W)
        distance = off.square().sum(dim=(2, 3, 4))  # (B, K)
        log_share = weights_.log() - distance / (2 * total) - means[0].numel() / 2 * total.log()
        share = log_share.softmax(dim=1)  # (B, K): which one x came from
        kept = (stds_**2 / total)[..., None, None, None]  # (B or 1, K, 1, 1, 1)
        return (share[..., None, None, None] * (means_ + kept * off)).sum(dim=1)

    return denoise


def dataset(images: Tensor):
    """Data that are these images (K, C, H, W) and no others, all equally frequent."""
    return mixture(images, torch.zeros(len(images)), torch.ones(len(images)))


def correlated_gaussian(mean: Tensor, covariance: Tensor):
    """Data N(mean, covariance): mean (C, H, W), covariance (CHW, CHW); σ () alone."""

    def denoise(x, sigma):
        noise = float(sigma) ** 2 * torch.eye(len(covariance)).to(covariance)
        gain = torch.linalg.solve(covariance + noise, covariance).T.to(x)  # S (S + σ²)⁻¹
        off = (x - mean.to(x)).flatten(1)  # (B, CHW)
        return mean.to(x) + (off @ gain.T).view_as(x)

    return denoise


def _level(sigma):
    """σ so that it spreads over (B, C, H, W)."""
    return sigma.view(-1, 1, 1, 1) if isinstance(sigma, Tensor) and sigma.ndim else sigma
