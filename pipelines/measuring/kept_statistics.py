"""The statistics of references, kept under the data's hash: a pass over a data set is made once.

$LDM_CACHE/statistics/<key>.npz   mean, covariance and a sample of the features of one reference

The key is a SHA-256 over all that decides the features: the images' content (see
`ImageReference.content`), the split, the resolution, the crop; the extractor's weights and its
resizing; the version of Pillow, which decodes and resizes. What only some images are needed for,
patches for the sliced Wasserstein distance, is not kept but made anew from these.
"""

import base64
import json
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.dataset import PHOTOS
from ldm.errors import LdmError
from ldm.logbook import console
from ldm.metrics.extractors import Extractor
from ldm.metrics.feature_set import FeatureSet
from ldm.metrics.inception import FeatureExtractor
from ldm.processes import from_main
from ldm.run_folder import provenance
from ldm.weights import cache_folder
from pipelines.measuring.fingerprints import Prints
from pipelines.measuring.image_pass import Seen, Tools, survey_images
from pipelines.measuring.reference import ImageReference
from pipelines.measuring.survey import drawn_images

FORMAT = 1


def survey_reference(reference: ImageReference, tools: Tools, mode: str) -> Seen | None:
    """See every image of a reference once, or take up what was kept of it; None but on the main
    process.

    The numbers are the same either way, but for the last digits of float64.

    Args:
        mode: of the extractor's resizing.

    Raises:
        LdmError: as `survey_images`.
    """
    identity = from_main(tools.ranks, lambda: identify(reference, tools.extractor, mode))
    if identity is None:
        return survey_images(reference, tools)
    about = {"content": identity["content"], "statistics": str(statistics_path(identity))}
    kept = _load(identity) if tools.ranks.is_main_process else None
    if from_main(tools.ranks, lambda: kept is not None):
        drawn = drawn_images(len(reference), tools.swd_images)
        patches = replace(tools, extractor=None, swd_images=len(drawn))
        seen = survey_images(reference.part(drawn), patches)
        if seen is None or kept is None:
            return None
        features, prints = kept
        survey = replace(seen.survey, features=features, count=features.count)
        return Seen(survey, prints, about | {"kept": True})
    seen = survey_images(reference, tools)
    if seen is None or seen.survey.features is None or seen.prints is None:
        return seen
    try:
        _save(seen.survey.features, seen.prints, reference, identity)
    except LdmError as error:
        console.print(f"note: the reference's statistics are not kept: {error}", markup=False)
        about |= {"statistics": None}
    return replace(seen, about=about | {"kept": False})


def identify(
    reference: ImageReference, extractor: Extractor | None, mode: str
) -> dict[str, Any] | None:
    """All that decides a reference's features; None where keeping them would not be right.

    The built-in photographs are quickly cut, into as many crops as there are samples. Fewer images
    than features take less time than their covariance takes room. Of an extractor of one's own
    nothing tells whether its weights are still the same.

    Raises:
        LdmError: a file of the data cannot be read.
    """
    if extractor is None or not isinstance(extractor, FeatureExtractor):
        return None
    if reference.config.source == PHOTOS or len(reference) < extractor.dim:
        return None
    return {
        "format": FORMAT,
        "content": reference.content(),
        "split": reference.split,
        "images": len(reference),
        "resolution": reference.resolution,
        "crop": "center",
        "extractor": name_extractor(extractor, mode),
        "pillow": version("pillow"),
    }


def name_extractor(extractor: Extractor, mode: str) -> dict[str, Any]:
    """What two extractors must share for their features to be compared."""
    return {"sha256": extractor.sha256, "mode": mode, "dim": extractor.dim}


def statistics_path(identity: dict[str, Any]) -> Path:
    """Where the statistics of a reference are kept."""
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "statistics" / f"{key[:32]}.npz"


def read_prints(about: dict[str, Any], count: int) -> Prints:
    """The fingerprints of so many images in what was said of kept statistics.

    Raises:
        LdmError: they are damaged.
    """
    try:
        told = base64.b64decode(about["fingerprints"], validate=True)
        prints = np.frombuffer(told, "<u8").astype(np.uint64)
    except (KeyError, TypeError, ValueError):
        prints = np.empty(0, np.uint64)
    if len(prints) != count:
        raise LdmError("the fingerprints of kept statistics are damaged")
    return prints


def _save(
    features: FeatureSet, prints: Prints, reference: ImageReference, identity: dict[str, Any]
) -> None:
    about = {
        "identity": identity,
        "reference": reference.about(),
        "fingerprints": base64.b64encode(prints.astype("<u8").tobytes()).decode(),
        **provenance(),
    }
    features.save(statistics_path(identity), about)


def _load(identity: dict[str, Any]) -> tuple[FeatureSet, Prints] | None:
    """What was kept of a reference; None where nothing was, or it is damaged, which is said."""
    path = statistics_path(identity)
    if not path.is_file():
        return None
    try:
        features, about = FeatureSet.load(path)
        if about.get("identity") == identity:
            return features, read_prints(about, features.count)
        damage = f"{path} is not what its name says"
    except LdmError as error:
        damage = str(error)
    console.print(f"note: {damage}; computing the reference's statistics anew", markup=False)
    return None
