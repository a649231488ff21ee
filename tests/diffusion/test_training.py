"""Training and sampling on distributions whose samples are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion import (
    EDM,
    SAMPLERS,
    DenoisingLoss,
    EDMConfig,
    UNet,
    UNetConfig,
    karras_sigmas,
    sample_sigma,
)
from ldm.ema import Ema
from ldm.seeds import normal

pytestmark = pytest.mark.slow
STEPS = {"heun": 24, "dpmpp-2m": 48, "euler": 128}  # Euler is of first order: it needs many


class Plane(nn.Module):
    """A network on points of the plane, as latents (B, 2, 1, 1)."""

    def __init__(self, width=128):
        super().__init__()
        self.inside = nn.Sequential(
            nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x, c_noise):
        waves = 2.0 ** torch.arange(8) * c_noise[:, None]  # (B, 8)
        seen = torch.cat([x.flatten(1), waves.sin(), waves.cos()], dim=1)
        return self.inside(seen).view(-1, 2, 1, 1)


def train(network, draw, steps, batch, lr):
    """The averaged denoiser after `steps` steps on what `draw(k)` gives."""
    denoiser = EDM(network)
    objective, config = DenoisingLoss(denoiser), EDMConfig()
    ema = Ema(denoiser, half_life_images=30 * batch)
    optimizer = torch.optim.Adam(objective.parameters(), lr, betas=(0.9, 0.99))
    for step in range(steps):
        z = draw(step)
        sigma = sample_sigma(normal(1, "sigma", [step], (batch,))[0], config)
        noise = normal(1, "noise", [step], z.shape)[0]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        objective(z, sigma, noise)[0].mean().backward()
        optimizer.step()
        ema.update((step + 1) * batch, batch)
    return ema.ema_model


@torch.no_grad()
def sampled(name, denoiser, count, shape):
    noise = normal(2, "sample", range(count), shape)
    return SAMPLERS[name](denoiser, noise, karras_sigmas(STEPS[name])).float()


# -------------------------------------------------------------------------------- a Gaussian
MEAN = torch.tensor([0.2, -0.4])
ROOT = torch.tensor([[0.5, 0.0], [0.3, 0.2]])


@pytest.fixture(scope="module")
def gaussian():
    torch.manual_seed(0)

    def draw(step):
        return (MEAN + normal(0, "z", [step], (512, 2))[0] @ ROOT.T).view(-1, 2, 1, 1)

    return train(Plane(), draw, 2000, 512, 3e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gaussian_within_five_hundredths(sampler, gaussian):
    samples = sampled(sampler, gaussian, 4000, (2, 1, 1)).flatten(1)
    assert (samples.mean(0) - MEAN).abs().max() < 0.05
    assert (samples.T.cov() - ROOT @ ROOT.T).abs().max() < 0.05


# --------------------------------------------------------------------------------- a mixture
CENTRES = torch.tensor([[-0.7, 0.0], [0.5, 0.6], [0.4, -0.5]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
SPREAD = 0.08


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)

    def draw(step):
        which = torch.multinomial(
            WEIGHTS, 512, replacement=True, generator=torch.Generator().manual_seed(step)
        )
        z = CENTRES[which] + SPREAD * normal(0, "z", [step], (512, 2))[0]
        return z.view(-1, 2, 1, 1)

    return train(Plane(), draw, 2000, 512, 3e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mixture_has_its_parts_in_their_places_and_proportions(sampler, mixture):
    samples = sampled(sampler, mixture, 4000, (2, 1, 1)).flatten(1)
    distance, nearest = torch.cdist(samples, CENTRES).min(dim=1)
    shares = torch.bincount(nearest, minlength=3) / len(samples)
    assert (shares - WEIGHTS).abs().max() < 0.05
    # of the mixture itself, 1 in 90 lies further from its centre than three spreads
    assert (distance > 3 * SPREAD).float().mean() < 0.05
    for part, centre in enumerate(CENTRES):
        assert (samples[nearest == part].mean(0) - centre).abs().max() < 0.05


# ------------------------------------------------------------------------------- four images
IMAGES = 0.5 * F.interpolate(normal(0, "images", range(4), (4, 2, 2)), scale_factor=4)


@pytest.fixture(scope="module")
def four_images():
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels=32, multipliers=(1, 2), blocks=1, head_width=32))

    def draw(step):
        return IMAGES[torch.arange(32) % 4]

    return train(network, draw, 600, 32, 2e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_four_images_are_the_only_ones_and_all_of_them(sampler, four_images):
    samples = sampled(sampler, four_images, 64, (4, 8, 8))
    error = (samples[:, None] - IMAGES).square().mean((2, 3, 4)).sqrt()  # (128, 4)
    distance, nearest = error.min(dim=1)
    assert (distance < 0.1).float().mean() > 0.95
    assert (torch.bincount(nearest, minlength=4) / 64).min() > 0.1
