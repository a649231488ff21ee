import math

import pytest
import torch
from torch.nn import functional as F

from autoencoders.losses.adversarial import (
    ADVERSARIAL,
    bce_discriminator,
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


def test_bce_is_the_cross_entropy_of_all_logits_with_their_labels():
    real, fake = heads(REAL), heads(FAKE)
    per_head = []
    for r, f in zip(real, fake, strict=True):
        logits = torch.cat([r.flatten(), f.flatten()])
        labels = torch.cat([torch.ones(r.numel()), torch.zeros(f.numel())])
        per_head.append(F.binary_cross_entropy_with_logits(logits, labels))
    torch.testing.assert_close(bce_discriminator(real, fake), sum(per_head) / 2)
    generator, discriminator = ADVERSARIAL["bce"]
    assert discriminator is bce_discriminator
    labels = [F.binary_cross_entropy_with_logits(head, torch.ones_like(head)) for head in fake]
    torch.testing.assert_close(generator(fake), sum(labels) / 2)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_computed_in_float32(name):
    generator, discriminator = ADVERSARIAL[name]
    real, fake = (tuple(head.bfloat16() for head in heads(values)) for values in (REAL, FAKE))
    wide_real, wide_fake = (tuple(head.float() for head in values) for values in (real, fake))
    expected = generator(wide_fake), discriminator(wide_real, wide_fake)
    with torch.autocast("cpu", torch.bfloat16):
        losses = generator(fake), discriminator(real, fake)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_a_large_logit_is_no_overflow():
    assert logistic_generator((torch.tensor([-1e4]),)).item() == pytest.approx(1e4)
