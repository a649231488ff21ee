"""Statistics of a set of images, and the distances between two sets.

`accumulate` reads a set once, on all processes together, and keeps three things: features of a
network (for FID, KID, precision, recall), patches of some images (for the sliced Wasserstein
distance, which needs no network), and a hash of every image (to find images that two sets share).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from ldm.config import Resolution
from ldm.data import Batch, Source, evaluation_batches
from ldm.data.loader import FaultCount
from ldm.distributed import fail_together, from_main
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.images import Hashes, as_rgb, as_uint8, hash_images
from ldm.logbook import show_progress
from ldm.metrics import (
    FeatureSet,
    FeatureStatistics,
    PatchDescriptors,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from ldm.metrics.features import KEPT
from ldm.metrics.fid import InceptionScore, bootstrap_fid
from ldm.metrics.inception import (
    OUTPUTS,
    Extractor,
    FeatureExtractor,
    Mode,
    load_extractor,
    refuse_channels,
)
from ldm.metrics.swd import compare_descriptors
from ldm.seeds import generator

T = TypeVar("T")

SEED = 0  # of patches, directions and subsets: the same in every measurement, so that they compare
SWD_IMAGES = 16_384  # Karras et al. 2018, Section 5
NEAREST = 3  # Kynkäänniemi et al. 2019: neighbours that span a manifold; it takes one more feature

Metric = Literal["fid", "sfid", "is", "kid", "precision", "recall", "swd", "fd-dinov2"]
DEFAULT: tuple[Metric, ...] = ("fid", "kid", "precision", "recall", "swd")
NO_NETWORK: tuple[Metric, ...] = ("swd", "fd-dinov2")
"""Metrics that do without Inception, or a user's own extractor in its place."""


# -------------------------------------------------------------------------------------- options
@dataclass(frozen=True)
class MeasureOptions:
    """Options of a measurement of samples or reconstructions.

    Attributes:
        fid: False leaves out all numbers that need features.
        metrics: names of the metrics; None: `DEFAULT`.
        mode: Inception's resizing: clean-fid's, or that of the first FIDs.
        features: `module:function` of a user's own extractor; None: Inception.
        weights: `inception-2015-12-05.pt`; None: searched for, else fetched.
        limit: use only the first `limit` images of either side.
        bootstrap: resamplings for the interval about FID; 0: no interval.
        force: measure in spite of refusals, and store them with the result.
        out: the file to write; None: one beside the samples or the model.
    """

    fid: bool = True
    metrics: tuple[Metric, ...] | None = None
    mode: Mode = "clean"
    features: str | None = None
    weights: Path | None = None
    device: str | torch.device = "auto"
    batch_size: int = 64
    limit: int | None = None
    bootstrap: int = 0
    force: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size, limit=self.limit)
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UsageError(f"--bootstrap {self.bootstrap}: it must be 0, or 2 draws or more")
        if not self.fid and (self.weights or self.features or self.mode != "clean"):
            raise UsageError("--no-fid excludes --weights, --features and --mode: omit them")
        for metric in self.metrics or ():
            if metric not in get_args(Metric):
                known = ", ".join(get_args(Metric))
                raise UsageError(f"--metrics: no metric '{metric}': choose from {known}")
            if metric in OUTPUTS and self.features:
                raise UsageError(f"--features replaces Inception, of which {metric} is: omit one")

    def wants(self, *metrics: Metric) -> bool:
        """Tell whether one of some metrics is to be measured."""
        return any(metric in (self.metrics or DEFAULT) for metric in metrics)

    def words(self) -> list[str]:
        """Return a word for the result's file name for each non-default setting."""
        return [
            *([f"first{self.limit}"] if self.limit else []),
            *([] if self.fid else ["no-fid"]),
            *sorted(self.metrics or (), key=get_args(Metric).index),
            *([self.features] if self.features else []),
            *([self.mode] if self.mode != "clean" else []),
        ]

    def refuse(self, issues: Iterable[str]) -> list[str]:
        """Raise an LdmError for the first issue; with `force`, return all, for the result."""
        forced = []
        for issue in issues:
            if not self.force:
                raise LdmError(f"{issue}; --force measures anyway")
            forced.append(issue)
        return forced


def find_extractor(
    how: MeasureOptions, resolution: Resolution, device: torch.device, ranks: PartialState
) -> tuple[Extractor | None, str | None]:
    """Load the feature extractor on all processes, or return the reason for its absence.

    Requested weights or features must load; a user's own extractor is tried at `resolution`.
    """
    load = partial(load_extractor, how.features, how.mode, how.weights, device, resolution)
    extractor, why = load_on_all(load, ranks)
    if why is not None and (how.weights is not None or how.features is not None):
        raise LdmError(why)
    return extractor, why


def find_extractors(
    how: MeasureOptions, images: Any, device: torch.device, ranks: PartialState
) -> tuple[Extractor | None, dict[str, Extractor], str | None]:
    """Load the networks of all metrics: that of FID, KID, precision and recall; those of others, by
    the metrics' names in a result; and the reason for the absence of the first.

    Args:
        images: the samples, with their `resolution` and `channels`.

    Raises:
        LdmError: a network is missing without which nothing that was requested is measured.
    """
    main, others, missing = None, dict[str, Extractor](), refuse_channels(images.channels)
    if missing is None and not set(how.metrics or DEFAULT) <= set(NO_NETWORK):
        main, missing = find_extractor(how, images.resolution, device, ranks)
    if missing is not None and not how.wants("swd"):
        raise LdmError(missing)
    if isinstance(main, FeatureExtractor):
        with fail_together(ranks):
            others |= {name: main.output(name) for name in OUTPUTS if how.wants(name)}
    if how.wants("fd-dinov2") and images.channels in (1, 3):
        from ldm.metrics.dinov2 import Dinov2

        dinov2, why = load_on_all(lambda: Dinov2(device), ranks)
        if dinov2 is None:
            raise LdmError(why)
        others["fd_dinov2"] = dinov2
    return main, others, missing


def load_on_all(load: Callable[[], T], ranks: PartialState) -> tuple[T | None, str | None]:
    """Call `load` on every process; where it fails on one, return None and the reason on all."""
    loaded: list[T] = []

    def attempt() -> str | None:
        try:
            loaded.append(load())
        except UsageError:
            raise
        except LdmError as error:
            return str(error)
        return None

    why = from_main(ranks, attempt)  # first, so that a download happens once
    with fail_together(ranks):
        if why is None and not loaded:
            why = attempt()  # on another machine the file may be missing
    why = next((reason for reason in gather_object([why]) if reason is not None), None)
    return (loaded[0] if why is None else None), why


def describe_extractor(extractor: Extractor | None) -> dict[str, Any] | None:
    """Return an extractor's entry in a result."""
    names = ("name", "sha256", "dim", "is_published")
    return {name: getattr(extractor, name) for name in names} if extractor else None


def describe_extractors(main: Extractor | None, others: Mapping[str, Extractor]) -> dict[str, Any]:
    """Return the entries of all extractors in a result."""
    entries = {name: describe_extractor(each) for name, each in others.items()}
    return {"extractor": describe_extractor(main), "extractors": entries}


def join_words(*words: str) -> str:
    """Join words into a file name without its ending."""
    return re.sub(r"[^\w.=-]+", "_", "-".join(words)).strip("_-")


# ------------------------------------------------------------------------------------- one pass
class ImageSet(Protocol):
    """A set of images of one size, numbered from 0; `what` describes it to the user."""

    what: str
    resolution: Resolution

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]: ...


@dataclass
class CentreCrops:
    """Centre crops of a source's images, part of a set of `total`, of which 1 % may be corrupt."""

    source: Source
    resolution: Resolution
    what: str
    total: int

    def __len__(self) -> int:
        return len(self.source)

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        faults = FaultCount(self.total)
        return evaluation_batches(
            self.source, self.resolution, batch_size, None, rank, world, workers, faults
        )


class SetStatistics:
    """Statistics of a set of images, taken in batch by batch, in any order and by any processes.

    Args:
        total: images that all processes together will bring, numbered 0 … total − 1.
        extractor: None leaves the features out.
        others: extractors of further metrics, by the metrics' names.
        swd_images: images to take patches of; 0: none.
        every_feature: keep the features of all images, batch by batch, beside their moments.
        kept: features to keep for KID, precision and recall.
        patch_seed: of the patches' places: SEED in samples and reconstructions, SEED + 1 in what
            they are compared with, for in the same places a reconstruction shows the same content.
    """

    def __init__(
        self,
        total: int,
        resolution: Resolution,
        extractor: Extractor | None = None,
        swd_images: int = SWD_IMAGES,
        every_feature: bool = False,
        patch_seed: int = SEED,
        others: Mapping[str, Extractor] | None = None,
        kept: int = KEPT,
    ) -> None:
        self.features = FeatureSet(extractor.dim, total, kept, SEED) if extractor else None
        self.others: dict[str, Any] = {  # FeatureSets, of which no features are kept, and a score
            name: InceptionScore(other.dim, total) if name == "is"
            else FeatureSet(other.dim, total, kept=0, seed=SEED)
            for name, other in (others or {}).items()
        }  # fmt: skip
        self.patches = PatchDescriptors(resolution, seed=patch_seed) if swd_images else None
        self.hashes: Hashes = {}  # `accumulate` fills them in
        self.every_feature: list[NDArray[np.float32]] | None = [] if every_feature else None
        drawn = draw_images(total, swd_images)
        self._places = torch.full((total,), -1)
        self._places[drawn] = torch.arange(len(drawn))

    @classmethod
    def of_features(cls, features: FeatureSet, hashes: Hashes) -> "SetStatistics":
        """Wrap the features, and any known hashes, of images that are not here."""
        found = cls(0, 1, swd_images=0)
        found.features, found.hashes = features, hashes
        return found

    def update(
        self,
        images: Tensor,
        ks: Tensor,
        extractor: Extractor | None = None,
        others: Mapping[str, Extractor] | None = None,
    ) -> None:
        """Take in images (B, C, H, W), uint8 or floats in [−1, 1], with their numbers (B,).

        The extractors see them at 8 bits, and one channel repeated to three.
        """
        if self.patches is not None:
            places = self._places[ks.cpu()]
            if (chosen := places >= 0).any():
                self.patches.update(images[chosen], places[chosen])
        if extractor is None and not others:
            return
        pixels = as_uint8(as_rgb(images))  # one tensor: the outputs of one network share a pass
        for name, other in (others or {}).items():
            self.others[name].update(other(pixels), ks)
        if self.features is not None and extractor is not None:
            features = extractor(pixels)
            self.features.update(features, ks)
            if self.every_feature is not None:
                self.every_feature.append(features.float().numpy())

    def get(self, name: str) -> Any:
        """Return the features, or the score, of a metric."""
        return self.features if name == "fid" else self.others[name]

    def put(self, name: str, features: FeatureSet) -> None:
        """Set the features of a metric."""
        if name == "fid":
            self.features = features
        else:
            self.others[name] = features

    def merge(self, other: "SetStatistics") -> None:
        """Take in another process's share of the same set."""
        kept: list[Any] = [(self.features, other.features), (self.patches, other.patches)]
        kept += [(mine, other.others.get(name)) for name, mine in self.others.items()]
        if any((mine is None) != (theirs is None) for mine, theirs in kept):
            raise ValueError("cannot merge statistics that keep different things")
        for mine, theirs in kept:
            if mine is not None:
                mine.merge(theirs)
        self.hashes |= other.hashes


def draw_images(total: int, count: int) -> Tensor:
    """Draw the images that give patches, at random, since a set may be sorted by class."""
    drawn = generator(SEED, "swd images", 0).permutation(total)[:count]
    return torch.from_numpy(drawn).sort().values


def accumulate(
    images: ImageSet,
    ranks: PartialState,
    extractor: Extractor | None = None,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    swd_images: int = SWD_IMAGES,
    every_feature: bool = False,
    patch_seed: int = SEED,
    others: Mapping[str, Extractor] | None = None,
    kept: int = KEPT,
) -> SetStatistics:
    """Take in every image of a set once, shared by all processes; for options see `SetStatistics`.

    `batch_size` is over all processes. The main process returns the statistics of all images, the
    others those of their share.
    """
    mine = SetStatistics(
        len(images), images.resolution, extractor, swd_images, every_feature, patch_seed, others,
        kept,
    )  # fmt: skip
    # starting processes for a single batch takes longer than loading it
    workers = min(workers, len(images) // batch_size)
    with (
        fail_together(ranks),
        show_progress(images.what, len(images), ranks.is_main_process) as advance,
    ):
        rank, world = ranks.process_index, ranks.num_processes
        for batch in images.batches(batch_size, rank, world, workers):
            mine.update(batch.images.to(device), batch.k, extractor, others)
            mine.hashes |= hash_images(batch.images, batch.k)
            advance(len(batch.k) * world)
    return gather_statistics(mine, ranks)


def gather_statistics(mine: SetStatistics, ranks: PartialState) -> SetStatistics:
    """Merge the statistics of all processes on the main one; the others keep their own."""
    if ranks.num_processes == 1:
        return mine
    shares: list[Any] | None = [None] * ranks.num_processes if ranks.is_main_process else None
    torch.distributed.gather_object(mine, shares, dst=0)
    for share in (shares or [])[1:]:
        mine.merge(share)
    return mine


# ------------------------------------------------------------------------------------ distances
def compare_sets(
    fake: SetStatistics,
    real: SetStatistics,
    device: torch.device,
    draws: int = 0,
    metrics: Iterable[Metric] = DEFAULT,
) -> dict[str, Any]:
    """Compute the distances between a set of generated images and one of real images.

    `draws` resamplings for `fid_interval` need every feature of the generated images.

    Returns:
        `fid` (Heusel et al. 2017), `kid` and `kid_std` (Bińkowski et al. 2018), `precision` and
        `recall` (Kynkäänniemi et al. 2019), `swd` by level and `mean` (Karras et al. 2018, ×10³),
        `sfid` (Nash et al. 2021), `is` (Salimans et al. 2016), `fd_dinov2` (Stein et al. 2023);
        `swd_images`, the images of each side that SWD is over, and `neighbours`, the features of
        the samples and of the reference that precision and recall are over. None for what was not
        requested, and without enough features or patches.
    """
    wanted = set(metrics)
    names = ("fid", "fid_interval", "kid", "kid_std", "precision", "recall", "swd", "sfid", "is",
             "fd_dinov2", "neighbours")  # fmt: skip
    result: dict[str, Any] = dict.fromkeys(names) | {"swd_images": 0}
    for name in (fake.others.keys() & real.others.keys()) - {"is"}:
        result[name] = _frechet(fake.others[name].statistics, real.others[name].statistics)
    if "is" in fake.others:
        result["is"] = fake.others["is"].value()
    if fake.features is not None and real.features is not None:
        b = real.features.statistics
        if "fid" in wanted:
            result["fid"] = _frechet(fake.features.statistics, b)
            if draws and result["fid"] is not None:
                features = np.concatenate(fake.every_feature or [])
                interval = bootstrap_fid(features, b, result["fid"], draws)
                result["fid_interval"] = interval._asdict()
        ours, theirs = fake.features.sample(), real.features.sample()
        has_enough = min(len(ours), len(theirs)) > NEAREST
        if has_enough and "kid" in wanted:
            kernel = kernel_distance(ours, theirs, seed=SEED)
            result |= {"kid": kernel.mean, "kid_std": kernel.std}
        if has_enough and wanted & {"precision", "recall"}:
            closeness = precision_recall(theirs, ours, NEAREST)._asdict()
            result |= {name: value for name, value in closeness.items() if name in wanted}
            result["neighbours"] = {"samples": len(ours), "reference": len(theirs)}
    if fake.patches is not None and real.patches is not None:
        result["swd"] = compare_descriptors(fake.patches, real.patches, SEED, device=device)
        result["swd_images"] = min(fake.patches.count, real.patches.count)
    return result


def _frechet(a: FeatureStatistics, b: FeatureStatistics) -> float | None:
    """The Fréchet distance of two sets of features; None if one has no covariance."""
    if min(a.count, b.count) < 2:
        return None
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
