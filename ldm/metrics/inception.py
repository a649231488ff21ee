"""Inception's features of images, exactly as clean-fid makes them (Parmar et al. 2022).

Its mode `clean`: clean-fid's own resizer (bicubic with antialiasing, floats kept) before the
TorchScript Inception it uses. Its mode `legacy-tensorflow`: the same file resizes by itself, as the
first FIDs' TensorFlow graph did (bilinear, not antialiased). Neither needs clean-fid's downloader,
which writes to a fixed folder and leaves broken files there.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm.errors import LdmError
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
        self._mode = mode
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
        if self._mode == "clean":
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
