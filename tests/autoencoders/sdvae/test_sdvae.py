import ptwt
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoencoders import build_autoencoder
from autoencoders.layers import SelfModulatedConv2d, fuse
from autoencoders.sdvae import SDVAEDecoder, SDVAEDecoderConfig
from tests.autoencoders.parameters import count
from tests.golden import (
    DECODER_GMAC_256,
    ENCODER_GMAC_256,
    SDVAE_DECODER_PARAMETERS,
    SDVAE_ENCODER_PARAMETERS,
    SDVAE_SMALL_ENCODER_PARAMETERS,
)

SMALL = {"channels": 16, "multipliers": (1, 2, 2), "blocks": 1}


# ---------------------------------------------------------------------------------- encoder
def test_golden_parameters():
    with torch.device("meta"):
        ae, small = build_autoencoder("sdvae"), build_autoencoder("sdvae-small")
    assert count(ae.encoder) == SDVAE_ENCODER_PARAMETERS
    assert count(ae.decoder) == count(small.decoder) == SDVAE_DECODER_PARAMETERS
    assert count(ae) - count(ae.encoder) - count(ae.decoder) == 8 * 8 + 8 + 4 * 4 + 4
    assert count(small.encoder) == SDVAE_SMALL_ENCODER_PARAMETERS


def test_golden_multiply_accumulates():
    with torch.device("meta"):
        ae = build_autoencoder("sdvae")
        with FlopCounterMode(display=False) as encoder:
            ae.encoder(torch.zeros(1, 3, 256, 256))
        with FlopCounterMode(display=False) as decoder:
            ae.decoder(torch.zeros(1, 4, 32, 32))
    assert encoder.get_total_flops() / 2e9 == pytest.approx(ENCODER_GMAC_256["sdvae"], abs=0.005)
    assert decoder.get_total_flops() / 2e9 == pytest.approx(DECODER_GMAC_256, abs=0.005)


def test_each_level_but_the_last_halves_the_image():
    ae = build_autoencoder("sdvae", encoder={"channels": 8}, decoder={"channels": 8})
    seen = []
    for level in ae.encoder.levels:
        level.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[1:])))
    ae.encoder(torch.zeros(1, 3, 32, 64))
    assert seen == [(8, 16, 32), (16, 8, 16), (32, 4, 8), (32, 4, 8)]


def test_without_gradients_it_encodes_the_same():
    ae = build_autoencoder("sdvae", encoder={"channels": 8}, decoder={"channels": 8})
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, expected = images.clone(), ae.encoder(images)
    with torch.no_grad():
        torch.testing.assert_close(ae.encoder(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)


# ---------------------------------------------------------------------------------- decoder
@pytest.mark.parametrize("norm", ["group", "smc"])
def test_latents_become_images(norm):
    decoder = SDVAEDecoder(SDVAEDecoderConfig(**SMALL, norm=norm), latent_channels=12)
    assert decoder(torch.randn(2, 12, 4, 6)).shape == (2, 3, 16, 24)


def test_self_modulation_replaces_what_it_should_and_nothing_else():
    group, smc = (
        SDVAEDecoder(SDVAEDecoderConfig(**SMALL, norm=norm), latent_channels=4)
        for norm in ("group", "smc")
    )
    kinds = {name: type(module) for name, module in smc.named_modules()}
    norms = [name for name, kind in kinds.items() if issubclass(kind, nn.GroupNorm)]
    assert norms == ["middle.1.norm"]
    for name, module in group.named_modules():
        inside = name.endswith((".conv1", ".conv2"))
        if type(module) is nn.Conv2d:
            assert kinds[name] is (SelfModulatedConv2d if inside else nn.Conv2d), name


def test_scale_of_features_reaches_the_pixels_only_with_self_modulation():
    """Why the output norm goes: GroupNorm there would hide the features' magnitude."""
    for norm, hidden in (("group", True), ("smc", False)):
        decoder = SDVAEDecoder(SDVAEDecoderConfig(**SMALL, norm=norm), latent_channels=4)
        features = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        plain, scaled = (decoder.norm_out(features * scale) for scale in (1, 10))
        assert torch.allclose(plain, scaled, atol=1e-3) == hidden


# --------------------------------------------------------------------------------- sub-bands
@pytest.mark.parametrize("norm", ["group", "smc"])
def test_sub_bands_become_an_image_of_twice_their_size(norm):
    config = SDVAEDecoderConfig(**SMALL, norm=norm, output="wavelet")
    decoder = SDVAEDecoder(config, latent_channels=4)
    assert config.upsampling == 8
    assert SDVAEDecoderConfig(**SMALL).upsampling == 4
    assert decoder.conv_out.out_channels == 12
    seen = []
    decoder.conv_out.register_forward_hook(lambda _m, _i, out: seen.append(out))
    images = decoder(torch.randn(2, 4, 4, 6))
    assert images.shape == (2, 3, 32, 48)
    # ptwt: the orthonormal inverse; the sub-bands are half of its own, as LiteVAE's encoder has it
    low, *edges = (2 * seen[0]).chunk(4, dim=1)
    expected = ptwt.waverec2((low, tuple(edges)), "haar")
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    images.square().mean().backward()
    assert decoder.conv_out.weight.grad.abs().max() > 0


def test_sub_bands_of_a_flat_image_have_its_range():
    decoder = SDVAEDecoder(SDVAEDecoderConfig(**SMALL, output="wavelet"), latent_channels=4)
    nn.init.zeros_(decoder.conv_out.weight)
    with torch.no_grad():
        decoder.conv_out.bias.copy_(torch.tensor([1.0, -1.0, 0.5] + 9 * [0.0]))
    images = decoder(torch.randn(1, 4, 2, 2))
    expected = torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(images, expected)


def test_the_inverse_transform_is_float32_under_autocast():
    decoder = SDVAEDecoder(SDVAEDecoderConfig(**SMALL, output="wavelet"), latent_channels=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(torch.randn(1, 4, 2, 2)).dtype == torch.float32


# ------------------------------------------------------------------ without gradients, and with
@pytest.mark.parametrize("norm", ["group", "smc"])
@pytest.mark.parametrize("output", ["image", "wavelet"])
def test_fused_and_without_gradients_it_decodes_the_same(norm, output):
    torch.manual_seed(0)
    config = SDVAEDecoderConfig(**SMALL, norm=norm, output=output)
    decoder, latents = SDVAEDecoder(config, latent_channels=4), torch.randn(2, 4, 5, 6)
    expected = decoder(latents)
    with torch.no_grad():
        torch.testing.assert_close(decoder(latents), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(fuse(decoder)(latents), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_what_a_level_gave_can_be_looked_at_afterwards(norm):
    """A hook that keeps the last feature maps must not see them overwritten."""
    decoder = SDVAEDecoder(SDVAEDecoderConfig(**SMALL, norm=norm), latent_channels=4).eval()
    kept = []
    decoder.levels[-1].register_forward_hook(lambda _m, _i, out: kept.extend([out, out.clone()]))
    with torch.no_grad():
        decoder(torch.randn(1, 4, 2, 2))
    assert torch.equal(*kept)
