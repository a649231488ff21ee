"""Three sizes at which a table is run, and how a row's recipe is brought to each.

A scale makes every row of every table smaller by the same few rules, so that what a row switches
stays switched: widths are divided and never set (all but the decoder's, which no row switches),
lengths and sides too, and what a row says of norms, losses, levels or parts is not touched.

What a table takes at a scale: for each row its recipes, and where they are trained.

Rows that resolve to the very same recipe, of one table or of several, share one training: that of
the first of them in the paper's order.

<out>/<scale>/<table>/<row>/
  row.json        what was measured, once it is done
  autoencoder/    the run of stage one, where this row is the first of its recipe
  diffusion/      the run of stage two, likewise, and samples/ of it
<out>/<scale>/ae/<preset>/    a stage one that belongs to no row
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from ldm.config import (
    Config,
    Tree,
    key_paths,
    list_presets,
    load_preset,
    merge,
    parse_override,
    resolve,
    to_tree,
)
from ldm.data import DataConfig
from ldm.data.dataset import PHOTOS
from ldm.errors import LdmError, UsageError
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.reproduce.tables import Row, Table, find_row, trained_rows

RecipeT = TypeVar("RecipeT", AutoencoderRecipe, DiffusionRecipe)


@dataclass(frozen=True)
class Measuring:
    """How what was trained is measured."""

    images: int | None = None
    """Held-out images reconstructed at most; None: all."""
    published: bool = True
    """Whether published networks (Inception, VGG) are asked for. Else others stand in for them, so
    that the code runs, and the columns that need them stay empty."""
    samples: int = 50_000
    """Images sampled for a FID."""
    sampler_steps: int = 18
    """Steps of the sampler, Heun's."""
    latents: int = 1000
    """Images whose latents a draw of MMD takes."""
    draws: int = 5
    """Draws of MMD."""
    encoder_side: int = 256
    """Side of the images whose encoding is timed, in pixels."""
    encoder_batch: int = 32
    """Images in the batch whose memory is told."""
    encoder_repeats: int | None = None
    """Turns that are timed; None: as `ldm bench`."""


@dataclass(frozen=True)
class Scale:
    """A size at which tables are run."""

    name: str
    summary: str
    """What it is for."""
    widths: int = 1
    """Divides the widths of all networks."""
    decoder: int | None = None
    """Width of the decoder; None: its own."""
    halvings: int = 0
    """How often the sides of the images are halved."""
    steps: float = 1.0
    """Share of the steps."""
    batch: int = 1
    """Divides the batch."""
    rate: float = 1.0
    """Multiplies the learning rate."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Laid over what these rules make of every recipe, where it has such keys."""
    measuring: Measuring = Measuring()
    judges: bool = True
    """Whether anything is learned that the paper's claims could be judged by."""

    @property
    def is_paper(self) -> bool:
        """Whether recipes stay as they are."""
        return self.widths == 1 and self.steps == 1.0


# A short training needs a larger learning rate, and these to stand it: those of the preset
# litevae-b-quarter, whose rate is five times the paper's.
BRISK = {"betas": [0.9, 0.99], "warmup_images": 800, "clip_norm": 1.0}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            "a minute a table on a CPU: proves that the machinery runs, and no more",
            # 12, as 40 below: GroupNorm makes groups of three
            widths=8, decoder=12, halvings=2, steps=1 / 12_500, batch=4, rate=5.0,
            also=BRISK | {
                "warmup_images": 0,
                "data": {"workers": 0},
                "loss": {"lpips": 0},  # no network of published weights is needed
                "validate_images": 8,
                "statistics_images": 32,
                "run": {"log_every_steps": 4},
            },
            measuring=Measuring(
                images=32, published=False, samples=16, sampler_steps=4, latents=32, draws=2,
                encoder_side=64, encoder_batch=2, encoder_repeats=1,
            ),
            judges=False,
        ),
        Scale(
            "small",
            "meant for an hour a table on a GPU, a night on a CPU, on a folder of photographs",
            # 40 is not quite a quarter of 128, but of 32 channels GroupNorm would normalise each
            # alone, and hide how bright a picture is as a whole; of 40 it makes groups of five
            # (the paper's have four and more).
            widths=4, decoder=40, halvings=1, steps=1 / 50, batch=2, rate=5.0,
            also=BRISK | {
                # a fifth of so few steps leaves nothing yet that is worth judging
                "adversarial": {"start": 0.5, "ramp": 0.1},
                "run": {"validate_every_steps": 1000, "save_every_steps": 500},
            },
            measuring=Measuring(samples=2048, latents=1000),
        ),
        Scale("paper", "the full recipe, on the paper's data"),
    )
}  # fmt: skip


def find_scale(name: str) -> Scale:
    """A scale by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in SCALES:
        raise UsageError(f"--scale {name}: it must be one of {', '.join(SCALES)}")
    return SCALES[name]


def scale_recipe(
    published: RecipeT, scale: Scale, settings: Sequence[str] = (), source: str | None = None
) -> RecipeT:
    """A row's recipe at a scale.

    Args:
        published: the paper's.
        settings: `key=value` over all that; those that the recipe has no such key for are left out.
        source: the data in place of the recipe's.

    Raises:
        UsageError: a setting has a bad value, or does not fit.
    """
    config_class, tree = type(published), to_tree(published)
    if not scale.is_paper:
        tree = merge(_shrink(tree, scale), _known(scale.also, tree))
        if decoder := tree.get("decoder"):
            decoder["channels"] = scale.decoder
    if source is not None:
        tree["data"] = tree["data"] | {"source": source}
    keys = _keys(config_class) if settings else ()
    return resolve(config_class, tree, [s for s in settings if setting_key(s) in keys])


def check_settings(settings: Sequence[str]) -> None:
    """Refuse settings that no recipe knows, and those that a row or an option decides.

    Raises:
        UsageError: there is one.
    """
    known = _keys(AutoencoderRecipe) | _keys(DiffusionRecipe)
    for text in settings:
        key = setting_key(text)
        if key == "data.source":
            raise UsageError("data.source is given as --data")
        if key == "autoencoder":
            raise UsageError("autoencoder is given as --take ROW=PATH")
        if key not in known:
            # resolved against a recipe for its own words of what was meant
            resolve(AutoencoderRecipe, {}, [text])


@cache
def _keys(config_class: type[Config]) -> frozenset[str]:
    return frozenset(key_paths(config_class))


def setting_key(text: str) -> str:
    """The dotted key of `key=value`, without the numbers that index lists.

    Raises:
        UsageError: it is not of that form.
    """
    path, _ = parse_override(text)
    return ".".join(part for part in path if not part.isdigit())


# --------------------------------------------------------------------------------- the rules
def _width(value: int, scale: Scale) -> int:
    return max(1, value // scale.widths)


def _side(value: int, scale: Scale) -> int:
    return value >> scale.halvings


def _steps(value: int, scale: Scale) -> int:
    return max(1, round(value * scale.steps))


def _batch(value: int, scale: Scale) -> int:
    return max(1, value // scale.batch)


def _rate(value: float, scale: Scale) -> float:
    return value * scale.rate


def _images(value: float, scale: Scale) -> float:
    """Of what is counted in images over a training: the same share of it."""
    return value * scale.steps / scale.batch


# By the last part of a key, wherever it stands
RULES: dict[str, Callable[[Any, Scale], Any]] = {
    "channels": _width,  # of encoders, extractors, discriminators, the diffusion network
    "max_channels": _width,
    "width": _width,  # of a ViT's tokens
    "head_width": _width,  # of the diffusion network: as many heads as before
    "resolution": _side,  # of phases, of stage two, of StyleGAN's discriminator
    "grid": _side,  # of a ViT's positions
    "steps": _steps,
    "batch_size": _batch,
    "lr": _rate,
    "ema_half_life_images": _images,
}


def _shrink(tree: Tree, scale: Scale) -> Tree:
    """A recipe's tree by the rules above, and a discriminator that looks at smaller images."""
    small = _by_rules(tree, scale)
    if judge := small.get("discriminator"):
        # what belongs to a side: halvings, so that as much of an image is seen at once
        if judge["type"] == "unet":
            kept = max(1, len(judge["multipliers"]) - scale.halvings)
            judge["multipliers"] = judge["multipliers"][:kept]
        elif judge["type"] == "patchgan":
            judge["layers"] = max(1, judge["layers"] - scale.halvings)
        elif judge["channels"] is None:  # StyleGAN's own, 32768 / resolution
            full = 2**15 // tree["discriminator"]["resolution"]
            judge["channels"] = _width(full, scale)
    return small


def _by_rules(node: Any, scale: Scale) -> Any:
    if isinstance(node, list):
        return [_by_rules(item, scale) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: RULES[key](value, scale)
        if key in RULES and isinstance(value, (int, float))
        else _by_rules(value, scale)
        for key, value in node.items()
    }


def _known(over: Mapping[str, Any], tree: Tree) -> Tree:
    """The part of a tree whose keys another tree has: stage two has no loss.lpips."""
    return {
        key: _known(value, tree[key]) if isinstance(value, Mapping) else value
        for key, value in over.items()
        if key in tree
    }


def evaluation_side(recipe: AutoencoderRecipe, asked: int | None, scale: Scale) -> int:
    """Side of the images a row is measured on, in pixels.

    Args:
        asked: what the paper measured on, where that is not what the training ends at.
    """
    return recipe.phases[-1].resolution if asked is None else asked >> scale.halvings


Recipe = AutoencoderRecipe | DiffusionRecipe

DECISIVE = ("run.seed", "run.precision")
"""Keys of how a run is carried out that its numbers depend on; the others say how it is watched."""

DATA_SETS = ("ffhq", "imagenet", "celebahq", "deepfashion")
"""The paper's, as the folders that its recipes name begin."""


@dataclass(frozen=True)
class Training:
    """A run that is needed."""

    preset: str
    """The name it is trained under."""
    recipe: Recipe
    """Of stage two, the autoencoder is still the name of a preset."""
    folder: Path


@dataclass(frozen=True)
class Job:
    """A row to be trained and measured."""

    row: Row
    folder: Path
    resolution: int
    """Side of the images it is measured on, in pixels."""
    stage_one: Training
    stage_two: Training | None = None
    taken: Path | None = None
    """A checkpoint that is measured in its place."""

    @property
    def training(self) -> Training:
        """Of the stage that is measured."""
        return self.stage_two or self.stage_one

    @property
    def data(self) -> DataConfig:
        """What the row is trained on and measured with."""
        return self.training.recipe.data


class Plan:
    """How tables are run: the scale, the data, and what was given by hand.

    Args:
        data: PATH for all data sets, or NAME=PATH for one of the paper's, see `DATA_SETS`.
        settings: `key=value` over every recipe that knows the key.
        out: the folder of all.

    Raises:
        UsageError: a setting that no recipe knows, or two paths for one data set.
    """

    def __init__(
        self,
        scale: Scale,
        data: Sequence[str] = (),
        settings: Sequence[str] = (),
        out: Path = Path("reproduce"),
    ) -> None:
        check_settings(settings)
        self.scale, self.settings, self.out = scale, tuple(settings), out
        self._data = parse_data(data)

    def folder(self, table: str) -> Path:
        """Where a table's rows and its result lie."""
        return self.out / self.scale.name / table

    def jobs(self, table: Table, take: Sequence[str] = ()) -> list[Job]:
        """What a table's rows take.

        Args:
            take: ROW=PATH: a checkpoint that is measured in place of training.

        Raises:
            UsageError: no such row, a setting that does not fit, or settings that make two rows
                the same.
            LdmError: nothing is at a checkpoint's path.
        """
        given = parse_take(table, take)
        jobs = [self._job(row, given.get(row.name)) for row in table.rows]
        for one, other in combinations(jobs, 2):
            if one.training.folder == other.training.folder and not _differ_in_data(one, other):
                raise UsageError(
                    f"these settings make rows '{one.row.name}' and '{other.row.name}' of "
                    f"{table.number} the same: leave out what the table varies"
                )
        return jobs

    def recipe_of(self, row: Row) -> Recipe:
        """A row's recipe at this scale."""
        return self._resolve(row.kind, row.preset)

    # ------------------------------------------------------------------------------- parts
    def _job(self, row: Row, taken: Path | None) -> Job:
        recipe, folder = self.recipe_of(row), self.folder(row.table) / row.name
        placed = self._placed(row.preset, recipe, folder)
        if isinstance(recipe, AutoencoderRecipe):
            side = evaluation_side(recipe, row.resolution, self.scale)
            return Job(row, folder, side, placed, None, taken)
        name = recipe.autoencoder
        first = self._resolve(kind_of_stage_one(name), name)
        stage_one = self._placed(name, first, self.folder("ae") / name)
        return Job(row, folder, recipe.resolution, stage_one, placed, taken)

    def _placed(self, preset: str, recipe: Recipe, folder: Path) -> Training:
        """The recipe where it is trained: with the first row of the very same."""
        first = self._first_rows.get(_identity(recipe))
        if first is not None:
            preset, folder = first.preset, self.folder(first.table) / first.name
        stage = "diffusion" if isinstance(recipe, DiffusionRecipe) else "autoencoder"
        return Training(preset, recipe, folder / stage)

    @cached_property
    def _first_rows(self) -> dict[str, Row]:
        first: dict[str, Row] = {}
        for row in trained_rows():
            with suppress(UsageError):  # a row of another table, which the settings do not fit
                first.setdefault(_identity(self.recipe_of(row)), row)
        return first

    def _resolve(self, kind: str, preset: str) -> Recipe:
        published = published_recipe(kind, preset)
        source = self._source(published.data.source)
        return scale_recipe(published, self.scale, self.settings, source)

    def _source(self, of_recipe: str) -> str | None:
        """The data in place of a recipe's, None for its own."""
        for name, path in self._data.items():
            if name and Path(of_recipe).name.startswith(name):
                return path
        return self._data.get("") or (None if self.scale.is_paper else PHOTOS)


@cache
def published_recipe(kind: str, preset: str) -> Recipe:
    """A recipe as the paper's."""
    config_class = DiffusionRecipe if kind == "diffusion" else AutoencoderRecipe
    return resolve(config_class, load_preset(kind, preset))


def kind_of_stage_one(preset: str) -> str:
    """The folder of a preset that a recipe of stage two names."""
    return "recipes" if preset in list_presets("recipes") else "ae"


def parse_data(words: Sequence[str]) -> dict[str, str]:
    """Paths by the name of the data set; the one for all under the empty name.

    Raises:
        UsageError: one is given twice, or is none of the paper's.
    """
    paths: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "/" in name or Path(word).exists():
            name, path = "", word
        if name and name not in DATA_SETS:
            raise UsageError(f"--data {word}: the paper's data sets are {', '.join(DATA_SETS)}")
        if name in paths:
            which = f" for {name}" if name else ""
            raise UsageError(f"--data is given twice{which}: give one path")
        paths[name] = path
    return paths


def parse_take(table: Table, words: Sequence[str]) -> dict[str, Path]:
    """Checkpoints by the name of their row.

    Raises:
        UsageError: a word is not of the form ROW=PATH, or a row is unknown or given twice.
        LdmError: nothing is at a path.
    """
    taken: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise UsageError(f"--take {word}: it is of the form ROW=PATH")
        row = find_row(table, name)
        if row.name in taken:
            raise UsageError(f"--take gives row '{row.name}' twice: give one checkpoint")
        taken[row.name] = Path(path).expanduser()
        if not taken[row.name].exists():
            raise LdmError(f"--take {word}: nothing is at {path}")
    return taken


def _identity(recipe: Recipe) -> str:
    return json.dumps(to_tree(recipe), sort_keys=True)


def _differ_in_data(one: Job, other: Job) -> bool:
    """Whether two rows differ in nothing but their data, of which there may be but one here."""
    rows = (one.row, other.row)
    trees = [to_tree(published_recipe(row.kind, row.preset)) | {"data": None} for row in rows]
    return trees[0] == trees[1]
