import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoencoders import build_autoencoder
from tests.autoencoders.parameters import count
from tests.golden import (
    DECODER_GMAC_256,
    ENCODER_GMAC_256,
    SDVAE_DECODER_PARAMETERS,
    SDVAE_ENCODER_PARAMETERS,
    SDVAE_SMALL_ENCODER_PARAMETERS,
)


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
