"""What reconstructions are measured with, as far as its weights are to be had."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from autoencoders.losses import LPIPS, load_lpips
from ldm.errors import UsageError
from ldm.metrics.extractors import Extractor
from ldm.metrics.inception import Mode
from pipelines.measuring.features import find_extractor, load_on_all

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
    load = partial(load_lpips, device, instead="go without it, as here")
    lpips, why = load_on_all(load, ranks)
    missing = {} if why is None else {"lpips": why}
    extractor, why = None, NOT_ASKED
    if fid:
        extractor, why = find_extractor(features, mode, weights, resolution, device, ranks)
    if why is not None:
        missing |= dict.fromkeys(FEATURES, why)
    return Instruments(lpips, extractor, missing)
