"""Wavelet transforms of images: Haar by slices and sums, every other wavelet by ptwt.

Haar is slices, sums and differences: exact in float32, untouched by autocast, and differentiable.
The bands are orthonormal, so energy is kept. The other wavelets of PyWavelets take the image as
periodic, which keeps every sub-band at half its size (`mode="periodization"` there).
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor
from torch.nn import functional as F

from ldm.config import did_you_mean
from ldm.device import to_device
from ldm.errors import LdmError

SubBands = tuple[Tensor, Tensor, Tensor, Tensor]


def known_wavelet(name: str) -> str:
    """Return a name that PyWavelets knows, or raise a ValueError with the nearest one."""
    if name != "haar":
        import pywt

        names = pywt.wavelist(kind="discrete")
        if name not in names:
            raise ValueError(f"no wavelet '{name}'{did_you_mean(name, names)}")
    return name


WaveletName = Annotated[str, AfterValidator(known_wavelet)]
"""Config field: one of the 106 discrete wavelets of PyWavelets, "haar" to "sym20"."""


# ----------------------------------------------------------------------------- any wavelet
def dwt(images: Tensor, wavelet: str = "haar") -> SubBands:
    """One level: (B, C, H, W) → (LL, H, V, D), each (B, C, H/2, W/2), in float32 or float64.

    The low-pass filters of every wavelet sum to √2, so LL has twice the range of the images. The
    inverse is exact, but for "dmey", an infinite filter cut short, which is off by half a percent.

    Raises:
        LdmError: a side is odd, or shorter than the wavelet's filters can take.
        ValueError: no such wavelet.
    """
    if wavelet == "haar":
        return haar_dwt(images)
    import ptwt

    check_size(images.shape[-2:], 1, wavelet)
    height, width = (side // 2 for side in images.shape[-2:])
    dtype, shift = _precision(images), _taps(wavelet) // 2 - 1
    # ptwt centres its first coefficient this far before the first 2×2 block
    x = images.to(_working(images)).roll((-shift, -shift), (-2, -1))
    with torch.autocast(x.device.type, enabled=False):
        low, *levels = ptwt.wavedec2(x, _filters(wavelet, x), level=1, mode="periodic")
    # of a periodic image the coefficients repeat after half its side
    bands = (band[..., :height, :width].to(dtype) for band in (low, *levels[0]))
    low, horizontal, vertical, diagonal = bands
    return low, horizontal, vertical, diagonal


def idwt(sub_bands: SubBands, wavelet: str = "haar") -> Tensor:
    """(LL, H, V, D), each (B, C, h, w) → (B, C, 2h, 2w): the inverse of `dwt`.

    Raises:
        LdmError: a side is shorter than the wavelet's filters can take.
        ValueError: no such wavelet.
    """
    if wavelet == "haar":
        return haar_idwt(sub_bands)
    import ptwt
    from ptwt.constants import WaveletDetailTuple2d

    check_size(tuple(2 * side for side in sub_bands[0].shape[-2:]), 1, wavelet)
    dtype, working = _precision(sub_bands[0]), _working(sub_bands[0])
    shift = _taps(wavelet) // 2 - 1
    low, *edges = (
        F.pad(band.to(working), (0, shift, 0, shift), mode="circular") for band in sub_bands
    )
    with torch.autocast(low.device.type, enabled=False):
        x = ptwt.waverec2((low, WaveletDetailTuple2d(*edges)), _filters(wavelet, low))
    return x.roll((shift, shift), (-2, -1)).to(dtype)


def dwt_cascade(images: Tensor, depth: int, wavelet: str = "haar") -> list[SubBands]:
    """(B, C, H, W) → the sub-bands of levels 1 … depth, those of level l (B, C, H/2^l, W/2^l).

    Each level transforms the low-pass band of the one before.

    Raises:
        LdmError: H or W is not a multiple of 2^depth, or too small for the wavelet.
    """
    check_size(images.shape[-2:], depth, wavelet)
    levels: list[SubBands] = []
    for _ in range(depth):
        levels.append(dwt(levels[-1][0] if levels else images, wavelet))
    return levels


def check_size(size: Sequence[int], depth: int, wavelet: str = "haar") -> None:
    """Raise LdmError if images of (H, W) pixels do not have `depth` levels of the wavelet."""
    (height, width), factor = size, 2**depth
    if height % factor or width % factor:
        raise LdmError(
            f"images of {height}×{width} pixels: a wavelet transform of depth {depth} needs sides "
            f"that are multiples of {factor}; crop or resize them, or lower the depth"
        )
    # at each level ptwt extends the image by taps − 2, of which its own period has to be enough
    taps = _taps(wavelet)
    smallest = max(taps - 2, 2) * 2 ** (depth - 1)
    if min(height, width) < smallest:
        raise LdmError(
            f"images of {height}×{width} pixels are too small for a transform of depth {depth} by "
            f"the wavelet '{wavelet}' ({taps} taps): sides of {smallest} pixels are the least; "
            "take larger images, a lower depth or a shorter wavelet"
        )


def _taps(wavelet: str) -> int:
    if wavelet == "haar":
        return 2
    import pywt

    return pywt.Wavelet(wavelet).dec_len


def _filters(wavelet: str, x: Tensor) -> Any:
    """The wavelet's filters in the form of ptwt, which would copy them in a way that waits."""
    import pywt
    from ptwt.constants import WaveletTensorTuple

    bank = pywt.Wavelet(wavelet).filter_bank
    return WaveletTensorTuple(
        *(to_device(torch.tensor(taps, dtype=x.dtype), x.device) for taps in bank)
    )


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _working(x: Tensor) -> torch.dtype:
    # a GPU's float32 convolutions may run in TF32, three digits
    return torch.float64 if x.is_cuda else _precision(x)


# ------------------------------------------------------------------------------------ Haar
def haar_dwt(images: Tensor) -> SubBands:
    """(B, C, H, W) → sub-bands (LL, H, V, D), each (B, C, H/2, W/2), in float32 or float64.

    LL is the low-pass image; H, V and D hold its horizontal, vertical and diagonal edges
    (Sadat et al. 2024, Section 3).

    Raises:
        LdmError: a side is odd.
    """
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        raise LdmError(
            f"the Haar transform halves both sides, and {height}×{width} has an odd one: "
            "crop or resize to even sides"
        )
    x = images if images.dtype == torch.float64 else images.float()
    # columns, then rows: the second sums run over whole rows, which is twice as quick
    even, odd = x[..., 0::2], x[..., 1::2]
    sums, edges = (even + odd).div_(2), (even - odd).div_(2)  # (B, C, H, W/2)
    top, bottom, top_edge, bottom_edge = (
        half[..., row::2, :] for half in (sums, edges) for row in (0, 1)
    )
    return top + bottom, top - bottom, top_edge + bottom_edge, top_edge - bottom_edge


def haar_idwt(sub_bands: SubBands) -> Tensor:
    """(LL, H, V, D), each (B, C, h, w) → (B, C, 2h, 2w): the inverse of `haar_dwt`."""
    low, horizontal, vertical, diagonal = (
        band if band.dtype == torch.float64 else band.float() for band in sub_bands
    )
    top, bottom = low + horizontal, low - horizontal
    top_edge, bottom_edge = vertical + diagonal, vertical - diagonal
    *rest, height, width = low.shape
    x = low.new_empty(*rest, 2 * height, 2 * width)
    x[..., 0::2, 0::2], x[..., 0::2, 1::2] = (top + top_edge) / 2, (top - top_edge) / 2
    x[..., 1::2, 0::2], x[..., 1::2, 1::2] = (bottom + bottom_edge) / 2, (bottom - bottom_edge) / 2
    return x
