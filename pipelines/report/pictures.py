"""What the models of runs make of the same held-out images, and of the same seeds."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders.loading import AutoencoderFile, assemble, read_autoencoder
from ldm.checkpoint import fingerprint
from ldm.data import DataConfig, open_source, sheet_images
from ldm.errors import LdmError
from ldm.images import latents_as_rgb, to_float, to_uint8
from ldm.logbook import console
from ldm.metrics import psnr
from pipelines.analysis.subjects import choose_data
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.report import page
from pipelines.report.records import Record

T = TypeVar("T")
UNUSABLE = "Its model could not be used"


@dataclass(frozen=True)
class Looks:
    """What a report shows of models.

    Attributes:
        images: how many held-out images, and how many samples.
        seed, steps: of the samples.
        data: in place of what each run was trained on.
        resolution: of reconstructions, in pixels, in place of the highest that runs ended at.
        device: where the models compute.
    """

    images: int
    seed: int
    steps: int
    data: str | None
    resolution: int | None
    device: torch.device


# -------------------------------------------------------------------------------- stage one
def reconstructions_section(
    records: Sequence[Record], titles: Mapping[str, page.Markup], looks: Looks, of: str
) -> str:
    """Held-out images and what each autoencoder makes of them; those of one data set together."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        data = _data(record, looks.data)
        key = "" if data is None else data.model_dump_json(exclude={"crop", "flip", "workers"})
        groups[key].append(record)
    parts = [_reconstructions(group, titles, looks) for group in groups.values()]
    # of other data, nobody has looked whether it is in the training's
    own = all(_data(record, looks.data) == _data(record, None) for record in records)
    text = (
        f"The first held-out images{', which training never saw,' if own else ''} and what each "
        "model makes of them: the decoder's answer to the posterior's mean. Scroll sideways for "
        "more; images keep their pixels."
    )
    if not own:
        text += (
            " Not all runs were trained on the rest of this data: whether one has seen these "
            "images elsewhere is not known here, `ldm eval-ae` looks."
        )
    return page.section(f"Reconstructions{of}", text, *parts)


def _reconstructions(
    records: Sequence[Record], titles: Mapping[str, page.Markup], looks: Looks
) -> str:
    config = _data(records[0], looks.data)
    resolution = looks.resolution or max(record.resolution for record in records)
    originals, why = _attempt(lambda: _held_out(config, resolution, looks.images))
    if originals is None:
        why = f"Its held-out images could not be read ({why})"
        for record in records:
            _attempt(lambda record=record: _read(record))  # for the model's hash
        return "".join(_own_picture(r, titles, "recon", why) for r in records)
    what = f"{config.source}, {len(originals)} held-out images at {resolution}²"
    rows: list[tuple[str, Tensor]] = [(f"originals: {what}", originals)]
    latents: list[tuple[str, Tensor]] = []
    missing = []
    for record in records:
        made, why = _attempt(lambda record=record: _reconstruct(record, originals, looks.device))
        if made is None:
            missing.append(_own_picture(record, titles, "recon", f"{UNUSABLE} ({why})"))
            continue
        recon, shown = made
        each = psnr(originals, recon)
        listed = " · ".join(f"{value:.1f}" for value in each.tolist())
        told = f"PSNR {each.mean().item():.2f} dB ({listed})"
        if record.resolution != resolution:
            told += f"; it was trained up to {record.resolution}²"
        title = titles[record.label]
        rows.append((page.Markup(f"{title}: {told}"), recon))
        latents.append((title, shown))
    if not latents:
        return "".join(missing)
    folded = page.folded("their latents: the first three channels as colours", page.strips(latents))
    return "".join([page.strips(rows), folded, *missing])


def _held_out(config: DataConfig | None, resolution: int, count: int) -> Tensor:
    """The first held-out images, (n, 3, R, R) in [−1, 1].

    Raises:
        LdmError: it is not known of which data or size, or they cannot be read.
    """
    if config is None or not resolution:
        lacking = "--data" if config is None else "--resolution"
        raise LdmError(f"its config.yaml does not say which they are: give {lacking}")
    return to_float(sheet_images(open_source(config, "val", resolution), resolution, count))


@torch.no_grad()
def _reconstruct(record: Record, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """8-bit reconstructions of images in [−1, 1], and their latents as RGB at the images' size."""
    autoencoder = assemble(_read(record), record.folder).to(device).eval()
    latents = autoencoder.encode(images.to(device)).mode()
    recon = autoencoder.decode(latents, images.shape[-2:])
    shown = F.interpolate(latents_as_rgb(latents), images.shape[-2:])
    return to_float(to_uint8(recon)).cpu(), shown.cpu()


def _read(record: Record) -> AutoencoderFile:
    """A run's ckpt.pt; the record is told which weights they are."""
    path = record.folder / "ckpt.pt"
    if not path.is_file():
        raise LdmError("there is no ckpt.pt")
    file = read_autoencoder(path)
    record.sha256 = fingerprint(file.weights)
    return file


# -------------------------------------------------------------------------------- stage two
def samples_section(
    records: Sequence[Record], titles: Mapping[str, page.Markup], looks: Looks, of: str
) -> str:
    """Samples of the same seed of every model of stage two."""
    rows: list[tuple[str, Tensor]] = []
    missing = []
    for record in records:
        made, why = _attempt(lambda record=record: _sample(record, looks))
        if made is None:
            missing.append(_own_picture(record, titles, "samples", f"{UNUSABLE} ({why})"))
        else:
            told = f"{record.images_seen:,} images seen"
            rows.append((page.Markup(f"{titles[record.label]}: {told}"), made))
    text = (
        f"Images 0 to {looks.images - 1} of seed {looks.seed}, {looks.steps} steps, in float32: "
        "models of the same latents begin with the same noise. Scroll sideways for more."
    )
    return page.section(
        f"Samples{of}", text, page.strips(rows) if rows else "", *missing
    )  # fmt: skip


def _sample(record: Record, looks: Looks) -> Tensor:
    if not (record.folder / "ckpt.pt").is_file():
        raise LdmError("there is no ckpt.pt")
    pipe = LatentDiffusionPipeline.from_pretrained(record.folder, looks.device, "fp32")
    record.sha256 = pipe.sha256
    console.print(f"sampling {looks.images} images of {record.label}", markup=False)
    return pipe(n=looks.images, seed=looks.seed, steps=looks.steps)


# ------------------------------------------------------------------------- what is not there
def _data(record: Record, asked: str | None) -> DataConfig | None:
    """What a run's held-out images are of, its own data as its training split it; None where
    nothing is asked for and its settings do not say."""
    told = record.config if isinstance(record.config.get("data"), dict) else {}
    try:
        return choose_data({record.label: told}, asked)
    except LdmError:  # they do not, or are of another version
        return None if asked is None else DataConfig(source=asked)


def _attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    """What could be made; or None, and the line that says why not."""
    try:
        return make(), ""
    except LdmError as error:
        return None, str(error)


def _own_picture(record: Record, titles: Mapping[str, page.Markup], prefix: str, why: str) -> str:
    """What a run has drawn of itself, where its model cannot be asked, and why it cannot, which a
    person is told at once, too."""
    console.print(f"note: {record.label}: {why}", markup=False)
    path = record.newest_picture(prefix)
    head = f"<p><b>{titles[record.label]}</b></p>"
    if path is None:
        return head + page.note(f"{why}, and it has drawn no picture yet.")
    drawn = _embed(path)
    if drawn is None:
        return head + page.note(f"{why}, and its newest picture cannot be read.")
    seen = path.stem.rpartition("-")[2]
    told = f"{why}; this is the newest picture that the run drew itself"
    told += f", at {int(seen):,} images seen." if seen.isdigit() else "."
    return head + page.note(told) + drawn


def _embed(path: Path) -> str | None:
    try:
        return page.png(path, path.name)
    except OSError:
        return None
