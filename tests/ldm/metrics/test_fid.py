"""Statistics against numpy, the Fréchet distance against scipy, and the bootstrap interval."""

import numpy as np
import pytest
import torch
from scipy import linalg

from ldm.metrics import FeatureStatistics, frechet_distance
from ldm.metrics import fid as bootstrap
from ldm.metrics.fid import bootstrap_fid
from tests.ldm.metrics.photo_features import photo_features


def features(count: int, dim: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((count, dim)) @ draw.standard_normal((dim, dim)) + draw.uniform(
        -3, 3, dim
    )


def statistics_of(values: np.ndarray, batch: int = 7) -> FeatureStatistics:
    statistics = FeatureStatistics(values.shape[1])
    for start in range(0, len(values), batch):
        statistics.update(values[start : start + batch])
    return statistics


def by_sqrtm(mean_a, cov_a, mean_b, cov_b) -> float:
    """The distance as its definition writes it, with a general matrix root."""
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


# ------------------------------------------------------------------------------ statistics
def test_streaming_is_numpys_mean_and_covariance():
    values = features(100, 6)
    statistics = statistics_of(values)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(values, rowvar=False), rtol=1e-12)


def test_merging_is_seeing_both():
    values = features(60, 5)
    left, right = statistics_of(values[:13]), statistics_of(values[13:])
    both = statistics_of(values)
    left.merge(FeatureStatistics(5))  # nothing seen: nothing changes
    left.merge(right)
    assert left.count == both.count
    np.testing.assert_allclose(left.mean, both.mean, rtol=1e-13)
    np.testing.assert_allclose(left.covariance, both.covariance, rtol=1e-12)


def test_a_large_mean_costs_no_digits():
    """Sums of raw squares would leave no digit here: 1e8² / 1 is past float64's 16."""
    values = features(500, 3)
    shifted = statistics_of(values + 1e8)
    np.testing.assert_allclose(shifted.covariance, np.cov(values, rowvar=False), rtol=1e-6)


def test_torch_features_of_any_type_and_an_empty_batch():
    values = features(10, 4).astype(np.float32)
    statistics = FeatureStatistics(4)
    statistics.update(torch.from_numpy(values).requires_grad_())
    statistics.update(torch.empty(0, 4))
    assert statistics.count == 10
    np.testing.assert_allclose(statistics.mean, values.astype(np.float64).mean(0), rtol=1e-13)


def test_known_moments_go_on_as_if_seen():
    values = features(60, 5)
    known = FeatureStatistics.from_moments(40, values[:40].mean(0), np.cov(values[:40].T))
    known.update(values[40:])
    both = statistics_of(values)
    assert known.count == 60
    np.testing.assert_allclose(known.mean, both.mean, rtol=1e-13)
    np.testing.assert_allclose(known.covariance, both.covariance, rtol=1e-12)


def test_known_moments_must_be_moments():
    with pytest.raises(ValueError, match=r"mean \(3,\) and covariance \(2, 2\) do not fit"):
        FeatureStatistics.from_moments(5, np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        FeatureStatistics.from_moments(5, np.zeros(2), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="two features or more, not 1"):
        FeatureStatistics.from_moments(1, np.zeros(2), np.eye(2))


def test_what_is_returned_is_not_the_inside():
    statistics = statistics_of(features(10, 4))
    before = statistics.mean
    statistics.mean[:] = 0
    statistics.covariance[:] = 0
    np.testing.assert_array_equal(statistics.mean, before)
    assert statistics.covariance.any()


def test_statistics_assert_their_contract():
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match="mean of no features"):
        _ = statistics.mean
    statistics.update(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="two features or more, not 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match=r"must be \(B, 4\), not \(2, 3\)"):
        statistics.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        statistics.update(torch.tensor([[0.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(ValueError, match="features of 3 into those of 4"):
        statistics.merge(FeatureStatistics(3))


# -------------------------------------------------------------------------------- distance
def test_diagonal_gaussians_have_a_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 2.0])
    std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 0.5, 0.1])
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    distance = frechet_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_full_covariances_as_scipys_matrix_root():
    a, b = statistics_of(features(200, 12, seed=1)), statistics_of(features(200, 12, seed=2))
    arguments = a.mean, a.covariance, b.mean, b.covariance
    assert frechet_distance(*arguments) == pytest.approx(by_sqrtm(*arguments), rel=1e-8)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # scipy's, of the smaller sets
@pytest.mark.parametrize("count", [120, 20])
def test_photographs_as_scipys_matrix_root(count):
    """120 images, and 20 with 32 features: covariances of rank 19 at most."""
    a, b = (statistics_of(photo_features(split, count, 32)) for split in ("train", "val"))
    arguments = a.mean, a.covariance, b.mean, b.covariance
    assert (np.linalg.matrix_rank(a.covariance) > 20) == (count > 32)
    assert frechet_distance(*arguments) == pytest.approx(by_sqrtm(*arguments), rel=1e-6)


def test_symmetric_and_zero_on_itself():
    a, b = statistics_of(features(100, 8, seed=1)), statistics_of(features(100, 8, seed=2))
    forth = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    back = frechet_distance(b.mean, b.covariance, a.mean, a.covariance)
    assert forth == pytest.approx(back, rel=1e-10)
    assert 0 <= frechet_distance(a.mean, a.covariance, a.mean, a.covariance) < 1e-10 * forth


def test_rank_deficient_covariances():
    """Five points in 40 dimensions. With orthogonal spans the cross term is zero."""
    draw = np.random.default_rng(0)
    a, b = np.zeros((5, 40)), np.zeros((5, 40))
    a[:, :4], b[:, 20:24] = draw.standard_normal((5, 4)), draw.standard_normal((5, 4))
    a, b = statistics_of(a), statistics_of(b)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert isinstance(distance, float)
    assert distance == pytest.approx(expected, rel=1e-7)
    # on itself, where the rank is low as well
    assert frechet_distance(a.mean, a.covariance, a.mean, a.covariance) < 1e-6 * expected


def test_shapes_must_fit():
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(np.zeros(3), np.eye(2), np.zeros(3), np.eye(2))


# --------------------------------------------------------------------------------------- bootstrap
DIM = 4


def floats(features: np.ndarray) -> np.ndarray:
    return features.astype(np.float32)


def draw(seed: int, count: int = 400) -> np.ndarray:
    """Features far from 0, as those of a network are, with a distance between the two sets."""
    noise = np.random.default_rng(seed).standard_normal((count, DIM))
    return 20 + noise * [1, 2, 0.5, 1.5] + [0.5, 0, 0, 0]


def measured(features: np.ndarray, real: FeatureStatistics) -> float:
    return frechet_distance(features.mean(0), np.cov(features.T), real.mean, real.covariance)


@pytest.fixture(scope="module")
def real():
    statistics = FeatureStatistics(DIM)
    statistics.update(draw(99, 5000) - [0.5, 0, 0, 0])
    return statistics


def test_the_interval_is_as_wide_as_other_samples_are_apart(real):
    fids = [measured(draw(seed), real) for seed in range(200)]
    truth = np.std(fids)
    intervals = [
        bootstrap_fid(floats(draw(seed)), real, fids[seed], draws=100) for seed in range(12)
    ]
    assert np.mean([interval.std for interval in intervals]) == pytest.approx(truth, rel=0.2)
    # about the measured FID, and as wide as 95 % of a normal distribution are
    for fid, interval in zip(fids, intervals, strict=False):
        assert interval.high - fid == pytest.approx(1.959964 * interval.std)
        assert fid - interval.low == pytest.approx(1.959964 * interval.std)
    covered = [low <= np.mean(fids) <= high for low, high, *_ in intervals]
    assert sum(covered) >= 10


def test_the_bias_is_what_too_few_samples_cost(real):
    """A resampled set is poorer than the samples; more samples, less of it."""
    few, many = (
        bootstrap_fid(floats(draw(1, n)), real, measured(draw(1, n), real), draws=60)
        for n in (50, 2000)
    )
    assert few.bias > 5 * abs(many.bias)


def test_a_draw_is_the_direct_computation(real, monkeypatch):
    monkeypatch.setattr(bootstrap, "ROWS_AT_ONCE", 37)  # several blocks
    features = draw(5).astype(np.float32).astype(np.float64)
    interval = bootstrap_fid(floats(features), real, 0.0, draws=2, seed=3)
    fids = []
    for k in range(2):
        chosen = bootstrap.generator(3, "bootstrap", k).integers(400, size=400)
        fids.append(measured(features[chosen], real))
    assert interval.bias == pytest.approx(np.mean(fids), rel=1e-9)
    assert interval.std == pytest.approx(np.std(fids, ddof=1), rel=1e-6)
    assert interval.low == 0, "no FID is below 0"


def test_fewer_than_two_have_no_deviation(real):
    with pytest.raises(ValueError, match="1 draws"):
        bootstrap_fid(floats(draw(0)), real, 0.0, draws=1)
    with pytest.raises(ValueError, match="1 samples"):
        bootstrap_fid(floats(draw(0)[:1]), real, 0.0, draws=5)
