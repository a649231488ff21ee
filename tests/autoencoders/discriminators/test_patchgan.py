import pytest
import torch
from torch import nn

from autoencoders.discriminators import PatchGAN, PatchGANConfig


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def by_hand(width=64):
    """Isola et al. 2017, Section 6.1.2: C64-C128-C256-C512 and a last convolution to one map."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.GroupNorm(32, 2 * width, 1e-6), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
        nn.GroupNorm(32, 4 * width, 1e-6), nn.LeakyReLU(0.2),
        nn.Conv2d(4 * width, 8 * width, 4, 1, 1, bias=False),
        nn.GroupNorm(32, 8 * width, 1e-6), nn.LeakyReLU(0.2),
        nn.Conv2d(8 * width, 1, 4, 1, 1),
    )  # fmt: skip


def test_is_the_papers_layer_by_layer():
    net, expected = PatchGAN(PatchGANConfig(channels=16)), by_hand(width=16)
    tensors = zip(expected.state_dict(), net.state_dict().values(), strict=True)
    expected.load_state_dict(dict(tensors))
    images = torch.rand(2, 3, 40, 48) * 2 - 1
    (logits,) = net(images)
    assert logits.shape == (2, 1, 3, 4)
    torch.testing.assert_close(logits, expected(images))


def test_golden_parameter_count():
    # latent diffusion's NLayerDiscriminator: norms with a weight and a bias, no bias before them;
    # pix2pix's own reads six channels, whence its well-known 2,768,705 = this + 3·64·16
    assert sum(p.numel() for p in PatchGAN(PatchGANConfig()).parameters()) == 2_765_633


def test_widths_stop_at_eight_times_the_base():
    net = PatchGAN(PatchGANConfig(channels=2, layers=5))
    convolutions = [layer for layer in net.layers if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [2, 4, 8, 16, 16, 16, 1]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_leaves_one_logit(layers):
    config = PatchGANConfig(channels=2, layers=layers)
    side = 3 * 2**layers
    config.check_resolution(side)
    (logits,) = PatchGAN(config)(torch.zeros(1, 3, side, side + 1))
    assert logits.shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"at least {side} pixels"):
        config.check_resolution(side - 1)


def test_a_logit_sees_70_pixels():
    """Through the convolutions alone: a norm sees the whole image, faintly."""
    net = PatchGAN(PatchGANConfig(channels=2))
    convolutions = nn.Sequential(*(x for x in net.layers if isinstance(x, nn.Conv2d))).double()
    images = torch.zeros(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    convolutions(images)[0, 0, 15, 15].backward()
    seen = images.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_initial_weights():
    net = PatchGAN(PatchGANConfig())
    for layer in net.layers:
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert layer.weight.mean().item() == pytest.approx(0, abs=1e-3)
        elif isinstance(layer, nn.GroupNorm):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
        if getattr(layer, "bias", None) is not None:
            assert not layer.bias.any()
