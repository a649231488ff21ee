"""What is said of a recipe: its sizes, its costs, what is missing, how fast it is.

`pipelines.doctor.doctor` finds it out, `ldm doctor` prints it.
"""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.doctor.checks import Problem
from pipelines.doctor.room import Disk, Memory
from pipelines.doctor.trial import Trial


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
