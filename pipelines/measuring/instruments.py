"""What reconstructions are measured with, as far as its weights are to be had."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import PartialState

from autoencoders.losses import LPIPS, load_lpips
from ldm.errors import LdmError, UsageError
from ldm.metrics.extractors import Extractor, load_extractor
from ldm.metrics.inception import Mode
from ldm.run import from_main

T = TypeVar("T")
FEATURES = ("rfid", "kid", "precision", "recall")
"""The numbers that a network's features are needed for."""
NOT_ASKED = "--no-fid"


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
) -> Instruments:
    """LPIPS, and an extractor of features; what cannot be had is left out.

    Args:
        fid: False leaves the extractor out.
        weights, features, mode: as `load_extractor` takes them.
        resolution: side of images that an extractor of one's own is tried on.

    Raises:
        UsageError: options that do not go together.
        LdmError: weights or features that were asked for cannot be had.
    """
    asked = weights is not None or features is not None
    if not fid and (asked or mode != "clean"):
        raise UsageError("--no-fid leaves out what --weights, --features and --mode are for")
    lpips, why = _find(partial(load_lpips, device, instead="go without it, as here"), ranks)
    missing = {} if why is None else {"lpips": why}
    extractor = None
    if fid:
        load = partial(load_extractor, features, mode, weights, device, resolution)
        extractor, why = _find(load, ranks)
        if why is not None and asked:
            raise LdmError(why)
    else:
        why = NOT_ASKED
    if why is not None:
        missing |= dict.fromkeys(FEATURES, why)
    return Instruments(lpips, extractor, missing)


def _find(load: Callable[[], T], ranks: PartialState) -> tuple[T | None, str | None]:
    """What `load` returns on every process, or why it does not. The main process tries first, so
    that what is fetched is fetched once."""
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
    if why is None and not made:
        made.append(load())
    return (made[0] if made else None), why
