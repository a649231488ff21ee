"""A training loop's inside, to be stepped on synthetic images of any size: see `trial`.

The steps are those of the two training loops; nothing is read and nothing is written.

A short trial: a recipe's own training steps on synthetic images, timed on this machine.

It climbs from the smallest images, one at a time, towards the recipe's resolution and micro-batch,
and stops where the next rung would take too long or too much memory. What it measures there is
scaled to the recipe by the arithmetic of a step (`pipelines.doctor.costs`).
"""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from autoencoders import Autoencoder
from autoencoders.layers import checkpoint_blocks
from autoencoders.posterior import DiagonalGaussian
from ldm.config import to_tree, validate
from ldm.distributed import make_accelerator
from ldm.errors import LdmError, UsageError
from ldm.images import to_float
from ldm.run import Run
from pipelines.codec import Codec
from pipelines.doctor.costs import PaperAutoencoder, PaperDiffusion, blank_perceptual
from pipelines.latents import CachedBatch, LatentBatch, latent_batches
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.train_autoencoder import AutoencoderState, draw
from pipelines.train_autoencoder import train_step as train_autoencoder_step
from pipelines.train_diffusion import DiffusionState
from pipelines.train_diffusion import train_step as train_diffusion_step


class Rehearsal(ABC):
    """What a trial asks of either stage."""

    run: Run

    @abstractmethod
    def takes(self, side: int) -> bool:
        """Whether the recipe could train on images of this side, in pixels."""

    @abstractmethod
    def step(self, side: int, batch: int, adversarial_active: bool) -> None:
        """One whole training step on `batch` images, with its update."""

    @abstractmethod
    def update(self, adversarial_active: bool) -> None:
        """Only what a step does once, however many its images: optimisers and averages."""

    @abstractmethod
    def gmac(self, side: int, adversarial_active: bool) -> float:
        """10⁹ multiply-accumulates of a step, per image."""


class AutoencoderRehearsal(Rehearsal):
    """Stage one's step."""

    def __init__(self, recipe: AutoencoderRecipe, run: Run, paper: PaperAutoencoder) -> None:
        self.recipe, self.run, self.paper = recipe, run, paper
        with _seeded():
            self.state = AutoencoderState(recipe, run, blank_perceptual(recipe))
        if recipe.checkpointing:
            checkpoint_blocks(self.state.autoencoder)

    def takes(self, side: int) -> bool:
        try:
            phases = [{"resolution": side, "steps": 1}]
            validate(AutoencoderRecipe, to_tree(self.recipe) | {"phases": phases})
        except UsageError:
            return False
        return True

    def step(self, side: int, batch: int, adversarial_active: bool) -> None:
        images = to_float(self.run.place(torch.from_numpy(_pixels(batch, side)).movedim(-1, 1)))
        draws = draw(self.run, self.recipe, range(batch), side)
        train_autoencoder_step(self.run, self.state, images, draws, float(adversarial_active))
        self.state.advance()

    def update(self, adversarial_active: bool) -> None:
        _step_on_nothing(self.state.opt_autoencoder)
        if adversarial_active:
            _step_on_nothing(self.state.opt_discriminator)
        self.state.advance()

    def gmac(self, side: int, adversarial_active: bool) -> float:
        return self.paper.cost(side, adversarial_active).gmac


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
            self.state = DiffusionState(recipe, run)
        mean, std = torch.zeros(n_z), torch.ones(n_z)
        self.codec = Codec(run.place(autoencoder), mean, std, recipe.denoiser.sigma_data)
        self.codec.to(run.device)

    def takes(self, side: int) -> bool:
        return side % (self.codec.autoencoder.downsampling * self.state.network.factor) == 0

    def step(self, side: int, batch: int, adversarial_active: bool) -> None:
        if (side, batch) not in self._streams:
            self._streams[side, batch] = self._stream(side, batch)
        _, images = next(self._streams[side, batch])
        train_diffusion_step(self.run, self.state, images)
        self.state.advance()

    def update(self, adversarial_active: bool) -> None:
        _step_on_nothing(self.state.optimizer)
        self.state.advance()

    def gmac(self, side: int, adversarial_active: bool) -> float:
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


SECONDS = 30.0
"""How long a trial should take, at most."""
SMALLEST = 32
"""Side of the smallest images tried, in pixels, where the recipe takes them."""
MOST_REPEATS = 10
"""Steps timed at most, besides one that is not counted."""
SLOWEST = {"cpu": 5.0, "cuda": 500.0}
"""10⁹ multiply-accumulates that any such device does in a second, once it is busy: steps on the
smallest images are mostly waiting, and say less of it."""


@dataclass(frozen=True)
class Load:
    """A stretch of a run in which every step is alike."""

    resolution: int
    """Side of the images, in pixels."""
    steps: int
    """How many steps of the recipe are so."""
    adversarial_active: bool = False
    """Whether the discriminator takes part."""


@dataclass(frozen=True)
class Speed:
    """How fast a stretch of the run goes here."""

    load: Load
    measured_side: int
    """Side of the images measured, in pixels."""
    measured_batch: int
    """Images in a micro-batch measured."""
    images_per_second: float
    """Of the recipe's own steps, over all processes."""
    seconds: float
    """For all steps of the stretch."""


@dataclass(frozen=True)
class Trial:
    """What came of a trial."""

    speeds: tuple[Speed, ...]
    seconds: float
    """To the end of the recipe, without loading images, validating and saving; not compiled."""
    peak: int | None
    """Bytes allocated at the worst moment on a CUDA GPU; None on a CPU, which does not count."""
    out_of_memory: bool
    """Whether the device had no room for what was tried."""


def stretches(recipe: AutoencoderRecipe) -> tuple[Load, ...]:
    """Those of stage one: every resolution, with the discriminator and before it begins."""
    adversarial = recipe.adversarial
    quiet = ceil(adversarial.start * recipe.total_steps)  # steps before the discriminator begins
    if not adversarial.weight:
        quiet = recipe.total_steps
    loads: list[Load] = []
    for phase in recipe.phases:
        before = min(phase.steps, quiet)
        quiet -= before
        loads += [
            Load(phase.resolution, phase.steps - before, adversarial_active=True),
            Load(phase.resolution, before),
        ]
    return tuple(load for load in loads if load.steps)


def try_out(
    rehearsal: Rehearsal,
    loads: tuple[Load, ...],
    each: int,
    accumulate: int,
    processes: int,
    fits: Callable[[int, int], bool],
    seconds: float = SECONDS,
) -> Trial:
    """Time the stretches of a run, each as near to its own size as time and memory allow.

    Args:
        loads: of a resolution, the one with the discriminator first.
        each: images in a micro-batch on one process.
        processes: that train together; they are taken to lose no time to each other.
        fits: (side, images) → whether a step on such a micro-batch has room.
        seconds: how long this may take, about.

    Raises:
        LdmError: not even one of the smallest images has room.
    """
    began, device, speeds, full = time.monotonic(), rehearsal.run.device, [], False
    rung, reached = Rung(0, 0, 0.0), Load(0, 0)
    updates: dict[bool, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for number, load in enumerate(loads):
        until = time.monotonic() + (began + seconds - time.monotonic()) / (len(loads) - number)
        rungs, took = _ladder(rehearsal, load, each), []
        if load.adversarial_active not in updates:
            updates[load.adversarial_active] = _time_update(rehearsal, load, rungs[0], fits)
        update = updates[load.adversarial_active]
        if load.resolution != reached.resolution:
            # of the rungs that are quicker than what was climbed already, only the last
            start = max(sum(r.gmac < rung.gmac for r in rungs) - 1, 0)
            rung, first, out = _climb(rehearsal, load, rungs[start:], update, fits, until)
            reached, full, took = load, full or out, [first]
        _repeat(rehearsal, load, rung, took, until)
        speeds.append(_speed(rehearsal, load, rung, took, update, each, accumulate, processes))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Trial(tuple(speeds), sum(speed.seconds for speed in speeds), peak, full)


class Rung(NamedTuple):
    """A micro-batch that is tried."""

    side: int
    """Of its images, in pixels."""
    images: int
    gmac: float
    """10⁹ multiply-accumulates of a step, about: as its pixels are to those of the recipe."""


def _ladder(rehearsal: Rehearsal, load: Load, each: int) -> list[Rung]:
    """From one of the smallest images up to the recipe's micro-batch."""
    sides = [load.resolution]
    while sides[-1] % 2 == 0 and sides[-1] // 2 >= SMALLEST and rehearsal.takes(sides[-1] // 2):
        sides.append(sides[-1] // 2)
    images = [each]
    while images[-1] > 1:
        images.append(images[-1] // 2)
    whole = rehearsal.gmac(load.resolution, load.adversarial_active)
    sizes = [(side, 1) for side in reversed(sides)]
    sizes += [(load.resolution, count) for count in reversed(images[:-1])]
    return [Rung(*size, whole * (size[0] / load.resolution) ** 2 * size[1]) for size in sizes]


def _time_update(
    rehearsal: Rehearsal, load: Load, rung: Rung, fits: Callable[[int, int], bool]
) -> float:
    """Seconds of what a step does once, however many its images."""
    if not fits(rung.side, rung.images):
        raise LdmError(f"no room for one image of {rung.side}²")
    rehearsal.step(
        rung.side, rung.images, load.adversarial_active
    )  # the first one makes Adam's moments
    return _timed(rehearsal, partial(rehearsal.update, load.adversarial_active))


def _climb(
    rehearsal: Rehearsal,
    load: Load,
    rungs: list[Rung],
    update: float,
    fits: Callable[[int, int], bool],
    until: float,
) -> tuple[Rung, float, bool]:
    """The highest rung that is quick enough, a step's seconds there, and whether memory ran out.

    Args:
        update: seconds of a step that do not depend on its images.
        until: when to be through, by the monotonic clock.
    """
    slowest, reached = SLOWEST[rehearsal.run.device.type], None
    for rung, following in zip(rungs, [*rungs[1:], None], strict=True):
        try:
            if not fits(rung.side, rung.images):
                break
            step = partial(rehearsal.step, rung.side, rung.images, load.adversarial_active)
            reached = rung, _timed(rehearsal, step)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if following is None:
            return *reached, False
        rate = max(rung.gmac / max(reached[1] - update, 1e-6), slowest)
        if time.monotonic() + update + following.gmac / rate > until:
            return *reached, False
    if reached is None:
        smallest = rungs[0]
        what = "one image" if smallest.images == 1 else f"{smallest.images} images"
        raise LdmError(f"no room for {what} of {smallest.side}²")
    return *reached, True


def _repeat(rehearsal: Rehearsal, load: Load, rung: Rung, took: list[float], until: float) -> None:
    """Add the seconds of more steps, as many as there is time for, one at least in all."""
    step = partial(rehearsal.step, rung.side, rung.images, load.adversarial_active)
    while not took or (len(took) <= MOST_REPEATS and time.monotonic() + took[-1] < until):
        took.append(_timed(rehearsal, step))


def _speed(
    rehearsal: Rehearsal,
    load: Load,
    rung: Rung,
    took: list[float],
    update: float,
    each: int,
    accumulate: int,
    processes: int,
) -> Speed:
    """What steps of a rung say of the recipe's own.

    Args:
        took: seconds of steps, the first of which is slower than others.
        update: seconds of what a step does once, however many its images.
    """
    step = statistics.median(took[1:] or took)
    per_image = max(step - update, step / 100) / rung.images
    if rung.side != load.resolution:
        own, measured = (
            rehearsal.gmac(s, load.adversarial_active) for s in (load.resolution, rung.side)
        )
        per_image *= own / measured
    step = accumulate * each * per_image + update
    rate = accumulate * each * processes / step
    return Speed(load, rung.side, rung.images, rate, load.steps * step)


def _timed(rehearsal: Rehearsal, call: Callable[[], None]) -> float:
    """Seconds of a call, until the device has done it."""
    began = time.monotonic()
    call()
    if rehearsal.run.device.type == "cuda":
        torch.cuda.synchronize(rehearsal.run.device)
    return time.monotonic() - began
