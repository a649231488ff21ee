"""Statistics of latents, against NumPy in float64 and signals whose spectrum is known."""

import math

import numpy as np
import pytest
import torch

from autoencoders.posterior import DiagonalGaussian
from pipelines.analysis.latents import fall, measure, radial_power
from tests.pipelines.analysis.subjects import Pixels, known, pixels

SIDE = 32  # of the images; latents are 8×8


def posterior(images):
    """Two channels that are correlated, and one that is not."""
    first, second = images[:, 0, ::4, ::4], images[:, 1, ::4, ::4]
    mean = torch.stack([first, 0.5 * first + 0.2 * second + 1, 3 * second], 1)
    return mean, torch.stack([first - 2, second - 1, first * second], 1)


def statistics(count=7, batch_size=3):
    return measure(known(posterior, 3), pixels(count, SIDE, batch_size))


@pytest.fixture(scope="module")
def everything():
    """All posterior means and variances (7, 3, 8, 8) in float64, and the images."""
    images = np.stack([Pixels(7, SIDE).load(i) for i in range(7)]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(images / 127.5 - 1)
    found = DiagonalGaussian(*posterior(images.float()))
    return images.numpy(), found.mean.double().numpy(), np.exp(found.logvar.double().numpy())


def test_moments_are_those_of_draws(everything):
    s = statistics()
    _, mean, variance = everything
    flat = mean.transpose(1, 0, 2, 3).reshape(3, -1)
    assert s.count == 7
    np.testing.assert_allclose(s.mean, flat.mean(1), atol=1e-6)
    expected = np.cov(flat, bias=True) + np.diag(variance.mean((0, 2, 3)))
    np.testing.assert_allclose(s.covariance, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(s.std**2, expected.diagonal(), rtol=1e-5)
    np.testing.assert_allclose(s.posterior_std**2, variance.mean((0, 2, 3)), rtol=1e-5)
    scale = np.sqrt(expected.diagonal())
    np.testing.assert_allclose(s.correlation, expected / np.outer(scale, scale), atol=1e-6)
    assert torch.equal(s.correlation.diagonal(), torch.ones(3))


def test_kl_sums_to_the_posteriors_own(everything):
    _, mean, variance = everything
    whole = DiagonalGaussian(torch.tensor(mean), torch.tensor(variance).log()).kl()
    values = mean[0, 0].size
    assert statistics().kl.sum().item() * values == pytest.approx(whole.mean().item(), rel=1e-5)


def test_nothing_depends_on_the_batch_size():
    one, seven = (vars(statistics(batch_size=size)).values() for size in (1, 7))
    for a, b in zip(one, seven, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-9)


def test_principal_components_are_numpys(everything):
    s = statistics()
    variances, vectors = s.principal_components()
    values, theirs = np.linalg.eig(s.covariance.numpy())
    order = values.argsort()[::-1]
    np.testing.assert_allclose(variances, values[order], rtol=1e-9)
    for ours, other in zip(vectors.numpy(), theirs.T[order], strict=True):
        assert abs(ours @ other) == pytest.approx(1)
        assert ours[np.abs(ours).argmax()] > 0


# -------------------------------------------------------------------------------- the spectrum
def by_loops(image):
    """Radial power of one map (s, s), from the definition of the Fourier transform."""
    side = len(image)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(side) / side)
    window /= np.sqrt((window**2).mean())
    image = (image - image.mean()) * np.outer(window, window)
    power = {k: [] for k in range(1, side // 2 + 1)}
    places = np.arange(side)
    for u in range(-(side // 2), (side + 1) // 2):
        for v in range(-(side // 2), (side + 1) // 2):
            wave = np.exp(-2j * np.pi * np.add.outer(u * places, v * places) / side)
            radius = round(math.hypot(u, v))
            if radius in power:
                power[radius].append(abs((image * wave).sum() / side) ** 2)
    return [np.mean(values) for values in power.values()]


@pytest.mark.parametrize("side", [8, 9])
def test_radial_power_is_that_of_the_definition(side):
    image = np.random.default_rng(0).normal(size=(side, side))
    found = radial_power(torch.tensor(image).expand(2, 1, side, side))
    assert found.shape == (2, 1, side // 2)
    np.testing.assert_allclose(found[1, 0], by_loops(image), rtol=1e-9)


@pytest.mark.parametrize("side", [3, 4, 9, 16])
def test_white_noise_has_its_variance_at_every_frequency_but_the_lowest(side):
    # its power is that of a single 1, summed over all places of it
    ones = torch.eye(side**2, dtype=torch.float64).view(-1, side, side)
    expected = [67 / 72] + [1.0] * (side // 2 - 1)
    np.testing.assert_allclose(radial_power(3 * ones).sum(0) / 9, expected, rtol=1e-12)


def test_a_wave_shows_at_its_frequency():
    wave = torch.cos(2 * torch.pi * 5 * torch.arange(32) / 32).expand(32, 32)
    assert radial_power(wave).argmax().item() == 4  # the fifth


def test_a_power_law_is_found_again():
    frequencies = torch.arange(1, 17, dtype=torch.float64) / 32
    assert fall(frequencies, 7 * frequencies**-2.3) == pytest.approx(2.3)


def test_spectra_of_channels_and_images(everything):
    s = statistics()
    images, mean, _ = everything
    np.testing.assert_allclose(s.frequencies, np.arange(1, 5) / 8)
    expected = [np.mean([by_loops(m) for m in mean[:, c]], axis=0) for c in range(3)]
    np.testing.assert_allclose(s.spectrum, expected, rtol=1e-5)
    luma = np.einsum("c,bchw->bhw", [0.299, 0.587, 0.114], images)
    small = luma.reshape(7, 8, 4, 8, 4).mean((2, 4))
    np.testing.assert_allclose(
        s.image_spectrum, np.mean([by_loops(m) for m in small], axis=0), rtol=1e-5
    )


def test_a_channel_that_does_not_vary_is_correlated_with_none():
    def dead(images):
        mean = images[:, :2, ::4, ::4] * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        return mean, torch.full_like(mean, -30.0)

    s = measure(known(dead, 2), pixels(3, SIDE, 2))
    assert s.correlation.isfinite().all() and s.correlation[0, 1].abs() < 1e-3


def test_a_channel_that_does_not_vary_has_no_deviation_however_far_it_is():
    def far(images):
        mean = images[:, :2, ::4, ::4] * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        mean = mean + torch.tensor([0.0, 123.4]).view(1, 2, 1, 1)
        return mean, torch.full_like(mean, -30.0)

    s = measure(known(far, 2), pixels(3, SIDE, 2))
    assert s.std[1].item() == pytest.approx(0, abs=1e-4)
    assert torch.equal(s.correlation.diagonal(), torch.ones(2))
    assert s.correlation[0, 1].abs() < 1e-3
