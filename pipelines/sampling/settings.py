"""Sampling settings: their validation, their short name, the noise levels and the classes."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf, sqrt
from operator import index
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PlainSerializer, field_validator, model_validator
from torch import Tensor

from diffusion.schedules import SCHEDULES
from ldm.config import (
    Config,
    Resolution,
    format_size,
    height_width,
    size_word,
    to_tree,
    validate,
)
from ldm.errors import MOST, UsageError, check_at_least
from ldm.logbook import console
from ldm.seeds import generator

UpToInfinity = Annotated[  # JSON has no infinity: it is written as "inf"
    float, Field(ge=0), PlainSerializer(lambda x: "inf" if x == inf else x, when_used="json")
]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Churn(Config):
    """Fresh noise during sampling (Karras et al. 2022, Algorithm 2)."""

    S_churn: UpToInfinity = 0.0
    """Amount of noise over all steps; 0: none; inf: as much as the sampler allows."""
    S_min: NotNegative = 0.0
    """Lowest noise level σ at which noise is added."""
    S_max: UpToInfinity = inf
    """Highest noise level σ at which noise is added."""
    S_noise: Positive = 1.0
    """Standard deviation of the fresh noise; slightly above 1 restores detail."""


class Sampling(Config):
    """Everything but the model and the seed that decides a sample."""

    steps: Annotated[int, Field(gt=0, le=100_000)] = 18
    """Sampler steps; each Heun step but the last calls the network twice."""
    sampler: Literal["heun", "euler", "dpmpp-2m"] = "heun"
    """Sampler; dpmpp-2m does not support churn."""
    schedule: Literal["karras", "cosine", "linear", "flow"] | None = None
    """Spacing of the noise levels σ; null: flow for models of type flow, karras for others."""
    sigma_min: Positive | None = None
    """Lowest noise level above 0; null: the model's own."""
    sigma_max: Positive | None = None
    """Highest noise level; null: the model's own."""
    shift: Positive | None = None
    """Shift of the schedule flow, above 1 towards high noise levels; null: the model's own."""
    churn: Churn = Churn()
    """Fresh noise during sampling; a plain number is its S_churn."""
    guidance: NotNegative | None = None
    """Guidance scale, 1 changes nothing; null: no guidance."""
    interval: tuple[UpToInfinity, UpToInfinity] = (0.0, inf)
    """Noise levels low < σ ≤ high at which guidance acts."""
    guided_channels: Annotated[int, Field(gt=0)] | None = None
    """Number of channels that guidance acts on, the first ones; null: all. DiT's code guides 3."""

    @field_validator("churn", mode="before")
    @classmethod
    def _from_number(cls, churn: Any) -> Any:
        if churn is None:
            return Churn()
        return {"S_churn": churn} if isinstance(churn, int | float) else churn

    @model_validator(mode="after")
    def _fits_together(self) -> "Sampling":
        churn, (low, high) = self.churn, self.interval
        if self.sampler == "dpmpp-2m" and churn.S_churn > 0:
            raise ValueError(
                "dpmpp-2m does not support churn: use sampler=heun or euler, or omit churn"
            )
        if not low < high:
            raise ValueError(f"interval ({low:g}, {high:g}): the second number must be larger")
        # a setting without effect is a mistake
        acts_on = {"interval": (low, high) != (0, inf), "guided_channels": self.guided_channels}
        for name, is_set in acts_on.items():
            if is_set and self.guidance is None:
                raise ValueError(f"{name} has no effect without guidance: set guidance as well")
        if churn.S_min > churn.S_max:
            raise ValueError(f"churn: S_min={churn.S_min:g} must not exceed S_max={churn.S_max:g}")
        if churn.S_churn == 0 and churn != Churn():
            raise ValueError("S_min, S_max and S_noise have no effect without S_churn: set it too")
        return self


class Options(Sampling):
    """The keyword options shared by the methods of `LatentDiffusionPipeline`."""

    labels: Any = None
    guide: Any = None
    size: Resolution | None = None
    batch_size: Any = 64
    callback: Callable[[int], None] | None = None
    progress: bool = False
    output: Literal["tensor", "pil"] = "tensor"

    @field_validator("batch_size")
    @classmethod
    def _count(cls, given: Any) -> int:
        return integer("batch_size=", given, least=1)


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Return `value`, of any integer type, as an int; an error begins with `name`, as in `n=`."""
    try:
        number = index(value)
    except TypeError as error:
        raise UsageError(f"{name}{value!r}: it must be a whole number") from error
    if least is not None and number < least:
        raise UsageError(f"{name}{value}: it must be at least {least}")
    if least is not None and number > (most := MOST["batch_size" if "batch" in name else "n"]):
        raise UsageError(f"{name}{value}: it must be at most {most:,}")
    return number


def find_shape(size: Resolution, codec: Any, denoiser: Any) -> tuple[int, int, int]:
    """Shape (n_z, h, w) of the latents of an image of a size, if the networks can sample it.

    They take every size that they can halve or cut into patches, the UNets without positions, a
    DiT with those of its training scaled to it; of others a UsageError.
    """
    check_at_least(1, size=size)
    f, factor = codec.autoencoder.downsampling, denoiser.network.factor
    if any(side % (f * factor) for side in height_width(size)):
        raise UsageError(
            f"--size {size_word(size)}: both sides must be multiples of {f * factor}: the "
            f"autoencoder divides by {f}, the network by {factor}"
        )
    return codec.autoencoder.config.latent_shape(size)


def find_size(model: Any, guide: Any, size: Resolution | None) -> Resolution:
    """Return the requested size, or that of a model's training; a note tells if they differ."""
    trained_at: Resolution = model.recipe.resolution
    size = validate(Options, {"size": size}).size
    if size is None or size == trained_at:
        return trained_at
    for each in filter(None, (model, guide)):
        each.shape_of(size)  # refuses a size that its network cannot take
    sizes = f"{format_size(size)} (height×width), not at {format_size(trained_at)}"
    note = f"note: sampling at {sizes} as in training: images may repeat or lack parts"
    if os.environ.get("RANK", "0") == "0":
        console.print(note, markup=False)
    return size


def noise_levels(sampling: Sampling, denoiser: Any) -> Tensor:
    """Return the schedule (steps + 1,) in float64, within the denoiser's range of σ."""
    schedule = sampling.schedule or denoiser.schedule
    if sampling.shift is not None and schedule != "flow":
        raise UsageError(f"shift has no effect with schedule {schedule}: use flow, or omit shift")
    given = {name: getattr(sampling, name) for name in ("sigma_min", "sigma_max", "shift")}
    given = {name: value for name, value in given.items() if value is not None}
    low, high = denoiser.sigma_min, denoiser.sigma_max
    for name, sigma in given.items():
        if name != "shift" and not low <= sigma <= high:
            raise UsageError(f"{name}={sigma:g}: this model denoises σ from {low:g} to {high:g}")
    options = denoiser.schedule_options(schedule) | given
    sigmas = SCHEDULES[schedule](sampling.steps, **options)
    if (last := float(sigmas[-2])) < low:  # of flow, which ends at a step before 0
        raise UsageError(
            f"{sampling.steps} steps end at σ={last:.2g}, and this model denoises σ from {low:g}: "
            "lower steps, or raise the shift"
        )
    return sigmas


def fill_in(sampling: Sampling, denoiser: Any) -> Sampling:
    """Return settings with the schedule that a model takes, once they are seen to fit it."""
    noise_levels(sampling, denoiser)
    return sampling.model_copy(update={"schedule": sampling.schedule or denoiser.schedule})


def check_channels(sampling: Sampling, channels: int) -> None:
    """Refuse to guide more channels than the latents have."""
    if sampling.guided_channels is not None and sampling.guided_channels > channels:
        raise UsageError(
            f"guided_channels={sampling.guided_channels}: the latents have {channels} channels"
        )


def guided_levels(sampling: Sampling, denoiser: Any) -> tuple[float, float] | None:
    """Return the lowest and highest σ at which guidance acts on a denoiser, if it ever does."""
    (low, high), levels = sampling.interval, noise_levels(sampling, denoiser)[:-1]
    churn = sampling.churn
    if churn.S_churn > 0:
        churned = levels[(churn.S_min <= levels) & (levels <= churn.S_max)]
        # Karras et al. 2022, Algorithm 2: 1 + γ_i ≤ √2, up to the denoiser's highest σ
        levels = torch.cat([levels, (churned * sqrt(2)).clamp(max=denoiser.sigma_max)])
    levels = levels[(low < levels) & (levels <= high)]
    return (levels.min().item(), levels.max().item()) if len(levels) else None


def settings_slug(sampling: Sampling, schedule: str = "karras") -> str:
    """Name the non-default settings as part of a file name: `steps18-euler-guidance2`.

    Args:
        schedule: the model's own.
    """
    defaults, words = to_tree(Sampling()), [f"steps{sampling.steps}"]
    for key, value in to_tree(sampling).items():
        if key == "steps" or value == defaults[key] or (key, value) == ("schedule", schedule):
            continue
        if isinstance(value, dict):  # churn
            numbers = {name: float(x) for name, x in value.items()}
            words += [f"{name}{x:g}" for name, x in numbers.items() if x != defaults[key][name]]
        elif isinstance(value, list):
            words.append(key + "to".join(f"{float(x):g}" for x in value))
        else:
            words.append(value if isinstance(value, str) else f"{key}{value:g}")
    return "-".join(words)


BALANCED = "balanced"
"""In place of classes: each equally often, in turn; unless a class has this name."""
Label = int | str
"""A class: its number from 0 (of any integer type, or in digits: "3"), −1 for none, or its name."""


@dataclass(frozen=True)
class Classes:
    """The classes of a conditional model: their count, and their names if they have any."""

    count: int = 0
    names: tuple[str, ...] = ()

    def number(self, label: Label) -> int:
        """Return the number of a class."""
        if not self.count:
            raise UsageError(f"label {label!r}: this model has no classes; omit labels")
        given: Any = _plain(label)
        if isinstance(given, str):
            for name in (given, given.strip()):
                if name in self.names:
                    return self.names.index(name)
            if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", given):
                given = int(given)
        with suppress(TypeError):
            if not isinstance(given, bool) and -1 <= index(given) < self.count:
                return index(given)
        names = f" ({', '.join(self.names[:12])}{' …' if self.count > 12 else ''})"
        raise UsageError(
            f"label {given!r}: classes are 0 to {self.count - 1}{names if self.names else ''}, "
            "or -1 for none"
        )

    def is_balanced(self, labels: Label | Iterable[Label] | None) -> bool:
        """Tell whether the labels are the word `BALANCED`, for all classes in turn."""
        words: Any = _plain(labels)
        words = [words] if isinstance(words, str) else words
        is_word = words in ([BALANCED], (BALANCED,))
        return is_word and self.count > 0 and BALANCED not in self.names

    def read(self, labels: Label | Iterable[Label]) -> tuple[int, ...]:
        """Return the numbers of one class or several."""
        if self.is_balanced(labels):
            return tuple(range(self.count))
        several: Any = [labels] if _is_one(labels) else labels
        numbers = tuple(map(self.number, several))
        if not numbers:
            raise UsageError("labels are empty: give at least one, or omit them")
        return numbers

    def describe(self, labels: Label | Iterable[Label] | None) -> str | list[int] | None:
        """Return labels as a manifest has them: `BALANCED`, numbers, or None if they are drawn."""
        if labels is None or self.is_balanced(labels):
            return None if labels is None else BALANCED
        return list(self.read(labels))

    def choose(
        self, labels: Label | Iterable[Label] | None, n: int, seed: int
    ) -> tuple[int, ...] | None:
        """Return the class of each image 0 … n−1 of a seed, if the model has classes.

        `labels` is one for all images, one for each, `BALANCED`, or None to draw them uniformly.
        """
        if labels is None:
            return tuple(self.draw(seed, i) for i in range(n)) if self.count else None
        chosen = self.read(labels)
        if self.is_balanced(labels):
            return tuple(chosen[i % self.count] for i in range(n))
        if _is_one(labels):
            return chosen * n
        if len(chosen) != n:
            raise UsageError(f"{len(chosen)} labels for {n} images: give one, or one per image")
        return chosen

    def draw(self, seed: int, i: int) -> int:
        """Draw the class of image i, as a function of (seed, i) alone; −1 without classes."""
        return int(generator(seed, "class", i).integers(self.count)) if self.count else -1

    def check_guidance(self, label_dropout: float, labels: Sequence[int] | None) -> None:
        """Raise a UsageError if the model or the labels allow no classifier-free guidance."""
        problem, advice = None, "a guide, or omit guidance"
        if not self.count:
            problem = "a model without classes cannot guide itself"
        elif label_dropout == 0:
            problem = "this model was trained with label_dropout=0 and has no unconditional branch"
        elif labels is not None and -1 in labels:
            problem = "label -1 is the unconditional model, which guidance leads away from"
            advice = f"another label or {advice}"
        if problem is not None:
            raise UsageError(f"{problem}: give {advice}")


def labels_slug(named: str | Sequence[int] | None) -> list[str]:
    """Name labels, as `Classes.describe` returns them, as words of a file name."""
    if named is None or isinstance(named, str):
        return [] if named is None else [named]
    shown = [str(label) for label in named[:8]]
    return ["class" + "_".join(shown + ["and_more"] * (len(named) > 8))]


def _is_one(labels: Any) -> bool:
    plain = _plain(labels)
    return isinstance(plain, str) or not isinstance(plain, Iterable)


def _plain(labels: Any) -> Any:
    """Labels of a tensor or an array as Python numbers."""
    return labels.tolist() if hasattr(labels, "tolist") else labels
