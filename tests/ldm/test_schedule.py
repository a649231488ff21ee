"""Warm-up by images seen."""

import pytest
import torch

from ldm.schedule import learning_rate, set_learning_rate


def test_warm_up_is_linear_then_constant():
    rates = [learning_rate(2e-4, seen, 1000) for seen in (0, 1, 250, 500, 1000, 1001, 10**9)]
    assert rates == pytest.approx([0, 2e-7, 5e-5, 1e-4, 2e-4, 2e-4, 2e-4], rel=1e-12)


def test_no_warm_up():
    assert learning_rate(1e-4, 0, 0) == learning_rate(1e-4, 5, 0) == 1e-4


def test_every_parameter_group_gets_the_rate():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 2.0)]
    optimizer = torch.optim.SGD(groups)
    set_learning_rate(optimizer, learning_rate(0.5, 1, 2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].item() == -0.25
