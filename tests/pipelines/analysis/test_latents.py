"""Figures 2 and 4: statistics against NumPy in float64 and known spectra, pictures, and files."""

import csv
import math

import numpy as np
import pytest
import torch

from autoencoders import DiagonalGaussian, load_autoencoder
from ldm.data import DataConfig, evaluation_batches, open_source
from ldm.errors import UsageError
from ldm.images import to_float
from pipelines.analysis import latents as job
from pipelines.analysis.latents import analyze_latents, fall, measure, project, radial_power
from tests.pipelines.analysis.subjects import Pixels, known, opened, pixels, save

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


def test_moments_match_numpy(everything):
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


def test_kl_sums_to_the_kl_of_the_posteriors(everything):
    _, mean, variance = everything
    whole = DiagonalGaussian(torch.tensor(mean), torch.tensor(variance).log()).kl()
    values = mean[0, 0].size
    assert statistics().kl.sum().item() * values == pytest.approx(whole.mean().item(), rel=1e-5)


def test_statistics_do_not_depend_on_the_batch_size():
    one, seven = (vars(statistics(batch_size=size)).values() for size in (1, 7))
    for a, b in zip(one, seven, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-9)


def test_principal_components_match_numpy(everything):
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
def test_radial_power_matches_its_definition(side):
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


def test_a_wave_peaks_at_its_frequency():
    wave = torch.cos(2 * torch.pi * 5 * torch.arange(32) / 32).expand(32, 32)
    assert radial_power(wave).argmax().item() == 4  # the fifth


def test_fall_recovers_a_power_law():
    frequencies = torch.arange(1, 17, dtype=torch.float64) / 32
    assert fall(frequencies, 7 * frequencies**-2.3) == pytest.approx(2.3)


def test_spectra_match_their_definition(everything):
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


def test_a_constant_channel_is_uncorrelated():
    def dead(images):
        mean = images[:, :2, ::4, ::4] * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        return mean, torch.full_like(mean, -30.0)

    s = measure(known(dead, 2), pixels(3, SIDE, 2))
    assert s.correlation.isfinite().all() and s.correlation[0, 1].abs() < 1e-3


def test_a_constant_channel_far_from_zero_has_no_deviation():
    def far(images):
        mean = images[:, :2, ::4, ::4] * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        mean = mean + torch.tensor([0.0, 123.4]).view(1, 2, 1, 1)
        return mean, torch.full_like(mean, -30.0)

    s = measure(known(far, 2), pixels(3, SIDE, 2))
    assert s.std[1].item() == pytest.approx(0, abs=1e-4)
    assert torch.equal(s.correlation.diagonal(), torch.ones(2))
    assert s.correlation[0, 1].abs() < 1e-3


# ------------------------------------------------------------------------------- the command
def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_and_csvs_of_two_models(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(job, "draw_sheet", lambda path, rows, what: drawn.update(rows))
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    found = analyze_latents(*opened(a, b), n=6, count=2, out=tmp_path / "out")
    _, statistics, table, spectrum = found.files
    assert statistics.stat().st_size > 10_000
    for images, recon, channels, pca in drawn.values():
        assert images.shape == recon.shape == (2, 3, 32, 32)
        assert channels.shape == pca.shape == (2, 3, 4, 4)
        assert not torch.allclose(channels, pca)
    rows = read(table)
    assert [(r["model"], r["channel"]) for r in rows] == [(m, c) for m in "ab" for c in "1234"]
    spectra = read(spectrum)
    assert [r["channel"] for r in spectra[:10:2]] == ["1", "2", "3", "4", "image"]
    assert {r["cycles_per_latent"] for r in spectra} == {"0.25", "0.5"}
    # from the very images that are in no doubt: fewer than asked for are drawn at random
    ae = load_autoencoder(b)
    everything = analyze_latents(*opened(b, resolution=64), n=10**6, count=1)
    batches = evaluation_batches(open_source(DataConfig(), "val", 64), 64, 64)
    with torch.no_grad():
        means = torch.cat([ae.encode(to_float(batch.images)).mean for batch in batches])
    for row, channel in zip(read(everything.files[2]), means.transpose(0, 1), strict=True):
        assert float(row["mean"]) == pytest.approx(channel.mean().item(), abs=1e-4)
    assert f"{len(means)} images" in everything.title


def test_the_sheet_is_written_next_to_the_model(tmp_path):
    found = analyze_latents(*opened(save(tmp_path)), n=3, count=2)
    sheet = found.files[0]
    assert sheet == tmp_path / "analysis" / "latents.png" and sheet.stat().st_size > 10_000
    assert found.rows[0][:2] == (found.rows[0][0], "4") and len(found.header) == len(found.rows[0])


def test_projected_components_are_uncorrelated(tmp_path):
    torch.manual_seed(0)
    mixed = torch.einsum("ij,bjhw->bihw", torch.randn(5, 5), torch.randn(40, 5, 8, 8)) + 2
    flat = mixed.transpose(0, 1).flatten(1).double()
    empty = torch.zeros(5, dtype=torch.float64)
    statistics = job.LatentStatistics(
        40, flat.mean(1), flat.cov(correction=0), empty, empty, empty, empty, empty
    )
    components = project(mixed, statistics)
    assert components.shape == (40, 3, 8, 8)
    found = components.transpose(0, 1).flatten(1).double()
    variances, _ = statistics.principal_components()
    torch.testing.assert_close(found.cov(correction=0), variances[:3].diag(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.mean(1), torch.zeros(3).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("resolution", "how", "message"),
    [
        (32, {"n": 0}, "--n 0: must be at least 1"),
        (32, {"count": 0}, "--images 0: must be at least 1"),
        (16, {}, "--resolution 16: .* 8×8 pixels each: use at least 32"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tmp_path, resolution, how, message):
    folder = save(tmp_path)
    with pytest.raises(UsageError, match=message):
        analyze_latents(*opened(folder, resolution=resolution), **how)
    assert not (folder / "analysis").exists()
