"""Autoencoders, discriminators, losses and metrics of any number of channels."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from autoencoders import Autoencoder, build_autoencoder, load_autoencoder
from autoencoders.autoencoder import grey_weights
from autoencoders.discriminators import (
    PatchGANConfig,
    StyleGANConfig,
    UNetDiscriminatorConfig,
    build_discriminator,
)
from autoencoders.losses import LPIPS
from autoencoders.losses.adversarial import ldl
from autoencoders.losses.objective import gaussian, wavelet
from autoencoders.losses.perceptual import random_lpips
from autoencoders.sdvae.formats import (
    diffusers_config,
    tree_from_diffusers,
    write_compvis,
    write_diffusers,
)
from autoencoders.tiling import reconstruct_tiled
from ldm.errors import LdmError, UsageError
from ldm.images import as_rgb, grid, to_pil
from ldm.metrics import psnr, sliced_wasserstein, ssim

NET = {"channels": 8, "multipliers": [1, 2], "blocks": 1}
LITEVAE = {"type": "litevae", "depth": 2, "extractor": NET, "aggregator": NET}
SDVAE = {"type": "sdvae", "channels": 32, "multipliers": [1, 1, 2], "blocks": 1}
DECODER = {"channels": 32, "multipliers": [1, 1, 2], "blocks": 1}


def build(encoder: dict, channels: int, decoder: dict | None = None, **more) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_autoencoder(
            "litevae-s", encoder=encoder, decoder=DECODER | (decoder or {}),
            image_channels=channels, **more,
        ).eval()  # fmt: skip


def grey(channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(
    "encoder", [LITEVAE, LITEVAE | {"shortcut": "wavelet"}, SDVAE, {"type": "dwt", "depth": 2}]
)
@pytest.mark.parametrize("output", ["image", "wavelet"])
def test_any_number_of_channels(encoder, channels, output):
    decoder = {"output": output, "multipliers": [1, 2] if output == "wavelet" else [1, 1, 2]}
    latents = {"latent_channels": 4 * channels} if encoder["type"] == "dwt" else {}
    ae, images = build(encoder, channels, decoder, **latents), grey(channels)
    assert ae(images).recon.shape == images.shape
    assert reconstruct_tiled(ae, images, 16, 4).shape == images.shape
    with pytest.raises(LdmError, match=rf"give \(B, {channels}, H, W\)"):
        ae.encode(grey(3))


def test_dwt_keeps_four_sub_bands_of_each_channel():
    with pytest.raises(UsageError, match="latent_channels is 12, and the dwt encoder gives 4"):
        build({"type": "dwt", "depth": 2}, 1, latent_channels=12)


@pytest.mark.parametrize("conv1x1", [False, True])
@pytest.mark.parametrize("output", ["image", "wavelet"])
@pytest.mark.parametrize(
    "encoder", [LITEVAE, LITEVAE | {"levels": [2], "shared": True}, SDVAE], ids=str
)
def test_an_adapted_model_gives_the_mean_of_the_channels(encoder, output, conv1x1):
    decoder = {"output": output, "multipliers": [1, 2] if output == "wavelet" else [1, 1, 2]}
    colour = build(encoder, 3, decoder, conv1x1=conv1x1)
    adapted = build(encoder, 1, decoder, conv1x1=conv1x1)
    adapted.load_state_dict(grey_weights(colour))
    images = grey()
    with torch.no_grad():
        ours, theirs = (
            adapted(images, sample=False),
            colour(images.expand(-1, 3, -1, -1), None, False),
        )
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=1e-4, atol=1e-4)
    mean = theirs.recon.mean(1, keepdim=True)
    torch.testing.assert_close(ours.recon, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "encoder", [{"type": "dwt", "depth": 2}, LITEVAE | {"shortcut": "wavelet"}]
)
def test_latents_that_show_the_channels_are_not_adapted(encoder):
    more = {"latent_channels": 12} if encoder["type"] == "dwt" else {}
    with pytest.raises(LdmError, match="only encoders of type sdvae, and litevae without"):
        grey_weights(build(encoder, 3, **more))
    colour = build(encoder, 3, **more)
    only = grey_weights(colour, ["decoder"])
    assert only["decoder.conv_out.weight"].shape[0] * 3 == colour.decoder.conv_out.weight.shape[0]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "config",
    [
        UNetDiscriminatorConfig(channels=4, multipliers=(1, 2)),
        PatchGANConfig(channels=4),
        StyleGANConfig(resolution=32, channels=4),
    ],
    ids=lambda config: config.type,
)
def test_discriminators_of_any_number_of_channels(config, channels):
    logits = build_discriminator(config, channels)(grey(channels))
    assert len(logits[0]) == 2


# --------------------------------------------------------------------------- losses and metrics
@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LPIPS(random_lpips("squeeze", pretrained=False))


def test_lpips_of_grey_is_that_of_the_channel_repeated(lpips):
    a, b = grey(), grey(seed=1)
    repeated = lpips.each(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
    torch.testing.assert_close(lpips.each(a, b), repeated)


def test_lpips_of_other_numbers_is_the_mean_over_the_channels(lpips):
    a, b = grey(4), grey(4, seed=1)
    each = torch.stack([lpips.each(a[:, c : c + 1], b[:, c : c + 1]) for c in range(4)])
    torch.testing.assert_close(lpips.each(a, b), each.mean(0))


def test_losses_of_grey_are_those_of_the_channel_repeated():
    a, b = grey(), grey(seed=1)
    for loss in (ldl, gaussian, wavelet):
        repeated = loss(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
        torch.testing.assert_close(loss(a, b), repeated)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_psnr_and_ssim_agree_with_scikit_image(channels):
    a, b = (grey(channels, seed).double() for seed in (0, 1))
    for i in range(2):
        x, y = (np.moveaxis((image[i].numpy() + 1) / 2, 0, 2) for image in (a, b))
        expected = structural_similarity(
            x, y, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert ssim(a, b)[i].item() == pytest.approx(expected, abs=1e-6)
        assert psnr(a, b)[i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1))


@pytest.mark.parametrize("channels", [1, 4])
def test_swd_of_any_number_of_channels(channels):
    a = grey(channels)
    near, far = sliced_wasserstein(a, a, patches=64), sliced_wasserstein(a, a * 0, patches=64)
    assert near["mean"] < far["mean"]


# ---------------------------------------------------------------------------------- pictures
def test_pictures_show_one_or_three_channels():
    many = grey(5)
    assert torch.equal(as_rgb(many), many[:, :3]) and torch.equal(as_rgb(many[:, :3]), many[:, :3])
    assert torch.equal(as_rgb(many[:, :2]), many[:, [0, 0, 0]])
    assert grid(grey(), 2).shape[0] == 3
    assert [to_pil(grey(channels)[0]).mode for channels in (1, 3, 5)] == ["L", "RGB", "RGB"]


@pytest.mark.parametrize("format", ["diffusers", "compvis"])
def test_grey_models_travel_in_the_formats_of_others(format, tmp_path):
    ae = build(SDVAE, 1, conv1x1=True)
    path = tmp_path / ("vae" if format == "diffusers" else "vae.safetensors")
    (write_diffusers if format == "diffusers" else write_compvis)(path, ae)
    again = load_autoencoder(path)
    assert again.config.image_channels == 1
    assert torch.equal(
        again.decode(again.encode(grey()).mode()), ae.decode(ae.encode(grey()).mode())
    )


@pytest.mark.parametrize("out", [1, 4])
def test_a_model_of_unequal_channels_is_refused(out):
    described = diffusers_config(build(SDVAE, 3, conv1x1=True).config) | {"out_channels": out}
    with pytest.raises(LdmError, match=f"in_channels is 3 and out_channels {out}"):
        tree_from_diffusers(described)
