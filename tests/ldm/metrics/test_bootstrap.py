"""The interval of an FID against what other samples of the same distribution really give."""

import numpy as np
import pytest

from ldm.metrics import FeatureStatistics, frechet_distance
from ldm.metrics import fid as bootstrap
from ldm.metrics.fid import bootstrap_fid

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
