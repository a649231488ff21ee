"""Learning rates as functions of images seen: a resumed run needs no scheduler state."""

from torch.optim import Optimizer


def learning_rate(base: float, images_seen: int, warmup_images: int) -> float:
    """Linear from 0 over the first `warmup_images`, then `base` for good.

    Args:
        base: absolute learning rate; batch size and processes do not scale it.
        images_seen: those of the step about to be taken included, so that no step has rate 0.
        warmup_images: length of the warm-up; 0 for none.
    """
    return base * min(1.0, images_seen / warmup_images) if warmup_images else base


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter group of the optimiser the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
