"""Requirements of a recipe, and everything that is missing, before days of training begin.

Parameters, memory and disk come from a dry run (`costs`), speed from a few real steps (`timing`).
Nothing is written or downloaded. Without the requested device, costs are left out.
"""

import os
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Literal

import torch

from autoencoders import Autoencoder
from ldm.data import Source, holds_out
from ldm.device import resolve_device, resolve_precision
from ldm.distributed import make_accelerator
from ldm.errors import LdmError
from ldm.run import Run, check_batch
from ldm.run_folder import RUNS
from pipelines.doctor import checks
from pipelines.doctor.checks import Problem
from pipelines.doctor.costs import (
    Costs,
    Disk,
    Memory,
    count_parameters,
    training_disk,
    training_memory,
)
from pipelines.doctor.timing import SECONDS, StepTimer, Stretch, Timing, stretches, time_training
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining, Training
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe, fit, latent_shape

Stage = Literal["autoencoder", "diffusion"]


@dataclass(frozen=True)
class NetworkCost:
    """Size and cost of one network."""

    name: str
    parameters: int
    """Learned values."""
    gmac: dict[int, float]
    """By the side of the images, in pixels: 10⁹ multiply-accumulates for one, forward."""


@dataclass(frozen=True)
class Machine:
    """The machine that the run would use."""

    device: str
    name: str
    precision: str
    memory: int
    """Bytes free: the GPU's, or this computer's."""
    disk: int
    """Bytes free in the place of run folders."""
    cache_disk: int | None = None
    """Bytes free in the place of cached latents; None if that is the same disk."""
    compiles: bool = False
    """True if the run compiles its networks; timing does not."""


@dataclass(frozen=True)
class Length:
    """Length of a run, and the size of its steps."""

    steps: int
    batch_size: int
    """Images of a step: processes × accumulate × each, unless they do not divide it."""
    processes: int
    accumulate: int
    """Micro-batches of a step."""
    each: int
    """Images of a micro-batch on one process."""
    images: int
    """Images seen over the whole run."""
    data: int | None
    """Images to train on; None if they cannot be opened."""


@dataclass
class Diagnosis:
    """Requirements of a recipe, what is missing, and its speed on this machine.

    From `parts` on, all is empty if the requested device is missing.
    """

    preset: str
    stage: Stage
    source: str
    """The requested data."""
    autoencoder: str | None
    """Stage two: the autoencoder found or assumed."""
    machine: Machine
    length: Length
    problems: list[Problem]
    parts: list[NetworkCost] = field(default_factory=list)
    step_gmac: dict[int, float] = field(default_factory=dict)
    """By the side of the images: 10⁹ multiply-accumulates of a training step, per image, forward
    and backward, all networks."""
    memory: Memory | None = None
    disk: Disk | None = None
    trial: Timing | None = None

    @property
    def ready(self) -> bool:
        """True if nothing is known that would stop the run."""
        return all(problem.level != "error" for problem in self.problems)


Recipe = AutoencoderRecipe | DiffusionRecipe
MemoryOf = Callable[..., Memory]  # of (micro-batches, images of each, their sides or all)

UNKNOWN_CLASSES = 1000
"""Classes assumed of labelled images that are missing: ImageNet's."""


def diagnose_autoencoder(
    recipe: AutoencoderRecipe,
    preset: str = "autoencoder",
    processes: int = 1,
    seconds: float = SECONDS,
) -> Diagnosis:
    """Diagnose a recipe of stage one.

    Args:
        processes: processes that would train together.
        seconds: time to spend on timing its steps, about; 0: none.
    """
    problems = checks.errors_of(resolve_device, recipe.run.device)
    device = None if problems else resolve_device(recipe.run.device)
    # the largest first: its message about missing data then suits every phase
    sides = sorted({phase.resolution for phase in recipe.phases}, reverse=True)
    source, faults = checks.check_data(recipe.data, sides, validates=True)
    problems += faults + checks.check_perceptual(recipe) + checks.check_inception()
    d = _begin(
        recipe, preset, "autoencoder", recipe.total_steps, processes, source, device, problems
    )
    if device is not None:
        build = partial(AutoencoderTraining, recipe)
        costs = Costs(build, recipe.run, device, d.length.each)
        disk = training_disk(costs.training, recipe.run, source is None or holds_out(recipe.data))
        _complete(d, recipe, costs, disk, build, seconds)
    return d


def diagnose_diffusion(
    recipe: DiffusionRecipe,
    preset: str = "diffusion",
    processes: int = 1,
    seconds: float = SECONDS,
) -> Diagnosis:
    """Diagnose a recipe of stage two.

    Args:
        recipe: its autoencoder a path, a preset of stage one (its newest run), or empty (the
            newest run of all). If there is none, the preset's is assumed.
        processes, seconds: as for `diagnose_autoencoder`.

    Raises:
        UsageError: settings that do not fit the autoencoder or each other.
    """
    problems = checks.errors_of(resolve_device, recipe.run.device)
    device = None if problems else resolve_device(recipe.run.device)
    trained, config, where, faults = checks.check_autoencoder(recipe, preset)
    problems += faults
    source, faults = checks.check_data(recipe.data, [recipe.resolution], validates=False)
    problems += faults + checks.check_inception()
    d = _begin(recipe, preset, "diffusion", recipe.steps, processes, source, device, problems)
    d.autoencoder = where
    uncached, faults = checks.find_latents(recipe, trained, source, d.machine.precision)
    problems += faults
    classes = UNKNOWN_CLASSES if source is None else len(source.classes)
    if source is None and recipe.data.labels:
        text = f"the data's classes are not known: {classes:,} are assumed"
        problems.append(Problem("note", text))
    with torch.device("meta"):
        shapes = Autoencoder(config)
    recipe = fit(recipe, shapes, classes)
    if device is not None:
        build = partial(DiffusionTraining, recipe, config)
        costs = Costs(build, recipe.run, device, d.length.each)
        # float32 mean and deviation of every image and of its mirror image
        moments = 2 * prod(latent_shape(recipe, shapes)) * (1 + recipe.data.flip)
        snapshots, cache = min(recipe.steps, recipe.snapshots), uncached * moments * 4
        disk = training_disk(costs.training, recipe.run, False, snapshots, cache)
        _complete(d, recipe, costs, disk, build, seconds)
    return d


# ------------------------------------------------------------------------------ the machine
def _machine(recipe: Recipe, device: torch.device) -> Machine:
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        name, memory = f"{os.cpu_count()} cores", psutil.virtual_memory().available
    precision = resolve_precision(recipe.run.precision, device)
    cache = Path(getattr(recipe, "cache", "") or RUNS).expanduser()  # stage one has none
    apart = None if same_disk(cache, RUNS) else free_disk(cache)
    return Machine(str(device), name, precision, memory, free_disk(RUNS), apart, recipe.run.compile)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    return shutil.disk_usage(_nearest(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """True if two folders are, or would be made, on one disk."""
    return _nearest(one).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not folder.exists():
        folder = folder.absolute().parent
    return folder


# ---------------------------------------------------------------------- a diagnosis in steps
def _begin(
    recipe: Recipe,
    preset: str,
    stage: Stage,
    steps: int,
    processes: int,
    source: Source | None,
    device: torch.device | None,
    problems: list[Problem],
) -> Diagnosis:
    """A diagnosis without costs; without the device, the CPU stands for the machine."""
    batch_size, micro_batches = recipe.batch_size, recipe.accumulate * processes
    each, count = ceil(batch_size / micro_batches), None if source is None else len(source)
    length = Length(
        steps, batch_size, processes, recipe.accumulate, each, steps * batch_size, count
    )
    problems += checks.errors_of(check_batch, batch_size, recipe.accumulate, processes)
    problems += checks.check_compiler(recipe.run)
    machine = _machine(recipe, device or torch.device("cpu"))
    return Diagnosis(preset, stage, recipe.data.source, None, machine, length, problems)


def _complete(
    d: Diagnosis,
    recipe: Recipe,
    costs: Costs,
    disk: Disk,
    build: Callable[[Run], Training],
    seconds: float,
) -> None:
    """Add the costs and the timing to a diagnosis, and the problems that they show."""
    length, parts = d.length, stretches(recipe)
    sides = sorted({stretch.resolution for stretch in parts}, reverse=True)

    def memory_of(accumulate: int, each: int, *of: int) -> Memory:
        return training_memory(costs, of or sides, accumulate, length.processes, each)

    d.memory, d.disk = memory_of(length.accumulate, length.each), disk
    d.problems += _check_memory(d.memory, memory_of, d) + _check_disk(disk, d.machine)
    d.step_gmac = {side: costs.step(side).gmac for side in sides}
    gmac = {side: costs.gmac(side) for side in sides}
    for name, network in costs.training.networks.items():
        each = {side: gmac[side][name] for side in sides}
        d.parts.append(NetworkCost(name, count_parameters(network), each))
    work = sum(stretch.steps * d.step_gmac[stretch.resolution] for stretch in parts)
    device = costs.run.device
    d.problems += checks.check_machine(recipe.run, device, work * length.batch_size)
    # a CPU whose memory does not suffice would kill the process
    if seconds > 0 and (_on_gpu(d) or d.memory.lasting <= d.machine.memory):
        _time(d, costs, memory_of, parts, build, seconds)


def _on_gpu(d: Diagnosis) -> bool:
    return d.machine.device.startswith("cuda")


def _check_memory(memory: Memory, memory_of: MemoryOf, d: Diagnosis) -> list[Problem]:
    free = d.machine.memory
    where = "the GPU's memory" if _on_gpu(d) else "memory"
    if memory.lasting > free:
        advice = "the weights, gradients and averages alone: use smaller networks"
        return checks.check_space(where, memory.lasting, free, advice, "error")
    if memory.total <= free:
        return []
    return checks.check_space(where, memory.total, free, _smaller(memory_of, d), "warning")


def _smaller(memory_of: MemoryOf, d: Diagnosis) -> str:
    """Advice about micro-batches that do not fit into memory."""
    length = d.length
    share, uneven = divmod(length.batch_size, length.processes)
    smaller = [n for n in range(length.accumulate + 1, share + 1) if not (uneven or share % n)]
    # the more of them, the smaller they are
    first = bisect_left(
        smaller, True, key=lambda n: memory_of(n, share // n).total <= d.machine.memory
    )
    if first == len(smaller):
        return "use smaller images or networks"
    return f"accumulate={smaller[first]} makes micro-batches of {share // smaller[first]}"


def _check_disk(disk: Disk, machine: Machine) -> list[Problem]:
    key = "run.keep_states" if disk.states > disk.snapshots else "snapshots"
    advice = f"free some in the place of {RUNS}/, or lower {key}"
    if machine.cache_disk is None:
        return checks.check_space("disk", disk.total, machine.disk, advice, "error")
    other = "give --cache another folder"
    return [
        *checks.check_space("disk", disk.run, machine.disk, advice, "error"),
        *checks.check_space("the cache's disk", disk.cache, machine.cache_disk, other, "error"),
    ]


def _time(
    d: Diagnosis,
    costs: Costs,
    memory_of: MemoryOf,
    parts: Sequence[Stretch],
    build: Callable[[Run], Training],
    seconds: float,
) -> None:
    """Add the timing to a diagnosis, and the problems that it shows."""
    began, length, free = time.monotonic(), d.length, d.machine.memory
    on_gpu = _on_gpu(d)
    fits_whole = on_gpu or memory_of(length.accumulate, length.each).total <= free

    def fits(side: int, images: int) -> bool:
        # a GPU reports by itself that it does not
        return fits_whole or memory_of(1, images, side).total <= free

    try:
        with torch.random.fork_rng(devices=[]):
            training = build(Run(Path(), costs.run.config, make_accelerator(str(costs.run.device))))
            timer = StepTimer(training, costs, fits)
            left = began + seconds - time.monotonic()
            d.trial = time_training(timer, parts, length.accumulate, length.processes, left)
    except (LdmError, torch.OutOfMemoryError) as error:
        text = f"not timed: {str(error).partition(chr(10))[0]}"
        d.problems.append(Problem("warning", text))
        return
    if d.trial.out_of_memory and on_gpu:
        text = f"micro-batches of {length.each} do not fit into this GPU's memory: "
        d.problems.append(Problem("error", text + _smaller(memory_of, d)))
