"""Moving averages of a model's weights, with half-lives and widths in images."""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from ema_pytorch import EMA
from torch import Tensor, nn

from ldm.errors import LdmError, UsageError

LARGEST_STD = math.sqrt(1 / 12)
"""Relative width of the mean over a whole run (γ = 0)."""


class Average(ABC):
    """A copy of a model whose weights average the model's.

    Updates depend on the model and the count of images alone, so that processes with equal weights
    keep equal averages without communication.

    Args:
        model: the module on its device, before DDP wraps it.
    """

    def __init__(self, model: nn.Module):
        self._ema = EMA(model, include_online_model=False, use_foreach=True)
        self.model.eval().requires_grad_(False)

    @abstractmethod
    def decay(self, images_seen: int, batch_size: int) -> float:
        """Return the weight that the average keeps in the update after `images_seen` images.

        Args:
            batch_size: images since the update before.
        """

    @property
    def model(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients."""
        return self._ema.ema_model

    def update(self, images_seen: int, batch_size: int) -> None:
        """Update after an optimiser step; the first update copies the model.

        Args:
            images_seen: over all processes, with this step's.
            batch_size: images of this step, over all processes.
        """
        first = not self._ema.initted
        decay = 0.0 if first else self.decay(images_seen, batch_size)
        self._ema.update_moving_average(self._ema.ema_model, self._ema.model, decay)
        self._ema.initted.fill_(True)
        for average, online in zip(self.model.buffers(), self._ema.model.buffers(), strict=True):
            if not average.is_floating_point():  # counters have no mean
                average.copy_(online)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for an exact resume."""
        return dict(self._ema.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; an LdmError if it belongs to another model."""
        try:
            self._ema.load_state_dict(state)
        except RuntimeError as error:
            raise LdmError(
                "the averaged weights do not fit this model: resume with the configuration "
                "they were saved with"
            ) from error


class Ema(Average):
    """Exponential moving average.

    Args:
        half_life_images: images after which an update has half its weight; 0 copies the model.
        ramp_up: bound on the half-life as a fraction of the images seen, so that the initial
            weights fade quickly; None for no bound.
    """

    def __init__(self, model: nn.Module, half_life_images: float, ramp_up: float | None = 0.05):
        super().__init__(model)
        self.half_life_images = half_life_images
        self.ramp_up = ramp_up

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Return the weight that the average keeps in an update."""
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * images_seen)
        # Karras et al. 2022, appendix on training: half-life in images, ramped up with them
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


class PowerEma(Average):
    """Power-function average of Karras et al. 2023 (arXiv 2312.02696, Section 3.1).

    The weights after τ images count in proportion to τ^γ: the average always spans the same
    fraction of the run so far. For a constant batch size the updates equal that integral over
    weights that are constant between steps.

    Args:
        std: width of the average as a fraction of the images seen (the paper's σ_rel), the standard
            deviation of τ under the profile; above 0, at most √(1/12) ≈ 0.2886.
    """

    def __init__(self, model: nn.Module, std: float):
        self.std, self.gamma = std, gamma_of_std(std)  # checks std before the model is copied
        super().__init__(model)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Return the weight that the average keeps in an update."""
        # Karras et al. 2023, Eq. 127: β_γ(t) = (1 − Δt/t)^(γ+1)
        return (1 - batch_size / images_seen) ** (self.gamma + 1)


def gamma_of_std(std: float) -> float:
    """Return the exponent γ ≥ 0 of the power-function profile of a relative width.

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
