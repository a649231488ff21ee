"""The network inside a denoiser: the inputs, checks and recomputation that all types share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from ldm.config import Config, Width
from ldm.device import to_device
from ldm.errors import LdmError


class NetworkSizes(Config):
    """The fields that the configs of all networks share."""

    type: str
    """Type of the network."""
    latent_channels: Width = 4
    """Channels of the latents, in and out; taken from stage one."""
    classes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Number of classes, 0: unconditional; taken from the data."""
    augment_parameters: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of values that describe an augmentation, 0: none; taken from the recipe."""


class Network(nn.Module, ABC):
    """F(x; c_noise), the network inside a denoiser, and the checks of its inputs.

    Args:
        config: sizes of the network.
        embed: (c_noise, labels, augment) → (B, width), which every block reads.

    Attributes:
        factor: both sides of a latent must be multiples of it.
        recompute: set by `checkpoint_blocks`.
    """

    recompute = False

    def __init__(self, config: Any, embed: nn.Module) -> None:
        super().__init__()
        self.config, self.factor, self.embed = config, config.factor, embed

    @abstractmethod
    def transform(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The answer (B, n_z, H, W) to x (B, n_z, H, W) and an embedding (B, width)."""

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """F(x; c_noise), of which a denoiser makes its answer: (B, n_z, H, W).

        Args:
            x: scaled noisy latents (B, n_z, H, W).
            c_noise: noise levels (B,) as the network counts them: ¼ ln σ, or a time step.
            labels: classes (B,), whole numbers below `config.classes`, −1 for no class; None: −1
                throughout. Only eager mode checks their values, and only on the CPU, where that
                makes nothing wait; see `check_labels`.
            augment: parameters of the augmentation (B, config.augment_parameters); None: zeros,
                which is none.

        Raises:
            LdmError: H or W is no multiple of `factor`, or this network does not know a label, or
                takes another number of augmentation parameters.
        """
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            raise LdmError(
                f"latents of {height}×{width} do not fit this {type(self).__name__}: "
                f"both sides must be multiples of {self.factor}"
            )
        self._check_condition(len(x), labels, augment)
        # weights of classes and augmentations have a gradient in every step, as DDP expects
        if labels is None:
            labels = torch.full((len(x),), -1, device=x.device)
        labels = to_device(labels, x.device)
        if augment is None:
            augment = x.new_zeros(len(x), self.config.augment_parameters)
        return self.transform(x, self.embed(c_noise, labels, augment))

    def run(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run a part of the network, such as a block; see `checkpoint_blocks`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def checkpoint_blocks(self) -> None:
        """Let every block keep only its inputs, and recompute the rest in the backward pass.

        Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the same gradients, bit for
        bit, and the same state dict, for about a third more time and much less memory.
        """
        self.recompute = True

    def _check_condition(self, batch: int, labels: Tensor | None, augment: Tensor | None) -> None:
        classes, parameters = self.config.classes, self.config.augment_parameters
        integers = torch.int32, torch.int64
        if labels is not None and (labels.shape != (batch,) or labels.dtype not in integers):
            raise LdmError(
                f"labels are {labels.dtype} {tuple(labels.shape)}: they must be int64 ({batch},)"
            )
        if labels is not None and labels.device.type == "cpu" and not is_compiling():
            check_labels(labels, classes)
        if augment is not None and augment.shape != (batch, parameters):
            raise LdmError(
                f"augmentation parameters are {tuple(augment.shape)}: for {batch} image(s) this "
                f"network takes ({batch}, {parameters})"
            )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise an LdmError unless labels (B,), on the CPU, lie between −1 and `classes` − 1.

    For a network on a GPU, check labels before they are copied there.
    """
    wrong = labels[(labels < -1) | (labels >= classes)]
    if len(wrong) and not classes:
        raise LdmError(
            f"label {wrong[0]} was given to a network without classes: leave labels out, "
            "or train a network on labelled images"
        )
    if len(wrong):
        raise LdmError(
            f"label {wrong[0]} is none of this network's {classes} classes: use 0 to "
            f"{classes - 1}, or −1 for none"
        )


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with its parameters at 0, so that a residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoids(positions: Tensor, width: int, shift: int = 0) -> Tensor:
    """Cosines, then sines, of positions (B,) at falling frequencies → (B, width), width even.

    In float32, or in the positions' dtype where that is finer: a time step of 999 needs it.
    """
    # Vaswani et al. 2017, Section 3.5: frequencies 10000^(−i / (width/2)), or spaced wider
    ramp = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(-math.log(10_000) * ramp / (width // 2 - shift))
    angles = positions[:, None] * frequencies  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
