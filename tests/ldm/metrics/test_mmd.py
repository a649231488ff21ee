"""MMD and KID against sums over pairs and closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.metrics import kernel_distance, rbf_mmd
from tests.ldm.metrics.photo_features import photo_features


def gaussian(count: int, dim: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, dim, generator=draw)


def by_pairs(a: Tensor, b: Tensor, sigma: float) -> float:
    """Gretton et al. 2012, Equation 3, pair by pair."""

    def kernel(x, y):
        return math.exp(-(math.dist(x, y) ** 2) / (2 * sigma**2))

    def within(rows):
        pairs = [(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(kernel(x, y) for x, y in pairs) / len(pairs)

    a, b = a.double().tolist(), b.double().tolist()
    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * between


def closed_form(dim: int, mean: float, std: float, sigma: float) -> float:
    """Of N(0, I) and N(mean, std² I): the kernel's mean over two Gaussians is a Gaussian's."""

    def mean_kernel(variance, shift):
        shrunk = (1 + variance / sigma**2) ** (-dim / 2)
        return shrunk * math.exp(-dim * shift**2 / (2 * (sigma**2 + variance)))

    return mean_kernel(2, 0) + mean_kernel(2 * std**2, 0) - 2 * mean_kernel(1 + std**2, mean)


def test_photographs_as_the_sum_over_pairs():
    a, b = (torch.from_numpy(photo_features(s, n, 24)) for s, n in (("train", 30), ("val", 20)))
    found = rbf_mmd(a, b, [0.5, 2, 50])
    assert list(found) == [0.5, 2, 50]
    for sigma, value in found.items():
        assert value == pytest.approx(by_pairs(a, b, sigma), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 1.0), (0.0, 1.5), (-0.3, 0.8)])
def test_gaussians_as_their_closed_form(mean, std):
    a, b = gaussian(5000, 16), gaussian(4000, 16, mean, std, seed=1)
    for sigma, value in rbf_mmd(a, b, [2.0, 4.0, 16.0]).items():
        assert value == pytest.approx(closed_form(16, mean, std, sigma), rel=0.05)


def test_unbiased_where_the_distributions_are_equal():
    """Draws scatter about 0 to either side; the biased estimate would lie near 0.02."""
    draws = [
        rbf_mmd(gaussian(50, 8, seed=2 * i), gaussian(50, 8, seed=2 * i + 1), [3.0])[3.0]
        for i in range(60)
    ]
    assert min(draws) < 0 < max(draws)
    assert abs(sum(draws) / 60) < 0.003


def test_a_wide_kernel_sees_the_means_alone():
    """‖Δ mean‖² / σ² to first order: a quarter where σ is doubled."""
    found = rbf_mmd(gaussian(500, 8), gaussian(500, 8, mean=1, seed=1), [250, 500])
    assert found[250] / found[500] == pytest.approx(4, rel=1e-3)


def test_blocks_do_not_matter(monkeypatch):
    a, b = gaussian(33, 6), gaussian(20, 6, mean=0.5, seed=1)
    whole = rbf_mmd(a, b, [2.0])
    monkeypatch.setattr("ldm.metrics.mmd.ROWS_AT_ONCE", 7)
    assert rbf_mmd(a, b, [2.0])[2.0] == pytest.approx(whole[2.0], rel=1e-12)


def test_a_set_beside_itself_is_two_sets():
    """Each vector meets itself between the sets, whether or not they are one object."""
    a = gaussian(20, 4)
    assert rbf_mmd(a, a, [2.0]) == rbf_mmd(a, a.clone(), [2.0])
    assert rbf_mmd(a, a, [2.0])[2.0] == pytest.approx(by_pairs(a, a, 2.0), rel=1e-9)


def test_far_from_the_origin():
    """In float32, and in sums of raw squares, a distance of 1 would drown here."""
    a, b = gaussian(30, 4).double(), gaussian(30, 4, mean=1, seed=1).double()
    near, far = rbf_mmd(a, b, [1.0]), rbf_mmd(a + 1e7, b + 1e7, [1.0])
    assert far[1.0] == pytest.approx(near[1.0], rel=1e-6)


def test_bad_vectors():
    rows = torch.ones(4, 3)
    with pytest.raises(LdmError, match="MMD of 1 and 4 vectors: it needs two or more"):
        rbf_mmd(rows[:1], rows, [1])
    with pytest.raises(LdmError, match="MMD: the vectors hold a NaN or an infinity"):
        rbf_mmd(rows, rows * torch.nan, [1])
    with pytest.raises(ValueError, match=r"not \(4, 3\) and \(4, 2\)"):
        rbf_mmd(rows, rows[:, :2], [1])
    with pytest.raises(ValueError, match="bandwidth must be above 0, not 0"):
        rbf_mmd(rows, rows, [1, 0])


# --------------------------------------------------------------------------------------------- KID
def kernel_by_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD as its definition writes it, pair by pair."""

    def kernel(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    def within(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * between


def test_kid_of_photographs_is_the_sum_over_pairs():
    a, b = photo_features("train", 40, 24), photo_features("val", 40, 24)
    found = kernel_distance(a, b)
    assert found.mean == pytest.approx(kernel_by_pairs(a, b), rel=1e-10)
    assert found.std == 0  # a subset is the whole


def test_photographs_as_clean_fid():
    fid = pytest.importorskip("cleanfid.fid")
    a, b = photo_features("train", 60, 32), photo_features("val", 60, 32)
    expected = fid.kernel_distance(a, b, num_subsets=1)
    assert kernel_distance(a, b).mean == pytest.approx(expected, rel=1e-10)


def test_subsets_scatter_about_the_whole():
    """The mean of a subset's unbiased estimate over all subsets is that of the whole sets."""
    a, b = photo_features("train", 60, 16), photo_features("val", 50, 16)
    found = kernel_distance(a, b, subsets=4000, size=12)
    error = found.std / np.sqrt(4000)
    assert found.std > 0
    assert found.mean == pytest.approx(kernel_by_pairs(a, b), abs=4 * error)


def test_numbers_on_a_line_have_a_closed_form():
    """dim 1: (xy + 1)³ sees the first three moments, so that the squared MMD is
    (Δ E x³)² + 3 (Δ E x²)² + 3 (Δ E x)²."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 1, (4000, 1)), draw.normal(0.5, 1.2, (4000, 1))
    moments_a, moments_b = np.array([0, 1, 0]), np.array([0.5, 0.25 + 1.44, 0.125 + 1.5 * 1.44])
    expected = ((moments_a - moments_b) ** 2 * [3, 3, 1]).sum()
    assert kernel_distance(a, b, size=4000).mean == pytest.approx(expected, rel=0.1)


def test_kid_is_unbiased_for_equal_distributions():
    draw = np.random.default_rng(1)
    found = kernel_distance(
        draw.standard_normal((4000, 8)), draw.standard_normal((4000, 8)), subsets=200, size=50
    )
    # the biased estimate would be near 2 · 1⁄50 · E k(x, x) = 0.3
    assert abs(found.mean) < 0.02


def test_the_seed_decides():
    a, b = photo_features("train", 40, 8), photo_features("val", 40, 8)
    again = [kernel_distance(a, b, subsets=5, size=10, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1]
    assert again[0] != again[2]


def test_the_size_is_cut_to_the_smaller_set():
    a, b = photo_features("train", 30, 8), photo_features("val", 12, 8)
    assert kernel_distance(a, b, size=1000) == kernel_distance(a, b, size=12)
    assert kernel_distance(a, b, size=1000).std > 0  # subsets of the larger set differ


def test_float32_features_are_summed_in_float64():
    a, b = (photo_features(s, 30, 8).astype(np.float32) for s in ("train", "val"))
    assert kernel_distance(a, b) == kernel_distance(a.astype(np.float64), b.astype(np.float64))


def test_bad_features():
    rows = np.ones((5, 3))
    with pytest.raises(LdmError, match="KID of 5 and 1 images: it needs 2 or more on either side"):
        kernel_distance(rows, rows[:1])
    with pytest.raises(LdmError, match="KID: the features hold a NaN or an infinity"):
        kernel_distance(rows, rows * np.nan)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        kernel_distance(rows, rows[:, :2])
