"""KID against a sum over pairs, clean-fid's own function, and a closed form."""

import numpy as np
import pytest

from ldm.errors import LdmError
from ldm.metrics import kernel_distance
from tests.ldm.metrics.photo_features import photo_features


def by_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD as its definition writes it, pair by pair."""

    def kernel(x, y):
        return (float(np.dot(x, y)) / len(x) + 1) ** 3

    def within(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return within(a) + within(b) - 2 * between


def test_photographs_as_the_sum_over_pairs():
    a, b = photo_features("train", 40, 24), photo_features("val", 40, 24)
    found = kernel_distance(a, b)
    assert found.mean == pytest.approx(by_pairs(a, b), rel=1e-10)
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
    assert found.mean == pytest.approx(by_pairs(a, b), abs=4 * error)


def test_numbers_on_a_line_have_a_closed_form():
    """dim 1: (xy + 1)³ sees the first three moments, so that the squared MMD is
    (Δ E x³)² + 3 (Δ E x²)² + 3 (Δ E x)²."""
    draw = np.random.default_rng(0)
    a, b = draw.normal(0, 1, (4000, 1)), draw.normal(0.5, 1.2, (4000, 1))
    moments_a, moments_b = np.array([0, 1, 0]), np.array([0.5, 0.25 + 1.44, 0.125 + 1.5 * 1.44])
    expected = ((moments_a - moments_b) ** 2 * [3, 3, 1]).sum()
    assert kernel_distance(a, b, size=4000).mean == pytest.approx(expected, rel=0.1)


def test_unbiased_where_the_distributions_are_equal():
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
