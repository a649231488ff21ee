"""What makes features of images, on every process or on none, and what a result says of it.

What reconstructions are measured with, as far as its weights are to be had.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from autoencoders.losses import LPIPS, load_lpips
from ldm.distributed import fail_together, from_main
from ldm.errors import LdmError, UsageError
from ldm.metrics.inception import Extractor, Mode, load_extractor

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


FEATURES = ("rfid", "kid", "precision", "recall")
"""The numbers that a network's features are needed for."""
NOT_ASKED = "--no-fid"
"""Why they are not there, where a person has left them out."""


class Instruments(NamedTuple):
    """What there is, and why the rest is not there, by the names of the numbers."""

    lpips: LPIPS | None
    extractor: Extractor | None
    missing: dict[str, str]


def find_instruments(
    fid: bool,
    weights: Path | None,
    features: str | None,
    mode: Mode,
    resolution: int,
    device: torch.device,
    ranks: PartialState,
    lpips: LPIPS | None = None,
) -> Instruments:
    """LPIPS, and an extractor of features; what cannot be had is left out.

    Args:
        fid: False leaves the extractor out.
        weights, features, mode: as `load_extractor` takes them.
        resolution: side of images that an extractor of one's own is tried on.
        lpips: used in place of the published LPIPS.

    Raises:
        UsageError: options that do not go together.
        LdmError: weights or features that were asked for cannot be had.
    """
    asked = weights is not None or features is not None
    if not fid and (asked or mode != "clean"):
        raise UsageError("--no-fid leaves out what --weights, --features and --mode are for")
    missing = {}
    if lpips is None:
        load = partial(load_lpips, device, instead="go without it, as here")
        lpips, why = load_on_all(load, ranks)
        missing = {} if why is None else {"lpips": why}
    extractor, why = None, NOT_ASKED
    if fid:
        extractor, why = find_extractor(features, mode, weights, resolution, device, ranks)
    if why is not None:
        missing |= dict.fromkeys(FEATURES, why)
    return Instruments(lpips, extractor, missing)
