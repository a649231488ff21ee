"""Time a recipe's own training steps on this machine, and scale them to the whole run.

The probe sizes grow from one small image to the recipe's micro-batch, as far as time and memory
allow. From the last of them the recipe's step is scaled by its multiply-accumulates.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from statistics import median
from typing import Any

import torch

from autoencoders import AutoencoderConfig
from ldm.config import Resolution, height_width, pixel_count, read_resolution, short_size
from ldm.device import peak_flops, resolve_device, resolve_precision, synchronise
from ldm.errors import LdmError, brief
from ldm.run import Run, log
from pipelines.doctor.costs import Costs
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining, Training
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

SECONDS = 30.0
"""Longest time that timing should take."""
SMALLEST = 32
"""Side of the images timed first, in pixels, or less, if the recipe accepts that."""
MOST_REPEATS = 10
"""Most steps timed at one size, besides the first."""
SLOWEST = {"cpu": 5.0, "cuda": 500.0}
"""10⁹ multiply-accumulates that any such device does in a second once it is busy. Steps on the
smallest images are mostly overhead, and would promise less."""


@dataclass(frozen=True)
class Stretch:
    """A part of a run in which all steps are alike."""

    resolution: Resolution
    """Size of the images, in pixels."""
    steps: int
    """Steps of the recipe in it."""
    adversarial_active: bool = False
    """True if the discriminator takes part."""


@dataclass(frozen=True)
class Speed:
    """Speed of a stretch of the run."""

    load: Stretch
    measured_side: Resolution
    """Size of the images measured, in pixels."""
    measured_batch: int
    """Images of the micro-batch measured."""
    images_per_second: float
    """Images of the recipe's own steps, over all processes."""
    seconds: float
    """Duration of the whole stretch."""


@dataclass(frozen=True)
class Timing:
    """Speed of every stretch of a run, and its duration."""

    speeds: tuple[Speed, ...]
    seconds: float
    """Duration of the run, without loading images, validating and saving; not compiled."""
    peak: int | None
    """Bytes allocated on a CUDA GPU at the worst moment; None on a CPU, which does not count."""
    out_of_memory: bool
    """True if memory ended the growth of the probes."""


def stretches(recipe: AutoencoderRecipe | DiffusionRecipe) -> list[Stretch]:
    """List the stretches of a recipe: each resolution, with the discriminator before without."""
    if isinstance(recipe, DiffusionRecipe):
        return [Stretch(recipe.resolution, recipe.steps)]
    start = recipe.adversarial.start if recipe.adversarial.weight else 1.0
    quiet = ceil(start * recipe.total_steps)  # steps before the discriminator starts
    found: list[Stretch] = []
    for phase in recipe.phases:
        before = min(phase.steps, quiet)
        quiet -= before
        active = Stretch(phase.resolution, phase.steps - before, adversarial_active=True)
        found += [active, Stretch(phase.resolution, before)]
    return [stretch for stretch in found if stretch.steps]


def flops_per_image(
    recipe: AutoencoderRecipe | DiffusionRecipe, config: AutoencoderConfig | None = None
) -> dict[tuple[Resolution, bool], float]:
    """Count the operations of training on one image, for `Run.flops`, without a computation.

    Those of the model: what checkpointing computes again does not count. Nothing is counted where
    the peak of the device is not known, with which they are compared.

    Args:
        recipe: of stage two, with the network's sizes filled in.
        config: of the autoencoder that training starts with, or encodes with.

    Returns:
        By the size of the images, and whether the discriminator takes part.
    """
    device = resolve_device(recipe.run.device)
    if recipe.run.deterministic:  # its setting comes before CUDA is used, as for the device's name
        return {}
    if peak_flops(device, resolve_precision(recipe.run.precision, device)) is None:
        return {}
    recipe = recipe.model_copy(update={"checkpointing": False})
    build: Callable[[Run], Training]
    if isinstance(recipe, DiffusionRecipe):
        assert config is not None
        build = partial(DiffusionTraining, recipe, config)
    else:
        build = partial(AutoencoderTraining, recipe, given=config)
    try:
        with torch.random.fork_rng(devices=[]):
            costs = Costs(build, recipe.run, device, recipe.batch_size // recipe.accumulate)
            kinds = [(part.resolution, part.adversarial_active) for part in stretches(recipe)]
            return {kind: 2e9 * costs.step(*kind).gmac for kind in kinds}
    except Exception as error:  # a figure less in the log is no reason to end a run
        log.warning("no model FLOPs utilisation in the log: %s", brief(error))
        return {}


Fits = Callable[[Resolution, int], bool]


def _half(size: Resolution) -> Resolution | None:
    """Half of both sides; None if one is odd."""
    height, width = height_width(size)
    return None if height % 2 or width % 2 else read_resolution((height // 2, width // 2))


class StepTimer:
    """Times the steps of a training, and separately the updates in them, whose cost is fixed.

    Args:
        training: set up on a real run.
        costs: of the training's steps, per image.
        fits: (size, images) → True if a step on such a micro-batch fits into memory.
    """

    def __init__(self, training: Training, costs: Costs, fits: Fits) -> None:
        self.training, self.costs, self.fits = training, costs, fits
        self.device = training.run.device
        self._updating = 0.0
        for part in training.state.parts.values():
            if isinstance(part, torch.optim.Optimizer):
                part.register_step_pre_hook(self._begin_update)
                part.register_step_post_hook(self._end_update)

    def grow(
        self, stretch: Stretch, size: Resolution, images: int, deadline: float
    ) -> tuple[Resolution, int, list[tuple[float, float]], bool]:
        """Time steps on ever larger micro-batches, then on the last again, until the deadline.

        Args:
            size, images: of the first.

        Returns:
            The size of the last; the times of its steps, as from `step`; and True if memory
            ended the growth.
        """
        times: list[tuple[float, float]] = []
        probe, out_of_memory = (size, images), False
        active, batch = stretch.adversarial_active, self.costs.batch
        gmac = self.costs.step(stretch.resolution, active).gmac
        per_pixel = gmac / pixel_count(stretch.resolution)
        while True:
            try:
                if not self.fits(*probe):
                    raise torch.OutOfMemoryError
                times = [self.step(*probe, active)]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                out_of_memory = True
                break
            (size, images), (work, update) = probe, times[0]
            if probe == (stretch.resolution, batch):
                break
            gmac = per_pixel * pixel_count(size) * images
            rate = max(gmac / max(work, 1e-6), SLOWEST[self.device.type])
            probe = (size, min(2 * images, batch))
            if size != stretch.resolution:
                probe = (read_resolution([2 * side for side in height_width(size)]), 1)
            expected = update + per_pixel * pixel_count(probe[0]) * probe[1] / rate
            if time.monotonic() + expected > deadline:
                break
        if not times:
            raise LdmError(f"not enough memory for one image of {short_size(size)}")
        while len(times) <= MOST_REPEATS and time.monotonic() + sum(times[-1]) < deadline:
            times.append(self.step(size, images, active))
        return size, images, times, out_of_memory

    def step(self, size: Resolution, images: int, adversarial_active: bool) -> tuple[float, float]:
        """Take a step; return its seconds without the updates, and those of the updates."""
        self._updating, began = 0.0, self._now()
        self.training.step(size, images, adversarial_active)
        self._begin_update()
        self.training.state.advance()
        self._end_update()
        return self._now() - began - self._updating, self._updating

    def _begin_update(self, *_: Any) -> None:
        self._updating -= self._now()

    def _end_update(self, *_: Any) -> None:
        self._updating += self._now()

    def _now(self) -> float:
        synchronise(self.device)
        return time.monotonic()


def time_training(
    timer: StepTimer, stretches: Sequence[Stretch], accumulate: int, processes: int, end: float
) -> Timing:
    """Time the stretches of a run, each as near to its own size as time and memory allow.

    Args:
        stretches: of each resolution, the one with the discriminator first.
        processes: processes that train together, assumed never to wait.
        end: time to be done, about.
    """
    costs, on_gpu = timer.costs, timer.device.type == "cuda"
    speeds: list[Speed] = []
    resolution: Resolution = 0
    size: Resolution = SMALLEST
    images, out_of_memory = 1, False
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(timer.device)
    for number, stretch in enumerate(stretches):
        now, active = time.monotonic(), stretch.adversarial_active
        deadline = now + (end - now) / (len(stretches) - number)
        if stretch.resolution != resolution:
            resolution, images, most, size = stretch.resolution, 1, size, stretch.resolution
            while pixel_count(size) > pixel_count(most) and (half := _half(size)):
                if not timer.training.accepts(half):
                    break
                size = half
        if not speeds and timer.fits(size, images):
            timer.step(size, images, active)  # a warm-up
        size, images, times, full = timer.grow(stretch, size, images, deadline)
        out_of_memory = out_of_memory or full
        work, update = map(median, zip(*times[1:] or times, strict=True))
        scale = costs.step(resolution, active).gmac / costs.step(size, active).gmac
        step = accumulate * costs.batch * work / images * scale + update
        rate = accumulate * costs.batch * processes / step
        speeds.append(Speed(stretch, size, images, rate, stretch.steps * step))
    peak = torch.cuda.max_memory_allocated(timer.device) if on_gpu else None
    return Timing(tuple(speeds), sum(speed.seconds for speed in speeds), peak, out_of_memory)
