"""Learning rates as functions of images seen: a resumed run needs no scheduler state."""

import math
from typing import Literal

from torch.optim import Optimizer

RateSchedule = Literal["constant", "cosine", "inverse_sqrt"]


def learning_rate(
    base: float,
    images_seen: int,
    warmup_images: int,
    schedule: RateSchedule = "constant",
    total_images: int | None = None,
    decay_images: int | None = None,
) -> float:
    """Multiply `base` by a linear warm-up and a decay.

    Args:
        base: absolute learning rate; batch size and processes do not scale it.
        images_seen: with those of the next step, so that the first step's rate is above 0.
        warmup_images: length of the warm-up; 0 for none.
        total_images: of the run; cosine reaches 0 there.
        decay_images: images at which inverse_sqrt starts to decay; at four times as many it is 1/2.
    """
    warm = min(1.0, images_seen / warmup_images) if warmup_images else 1.0
    match schedule:
        case "constant":
            decay = 1.0
        case "cosine":
            assert total_images is not None
            since, length = images_seen - warmup_images, total_images - warmup_images
            progress = min(1.0, max(0.0, since / max(1, length)))
            # Loshchilov & Hutter 2017 (arXiv 1608.03983), Eq. 5, without restarts
            decay = (1 + math.cos(math.pi * progress)) / 2
        case "inverse_sqrt":
            assert decay_images is not None and decay_images > 0, decay_images
            # Karras et al. 2023 (arXiv 2312.02696), Eq. 67: α_ref / √max(t/t_ref, 1)
            decay = 1 / math.sqrt(max(1.0, images_seen / decay_images))
        case _:
            raise ValueError(f"no learning rate schedule '{schedule}'")
    return base * warm * decay


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
