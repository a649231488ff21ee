import torch
from torch import nn
from torch.nn import functional as F

from autoencoders.layers import chain, channels_last, in_small_batches


def test_chain_is_sequential_and_keeps_its_input():
    conv, x = nn.Conv2d(4, 4, 1), torch.randn(2, 4, 6, 6)
    before, expected = x.clone(), F.silu(conv(F.silu(x)))
    torch.testing.assert_close(chain(x, nn.Identity(), F.silu, conv, F.silu), expected)
    with torch.no_grad():
        got = chain(x, nn.Identity(), F.silu, conv, F.silu)
    torch.testing.assert_close(got, expected)
    assert torch.equal(x, before)


def test_chain_overwrites_what_only_it_holds_without_gradients():
    h = torch.randn(3)
    before = h.clone()
    chain(torch.zeros(3), lambda x: h, F.silu)
    assert torch.equal(h, before)
    with torch.no_grad():
        chain(torch.zeros(3), lambda x: h, F.silu)
    torch.testing.assert_close(h, F.silu(before))


def test_channels_are_last_on_a_cpu_without_gradients_only():
    x = torch.randn(2, 4, 6, 6)
    assert channels_last(x) is x
    with torch.no_grad():
        last = channels_last(x)
        assert channels_last(x.to("meta")).is_contiguous()
    assert torch.equal(last, x)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_batches_are_small_on_a_cpu_without_gradients_only():
    sizes, x = [], torch.randn(5, 1, 4, 4)

    def network(part):
        sizes.append(len(part))
        return 2 * part

    in_small_batches(network, x, 16, 32)
    with torch.no_grad():
        assert torch.equal(in_small_batches(network, x, 16, 32), 2 * x)
        in_small_batches(network, x, 16, 8)
        in_small_batches(network, x.to("meta"), 16, 32)
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1, 5]
