"""What makes features of images, on every process or on none, and what a result says of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ldm.errors import LdmError, UsageError
from ldm.metrics.extractors import Extractor, load_extractor
from ldm.metrics.inception import Mode
from ldm.processes import fail_together, from_main

T = TypeVar("T")


def find_extractor(
    features: str | None,
    mode: Mode,
    weights: Path | None,
    resolution: int,
    device: torch.device,
    ranks: PartialState,
) -> tuple[Extractor | None, str | None]:
    """The extractor, or why there is none.

    Args:
        features, mode, weights: as `load_extractor` takes them.
        resolution: side of images that an extractor of one's own is tried on.

    Raises:
        UsageError: options that do not go together.
        LdmError: weights or features that were asked for cannot be had.
    """
    load = partial(load_extractor, features, mode, weights, device, resolution)
    extractor, why = load_on_all(load, ranks)
    if why is not None and (weights is not None or features is not None):
        raise LdmError(why)
    return extractor, why


def load_on_all(load: Callable[[], T], ranks: PartialState) -> tuple[T | None, str | None]:
    """What `load` returns on every process; or None on every one, and why, where it failed on any.
    The main process tries first, so that what is fetched is fetched once."""
    made: list[T] = []

    def attempt() -> str | None:
        try:
            made.append(load())
        except UsageError:
            raise
        except LdmError as error:
            return str(error)
        return None

    why = from_main(ranks, attempt)
    with fail_together(ranks):
        if why is None and not made:
            why = attempt()  # on another machine the file may not be there
    why = next((reason for reason in gather_object([why]) if reason is not None), None)
    return (made[0] if why is None else None), why


def describe_extractor(extractor: Extractor | None) -> dict[str, Any] | None:
    """What a result says of an extractor."""
    names = ("name", "sha256", "dim", "is_published")
    return extractor and {name: getattr(extractor, name) for name in names}


def notes_on(extractor: Extractor | None, features: str | None) -> list[str]:
    """What a reader of numbers made by an extractor has to know."""
    if extractor is None or extractor.is_published:
        return []
    if features is not None:
        return [
            f"the features are of {extractor.name}: these numbers are no FID and KID of any paper, "
            "compare them only with others of the same function and weights"
        ]
    return [
        "the network is not the published Inception (another SHA-256): compare this FID only "
        "with others of the same file"
    ]
