import numpy as np
import pytest
import pywt
import torch

from autoencoders import DiagonalGaussian, build_autoencoder
from autoencoders.dwt import DWTEncoder, DWTEncoderConfig
from autoencoders.wavelet import idwt
from ldm.config import load_preset, resolve, validate
from ldm.errors import LdmError, UsageError


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def encoder(**options):
    config = DWTEncoderConfig(**options)
    return DWTEncoder(config, config.latent_channels)


def mean(options, images):
    return DiagonalGaussian.from_moments(encoder(**options)(images)).mean


@pytest.mark.filterwarnings("ignore:Level value of")
@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2"])
def test_latents_are_the_deepest_sub_bands(images, depth, wavelet):
    low, edges, *_ = pywt.wavedec2(images.numpy(), wavelet, "periodization", depth)
    expected = np.concatenate([low, *edges], axis=1) / 2**depth
    latents = mean({"depth": depth, "wavelet": wavelet}, images)
    np.testing.assert_allclose(latents.numpy(), expected, rtol=0, atol=1e-5)


def test_higher_levels_come_by_space_to_depth(images):
    latents = mean({"levels": 3}, images)
    assert latents.shape == (2, 192, 4, 6)
    deepest = mean({}, images)
    assert torch.equal(latents[:, :12], deepest)
    assert torch.equal(latents[:, :48], mean({"levels": 2}, images))
    channel = 12
    for level in (2, 1):
        edges = pywt.wavedec2(images.numpy(), "haar", "periodization", level)[1]
        side = 2 ** (3 - level)
        for band in edges:
            for colour in range(3):
                for i in range(side):
                    for j in range(side):
                        expected = band[:, colour, i::side, j::side] / 2**level
                        np.testing.assert_allclose(latents[:, channel], expected, atol=1e-5)
                        channel += 1
    assert channel == 192


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("wavelet", ["haar", "sym4"])
def test_all_levels_kept_are_the_whole_image(images, depth, wavelet):
    latents = mean({"levels": depth, "depth": depth, "wavelet": wavelet}, images)
    low, *edges = (band * 2**depth for band in latents[:, :12].split(3, dim=1))
    x, rest = idwt((low, *edges), wavelet), latents[:, 12:]
    for level in range(depth - 1, 0, -1):
        side = 2 ** (depth - level)
        edges = torch.nn.functional.pixel_shuffle(rest[:, : 9 * side**2], side) * 2**level
        x, rest = idwt((x, *edges.split(3, dim=1)), wavelet), rest[:, 9 * side**2 :]
    assert rest.shape[1] == 0
    torch.testing.assert_close(x, images, rtol=0, atol=1e-5)


def test_a_draw_is_the_mean_and_nothing_is_learned(images):
    posterior = DiagonalGaussian.from_moments(encoder(levels=2)(images))
    draw = posterior.sample(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draw, posterior.mode(), rtol=0, atol=2e-6)
    assert not list(encoder().parameters())
    assert not encoder().state_dict()


def test_gradients_reach_the_images_and_autocast_changes_nothing(images):
    images.requires_grad_()
    encoder(levels=2)(images).sum().backward()
    assert images.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        moments = encoder(levels=2)(images)
    assert torch.equal(moments, encoder(levels=2)(images))


@pytest.mark.parametrize(("preset", "n_z"), [("dwt", 12), ("dwt-2", 48)])
def test_presets_are_the_papers(preset, n_z):
    tree = load_preset("ae", preset)
    config = validate(DWTEncoderConfig, tree["encoder"])
    assert (config.depth, config.downsampling, config.wavelet) == (3, 8, "haar")
    assert tree["latent_channels"] == config.latent_channels == n_z  # Table 12


def test_another_number_of_latent_channels_is_refused():
    said = "latent_channels is 4, and the dwt encoder gives 48: set latent_channels=48"
    with pytest.raises(UsageError, match=said):
        build_autoencoder("dwt-2", latent_channels=4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("levels=4", r"^'levels': must be at most depth, 3 \(got 4\)$"),
        ("levels=0", "^'levels': input should be greater than 0"),
        ("depth=0", "^'depth': input should be greater than or equal to 1"),
        ("wavelet=harr", r"^'wavelet': no wavelet 'harr'; did you mean 'haar'\?"),
    ],
)
def test_bad_options_are_refused_in_one_line(override, said):
    with pytest.raises(UsageError, match=said):
        resolve(DWTEncoderConfig, {}, [override])


def test_images_that_do_not_have_the_levels_are_refused():
    with pytest.raises(LdmError, match=r"images of 12×16 pixels: .* depth 3 .* multiples of 8"):
        encoder()(torch.zeros(1, 3, 12, 16))
