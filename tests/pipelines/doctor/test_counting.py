"""What is counted of operations, against arithmetic by hand."""

import pytest
import torch
from torch import nn

from pipelines.doctor.costs import Holder, PaperRun, count_gmac

CPU = torch.device("cpu")


def test_a_linear_layer_by_hand():
    layer = nn.Linear(4, 8)
    run = PaperRun(CPU, "fp32", layer)
    with run.watching():
        loss = layer(torch.ones(5, 4)).square().sum()
        run.step(loss, layer)
    # the layer's input and the square's, in float32; the weight is no activation
    assert run.worst == 4 * (5 * 4 + 5 * 8)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert count_gmac(lambda: layer(torch.ones(5, 4))) == pytest.approx(5 * 4 * 8 / 1e9)


def test_views_of_one_storage_count_once():
    scale = nn.Parameter(torch.ones(6))
    run = PaperRun(CPU, "fp32")
    x = torch.ones(10, 6)
    with run.watching():
        loss = (x * scale).sum() + (x.view(60)[:6] * scale).sum()
        run.step(loss, nn.ParameterList([scale]))
    assert run.worst == 4 * 60  # x, whole, for the gradients of scale


def test_attention_is_counted_as_its_two_products():
    q = torch.zeros(1, 2, 16, 8)
    call = lambda: nn.functional.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert count_gmac(call) == pytest.approx(2 * 2 * 16 * 16 * 8 / 1e9)


def test_what_is_held_at_the_worst_moment():
    x = torch.ones(100)
    with Holder() as holder:
        for _ in range(3):
            y = x * 2  # 400 bytes, and the one of the turn before until it is replaced
        z = y.view(10, 10)[0]  # of the same storage
        del y
        z.add_(1)
        w = torch.cat([x, x])
        assert z.numel() + w.numel() == 210
    assert holder.worst == 400 + 800
    assert Holder().worst == 0
