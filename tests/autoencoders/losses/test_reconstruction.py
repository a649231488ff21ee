import math

import numpy as np
import ptwt
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.distributions import Normal, kl_divergence

from autoencoders import DiagonalGaussian
from autoencoders.losses.reconstruction import blur, gaussian, kl, l1, l2, wavelet


def test_l1_is_the_mean_over_everything():
    recon, images = torch.tensor([0.5, -1.0, 1.0]), torch.tensor([0.0, -1.0, -1.0])
    assert l1(recon.view(1, 3, 1, 1), images.view(1, 3, 1, 1)).item() == pytest.approx(2.5 / 3)


def test_l2_is_the_mean_square_over_everything():
    recon, images = torch.tensor([0.5, -1.0, 1.0]), torch.tensor([0.0, -1.0, -1.0])
    assert l2(recon.view(1, 3, 1, 1), images.view(1, 3, 1, 1)).item() == pytest.approx(4.25 / 3)


def test_kl_is_in_nats_per_image_value():
    rng = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=rng)
    posterior, images = DiagonalGaussian(mean, logvar), torch.zeros(3, 3, 16, 16)
    divergence = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    expected = divergence.sum() / 3 / (3 * 16 * 16)
    torch.testing.assert_close(kl(posterior, images), expected)


@pytest.fixture
def pair():
    return tuple(torch.randn(2, 2, 3, 16, 20, generator=torch.Generator().manual_seed(0)))


def scipy_blur(images):
    over = (0, 0, 1.0, 1.0)
    return gaussian_filter(images.double().numpy(), over, mode="mirror", radius=(0, 0, 2, 2))


def test_blur_is_scipys(pair):
    np.testing.assert_allclose(blur(pair[0]).numpy(), scipy_blur(pair[0]), rtol=0, atol=1e-6)


def test_blur_keeps_flat_images_and_ignores_the_layout(pair):
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(blur(flat), flat)
    images = pair[0].to(memory_format=torch.channels_last)
    torch.testing.assert_close(blur(images), blur(pair[0]))


def test_gaussian_is_l1_of_both_high_passes(pair):
    high = [images.double().numpy() - scipy_blur(images) for images in pair]
    expected = np.abs(high[0] - high[1]).mean()
    assert gaussian(*pair).item() == pytest.approx(expected, rel=1e-5)


def test_wavelet_is_charbonnier_on_the_edges_of_ptwt(pair):
    edges = [ptwt.wavedec2(images.double(), "haar", level=1)[1] for images in pair]
    total, count = 0.0, 0
    for ours, theirs in zip(*edges, strict=True):
        for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
            total += math.sqrt((a - b) ** 2 + 1e-3**2)
            count += 1
    assert wavelet(*pair).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loss", [gaussian, wavelet])
def test_a_shift_of_brightness_costs_nothing(loss, pair):
    images = pair[0]
    # Charbonnier's floor is its ε
    assert loss(images + 0.5, images).item() == pytest.approx(
        1e-3 if loss is wavelet else 0, abs=1e-6
    )


@pytest.mark.parametrize("loss", [gaussian, wavelet])
def test_equal_images_give_finite_gradients(loss, pair):
    recon = pair[0].clone().requires_grad_()
    loss(recon, pair[0]).backward()
    assert recon.grad.isfinite().all()
