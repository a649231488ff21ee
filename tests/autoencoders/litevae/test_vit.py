import pytest
import torch
from torch import nn

from autoencoders.litevae.nets import TransformerBlock, ViT, ViTConfig
from ldm.config import resolve
from ldm.errors import UsageError

SMALL = ViTConfig(width=16, depth=2, heads=2, grid=4)


def test_block_is_pytorchs_pre_norm_layer():
    ours = TransformerBlock(16, heads=4)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj.": "mix.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        for their_name, our_name in names.items():
            name = name.replace(their_name, our_name)
        state[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        tensor.copy_(state[name])
    ours.load_state_dict(state)
    tokens = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)


def test_without_positions_tokens_are_a_set():
    net = ViT(SMALL, 12, 5)
    nn.init.zeros_(net.positions)
    x = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(net(x.flip(2)), net(x).flip(2), rtol=1e-4, atol=1e-5)
    nn.init.normal_(net.positions)
    assert (net(x.flip(2)) - net(x).flip(2)).abs().max() > 1e-2


def test_positions_lie_row_by_row_as_the_tokens():
    net = ViT(SMALL, 12, 5)
    nn.init.zeros_(net.positions)
    with torch.no_grad():
        net.positions[..., 1, 2] = torch.randn(16)
    net.blocks = nn.Identity()
    x = torch.zeros(1, 12, 4, 4)
    moved = (net(x) - net(x)[..., :1, :1]).abs().amax(dim=(0, 1)) > 1e-4
    assert moved.nonzero().tolist() == [[1, 2]]


def test_positions_are_interpolated_to_other_grids():
    def keys(distance, a=-0.75):
        """Keys 1981, Equation 4: the kernel of cubic convolution, with the a of PyTorch."""
        d = abs(distance)
        if d < 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def weights(size):  # each of `size` centres, half a pixel in, on 8 positions; borders repeated
        matrix = torch.zeros(size, 8)
        for i in range(size):
            at = (i + 0.5) * 8 / size - 0.5
            for j in range(-3, 11):
                matrix[i, min(max(j, 0), 7)] += keys(at - j)
        return matrix

    net = ViT(ViTConfig(width=4, depth=1, heads=1, grid=8), 12, 5)
    assert net.positions_on(8, 8) is net.positions
    for height, width in ((16, 24), (8, 5)):
        expected = weights(height) @ net.positions @ weights(width).T
        torch.testing.assert_close(net.positions_on(height, width), expected)
    assert net(torch.randn(2, 12, 3, 5)).shape == (2, 5, 3, 5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError, match=r"^'heads': must divide width, 128 \(got 3\)$"):
        resolve(ViTConfig, {}, ["heads=3"])
