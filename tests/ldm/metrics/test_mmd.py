"""MMD against a sum over pairs, and the closed form it has for Gaussians."""

import math

import pytest
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.metrics import rbf_mmd
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
