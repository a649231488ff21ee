"""Speed on a CPU, where no gradient is wanted: memory, layout and batch sizes.

The models compute the same without this module, to rounding, and slower. On other devices, and
while training, its functions do what their first lines say and nothing more.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PIXELS_AT_ONCE = defaultdict(lambda: 2 * 256**2, sdvae=256**2, decoder=256**2)
"""Pixels of the images that go through a network at once, by an encoder's `type`, or `decoder`."""


def in_small_batches(
    network: Callable[[Tensor], Tensor], x: Tensor, pixels: int, at_once: int
) -> Tensor:
    """Apply `network` to x: images of `pixels` pixels each, or their latents.

    On a CPU, to at most `at_once` ÷ `pixels` images at a time, and at least one: the features of
    more leave its caches.
    """
    few = max(at_once // max(pixels, 1), 1)
    if x.device.type != "cpu" or torch.is_grad_enabled() or len(x) <= few:
        return network(x)
    return torch.cat([network(part) for part in x.split(few)])


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W), on a CPU with the channels last in memory.

    Convolutions then need not reorder their input and output each time. With gradients it does not
    pay: in that layout GroupNorm's backward pass is slow.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def chain(x: Tensor, *parts: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply the parts one after another: `nn.Sequential` without a place in the state dict.

    Each value is freed once it is read, and `F.silu` overwrites what it reads, except `x`: on a
    CPU the memory of a new tensor costs several times what the function does.
    """
    h = x
    for part in parts:
        if part is F.silu:
            h = F.silu(h, inplace=h is not x and not torch.is_grad_enabled())
        else:
            h = part(h)
    return h
