"""Fréchet distance against scipy, the bootstrap interval; precision, recall and Inception Score by
definition."""

import numpy as np
import pytest
import torch
from scipy import linalg

from ldm.errors import LdmError
from ldm.metrics import FeatureStatistics, fid, frechet_distance, precision_recall
from ldm.metrics.fid import InceptionScore, bootstrap_fid
from tests.ldm.metrics.photo_features import normal_features, photo_features, statistics_of


def by_sqrtm(mean_a, cov_a, mean_b, cov_b) -> float:
    """The distance as its definition writes it, with a general matrix root."""
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


# -------------------------------------------------------------------------------- distance
def test_diagonal_gaussians_have_a_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 2.0])
    std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 0.5, 0.1])
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    distance = frechet_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_full_covariances_as_scipys_matrix_root():
    a, b = (
        statistics_of(normal_features(200, 12, seed=1)),
        statistics_of(normal_features(200, 12, seed=2)),
    )
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
    a, b = (
        statistics_of(normal_features(100, 8, seed=1)),
        statistics_of(normal_features(100, 8, seed=2)),
    )
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
    for middle, interval in zip(fids, intervals, strict=False):
        assert interval.high - middle == pytest.approx(1.959964 * interval.std)
        assert middle - interval.low == pytest.approx(1.959964 * interval.std)
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
    monkeypatch.setattr(fid, "ROWS_AT_ONCE", 37)  # several blocks
    features = draw(5).astype(np.float32).astype(np.float64)
    interval = bootstrap_fid(floats(features), real, 0.0, draws=2, seed=3)
    fids = []
    for k in range(2):
        chosen = fid.generator(3, "bootstrap", k).integers(400, size=400)
        fids.append(measured(features[chosen], real))
    assert interval.bias == pytest.approx(np.mean(fids), rel=1e-9)
    assert interval.std == pytest.approx(np.std(fids, ddof=1), rel=1e-6)
    assert interval.low == 0, "no FID is below 0"


def test_fewer_than_two_have_no_deviation(real):
    with pytest.raises(ValueError, match="1 draws"):
        bootstrap_fid(floats(draw(0)), real, 0.0, draws=1)
    with pytest.raises(ValueError, match="1 samples"):
        bootstrap_fid(floats(draw(0)[:1]), real, 0.0, draws=5)


# ------------------------------------------------------------------------ precision and recall
def by_definition(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, Equations 1 and 2, feature by feature."""

    def radius(features, i):
        others = [f for j, f in enumerate(features) if j != i]
        return sorted(np.linalg.norm(features[i] - f) for f in others)[k - 1]

    def share_within(features, manifold):
        radii = [radius(manifold, i) for i in range(len(manifold))]
        balls = list(zip(manifold, radii, strict=True))
        return np.mean([any(np.linalg.norm(f - c) <= r for c, r in balls) for f in features])

    return share_within(made, real), share_within(real, made)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_photographs_as_the_definition(k):
    real, made = photo_features("train", 90, 12), photo_features("val", 60, 12)
    found = precision_recall(real, made, k)
    assert found == by_definition(real, made, k)
    assert 0 < found.precision < 1
    assert 0 < found.recall < 1
    assert found.precision != found.recall


def test_blocks_do_not_matter(monkeypatch):
    real, made = photo_features("train", 50, 12), photo_features("val", 40, 12)
    whole = precision_recall(real, made)
    monkeypatch.setattr(fid, "DISTANCES_AT_ONCE", 7)
    assert precision_recall(real, made) == whole


def test_equal_sets_score_one_and_distant_sets_zero():
    real = photo_features("train", 30, 12)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)


def test_a_collapsed_model_has_precision_without_recall():
    draw = np.random.default_rng(0)
    real = draw.standard_normal((200, 4))
    made = real[0] + 1e-3 * draw.standard_normal((200, 4))
    found = precision_recall(real, made)
    assert found.precision == 1
    assert found.recall <= 1 / 200


def test_shared_images_are_inside():
    """Five copies of an image: their balls have radius 0, and hold the copy in the other set."""
    draw = np.random.default_rng(0)
    image, far = draw.standard_normal((1, 64)) + 50, draw.standard_normal((10, 64)) * 100
    found = precision_recall(np.concatenate([image.repeat(5, 0), far]), image.repeat(5, 0))
    assert found == (1, 5 / 15)


def test_far_from_the_origin():
    """Features whose distances are a billionth of their lengths."""
    real, made = photo_features("train", 40, 12), photo_features("val", 40, 12)
    assert precision_recall(real + 1e6, made + 1e6) == precision_recall(real, made)


def test_bad_features():
    rows = np.arange(15.0).reshape(5, 3)
    with pytest.raises(
        LdmError, match="precision and recall of 3 and 5 images: it needs 4 or more on either side"
    ):
        precision_recall(rows[:3], rows)
    with pytest.raises(LdmError, match="precision and recall: the features hold a NaN"):
        precision_recall(rows, np.where(rows == 4, np.inf, rows))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        precision_recall(rows, rows[:, :2])


# ----------------------------------------------------------------------------- Inception Score
def test_inception_score_is_its_definition_over_splits_in_order():
    """exp(E KL(p(y|x) ‖ p(y))) of each 5,000 images, by a loop in float64; then their mean."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, 0.3), 12_000)
    p[0] = [1, 0, 0, 0, 0, 0]  # 0 log 0 is 0
    scores = []
    for part in (p[:5000], p[5000:10_000], p[10_000:]):
        marginal, kl = part.mean(0), 0.0
        for row in part:
            kl += sum(a * np.log(a / b) for a, b in zip(row, marginal, strict=True) if a > 0)
        scores.append(np.exp(kl / len(part)))
    halves = [InceptionScore(6, 12_000) for _ in range(2)]
    order = rng.permutation(12_000)
    for i, ks in enumerate(np.array_split(order, 30)):
        halves[i % 2].update(torch.from_numpy(p[ks]), torch.from_numpy(ks))
    halves[0].merge(halves[1])
    assert halves[0].value() == pytest.approx(np.mean(scores), rel=1e-10)


def test_inception_score_of_certain_and_even_classes_is_their_number():
    score = InceptionScore(4, 40)
    score.update(torch.eye(4).repeat(10, 1), list(range(40)))
    assert score.value() == pytest.approx(4)
