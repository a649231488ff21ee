"""Features of a set of images: statistics of all of them, and a bounded sample.

The Fréchet distance needs the mean and covariance alone; KID, precision and recall are computed on
the sample. Memory does not grow with the number of images.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldm.data.sources import Source
from ldm.data.transforms import MAX_PIXELS
from ldm.errors import LdmError
from ldm.files import write_atomically
from ldm.hub import cache_folder, find_or_fetch
from ldm.records import ArrayFile, parse_json, read_arrays
from ldm.seeds import generator

FORMAT = 1
MOST, MOST_KEPT = 10**9, 10**6
"""Images, and those of them in the sample, in a file that is read back."""
KEPT = 10_000
"""Features in the sample."""

Array = NDArray[np.float64]
Rows = NDArray[np.float32]


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, in float64.

    Sets are merged by Chan, Golub & LeVeque 1983, Equations 2.1, which sum squares about the means,
    so that a large mean costs no precision.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean: Array = np.zeros(dim)
        self._scatter: Array = np.zeros((dim, dim))  # Σ (x − mean)(x − mean)ᵀ

    @classmethod
    def from_moments(
        cls, count: int, mean: ArrayLike, covariance: ArrayLike
    ) -> "FeatureStatistics":
        """Build the statistics of `count` features from mean (dim,) and covariance (dim, dim)."""
        mu, sigma = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mu.ndim != 1 or not len(mu) or sigma.shape != mu.shape * 2:
            raise ValueError(
                f"mean {mu.shape} and covariance {sigma.shape} do not fit: need (dim,) and "
                "(dim, dim)"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("mean or covariance hold a NaN or an infinity")
        if count < 2:
            raise ValueError(f"a covariance needs two features or more, not {count}")
        statistics = cls(len(mu))
        statistics._add(count, mu, sigma * (count - 1))
        return statistics

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self._mean)

    @property
    def mean(self) -> Array:
        """Mean (dim,); a ValueError without features."""
        if self.count < 1:
            raise ValueError("the mean of no features: update first")
        return self._mean.copy()

    @property
    def covariance(self) -> Array:
        """Covariance (dim, dim), divided by count − 1 as in published FIDs."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two features or more, not {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor | Array) -> None:
        """Add features (B, dim); a ValueError if the shape is wrong or one is not finite."""
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"features must be (B, {self.dim}), not {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("features hold a NaN or an infinity")
        if len(values):
            mean = values.mean(0)
            deviations = values - mean
            self._add(len(values), mean, deviations.T @ deviations)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the features of other statistics."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of {other.dim} into those of {self.dim}")
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def _add(self, count: int, mean: Array, scatter: Array) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total


class FeatureSet:
    """Mean and covariance of the features of a set of images, and a random sample of them.

    The sample is a function of (seed, total, kept), for any batches, order and processes. So are
    the statistics, up to rounding in float64.

    Args:
        dim: length of a feature vector.
        total: number of images, numbered from 0.
        kept: size of the sample; at most `total`.
    """

    def __init__(self, dim: int, total: int, kept: int = KEPT, seed: int = 0) -> None:
        self.dim, self.total, self.kept, self.seed = dim, total, kept, seed
        self.statistics = FeatureStatistics(dim)
        self._rows: dict[int, Rows] = {}  # number of an image in the sample → (dim,)
        self._chosen: range | frozenset[int] = range(total)
        if kept < total:
            draw = generator(seed, "kept features", total)
            self._chosen = frozenset(draw.choice(total, kept, replace=False).tolist())

    @property
    def count(self) -> int:
        """Number of images seen."""
        return self.statistics.count

    def sample(self) -> Rows:
        """Return the features kept so far (≤ kept, dim), in the order of their images' numbers."""
        rows = [self._rows[k] for k in sorted(self._rows)]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)

    def update(self, features: Tensor, ks: Tensor | Sequence[int]) -> None:
        """Add features (B, dim) of the images numbered `ks` (B,), each once.

        Raises:
            LdmError: the features of an image hold a NaN or an infinity.
            ValueError: a shape, number or repetition is wrong.
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
        self._keep((k, values[i]) for i, k in enumerate(numbers) if k in self._chosen)
        self.statistics.update(values)

    def merge(self, other: "FeatureSet") -> None:
        """Add the features that another process has seen of the same images."""
        if other._settings() != self._settings():
            raise ValueError(
                f"cannot merge features of (dim, total, kept, seed) = {other._settings()} into "
                f"those of {self._settings()}"
            )
        self._keep(other._rows.items())
        self.statistics.merge(other.statistics)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Write a `.npz`, atomically, with mean and covariance as `mu` and `sigma`.

        Args:
            about: the origin of the features, as JSON; `load` returns it.
        """
        parts: dict[str, Any] = {
            "mu": self.statistics.mean,
            "sigma": self.statistics.covariance,
            "sample": self.sample(),
            "sample_ks": np.array(sorted(self._rows), np.int64),
            "numbers": np.array([FORMAT, *self._settings(), self.count], np.int64),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }
        write_atomically(path, lambda file: np.savez(file, **parts))

    @classmethod
    def load(cls, path: Path, advice: str = "delete it") -> tuple["FeatureSet", dict[str, Any]]:
        """Read the features and `about` that `save` wrote; an LdmError if the file is damaged."""
        parts = read_arrays(path, advice)
        try:
            if any(part.dtype.kind not in "iuf" for part in parts.values()):
                raise ValueError("complex numbers or text")
            form, dim, total, kept, seed, count = parts["numbers"].tolist()
            if form == FORMAT:
                rows, ks = parts["sample"], parts["sample_ks"]
                statistics = FeatureStatistics.from_moments(count, parts["mu"], parts["sigma"])
                about = parse_json(parts["about"].tobytes())
                if (
                    # the sample is drawn again: its size is checked before memory is requested
                    not count <= total <= MOST
                    or min(kept, total) > max(len(ks), MOST_KEPT)
                    or (dim, rows.shape) != (statistics.dim, (len(ks), dim))
                    or not (np.isfinite(rows).all() and isinstance(about, dict))
                ):
                    raise ValueError("its parts do not fit each other")
                features = cls(dim, total, kept, seed)
                if count == total and len(ks) != len(features._chosen):
                    raise ValueError("the sample is not complete")
                features.statistics = statistics
                features._keep(zip(ks.tolist(), rows, strict=True))
                return features, about
        except Exception as error:  # damaged files raise errors of nearly any type
            raise LdmError(f"{path} is damaged or no file of features: {advice}") from error
        raise LdmError(f"{path} has format {form}, not {FORMAT}: {advice}")

    def _settings(self) -> tuple[int, int, int, int]:
        return self.dim, self.total, self.kept, self.seed

    def _keep(self, rows: Iterable[tuple[int, NDArray]]) -> None:
        for k, row in rows:
            if k in self._rows:
                raise ValueError(f"image {k} has come before: number each image once")
            self._rows[k] = row.astype(np.float32)


def paired_features(a: ArrayLike, b: ArrayLike, least: int, metric: str) -> tuple[Array, Array]:
    """Convert two sets of features to float64 (N, dim), (M, dim); check that they are finite, and
    at least `least` each."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (N, dim) and (M, dim), not {x.shape} and {y.shape}")
    if min(len(x), len(y)) < least:
        raise LdmError(
            f"{metric} of {len(x)} and {len(y)} images: it needs {least} or more on either side"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise LdmError(f"{metric}: the features hold a NaN or an infinity")
    return x, y


# ------------------------------------------------------------------- clean-fid's statistics
ADDRESS = "https://www.cs.cmu.edu/~clean-fid/stats"

PUBLISHED = {
    "ffhq256": ("trainval70k", 256, 70_000, "box"),
    "ffhq1024": ("trainval70k", 1024, 70_000, None),
    "ffhq256-50k": ("trainval", 256, 50_000, "box"),
    "ffhq1024-50k": ("trainval", 1024, 50_000, None),
}
"""Statistics that clean-fid publishes: split, resolution, images, and filter of downsampling.

They are mean and covariance of Inception's features of FFHQ (Parmar et al. 2022). At 256² they are
of the data set's own tfrecords, downsampled from 1024² by averaging.
"""


def read_published(name: str, mode: str) -> tuple[Path, FeatureStatistics]:
    """Find or fetch one of the `PUBLISHED` statistics for a mode of resizing; read them."""
    split, side, images, _ = PUBLISHED[name]
    # the name that clean-fid gives and looks for
    file = f"ffhq_{mode.replace('-', '_')}_{split}_{side}.npz"
    instead = "compare with your own images by --data"
    path = find_or_fetch(file, f"{ADDRESS}/{file}", "", statistics_folders(), instead)
    try:
        parts = read_arrays(path)
        return path, FeatureStatistics.from_moments(images, parts["mu"], parts["sigma"])
    except (LdmError, KeyError, ValueError, TypeError) as error:
        raise LdmError(f"{path} is damaged: delete it to have it fetched again") from error


def statistics_folders() -> list[Path]:
    """Return the folders that may hold clean-fid's statistics: our cache, and its own."""
    import cleanfid

    return [cache_folder() / "statistics", Path(cleanfid.__file__).parent / "stats"]


# ---------------------------------------------------------------------- ADM's reference batches
MOST_IMAGES = 10**6
MOMENTS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}


class ReferenceBatch(Source):
    """A .npz as ADM's evaluator reads it (Dhariwal & Nichol 2021): images, statistics, or both.

    `arr_0` holds images (N, H, W, 3) uint8 and, optionally, `arr_1` their classes (N,); `mu`,
    `sigma`, `mu_s` and `sigma_s` mean and covariance of Inception's pooled and spatial features of
    a whole data set, whose size the file does not say. Images are quick to read in their order.

    Attributes:
        path: the file.
        shape: H, W; (0, 0) without images.
        given: the metrics whose statistics are in the file.
        is_adm: False for `mu` and `sigma` alone, as clean-fid, pytorch-fid and EDM write them:
            the file does not state how their images were resized.

    Raises:
        LdmError: an array is of another type or shape; also when it is read.
    """

    def __init__(self, path: Path, advice: str) -> None:
        self.path = path
        self._file, self._advice = ArrayFile(path, advice), advice
        self._rows: Iterator[NDArray[Any]] = iter(())
        self._next, self._count, self.shape = -1, 0, (0, 0)
        headers = self._file.headers
        self.given = tuple(name for name, pair in MOMENTS.items() if {*pair} & headers.keys())
        self.is_adm = bool({"arr_0", "mu_s"} & headers.keys())
        if (images := headers.get("arr_0")) is not None:
            shape, kind = images
            if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
                self._refuse(f"arr_0 is {kind} {shape}, not images: uint8 (N, H, W, 3)")
            if not 2 <= shape[0] <= MOST_IMAGES:
                self._refuse(f"arr_0 holds {shape[0]:,} images, not 2 to {MOST_IMAGES:,}")
            if shape[1] * shape[2] > MAX_PIXELS:  # each is read as a whole
                self._refuse(f"arr_0 holds images of more than {MAX_PIXELS:,} pixels")
            self._count, self.shape = shape[0], (shape[1], shape[2])
        if (labels := headers.get("arr_1")) is not None:
            shape, kind = labels
            if shape != (self._count,) or kind.kind not in "iu":
                self._refuse(f"arr_1 is {kind} {shape}, not classes: integers ({self._count},)")
            self._labels = np.stack([*self._file.rows("arr_1")])

    @staticmethod
    def is_one(path: Path, advice: str) -> bool:
        """Tell such a file from one of `FeatureSet.save`, and from any other."""
        names = ArrayFile(path, advice).headers.keys()
        return "about" not in names and bool(names & {"arr_0", "mu", "mu_s"})

    def moments(self, metric: str, dim: int) -> FeatureStatistics:
        """Read mean and covariance of the features of a metric, of length `dim`."""
        names = MOMENTS[metric]
        found = [self._file.headers.get(name, (None, np.dtype("O"))) for name in names]
        if [shape for shape, _ in found] != [(dim,), (dim, dim)] or any(
            kind.kind != "f" for _, kind in found
        ):
            self._refuse(f"{' and '.join(names)} are not floats ({dim},) and ({dim}, {dim})")
        try:  # of two or more: the covariance is the same whatever their number
            return FeatureStatistics.from_moments(2, *map(self._file.read, names))
        except ValueError as error:
            self._refuse(f"{' and '.join(names)}: {error}")

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return f"image {index} of {self._file.path}"

    def file(self, index: int) -> Path:
        return self._file.path

    def load(self, index: int) -> NDArray[np.uint8]:
        if index < self._next or self._next < 0:
            self._rows, self._next = self._file.rows("arr_0"), 0
        image = next(islice(self._rows, index - self._next, None))
        self._next = index + 1
        return image

    def _refuse(self, problem: str) -> NoReturn:
        raise LdmError(f"{self._file.path}: {problem}: {self._advice}")
