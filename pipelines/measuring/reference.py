"""References that samples are compared with: images of a data set, or statistics in a file.

A pass over a data set is made once: its statistics are kept in the cache, as
$LDM_CACHE/statistics/<key>.npz. The key is a SHA-256 over all that decides the features: the
images' content, the split, the resolution, the crop, the extractor's weights and resizing, and the
version of Pillow, which decodes and resizes. Patches are not kept but cut anew.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ldm.config import (
    Resolution,
    format_size,
    height_width,
    plain_size,
    read_resolution,
    size_word,
    to_tree,
)
from ldm.data import Batch, DataConfig, Source, batches, open_source
from ldm.data.dataset import PHOTOS, content_identity, find_type
from ldm.data.loader import find_filter, read_preparation
from ldm.data.sources import Part, Split
from ldm.data.transforms import covers
from ldm.distributed import from_main
from ldm.errors import LdmError, UsageError
from ldm.hub import cache_folder
from ldm.images import Hashes, pack_hashes
from ldm.logbook import console
from ldm.metrics.features import KEPT, PUBLISHED, FeatureSet, read_published
from ldm.metrics.inception import OUTPUTS, Extractor, FunctionExtractor, digest
from ldm.records import Count, checked, schema
from ldm.run_folder import provenance
from pipelines.measuring.statistics import (
    SEED,
    CentreCrops,
    SetStatistics,
    accumulate,
    draw_images,
)


# ------------------------------------------------------------------------ images of a data set
class Reference:
    """Real images to compare with, or statistics of them.

    Attributes:
        about: the reference's entry in a result. `filter` is the filter that the images were
            downsampled with, where it is known.
        known: statistics of images that need not be here.
        config, source: the data; None where only statistics, or images in an array, are there.
        kept: features that precision and recall are over, at most.
        given: metrics whose statistics are of more images than `about` counts.
    """

    config: DataConfig | None = None
    source: Source | None = None
    kept: int = KEPT
    given: tuple[str, ...] = ()

    def __init__(
        self, resolution: Resolution, about: dict[str, Any], known: SetStatistics | None = None
    ) -> None:
        self.resolution, self.about, self.known = resolution, about, known
        self.what = about["what"]
        self.filter = about["filter"]

    def __len__(self) -> int:
        return self.about["count"]

    @property
    def identity(self) -> dict[str, Any] | None:
        """All that decides the images as they are compared; None where nothing is to be kept."""
        return None

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield this process's share of the images; more than 1 % corrupt ones are an error."""
        yield from self.part(range(len(self))).batches(batch_size, rank, world, workers)

    def part(self, indices: range | np.ndarray) -> CentreCrops:
        """Return some of the images, numbered anew; not of random crops."""
        assert self.source is not None
        return CentreCrops(Part(self.source, indices), self.resolution, self.what, len(self))

    def statistics(
        self,
        ranks: PartialState,
        extractor: Extractor | None,
        swd_images: int,
        others: Mapping[str, Extractor] | None = None,
        **how: Any,
    ) -> SetStatistics:
        """Accumulate over all images, or load the features kept of an earlier pass.

        The numbers are the same either way, up to the last digits of float64. They are complete on
        the main process only.
        """
        if self.known is not None:
            return self.known
        how |= {"patch_seed": SEED + 1, "kept": self.kept}
        wanted = ({} if extractor is None else {"fid": extractor}) | dict(others or {})
        if [*wanted] == ["is"] and not swd_images:
            return SetStatistics(len(self), self.resolution, swd_images=0)
        wanted.pop("is", None)  # of the samples alone
        identities = from_main(ranks, lambda: {k: identify(self, e) for k, e in wanted.items()})
        paths = {name: statistics_path(each) for name, each in identities.items() if each}
        kept: dict[str, tuple[FeatureSet, Hashes]] = {}
        if ranks.is_main_process:
            loaded = {name: _load_kept(path, identities[name]) for name, path in paths.items()}
            kept = {name: found for name, found in loaded.items() if found is not None}
        there = from_main(ranks, lambda: [*kept])
        left = {name: each for name, each in wanted.items() if name not in there}
        if there and not left:
            drawn = draw_images(len(self), swd_images).numpy()
            result = accumulate(self.part(drawn), ranks, swd_images=len(drawn), **how)
        else:
            rest = {name: each for name, each in left.items() if name != "fid"}
            main = left.get("fid")
            result = accumulate(self, ranks, main, swd_images=swd_images, others=rest, **how)
        are_kept = True
        for name, path in paths.items() if ranks.is_main_process else ():
            if name in kept:
                features, result.hashes = kept[name]
                result.put(name, features)
            else:
                features = result.get(name)
                are_kept &= _keep(path, identities[name], features, result.hashes, self)
        for name, path in [*paths.items()][:1]:  # of FID, if it is measured
            origin = {"content": identities[name]["content"], "kept": not left}
            self.about |= origin | {"statistics": str(path) if are_kept else None}
        return result


class ImageReference(Reference):
    """Images of one split, centre-cropped to a resolution, never mirrored.

    The eight built-in photographs are large, so random crops of them are used, as many as there are
    samples (of the split val: its tiles). Of other data, `limit` keeps the first images.
    """

    config: DataConfig
    source: Source

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        resolution: Resolution,
        samples: int,
        limit: int | None = None,
    ) -> None:
        prepared = read_preparation(config)
        if prepared and (size := read_resolution(prepared["size"])) != resolution:
            why = "images are never enlarged for a comparison"
            if covers(*height_width(size), resolution):
                why = "resizing twice changes every number"
            raise LdmError(
                f"{config.source} was prepared at {format_size(size)} and the samples are "
                f"{format_size(resolution)}: {why}; prepare the data with --size "
                f"{size_word(resolution)}"
            )
        self.config = config
        self.source = open_source(config, split, resolution)
        filtered = find_filter(config, self.source, resolution)
        self.is_crops = config.source == PHOTOS and split != "val"
        if self.is_crops:
            count = samples
            what = f"photos, {split}: {samples} random crops, seed {SEED}"
        else:
            count = min(len(self.source), limit or len(self.source))
            what = f"{config.source}, {split}: {count} images, centre-cropped"
            what += f", downsampled by {filtered}" if filtered else ""
            if count < 2:
                raise LdmError(f"{what}: a covariance needs two or more; give another --data")
        about = {
            "what": what,
            "split": split,
            "count": count,
            "data": to_tree(config),
            "prepared": prepared,
            "filter": filtered,
        }
        super().__init__(resolution, about)

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        if not self.is_crops:
            yield from super().batches(batch_size, rank, world, workers)
            return
        unmirrored = self.config.model_copy(update={"flip": False})
        stop = -(-len(self) // batch_size) * batch_size  # whole batches; the last is cut
        for batch in batches(
            self.source, unmirrored, self.resolution, SEED, 0, stop, batch_size, rank, world
        ):
            wanted = batch.k < len(self)
            if wanted.any():  # of the last batch a process may have none
                yield Batch(batch.images[wanted], batch.k[wanted], batch.labels[wanted])

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        if self.config.source == PHOTOS:
            return None
        source, kind = self.source, find_type(self.source)
        return {
            "content": content_identity(source, len(self)),
            "split": self.about["split"],
            "crop": "center",
            **({} if source.channels == 3 else {"channels": source.channels}),
            **({"range": list(source.range)} if source.range else {}),
            **({} if kind in ("uint8", None) else {"dtype": kind}),
            **({} if self.config.small == "error" else {"small": self.config.small}),
        }


# ---------------------------------------------------------------------------- kept statistics
FORMAT = 1


def identify(reference: Reference, extractor: Extractor | None) -> dict[str, Any] | None:
    """Return all that decides a reference's features; None where they are not to be kept."""
    # a user's own extractor does not tell when its weights change
    if not isinstance(extractor, Extractor) or isinstance(extractor, FunctionExtractor):
        return None
    # the covariance of a few takes more room than they take time
    if len(reference) < extractor.dim or (images := reference.identity) is None:
        return None
    return images | {
        "format": FORMAT,
        "images": len(reference),
        "resolution": plain_size(reference.resolution),
        "extractor": _identify_extractor(extractor),
        "pillow": version("pillow"),
    }


def _identify_extractor(extractor: Extractor) -> dict[str, Any]:
    return {"sha256": extractor.sha256, "mode": extractor.mode, "dim": extractor.dim}


def statistics_path(identity: dict[str, Any]) -> Path:
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "statistics" / f"{key[:32]}.npz"


def _keep(
    path: Path, identity: Any, features: FeatureSet, hashes: Hashes, reference: Reference
) -> bool:
    """Write the features and hashes to the cache, and return True, if that is possible."""
    about = {
        "identity": identity,
        "reference": reference.about,
        "fingerprints": base64.b64encode(pack_hashes(hashes)).decode(),
        **provenance(),
    }
    try:
        features.save(path, about)
    except LdmError as error:
        console.print(f"note: the reference's statistics are not kept: {error}", markup=False)
        return False
    return True


def _load_kept(path: Path, identity: Any) -> tuple[FeatureSet, Hashes] | None:
    """The kept features and hashes; None where there are none, or they are damaged."""
    if not path.is_file():
        return None
    try:
        features, hashes, about = _read_kept(path, "delete it")
        if about["identity"] != identity:
            raise LdmError(f"{path} holds the statistics of another reference")
        return features, hashes
    except LdmError as error:
        console.print(f"note: {error}; computing the reference's statistics again", markup=False)
        return None


_EXTRACTOR = schema(sha256=str | None, mode=str | None, dim=Count)
_IDENTITY = schema(extractor=_EXTRACTOR, content=str, resolution=Resolution)
_REFERENCE = schema(what=str, split=(str | None, None), filter=str | None)
_KEPT = schema(identity=_IDENTITY, reference=_REFERENCE, fingerprints=str)


def _read_kept(path: Path, advice: str) -> tuple[FeatureSet, Hashes, dict[str, Any]]:
    """Features, hashes, and the `identity` and `reference` that they are of."""
    features, about = FeatureSet.load(path, advice)
    checked(_KEPT, about, path, advice, "about")
    with suppress(ValueError):
        stored = base64.b64decode(about["fingerprints"], validate=True)
        hashes = dict(enumerate(np.frombuffer(stored, "<u8").tolist()))
        if len(hashes) == features.count:
            return features, hashes, about
    raise LdmError(f"{path} is damaged: about.fingerprints: not one for each image: {advice}")


# -------------------------------------------------------------------------- statistics in a file
OTHER = "give another --reference, or --data"


def open_statistics(
    name: str, extractor: Extractor | None, missing: str | None = None
) -> Reference:
    """Open `PUBLISHED` statistics by name, or kept ones by the path of their .npz.

    They are of features alone: without an extractor, `missing` is the error.
    """
    check_statistics(name)
    path = Path(name).expanduser()
    if name not in PUBLISHED:
        features, hashes, about = _read_kept(path, OTHER)
    if extractor is None:
        raise LdmError(f"{name}: {missing}")
    if name in PUBLISHED:
        return _open_published(name, extractor)
    identity, entry = about["identity"], about["reference"]
    theirs, ours = identity["extractor"], _identify_extractor(extractor)
    if theirs != ours:
        if {**theirs, "dim": 0} == {**ours, "dim": 0}:
            which = "sFID" if theirs["dim"] == OUTPUTS["sfid"][1] else "another metric"
            raise LdmError(
                f"the statistics in {path} are those of {which} ({theirs['dim']:,} features), not "
                f"of FID ({ours['dim']:,}): {OTHER}"
            )
        one, other = (f"{e['mode']}, SHA-256 {str(e['sha256'])[:12]}" for e in (theirs, ours))
        raise LdmError(
            f"the statistics in {path} are of another extractor ({one}) than the samples' "
            f"features ({other}), and distances between features of two networks mean nothing: "
            "give the same --weights and --mode"
        )
    origin = {"statistics": str(path), "content": identity["content"], "kept": True}
    entry |= origin | {"count": features.count}
    known = SetStatistics.of_features(features, hashes)
    return Reference(read_resolution(identity["resolution"]), entry, known)


def check_statistics(name: str) -> None:
    """Raise a UsageError for a reference that is neither `PUBLISHED` nor an .npz on this disk."""
    path = Path(name).expanduser()
    if name not in PUBLISHED and (path.suffix != ".npz" or not path.is_file()):
        raise UsageError(
            f"no reference '{name}': give {', '.join(PUBLISHED)}, or a .npz of "
            f"{cache_folder() / 'statistics'}; images are given with --data"
        )


def _open_published(name: str, extractor: Extractor) -> Reference:
    if not extractor.is_published or extractor.mode is None:
        raise LdmError(
            f"the statistics of {name} are of the published Inception, and the samples' features "
            f"of another extractor ({extractor.name}), and distances between features of two "
            "networks mean nothing: omit --features and --weights, or give --data"
        )
    path, moments = read_published(name, extractor.mode)
    split, side, images, filtered = PUBLISHED[name]
    if moments.dim != extractor.dim:
        raise LdmError(f"{path} holds {moments.dim} features, not {extractor.dim}: delete it")
    features = FeatureSet(extractor.dim, images, kept=0)
    features.statistics = moments
    entry = {
        "what": f"FFHQ at {side}² as clean-fid has it: {images} images",
        "split": split,
        "count": images,
        "filter": filtered,
        "statistics": str(path),
        "statistics_sha256": digest(path),
    }
    return Reference(side, entry, SetStatistics.of_features(features, {}))
