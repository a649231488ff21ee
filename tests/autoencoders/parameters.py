"""The number of parameters of a module."""

from torch import nn


def count(module: nn.Module) -> int:
    """Its number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
