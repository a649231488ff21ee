"""The numbers in result files, by their names: read, and shown."""

import math
from collections.abc import Mapping
from typing import Any

NUMBERS = {
    "rfid": ("rFID", 3, 1.0),
    "fid": ("FID", 3, 1.0),
    "kid": ("KID ×10³", 3, 1e3),
    "lpips": ("LPIPS", 4, 1.0),
    "psnr": ("PSNR, dB", 2, 1.0),
    "ssim": ("SSIM", 4, 1.0),
    "precision": ("precision", 3, 1.0),
    "recall": ("recall", 3, 1.0),
    "swd": ("SWD ×10³", 2, 1.0),  # the files hold ×10³ already
    "loss": ("loss", 4, 1.0),
}
"""Names of numbers in result files: title, digits and scale where they are shown."""
SAMPLES = ("samples/*/fid*.json", "samples/*.fid*.json", "fid/*.json")
"""FIDs of a folder of samples, of an archive of samples, and of a model's own samples."""
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def read_numbers(tree: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the numbers in the content of a `fid.json` or of an evaluation, and standard
    deviations of some: FID's over the bootstrap, KID's over subsets."""
    numbers, details = (section(tree, key) or tree for key in ("numbers", "details"))
    interval = section(tree, "fid_interval")
    return known_numbers(numbers), known_numbers(
        {"fid": interval.get("std"), "kid": details.get("kid_std")}
    )


def known_numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return those of a file's values that are `NUMBERS`."""
    found = {}
    for name in NUMBERS:
        value = tree.get(name)
        value = value.get("mean") if isinstance(value, dict) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def section(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a file's content; an empty one where it has none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def show_number(name: str, numbers: Mapping[str, float], spread: Mapping[str, float]) -> str:
    """Format one of `NUMBERS`, as "12.500 ± 0.250"; an empty text if it is not there."""
    if name not in numbers:
        return ""
    _, digits, scale = NUMBERS[name]
    values = [each[name] for each in (numbers, spread) if name in each]
    return "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}".join(_format(scale * v, digits) for v in values)


def _format(value: float, digits: int) -> str:
    """Format with a fixed number of decimals, or as a power of ten above seven integer digits."""
    plain = f"{value:.{digits}f}"
    if not math.isfinite(value) or len(plain.partition(".")[0].lstrip("-")) <= 7:
        return plain
    mantissa, _, power = f"{value:.2e}".partition("e+")
    return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPTS)}"
