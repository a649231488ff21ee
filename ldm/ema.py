"""The exponential moving average of a model's weights, in images seen and not in steps."""

from typing import Any

from ema_pytorch import EMA
from torch import Tensor, nn

from ldm.errors import LdmError


class Ema:
    """A copy of a model whose weights follow the model's with a half-life.

    Updates read nothing but the model and the count of images, so that processes with equal
    weights keep equal averages without talking to each other.

    Args:
        model: the plain module, on the device it trains on, before DDP wraps it.
        half_life_images: after as many images an update has lost half its weight; 0 copies.
        ramp_up: the half-life is at most this share of the images seen, so that the first,
            random weights are soon forgotten; None for no such bound.
    """

    def __init__(self, model: nn.Module, half_life_images: float, ramp_up: float | None = 0.05):
        self.half_life_images = half_life_images
        self.ramp_up = ramp_up
        self._ema = EMA(model, include_online_model=False, use_foreach=True)
        self.model.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients."""
        return self._ema.ema_model

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The weight that the average keeps in an update after `batch_size` more images."""
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * images_seen)
        # Karras et al. 2022, appendix on training: half-life in images, ramped up with them
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

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
