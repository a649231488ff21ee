"""Distances of known latents against closed forms, what draws depend on, and their errors."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from autoencoders.posterior import DiagonalGaussian
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from pipelines.analysis import mmd as latent_distances
from pipelines.analysis.mmd import MmdSettings, latents_mmd, measure_draws
from tests.ldm.data.pictures import noise, png_folder
from tests.pipelines.analysis.subjects import known, opened, pixels, save

CPU = torch.device("cpu")
SIGMAS = (2.0, 4.0, 8.0)


def measure(posterior, n_z=2, count=300, n=300, scale="raw", draws=4, batch_size=64, side=8):
    settings = MmdSettings(n, SIGMAS, draws, scale)
    return measure_draws(known(posterior, n_z), pixels(count, side, batch_size), settings)


def constant(mean, std, n_z=2):
    """Posteriors that do not look at the image, so that latents are N(mean, std²)."""

    def posterior(images):
        shape = (len(images), n_z, images.shape[2] // 4, images.shape[3] // 4)
        return torch.full(shape, mean), torch.full(shape, 2 * math.log(std))

    return posterior


def closed_form(mean, std, sigma, d):
    """MMD² × 100 between N(mean, std² I) and N(0, I) of d dimensions, RBF kernel of width σ."""

    def expected(variance, shift):  # of k(x, y) where x − y ~ N(shift, variance I)
        damped = math.exp(-d * shift**2 / (2 * (sigma**2 + variance)))
        return (1 + variance / sigma**2) ** (-d / 2) * damped

    within = expected(2 * std**2, 0) + expected(2, 0)
    return 100 * (within - 2 * expected(1 + std**2, mean))


@pytest.mark.parametrize(("mean", "std"), [(0.8, 1.0), (0.0, 2.0), (-0.5, 0.3)])
def test_gaussian_latents_are_as_far_as_the_closed_form_says(mean, std):
    found = measure(constant(mean, std))
    for sigma in SIGMAS:
        average, spread = found[sigma]
        assert average == pytest.approx(closed_form(mean, std, sigma, 8), abs=0.6)
        assert 0 < spread < 2


def test_latents_that_are_noise_are_near():
    for average, spread in measure(constant(0.0, 1.0), draws=6).values():
        assert abs(average) < 3 * spread / math.sqrt(6) + 0.05


def test_scaling_takes_off_what_it_says():
    def latents(images, factor=1.0, shift=0.0):
        mean = images[:, :2, ::4, ::4] * factor + shift
        return mean, torch.full_like(mean, 2 * math.log(0.1 * factor))

    def close(a, b):
        return all(a[s] == pytest.approx(b[s], abs=1e-3) for s in SIGMAS)

    how = {"count": 60, "n": 60, "draws": 2}
    plain = measure(latents, scale="scaled", **how)
    assert close(plain, measure(lambda x: latents(x, 7.0), scale="scaled", **how))
    assert not close(plain, measure(lambda x: latents(x, 1.0, 0.5), scale="scaled", **how))
    each = measure(latents, scale="standardised", **how)
    assert close(each, measure(lambda x: latents(x, 7.0, 0.5), scale="standardised", **how))
    assert not close(each, measure(latents, scale="raw", **how))


def test_scaled_latents_have_standard_deviation_one_over_all_channels():
    posterior = DiagonalGaussian(
        torch.randn(200, 3, 4, 4) * 2 + torch.tensor([3.0, 0, -1]).view(1, 3, 1, 1),
        torch.full((200, 3, 4, 4), 2 * math.log(0.5)),
    )
    noise = torch.randn(200, 3, 4, 4)
    scaled = latent_distances._scale(posterior, noise, "scaled")
    assert scaled.std().item() == pytest.approx(1, abs=0.02)
    assert scaled[:, 0].mean().item() > 1  # no shift
    each = latent_distances._scale(posterior, noise, "standardised")
    assert torch.allclose(each.mean((0, 2, 3)), torch.zeros(3), atol=0.05)
    assert torch.allclose(each.std((0, 2, 3)), torch.ones(3), atol=0.05)


def test_draws_take_other_images_where_there_are_more():
    seen = []

    def posterior(images):
        seen.extend(images.mean((1, 2, 3)).tolist())
        return images[:, :1, ::4, ::4], images[:, :1, ::4, ::4] - 4

    measure(posterior, 1, count=40, n=10, draws=3)
    assert len(seen) == 30 and len(set(seen)) > 15
    seen.clear()
    measure(posterior, 1, count=10, n=10, draws=3)
    assert len(seen) == 10  # all there are, encoded once


def test_a_distance_does_not_depend_on_the_batch_size():
    def posterior(images):
        return images[:, :2, ::4, ::4], images[:, :2, ::4, ::4] - 2

    one, other = (measure(posterior, count=30, n=20, draws=2, batch_size=b) for b in (1, 7))
    for sigma in SIGMAS:
        assert one[sigma] == pytest.approx(other[sigma], rel=1e-6)
    assert measure(posterior, count=9, n=9, draws=1)[SIGMAS[0]][1] == 0.0


def test_plus_minus_is_the_standard_deviation_of_draws(monkeypatch):
    said = iter((0.01, 0.02, 0.06))
    monkeypatch.setattr(
        latent_distances, "rbf_mmd", lambda a, b, sigmas: dict.fromkeys(sigmas, next(said))
    )
    found = measure(constant(0.0, 1.0), count=4, n=4, draws=3)
    assert found[SIGMAS[0]] == pytest.approx((3.0, math.sqrt(7)))  # (4 + 1 + 9) / 2


# ------------------------------------------------------------------- the error over images
SET = 38  # images, as a small data set holds out
DRAWN = MmdSettings(SET, (8.0, 16.0), 2)


def styled(count, generator):
    """Latents (count, 4, 4, 4) of images that differ as a whole, as photographs do."""
    offset = 0.7 * torch.randn(count, 4, 1, 1, generator=generator)
    scale = (0.5 * torch.randn(count, 1, 1, 1, generator=generator)).exp()
    return offset + scale * torch.randn(count, 4, 4, 4, generator=generator)


def shifted(count, generator):
    return 0.5 + torch.randn(count, 4, 4, 4, generator=generator)


@pytest.mark.parametrize(("population", "least", "most"), [(styled, 0.8, 1.6), (shifted, 0.8, 1.2)])
def test_the_error_is_the_spread_over_other_images(population, least, most):
    """Or more where latents are nearly normal, and hardly anything but pairs of them decides."""
    generator, plan = torch.Generator().manual_seed(0), replace(DRAWN, draws=1)

    def others(number):
        mean = population(SET, generator)
        ks = list(range(SET * number, SET * (number + 1)))  # with noise of their own
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(0.1))), ks

    sets = [latent_distances._compare(*others(number), 0, plan, CPU) for number in range(150)]
    measured = [
        latent_distances._with_errors(*others(number), plan, CPU).distances
        for number in range(150, 158)
    ]
    for sigma in plan.sigmas:
        true = 100 * np.std([one[sigma] for one in sets], ddof=1)
        errors = [one[sigma][1] for one in measured]
        assert least < math.sqrt(np.mean(np.square(errors))) / true < most, sigma


def test_shares_are_of_the_mean_and_of_its_error():
    generator = torch.Generator().manual_seed(0)
    mean = styled(SET, generator)
    posterior, ks = DiagonalGaussian(mean, torch.full_like(mean, -4.0)), list(range(3, 3 + SET))
    found = latent_distances._with_errors(posterior, ks, DRAWN, CPU)
    assert found.count == SET and found.ks == ks
    for sigma in DRAWN.sigmas:
        shares = found.shares[sigma]
        expected = shares.mean(), shares.std(ddof=1) / math.sqrt(SET)
        assert shares.shape == (SET,) and found.distances[sigma] == pytest.approx(expected)
        # and an image that is left out takes its noise and its Gaussians with it
        rest = DiagonalGaussian(posterior.mean[1:], posterior.logvar[1:])
        draws = [latent_distances._compare(rest, ks[1:], d, DRAWN, CPU)[sigma] for d in range(2)]
        without = [100 * sum(draws) / 2, *_leave_out(posterior, ks, sigma)]
        assert shares[0] - shares.mean() == pytest.approx(
            (SET - 1) * (np.mean(without) - without[0]), rel=1e-6
        )


def _leave_out(posterior, ks, sigma):
    """The mean over draws without each image but the first."""
    for gone in range(1, SET):
        kept = [i for i in range(SET) if i != gone]
        some = DiagonalGaussian(posterior.mean[kept], posterior.logvar[kept])
        compare = partial(latent_distances._compare, some, [ks[i] for i in kept])
        yield 100 * sum(compare(draw, DRAWN, CPU)[sigma] for draw in range(2)) / 2


# ---------------------------------------------------------------------------------- of a file
def test_the_split_that_is_asked_for(tmp_path):
    data = png_folder(tmp_path / "data", [noise(i, 32, 32) for i in range(12)])
    model = save(tmp_path / "run")  # of other data
    config = DataConfig(source=str(data), held_out=5, workers=0)
    (subject,), images = opened(model, data=config, resolution=32)
    settings = MmdSettings(100, (8,), 1)
    assert latents_mmd(subject, images, settings).count == 5
    assert latents_mmd(subject, images, replace(settings, n=4)).count == 4
    with pytest.raises(LdmError, match="the standard error of an MMD needs three images"):
        latents_mmd(subject, images, replace(settings, n=2))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"n": 1}, "--n 1: must be at least 2"),
        ({"draws": 0}, "--draws 0: must be at least 1"),
        ({"sigmas": (25, 0)}, "--sigmas 25, 0: must be above 0"),
        ({"sigmas": ()}, "must be above 0"),
        ({"scale": "other"}, "--latents other: must be one of scaled, standardised, raw"),
    ],
)
def test_numbers_out_of_range(asked, told):
    with pytest.raises(UsageError, match=told):
        MmdSettings(**asked)


def test_one_image_is_too_few():
    with pytest.raises(LdmError, match="1 images of noise: MMD needs at least two readable images"):
        measure_draws(known(constant(0, 1), 2), pixels(1), MmdSettings(5, SIGMAS, 1, "raw"))
