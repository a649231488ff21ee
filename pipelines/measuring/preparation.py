"""How the images of a data set came to their size, as far as it can be known.

Filters and compression leave traces that no eye sees and FID does: FFHQ brought down by one library
and by another is at an FID of 6 or more from itself (Parmar et al. 2022).
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import DataConfig, Source, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.shards import read_manifest
from ldm.data.transforms import NOT_RESIZED, CorruptImage
from ldm.errors import LdmError
from pipelines.sampling.source import is_lossy

LOOKED_AT = 16  # images whose size tells that of all


def preparation(config: DataConfig) -> dict[str, Any] | None:
    """What `ldm data prepare` wrote of a data set (size, filter, crop, source), where it did."""
    path = Path(config.source).expanduser()
    if config.source == PHOTOS or path.suffix == ".zip":
        return None
    if not path.exists() and "{" not in config.source:
        return None  # the folder that it is not in may be prepared
    return read_preparation(path if path.is_dir() else path.parent)


def read_preparation(folder: Path) -> dict[str, Any] | None:
    """As `preparation`, of a folder of shards."""
    manifest = read_manifest(folder)
    return manifest and {key: manifest[key] for key in ("size", "filter", "crop", "source")}


def resize_filter(config: DataConfig, source: Source, resolution: int) -> str | None:
    """The filter that a data set's images are brought down by, or were; None where that is not
    known, or they were not.

    Args:
        source: its images.
        resolution: edge of the images as they are compared, pixels.
    """
    if config.source == PHOTOS or config.crop == "random":
        return None  # windows at native size
    prepared = preparation(config)
    steps = [prepared["filter"]] if prepared and prepared["filter"] != NOT_RESIZED else []
    if _side(config, source) > resolution:
        steps.append("lanczos")  # as `center_crop` does
    return ", then ".join(steps) or None


def learnt_from_windows(config: DataConfig, resolution: int) -> bool:
    """Whether a model learnt from windows of larger images, at native size; False where that cannot
    be known now, and of the built-in photographs, whose reference is windows, too."""
    if config.crop != "random" or config.source == PHOTOS:
        return False
    with suppress(LdmError):  # the data is not here any more
        return _side(config, open_source(config, "all", resolution)) > resolution
    return False


def training_filter(config: DataConfig, resolution: int) -> str | None:
    """The filter of the images that a model learnt from; None where that cannot be known now."""
    with suppress(LdmError):  # the data is not here any more
        return resize_filter(config, open_source(config, "all", resolution), resolution)
    return None


def compressed_image(source: Source, resolution: int) -> str | None:
    """The name of an image that is compressed with loss at the very size at which it is compared.

    Brought down, an image loses the traces of its compression with its details. Some of those that
    there are, evenly spread, speak for all.
    """
    lossy = [i for i in range(len(source)) if is_lossy(source.name(i))]
    for i in _spread(lossy):
        with suppress(CorruptImage):
            if min(source.load(i).shape[:2]) == resolution:
                return source.name(i)
    return None


def _side(config: DataConfig, source: Source) -> int:
    """The shorter side of a data set's images, pixels, by its manifest or by most of them."""
    prepared = preparation(config)
    return prepared["size"] if prepared else _native_size(source)


def _native_size(source: Source) -> int:
    """The shorter side of most images, pixels; 0 where none can be read."""
    sizes = []
    for i in _spread(range(len(source))):
        with suppress(CorruptImage):
            sizes.append(min(source.load(i).shape[:2]))
    return int(np.median(sizes)) if sizes else 0


def _spread(indices: Sequence[int]) -> list[int]:
    """At most `LOOKED_AT` of them, evenly spread."""
    places = np.linspace(0, len(indices) - 1, min(LOOKED_AT, len(indices))).round()
    return [indices[int(place)] for place in places]
