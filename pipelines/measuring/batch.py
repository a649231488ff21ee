"""Reference batches of ADM's evaluator, and files of mean and covariance alone, as references."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from accelerate import PartialState

from ldm.config import Resolution, read_resolution
from ldm.data.loader import count_labels
from ldm.errors import LdmError
from ldm.files import sha256_of
from ldm.metrics.features import ReferenceBatch
from ldm.metrics.inception import Extractor
from pipelines.measuring.reference import Reference
from pipelines.measuring.statistics import SetStatistics

FID_50K = 50_000  # the usual number in papers


class BatchReference(Reference):
    """A file in ADM's layout, see `ReferenceBatch`, with mean and covariance of its own, or not.

    As in ADM's evaluator, precision and recall are over all images of both sides, up to 50,000.

    Args:
        metrics: those to be measured.
        resolution: of the samples; a file without images does not state its own.
    """

    kept = 50_000

    def __init__(
        self,
        batch: ReferenceBatch,
        metrics: Iterable[str],
        extractor: Extractor | None,
        resolution: Resolution,
    ) -> None:
        self._batch, path, count, wanted = batch, batch.path, len(batch), set(metrics)
        self.is_adm = batch.is_adm
        self.given = tuple(name for name in batch.given if name in wanted)
        needed = sorted(wanted - {*self.given, "is"})
        if needed and not count:
            which = ", ".join(needed)
            raise LdmError(f"{path} holds no images (arr_0), so omit these metrics: {which}")
        if extractor and self.given and not extractor.is_published:
            raise LdmError(
                f"the statistics in {path} are of the published Inception, and the samples' "
                f"features of another extractor ({extractor.name}): omit --features and "
                f"--weights, or these metrics: {', '.join(self.given)}"
            )
        if extractor and self.given and batch.is_adm and extractor.mode != "legacy-tensorflow":
            raise LdmError(
                f"the statistics in {path} are of images resized as in TensorFlow, and the "
                f"samples are resized otherwise ({extractor.name}): omit --mode, or these "
                f"metrics: {', '.join(self.given)}"
            )
        self.source = batch if count else None
        whole = ", mean and covariance of its whole data set" if self.given else ""
        images = f"{count:,} images" if count else "no images"
        super().__init__(
            read_resolution(batch.shape) if count else resolution,
            {
                "what": f"{path}: {images}{whole}",
                "split": None,
                "count": count,
                "filter": None,
                "batch": str(path),
                "batch_sha256": sha256_of(path),
                "given": list(self.given),
                "labels": count_labels(batch),
            },
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"content": self.about["batch_sha256"], "split": None, "crop": "none"}

    def statistics(
        self,
        ranks: PartialState,
        extractor: Extractor | None,
        swd_images: int,
        others: Mapping[str, Extractor] | None = None,
        **how: Any,
    ) -> SetStatistics:
        if self.source is None:
            result = SetStatistics(2, 1, extractor, 0, others=others, kept=0)
        else:  # read from its beginning to its end, in one process
            how["workers"] = 0
            result = super().statistics(ranks, extractor, swd_images, others, **how)
        for name, each in ({"fid": extractor} | dict(others or {})).items():
            if each is not None and name in self.given:
                result.get(name).statistics = self._batch.moments(name, each.dim)
        return result


def find_differences(reference: BatchReference, samples: dict[str, Any]) -> Iterator[str]:
    """Yield what differs between a measurement and those of papers with ADM's reference batches,
    and what is not known of the reference.

    `samples` is the samples' entry in the result.
    """
    if reference.given and reference.source is None:
        unknown = "image size and count" if reference.is_adm else "resizing, image size and count"
        yield (
            f"the {unknown} of {reference.about['batch']} are unknown, for the file does not "
            "state them: the numbers hold only if they are as here"
        )
    if not reference.is_adm:
        return
    count, ours, theirs = samples["count"], samples["labels"], reference.about["labels"]
    if count != FID_50K:
        yield (
            f"{count:,} samples: papers with ADM's reference batches have {FID_50K:,}, and FID, "
            "sFID, IS, precision and recall depend on the number"
        )
    if ours and theirs and _describe_labels(ours) != _describe_labels(theirs):
        yield (
            f"the samples are of {_describe_labels(ours)}, and the reference's images of "
            f"{_describe_labels(theirs)}"
        )


def _describe_labels(labels: dict[str, Any]) -> str:
    least, most = labels["images"]
    return f"{labels['classes']:,} classes{', balanced' if most - least <= 1 else ', not balanced'}"
