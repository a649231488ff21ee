"""Precision and recall against a literal reading of the paper's definition."""

import sys

import numpy as np
import pytest

from ldm.errors import LdmError
from ldm.metrics import precision_recall
from tests.ldm.metrics.photo_features import photo_features


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
    # by its name `ldm.metrics.precision_recall` is the function
    monkeypatch.setattr(sys.modules[precision_recall.__module__], "ROWS_AT_ONCE", 7)
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
