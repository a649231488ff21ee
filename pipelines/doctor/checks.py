"""What a run needs and may not find: data, published weights, stage one, a device, room.

Every check answers with problems, one line each that says what to do. Nothing is fetched.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Literal
from urllib.request import Request, urlopen

import torch

from autoencoders import Autoencoder, AutoencoderConfig, load_autoencoder
from autoencoders.losses.perceptual import BACKBONES, PUBLISHED, has_backbone
from ldm.checkpoint import fingerprint
from ldm.config import list_presets, load_preset, validate
from ldm.data import DataConfig, Source, holds_out, open_source
from ldm.data.sources import load_at_least
from ldm.data.transforms import CorruptImage
from ldm.device import resolve_precision
from ldm.errors import LdmError
from ldm.metrics.inception import WEIGHTS, published_weights, weight_folders
from ldm.run import RunConfig
from ldm.weights import from_home
from pipelines.latents import check_cache
from pipelines.recipes import PRESETS, AutoencoderRecipe, DiffusionRecipe, find_stage_one

ANSWERS_WITHIN = 5
"""Seconds that a server is given to say how large a file is."""
CPU_WORK = 1e7
"""10⁹ multiply-accumulates that take a CPU of a dozen cores about a day."""
FALLBACK = "litevae-b"
"""The stage one that is assumed where there is none to look at."""


@dataclass(frozen=True)
class Problem:
    """Something that a person should know before the run is begun."""

    level: Literal["error", "warning", "note"]
    """error: the run would stop. warning: it would not go as asked. note: something else would."""
    text: str
    """What, where, and what to do: one line."""


# ------------------------------------------------------------------------------------- data
def check_data(
    config: DataConfig, resolutions: Sequence[int], validates: bool
) -> tuple[Source | None, list[Problem]]:
    """The training images of the last resolution, if they can be opened, and what is wrong.

    Args:
        resolutions: sides R of the training images, in pixels, as they are trained on in turn.
        validates: whether held-out images are looked at, too.
    """
    source: Source | None = None
    try:
        for resolution in resolutions:
            source = open_source(config, "train", resolution)
            load_at_least(source, 0, resolution)
        if validates and holds_out(config):
            open_source(config, "val", resolutions[-1])
    except LdmError as error:
        return source, [Problem("error", str(error))]
    except CorruptImage as error:
        return source, [Problem("warning", f"the first image cannot be read: {error}")]
    return source, []


# ------------------------------------------------------------------------ published weights
def check_perceptual(recipe: AutoencoderRecipe) -> list[Problem]:
    """The classifiers' weights that the losses of stage one look with."""
    needed: dict[str, str] = {}
    if recipe.loss.lpips:
        needed[BACKBONES[recipe.loss.lpips_network]] = "go without, loss.lpips=0"
    if recipe.loss.esrgan:
        needed["VGG-19"] = "go without, loss.esrgan=0"
    if recipe.best_by == "lpips":
        needed.setdefault("VGG-16", "choose best_by=psnr")
    problems = [_fetched(network, instead) for network, instead in needed.items()]
    if "VGG-16" not in needed and not has_backbone("VGG-16"):
        text = f"{_missing('VGG-16')}: held-out LPIPS will not be measured"
        problems.append(Problem("note", text))
    return [problem for problem in problems if problem is not None]


def check_inception() -> list[Problem]:
    """Inception's weights, which FID is measured with; training does without."""
    if published_weights() is not None:
        return []
    text = (
        f"{_missing('Inception')}: `ldm fid` will fetch them; without internet, put {WEIGHTS} in "
        f"{from_home(weight_folders()[0])}"
    )
    return [Problem("note", text)]


def _fetched(network: str, instead: str) -> Problem | None:
    """A classifier's weights that the run would have to fetch before it begins."""
    from torchvision.models import get_weight

    if has_backbone(network):
        return None
    url = get_weight(PUBLISHED[network]).url
    target = from_home(Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2])
    size = ask_size(url)
    if size is None:
        return Problem(
            "error",
            f"{_missing(network)}, and {url} does not answer: put the file at {target}, or "
            f"{instead}",
        )
    return Problem(
        "warning",
        f"{_missing(network)}: the run will first fetch {size / 2**20:,.0f} MiB from {url} to "
        f"{target}",
    )


def _missing(network: str) -> str:
    return f"{network}'s weights are not on this machine"


def ask_size(url: str) -> int | None:
    """Bytes of a file on the web, which is not fetched; None where nobody says so in time."""
    sizes: list[int] = []

    def ask() -> None:
        with suppress(OSError, ValueError, HTTPException):
            request = Request(url, method="HEAD")
            with urlopen(request, timeout=ANSWERS_WITHIN) as answer:
                sizes.append(int(answer.headers.get("Content-Length", 0)))

    # the timeout is each exchange's alone, and looking up a name has none
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWERS_WITHIN)
    return sizes[0] if sizes and sizes[0] > 0 else None


# -------------------------------------------------------------------------------- stage one
def check_autoencoder(
    recipe: DiffusionRecipe, preset: str
) -> tuple[Autoencoder | None, AutoencoderConfig, str, list[Problem]]:
    """Stage one, as training would find it.

    Args:
        preset: stage two's, whose namesake of stage one is assumed where nothing else is known.

    Returns:
        The autoencoder if it is there; its config, or one that is assumed; where it was found, or
        what was assumed; and what is wrong.
    """
    try:
        path = find_stage_one(recipe, preset)
        autoencoder = load_autoencoder(path)
    except LdmError as error:
        presets = {name: kind for kind in PRESETS for name in list_presets(kind)}
        assumed = next(n for n in (recipe.autoencoder, preset, FALLBACK) if n in presets)
        tree = load_preset(presets[assumed], assumed)
        fields = {key: tree[key] for key in AutoencoderConfig.model_fields if key in tree}
        config = validate(AutoencoderConfig, fields)
        return (
            None,
            config,
            f"none yet: one like {assumed} is assumed",
            [Problem("error", str(error))],
        )
    return autoencoder, autoencoder.config, str(path), []


def find_latents(
    recipe: DiffusionRecipe, autoencoder: Autoencoder | None, source: Source | None, precision: str
) -> tuple[int, list[Problem]]:
    """How many images a cache of latents is still to be made of, and what is wrong with its folder.

    Args:
        autoencoder, source: None where they are not there; without images nothing is known.
        precision: of the run, "fp32" or "bf16".
    """
    if not recipe.cache or source is None:
        return 0, []
    known = None if autoencoder is None else fingerprint(autoencoder.state_dict())
    try:
        missing = check_cache(recipe, source, precision, known)
    except LdmError as error:
        return 0, [Problem("error", str(error))]
    return sum(map(len, missing)), []


# --------------------------------------------------------------------------------- the machine
def check_compiler(config: RunConfig) -> list[Problem]:
    """What `run.compile` compiles with."""
    if not config.compile or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        return []
    text = "run.compile needs a C++ compiler, and there is none: install one, or leave it out"
    return [Problem("error", text)]


def check_machine(config: RunConfig, device: torch.device, work: float) -> list[Problem]:
    """The device and its precision.

    Args:
        work: of the whole run, in 10⁹ multiply-accumulates.
    """
    problems = []
    if device.type == "cpu" and torch.cuda.is_available():
        text = "the CPU is asked for, and there is a CUDA GPU: leave out run.device"
        problems.append(Problem("warning", text))
    elif device.type == "cpu" and work > CPU_WORK:
        text = "no CUDA GPU here, and too much work for a CPU; the tiny presets are made for one"
        problems.append(Problem("warning", text))
    if config.precision == "bf16" and resolve_precision("auto", device) != "bf16":
        text = f"bf16 is only emulated on this {device.type}, slowly: run.precision=fp32"
        problems.append(Problem("warning", text))
    return problems


def check_room(
    where: str, needed: int, free: int, instead: str, level: Literal["error", "warning"]
) -> list[Problem]:
    """Whether so many bytes have room where so many are free."""
    if needed <= free:
        return []
    gib = [f"{size / 2**30:,.1f} GiB" for size in (needed, free)]
    return [Problem(level, f"{where}: {gib[0]} needed, {gib[1]} free: {instead}")]
