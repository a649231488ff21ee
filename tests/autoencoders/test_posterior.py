import pytest
import torch
from torch.distributions import Normal, kl_divergence

from autoencoders import DiagonalGaussian


@pytest.fixture
def posterior(rng):
    return DiagonalGaussian.from_moments(torch.randn(3, 8, 4, 5, generator=rng))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_kl_is_that_of_torch_distributions(posterior):
    normal = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert posterior.kl().shape == (3,)
    torch.testing.assert_close(posterior.kl().double(), expected, rtol=1e-6, atol=0)


def test_kl_to_itself_is_zero():
    zeros = torch.zeros(2, 4, 3, 3)
    assert DiagonalGaussian(zeros, zeros).kl().tolist() == [0, 0]


def test_moments_are_mean_then_logvar():
    moments = torch.arange(8.0).view(1, 8, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [0, 1, 2, 3]
    assert posterior.logvar.flatten().tolist() == [4, 5, 6, 7]


def test_logvar_is_clamped_and_all_is_finite_float32():
    posterior = DiagonalGaussian.from_moments(torch.tensor([0.0, 0.0, -1e4, 1e4]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    assert posterior.kl().isfinite().all()
    half = DiagonalGaussian.from_moments(torch.ones(1, 4, 1, 1, dtype=torch.bfloat16))
    assert half.mean.dtype == half.logvar.dtype == half.sample().dtype == torch.float32


def test_samples_have_its_mean_and_spread(rng):
    posterior = DiagonalGaussian(
        torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -1.0)
    )
    draws = posterior.sample(generator=rng)
    # 40,000 draws: five standard errors
    assert abs(draws.mean().item() - 3) < 5 * 0.607 / 200
    assert abs(draws.std().item() - 0.6065) < 5 * 0.607 / 283


def test_noise_given_is_the_noise_used(posterior, rng):
    noise = torch.randn(3, 4, 4, 5, generator=rng)
    expected = posterior.mean + posterior.logvar.exp().sqrt() * noise
    torch.testing.assert_close(posterior.sample(noise=noise), expected)
    torch.testing.assert_close(posterior.sample(noise=torch.zeros_like(noise)), posterior.mode())


def test_a_generator_repeats_its_draws(posterior):
    first, second = (posterior.sample(generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, posterior.mode())


def test_noise_that_would_broadcast_is_refused(posterior):
    with pytest.raises(ValueError, match=r"noise \(3, 4, 1, 1\) for latents \(3, 4, 4, 5\)"):
        posterior.sample(noise=torch.zeros(3, 4, 1, 1))
