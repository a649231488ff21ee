import ptwt
import pytest
import torch
from torch.nn import functional as F

from autoencoders import build_autoencoder
from autoencoders.litevae.encoder import LiteVAEEncoder, LiteVAEEncoderConfig
from tests.autoencoders.parameters import count
from tests.golden import ENCODER_GMAC_256, LITEVAE_ENCODER_PARAMETERS

SMALL = LiteVAEEncoderConfig.model_validate(
    {
        "extractor": {"channels": 8, "multipliers": [1, 2], "blocks": 1},
        "aggregator": {"channels": 8, "multipliers": [1, 2], "blocks": 1},
    }
)


@pytest.mark.parametrize(("preset", "expected"), LITEVAE_ENCODER_PARAMETERS.items())
def test_golden_parameters(preset, expected):
    with torch.device("meta"):
        assert count(build_autoencoder(preset).encoder) == expected


@pytest.mark.parametrize("preset", LITEVAE_ENCODER_PARAMETERS)
def test_golden_multiply_accumulates(preset):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_autoencoder(preset).encoder(torch.zeros(1, 3, 256, 256))
    assert counter.get_total_flops() / 2e9 == pytest.approx(ENCODER_GMAC_256[preset], abs=0.005)


def test_forward_is_the_papers_with_every_level_from_the_image():
    """Appendix G's forward pass, its wavelets by ptwt from the image, against our cascade."""
    encoder = LiteVAEEncoder(SMALL, latent_channels=4)
    images = torch.randn(2, 3, 32, 48)
    features = []
    for level, extractor in zip((1, 2, 3), encoder.extractors, strict=True):
        low, edges, *_ = ptwt.wavedec2(images, "haar", level=level)
        sub_bands = torch.cat([low, *edges], dim=1) / 2**level
        target = (32 // 8, 48 // 8)
        features.append(F.adaptive_avg_pool2d(extractor(sub_bands), target))
    expected = encoder.aggregator(torch.cat(features, dim=1))
    assert expected.shape == (2, 8, 4, 6)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_sub_bands_of_a_flat_image_stay_in_its_range():
    seen = []
    encoder = LiteVAEEncoder(SMALL, latent_channels=4)
    for extractor in encoder.extractors:
        extractor.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    encoder(torch.full((1, 3, 16, 16), 0.5))
    for sub_bands in seen:
        torch.testing.assert_close(sub_bands[:, :3], torch.full_like(sub_bands[:, :3], 0.5))
        assert sub_bands[:, 3:].abs().max() == 0
