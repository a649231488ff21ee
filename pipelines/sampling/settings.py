"""How images are sampled: the options people give, and what they make of a denoiser.

The classes a model was conditioned on, and which of them each image is to be of.

Masks for inpainting: what lies under them is filled in, and their shadow on the latents.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf, sqrt
from operator import index
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)
from torch import Tensor
from torch.nn import functional as F

from diffusion.samplers import SAMPLERS, Denoise, make_churn
from diffusion.schedules import SCHEDULES
from ldm.config import Config, did_you_mean, to_tree, validate
from ldm.errors import UsageError
from ldm.seeds import generator

UpToInfinity = Annotated[  # JSON has no number for ∞; pydantic reads the word back
    float, Field(ge=0), PlainSerializer(lambda x: "inf" if x == inf else x, when_used="json")
]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Churn(Config):
    """Fresh noise during sampling (Karras et al. 2022, Algorithm 2)."""

    S_churn: UpToInfinity = 0.0
    """How much noise, over all steps; 0: none; inf: as much as the sampler takes."""
    S_min: NotNegative = 0.0
    """Lowest noise level σ at which it is added."""
    S_max: UpToInfinity = inf
    """Highest noise level σ at which it is added."""
    S_noise: Positive = 1.0
    """Standard deviation of the fresh noise, a little above 1 against lost detail."""


class Sampling(Config):
    """What, besides the model and the seed, decides a sample."""

    steps: Annotated[int, Field(gt=0, le=100_000)] = 18
    """Steps of the sampler; each of Heun's but the last calls the network twice."""
    sampler: Literal["heun", "euler", "dpmpp-2m"] = "heun"
    """How a step is taken; dpmpp-2m knows no churn."""
    schedule: Literal["karras", "cosine", "linear"] = "karras"
    """How the noise levels σ are spaced."""
    sigma_min: Positive | None = None
    """Lowest noise level above 0; null: the lowest the model denoises."""
    sigma_max: Positive | None = None
    """Highest noise level; null: the highest the model denoises."""
    churn: Churn = Churn()
    """Fresh noise during sampling; a number is its S_churn."""
    guidance: NotNegative | None = None
    """Scale of guidance, 1 changes nothing; null: none."""
    interval: tuple[UpToInfinity, UpToInfinity] = (0.0, inf)
    """Noise levels low < σ ≤ high at which guidance acts."""

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
            raise ValueError("dpmpp-2m knows no churn: take sampler heun or euler, or leave it out")
        if not low < high:
            raise ValueError(f"the interval begins at {low:g} and must end above it")
        # what would change nothing is a mistake
        if (low, high) != (0, inf) and self.guidance is None:
            raise ValueError("the interval is where guidance acts: give guidance, its scale, too")
        if churn.S_min > churn.S_max:
            raise ValueError(f"churn begins at S_min={churn.S_min:g} and must end at or above it")
        if churn.S_churn == 0 and churn != Churn():
            raise ValueError("S_min, S_max and S_noise are of churn: give S_churn, how much, too")
        return self


@dataclass(frozen=True)
class Options:
    """The keywords of `LatentDiffusionPipeline`'s methods, read once for all of them."""

    sampling: Sampling = field(default_factory=Sampling)
    labels: Any = None
    weaker: Any = None
    batch_size: int = 64
    callback: Callable[[int], None] | None = None
    progress: bool = False
    output: Literal["tensor", "pil"] = "tensor"

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Options":
        """The options of a call: those of this class, and the fields of `Sampling`.

        Raises:
            UsageError: one of them is unknown, with the nearest that is known, or has no meaning.
        """
        own = {part.name for part in fields(cls)} - {"sampling"}
        known = own | Sampling.model_fields.keys()
        for name in given:
            if name not in known:
                raise UsageError(f"unknown option '{name}'{did_you_mean(name, sorted(known))}")
        mine = {name: value for name, value in given.items() if name in own}
        rest = {name: value for name, value in given.items() if name not in own}
        options = cls(validate(Sampling, rest), **mine)
        options = replace(options, batch_size=count("batch_size=", options.batch_size))
        if options.output not in ("tensor", "pil"):
            raise UsageError(f"output={options.output!r}: it must be 'tensor' or 'pil'")
        return options


def count(name: str, value: Any) -> int:
    """A whole number, at least 1, of any of the kinds that count (Python's, NumPy's, torch's).

    Args:
        name: what to call it in an error, such as `n=` or `--n `.

    Raises:
        UsageError: it is none.
    """
    if whole(name, value) < 1:
        raise UsageError(f"{name}{value}: it must be at least 1")
    return index(value)


def whole(name: str, value: Any) -> int:
    """A whole number of any of the kinds that count; a UsageError where it is none."""
    try:
        return index(value)
    except TypeError as error:
        raise UsageError(f"{name}{value!r}: it must be a whole number") from error


def noise_levels(sampling: Sampling, denoiser: Any) -> Tensor:
    """The schedule (steps + 1,) in float64 on the CPU, within what a denoiser can denoise.

    Raises:
        UsageError: sigma_min or sigma_max lies outside that, or they leave no way between them.
    """
    low, high = denoiser.sigma_min, denoiser.sigma_max
    ends = {"sigma_min": sampling.sigma_min or low, "sigma_max": sampling.sigma_max or high}
    for name, sigma in ends.items():
        if not low <= sigma <= high:
            raise UsageError(f"{name}={sigma:g}: this model denoises σ from {low:g} to {high:g}")
    return SCHEDULES[sampling.schedule](sampling.steps, **ends)


def asked_levels(sampling: Sampling, denoiser: Any) -> tuple[float, float] | None:
    """The lowest and the highest σ at which guidance may act; None where it never does.

    The denoiser decides the schedule. Raises a UsageError as `noise_levels` does.
    """
    (low, high), levels = sampling.interval, noise_levels(sampling, denoiser)[:-1]
    churn = sampling.churn
    if churn.S_churn > 0:
        churned = levels[(churn.S_min <= levels) & (levels <= churn.S_max)]
        # Algorithm 2: 1 + γ_i is at most √2; noise is raised no further than the denoiser knows
        levels = torch.cat([levels, (churned * sqrt(2)).clamp(max=denoiser.sigma_max)])
    levels = levels[(low < levels) & (levels <= high)]
    return (levels.min().item(), levels.max().item()) if len(levels) else None


def solve(
    sampling: Sampling,
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    draw: Callable[[int], Tensor],
    skip: int = 0,
    start: Tensor | None = None,
    sigma_max: float = inf,
) -> Tensor:
    """From noise (B, C, H, W) to z of the same shape, by the sampler that is asked for.

    Args:
        sigmas: the whole schedule.
        draw: step → fresh noise of the same shape, for churn.
        skip: steps at the beginning that are left out.
        start: the latents at sigmas[skip], in place of noise · sigmas[skip].
        sigma_max: the highest noise level that the denoiser knows, above which nothing is churned.
    """
    how: dict[str, Any] = {"start": start}
    if sampling.churn.S_churn > 0:
        how["churn"] = make_churn(sigmas, draw, **sampling.churn.model_dump(), sigma_max=sigma_max)
    return SAMPLERS[sampling.sampler](denoise, noise, sigmas[skip:], **how)


def told_apart(sampling: Sampling) -> str:
    """What differs from the defaults, as a part of a folder's name: `steps18-euler-guidance2`."""
    usual, words = to_tree(Sampling()), [f"steps{sampling.steps}"]
    for key, value in to_tree(sampling).items():
        if key == "steps" or value == usual[key]:
            continue
        if isinstance(value, dict):  # churn
            words += [f"{name}{x:g}" for name, x in _numbers(value) if x != usual[key][name]]
        elif isinstance(value, list):
            words.append(key + "to".join(f"{float(x):g}" for x in value))
        else:
            words.append(value if isinstance(value, str) else f"{key}{value:g}")
    return "-".join(words)


def _numbers(tree: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in tree.items()]


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Noises on the great circle from a to b, (1, C, H, W) each, at shares t (n,) of the way.

    Noise lies near a sphere; on the straight way between two it would lose its variance.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.double().clamp(-1, 1).acos()
    if angle < 1e-6:  # the same noise
        return a.expand(len(t), -1, -1, -1)
    t = t.double().view(-1, 1, 1, 1)
    # Shoemake 1985, Section 3.3
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b).div(angle.sin()).float()


Label = int | str
"""A class by its number from 0, −1 for none, or by its name. A number may be of any kind of whole
number, NumPy's and torch's included, or written in words: "3"."""


@dataclass(frozen=True)
class Classes:
    """How many there are, and what they are called; no names: they have numbers alone."""

    count: int = 0
    names: tuple[str, ...] = ()

    def number(self, label: Label) -> int:
        """The number of a class.

        Raises:
            UsageError: there is no such class, or the model has none at all.
        """
        if not self.count:
            raise UsageError(f"label {label!r}: this model has no classes, leave labels out")
        for name in (label, label.strip()) if isinstance(label, str) else ():
            if name in self.names:
                return self.names.index(name)
        number = _as_number(label)
        if number is not None and -1 <= number < self.count:
            return number
        asked = label if number is None else number
        called = f" ({', '.join(self.names[:12])}{' …' if self.count > 12 else ''})"
        raise UsageError(
            f"label {asked!r}: classes are 0 to {self.count - 1}{called if self.names else ''}, "
            "or -1 for none"
        )

    def read(self, labels: Label | Iterable[Label]) -> tuple[int, ...]:
        """The numbers of one class, or of several.

        Raises:
            UsageError: there is no such class, or not one label.
        """
        several = _as_list(labels)
        if several == []:
            raise UsageError("labels are empty: give at least one, or leave them out")
        return tuple(map(self.number, [labels] if several is None else several))

    def choose(
        self, labels: Label | Sequence[Label] | None, n: int, seed: int
    ) -> tuple[int, ...] | None:
        """The classes of images 0 … n−1 of a seed; None for a model without classes.

        Args:
            labels: one for all, one for each, or None: drawn evenly for each.

        Raises:
            UsageError: there is no such class, or not one for each image.
        """
        if labels is None:
            return tuple(self.draw(seed, range(n))) if self.count else None
        chosen = self.read(labels)
        if _as_list(labels) is None:
            return chosen * n
        if len(chosen) != n:
            raise UsageError(f"{len(chosen)} labels for {n} images: give one, or one for each")
        return chosen

    def draw(self, seed: int, indices: Sequence[int]) -> list[int]:
        """A class for each image, evenly over all, a function of (seed, i) alone."""
        return [int(generator(seed, "class", i).integers(self.count)) for i in indices]


def _as_number(label: Any) -> int | None:
    """A label as the number it is or spells; None where it does neither."""
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", label) else None
    label = _plain(label)
    try:
        return None if isinstance(label, bool) else index(label)
    except TypeError:
        return None


def _as_list(labels: Any) -> list | None:
    """Several labels; None where they are one."""
    labels = _plain(labels)
    return list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else None


def _plain(labels: Any) -> Any:
    """A tensor's or an array's labels as Python's numbers."""
    return labels.tolist() if hasattr(labels, "tolist") else labels


def fill_hidden(images: Tensor, mask: Tensor) -> Tensor:
    """Images with what the mask hides replaced by the mean of the known pixels about it.

    An encoder looks beyond the patch of a latent: what is hidden must not reach it, nor an edge
    that is not in the picture. The mean is over the known pixels of a square of 2, 4, 8 … pixels,
    the smallest that holds any; grey where nothing is known. (After the pull-push of Gortler et al.
    1996, which blends the squares where this takes one.)

    Args:
        images: (B, 3, H, W) in [−1, 1].
        mask: (B, 1, H, W), 1 where hidden, 0 where known.
    """
    known = 1 - mask
    return _means(images * known, known)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """Means (B, 3, H, W) of squares of which there are sums, and counts (B, 1, H, W) of what is in
    them; of an empty one, that of the smallest of the squares about it that is not."""
    mean = sums / counts.clamp_min(1)
    if max(counts.shape[2:]) == 1 or (counts > 0).all():
        return mean
    larger = [F.avg_pool2d(part, 2, ceil_mode=True, divisor_override=1) for part in (sums, counts)]
    wide = F.interpolate(_means(*larger), scale_factor=2, mode="nearest")
    return torch.where(counts > 0, mean, wide[..., : counts.shape[2], : counts.shape[3]])


def latent_mask(mask: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, 1, H, W) of pixels → (B, 1, h, w): 1 where any pixel of a latent's patch is 1.

    Args:
        sides: (h, w), which divide (H, W).
    """
    return F.adaptive_max_pool2d(mask, tuple(sides))
