"""Feature extractors: Inception exactly as in clean-fid (Parmar et al. 2022), or a user's function.

Mode `clean` resizes by clean-fid's own resizer (bicubic with antialiasing, in floats) before the
TorchScript Inception that it uses. In mode `legacy-tensorflow` the same file resizes the images, as
the original FID code in TensorFlow did (bilinear, without antialiasing). clean-fid's downloader is
not used: it writes to a fixed folder and leaves broken files there.

A user's function is given as `module:function`, such as `my_features:dino`. It is called once, with
the device if it has such a parameter, and returns a `torch.nn.Module` or any callable that maps
images, (B, 3, H, W) uint8, to features (B, dim); it resizes and normalises them itself. Its
distances compare with others of the same function only, not with published FIDs.

The same pass through Inception gives two more outputs, as ADM's evaluator (Dhariwal & Nichol 2021)
defines them: spatial features for sFID, and class probabilities for the Inception Score.
"""

import inspect
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from importlib import import_module
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config import Resolution, height_width
from ldm.errors import LdmError, UsageError
from ldm.files import sha256_of
from ldm.hub import cache_folder, fetch

WEIGHTS = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
EXPECTED = "function(device) → callable(uint8 images (B, 3, H, W)) → (B, dim)"

Mode = Literal["clean", "legacy-tensorflow"]
RESIZING: dict[Mode, str] = {"clean": "clean-fid", "legacy-tensorflow": "TensorFlow's legacy"}
SIDE = 299
"""Side of Inception's images, pixels."""
Output = Literal["sfid", "is"]
OUTPUTS: dict[Output, tuple[str, int]] = {
    "sfid": ("spatial features", 2023),
    "is": ("class probabilities", 1008),
}
"""Further outputs of Inception, by the metrics that need them: description, and numbers."""
SPATIAL_LAYER, SPATIAL_CHANNELS = "mixed_6", 7


class Extractor(ABC):
    """Features of images.

    Attributes:
        name: a description for people.
        dim: length of a feature vector.
        sha256: hash of Inception's weights or of a function's source; None if it has no file.
        mode: Inception's resizing; None for a function, which resizes itself.
    """

    name: str
    dim: int
    sha256: str | None
    mode: Mode | None = None

    @property
    def is_published(self) -> bool | None:
        """True for the weights that published distances use; None: it is not known."""
        return self.sha256 == SHA256

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute features (B, dim) float32, on the CPU, of images (B, 3, H, W) uint8."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(
                f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        return self._features(images).float().cpu()

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor: ...


def load_extractor(
    spec: str | None,
    mode: Mode,
    weights: Path | None,
    device: torch.device | str,
    resolution: Resolution = 256,
) -> Extractor:
    """Load Inception, or a user's `spec`: a `module:function`, installed or in the current folder.

    The function is tested on two grey images of `resolution`.
    """
    if mode not in get_args(Mode):
        raise UsageError(f"mode '{mode}' does not exist: use {' or '.join(get_args(Mode))}")
    if spec is None:
        return FeatureExtractor(weights, device, mode)
    if weights is not None or mode != "clean":
        raise UsageError(
            f"--features {spec} loads and resizes by itself: leave out the weights and the mode, "
            "which are Inception's"
        )
    return FunctionExtractor(spec, device, resolution)


def refuse_channels(channels: int) -> str | None:
    """The reason for which no extractor takes images of that many channels, if so."""
    if channels in (1, 3):
        return None
    return f"feature extractors take images of 1 or 3 channels, and these have {channels}"


def describe_channels(channels: int) -> str:
    """Say what networks of colour images see of images of that many channels."""
    if channels == 1:
        return "grey images: features and LPIPS are of the channel repeated to three"
    return f"images of {channels} channels: LPIPS is of each channel, repeated to three"


# -------------------------------------------------------------------------------- Inception
class FeatureExtractor(Extractor):
    """The pooled features of a TorchScript Inception.

    Args:
        weights: a TorchScript archive with the submodule `layers`, (B, 3, 299, 299) floats in
            [−1, 1) → (B, 2048). In mode `legacy-tensorflow` the archive itself is called, with
            floats (B, 3, H, W) in 0..255 and `return_features=True`. None: the published one,
            found in the usual caches or downloaded.
        mode: the resizing.
    """

    dim = 2048

    def __init__(
        self, weights: Path | None, device: torch.device | str, mode: Mode = "clean"
    ) -> None:
        from cleanfid.downloads_helper import inception_url
        from cleanfid.resize import build_resizer

        path = weights or published_weights()
        if path is None:
            advice = "give it with --weights PATH"
            path = fetch(WEIGHTS, inception_url, SHA256, weight_folders()[0], advice)
        if not path.is_file():
            raise LdmError(f"no Inception weights at {path}: give {WEIGHTS} with --weights PATH")
        content = path.read_bytes()  # once: the bytes that are loaded are the bytes checked
        self.sha256 = sha256(content).hexdigest()
        if weights is None and not self.is_published:
            raise LdmError(
                f"{path} is damaged or not the published file (another SHA-256), and loading it "
                "would run its code: delete it, or give it with --weights PATH"
            )
        self.name = f"{path.name}, {RESIZING[mode]} resizing"
        self.mode = mode
        self._path, self._device = path, torch.device(device)
        self._network = _load_network(content, path, self._device)
        self._resize = build_resizer("clean")  # (H, W, 3) uint8 → (299, 299, 3) float32, 0..255
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self._is_spatial = False
        self._last: tuple[Tensor, dict[str, Tensor]] | None = None

    def output(self, name: Output) -> "InceptionOutput":
        """Return another output of the network, from the same pass, as an extractor."""
        layers, head = self._network.layers, getattr(self._network, "output", None)
        if not (hasattr(layers, SPATIAL_LAYER) if name == "sfid" else hasattr(head, "weight")):
            raise LdmError(
                f"{self._path} has no {OUTPUTS[name][0]}: give the published {WEIGHTS} with "
                f"--weights PATH, or omit the metric {name}"
            )
        self._is_spatial |= name == "sfid"
        return InceptionOutput(self, name)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the pooled features `fid`, and `sfid` if it is wanted, once for each batch.

        The network is called layer by layer where the spatial features are wanted.
        """
        if self._last is None or self._last[0] is not images:
            self._last = images, self._run(images)
        return self._last[1]

    def probabilities(self, images: Tensor) -> Tensor:
        """Compute the probabilities of the network's classes, (B, 1008)."""
        # without the bias, as the first Inception Scores were computed
        logits: Tensor = self._features(images) @ self._network.output.weight.T
        return logits.softmax(1)

    def _features(self, images: Tensor) -> Tensor:
        features = self.outputs(images)["fid"]
        if features.shape != (len(images), self.dim):
            raise LdmError(
                f"{self._path} gives {features.shape[1]} features, not {self.dim}: no Inception "
                f"network; give the right {WEIGHTS} with --weights PATH"
            )
        return features

    def _run(self, images: Tensor) -> dict[str, Tensor]:
        if self.mode == "clean":
            pixels = images.permute(0, 2, 3, 1).cpu().numpy()
            resized = np.stack(list(self._threads.map(self._resize, pixels)))  # (B, 299, 299, 3)
            inputs = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self._device)
        else:
            inputs = images.to(self._device).float()
            if not self._is_spatial:
                return {"fid": self._network(inputs, return_features=True).flatten(1)}
            inputs = resize_as_tensorflow(inputs, SIDE)
        x = (inputs - 128) / 128
        if not self._is_spatial:
            return {"fid": self._network.layers(x).flatten(1)}
        found = {}
        for name, layer in self._network.layers.named_children():
            if name == SPATIAL_LAYER:
                # Nash et al. 2021 (arXiv 2103.03841): the first 7 maps of this layer, of 17×17;
                # the statistics that ADM publishes have the channels last
                maps = layer.conv(x)[:, :SPATIAL_CHANNELS]
                found["sfid"] = maps.permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        return found | {"fid": x.flatten(1)}


class InceptionOutput(Extractor):
    """Another output of Inception: spatial features (B, 2023), or class probabilities (B, 1008).

    It comes from the same pass as the pooled features, if called with the same tensor of images.
    """

    def __init__(self, whole: FeatureExtractor, output: Output) -> None:
        self._whole, self._output = whole, output
        what, self.dim = OUTPUTS[output]
        self.name, self.sha256, self.mode = f"{whole.name}, {what}", whole.sha256, whole.mode

    def _features(self, images: Tensor) -> Tensor:
        if self._output == "is":
            found = self._whole.probabilities(images)
        else:
            found = self._whole.outputs(images)["sfid"]
        if found.shape != (len(images), self.dim):
            raise LdmError(f"{self.name}: {found.shape[1]} numbers, not {self.dim}: no Inception")
        return found


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Resize images (B, C, H, W) to side × side as TensorFlow 1's `resize_bilinear` did.

    Row i of the result lies at i·H/side of the image: its first rows fall on each other, and
    nothing is antialiased.
    """
    for dim in (2, 3):
        size = images.shape[dim]
        place = torch.arange(side, device=images.device) * torch.tensor(size / side)
        low = place.long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        weight = (place - low).view(-1, 1) if dim == 2 else place - low
        before, after = (images.index_select(dim, rows) for rows in (low, high))
        images = before + (after - before) * weight
    return images


def weight_folders() -> list[Path]:
    """List the folders that may hold the weights: our cache, clean-fid's, torch's."""
    return [cache_folder(), Path("/tmp"), Path(torch.hub.get_dir()) / "checkpoints"]


def published_weights() -> Path | None:
    """Find the published file in one of the folders; other files of its name are ignored."""
    paths = (folder / WEIGHTS for folder in weight_folders())
    return next((path for path in paths if digest(path) == SHA256), None)


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file; "" if it is absent or unreadable."""
    try:
        return sha256_of(path)
    except OSError:
        return ""


def _load_network(content: bytes, path: Path, device: torch.device) -> Any:
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


# ------------------------------------------------------------------------- a user's function
class FunctionExtractor(Extractor):
    """The extractor of `module:function`; its output is checked."""

    def __init__(self, spec: str, device: torch.device | str, resolution: Resolution = 256) -> None:
        self.name = spec
        self._device = torch.device(device)
        function = _find_function(spec)
        self.sha256 = _source_hash(function)
        make = _with_device(function, self._device)
        self._extract = self._call("to be made", make, advice=f"; it must be {EXPECTED}")
        if not callable(self._extract):
            kind = type(self._extract).__name__
            raise LdmError(
                f"--features {spec} returned {kind}, which cannot be called with images: it must "
                f"be {EXPECTED}"
            )
        if isinstance(self._extract, nn.Module):
            self._extract = self._extract.to(self._device).eval()
        self.dim = 0  # unknown before the first images
        grey = torch.full((2, 3, *height_width(resolution)), 128, dtype=torch.uint8)
        self.dim = self(grey).shape[1]

    def _features(self, images: Tensor) -> Tensor:
        on = f"on uint8 images {tuple(images.shape)}"
        features = self._call(on, self._extract, images.to(self._device))
        if isinstance(features, Tensor) and features.ndim == 2:
            count, dim = features.shape
            if count == len(images) and dim and self.dim in (0, dim):
                return features
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise LdmError(
            f"--features {self.name} gave {found} for images {tuple(images.shape)}: it must give a "
            f"tensor ({len(images)}, {self.dim or 'dim'})"
        )

    def _call(self, what: str, function: Callable[..., Any], *args: Any, advice: str = "") -> Any:
        try:
            return function(*args)
        except LdmError:
            raise
        except Exception as error:
            raise LdmError(
                f"--features {self.name} failed {what}: {_one_line(error)}{advice}"
            ) from error


def _find_function(spec: str) -> Callable[..., Any]:
    module_name, _, path = spec.partition(":")
    if not (module_name and path):
        raise UsageError(f"--features {spec} names no function: write module:function")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: a file in the current folder
    try:
        found: Any = import_module(module_name)
    except Exception as error:  # a module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(
                f"--features {spec}: no module '{missing}' is in {Path.cwd()} or installed"
            ) from error
        raise LdmError(f"--features {spec} cannot be imported: {_one_line(error)}") from error
    try:
        found = attrgetter(path)(found)
    except AttributeError as error:
        raise UsageError(f"--features {spec}: '{path}' is not in {module_name}") from error
    if not callable(found):
        raise UsageError(f"--features {spec} is {type(found).__name__}, which cannot be called")
    return found


def _with_device(function: Callable[..., Any], device: torch.device) -> Callable[[], Any]:
    """Bind the device to the parameter of that name, or to the only required one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return function
    if any(p.name == "device" and p.kind is not p.POSITIONAL_ONLY for p in parameters):
        return partial(function, device=device)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return partial(function, device) if len(required) == 1 else function


def _source_hash(function: Callable[..., Any]) -> str | None:
    """Compute the SHA-256 of the file that defines the function."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object, or written in C
        path = getattr(sys.modules.get(type(function).__module__), "__file__", None)
    if path is None or not Path(path).is_file():
        return None
    return sha256(Path(path).read_bytes()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
