"""What a table takes at a scale: for each row its recipes, and where they are trained.

Rows that resolve to the very same recipe, of one table or of several, share one training: that of
the first of them in the paper's order.

<out>/<scale>/<table>/<row>/
  row.json        what was measured, once it is done
  autoencoder/    the run of stage one, where this row is the first of its recipe
  diffusion/      the run of stage two, likewise, and samples/ of it
<out>/<scale>/ae/<preset>/    a stage one that belongs to no row
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path

from ldm.config import list_presets, load_preset, resolve, to_tree
from ldm.data import DataConfig
from ldm.data.dataset import PHOTOS
from ldm.errors import LdmError, UsageError
from pipelines.reproduce.scales import Scale, check_settings, evaluation_side, scale_recipe
from pipelines.reproduce.tables import Row, Table, find_row, trained_rows
from pipelines.training.autoencoder_recipe import AutoencoderRecipe
from pipelines.training.diffusion_recipe import DiffusionRecipe

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
