"""Moving averages of a model's weights, in images seen and not in steps."""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from ema_pytorch import EMA
from torch import Tensor, nn

from ldm.errors import LdmError, UsageError

LARGEST_STD = math.sqrt(1 / 12)
"""The relative standard deviation of the plain mean over a whole run (γ = 0)."""


class Average(ABC):
    """A copy of a model whose weights follow the model's.

    Updates read nothing but the model and the count of images, so that processes with equal
    weights keep equal averages without talking to each other.

    Args:
        model: the plain module, on the device it trains on, before DDP wraps it.
    """

    def __init__(self, model: nn.Module):
        self._ema = EMA(model, include_online_model=False, use_foreach=True)
        self.model.eval().requires_grad_(False)

    @abstractmethod
    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight that the average keeps in an update, the one after which `images_seen` are
        seen, the last `batch_size` of them since the update before."""

    @property
    def model(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients."""
        return self._ema.ema_model

    def update(self, images_seen: int, batch_size: int) -> None:
        """Average the model in, after each optimiser step; the first time, copy it.

        Args:
            images_seen: over all processes, this step's included.
            batch_size: images of this step, over all processes.
        """
        first = not self._ema.initted
        decay = 0.0 if first else self.decay(images_seen, batch_size)
        self._ema.update_moving_average(self._ema.ema_model, self._ema.model, decay)
        self._ema.initted.fill_(True)
        for average, online in zip(self.model.buffers(), self._ema.model.buffers(), strict=True):
            if not average.is_floating_point():  # counters are copied: a mean has no meaning
                average.copy_(online)

    def state_dict(self) -> dict[str, Tensor]:
        """All that an exact resume needs, as tensors by name."""
        return dict(self._ema.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            LdmError: the state is that of another model.
        """
        try:
            self._ema.load_state_dict(state)
        except RuntimeError as error:
            raise LdmError(
                "the averaged weights do not fit this model: resume with the configuration "
                "they were saved with"
            ) from error


class Ema(Average):
    """The exponential average: a model's weights are forgotten with a half-life.

    Args:
        model: the plain module, on the device it trains on, before DDP wraps it.
        half_life_images: after as many images an update has lost half its weight; 0 copies.
        ramp_up: the half-life is at most this share of the images seen, so that the first,
            random weights are soon forgotten; None for no such bound.
    """

    def __init__(self, model: nn.Module, half_life_images: float, ramp_up: float | None = 0.05):
        super().__init__(model)
        self.half_life_images = half_life_images
        self.ramp_up = ramp_up

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight that the average keeps in an update after `batch_size` more images."""
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * images_seen)
        # Karras et al. 2022, appendix on training: half-life in images, ramped up with them
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


class PowerEma(Average):
    """The power-function average of Karras et al. 2023 (arXiv 2312.02696, Section 3.1).

    The weights after τ images count in proportion to τ^γ, so that the average always spans the
    same share of the run so far. With a fixed batch size the updates give that integral exactly,
    the weights being constant in between.

    Args:
        model: the plain module, on the device it trains on, before DDP wraps it.
        std: width of the average, as a share of the images seen (the paper's σ_rel): the standard
            deviation of τ under the profile, over the whole; above 0, at most √(1/12) ≈ 0.2886.

    Raises:
        UsageError: `std` is out of range.
    """

    def __init__(self, model: nn.Module, std: float):
        gamma = gamma_of_std(std)  # refused before the model is copied
        super().__init__(model)
        self.std = std
        self.gamma = gamma

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight that the average keeps in an update after `batch_size` more images."""
        # Karras et al. 2023, Eq. 127: β_γ(t) = (1 − Δt/t)^(γ+1)
        return (1 - batch_size / images_seen) ** (self.gamma + 1)


def gamma_of_std(std: float) -> float:
    """The exponent γ ≥ 0 of the power-function profile with a relative standard deviation.

    Raises:
        UsageError: `std` is not in (0, √(1/12)].
    """
    if not 0 < std <= LARGEST_STD:
        raise UsageError(
            f"std={std}: the width of an average must be above 0 and at most "
            f"{LARGEST_STD:.5f}, the mean over the whole run"
        )
    # Karras et al. 2023, Algorithm 2: Eq. 126 with t = 1/σ_rel², times its denominators, is
    # γ³ + 7γ² + (16 − t)γ + (12 − t) = 0; its largest root is the one that is not negative
    t = std**-2
    return np.roots([1, 7, 16 - t, 12 - t]).real.max().item()


def std_of_gamma(gamma: float) -> float:
    """The relative standard deviation of the profile τ^γ on [0, 1], for γ ≥ 0."""
    # Karras et al. 2023, Eq. 126
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
