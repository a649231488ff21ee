"""Table 6: distances against closed forms, their errors, and the files."""

import csv
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from autoencoders import DiagonalGaussian
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from pipelines.analysis import mmd
from pipelines.analysis.mmd import MmdSettings, analyze_mmd, jackknife, latents_mmd, measure_draws
from tests.ldm.data.pictures import noise, png_folder
from tests.pipelines.analysis.subjects import known, opened, pixels, save

CPU = torch.device("cpu")
SIGMAS = (2.0, 4.0, 8.0)


def measure(posterior, n_z=2, count=300, n=300, scale="raw", draws=4, batch_size=64, side=8):
    settings = MmdSettings(n, SIGMAS, draws, scale)
    return measure_draws(known(posterior, n_z), pixels(count, side, batch_size), settings)


def constant(mean, std, n_z=2):
    """Posteriors independent of the image: latents are N(mean, std²)."""

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
def test_distances_of_gaussian_latents_match_the_closed_form(mean, std):
    found = measure(constant(mean, std))
    for sigma in SIGMAS:
        average, spread = found[sigma]
        assert average == pytest.approx(closed_form(mean, std, sigma, 8), abs=0.6)
        assert 0 < spread < 2


def test_standard_gaussian_latents_are_at_distance_zero():
    for average, spread in measure(constant(0.0, 1.0), draws=6).values():
        assert abs(average) < 3 * spread / math.sqrt(6) + 0.05


def test_scaling_removes_scale_and_standardising_also_shift():
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
    scaled = mmd._scale(posterior, noise, "scaled")
    assert scaled.std().item() == pytest.approx(1, abs=0.02)
    assert scaled[:, 0].mean().item() > 1  # no shift
    each = mmd._scale(posterior, noise, "standardised")
    assert torch.allclose(each.mean((0, 2, 3)), torch.zeros(3), atol=0.05)
    assert torch.allclose(each.std((0, 2, 3)), torch.ones(3), atol=0.05)


def test_draws_use_different_images_if_there_are_enough():
    seen = []

    def posterior(images):
        seen.extend(images.mean((1, 2, 3)).tolist())
        return images[:, :1, ::4, ::4], images[:, :1, ::4, ::4] - 4

    measure(posterior, 1, count=40, n=10, draws=3)
    assert len(seen) == 30 and len(set(seen)) > 15
    seen.clear()
    measure(posterior, 1, count=10, n=10, draws=3)
    assert len(seen) == 10  # all there are, encoded once


def test_distances_do_not_depend_on_the_batch_size():
    def posterior(images):
        return images[:, :2, ::4, ::4], images[:, :2, ::4, ::4] - 2

    one, other = (measure(posterior, count=30, n=20, draws=2, batch_size=b) for b in (1, 7))
    for sigma in SIGMAS:
        assert one[sigma] == pytest.approx(other[sigma], rel=1e-6)
    assert measure(posterior, count=9, n=9, draws=1)[SIGMAS[0]][1] == 0.0


def test_spread_is_the_standard_deviation_over_draws(monkeypatch):
    said = iter((0.01, 0.02, 0.06))
    monkeypatch.setattr(mmd, "rbf_mmd", lambda a, b, sigmas: dict.fromkeys(sigmas, next(said)))
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
def test_standard_error_is_the_spread_over_sets_of_images(population, least, most):
    """Or more where latents are nearly normal, and hardly anything but pairs of them decides."""
    generator, plan = torch.Generator().manual_seed(0), replace(DRAWN, draws=1)

    def others(number):
        mean = population(SET, generator)
        ks = list(range(SET * number, SET * (number + 1)))  # with noise of their own
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * math.log(0.1))), ks

    sets = [mmd._compare(*others(number), 0, plan, CPU) for number in range(150)]
    measured = [
        mmd._with_errors(*others(number), plan, CPU).distances for number in range(150, 158)
    ]
    for sigma in plan.sigmas:
        true = 100 * np.std([one[sigma] for one in sets], ddof=1)
        errors = [one[sigma][1] for one in measured]
        assert least < math.sqrt(np.mean(np.square(errors))) / true < most, sigma


def test_shares_have_the_mean_and_error_of_the_distance():
    generator = torch.Generator().manual_seed(0)
    mean = styled(SET, generator)
    posterior, ks = DiagonalGaussian(mean, torch.full_like(mean, -4.0)), list(range(3, 3 + SET))
    found = mmd._with_errors(posterior, ks, DRAWN, CPU)
    assert found.count == SET and found.ks == ks
    for sigma in DRAWN.sigmas:
        shares = found.shares[sigma]
        expected = shares.mean(), shares.std(ddof=1) / math.sqrt(SET)
        assert shares.shape == (SET,) and found.distances[sigma] == pytest.approx(expected)
        # and an image that is left out takes its noise and its Gaussians with it
        rest = DiagonalGaussian(posterior.mean[1:], posterior.logvar[1:])
        draws = [mmd._compare(rest, ks[1:], d, DRAWN, CPU)[sigma] for d in range(2)]
        without = [100 * sum(draws) / 2, *_leave_out(posterior, ks, sigma)]
        assert shares[0] - shares.mean() == pytest.approx(
            (SET - 1) * (np.mean(without) - without[0]), rel=1e-6
        )


def _leave_out(posterior, ks, sigma):
    """The mean over draws without each image but the first."""
    for gone in range(1, SET):
        kept = [i for i in range(SET) if i != gone]
        some = DiagonalGaussian(posterior.mean[kept], posterior.logvar[kept])
        compare = partial(mmd._compare, some, [ks[i] for i in kept])
        yield 100 * sum(compare(draw, DRAWN, CPU)[sigma] for draw in range(2)) / 2


# ------------------------------------------------------------------------------ the jackknife
RNG = np.random.default_rng(0)


def test_shares_of_a_mean_are_the_values():
    values = RNG.normal(size=(mmd.GROUPS, 2))
    whole, shares = jackknife(lambda chosen: values[chosen].mean(0), len(values))
    np.testing.assert_allclose(whole, values.mean(0))
    np.testing.assert_allclose(shares, values)


def test_many_images_are_left_out_in_groups():
    """The groups may differ in size."""
    asked, errors = [], []
    for _ in range(30):
        values = RNG.normal(size=(3 * mmd.GROUPS + 20, 1))
        _, shares = jackknife(
            lambda chosen, of=values: asked.append(chosen) or of[chosen].mean(0), len(values)
        )
        errors.append(shares.std(ddof=1) / math.sqrt(len(shares)))
    assert len(asked) == 30 * (mmd.GROUPS + 1) and list(asked[1][:3]) == [1, 2, 3]
    left_out = [set(asked[0]) - set(some) for some in asked[1 : mmd.GROUPS + 1]]
    assert set().union(*left_out) == set(asked[0]) and sum(map(len, left_out)) == len(values)
    assert np.mean(errors) == pytest.approx(1 / math.sqrt(len(values)), rel=0.1)


def test_jackknife_error_of_a_variance():
    """The variance of n values of N(0, 1) has variance 2/(n − 1)."""
    errors = []
    for _ in range(200):
        values = RNG.normal(size=(40, 1))
        _, shares = jackknife(lambda chosen, of=values: of[chosen].var(0, ddof=1), 40)
        errors.append(shares.var(ddof=1) / len(shares))
    assert np.mean(errors) == pytest.approx(2 / 39, rel=0.15)


# ---------------------------------------------------------------------------------- of a file
def test_latents_mmd_uses_the_requested_images(tmp_path):
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
def test_settings_out_of_range_are_refused(asked, told):
    with pytest.raises(UsageError, match=told):
        MmdSettings(**asked)


def test_a_single_image_is_refused():
    with pytest.raises(LdmError, match="1 images of noise: MMD needs at least two readable images"):
        measure_draws(known(constant(0, 1), 2), pixels(1), MmdSettings(5, SIGMAS, 1, "raw"))


# --------------------------------------------------------------------------- the command
def test_table_and_csv_agree_for_two_models(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    words = [f"LiteVAE={a}", f"VAE={b}"]
    found = analyze_mmd(*opened(*words), MmdSettings(n=12, sigmas=(4, 8), draws=2))
    picture, table = found.files
    assert picture == a / "analysis" / "mmd.png" and picture.stat().st_size > 10_000
    assert found.header == ("σ", "LiteVAE", "VAE") and [row[0] for row in found.rows] == ["4", "8"]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["sigma"]) for row in rows] == [
        ("LiteVAE", "4"), ("LiteVAE", "8"), ("VAE", "4"), ("VAE", "8")
    ]  # fmt: skip
    assert {(row["d"], row["images"], row["draws"]) for row in rows} == {("64", "12", "2")}
    last = rows[-1]
    assert found.rows[1][2] == f"{float(last['mmd2_x100']):.2f} ± {float(last['std']):.2f}"


def test_one_draw_equals_latents_mmd(tmp_path):
    settings = MmdSettings(n=8, sigmas=(8,), draws=1)
    (subject,), images = opened(f"a={save(tmp_path)}")
    found = analyze_mmd([subject], images, settings)
    mean, _ = latents_mmd(subject, images, settings).distances[8.0]
    assert found.rows == [("8", f"{mean:.2f} ± 0.00")]


def test_notes_on_few_images_and_narrow_kernels(tmp_path):
    folder = save(tmp_path)
    (note,) = analyze_mmd(*opened(folder), MmdSettings(n=4, draws=1)).notes
    assert "√64 = 8" in note
    settings = MmdSettings(n=10**6, sigmas=(8,), draws=1)
    notes = analyze_mmd(*opened(folder, resolution=256), settings).notes
    assert "there are only" in notes[0]


def test_the_note_on_kernels_names_only_affected_models():
    *_, note = mmd._notes({"small": 64, "paper's": 4096}, MmdSettings(n=4), 4)
    assert "√64 = 8" in note and "√4,096" not in note


def test_lines_do_not_depend_on_the_order_of_sigmas(tmp_path):
    folder = save(tmp_path)
    rising, mixed = (
        analyze_mmd(*opened(folder), MmdSettings(4, sigmas, 2), out=tmp_path / str(i))
        for i, sigmas in enumerate([(4, 8, 16), (16, 4, 8)])
    )
    assert [row[0] for row in mixed.rows] == ["16", "4", "8"]
    with Image.open(rising.files[0]) as one, Image.open(mixed.files[0]) as other:
        assert ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None
