"""The training images nearest to some samples: has the model learnt them by heart?

<samples>/neighbours.png    a row for each sample: the sample, then its nearest training images
<samples>/neighbours.json   which they are, how far, and how far held-out images are from theirs
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config import to_tree, validate
from ldm.data import DataConfig, Source, evaluation_batches, holds_out, open_source
from ldm.data.loader import FaultCount
from ldm.data.photos import PhotoSource
from ldm.data.sources import load_at_least
from ldm.data.transforms import CorruptImage, center_crop, mirror
from ldm.device import resolve_device
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.images import save_grid, to_float
from ldm.logbook import console, progress_bar
from ldm.run_folder import provenance
from pipelines.sampling.model import LatentModel
from pipelines.sampling.sample_folder import NEIGHBOURS, newest_samples
from pipelines.sampling.source import SampleFolder

Space = Literal["latents", "pixels"]
Embed = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, R, R) → points (B, D), whose distance is the root mean square difference."""

SIDE = 64  # pixels are compared at this side at most: finer, a shift of one would hide a copy
UNITS = {"latents": "standard deviations of the latents", "pixels": "levels of 255"}


class Place(NamedTuple):
    """Where a training image was cut from: its source's index, and the window's corner."""

    index: int
    window: tuple[int, int] | None
    mirrored: bool


def find_neighbours(
    samples: Path | None = None,
    data: str | None = None,
    count: int = 8,
    nearest: int = 5,
    space: Space = "latents",
    model: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Compare the first samples of a folder with every training image; write and return the result.

    A distance is a root mean square difference. In "latents" it is between posterior means, in
    their standard deviations; in "pixels" between images brought down to 64×64, in levels of 255.
    The same distances of held-out images, which cannot have been learnt, say what is near.

    Training images are the central squares, or, where training took random crops (always of the
    built-in photographs), windows of every image that overlap by half: a crop between them is off
    by a quarter of a side at most. They are compared mirrored, too, where training mirrored them.

    Args:
        samples: as `ldm sample` writes it, or any folder of PNGs; by default the newest.
        data: as `DataConfig.source`; by default what the samples' model learnt from. Crops, flips
            and the split are as in its training, so far as they can be of this data.
        model: of the samples, for "latents"; by default the one that they name.

    Raises:
        UsageError: a number below one, or the samples do not say what to compare with.
        LdmError: samples, data or model are not there or cannot be read; or the model is another.
    """
    for name, value in (("count", count), ("nearest", nearest), ("batch size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} {value}: it must be at least 1")
    where = resolve_device(device)
    folder = SampleFolder(Path(samples or newest_samples()), count, least=1)
    config, train = _open_reference(folder, data)
    embed = _embedding(space, folder, model, where)
    console.print(f"comparing {folder.path} with {config.source}", markup=False)

    ours = torch.from_numpy(np.stack([folder.load(i) for i in range(len(folder))]))
    queries = [embed(part) for part in ours.permute(0, 3, 1, 2).split(batch_size)]
    held_out = 0
    if holds_out(config):
        val = open_source(config, "val", folder.resolution)
        for batch in evaluation_batches(val, folder.resolution, batch_size, limit=len(folder)):
            queries.append(embed(batch.images))
            held_out += len(batch.images)
    stream = _training_images(train, config, folder.resolution, batch_size)
    distances, places = _search(torch.cat(queries), stream, embed, config.flip, nearest, len(train))

    found = len(folder)
    result = {
        "format": 1,
        "space": space,
        "unit": UNITS[space],
        "folder": str(folder.path),
        "made_with": folder.made_with,
        "data": to_tree(config),
        "median_nearest": {
            "samples": median(distances[:found, 0].tolist()),
            "held_out": median(distances[found:, 0].tolist()) if held_out else None,
        },
        "samples": [
            {
                "sample": folder.name(i),
                "nearest": [
                    {"name": train.name(place.index), "distance": distance} | place._asdict()
                    for distance, place in zip(distances[i].tolist(), places[i], strict=True)
                ],
            }
            for i in range(found)
        ],
        "held_out_nearest": distances[found:, 0].tolist(),
        **provenance(),
    }
    rows = [
        [folder.load(i), *(_cut(train, place, folder.resolution) for place in places[i])]
        for i in range(found)
    ]
    sheet = to_float(torch.from_numpy(np.stack([*chain(*rows)])).permute(0, 3, 1, 2))
    save_grid(sheet, folder.path / NEIGHBOURS, columns=len(rows[0]))
    write_json(folder.path / "neighbours.json", result)
    return result


# --------------------------------------------------------------------------------- the space
def _open_reference(folder: SampleFolder, data: str | None) -> tuple[DataConfig, Source]:
    """The training images, and what is known of how training saw them."""
    made_with = (folder.made_with or {}).get("data")
    if data is None and made_with is None:
        raise UsageError(f"{folder.path} does not say what its model learnt from: give --data")
    config = validate(DataConfig, made_with or {})
    if data is not None:
        config = config.model_copy(update={"source": data})
    try:
        return config, open_source(config, "train", folder.resolution)
    except UsageError:  # a split, or classes, that this data cannot have
        if data is None:
            raise
    config = config.model_copy(update={"held_out": None, "labels": False})
    return config, open_source(config, "train", folder.resolution)


def _embedding(space: Space, folder: SampleFolder, path: Path | None, where: torch.device) -> Embed:
    if space == "pixels":
        return lambda images: _pixels(images.to(where))
    model = _load_model(folder, path, where)

    @torch.no_grad()
    def latents(images: Tensor) -> Tensor:
        z = model.encode(to_float(images)).flatten(1) / model.codec.sigma_data
        return z / z.shape[1] ** 0.5

    return latents


def _pixels(images: Tensor) -> Tensor:
    small = F.interpolate(
        images.float(), size=(min(SIDE, images.shape[2]),) * 2, mode="area"
    ).flatten(1)
    return small / small.shape[1] ** 0.5


def _load_model(folder: SampleFolder, path: Path | None, where: torch.device) -> LatentModel:
    named = (folder.made_with or {}).get("model", {})
    if path is None:
        if "path" not in named:
            raise UsageError(
                f"{folder.path} does not say which model it is of: give --model, or --space pixels"
            )
        path = Path(named["path"])
    model = LatentModel.from_pretrained(path, where, "fp32")
    if not model.matches(named):
        raise LdmError(
            f"{path} is not the model that {folder.path} was sampled from: "
            "give --model, or --space pixels"
        )
    side = folder.resolution // model.codec.autoencoder.downsampling
    if model.latent_shape[1:] != (side, side):
        raise LdmError(f"{path} makes images of another size than those in {folder.path}")
    return model


# ------------------------------------------------------------------------------- the search
def _search(
    queries: Tensor,
    stream: Iterator[tuple[Tensor, list[Place]]],
    embed: Embed,
    flip: bool,
    nearest: int,
    total: int,
) -> tuple[Tensor, list[list[Place]]]:
    """Distances (queries, k) of the k nearest training images, rising, and which they are."""
    best = torch.empty(len(queries), 0)
    places: list[list[Place]] = [[] for _ in queries]
    with progress_bar("images") as bar:
        task = bar.add_task("comparing", total=total, speed="", note="")
        for images, fresh in stream:
            distances = _distances(queries, embed(images))
            mirrored = torch.zeros_like(distances, dtype=torch.bool)
            if flip:  # the nearer of the two, for it is one image
                other = _distances(queries, embed(images.flip(3)))
                distances, mirrored = torch.minimum(distances, other), other < distances
            best, order = torch.cat([best, distances], 1).sort(dim=1, stable=True)
            best, order = best[:, :nearest], order[:, :nearest]
            for i, (chosen, turned) in enumerate(
                zip(order.tolist(), mirrored.tolist(), strict=True)
            ):
                both = places[i] + [
                    p._replace(mirrored=m) for p, m in zip(fresh, turned, strict=True)
                ]
                places[i] = [both[j] for j in chosen]
            bar.update(task, completed=fresh[-1].index + 1)
    return best, places


def _distances(queries: Tensor, points: Tensor) -> Tensor:
    # not by the product of matrices: near 0, where copies are, it would cancel
    how = "donot_use_mm_for_euclid_dist"
    return torch.cdist(queries, points, compute_mode=how).cpu()


def _training_images(
    train: Source, config: DataConfig, resolution: int, batch_size: int
) -> Iterator[tuple[Tensor, list[Place]]]:
    """What training may have seen of every image: uint8 (b, 3, R, R), and where it is."""
    if not (config.crop == "random" or isinstance(train, PhotoSource)):
        for batch in evaluation_batches(train, resolution, batch_size, workers=config.workers):
            yield batch.images, [Place(k, None, False) for k in batch.k.tolist()]
        return
    faults = FaultCount(len(train))
    for index in range(len(train)):
        try:
            image = load_at_least(train, index, resolution)
        except CorruptImage as error:
            faults.add({train.name(index): str(error)})
            continue
        places = [Place(index, corner, False) for corner in _windows(image.shape, resolution)]
        for first in range(0, len(places), batch_size):
            some = places[first : first + batch_size]
            cut = np.stack([_window(image, place.window, resolution) for place in some])
            yield torch.from_numpy(cut).permute(0, 3, 1, 2), some


def _windows(shape: tuple[int, ...], side: int) -> list[tuple[int, int]]:
    """Corners (row, column) of windows half a side apart, the last ones flush with the edge."""
    rows, columns = (
        sorted({*range(0, length - side + 1, max(side // 2, 1)), length - side})
        for length in shape[:2]
    )
    return [(row, column) for row in rows for column in columns]


def _window(image: np.ndarray, corner: tuple[int, int], side: int) -> np.ndarray:
    row, column = corner
    return image[row : row + side, column : column + side]


def _cut(train: Source, place: Place, resolution: int) -> np.ndarray:
    """A training image again, (R, R, 3) uint8."""
    image = train.load(place.index)
    if place.window is None:
        image = center_crop(image, resolution)
    else:
        image = _window(image, place.window, resolution)
    return mirror(image) if place.mirrored else image
