"""Find the training images nearest to some samples, to see if a model memorised them.

<samples>/neighbours.png    a row for each sample: the sample, then its nearest training images
<samples>/neighbours.json   their names and distances, and those of held-out images to theirs
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config import Resolution, height_width, to_tree
from ldm.data import DataConfig, Source, evaluation_batches, holds_out, open_source
from ldm.data.loader import FaultCount, stack
from ldm.data.photos import PhotoSource
from ldm.data.transforms import CorruptImage, center_crop
from ldm.device import full_float32, resolve_device
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.files import check_writable, to_json, write_together
from ldm.images import as_float, from_pixels, grid, to_pil
from ldm.logbook import console, progress_bar
from ldm.run_folder import provenance
from pipelines.sampling import sample_folder
from pipelines.sampling.model import LatentModel
from pipelines.sampling.sample_folder import SampleFolder

Space = Literal["latents", "pixels"]
Embed = Callable[[Tensor], Tensor]
"""Images of a batch (B, C, H, W) → points (B, D), whose distance is the root mean square
difference."""
Crop = tuple[int, int, int, int]
"""Index of a training image, row and column of its window (−1: its centre crop), 1 if mirrored."""

SIDE = (
    64  # pixels are compared at this longer side at most: finer, a shift of one would hide a copy
)
UNITS = {"latents": "standard deviations of the latents", "pixels": "levels of 255"}


@full_float32()
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
    their standard deviations; in "pixels" between images downsampled to 64×64, in levels of 255.
    The distances of held-out images, which cannot have been memorised, are given for comparison.

    Training images are the centre crops, or, where training took random crops (always of the
    built-in photographs), windows of every image that overlap by half: a crop between them is off
    by a quarter of a side at most. They are compared mirrored, too, if training mirrored them.

    Args:
        samples: None: the newest.
        data: None: the training data of the samples' model. Crops, flips and the split are as in
            its training, where this data allows it.
        model: of the samples, for "latents"; None: the one that they name.
    """
    check_at_least(1, count=count, nearest=nearest, batch_size=batch_size)
    where = resolve_device(device)
    folder = SampleFolder(Path(samples or sample_folder.newest_samples()), count, least=1)
    check_writable(folder.path / "neighbours.json", advice="copy the samples to another folder")
    config, train = _open_training_data(folder, data)
    embed = _embedding(space, folder, model, where)
    console.print(f"comparing {folder.path} with {config.source}", markup=False)

    size = folder.resolution
    queries = [embed(batch.images) for batch in folder.batches(batch_size)]
    if holds_out(config):
        val = open_source(config, "val", size)
        held_out = evaluation_batches(val, size, batch_size, limit=len(folder))
        queries += [embed(batch.images) for batch in held_out]
    stream = _training_images(train, config, size, batch_size)
    distances, crops = _search(torch.cat(queries), stream, embed, config.flip, nearest, len(train))

    rows = [
        [from_pixels(folder.load(i), folder.range)] + [_cut(train, crop, size) for crop in crops[i]]
        for i in range(len(folder))
    ]
    sheet = torch.from_numpy(np.stack([*chain(*rows)])).permute(0, 3, 1, 2)
    result = _describe(folder, config, train, space, distances, crops)
    drawn = to_pil(grid(sheet, columns=len(rows[0])))
    write_together(
        {
            folder.path / sample_folder.NEIGHBOURS: lambda file: drawn.save(file, "PNG"),
            folder.path / "neighbours.json": to_json(result),
        }
    )
    return result


def _describe(
    folder: SampleFolder,
    config: DataConfig,
    train: Source,
    space: Space,
    distances: Tensor,
    crops: list[list[Crop]],
) -> dict[str, Any]:
    """The result; rows of `distances` and `crops` are the samples, then held-out images."""

    def neighbour(distance: float, crop: Crop) -> dict[str, Any]:
        index, row, column, mirrored = crop
        return {
            "name": train.name(index),
            "distance": distance,
            "index": index,
            "window": None if row < 0 else (row, column),
            "mirrored": bool(mirrored),
        }

    found = distances[: len(folder)].tolist()
    held_out = distances[len(folder) :, 0].tolist()
    return {
        "format": 1,
        "space": space,
        "unit": UNITS[space],
        "folder": str(folder.path),
        "made_with": folder.made_with,
        "data": to_tree(config),
        "median_nearest": {
            "samples": median(row[0] for row in found),
            "held_out": median(held_out) if held_out else None,
        },
        "samples": [
            {"sample": folder.name(i), "nearest": [*map(neighbour, row, crops[i])]}
            for i, row in enumerate(found)
        ],
        "held_out_nearest": held_out,
        **provenance(),
    }


# --------------------------------------------------------------------------------- the space
def _open_training_data(folder: SampleFolder, data: str | None) -> tuple[DataConfig, Source]:
    own = sample_folder.trained_on(folder)
    if data is None:
        if own is None:
            raise UsageError(f"{folder.path} does not name its model's training data: give --data")
        return own, open_source(own, "train", folder.resolution)
    config = (own or DataConfig()).model_copy(update={"source": data})
    try:
        return config, open_source(config, "train", folder.resolution)
    except UsageError:  # a split, or classes, that this data cannot have
        config = config.model_copy(update={"held_out": None, "labels": False})
        return config, open_source(config, "train", folder.resolution)


def _embedding(space: Space, folder: SampleFolder, path: Path | None, where: torch.device) -> Embed:
    model = _load_model(folder, path, where) if space == "latents" else None

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        if model is not None:
            points = model.encode(as_float(images)).flatten(1) / model.codec.sigma_data
        else:
            longer = max(images.shape[2:])
            size = [max(1, side * min(SIDE, longer) // longer) for side in images.shape[2:]]
            levels = images if images.dtype == torch.uint8 else (images + 1) * 127.5
            small = F.interpolate(levels.to(where).float(), size=size, mode="area")
            points = small.flatten(1)
        return points / points.shape[1] ** 0.5

    return embed


def _load_model(folder: SampleFolder, path: Path | None, where: torch.device) -> LatentModel:
    named = (folder.made_with or {}).get("model", {})
    instead = "give --model, or --space pixels"
    if path is None and "path" not in named:
        raise UsageError(f"{folder.path} does not name its model: {instead}")
    path = path or Path(named["path"])
    model = LatentModel.from_pretrained(path, where, "fp32")
    if not sample_folder.is_same_model(named, model.identifiers):
        raise LdmError(f"{path} is not the model that {folder.path} was sampled from: {instead}")
    named_size = (folder.made_with or {}).get("resolution")  # any that the model can sample
    if folder.resolution != model.recipe.resolution and named_size is None:
        raise LdmError(
            f"{path} makes images of another size than those in {folder.path}: {instead}"
        )
    return model


# ------------------------------------------------------------------------------- the search
def _search(
    queries: Tensor,
    stream: Iterator[tuple[Tensor, list[Crop]]],
    embed: Embed,
    flip: bool,
    nearest: int,
    total: int,
) -> tuple[Tensor, list[list[Crop]]]:
    """Distances (queries, k) of the k nearest training images, rising, and these images."""

    def distances_to(images: Tensor) -> Tensor:
        # not by the product of matrices: near 0, where copies are, it would cancel
        how = "donot_use_mm_for_euclid_dist"
        return torch.cdist(queries, embed(images), compute_mode=how).cpu()

    best = torch.empty(len(queries), 0)
    crops = torch.empty(len(queries), 0, 4, dtype=torch.long)
    with progress_bar("images") as bar:
        task = bar.add_task("comparing", total=total, speed="", note="")
        for images, here in stream:
            distances = distances_to(images)
            fresh = torch.tensor(here).expand(len(queries), -1, -1)
            if flip:  # the nearer of the two, for it is one image
                other = distances_to(images.flip(3))
                fresh = torch.cat([fresh[..., :3], (other < distances)[..., None]], 2)
                distances = torch.minimum(distances, other)
            best, order = torch.cat([best, distances], 1).sort(dim=1, stable=True)
            best, order = best[:, :nearest], order[:, :nearest, None].expand(-1, -1, 4)
            crops = torch.cat([crops, fresh], 1).gather(1, order)
            bar.update(task, completed=here[-1][0] + 1)
    return best, [[(i, r, c, m) for i, r, c, m in row] for row in crops.tolist()]


def _training_images(
    train: Source, config: DataConfig, resolution: Resolution, batch_size: int
) -> Iterator[tuple[Tensor, list[Crop]]]:
    """Yield images (b, C, H, W), as in a `Batch`, that training may have seen."""
    if not (config.crop == "random" or isinstance(train, PhotoSource)):
        for batch in evaluation_batches(train, resolution, batch_size, workers=config.workers):
            yield batch.images, [(k, -1, -1, 0) for k in batch.k.tolist()]
        return
    faults = FaultCount(len(train))
    for index in range(len(train)):
        try:
            image = train.load_at_least(index, resolution)
        except CorruptImage as error:
            faults.add({train.name(index): str(error)})
            continue
        height, width = height_width(resolution)
        corners = _windows(image.shape, resolution)
        for first in range(0, len(corners), batch_size):
            some = corners[first : first + batch_size]
            cut = [image[r : r + height, c : c + width] for r, c in some]
            yield stack(cut, resolution, train), [(index, r, c, 0) for r, c in some]


def _windows(shape: tuple[int, ...], resolution: Resolution) -> list[tuple[int, int]]:
    """Corners (row, column) of windows half a side apart, the last ones flush with the edge."""
    rows, columns = (
        sorted({*range(0, length - side + 1, max(side // 2, 1)), length - side})
        for length, side in zip(shape, height_width(resolution), strict=False)
    )
    return [(row, column) for row in rows for column in columns]


def _cut(train: Source, crop: Crop, resolution: Resolution) -> np.ndarray:
    """Load a training image again, (H, W, C) in [−1, 1]."""
    index, row, column, mirrored = crop
    image = train.load_at_least(index, resolution)
    height, width = height_width(resolution)
    window = image[row : row + height, column : column + width]
    image = center_crop(image, resolution) if row < 0 else window
    return from_pixels(image[:, ::-1] if mirrored else image, train.range)
