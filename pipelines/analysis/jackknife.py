"""How far a number over images would move with other images: the jackknife.

Efron & Tibshirani 1993, Chapter 11: the number is measured again without some of the images, and
again without others. It holds for what is no mean over images, too. Images drawn with replacement
would not do where images are compared with each other: one that is drawn twice is at distance 0
from itself, which shifts an MMD by about 1/n.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

GROUPS = 50
"""Images are left out one by one, and of more than these in so many groups: their standard error is
known to a tenth."""


def image_shares(
    measure: Callable[[NDArray[np.intp]], NDArray], count: int
) -> tuple[NDArray, NDArray]:
    """Some numbers over images, and the share that each image has in them.

    Args:
        measure: positions of images, rising, (m,) → the numbers over them (s,).
        count: how many images there are; `measure` sees all of them, and all but a group.

    Returns:
        The numbers (s,), and by group shares (g, s), of which these are the means and whose
        standard errors are theirs. Image i is of group i modulo g.
    """
    images = np.arange(count)
    group = images % min(count, GROUPS)
    whole = measure(images)
    without = np.stack([measure(images[group != one]) for one in range(group.max() + 1)])
    # Efron & Tibshirani 1993, Chapter 11: pseudo-values, here about the number itself
    return whole, whole + (len(without) - 1) * (without.mean(0) - without)
