"""A training loop's inside, to be stepped on synthetic images of any size: see `trial`.

The steps are those of the two training loops; nothing is read and nothing is written.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from autoencoders import Autoencoder
from autoencoders.discriminators import build_discriminator
from autoencoders.layers import checkpoint_blocks
from autoencoders.losses import Objective
from autoencoders.posterior import DiagonalGaussian
from ldm.config import to_tree, validate
from ldm.ema import Ema
from ldm.errors import UsageError
from ldm.images import to_float
from ldm.processes import make_accelerator
from ldm.run import Run
from pipelines.codec import Codec
from pipelines.doctor.costs import PaperAutoencoder, PaperDiffusion, blank_perceptual
from pipelines.train_diffusion import train_step as train_diffusion_step
from pipelines.training.autoencoder_recipe import AutoencoderRecipe
from pipelines.training.autoencoder_step import draw
from pipelines.training.autoencoder_step import train_step as train_autoencoder_step
from pipelines.training.diffusion_recipe import DiffusionRecipe
from pipelines.training.latent_cache import CachedBatch
from pipelines.training.latent_stream import LatentBatch, latent_batches
from pipelines.training.learner import Learner


class Rehearsal(ABC):
    """What a trial asks of either stage."""

    run: Run

    @abstractmethod
    def takes(self, side: int) -> bool:
        """Whether the recipe could train on images of this side, in pixels."""

    @abstractmethod
    def step(self, side: int, batch: int, fights: bool) -> None:
        """One whole training step on `batch` images, with its update."""

    @abstractmethod
    def update(self, fights: bool) -> None:
        """Only what a step does once, however many its images: optimisers and averages."""

    @abstractmethod
    def gmac(self, side: int, fights: bool) -> float:
        """10⁹ multiply-accumulates of a step, per image."""


class AutoencoderRehearsal(Rehearsal):
    """Stage one's step."""

    def __init__(self, recipe: AutoencoderRecipe, run: Run, paper: PaperAutoencoder) -> None:
        self.recipe, self.run, self.paper = recipe, run, paper
        with _seeded():
            self.ae = run.place(Autoencoder(recipe.model))
            self.critic = run.place(build_discriminator(recipe.discriminator))
            perceptual = blank_perceptual(recipe)
        self.objective = Objective(recipe.loss, recipe.adversarial, perceptual)
        self.ema = Ema(self.ae, recipe.ema_half_life_images)
        self.opt_ae, self.opt_critic = (
            torch.optim.Adam(net.parameters(), recipe.lr, recipe.betas, fused=True)
            for net in (self.ae, self.critic)
        )
        if recipe.checkpointing:
            checkpoint_blocks(self.ae)
        compared = self.objective.needs_averaged and recipe.ema_half_life_images > 0
        self.averaged = self.ema.model if compared else None

    def takes(self, side: int) -> bool:
        try:
            phases = [{"resolution": side, "steps": 1}]
            validate(AutoencoderRecipe, to_tree(self.recipe) | {"phases": phases})
        except UsageError:
            return False
        return True

    def step(self, side: int, batch: int, fights: bool) -> None:
        images = to_float(self.run.place(torch.from_numpy(_pixels(batch, side)).movedim(-1, 1)))
        draws = draw(self.run, self.recipe, range(batch), side)
        train_autoencoder_step(
            self.run, self.ae, self.critic, self.opt_ae, self.opt_critic, images, draws,
            self.objective, float(fights), self.recipe.clip_norm, self.averaged,
        )  # fmt: skip
        self.ema.update(batch, batch)

    def update(self, fights: bool) -> None:
        optimizers = [self.opt_ae, self.opt_critic] if fights else [self.opt_ae]
        for optimizer in optimizers:
            _step_on_nothing(optimizer)
        self.ema.update(1, 1)

    def gmac(self, side: int, fights: bool) -> float:
        return self.paper.cost(side, fights).gmac


class DiffusionRehearsal(Rehearsal):
    """Stage two's step, from pixels to the update, or from latents where the recipe has a cache.

    Args:
        autoencoder: stage one, trained or not: it takes as long.
    """

    def __init__(
        self, recipe: DiffusionRecipe, autoencoder: Autoencoder, run: Run, paper: PaperDiffusion
    ) -> None:
        self.recipe, self.run, self.paper = recipe, run, paper
        self._streams: dict[tuple[int, int], Iterator[tuple[int, LatentBatch]]] = {}
        n_z = autoencoder.config.latent_channels
        with _seeded():
            self.learner = Learner(recipe, run)
        mean, std = torch.zeros(n_z), torch.ones(n_z)
        self.codec = Codec(run.place(autoencoder), mean, std, recipe.denoiser.sigma_data)
        self.codec.to(run.device)

    def takes(self, side: int) -> bool:
        return side % (self.codec.autoencoder.downsampling * self.learner.network.factor) == 0

    def step(self, side: int, batch: int, fights: bool) -> None:
        if (side, batch) not in self._streams:
            self._streams[side, batch] = self._stream(side, batch)
        _, images = next(self._streams[side, batch])
        train_diffusion_step(
            self.run, self.learner.objective, self.learner.optimizer, images, self.recipe.clip_norm
        )
        self.learner.average(self.recipe.batch_size)

    def update(self, fights: bool) -> None:
        _step_on_nothing(self.learner.optimizer)
        self.learner.average(self.recipe.batch_size)

    def gmac(self, side: int, fights: bool) -> float:
        return self.paper.cost(side).gmac

    def _stream(self, side: int, batch: int) -> Iterator[tuple[int, LatentBatch]]:
        data = self.recipe.data.model_copy(update={"workers": 0})
        shape = {"resolution": side, "batch_size": batch, "accumulate": 1, "data": data}
        recipe = self.recipe.model_copy(update={**shape, "steps": 1_000_000})
        source = SyntheticImages(side, self.recipe.network.classes)
        factor = self.codec.autoencoder.downsampling
        latents = (recipe.network.latent_channels, side // factor, side // factor)
        cache = SyntheticCache(latents) if recipe.cache else None
        return latent_batches(self.run, recipe, self.codec, source, cache, 0)


class SyntheticImages:
    """A data set of noise, without end for a trial: all images are one, (side, side, 3) uint8."""

    def __init__(self, side: int, classes: int) -> None:
        self.classes = tuple(str(number) for number in range(classes))
        self._image = _pixels(1, side)[0]

    def __len__(self) -> int:
        return 1000

    def name(self, index: int) -> str:
        return f"synthetic image {index}"

    def load(self, index: int) -> np.ndarray:
        return self._image

    def label(self, index: int) -> int:
        return index % len(self.classes) if self.classes else -1


class SyntheticCache:
    """A cache of standard normal latents of one shape (n_z, h, w)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape

    def batches(self, start: int, stop: int, batch_size: int, **_: int) -> Iterator[CachedBatch]:
        """As `LatentCache.batches`, of one process."""
        zeros = torch.zeros(batch_size, *self._shape)
        for first in range(start, stop - batch_size + 1, batch_size):
            k = torch.arange(first, first + batch_size)
            yield CachedBatch(DiagonalGaussian(zeros, zeros), torch.zeros_like(k), k)


def make_run(recipe: AutoencoderRecipe | DiffusionRecipe, device: torch.device) -> Run:
    """A run that leaves no trace: it has neither a folder nor signals.

    Raises:
        LdmError: this Python process has trained on another kind of device.
    """
    return Run(Path(), recipe.run, make_accelerator(str(device)))


def _step_on_nothing(optimizer: torch.optim.Optimizer) -> None:
    """An update by gradients of 0, which takes as long as any."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@lru_cache(maxsize=4)
def _pixels(count: int, side: int) -> np.ndarray:
    """Noise (count, side, side, 3) uint8, always the same."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@contextmanager
def _seeded() -> Iterator[None]:
    """Initial weights of their own seed; the global generator is then as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
