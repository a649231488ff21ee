"""What is said of a recipe: its sizes, its costs, what is missing, how fast it is.

`pipelines.doctor.doctor` finds it out, `ldm doctor` prints it.

What a recipe needs, and what is missing, before days of training are begun.

Parameters, memory and disk are worked out on paper; speed is tried (`trial`). Nothing is written
and nothing is fetched. Where the device is not there, what depends on it is left out.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Literal

import torch

from autoencoders import Autoencoder
from ldm.data import Source, holds_out
from ldm.data.dataset import DataConfig
from ldm.device import resolve_device, resolve_precision
from ldm.errors import LdmError
from ldm.run_folder import RUNS
from pipelines.doctor import checks
from pipelines.doctor.checks import Problem
from pipelines.doctor.costs import PaperAutoencoder, PaperDiffusion, count_parameters
from pipelines.doctor.memory import (
    Disk,
    Memory,
    autoencoder_disk,
    autoencoder_memory,
    diffusion_disk,
    diffusion_memory,
    free_disk,
    same_disk,
)
from pipelines.doctor.timing import (
    SECONDS,
    AutoencoderRehearsal,
    DiffusionRehearsal,
    Load,
    Rehearsal,
    SyntheticImages,
    Trial,
    make_run,
    stretches,
    try_out,
)
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe, Phase, fit


@dataclass(frozen=True)
class Part:
    """One network."""

    name: str
    parameters: int
    """Learned values."""
    gmac: dict[int, float]
    """By the side of the images, in pixels: 10⁹ multiply-accumulates for one, forward."""


@dataclass(frozen=True)
class Machine:
    """Where it would run."""

    device: str
    name: str
    precision: str
    memory: int
    """Bytes free: the GPU's, or this computer's."""
    disk: int
    """Bytes free where runs are kept."""
    cache_disk: int | None = None
    """Bytes free where the cache of latents is, or would be; None where that is the same disk."""
    compiles: bool = False
    """Whether the run compiles its networks, which a trial does not."""


@dataclass(frozen=True)
class Length:
    """How long a run is, and what a step of it is."""

    steps: int
    batch_size: int
    """Images in a step: processes × accumulate × each, or nothing that can be trained."""
    processes: int
    accumulate: int
    """Micro-batches in a step."""
    each: int
    """Images in a micro-batch on one process."""
    images: int
    """Seen over the whole run."""
    data: int | None
    """Images there are to train on; None where they cannot be opened."""


@dataclass(frozen=True)
class Diagnosis:
    """What a recipe needs, what is missing, and how fast it is here.

    Costs depend on the device: from `parts` on all is empty where the one asked for is not there.
    """

    preset: str
    stage: Literal["autoencoder", "diffusion"]
    source: str
    """The data asked for."""
    autoencoder: str | None
    """Stage two's: where stage one was found, or what was assumed."""
    machine: Machine
    length: Length
    problems: tuple[Problem, ...]
    parts: tuple[Part, ...] = ()
    step_gmac: dict[int, float] = field(default_factory=dict)
    """By the side of the images: 10⁹ multiply-accumulates of a training step, per image, forward
    and backward, all networks."""
    memory: Memory | None = None
    disk: Disk | None = None
    trial: Trial | None = None

    @property
    def ready(self) -> bool:
        """Whether nothing is known that would stop the run."""
        return all(problem.level != "error" for problem in self.problems)


Recipe = AutoencoderRecipe | DiffusionRecipe
Need = Callable[..., Memory]  # of (micro-batches, images in each, their side or the largest)

UNKNOWN_CLASSES = 1000
"""Classes assumed of labelled images that are not there: ImageNet's."""


def diagnose_autoencoder(
    recipe: AutoencoderRecipe,
    preset: str = "autoencoder",
    processes: int = 1,
    seconds: float = SECONDS,
) -> Diagnosis:
    """What a recipe of stage one needs.

    Args:
        processes: how many would train together.
        seconds: for how long to try its steps, about; 0: not at all.
    """
    device, problems = _find_device(recipe)
    machine, found = _machine(recipe, device), not problems
    # the largest first: what suits it suits the others
    sides = sorted({phase.resolution for phase in recipe.phases}, reverse=True)
    source, faults = checks.check_data(recipe.data, sides, validates=True)
    problems += faults + checks.check_perceptual(recipe) + checks.check_inception()
    length, faults = _length(recipe, recipe.total_steps, processes, source)
    problems += faults + checks.check_compiler(recipe.run)
    known = (preset, "autoencoder", recipe.data.source, None, machine, length)
    if not found:
        return Diagnosis(*known, tuple(problems))

    paper = PaperAutoencoder(recipe, device, machine.precision, length.each)
    networks = {"encoder": paper.autoencoder.encoder, "decoder": paper.autoencoder.decoder}
    if recipe.adversarial.weight:
        networks["discriminator"] = paper.discriminator

    def need(accumulate: int, each: int, side: int | None = None) -> Memory:
        phases = recipe.phases if side is None else (Phase(resolution=side, steps=1),)
        changed = {"accumulate": accumulate, "phases": phases}
        return autoencoder_memory(recipe.model_copy(update=changed), paper, processes, each)

    memory = need(length.accumulate, length.each)
    disk = autoencoder_disk(recipe, paper, _validates(recipe.data))
    problems += _check_memory(need, machine, length) + _check_disk(disk, machine)
    step_gmac = {side: paper.cost(side).gmac for side in sides}
    gmac = sum(phase.steps * step_gmac[phase.resolution] for phase in recipe.phases)
    problems += checks.check_machine(recipe.run, device, gmac * recipe.batch_size)
    trial, faults = _try(
        lambda: AutoencoderRehearsal(recipe, make_run(recipe, device), paper),
        stretches(recipe), length, need, machine, seconds,
    )  # fmt: skip
    parts = _parts(networks, {side: paper.gmac(side) for side in sides})
    return Diagnosis(*known, tuple(problems + faults), parts, step_gmac, memory, disk, trial)


def diagnose_diffusion(
    recipe: DiffusionRecipe,
    preset: str = "diffusion",
    processes: int = 1,
    seconds: float = SECONDS,
) -> Diagnosis:
    """What a recipe of stage two needs.

    Args:
        recipe: its autoencoder as a path, a preset of stage one (its newest run), or left out (the
            newest run of all). Where there is none, the preset's is assumed.
        processes, seconds: as of `diagnose_autoencoder`.

    Raises:
        UsageError: settings that do not fit the autoencoder or each other.
    """
    device, problems = _find_device(recipe)
    machine, found = _machine(recipe, device), not problems
    trained, config, where, faults = checks.check_autoencoder(recipe, preset)
    problems += faults
    source, faults = checks.check_data(recipe.data, [recipe.resolution], validates=False)
    problems += faults + checks.check_inception()
    images, faults = checks.find_latents(recipe, trained, source, machine.precision)
    problems += faults
    length, faults = _length(recipe, recipe.steps, processes, source)
    problems += faults + checks.check_compiler(recipe.run)
    known = (preset, "diffusion", recipe.data.source, where, machine, length)

    with torch.device("meta"):
        shapes = Autoencoder(config)
    if source is None:
        source = SyntheticImages(recipe.resolution, UNKNOWN_CLASSES)
        if recipe.data.labels:
            text = f"the data's classes are not known: {UNKNOWN_CLASSES:,} are assumed"
            problems.append(Problem("note", text))
    recipe = fit(recipe, shapes, source)
    if not found:
        return Diagnosis(*known, tuple(problems))

    paper = PaperDiffusion(recipe, config, device, machine.precision, length.each)
    side = recipe.resolution
    networks = {"network": paper.network, "encoder": paper.autoencoder.encoder}

    def need(accumulate: int, each: int, side: int | None = None) -> Memory:
        changed = {"accumulate": accumulate, "resolution": side or recipe.resolution}
        return diffusion_memory(recipe.model_copy(update=changed), paper, processes, each)

    memory = need(length.accumulate, length.each)
    disk = diffusion_disk(recipe, paper, images)
    problems += _check_memory(need, machine, length) + _check_disk(disk, machine)
    step_gmac = paper.cost(side).gmac
    problems += checks.check_machine(recipe.run, device, step_gmac * length.images)

    def rehearsal() -> Rehearsal:
        run = make_run(recipe, device)
        return DiffusionRehearsal(recipe, trained or Autoencoder(config), run, paper)

    loads = (Load(side, recipe.steps),)
    trial, faults = _try(rehearsal, loads, length, need, machine, seconds)
    parts = _parts(networks, {side: paper.gmac(side)})
    problems += faults
    return Diagnosis(*known, tuple(problems), parts, {side: step_gmac}, memory, disk, trial)


# ------------------------------------------------------------------------------------ parts
def _find_device(recipe: Recipe) -> tuple[torch.device, list[Problem]]:
    """The recipe's device, or the CPU where that is not there."""
    try:
        device = resolve_device(recipe.run.device)
    except LdmError as error:
        return torch.device("cpu"), [Problem("error", str(error))]
    return device, []


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


def _length(
    recipe: Recipe, steps: int, processes: int, source: Source | None
) -> tuple[Length, list[Problem]]:
    micro_batches, problems = recipe.accumulate * processes, []
    if recipe.batch_size % micro_batches:
        text = (
            f"batch_size={recipe.batch_size} does not divide into {recipe.accumulate} "
            f"micro-batch(es) on {processes} process(es): make it a multiple of {micro_batches}"
        )
        problems.append(Problem("error", text))
    length = Length(
        steps, recipe.batch_size, processes, recipe.accumulate,
        ceil(recipe.batch_size / micro_batches), steps * recipe.batch_size,
        None if source is None else len(source),
    )  # fmt: skip
    return length, problems


def _validates(data: DataConfig) -> bool:
    """Whether images are held out; unknown ones are."""
    try:
        return holds_out(data)
    except LdmError:
        return True


def _parts(
    networks: dict[str, torch.nn.Module], gmac: dict[int, dict[str, float]]
) -> tuple[Part, ...]:
    return tuple(
        Part(name, count_parameters(net), {side: of[name] for side, of in gmac.items()})
        for name, net in networks.items()
    )


def _check_memory(need: Need, machine: Machine, length: Length) -> list[Problem]:
    where = "the GPU's memory" if machine.device.startswith("cuda") else "memory"
    memory = need(length.accumulate, length.each)
    if memory.lasting > machine.memory:
        return checks.check_room(
            where, memory.lasting, machine.memory,
            "the weights, gradients and averages alone: take smaller networks", "error",
        )  # fmt: skip
    if memory.total <= machine.memory:
        return []
    less = _smaller(need, machine, length)
    return checks.check_room(where, memory.total, machine.memory, less, "warning")


def _smaller(need: Need, machine: Machine, length: Length) -> str:
    """What to do about micro-batches that there is no room for."""
    share, uneven = divmod(length.batch_size, length.processes)
    smaller = [n for n in range(length.accumulate + 1, share + 1) if not (uneven or share % n)]
    # the more of them, the smaller they are
    first = bisect_left(smaller, True, key=lambda n: need(n, share // n).total <= machine.memory)
    if first == len(smaller):
        return "take smaller images or networks"
    return f"accumulate={smaller[first]} makes micro-batches of {share // smaller[first]}"


def _check_disk(disk: Disk, machine: Machine) -> list[Problem]:
    key = "run.keep_states" if disk.states > disk.snapshots else "snapshots"
    less = f"make room where {RUNS}/ is, or lower {key}"
    if machine.cache_disk is None:
        return checks.check_room("disk", disk.total, machine.disk, less, "error")
    other = "give --cache another folder"
    return [
        *checks.check_room("disk", disk.run, machine.disk, less, "error"),
        *checks.check_room("the cache's disk", disk.cache, machine.cache_disk, other, "error"),
    ]


# ------------------------------------------------------------------------------------ trial
def _try(
    build: Callable[[], Rehearsal],
    loads: tuple[Load, ...],
    length: Length,
    need: Need,
    machine: Machine,
    seconds: float,
) -> tuple[Trial | None, list[Problem]]:
    """A trial, if there is time and room for one, and what it brought to light."""
    if seconds <= 0:
        return None, []
    # a GPU says so itself where there is no room; a CPU takes what others need, and is killed
    on_gpu, whole = machine.device.startswith("cuda"), need(length.accumulate, length.each)
    if not on_gpu and whole.lasting > machine.memory:
        return None, []  # which is told already

    def fits(side: int, images: int) -> bool:
        if on_gpu or whole.total <= machine.memory:
            return True
        return need(1, images, side).total <= machine.memory

    began = time.monotonic()
    try:
        rehearsal = build()
        left = seconds - (time.monotonic() - began)
        trial = try_out(
            rehearsal, loads, length.each, length.accumulate, length.processes, fits, left
        )
    except (LdmError, torch.OutOfMemoryError) as error:
        return None, [Problem("warning", f"no trial: {str(error).partition(chr(10))[0]}")]
    if trial.out_of_memory and on_gpu:
        less = _smaller(need, machine, length)
        text = f"micro-batches of {length.each} do not fit into this GPU's memory: {less}"
        return trial, [Problem("error", text)]
    return trial, []
