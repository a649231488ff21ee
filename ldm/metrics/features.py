"""What is kept of a stream of features: all of their statistics, and a bounded sample of them.

The Fréchet distance needs only mean and covariance. KID, precision and recall need the features
themselves, and are computed on the sample. Memory does not grow with the number of images.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldm.errors import LdmError
from ldm.files import write_atomically
from ldm.metrics.fid import FeatureStatistics
from ldm.seeds import generator

FORMAT = 1
SETTINGS = ("dim", "total", "kept", "seed")
NUMBERS = ("format", *SETTINGS, "count")  # a file's `numbers`, in this order

Array = NDArray[np.float32]


class FeatureSet:
    """Mean and covariance of all features of a stream, and a random sample of them.

    Which images are in the sample is a function of (seed, total, kept): batches, their order and
    the number of processes change nothing. The statistics do not depend on them either, but for
    the last digits of float64.

    Args:
        dim: length of a feature vector.
        total: how many images will come, numbered from 0.
        kept: at most so many are in the sample; all where fewer come.
    """

    def __init__(self, dim: int, total: int, kept: int = 10_000, seed: int = 0) -> None:
        self.dim, self.total, self.kept, self.seed = dim, total, kept, seed
        self.statistics = FeatureStatistics(dim)
        self._rows: dict[int, Array] = {}  # number of an image in the sample → (dim,)
        self._chosen: range | frozenset[int] = range(total)
        if kept < total:
            draw = generator(seed, "kept features", total)
            self._chosen = frozenset(draw.choice(total, kept, replace=False).tolist())

    @property
    def count(self) -> int:
        """Images seen."""
        return self.statistics.count

    def sample(self) -> Array:
        """The features kept so far (≤ kept, dim), in the order of their images' numbers."""
        rows = [self._rows[k] for k in sorted(self._rows)]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)

    def update(self, features: Tensor, ks: Tensor | Sequence[int]) -> None:
        """Take in features (B, dim) of the images numbered `ks` (B,), each once.

        Raises:
            LdmError: the features of an image hold a NaN or an infinity.
            ValueError: the shapes do not fit, a number is not in 0 … total − 1, or one of the
                sample comes again.
        """
        values = features.detach().cpu().double().numpy()
        numbers = [int(k) for k in ks]
        if values.shape != (len(numbers), self.dim):
            raise ValueError(
                f"features must be ({len(numbers)}, {self.dim}) for {len(numbers)} images, not "
                f"{values.shape}"
            )
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.total:
            raise ValueError(
                f"images {min(numbers)} … {max(numbers)} are not within 0 … {self.total - 1}"
            )
        bad = ~np.isfinite(values).all(1)
        if bad.any():
            raise LdmError(
                f"the features of image {numbers[bad.argmax()]} hold a NaN or an infinity "
                f"({bad.sum()} of {len(numbers)} in its batch): the model that made the image, or "
                "the extractor's weights, are broken"
            )
        rows = {
            k: row.astype(np.float32)
            for k, row in zip(numbers, values, strict=True)
            if k in self._chosen
        }
        if len(rows) < sum(k in self._chosen for k in numbers):
            raise ValueError("an image has come twice in one batch: number each once")
        self._keep(rows)
        self.statistics.update(values)

    def merge(self, other: "FeatureSet") -> None:
        """Take in what another process has seen of the same images.

        Raises:
            ValueError: the other is not of the same dim, total, kept and seed, or both have seen
                an image of the sample.
        """
        if other._settings() != self._settings():
            raise ValueError(
                f"cannot merge features of (dim, total, kept, seed) = {other._settings()} into "
                f"those of {self._settings()}"
            )
        self._keep(other._rows)
        self.statistics.merge(other.statistics)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write all to a `.npz`, whole or not at all.

        Mean and covariance are in it as `mu` and `sigma`, as in other toolkits' files.

        Args:
            about: where the features come from, as JSON can hold it; `load` gives it back.

        Raises:
            LdmError: the file cannot be written.
            ValueError: fewer than two images were seen.
        """
        parts = {
            "mu": self.statistics.mean,
            "sigma": self.statistics.covariance,
            "sample": self.sample(),
            "sample_ks": np.array(sorted(self._rows), np.int64),
            "numbers": np.array([FORMAT, *self._settings(), self.count], np.int64),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }
        write_atomically(path, lambda file: np.savez(file, **parts))

    @classmethod
    def load(cls, path: Path) -> tuple["FeatureSet", dict[str, Any]]:
        """What `save` wrote: the features, and what was said about them.

        Raises:
            LdmError: the file is not there, is damaged, or is no such file.
        """
        again = "delete it to have it computed again"
        try:
            with np.load(path, allow_pickle=False) as parts:
                numbers = dict(zip(NUMBERS, parts["numbers"].tolist(), strict=True))
                if numbers["format"] == FORMAT:
                    return cls._from_parts(parts, numbers), json.loads(parts["about"].tobytes())
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise LdmError(f"could not read {path} ({error.strerror})") from error
        except Exception as error:  # damage makes a reader raise nearly anything
            raise LdmError(f"{path} is damaged or no file of features: {again}") from error
        raise LdmError(f"{path} has format {numbers['format']}, not {FORMAT}: {again}")

    @classmethod
    def _from_parts(cls, parts: Mapping[str, NDArray], numbers: Mapping[str, int]) -> "FeatureSet":
        features = cls(*(numbers[name] for name in SETTINGS))
        features.statistics = FeatureStatistics.from_moments(
            numbers["count"], parts["mu"], parts["sigma"]
        )
        sample, ks = parts["sample"], parts["sample_ks"].tolist()
        whole = features.count < features.total or len(ks) == len(features._chosen)
        if sample.shape != (len(ks), features.dim) or not whole or not np.isfinite(sample).all():
            raise ValueError("the sample is not as the numbers say")
        features._keep(dict(zip(ks, sample.astype(np.float32, copy=False), strict=True)))
        return features

    def _settings(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in SETTINGS)

    def _keep(self, rows: Mapping[int, Array]) -> None:
        again = self._rows.keys() & rows.keys()
        if again:
            raise ValueError(f"image {min(again)} has come before: number each image once")
        self._rows.update(rows)


def paired_features(
    a: ArrayLike, b: ArrayLike, least: int, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two sets of features as float64 (N, dim), (M, dim), fit for a metric that compares them.

    Args:
        least: so many of each the metric needs.
        metric: its name, for the error lines.

    Raises:
        LdmError: a set has fewer, or holds a NaN or an infinity.
        ValueError: the features are not of the same length.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, dim) and (M, dim), not {a.shape} and {b.shape}")
    if min(len(a), len(b)) < least:
        raise LdmError(
            f"{metric} of {len(a)} and {len(b)} images: it needs {least} or more on either side"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise LdmError(f"{metric}: the features hold a NaN or an infinity")
    return a, b
