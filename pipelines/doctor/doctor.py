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

import torch

from ldm.checkpoint import fingerprint
from ldm.config import Resolution, format_size, pixel_count
from ldm.data import Source, holds_out
from ldm.device import resolve_device, resolve_precision
from ldm.distributed import check_batch, make_accelerator
from ldm.errors import LdmError
from ldm.run import Run
from ldm.run_folder import RUNS
from ldm.trackers import check_trackers
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
from pipelines.finetune import read_given
from pipelines.latents import check_cache
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe, fit, latent_shape
from pipelines.train_diffusion import check_range


@dataclass(frozen=True)
class NetworkCost:
    """Size and cost of one network."""

    name: str
    parameters: int
    """Learned values."""
    gmac: dict[int | str, float]
    """By the size of the images, R or "H×W": 10⁹ multiply-accumulates for one, forward."""


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
    """Bytes free in the place of cached latents; None if on the same disk."""
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
    stage: str
    """autoencoder or diffusion."""
    source: str
    """The requested data."""
    autoencoder: str | None
    """Stage two: the autoencoder found or assumed."""
    machine: Machine
    length: Length
    problems: list[Problem]
    parts: list[NetworkCost] = field(default_factory=list)
    step_gmac: dict[int | str, float] = field(default_factory=dict)
    """By the size of the images, R or "H×W": 10⁹ multiply-accumulates of a training step, per
    image, forward and backward, all networks."""
    memory: Memory | None = None
    disk: Disk | None = None
    trial: Timing | None = None

    @property
    def ready(self) -> bool:
        """True if nothing is known that would stop the run."""
        return all(problem.level != "error" for problem in self.problems)


Recipe = AutoencoderRecipe | DiffusionRecipe
Build = Callable[[Run], Training]
DiskOf = Callable[[Training], Disk]
MemoryOf = Callable[[int, int], Memory]  # of (micro-batches, images of each)


def diagnose(
    recipe: Recipe, preset: str, processes: int = 1, seconds: float = SECONDS
) -> Diagnosis:
    """Diagnose a recipe of either stage.

    Args:
        recipe: if stage two lacks its autoencoder, one is assumed; see `check_autoencoder`.
        preset: name of the recipe's preset.
        processes: processes that would train together.
        seconds: time to spend on timing its steps, about; 0: none.

    Raises:
        UsageError: settings that do not fit the autoencoder or each other.
    """
    accelerator, problems = checks.attempt(make_accelerator, recipe.run.device)
    # without the device, the CPU stands for the machine
    device = resolve_device("cpu" if accelerator is None else recipe.run.device)
    machine = _machine(recipe, device)
    if isinstance(recipe, AutoencoderRecipe):
        stage, where = "autoencoder", None
        source, build, disk_of = _stage_one(recipe, problems)
    else:
        stage = "diffusion"
        source, build, disk_of, where = _stage_two(recipe, preset, machine.precision, problems)
    batch_size, accumulate = recipe.batch_size, recipe.accumulate
    problems += checks.attempt(check_batch, batch_size, accumulate, processes)[1]
    problems += checks.attempt(check_trackers, recipe.run.trackers)[1]
    problems += checks.check_compiler(recipe.run, device)
    steps = sum(stretch.steps for stretch in stretches(recipe))
    each = ceil(batch_size / (accumulate * processes))
    count = None if source is None else len(source)
    length = Length(steps, batch_size, processes, accumulate, each, steps * batch_size, count)
    d = Diagnosis(preset, stage, recipe.data.source, where, machine, length, problems)
    if accelerator is not None:
        costs = Costs(build, recipe.run, device, each)
        _complete(d, recipe, costs, disk_of(costs.training), build, seconds)
    return d


# -------------------------------------------------------------------------- the two stages
def _stage_one(
    recipe: AutoencoderRecipe, problems: list[Problem]
) -> tuple[Source | None, Build, DiskOf]:
    # the largest first: its message about missing data then suits every phase
    sizes = sorted({phase.resolution for phase in recipe.phases}, key=pixel_count, reverse=True)
    source, faults = checks.check_data(recipe.data.of(recipe), sizes, validates=True)
    problems += faults + checks.check_perceptual(recipe) + checks.check_inception()
    found, faults = checks.attempt(read_given, recipe)
    problems += faults
    given = found[1].ae.config if found and found[1] else None
    keeps_best = source is None or holds_out(recipe.data)
    disk_of = partial(training_disk, config=recipe.run, keeps_best=keeps_best)
    return source, partial(AutoencoderTraining, recipe, given=given), disk_of


def _stage_two(
    recipe: DiffusionRecipe, preset: str, precision: str, problems: list[Problem]
) -> tuple[Source | None, Build, DiskOf, str]:
    autoencoder, where, missing = checks.check_autoencoder(recipe, preset)
    data = recipe.data.of(autoencoder.config)
    source, faults = checks.check_data(data, [recipe.resolution], validates=False)
    problems += missing + faults + checks.check_inception()
    problems += checks.attempt(check_range, recipe)[1]
    uncached = 0  # images
    if recipe.cache and source is not None:
        sha256 = None if missing else fingerprint(autoencoder.state_dict())
        parts, faults = checks.attempt(check_cache, recipe, source, precision, sha256)
        problems += faults
        uncached = sum(map(len, parts or []))
    classes = 1000 if source is None else len(source.classes)  # as many as ImageNet's
    if source is None and recipe.data.labels:
        text = f"the data's classes are not known: {classes:,} are assumed"
        problems.append(Problem("note", text))
    recipe = fit(recipe, autoencoder, classes)
    # float32 mean and deviation of every image and of its mirror image
    moments = 2 * prod(latent_shape(recipe, autoencoder)) * (1 + recipe.data.flip)
    snapshots, cache = min(recipe.steps, recipe.snapshots), uncached * moments * 4
    disk_of = partial(
        training_disk, config=recipe.run, keeps_best=False, snapshots=snapshots, cache=cache
    )
    return source, partial(DiffusionTraining, recipe, autoencoder.config), disk_of, where


def _machine(recipe: Recipe, device: torch.device) -> Machine:
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        name, memory = f"{os.cpu_count()} cores", psutil.virtual_memory().available
    precision = resolve_precision(recipe.run.precision, device)
    cache = Path(getattr(recipe, "cache", "") or RUNS).expanduser()  # stage one has none
    (disk, free), (other, there) = disk_at(RUNS), disk_at(cache)
    apart = None if other == disk else there
    compiled = recipe.run.compiles(device)
    return Machine(str(device), name, precision, memory, free, apart, compiled)


def disk_at(folder: Path) -> tuple[int, int]:
    """Number and free bytes of the disk where a folder is, or would be made."""
    while not folder.exists():
        folder = folder.absolute().parent
    return folder.stat().st_dev, shutil.disk_usage(folder).free


# ------------------------------------------------------------------------ costs and timing
def _complete(
    d: Diagnosis, recipe: Recipe, costs: Costs, disk: Disk, build: Build, seconds: float
) -> None:
    """Add the costs and the timing, and the problems that they show."""
    length, parts = d.length, stretches(recipe)
    sizes = sorted({part.resolution for part in parts}, key=pixel_count, reverse=True)
    memory_of = partial(training_memory, costs, sizes, length.processes)
    memory = memory_of(length.accumulate, length.each)
    d.memory, d.disk = memory, disk
    d.problems += _check_memory(memory, memory_of, d) + _check_disk(disk, d.machine)
    d.step_gmac = {_key(size): costs.step(size).gmac for size in sizes}
    gmac = {size: costs.gmac(size) for size in sizes}
    for name, network in costs.training.networks.items():
        each = {_key(size): gmac[size][name] for size in sizes}
        d.parts.append(NetworkCost(name, count_parameters(network), each))
    work = (
        sum(part.steps * d.step_gmac[_key(part.resolution)] for part in parts) * length.batch_size
    )
    d.problems += checks.check_machine(recipe.run, costs.run.device, work)
    # a CPU whose memory does not suffice would kill the process
    if seconds > 0 and (_on_gpu(d) or memory.lasting <= d.machine.memory):
        _time(d, costs, memory_of, parts, build, seconds)


def _key(resolution: Resolution) -> int | str:
    """A resolution as a key of JSON."""
    return resolution if isinstance(resolution, int) else format_size(resolution)


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
    build: Build,
    seconds: float,
) -> None:
    """Add the timing, and the problems that it shows."""
    deadline = time.monotonic() + seconds
    length, free = d.length, d.machine.memory
    on_gpu = _on_gpu(d)  # which reports by itself that it is full
    fits_whole = on_gpu or memory_of(length.accumulate, length.each).total <= free

    def fits(size: Resolution, images: int) -> bool:
        if fits_whole:
            return True
        return training_memory(costs, [size], length.processes, 1, images).total <= free

    try:
        with torch.random.fork_rng(devices=[]):
            training = build(Run(Path(), costs.run.config, costs.run.accelerator))
            timer = StepTimer(training, costs, fits)
            d.trial = time_training(timer, parts, length.accumulate, length.processes, deadline)
    except (LdmError, torch.OutOfMemoryError) as error:
        text = f"not timed: {str(error).partition(chr(10))[0]}"
        d.problems.append(Problem("warning", text))
        return
    if d.trial.out_of_memory and on_gpu:
        text = f"micro-batches of {length.each} do not fit into this GPU's memory: "
        d.problems.append(Problem("error", text + _smaller(memory_of, d)))
