import pytest
import torch
from torch.distributions import Normal, kl_divergence

from autoencoders import DiagonalGaussian
from autoencoders.losses.reconstruction import kl, l1, l2


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
