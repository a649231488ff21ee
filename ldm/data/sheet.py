"""A few images of a source, to look at."""

from itertools import islice

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm.data.samples import EvaluationImages
from ldm.data.source import Source
from ldm.errors import LdmError


def sheet_images(source: Source, resolution: int, count: int) -> Tensor:
    """The first good images of a source, their centres cut out: uint8 (n, 3, R, R), n ≤ `count`.

    Args:
        resolution: side R of the images, in pixels.

    Raises:
        LdmError: no image can be read, or one that was read is smaller than R.
    """
    images, faults = EvaluationImages(source, resolution), {}
    loaded = (images.load(k, faults) for k in range(len(source)))
    chosen = list(islice((sample.pixels for sample in loaded if sample is not None), count))
    if not chosen:
        name, reason = next(iter(faults.items()))
        raise LdmError(f"no image can be read, not even {name} ({reason}): repair or replace them")
    return rearrange(torch.from_numpy(np.stack(chosen)), "b h w c -> b c h w")
