"""References that samples are compared with: images of a data set, or statistics in a file.

A pass over a data set is made once: its statistics are kept in the cache, as
$LDM_CACHE/statistics/<key>.npz. The key is a SHA-256 over all that decides the features: the
images' content, the split, the resolution, the crop, the extractor's weights and resizing, and the
version of Pillow, which decodes and resizes. Patches are not kept but cut anew.

clean-fid publishes mean and covariance of Inception's features of FFHQ (Parmar et al. 2022) at 256²
and 1024². At 256² they are of the data set's own tfrecords, downsampled from 1024² by averaging.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
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
from ldm.data.hf import is_hub
from ldm.data.loader import find_filter, read_preparation
from ldm.data.remote import is_remote
from ldm.data.sources import Part, Split
from ldm.data.transforms import covers
from ldm.distributed import from_main
from ldm.errors import LdmError, UsageError
from ldm.hub import cache_folder, find_or_fetch
from ldm.logbook import console
from ldm.metrics import FeatureStatistics
from ldm.metrics.features import FeatureSet
from ldm.metrics.inception import Extractor, FeatureExtractor, digest
from ldm.records import Count, checked, read_arrays, schema
from ldm.run_folder import provenance
from pipelines.measuring.statistics import (
    SEED,
    CentreCrops,
    Hashes,
    SetStatistics,
    accumulate,
    draw_images,
    pack_hashes,
)


# ------------------------------------------------------------------------ facts about a data set
def resolve_source(source: str) -> str | Path:
    """Return the place of a data set, whatever path names it."""
    named = source == PHOTOS or is_hub(source) or is_remote(source)
    return source if named else Path(source).expanduser().resolve()


def name_data(source: str) -> str:
    """Name a data set in a file name, as in `imagenet-val-1f0c52`."""
    if source == PHOTOS:
        return source
    where = Path(resolve_source(source))
    # two folders of the path, for many data sets end in /val; and a hash, for many end in x/val
    digits = sha256(str(where).encode()).hexdigest()[:6]
    return "-".join([*where.parts[-2:], digits]).replace(":", "-")


def is_same(config: DataConfig | None, source: str) -> bool:
    """Test whether a config, if there is one, is of the data set at `source`."""
    return config is not None and resolve_source(config.source) == resolve_source(source)


def choose_data(data: str | DataConfig | None, own: DataConfig | None) -> DataConfig | None:
    """Return the named data, or by default a model's own."""
    if data is None or isinstance(data, DataConfig):
        return data or own
    # split as for training: another split would hold out images that were trained on
    return own if is_same(own, data) else DataConfig(source=data)


# ------------------------------------------------------------------------ images of a data set
class Reference:
    """Real images to compare with, or statistics of them.

    Attributes:
        about: the reference's entry in a result. `filter` is the filter that the images were
            downsampled with, where it is known.
        known: statistics of images that need not be here.
        config, source: the data; None where only statistics are there.
    """

    config: DataConfig | None = None
    source: Source | None = None

    def __init__(
        self, resolution: Resolution, about: dict[str, Any], known: SetStatistics | None = None
    ) -> None:
        self.resolution, self.about, self.known = resolution, about, known
        self.what = about["what"]
        self.filter = about["filter"]

    def __len__(self) -> int:
        return self.about["count"]

    def statistics(
        self, ranks: PartialState, extractor: Extractor | None, swd_images: int, **how: Any
    ) -> SetStatistics:
        """Load or `accumulate` the statistics; complete on the main process only."""
        assert self.known is not None
        return self.known


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
        """Yield this process's share of the images; more than 1 % corrupt ones are an error."""
        if not self.is_crops:
            yield from self.part(range(len(self))).batches(batch_size, rank, world, workers)
            return
        unmirrored = self.config.model_copy(update={"flip": False})
        stop = -(-len(self) // batch_size) * batch_size  # whole batches; the last is cut
        for batch in batches(
            self.source, unmirrored, self.resolution, SEED, 0, stop, batch_size, rank, world
        ):
            wanted = batch.k < len(self)
            if wanted.any():  # of the last batch a process may have none
                yield Batch(batch.images[wanted], batch.k[wanted], batch.labels[wanted])

    def part(self, indices: range | np.ndarray) -> CentreCrops:
        """Return some of the images, numbered anew; not of random crops."""
        return CentreCrops(Part(self.source, indices), self.resolution, self.what, len(self))

    def statistics(
        self, ranks: PartialState, extractor: Extractor | None, swd_images: int, **how: Any
    ) -> SetStatistics:
        """Accumulate over all images, or load the features kept of an earlier pass.

        The numbers are the same either way, up to the last digits of float64.
        """
        how["patch_seed"] = SEED + 1
        identity = from_main(ranks, lambda: identify(self, extractor))
        if identity is None:
            return accumulate(self, ranks, extractor, swd_images=swd_images, **how)
        path = statistics_path(identity)
        origin: dict[str, Any] = {"content": identity["content"], "statistics": str(path)}
        kept = _load_kept(path, identity) if ranks.is_main_process else None
        is_kept = from_main(ranks, lambda: kept is not None)
        if is_kept:
            drawn = draw_images(len(self), swd_images).numpy()
            found = accumulate(self.part(drawn), ranks, swd_images=len(drawn), **how)
            if kept is not None:
                found.features, found.hashes = kept
        else:
            found = accumulate(self, ranks, extractor, swd_images=swd_images, **how)
            if ranks.is_main_process and not _keep(path, identity, found, self):
                origin["statistics"] = None
        self.about |= origin | {"kept": is_kept}
        return found


# ---------------------------------------------------------------------------- kept statistics
FORMAT = 1


def identify(reference: ImageReference, extractor: Extractor | None) -> dict[str, Any] | None:
    """Return all that decides a reference's features; None where they are not to be kept."""
    # a user's own extractor does not tell when its weights change
    if not isinstance(extractor, FeatureExtractor) or reference.config.source == PHOTOS:
        return None
    if len(reference) < extractor.dim:  # their covariance takes more room than they take time
        return None
    return {
        "format": FORMAT,
        "content": content_identity(reference.source, len(reference)),
        "split": reference.about["split"],
        "images": len(reference),
        "resolution": plain_size(reference.resolution),
        "crop": "center",
        "extractor": _identify_extractor(extractor),
        "pillow": version("pillow"),
        **({} if reference.source.channels == 3 else {"channels": reference.source.channels}),
        **({"range": list(reference.source.range)} if reference.source.range else {}),
        **({} if (kind := find_type(reference.source)) in ("uint8", None) else {"dtype": kind}),
        **({} if reference.config.small == "error" else {"small": reference.config.small}),
    }


def _identify_extractor(extractor: Extractor) -> dict[str, Any]:
    return {"sha256": extractor.sha256, "mode": extractor.mode, "dim": extractor.dim}


def statistics_path(identity: dict[str, Any]) -> Path:
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "statistics" / f"{key[:32]}.npz"


def _keep(
    path: Path, identity: dict[str, Any], found: SetStatistics, reference: ImageReference
) -> bool:
    """Write the features and hashes to the cache, and return True, if that is possible."""
    assert found.features is not None
    about = {
        "identity": identity,
        "reference": reference.about,
        "fingerprints": base64.b64encode(pack_hashes(found.hashes)).decode(),
        **provenance(),
    }
    try:
        found.features.save(path, about)
    except LdmError as error:
        console.print(f"note: the reference's statistics are not kept: {error}", markup=False)
        return False
    return True


def _load_kept(path: Path, identity: dict[str, Any]) -> tuple[FeatureSet, Hashes] | None:
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
ADDRESS = "https://www.cs.cmu.edu/~clean-fid/stats"

PUBLISHED = {
    "ffhq256": ("trainval70k", 256, 70_000, "box"),
    "ffhq1024": ("trainval70k", 1024, 70_000, None),
    "ffhq256-50k": ("trainval", 256, 50_000, "box"),
    "ffhq1024-50k": ("trainval", 1024, 50_000, None),
}
"""Statistics that clean-fid publishes: split, resolution, images, and filter of downsampling."""


def open_statistics(
    name: str, extractor: Extractor | None, missing: str | None = None
) -> Reference:
    """Open `PUBLISHED` statistics by name, or kept ones by the path of their .npz.

    They are of features alone: without an extractor, `missing` is the error.
    """
    check_statistics(name)
    path = Path(name).expanduser()
    if name not in PUBLISHED:
        features, hashes, about = _read_kept(path, "give another --reference, or --data")
    if extractor is None:
        raise LdmError(f"{name}: {missing}")
    if name in PUBLISHED:
        return _open_published(name, extractor)
    identity, entry = about["identity"], about["reference"]
    theirs, ours = identity["extractor"], _identify_extractor(extractor)
    if theirs != ours:
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
    split, side, images, filtered = PUBLISHED[name]
    # the name that clean-fid gives and looks for
    file = f"ffhq_{extractor.mode.replace('-', '_')}_{split}_{side}.npz"
    instead = "compare with your own images by --data"
    path = find_or_fetch(file, f"{ADDRESS}/{file}", "", statistics_folders(), instead)
    try:
        parts = read_arrays(path)
        moments = FeatureStatistics.from_moments(images, parts["mu"], parts["sigma"])
    except (LdmError, KeyError, ValueError, TypeError) as error:
        raise LdmError(f"{path} is damaged: delete it to have it fetched again") from error
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


def statistics_folders() -> list[Path]:
    """Return the folders that may hold clean-fid's statistics: our cache, and its own."""
    import cleanfid

    return [cache_folder() / "statistics", Path(cleanfid.__file__).parent / "stats"]
