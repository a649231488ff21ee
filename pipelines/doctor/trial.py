"""A short trial: a recipe's own training steps on synthetic images, timed on this machine.

It climbs from the smallest images, one at a time, towards the recipe's resolution and micro-batch,
and stops where the next rung would take too long or too much memory. What it measures there is
scaled to the recipe by the arithmetic of a step (`pipelines.doctor.costs`).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

import torch

from ldm.errors import LdmError
from pipelines.doctor.rehearsal import Rehearsal
from pipelines.training.autoencoder_recipe import AutoencoderRecipe

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
    fights: bool = False
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
            Load(phase.resolution, phase.steps - before, fights=True),
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
        if load.fights not in updates:
            updates[load.fights] = _time_update(rehearsal, load, rungs[0], fits)
        update = updates[load.fights]
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
    whole = rehearsal.gmac(load.resolution, load.fights)
    sizes = [(side, 1) for side in reversed(sides)]
    sizes += [(load.resolution, count) for count in reversed(images[:-1])]
    return [Rung(*size, whole * (size[0] / load.resolution) ** 2 * size[1]) for size in sizes]


def _time_update(
    rehearsal: Rehearsal, load: Load, rung: Rung, fits: Callable[[int, int], bool]
) -> float:
    """Seconds of what a step does once, however many its images."""
    if not fits(rung.side, rung.images):
        raise LdmError(f"no room for one image of {rung.side}²")
    rehearsal.step(rung.side, rung.images, load.fights)  # the first one makes Adam's moments
    return _timed(rehearsal, partial(rehearsal.update, load.fights))


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
            step = partial(rehearsal.step, rung.side, rung.images, load.fights)
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
    step = partial(rehearsal.step, rung.side, rung.images, load.fights)
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
        own, measured = (rehearsal.gmac(s, load.fights) for s in (load.resolution, rung.side))
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
