"""What makes features of images: Inception as published, or a function of one's own.

A function of one's own is named `module:function`, as in `my_features:dino`. It is called once,
with the device where it takes one, and returns what is then called with images, (B, 3, H, W) uint8,
and answers (B, dim): a `torch.nn.Module` or any callable, which resizes and normalises by itself.
Its number is no FID of any paper, and compares only with others of the same function.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from ldm.errors import LdmError, UsageError
from ldm.metrics.inception import Mode, load_inception

EXPECTED = "function(device) → callable(uint8 images (B, 3, H, W)) → (B, dim)"
"""What `module:function` must be; the device may be left out."""


class Extractor(Protocol):
    """Features (B, dim) float32, on the CPU, of images (B, 3, H, W) uint8."""

    name: str  # what it is, in words
    sha256: str | None  # of its weights (Inception) or its source; None where there is no file
    dim: int
    is_published: bool  # whether published FIDs are computed with it

    def __call__(self, images: Tensor) -> Tensor: ...


def load_extractor(
    spec: str | None,
    mode: Mode,
    weights: Path | None,
    device: torch.device | str,
    resolution: int = 256,
) -> Extractor:
    """Inception, or the extractor that a person has written.

    Args:
        spec: `module:function`, importable from the current folder or installed; None is
            Inception.
        mode: Inception's resizing: clean-fid's, or that of the first FIDs.
        weights: of Inception; by default from where it usually lies, or fetched.
        resolution: one's own function is tried on two grey images of this edge.

    Raises:
        UsageError: the mode does not exist; the spec names nothing that can be called, or comes
            with options that are Inception's.
        LdmError: the weights cannot be had; or one's own function fails, or gives no features.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"mode '{mode}' does not exist: use {' or '.join(get_args(Mode))}")
    if spec is None:
        return load_inception(weights, device, mode)
    if weights is not None or mode != "clean":
        raise UsageError(
            f"--features {spec} loads and resizes by itself: leave out the weights and the mode, "
            "which are Inception's"
        )
    return OwnExtractor(spec, device, resolution)


class OwnExtractor:
    """The extractor behind `module:function`, its answers held to what features must be.

    Args:
        spec: `module:function`.
        resolution: it is tried on two grey images of this edge.

    Raises:
        UsageError: the spec names nothing that can be called.
        LdmError: it fails, or gives no features.
    """

    is_published = False

    def __init__(self, spec: str, device: torch.device | str, resolution: int = 256) -> None:
        self.name = spec
        self._device = torch.device(device)
        function = _find_function(spec)
        self.sha256 = _source_hash(function)
        make = _with_device(function, self._device)
        self._extract = self._attempt("to be made", make, instead=f"; it must be {EXPECTED}")
        if not callable(self._extract):
            raise LdmError(
                f"--features {spec} returned {type(self._extract).__name__}, which cannot be "
                f"called with images: it must be {EXPECTED}"
            )
        if isinstance(self._extract, nn.Module):
            self._extract = self._extract.to(self._device).eval()
        grey = torch.full((2, 3, resolution, resolution), 128, dtype=torch.uint8)
        self.dim = self._features(grey).shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, dim) float32, on the CPU, of images (B, 3, H, W) uint8.

        Raises:
            LdmError: the function fails, or answers otherwise than it first did.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        features = self._features(images)
        if features.shape[1] != self.dim:
            raise LdmError(
                f"--features {self.name} gave {features.shape[1]} features an image, and "
                f"{self.dim} at first: it must give as many for images of any size"
            )
        return features

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        given = f"on uint8 images {tuple(images.shape)}"
        features = self._attempt(given, self._extract, images.to(self._device))
        if not isinstance(features, Tensor):
            answer = f"gave {type(features).__name__}"
        elif features.ndim != 2 or len(features) != len(images) or not features.shape[1]:
            answer = f"gave {tuple(features.shape)}"
        else:
            return features.float().cpu()
        raise LdmError(
            f"--features {self.name} {answer} for images {tuple(images.shape)}: it must give a "
            f"tensor ({len(images)}, dim)"
        )

    def _attempt(
        self, what: str, function: Callable[..., Any], *arguments: Any, instead: str = ""
    ) -> Any:
        """Call what a person has written; where it fails, say so in one line."""
        try:
            return function(*arguments)
        except LdmError:
            raise
        except Exception as error:
            told = f"{_one_line(error)}{instead}"
            raise LdmError(f"--features {self.name} failed {what}: {told}") from error


def _find_function(spec: str) -> Callable[..., Any]:
    module_name, colon, path = spec.partition(":")
    if not (colon and module_name and path):
        raise UsageError(f"--features {spec} names no function: write module:function")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: a file in the current folder
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"--features {spec}: no module '{error.name}' is in {Path.cwd()} or installed"
            ) from error
        raise LdmError(f"--features {spec} cannot be imported: {_one_line(error)}") from error
    except Exception as error:  # a person's module may raise anything
        raise LdmError(f"--features {spec} cannot be imported: {_one_line(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise UsageError(f"--features {spec}: '{name}' is not in {module_name}")
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(f"--features {spec} is {type(found).__name__}, which cannot be called")
    return found


def _with_device(function: Callable[..., Any], device: torch.device) -> Callable[[], Any]:
    """The call that makes the extractor: with the device where there is a parameter for it."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: it does not say
        return function
    if any(p.name == "device" and p.kind is not p.POSITIONAL_ONLY for p in parameters):
        return partial(function, device=device)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return partial(function, device) if len(required) == 1 else function


def _source_hash(function: Callable[..., Any]) -> str | None:
    """SHA-256 of the file that the function is written in, its helpers with it."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object, or written in C
        path = getattr(sys.modules.get(type(function).__module__), "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return sha256(Path(path).read_bytes()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
