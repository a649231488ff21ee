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
    floor: float = 0.0,
) -> float:
    """Linear from 0 over the first `warmup_images`, times what the schedule leaves of `base`.

    Args:
        base: absolute learning rate; batch size and processes do not scale it.
        images_seen: those of the step about to be taken included, so that no step has rate 0, but
            the last of a cosine without a floor.
        warmup_images: length of the warm-up; 0 for none.
        schedule: constant, or falling after the warm-up: by half a cosine, or by one over the root
            of images seen.
        total_images: cosine: length of the run, where it is down at its floor for good.
        decay_images: inverse_sqrt: images seen from which on the rate falls; at four times as many
            it is half.
        floor: cosine: where it ends, as a share of `base` in [0, 1].
    """
    warm = min(1.0, images_seen / warmup_images) if warmup_images else 1.0
    match schedule:
        case "constant":
            left = 1.0
        case "cosine":
            assert total_images is not None and 0 <= floor <= 1, (total_images, floor)
            since, length = images_seen - warmup_images, total_images - warmup_images
            progress = min(1.0, max(0.0, since / max(1, length)))
            # Loshchilov & Hutter 2017 (arXiv 1608.03983), Eq. 5, without restarts
            left = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        case "inverse_sqrt":
            assert decay_images is not None and decay_images > 0, decay_images
            # Karras et al. 2023 (arXiv 2312.02696), Eq. 67: α_ref / √max(t/t_ref, 1)
            left = 1 / math.sqrt(max(1.0, images_seen / decay_images))
        case _:
            raise ValueError(f"no learning rate schedule '{schedule}'")
    return base * warm * left


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group of the optimiser the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
