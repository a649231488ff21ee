"""Which images two sets share, by their content: images that are equal to the last bit.

A model that copies its training images, or two splits with an image in common, make every
comparison look better than it is.

What one pass over a set of images keeps of it, and how two sets compare by what was kept.

Two sets are compared by their features (FID, KID, precision, recall) and by patches of their
images, which need no network (the sliced Wasserstein distance).

How far an FID would move with other samples: resampling the features of those there are.

Efron & Tibshirani 1993, Algorithm 6.1: the statistic of as many samples, drawn from them with
replacement, again and again; the standard deviation of these is its standard error. The interval is
the standard normal one (their Section 13.2), about the measured FID. Their percentile interval
would not do: a set drawn with replacement holds each image several times and is poorer than the
samples, so that its FID lies above theirs, by the `bias` that is told; often the whole of a
percentile interval does. The reference is held fixed, as it is between the models of a table.

One pass over a set of images, shared by all processes: all that a comparison needs of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from tempfile import TemporaryFile
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from ldm.data import Batch
from ldm.distributed import fail_together
from ldm.errors import LdmError
from ldm.logbook import progress_bar
from ldm.metrics import FeatureStatistics, PatchDescriptors, frechet_distance
from ldm.metrics.features import FeatureSet
from ldm.metrics.inception import Extractor
from ldm.metrics.mmd import kernel_distance
from ldm.metrics.precision_recall import precision_recall
from ldm.metrics.swd import compare_descriptors
from ldm.seeds import generator

Prints = NDArray[np.uint64]

SIZE = 8  # bytes: among 50,000 images and 70,000, two unlike ones agree once in 5·10⁹ comparisons


class Fingerprints:
    """A number of 64 bits for every image of a stream, by which it is known again.

    It is of the pixels as they are compared, cropped and resized, whatever file they came from.
    Memory grows with the images, by some 150 bytes each.
    """

    def __init__(self) -> None:
        self._found: dict[int, int] = {}

    def add(self, images: Tensor, ks: Tensor) -> None:
        """Take in images (B, 3, R, R) uint8 with their numbers (B,)."""
        # in one layout, for the same pixels may lie in memory either way
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        for k, image in zip(ks.tolist(), pixels, strict=True):
            self._found[k] = int.from_bytes(sha256(image.data).digest()[:SIZE], "little")

    def merge(self, other: "Fingerprints") -> None:
        """Take in what another process has seen of the same set."""
        self._found |= other._found

    def in_order(self) -> Prints:
        """(n,), in the order of the images' numbers."""
        return np.array([self._found[k] for k in sorted(self._found)], np.uint64)


def identify_set(prints: Prints) -> str:
    """SHA-256 of a whole set: equal where two hold the same images in the same order."""
    return sha256(prints.astype("<u8").tobytes()).hexdigest()


def find_shared(prints: Prints, others: Prints) -> list[int]:
    """The places, rising, of the images of a set that are in another one."""
    return np.flatnonzero(np.isin(prints, others)).tolist()


SEED = 0  # of patches, directions and subsets: the same in every measurement, so that they compare
SWD_IMAGES = 16_384  # Karras et al. 2018, Section 5
NEAREST = 3  # Kynkäänniemi et al. 2019: neighbours that span a manifold; it takes one more feature

T = TypeVar("T")


@dataclass
class Survey:
    """What one pass keeps of a set; its size does not depend on the number of images.

    Attributes:
        features: of all images; None without an extractor.
        patches: of as many images as were asked for; None where none were.
        count: images seen.
    """

    features: FeatureSet | None
    patches: PatchDescriptors | None
    count: int = 0

    def merge(self, other: "Survey") -> None:
        """Take in what another process has seen of the same set.

        Raises:
            ValueError: it kept other things.
        """
        if (self.features is None, self.patches is None) != (
            other.features is None,
            other.patches is None,
        ):
            raise ValueError("cannot merge surveys that keep different things")
        if self.features is not None:
            self.features.merge(other.features)
        if self.patches is not None:
            self.patches.merge(other.patches)
        self.count += other.count


class Surveyor:
    """Takes in the images of a set batch by batch, in any order and by any number of processes.

    Args:
        total: how many images all processes together are to bring; k runs from 0 to total − 1.
        resolution: edge of the images, pixels.
        extractor: None leaves the features out.
        device: where patches are cut.
        swd_images: how many images give patches, drawn at random, for a set may be sorted by
            class; 0: none.
        seed: of that draw, of the patches' places, and of which features are kept.

    Attributes:
        survey: what was kept so far.

    Raises:
        LdmError: the images are smaller than a patch.
    """

    def __init__(
        self,
        total: int,
        resolution: int,
        extractor: Extractor | None,
        device: torch.device | str,
        swd_images: int = SWD_IMAGES,
        seed: int = SEED,
    ) -> None:
        self._extractor, self._device = extractor, torch.device(device)
        features = FeatureSet(extractor.dim, total, seed=seed) if extractor else None
        patches = PatchDescriptors(resolution, seed=seed) if swd_images else None
        self.survey = Survey(features, patches)
        drawn = drawn_images(total, swd_images, seed)
        # The i-th of those drawn gives patches at the same places in every set, so that equal
        # sets are at distance 0.
        self._place = torch.full((total,), -1)
        self._place[drawn] = torch.arange(len(drawn))

    def add(self, images: Tensor, ks: Tensor) -> Tensor | None:
        """Take in images (B, 3, R, R) uint8 with their numbers (B,) int64.

        Returns:
            Their features (B, dim) float32 on the CPU; None without an extractor.

        Raises:
            LdmError: features that are not finite.
        """
        places = self._place[ks.cpu()]
        if self.survey.patches is not None and (chosen := places >= 0).any():
            self.survey.patches.update(images[chosen].to(self._device), places[chosen])
        self.survey.count += len(images)
        if self._extractor is None or self.survey.features is None:
            return None
        features = self._extractor(images)
        self.survey.features.update(features, ks)
        return features


def drawn_images(total: int, count: int, seed: int = SEED) -> Tensor:
    """The numbers of the images that give patches: `count` of `total` at random, rising."""
    drawn = generator(seed, "swd images", 0).permutation(total)[:count]
    return torch.from_numpy(drawn).sort().values


def gather_surveys(survey: Survey, ranks: PartialState) -> Survey | None:
    """What all processes have seen, merged on the main process; None on the others."""
    surveys = gather(survey, ranks)
    for other in surveys[1:]:
        surveys[0].merge(other)
    return surveys[0] if surveys else None


def gather(value: T, ranks: PartialState) -> list[T]:
    """The value of every process, in their order, on the main process; [] on the others."""
    if ranks.num_processes == 1:
        return [value]
    gathered: list[Any] | None = [None] * ranks.num_processes if ranks.is_main_process else None
    torch.distributed.gather_object(value, gathered, dst=0)
    return gathered or []


def compare_surveys(made: Survey, real: Survey, device: torch.device | str) -> dict[str, Any]:
    """The numbers between a set of made images and one of real images.

    Returns:
        `fid` (Heusel et al. 2017), `kid` and `kid_std` (Bińkowski et al. 2018), `precision` and
        `recall` (Kynkäänniemi et al. 2019), all None where a side has fewer than two features, and
        all but `fid` where it has fewer than four of them, or their statistics alone; `swd` by
        level and `mean` (Karras et al. 2018, ×10³), None where a side has no patches; and
        `swd_images`, how many of either it is over.
    """
    result: dict[str, Any] = dict.fromkeys(("fid", "kid", "kid_std", "precision", "recall"))
    result |= {"swd": None, "swd_images": 0}
    if made.features is not None and real.features is not None:
        a, b = made.features.statistics, real.features.statistics
        if min(a.count, b.count) > 1:
            result["fid"] = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        ours, theirs = made.features.sample(), real.features.sample()
        if min(len(ours), len(theirs)) > NEAREST:
            kernel = kernel_distance(ours, theirs, seed=SEED)
            closeness = precision_recall(theirs, ours, NEAREST)
            result |= {"kid": kernel.mean, "kid_std": kernel.std} | closeness._asdict()
    if made.patches is not None and real.patches is not None:
        result["swd"] = compare_descriptors(made.patches, real.patches, SEED, device=device)
        result["swd_images"] = min(made.patches.count, real.patches.count)
    return result


NORMAL_QUANTILE = 1.959964  # of 97.5 %
ROWS_AT_ONCE = 4096  # 64 MiB of Inception's features in float64

Array = NDArray[np.float64]


class FidInterval(NamedTuple):
    """How sure an FID is.

    Attributes:
        low, high: ends of the interval that holds 95 % of FIDs of other samples, as many.
        std: standard error of the FID.
        bias: by how much resampling raises it: what too few samples cost, roughly.
        draws: sets that were drawn.
    """

    low: float
    high: float
    std: float
    bias: float
    draws: int


class FeatureRows:
    """The features of a stream of images, in a temporary file that is gone when this is.

    Args:
        dim: length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self._file = TemporaryFile(prefix="ldm-features-")  # noqa: SIM115  it goes with this object

    def add(self, features: Tensor) -> None:
        """Take in features (B, dim).

        Raises:
            LdmError: there is no room for them.
        """
        try:
            # written, not mapped: a full disk kills a process that writes to a map
            self._file.write(features.float().numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise LdmError(
                f"could not keep the features for --bootstrap ({error.strerror}): make room in the "
                "folder for temporary files, or name another by TMPDIR"
            ) from error
        self.count += len(features)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Some features at a time: which, and (rows, dim) in float64."""
        rows = np.memmap(self._file, np.float32, "r", shape=(self.count, self.dim))
        for start in range(0, self.count, ROWS_AT_ONCE):
            chosen = slice(start, min(start + ROWS_AT_ONCE, self.count))
            yield chosen, rows[chosen].astype(np.float64)


def bootstrap_fid(
    made: FeatureRows, real: FeatureStatistics, fid: float, draws: int, seed: int = 0
) -> FidInterval:
    """The interval of an FID over `made`, by `draws` resamplings.

    Each takes about as long as the FID itself, whose matrix roots are most of it: with Inception's
    features some seconds.

    Args:
        real: the reference's, held fixed.
        fid: what was measured.
        draws: a hundred give the standard error to within some 7 %; at least two.

    Raises:
        ValueError: fewer than two draws or samples.
    """
    if draws < 2 or made.count < 2:
        raise ValueError(f"{draws} draws of {made.count} samples: need two or more of both")
    centre = sum(rows.sum(0) for _, rows in made.blocks()) / made.count
    mean, covariance = real.mean, real.covariance
    found = []
    with progress_bar("draws") as bar:
        task = bar.add_task("bootstrap", total=draws, speed="", note="")
        for draw in range(draws):
            again = _resampled(made, centre, generator(seed, "bootstrap", draw))
            found.append(frechet_distance(mean, covariance, *again))
            bar.update(task, advance=1)
    # Efron & Tibshirani 1993, Sections 6.2 and 10.2
    std, bias = float(np.std(found, ddof=1)), float(np.mean(found)) - fid
    reach = NORMAL_QUANTILE * std
    return FidInterval(max(fid - reach, 0.0), fid + reach, std, bias, draws)


def _resampled(made: FeatureRows, centre: Array, draw: np.random.Generator) -> tuple[Array, Array]:
    """Mean (dim,) and covariance (dim, dim) of as many features, drawn with replacement."""
    times = np.bincount(draw.integers(made.count, size=made.count), minlength=made.count)
    total, scatter = np.zeros(made.dim), np.zeros((made.dim, made.dim))
    for chosen, rows in made.blocks():
        drawn = times[chosen] > 0
        weights, deviations = times[chosen][drawn, None], rows[drawn] - centre
        total += (weights * deviations).sum(0)
        scatter += deviations.T @ (weights * deviations)
    shift = total / made.count
    # about a centre near the mean, so that the difference costs no digits
    scatter -= made.count * np.outer(shift, shift)
    return centre + shift, scatter / (made.count - 1)


class Images(Protocol):
    """A set of images of one size, numbered from 0."""

    @property
    def what(self) -> str:
        """What they are, in words."""

    @property
    def resolution(self) -> int:
        """Edge, pixels."""

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Tools:
    """With what a pass is made.

    Attributes:
        extractor: None leaves the features out.
        device: where patches are cut.
        batch_size: images over all processes.
        workers: loader processes.
        swd_images: how many images give patches.
    """

    extractor: Extractor | None
    device: torch.device
    batch_size: int
    workers: int
    ranks: PartialState
    swd_images: int


@dataclass(frozen=True)
class Seen:
    """What is known of a set after its pass, on the main process.

    Attributes:
        prints: the images' fingerprints; None where they are not known.
        about: what a result says of how it came about.
    """

    survey: Survey
    prints: Prints | None
    about: dict[str, Any] = field(default_factory=dict)


def survey_images(images: Images, tools: Tools, rows: FeatureRows | None = None) -> Seen | None:
    """See every image once; None but on the main process.

    Args:
        rows: is given the features of this process's images.

    Raises:
        UsageError: the batch size does not divide over the processes.
        LdmError: an image cannot be read, or its features are not finite.
    """
    surveyor = Surveyor(
        len(images), images.resolution, tools.extractor, tools.device, tools.swd_images
    )
    rank, world = tools.ranks.process_index, tools.ranks.num_processes
    prints, bar = Fingerprints(), progress_bar("images")
    # starting processes for a single batch takes longer than loading it
    workers = min(tools.workers, len(images) // tools.batch_size)
    bar.disable = bar.disable or rank != 0
    with fail_together(tools.ranks), bar:
        task = bar.add_task(images.what, total=-(-len(images) // world), speed="", note="")
        for batch in images.batches(tools.batch_size, rank, world, workers):
            features = surveyor.add(batch.images, batch.k)
            prints.add(batch.images, batch.k)
            if rows is not None and features is not None:
                rows.add(features)
            speed = bar.tasks[task].speed
            shown = f"{speed * world:.1f} images/s" if speed else ""
            bar.update(task, advance=len(batch.images), speed=shown)
    survey, found = gather_surveys(surveyor.survey, tools.ranks), gather(prints, tools.ranks)
    if survey is None:
        return None
    for other in found[1:]:
        found[0].merge(other)
    return Seen(survey, found[0].in_order())
