"""What one pass over a set of images keeps of it, and how two sets compare by what was kept.

Two sets are compared by their features (FID, KID, precision, recall) and by patches of their
images, which need no network (the sliced Wasserstein distance).
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor

from ldm.metrics import PatchDescriptors, frechet_distance
from ldm.metrics.extractors import Extractor
from ldm.metrics.feature_set import FeatureSet
from ldm.metrics.kid import kernel_distance
from ldm.metrics.precision_recall import precision_recall
from ldm.metrics.wasserstein import compare_descriptors
from ldm.seeds import generator

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
