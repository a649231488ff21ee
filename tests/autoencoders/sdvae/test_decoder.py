import pytest
import torch
from torch import nn

from autoencoders.layers import SelfModulatedConv2d
from autoencoders.sdvae.decoder import SDVAEDecoder, SDVAEDecoderConfig

SMALL = {"channels": 16, "multipliers": (1, 2, 2), "blocks": 1}


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
    norms = [name for name, kind in kinds.items() if kind is nn.GroupNorm]
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
