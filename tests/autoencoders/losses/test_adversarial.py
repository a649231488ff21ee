import math

import pytest
import torch

from autoencoders.losses.adversarial import (
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    logistic_generator,
)

REAL = ([[2.0, 0.5], [-1.0, 1.0]], [[0.3], [3.0]])
FAKE = ([[-2.0, 0.5], [0.0, -1.0]], [[-0.2], [-4.0]])


def heads(values):
    return tuple(torch.tensor(head) for head in values)


def mean_of_heads(values, term):
    """The average of a term over each head, then over the heads, in Python."""
    per_head = [[term(logit) for row in head for logit in row] for head in values]
    return sum(sum(terms) / len(terms) for terms in per_head) / len(per_head)


def log_sigmoid(logit):
    return math.log(1 / (1 + math.exp(-logit)))


def test_hinge():
    assert hinge_generator(heads(FAKE)).item() == pytest.approx(mean_of_heads(FAKE, lambda d: -d))
    expected = mean_of_heads(REAL, lambda d: max(0, 1 - d)) + mean_of_heads(
        FAKE, lambda d: max(0, 1 + d)
    )
    assert hinge_discriminator(heads(REAL), heads(FAKE)).item() == pytest.approx(expected)


def test_logistic():
    fooled = mean_of_heads(FAKE, lambda d: -log_sigmoid(d))
    assert logistic_generator(heads(FAKE)).item() == pytest.approx(fooled)
    expected = mean_of_heads(REAL, lambda d: -log_sigmoid(d)) + mean_of_heads(
        FAKE, lambda d: -log_sigmoid(-d)
    )
    assert logistic_discriminator(heads(REAL), heads(FAKE)).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [hinge_generator, logistic_generator])
def test_computed_in_float32(loss):
    half = tuple(head.bfloat16() for head in heads(FAKE))
    assert loss(half).dtype == torch.float32


def test_a_large_logit_is_no_overflow():
    assert logistic_generator((torch.tensor([-1e4]),)).item() == pytest.approx(1e4)
