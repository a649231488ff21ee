"""Options that several commands share, and small helpers for reading and printing."""

import json
import os
import re
import shlex
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from ldm.errors import UsageError, escape

# ------------------------------------------------------------------------------- option types
Data = Annotated[
    str | None,
    Option(
        help="Images: `photos` (built in), a folder, a zip or shards. Default: the training data."
    ),
]
Split = Annotated[Literal["train", "val", "all"], Option(help="Part of the data to use.")]
Resolution = Annotated[
    str | None,
    Option(
        metavar="R|HxW",
        help="Image size in pixels, R for R×R, or HEIGHTxWIDTH. Default: the last resolution of "
        "the training.",
    ),
]
BatchSize = Annotated[int, Option(help="Images per batch, on each process.")]
Limit = Annotated[int | None, Option(help="Use at most this many images.")]
Seed = Annotated[int, Option(help="Seed. Image i depends only on the seed and on i.")]
Steps = Annotated[int, Option(help="Sampling steps.")]
Guide = Annotated[
    str | None,
    Option("--guide", "--weaker", help="Model for autoguidance: less trained or smaller."),
]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:1.")]
Precision = Literal["auto", "fp32", "bf16"]
InceptionWeights = Annotated[
    Path | None, Option(help="Path of inception-2015-12-05.pt. Default: found, or downloaded.")
]
Features = Annotated[
    str | None,
    Option(
        metavar="module:function",
        help="Feature extractor to use instead of Inception: function(device) returns a callable "
        "that maps uint8 images (B, 3, H, W) to features (B, dim).",
    ),
]
Resize = Annotated[
    Literal["clean", "legacy-tensorflow"],
    Option(help="Resizing before Inception: clean-fid's, or the original FID code's."),
]
Force = Annotated[
    bool,
    Option(
        "--force",
        help="Measure images that were trained on, and rFID over fewer images than features.",
    ),
]
StageOne = Annotated[
    Path | None,
    Option(
        "--ae",
        help="Autoencoder of stage two: a ckpt.pt, a run folder, a pretrained SD-VAE, or the name "
        "of a preset for its newest run. Default: the newest run of stage one.",
    ),
]
Settings = Annotated[
    list[str] | None,
    Argument(metavar="key=value …", help="Settings; `ldm show PRESET` lists them."),
]
RunFolder = Annotated[
    Path | None,
    Option(
        "--out",
        help="Run folder. Default: the newest unfinished run with these settings, or a new one.",
    ),
]


def parse_numbers(
    option: str, text: str, kind: type = float, counts: Sequence[int] = ()
) -> list[Any]:
    """Parse numbers separated by commas; `counts` are the numbers of them that are allowed."""
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or (counts and len(numbers) not in counts):
        many = f"{' or '.join(map(str, counts))} " if counts else ""
        what = "whole number(s)" if kind is int else "number(s)"
        raise UsageError(f"--{option} {text}: expected {many}{what} separated by commas")
    return numbers


def parse_size(option: str, text: str | None) -> "int | tuple[int, int] | None":
    """Parse a size in pixels, R or HxW, to a `ldm.config.Resolution`; None passes."""
    if text is None:
        return None
    if re.fullmatch(r"-?[0-9]{1,9}([x×]-?[0-9]{1,9})?", text.strip()):
        height, *width = map(int, re.split("[x×]", text))
        return height if width in ([], [height]) else (height, width[0])
    raise UsageError(f"--{option} {text}: give a number of pixels, or HEIGHTxWIDTH, such as 96x64")


def add_setting(settings: list[str], option: str, key: str, value: Path | str | None) -> None:
    """Append an option, if it was given, to the settings, under the key that it stands for."""
    if value is None:
        return
    if not str(value):
        raise UsageError(f"{option} is empty: give a path or a name, or omit it")
    if any(word.partition("=")[0].strip() == key for word in settings):
        raise UsageError(f"{key} is given twice: use either {option} or {key}=")
    settings.append(f"{key}={json.dumps(str(value))}")


def say(*lines: str) -> None:
    """Print lines on the first process only."""
    if is_first_process():
        for line in lines:
            echo(line)


def echo(text: str = "", **style: Any) -> None:
    """Print text, escaped but for its line breaks, in a style of `typer.secho`."""
    typer.secho(escape(text, "\n"), **style)


def next_step(command: str, *paths: Path | str) -> str:
    """Return a line with a command to paste: each {} in it is a path, quoted."""
    return f"next: {command.format(*(shlex.quote(str(path)) for path in paths))}"


def many(count: int, one: str, more: str = "") -> str:
    """Return a number with its noun: "1 image", "2,000 images"."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def is_first_process() -> bool:
    """Tell the first of the launched processes without importing torch."""
    return os.environ.get("RANK", "0") == "0"


# ------------------------------------------------------------------------------------ presets
KINDS = {
    "ae": "Stage one: autoencoders",
    "recipes": "Stage one: rows of the paper's tables, and the settings they share",
    "diffusion": "Stage two: diffusion models",
}
STAGE_ONE, STAGE_TWO = ("ae", "recipes"), ("diffusion",)
COMMAND = {"ae": "train-ae", "recipes": "train-ae", "diffusion": "train-diffusion"}


def find_presets(name: str, stage: Collection[str] = KINDS) -> list[tuple[str, str]]:
    """Return every (kind, name) that a preset's name can mean: `tiny`, or `diffusion/tiny`."""
    from ldm.config import did_you_mean, list_presets

    kind, _, bare = name.rpartition("/")
    names = {k: list_presets(k) for k in KINDS if kind in ("", k)}
    found = [k for k in names if bare in names[k]]
    if not found:
        hint = did_you_mean(bare, list(chain(*names.values())))
        raise UsageError(f"no preset '{name}'{hint} (see `ldm presets`)")
    if not any(k in stage for k in found):
        raise UsageError(
            f"'{name}' is a preset of the other stage: use `ldm {COMMAND[found[0]]} {bare}`"
        )
    return [(k, bare) for k in found if k in stage]
