"""Learning rates by images seen, against their closed forms."""

import math

import pytest
import torch

from ldm.learning_rate import learning_rate, set_learning_rate


def test_warm_up_is_linear_then_constant():
    rates = [learning_rate(2e-4, seen, 1000) for seen in (0, 1, 250, 500, 1000, 1001, 10**9)]
    assert rates == pytest.approx([0, 2e-7, 5e-5, 1e-4, 2e-4, 2e-4, 2e-4], rel=1e-12)


def test_no_warm_up():
    assert learning_rate(1e-4, 0, 0) == learning_rate(1e-4, 5, 0) == 1e-4


def cosine(seen, warmup=0):
    return learning_rate(2.0, seen, warmup, "cosine", total_images=1200)


def test_cosine_falls_from_the_base_rate_to_zero_at_the_end():
    """cos is 1, √½, ½, 0, −1 at 0, π/4, π/3, π/2, π."""
    rates = [cosine(seen) for seen in (0, 300, 400, 600, 1200, 5000)]
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1.5, 1, 0, 0], rel=1e-12, abs=1e-15)


def test_cosine_begins_where_the_warm_up_ends():
    rates = [cosine(seen, warmup=200) for seen in (50, 100, 200, 700, 1200, 1300)]
    assert rates == pytest.approx([0.5, 1, 2, 1, 0, 0], rel=1e-12, abs=1e-15)


def test_a_run_shorter_than_its_warm_up_only_warms():
    assert cosine(600, warmup=2400) == pytest.approx(0.5)
    assert cosine(1200, warmup=1200) == 2.0


def test_inverse_sqrt_is_level_then_halves_where_images_are_four_times_as_many():
    def rate(seen, warmup=0):
        return learning_rate(2.0, seen, warmup, "inverse_sqrt", decay_images=1000)

    rates = [rate(seen) for seen in (0, 1, 1000, 2000, 4000, 100_000)]
    assert rates == pytest.approx([2, 2, 2, math.sqrt(2), 1, 0.2], rel=1e-12)
    # a warm-up longer than the plateau is on top: 2 · ½ · ½
    assert rate(4000, warmup=8000) == pytest.approx(0.5, rel=1e-12)


def test_a_schedule_needs_what_it_reads():
    with pytest.raises(AssertionError):
        learning_rate(1.0, 1, 0, "cosine")
    with pytest.raises(AssertionError):
        learning_rate(1.0, 1, 0, "inverse_sqrt")
    with pytest.raises(ValueError, match="no learning rate schedule 'linear'"):
        learning_rate(1.0, 1, 0, "linear")


def test_every_parameter_group_gets_the_rate():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 2.0)]
    optimizer = torch.optim.SGD(groups)
    set_learning_rate(optimizer, learning_rate(0.5, 1, 2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].item() == -0.25
