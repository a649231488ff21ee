"""The plan for a table at a scale: for each row its recipes, and the folders of their runs.

A scale shrinks every recipe by the same rules, so that two rows keep their difference: widths are
divided and never set (except the decoder's, which no row varies), and so are lengths and image
sizes; norms, losses, levels and parts stay as they are.

Rows that resolve to the same recipe, of one table or of several, share one training: that of the
first of them in the paper's order.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldm.config import (
    Config,
    Resolution,
    Tree,
    key_paths,
    list_presets,
    load_preset,
    parse_override,
    plain_size,
    resolve,
    to_tree,
    validate,
)
from ldm.data import DataConfig
from ldm.data.dataset import PHOTOS
from ldm.errors import LdmError, UsageError
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.reproduce.tables import Row, Table, all_tables

Recipe = AutoencoderRecipe | DiffusionRecipe
RecipeT = TypeVar("RecipeT", bound=Recipe)

DATA_SETS = ("ffhq", "imagenet", "celebahq", "deepfashion")
"""The paper's data sets: the first letters of the folders in its recipes."""


class Protocol(Config):
    """The settings of a scale's measurements."""

    images: int | None = None
    """Held-out images to reconstruct at most; None: all."""
    published: bool = True
    """Use the published networks (Inception, VGG). If false, smoke-test substitutes take their
    place, so that the code runs, and the columns that need them stay empty."""
    samples: int = 50_000
    """Samples for FID."""
    sampler_steps: int = 18
    """Steps of Heun's sampler."""
    latents: int = 1000
    """Images whose latents MMD takes."""
    draws: int = 5
    """Repetitions of MMD."""
    encoder_side: int = 256
    """Image size in pixels for the cost of encoders."""
    encoder_batch: int = 32
    """Batch size for the memory of encoders."""
    encoder_repeats: int | None = None
    """Timed runs of encoders; None: the default of `ldm bench`."""


class Scale(Config):
    """A size at which tables are built, as written in `configs/scales/`."""

    name: str
    summary: str
    """Its purpose."""
    widths: int = 1
    """Divides the widths of all networks."""
    halvings: int = 0
    """Number of times that image sizes are halved."""
    steps: float = 1.0
    """Multiplies the steps."""
    batch: int = 1
    """Divides the batch size."""
    rate: float = 1.0
    """Multiplies the learning rate."""
    settings: tuple[str, ...] = ()
    """`key=value` over every recipe that has the key, before the user's."""
    data: str | None = PHOTOS
    """The data by default; null: the recipes' own."""
    protocol: Protocol = Protocol()
    judges: bool = True
    """The training is long enough for the paper's claims."""


SCALES = ("smoke", "small", "paper")


@cache
def load_scale(name: str) -> Scale:
    """Load a scale by its name, one of `SCALES`."""
    return validate(Scale, load_preset("scales", name) | {"name": name})


def check_settings(settings: Sequence[str], kinds: Sequence[type[Config]]) -> None:
    """Refuse settings that no recipe of these kinds has, and those that a row or an option sets."""
    known = frozenset[str]().union(*map(_keys, kinds))
    for text in settings:
        key = setting_key(text)
        if key == "data.source":
            raise UsageError("data.source is set by --data")
        if key == "autoencoder":
            raise UsageError("autoencoder is set by --take ROW=PATH")
        if key not in known:
            resolve(kinds[0], {}, [text])  # raises with the nearest key


@cache
def _keys(config_class: type[Config]) -> frozenset[str]:
    return frozenset(key_paths(config_class))


def setting_key(text: str) -> str:
    """Return the dotted key of `key=value`, without list indices."""
    return ".".join(part for part in parse_override(text)[0] if not part.isdigit())


# --------------------------------------------------------------------------------- the rules
def _width(value: int, scale: Scale) -> int:
    return max(1, value // scale.widths)


def _side(value: Any, scale: Scale) -> Any:
    """A side, or a height and a width."""
    is_pair = isinstance(value, list)
    return [_side(side, scale) for side in value] if is_pair else value >> scale.halvings


# By the last part of a key, wherever it occurs
RULES: dict[str, Callable[[Any, Scale], Any]] = {
    "channels": _width,  # of encoders, extractors, discriminators, the diffusion network
    "max_channels": _width,
    "width": _width,  # of a ViT's tokens
    "head_width": _width,  # of the diffusion network: as many heads as before
    "resolution": _side,  # of phases, of stage two, of StyleGAN's discriminator
    "grid": _side,  # of a ViT's positions
    "steps": lambda value, scale: max(1, round(value * scale.steps)),
    "batch_size": lambda value, scale: max(1, value // scale.batch),
    "lr": lambda value, scale: value * scale.rate,
    # counted in images: the same share of the training
    "ema_half_life_images": lambda value, scale: value * scale.steps / scale.batch,
}


def _shrink(tree: Tree, scale: Scale) -> Tree:
    """Apply the rules, and fit the discriminator to smaller images."""
    small = _by_rules(tree, scale)
    if discriminator := small.get("discriminator"):
        # fewer halvings, so that its view covers the same part of an image
        if discriminator["type"] == "unet":
            kept = max(1, len(discriminator["multipliers"]) - scale.halvings)
            discriminator["multipliers"] = discriminator["multipliers"][:kept]
        elif discriminator["type"] == "patchgan":
            discriminator["layers"] = max(1, discriminator["layers"] - scale.halvings)
        elif discriminator["channels"] is None and (scale.widths > 1 or scale.halvings):
            full = 2**15 // tree["discriminator"]["resolution"]
            discriminator["channels"] = _width(full, scale)
    return small


def _by_rules(node: Any, scale: Scale, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _by_rules(value, scale, name) for name, value in node.items()}
    if isinstance(node, list):
        return [_by_rules(item, scale) for item in node]
    has_rule = key in RULES and isinstance(node, (int, float))
    return RULES[key](node, scale) if has_rule else node


# -------------------------------------------------------------------------------- the targets
@dataclass(frozen=True)
class Training(Generic[RecipeT]):
    """A training run that a row needs."""

    preset: str
    recipe: RecipeT
    """In stage two, `autoencoder` is still the name of a preset."""
    folder: Path


@dataclass(frozen=True)
class Target:
    """A row to build: to train and to measure."""

    row: Row
    folder: Path
    resolution: Resolution
    """Image size of the measurement in pixels."""
    stage_one: Training[AutoencoderRecipe]
    stage_two: Training[DiffusionRecipe] | None = None
    taken: Path | None = None
    """A checkpoint to measure instead of training."""

    @property
    def training(self) -> Training[Any]:
        """The run of the measured stage."""
        return self.stage_two or self.stage_one

    @property
    def data(self) -> DataConfig:
        """The data of training and measurement."""
        return self.training.recipe.data

    @property
    def device(self) -> str:
        """The device of training and measurement."""
        return self.training.recipe.run.device

    def request(self, protocol: Protocol) -> dict[str, Any]:
        """Return the settings that the row's numbers depend on, as plain values."""
        trained = {"recipe": decisive(self.training.recipe)}
        measured = {"resolution": plain_size(self.resolution), "data": trained["recipe"]["data"]}
        if self.stage_two is not None:
            trained["stage_one"] = decisive(self.stage_one.recipe)
        return {"trained": trained, "measured": measured | to_tree(protocol)}

    def complete(self, then: Tree) -> Tree:
        """Give an earlier request the defaults of settings that are newer than it."""
        with suppress(UsageError):  # of settings that are gone
            trained: dict[str, Tree] = {}
            for name, tree in then["trained"].items():
                run = self.training if name == "recipe" else self.stage_one
                trained[name] = decisive(validate(type(run.recipe), tree))
            measured = then["measured"] | {"data": trained["recipe"]["data"]}
            return then | {"trained": trained, "measured": measured}
        return then


def decisive(recipe: Recipe) -> Tree:
    """Return the settings that numbers depend on, not those of display and safety."""
    tree = to_tree(recipe)
    tree["run"] = {key: tree["run"][key] for key in ("seed", "precision")}
    for key in ("workers", "changed", "cache_gb"):
        tree["data"].pop(key)
    tree.pop("validate_images", None)
    return tree


@dataclass
class BuildPlan:
    """The conditions under which tables are built, as of `ldm reproduce`, and their targets."""

    scale: Scale
    data: Sequence[str] = ()
    settings: Sequence[str] = ()
    out: Path = Path("reproduce")
    weights: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        self._sources = parse_data(self.data)

    def folder(self, name: str) -> Path:
        """Return the folder of a table or figure."""
        return self.out / self.scale.name / name

    def targets(self, table: Table, take: Sequence[str] = ()) -> list[Target]:
        """Return the targets of a table's rows; `take` is as of `ldm reproduce`."""
        kinds = (AutoencoderRecipe, DiffusionRecipe)
        check_settings(self.settings, kinds if table.measure == "generation" else kinds[:1])
        taken = parse_take(table, take)
        targets = [self._target(row, taken.get(row.name)) for row in table.rows]
        first: dict[Path, Row] = {}
        for target in targets:
            rows = (first.setdefault(target.training.folder, target.row), target.row)
            papers = [to_tree(published_recipe(row.preset)) | {"data": None} for row in rows]
            if papers[0] != papers[1]:  # their data alone may be the same here
                raise UsageError(
                    f"these settings make rows '{rows[0].name}' and '{rows[1].name}' of "
                    f"{table.number} the same: omit the keys that the table varies"
                )
        return targets

    def recipe_of(self, preset: str) -> Recipe:
        """Return a recipe at this scale, on this data, with those of the settings that it has."""
        published = published_recipe(preset)
        config_class: type[Recipe] = type(published)
        tree = _shrink(to_tree(published), self.scale)
        tree["data"]["source"] = self._source(published.data.source)
        keys, settings = _keys(config_class), (*self.scale.settings, *self.settings)
        return resolve(config_class, tree, [s for s in settings if setting_key(s) in keys])

    def _source(self, of_recipe: str) -> str:
        """The data in place of a recipe's."""
        for name, path in self._sources.items():
            if name and Path(of_recipe).name.startswith(name):
                return path
        return self._sources.get("") or self.scale.data or of_recipe

    def _target(self, row: Row, taken: Path | None) -> Target:
        recipe, folder = self.recipe_of(row.preset), self.folder(row.table) / row.name
        run = self._training(row.preset, recipe, folder)
        if isinstance(recipe, AutoencoderRecipe):
            size = recipe.phases[-1].resolution
            if row.resolution is not None:
                size = _side(row.resolution, self.scale)
            return Target(row, folder, size, run, None, taken)
        name = recipe.autoencoder
        stage_one = self._training(name, self.recipe_of(name), self.folder("ae") / name)
        return Target(row, folder, recipe.resolution, stage_one, run, taken)

    def _training(self, preset: str, recipe: Recipe, folder: Path) -> Training[Any]:
        """The recipe's run, with the first row of the same recipe."""
        if first := self._first_rows.get(recipe):
            preset, folder = first.preset, self.folder(first.table) / first.name
        stage = "diffusion" if isinstance(recipe, DiffusionRecipe) else "autoencoder"
        return Training(preset, recipe, folder / stage)

    @cached_property
    def _first_rows(self) -> dict[Recipe, Row]:
        first: dict[Recipe, Row] = {}
        trained = [table.with_ours() for table in all_tables() if table.measure != "encoder"]
        for row in (row for table in trained for row in table.rows):
            with suppress(UsageError):  # a row of another table, which the settings do not fit
                first.setdefault(self.recipe_of(row.preset), row)
        return first


@cache
def published_recipe(preset: str) -> Recipe:
    """Return the paper's recipe of a row, or of a stage one that belongs to no row."""
    kind = next(kind for kind in ("recipes", "diffusion", "ae") if preset in list_presets(kind))
    config_class: type[Recipe] = DiffusionRecipe if kind == "diffusion" else AutoencoderRecipe
    return resolve(config_class, load_preset(kind, preset))


def parse_data(words: Sequence[str]) -> dict[str, str]:
    """Parse --data: paths by the name of the data set; that for all under the empty name."""
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
    """Parse --take: checkpoints by row, which is named gaussian, t09-gaussian or t09/gaussian."""
    taken: dict[str, Path] = {}
    rows = [row.name for row in table.rows]
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise UsageError(f"--take {word}: must have the form ROW=PATH")
        row = name.removeprefix(f"{table.name}-").removeprefix(f"{table.name}/")
        if row not in rows:
            known = ", ".join(rows)
            raise UsageError(f"{table.number} has no row '{name}'; its rows are: {known}")
        if row in taken:
            raise UsageError(f"--take gives row '{row}' twice: give one checkpoint")
        taken[row] = Path(path).expanduser()
        if not taken[row].exists():
            raise LdmError(f"--take {word}: {path} does not exist")
    return taken
