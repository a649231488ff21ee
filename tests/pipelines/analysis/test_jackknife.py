"""The jackknife, on numbers whose error is known in closed form."""

import math

import numpy as np
import pytest

from pipelines.analysis.subjects import GROUPS, image_shares

RNG = np.random.default_rng(0)


def test_of_a_mean_the_shares_are_the_values():
    values = RNG.normal(size=(GROUPS, 2))
    whole, shares = image_shares(lambda chosen: values[chosen].mean(0), len(values))
    np.testing.assert_allclose(whole, values.mean(0))
    np.testing.assert_allclose(shares, values)


def test_more_images_are_left_out_in_groups():
    """Also of sizes that are not all the same."""
    asked, errors = [], []
    for _ in range(30):
        values = RNG.normal(size=(3 * GROUPS + 20, 1))
        _, shares = image_shares(
            lambda chosen, of=values: asked.append(chosen) or of[chosen].mean(0), len(values)
        )
        errors.append(shares.std(ddof=1) / math.sqrt(len(shares)))
    assert len(asked) == 30 * (GROUPS + 1) and list(asked[1][:3]) == [1, 2, 3]
    left_out = [set(asked[0]) - set(some) for some in asked[1 : GROUPS + 1]]
    assert set().union(*left_out) == set(asked[0]) and sum(map(len, left_out)) == len(values)
    assert np.mean(errors) == pytest.approx(1 / math.sqrt(len(values)), rel=0.1)


def test_of_what_is_no_mean():
    """The variance of n values of N(0, 1) has variance 2/(n − 1)."""
    errors = []
    for _ in range(200):
        values = RNG.normal(size=(40, 1))
        _, shares = image_shares(lambda chosen, of=values: of[chosen].var(0, ddof=1), 40)
        errors.append(shares.var(ddof=1) / len(shares))
    assert np.mean(errors) == pytest.approx(2 / 39, rel=0.15)
