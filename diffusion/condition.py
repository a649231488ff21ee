"""What a network is told besides the noise level: refused in one line where it cannot know it."""

import torch
from torch import Tensor

from ldm.errors import LdmError


def check_condition(
    batch: int,
    labels: Tensor | None,
    augment: Tensor | None,
    classes: int,
    augment_parameters: int,
) -> None:
    """Refuse labels (B,) and augmentations (B, A) that a network does not know.

    Labels are looked at: where they lie on a CPU, a GPU need not be waited for.

    Args:
        batch: B.
        classes: how many the network knows; −1 is no label, and always known.
        augment_parameters: how many it takes.

    Raises:
        LdmError: a label below −1 or not below `classes`, A is another number, or one of the two
            is of another shape, or labels are no whole numbers.
    """
    if labels is not None:
        if labels.shape != (batch,) or labels.dtype not in (torch.int32, torch.int64):
            raise LdmError(
                f"labels are {labels.dtype} {tuple(labels.shape)}: they must be int64 ({batch},)"
            )
        wrong = labels[(labels < -1) | (labels >= classes)]
        if len(wrong) and not classes:
            raise LdmError(
                f"label {wrong[0]} was given to a network without classes: leave labels out, or "
                "train one on labelled images"
            )
        if len(wrong):
            raise LdmError(
                f"label {wrong[0]} is none of this network's: they are 0 to {classes - 1}, and −1 "
                "for none"
            )
    if augment is not None and augment.shape != (batch, augment_parameters):
        raise LdmError(
            f"augmentation parameters {tuple(augment.shape)} were given to a network of "
            f"{augment_parameters} for {batch} image(s)"
        )
