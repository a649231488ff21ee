"""Both stages' training steps on random images of any size, set up as training does it.

Each class holds the training's own `state`; the `networks` that are reported, by name; the modules
that are `trained`, those of them that are `updated`, and those in a step that are `frozen`; and the
networks that are `exported` into a model file.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from autoencoders import Autoencoder, AutoencoderConfig
from autoencoders.losses import LPIPS, random_lpips
from autoencoders.losses.perceptual import CONV5_4, ESRGANPerceptual
from ldm.config import Resolution, height_width
from ldm.data import Source
from ldm.run import Run
from pipelines import train_autoencoder, train_diffusion
from pipelines.finetune import Given
from pipelines.latents import Codec, LatentBatch, LatentCache, latent_batches
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe, latent_shape
from pipelines.train_autoencoder import AutoencoderState
from pipelines.train_diffusion import DiffusionState


class AutoencoderTraining:
    """Stage one.

    Args:
        given: config of the autoencoder that training starts with, which costs as much untrained.
    """

    def __init__(
        self, recipe: AutoencoderRecipe, run: Run, given: AutoencoderConfig | None = None
    ) -> None:
        self.recipe, self.run = recipe, run
        perceptual = random_perceptual(recipe)
        start = None if given is None else Given(Autoencoder(given), "", {})
        self.state = AutoencoderState(recipe, run, perceptual, start)
        self.state.prepare(run)
        ae, discriminator = self.state.autoencoder, self.state.discriminator
        self.networks: dict[str, nn.Module] = {"encoder": ae.encoder, "decoder": ae.decoder}
        self.trained, self.exported = [ae, discriminator], [ae]
        self.updated = self.trained if recipe.adversarial.weight else self.trained[:1]
        if recipe.adversarial.weight:
            self.networks["discriminator"] = discriminator
        self.frozen = [loss.network for loss in perceptual.values()]
        if self.state.teacher is not None:
            self.frozen.append(self.state.teacher)

    def accepts(self, resolution: Resolution) -> bool:
        """True if the recipe could train on images of this size, in pixels."""
        try:
            self.recipe.check_resolution(resolution)
        except ValueError:
            return False
        return True

    def step(self, resolution: Resolution, batch: int, adversarial_active: bool = True) -> None:
        """Train on a micro-batch, with an update of each network."""
        images = _images(self.run, self.recipe.image_channels, resolution, batch)
        ramp = float(adversarial_active)
        train_autoencoder.train_step(self.run, self.state, images, range(batch), ramp)

    def calls(self, resolution: Resolution, batch: int) -> Mapping[str, Callable[[], Any]]:
        """Forward passes of the reported networks."""
        images = _images(self.run, self.recipe.image_channels, resolution, batch)
        latents = torch.randn(batch, *self.recipe.latent_shape(resolution), device=images.device)
        calls = {
            "encoder": lambda: self.state.autoencoder.encode(images),
            "decoder": lambda: self.state.autoencoder.decode(latents),
            "discriminator": lambda: self.state.discriminator(images),
        }
        return {name: calls[name] for name in self.networks}


class DiffusionTraining:
    """Stage two, with the encoder in its step unless the recipe has a cache.

    Args:
        recipe: with the network's sizes filled in; see `pipelines.recipes.fit`.
        config: of stage one, which takes as long untrained.
    """

    def __init__(self, recipe: DiffusionRecipe, config: AutoencoderConfig, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.autoencoder = run.place(Autoencoder(config).eval().requires_grad_(False))
        self.state = DiffusionState(recipe, run, self.autoencoder)
        self.state.prepare(run, self.autoencoder)
        network, encoder = self.state.network, self.autoencoder.encoder
        self.networks: dict[str, nn.Module] = {"network": network, "encoder": encoder}
        self.trained = self.updated = [self.state.objective]
        self.frozen, self.exported = [self.autoencoder], [network, self.autoencoder]
        self._stream_of = cache(self._stream)  # one stream for each size, over all its steps

    def accepts(self, resolution: Resolution) -> bool:
        """True if the recipe could train on images of this size, in pixels."""
        factor = self.autoencoder.downsampling * self.state.network.factor
        return all(side % factor == 0 for side in height_width(resolution))

    def step(self, resolution: Resolution, batch: int, adversarial_active: bool = True) -> None:
        """Train on a micro-batch, with an update of the network."""
        if isinstance(next(self.autoencoder.parameters()), FakeTensor):  # `Costs` adds the encoding
            latents = self._random_latents(resolution, batch)
        else:
            _, latents = next(self._stream_of(resolution, batch))
        train_diffusion.train_step(self.run, self.state, latents)

    def calls(self, resolution: Resolution, batch: int) -> Mapping[str, Callable[[], Any]]:
        """Forward passes of the reported networks."""
        images = _images(self.run, self.autoencoder.config.image_channels, resolution, batch)
        latents = self._random_latents(resolution, batch)
        return {
            "network": lambda: self.state.network(latents.z, latents.sigma),
            "encoder": lambda: self.autoencoder.encode(images),
        }

    def encode(self, resolution: Resolution, batch: int) -> None:
        """Encode a micro-batch, unless latents come from a cache."""
        if not self.recipe.cache:
            with torch.no_grad(), self.run.autocast():
                channels = self.autoencoder.config.image_channels
                self.autoencoder.encode(_images(self.run, channels, resolution, batch))

    def _stream(self, resolution: Resolution, batch: int) -> Iterator[tuple[int, LatentBatch]]:
        """The training's own batches, of one image of noise or a blank cache."""
        n_z, classes = self.recipe.network.latent_channels, self.recipe.network.classes
        data = self.recipe.data.model_copy(update={"workers": 0})
        sizes = {"resolution": resolution, "batch_size": batch, "accumulate": 1, "data": data}
        recipe = self.recipe.model_copy(update={**sizes, "steps": 10**6})  # without end
        sigma_data = recipe.trained.sigma_data
        codec = Codec(self.autoencoder, torch.zeros(n_z), torch.ones(n_z), sigma_data)
        source = _Noise(resolution, classes, self.autoencoder.config.image_channels)
        shape = latent_shape(recipe, self.autoencoder)
        blank = _BlankCache(source, shape) if recipe.cache else None
        return latent_batches(self.run, recipe, self.run.place(codec), source, blank, 0)

    def _random_latents(self, resolution: Resolution, batch: int) -> LatentBatch:
        shape, device = self.autoencoder.config.latent_shape(resolution), self.run.device
        z = torch.randn(batch, *shape, device=device)
        sigma = torch.ones(batch, device=device)
        return LatentBatch(z, sigma, noise=torch.randn_like(z), labels=None, augment=None)


class _Noise(Source):
    """A source whose images are one, of noise, uint8 (H, W, C)."""

    def __init__(self, resolution: Resolution, classes: int, channels: int) -> None:
        self.channels = channels
        if classes:
            self.classes = tuple(map(str, range(classes)))
            self._labels = np.arange(len(self)) % classes
        shape = *height_width(resolution), channels
        self._image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def __len__(self) -> int:
        return 1000

    def name(self, index: int) -> str:
        return f"noise {index}"

    def load(self, index: int) -> np.ndarray:
        return self._image


class _BlankCache(LatentCache):
    """A cache of standard normal posteriors (n_z, h, w)."""

    def __init__(self, source: _Noise, shape: tuple[int, int, int]) -> None:
        self.source, self.mirrored = source, False
        self._moments = np.stack([np.zeros(shape, np.float32), np.ones(shape, np.float32)])

    def load(self, seed: int, k: int) -> tuple[np.ndarray, int]:
        return self._moments, k % len(self.source)


Training = AutoencoderTraining | DiffusionTraining


def random_perceptual(recipe: AutoencoderRecipe) -> dict[str, LPIPS | ESRGANPerceptual]:
    """Build a recipe's perceptual losses with random weights, which cost the same."""
    losses: dict[str, LPIPS | ESRGANPerceptual] = {}
    if recipe.loss.lpips:
        losses["lpips"] = LPIPS(random_lpips(recipe.loss.lpips_network, pretrained=False))
    if recipe.loss.esrgan:
        from torchvision.models import vgg19

        losses["esrgan"] = ESRGANPerceptual(vgg19().features[: CONV5_4 + 1])
    return losses


def _images(run: Run, channels: int, resolution: Resolution, batch: int) -> Tensor:
    """Random images (b, C, H, W), in the memory layout of training images."""
    return run.place(torch.randn(batch, channels, *height_width(resolution), device=run.device))
