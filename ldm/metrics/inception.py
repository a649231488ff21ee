"""Inception's features of images, exactly as clean-fid makes them (Parmar et al. 2022).

Its mode `clean`: clean-fid's own resizer (bicubic with antialiasing, floats kept) before the
TorchScript Inception it uses. Its mode `legacy-tensorflow`: the same file resizes by itself, as the
first FIDs' TensorFlow graph did (bilinear, not antialiased). Neither needs clean-fid's downloader,
which writes to a fixed folder and leaves broken files there.

What makes features of images: Inception as published, or a function of one's own.

A function of one's own is named `module:function`, as in `my_features:dino`. It is called once,
with the device where it takes one, and returns what is then called with images, (B, 3, H, W) uint8,
and answers (B, dim): a `torch.nn.Module` or any callable, which resizes and normalises by itself.
Its number is no FID of any paper, and compares only with others of the same function.
"""

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import file_digest, sha256
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import LdmError, UsageError
from ldm.weights import cache_folder, fetch

WEIGHTS = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

Mode = Literal["clean", "legacy-tensorflow"]
RESIZING: dict[Mode, str] = {"clean": "clean-fid", "legacy-tensorflow": "TensorFlow's legacy"}


class FeatureExtractor:
    """The pooled features of a TorchScript Inception, with where it comes from.

    Args:
        path: a TorchScript archive with the submodule `layers`, (B, 3, 299, 299) floats in
            [−1, 1) → (B, 2048). In mode `legacy-tensorflow` the archive itself is called, with
            floats (B, 3, H, W) in 0..255 and `return_features=True`.
        given: whether a person has named it. Loading TorchScript runs what is in it, so that of
            files that were only found none but the published one is loaded.

    Raises:
        LdmError: the file is not such an archive, or damaged; or it was found, and is another.
    """

    dim = 2048

    def __init__(
        self, path: Path, device: torch.device | str, mode: Mode = "clean", given: bool = True
    ) -> None:
        from cleanfid.resize import build_resizer

        content = path.read_bytes()  # once: what is loaded is what was looked at
        self.sha256 = sha256(content).hexdigest()
        if not given and not self.is_published:
            raise LdmError(
                f"{path} is damaged or not the published file (another SHA-256), and loading it "
                "would run what is in it: delete it, or give it with --weights PATH"
            )
        self.name = f"{path.name}, {RESIZING[mode]} resizing"
        self._path = path
        self._device = torch.device(device)
        self.mode = mode
        self._network = _load_network(content, path, self._device)
        self._resize = build_resizer("clean")  # (H, W, 3) uint8 → (299, 299, 3) float32, 0..255
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    @property
    def is_published(self) -> bool:
        """Whether these are the weights that published FIDs are computed with."""
        return self.sha256 == SHA256

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 2048) float32, on the CPU, of images (B, 3, H, W) uint8."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        if self.mode == "clean":
            features = self._network.layers(self._resized(images)).flatten(1)
        else:
            inputs = images.to(self._device).float()
            features = self._network(inputs, return_features=True).flatten(1)
        if features.shape != (len(images), self.dim):
            raise LdmError(
                f"{self._path} gives {features.shape[1]} features, not {self.dim}: no Inception "
                f"network; give the right {WEIGHTS} with --weights PATH"
            )
        return features.float().cpu()

    def _resized(self, images: Tensor) -> Tensor:
        """The inputs of the layers: (B, 3, 299, 299) in [−1, 1)."""
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack(list(self._threads.map(self._resize, pixels)))  # (B, 299, 299, 3)
        inputs = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self._device)
        return (inputs - 128) / 128


def load_inception(
    weights: Path | None, device: torch.device | str, mode: Mode = "clean"
) -> FeatureExtractor:
    """The extractor from a given file, else from where such files are kept, else fetched once.

    Raises:
        LdmError: the weights are not there and cannot be fetched, or are damaged.
    """
    if weights is not None:
        if not weights.is_file():
            raise LdmError(f"no Inception weights at {weights}: give {WEIGHTS} with --weights PATH")
        return FeatureExtractor(weights, device, mode)
    from cleanfid.downloads_helper import inception_url

    path = published_weights() or fetch(
        WEIGHTS, inception_url, SHA256, weight_folders()[0], "give it with --weights PATH"
    )
    return FeatureExtractor(path, device, mode, given=False)


def weight_folders() -> list[Path]:
    """Where the weights may lie: our cache, where clean-fid puts them, torch's checkpoints."""
    return [cache_folder(), Path("/tmp"), Path(torch.hub.get_dir()) / "checkpoints"]


def published_weights() -> Path | None:
    """The published file where one of the folders has it; others of its name are passed over."""
    paths = (folder / WEIGHTS for folder in weight_folders())
    return next((path for path in paths if path.is_file() and digest(path) == SHA256), None)


def digest(path: Path) -> str:
    """A file's SHA-256; "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:  # another person's
        return ""


def _load_network(content: bytes, path: Path, device: torch.device) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript; the published weights exist in no other form
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(BytesIO(content), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise LdmError(
            f"{path} is damaged or no TorchScript file: give the published {WEIGHTS} with "
            "--weights PATH, or leave --weights out to have it found or fetched"
        ) from error
    if not hasattr(network, "layers"):
        raise LdmError(
            f"{path} is TorchScript but no Inception network: give {WEIGHTS} with --weights PATH"
        )
    return network


EXPECTED = "function(device) → callable(uint8 images (B, 3, H, W)) → (B, dim)"
"""What `module:function` must be; the device may be left out."""


class Extractor(Protocol):
    """Features (B, dim) float32, on the CPU, of images (B, 3, H, W) uint8."""

    name: str  # what it is, in words
    sha256: str | None  # of its weights (Inception) or its source; None where there is no file
    dim: int
    mode: Mode | None  # Inception's resizing; None where the extractor resizes by itself
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

    mode, is_published = None, False

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
