"""Checks of what a run needs: data, published weights, stage one, a device, memory and disk.

Every check returns problems, one line each that says what to do. Nothing is downloaded.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from threading import Thread
from typing import Any, Literal
from urllib.request import Request, urlopen

import torch

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.losses.perceptual import BACKBONES, backbone_path, backbone_url, has_backbone
from ldm.config import Resolution, list_presets, load_preset, resolve
from ldm.data import DataConfig, Source, holds_out, open_source
from ldm.data.transforms import CorruptImage
from ldm.device import missing_compiler, resolve_precision
from ldm.errors import LdmError
from ldm.hub import from_home
from ldm.metrics.inception import WEIGHTS, published_weights, weight_folders
from ldm.run import RunConfig
from pipelines.recipes import PRESETS, AutoencoderRecipe, DiffusionRecipe, find_stage_one

TIMEOUT = 5
"""Seconds to wait for a server that is asked for a file's size."""
CPU_WORK = 1e7
"""10⁹ multiply-accumulates that a CPU with a dozen cores does in about a day."""

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """Something to know before a run begins."""

    level: Level
    """error: the run would fail. warning: it would run, but not as requested. note: affects another
    command only."""
    text: str
    """One line: what is wrong, where, and what to do."""


def attempt(call: Callable[..., Any], *args: Any) -> tuple[Any, list[Problem]]:
    """Call a function; return its result, or None and the LdmError that it raises."""
    try:
        return call(*args), []
    except LdmError as error:
        return None, [Problem("error", str(error))]


# ------------------------------------------------------------------------------------- data
def check_data(
    config: DataConfig, resolutions: Sequence[Resolution], validates: bool
) -> tuple[Source | None, list[Problem]]:
    """Open the training images of the last resolution, and the held-out ones if it `validates`.

    Args:
        resolutions: sizes of the training images, in pixels.
    """
    source: Source | None = None
    try:
        for resolution in resolutions:
            source = open_source(config, "train", resolution)
            source.load_at_least(0, resolution)
        if validates and holds_out(config):
            open_source(config, "val", resolutions[-1])
    except LdmError as error:
        return source, [Problem("error", str(error))]
    except CorruptImage as error:
        return source, [Problem("warning", f"the first image cannot be read: {error}")]
    return source, []


# ------------------------------------------------------------------------ published weights
def check_perceptual(recipe: AutoencoderRecipe) -> list[Problem]:
    """Check the weights of the classifiers in the losses of stage one."""
    needed: dict[str, str] = {}
    if recipe.loss.lpips:
        needed[BACKBONES[recipe.loss.lpips_network]] = "turn the loss off with loss.lpips=0"
    if recipe.loss.esrgan:
        needed["VGG-19"] = "turn the loss off with loss.esrgan=0"
    if recipe.best_by == "lpips":
        needed.setdefault("VGG-16", "choose best_by=psnr")
    missing = {network: advice for network, advice in needed.items() if not has_backbone(network)}
    problems = [_download(network, advice) for network, advice in missing.items()]
    if "VGG-16" not in needed and not has_backbone("VGG-16"):
        text = f"{_missing('VGG-16')}: held-out LPIPS will not be measured"
        problems.append(Problem("note", text))
    return problems


def check_inception() -> list[Problem]:
    """Check Inception's weights, which FID needs and training does not."""
    if published_weights() is not None:
        return []
    folder = from_home(weight_folders()[0])
    text = f"`ldm fid` will download them; without internet, put {WEIGHTS} in {folder}"
    return [Problem("note", f"{_missing('Inception')}: {text}")]


def _download(network: str, advice: str) -> Problem:
    """A classifier's weights that the run would have to download before it begins."""
    url, target = backbone_url(network), from_home(backbone_path(network))
    size = ask_size(url)
    if size is None:
        text = f"{url} does not answer: put the file at {target}, or {advice}"
        return Problem("error", f"{_missing(network)}, and {text}")
    text = f"the run will first download {size / 2**20:,.0f} MiB from {url} to {target}"
    return Problem("warning", f"{_missing(network)}: {text}")


def _missing(network: str) -> str:
    return f"{network}'s weights are not on this machine"


def ask_size(url: str) -> int | None:
    """Ask a server for the bytes of a file, without downloading it; None without an answer."""
    sizes: list[int] = []

    def ask() -> None:
        with suppress(OSError, ValueError, HTTPException):
            request = Request(url, method="HEAD")
            with urlopen(request, timeout=TIMEOUT) as answer:
                sizes.append(int(answer.headers.get("Content-Length", 0)))

    # the timeout is for each exchange, and looking up a name has none
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    return sizes[0] if sizes and sizes[0] > 0 else None


# -------------------------------------------------------------------------------- stage one
def check_autoencoder(
    recipe: DiffusionRecipe, preset: str
) -> tuple[Autoencoder, str, list[Problem]]:
    """Load stage one as training would.

    Args:
        preset: name of the stage-two preset; its namesake of stage one is assumed if the recipe
            names no preset.

    Returns:
        The autoencoder, without values if only assumed; its path, or what is assumed; the problems.
    """
    try:
        path = find_stage_one(recipe, preset)
        return load_autoencoder(path), str(path), []
    except LdmError as error:
        presets = {name: kind for kind in PRESETS for name in list_presets(kind)}
        assumed = next(n for n in (recipe.autoencoder, preset, "litevae-b") if n in presets)
        stage_one = resolve(AutoencoderRecipe, load_preset(presets[assumed], assumed))
        with torch.device("meta"):
            autoencoder = Autoencoder(stage_one.model)
        return autoencoder, f"none yet; {assumed} is assumed", [Problem("error", str(error))]


# ------------------------------------------------------------------------------ the machine
def check_compiler(config: RunConfig, device: torch.device) -> list[Problem]:
    """Check that `run.compile=true` finds all that it needs."""
    lacks = missing_compiler(device) if config.compile is True else None
    text = f"run.compile=true needs {lacks}, which is missing: install it, or omit run.compile"
    return [] if lacks is None else [Problem("error", text)]


def check_machine(config: RunConfig, device: torch.device, work: float) -> list[Problem]:
    """Check the device and its precision.

    Args:
        work: 10⁹ multiply-accumulates of the whole run.
    """
    problems = []
    if device.type == "cpu" and torch.cuda.is_available():
        text = "run.device selects the CPU, but there is a CUDA GPU: omit run.device"
        problems.append(Problem("warning", text))
    elif device.type == "cpu" and work > CPU_WORK:
        text = "no CUDA GPU here, and too much work for a CPU: use a GPU, or a tiny preset"
        problems.append(Problem("warning", text))
    if config.precision == "bf16" and resolve_precision("auto", device) != "bf16":
        text = f"bf16 is slow on this {device.type}, which only emulates it: use run.precision=fp32"
        problems.append(Problem("warning", text))
    return problems


def check_space(where: str, needed: int, free: int, advice: str, level: Level) -> list[Problem]:
    """Check that the bytes needed are free."""
    if needed <= free:
        return []
    text = f"{needed / 2**30:,.1f} GiB needed, {free / 2**30:,.1f} GiB free: {advice}"
    return [Problem(level, f"{where}: {text}")]
