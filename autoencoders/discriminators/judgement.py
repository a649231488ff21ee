"""What every discriminator answers, and how it refuses images that it cannot judge."""

from typing import Protocol, TypeVar

from torch import Tensor

from ldm.errors import LdmError

Judgement = tuple[Tensor, ...]
"""Heads of logits in float32, the finest first: each (B, 1) or (B, 1, h, w), high is real."""

JudgementT = TypeVar("JudgementT", bound=Judgement)


class TakesSizes(Protocol):
    """A discriminator's config: it knows which images the network takes."""

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line where a side of so many pixels cannot be judged."""


def split(judgement: JudgementT, parts: int) -> list[JudgementT]:
    """The judgements of so many equal parts of the batch, in order: real and fake, say."""
    assert len(judgement[0]) % parts == 0, f"{len(judgement[0])} images in {parts} equal parts"
    make = getattr(judgement, "_make", tuple)  # a named tuple stays one
    return [make(heads) for heads in zip(*(head.chunk(parts) for head in judgement), strict=True)]


def check_images(config: TakesSizes, images: Tensor) -> None:
    """Hold images (B, 3, H, W) against what the config says it takes.

    Raises:
        LdmError: H or W is a size that the network cannot judge.
    """
    height, width = images.shape[-2:]
    try:
        for side in (height, width):
            config.check_resolution(side)
    except ValueError as error:
        raise LdmError(f"images of {height}×{width} pixels: {error}") from error
