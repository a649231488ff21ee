"""The result of a table: ours beside the paper's, the claims, and every difference in conditions.

`table.md` is the page, `table.json` holds the same as numbers, with the recipes of all rows.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import floor, log10
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from autoencoders.discriminators import StyleGANConfig
from ldm.config import flatten, read_resolution, short_size, to_tree
from ldm.data.dataset import PHOTOS
from ldm.files import to_json, write_together
from ldm.run_folder import provenance
from ldm.tables import markdown_table
from pipelines.reproduce.plan import (
    BuildPlan,
    Recipe,
    Target,
    decisive,
    published_recipe,
    setting_key,
)
from pipelines.reproduce.tables import (
    COLUMNS,
    Claim,
    Comparison,
    Each,
    JudgedClaim,
    Number,
    Row,
    Table,
    judge,
    mean_of,
)

FORMAT = 1
PAPER = "Sadat et al. 2024 (arXiv 2405.14477)"
NOTHING = "–"
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
LONG = 60
"""Characters of a reason that is still printed beside a claim."""


@dataclass(frozen=True)
class Result:
    """A built table."""

    table: Table
    plan: BuildPlan
    targets: Sequence[Target]
    records: Mapping[str, Mapping[str, Any]]
    """The rows' records, see `pipelines.reproduce.runner`."""
    each: Mapping[str, Each]
    """By row the numbers of every image."""
    seconds: float
    """Of this call."""
    pages: tuple[Path, ...] = ()
    """If it is pooled, the pages of the other seeds."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The page, and its values."""
        folder = self.plan.folder(self.table.name)
        return folder / "table.md", folder / "table.json"

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """Our numbers, by row and column."""
        return {name: record["numbers"] for name, record in self.records.items()}

    @cached_property
    def claims(self) -> tuple[JudgedClaim, ...]:
        """The paper's claims, judged by our numbers."""
        scale = self.plan.scale
        why = "" if scale.judges else f"scale {scale.name} is too short for the claims"
        if undone := undone_differences(self.targets, self.plan.settings):
            why = why or f"the settings remove what the rows differ in: {', '.join(undone)}"
        return judge(self.table, self.records, self.each, why)

    @cached_property
    def deviations(self) -> list[str]:
        """A line for every difference from the paper's conditions."""
        lines = []
        if self.table.measure == "encoder":
            lines.append("The machine: see below; the paper's is a Quadro RTX 6000.")
        else:
            lines += _compare_recipes([target for target in self.targets if target.taken is None])
            lines += [
                f"Row {name} is {record['taken']['path']}, given by --take: its training is its "
                "own."
                for name, record in self.records.items()
                if record["taken"]
            ]
            rows_by_run: dict[Path, list[str]] = defaultdict(list)
            for target in self.targets:
                rows_by_run[target.training.folder].append(target.row.name)
            lines += [
                f"Rows {', '.join(names)} differ in their data alone, which is the same here: they "
                "share one training."
                for names in rows_by_run.values()
                if len(names) > 1
            ]
            lines += [SILENT, SEEDS.format(len(self.pages)) if self.pages else ONE_SEED]
            lines += [EDM] if self.table.measure == "generation" else []
        if self.plan.settings:
            lines.append(f"Settings: {', '.join(self.plan.settings)}.")
        notes = (note for record in self.records.values() for note in record["notes"])
        return [*lines, *dict.fromkeys(notes)]

    @property
    def lines(self) -> list[str]:
        """The table, the claims, and the reasons for missing numbers."""
        # columns and rows by reason
        missing: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name, record in self.records.items():
            for column, why in record["missing"].items():
                missing[why][COLUMNS[column].title].append(name)
        lines = [f"# {self.table.number}: {self.table.title}", ""]
        lines += [*table_lines(self.table, self.numbers), ""]
        lines += ["Do the paper's claims hold here?", ""]
        lines += claim_lines(self.claims, self.table, missing)
        if missing:
            lines += ["", "Missing, or not used for the claims:", ""]
        for why, columns in missing.items():
            rows = next(iter(columns.values()))
            which = "" if len(rows) == len(self.records) else f" of {', '.join(rows)}"
            lines.append(f"- {', '.join(columns)}{which}: {why}")
        return lines

    def as_markdown(self) -> str:
        """Format the result as a page."""
        scale = self.plan.scale
        lines = [*self.lines, "", "## Differences from the paper", ""]
        lines += [f"- {line}" for line in self.deviations]
        lines += ["", "## Provenance", "", f"- scale: {scale.name}, {scale.summary}"]
        for what in ("command", "machine", "versions"):  # of the measurements, once if rows agree
            found = self._rows_by(what)
            for value, names in found.items():
                which = f" of {', '.join(names)}" if len(found) > 1 else ""
                lines.append(f"- {what}{which}: {value}")
        if self.table.measure != "encoder":
            lines += [
                "- these describe the measurements; each training run has its own run.json",
                f"- data: {self._data()}",
            ]
        if self.pages:
            pages = ", ".join(map(str, self.pages))
            lines.append(f"- the trainings named below are those of seed 0; of the others: {pages}")
        now = provenance()
        lines += [f"- this page: {now['command']}, {now['created']}, {self.seconds:,.1f} s", ""]
        rows = [self._provenance_of(name) for name in self.records]
        header = ("row", "trained in", "training, s", "measured over", "measuring, s", "finished")
        return "\n".join([*lines, *markdown_table(header, rows, left=2), ""])

    def to_tree(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "format": FORMAT,
            "table": self.table.number,
            "title": self.table.title,
            "paper": PAPER,
            "scale": self.plan.scale.name,
            "columns": {name: asdict(COLUMNS[name]) for name in self.table.all_columns},
            "rows": [
                {"name": r.name, "label": r.label, "preset": r.preset, "paper": r.paper}
                | {"here": self.records.get(r.name)}
                for r in self.table.rows
            ],
            "claims": [
                {**to_tree(judged.claim), "verdict": judged.verdict}
                | {"findings": [asdict(comparison) for comparison in judged.comparisons]}
                for judged in self.claims
            ],
            "deviations": self.deviations,
            "settings": list(self.plan.settings),
            "seconds": self.seconds,
            "machine": ", ".join(self._rows_by("machine")),
            "data": self._data(),
            **provenance(),
        }

    def _data(self) -> str:
        return ", ".join(dict.fromkeys(target.data.source for target in self.targets))

    def _rows_by(self, key: str) -> dict[str, list[str]]:
        """The measured rows, by what their records say of the origin."""
        rows = defaultdict(list)
        for name, record in self.records.items():
            if value := record.get(key):
                by_name = isinstance(value, dict)
                rows[", ".join(map(" ".join, value.items())) if by_name else value].append(name)
        return dict(rows)

    def _provenance_of(self, row: str) -> tuple[str, ...]:
        record = self.records[row]
        taken, count = record["taken"], record["count"]
        where = f"taken: {taken['path']}" if taken else record["trained_in"] or NOTHING
        training, measuring = (
            NOTHING if seconds is None else f"{seconds:,.1f}"
            for seconds in map(record["seconds"].get, ("training", "measuring"))
        )
        images = f"{count:,} images" if count else NOTHING
        return row, where, training, images, measuring, record.get("created", NOTHING)


def pool_seeds(results: Sequence[Result]) -> Result:
    """Join the results of a table's seeds: its numbers become means and standard deviations."""
    first = results[0]
    records, each = {}, dict[str, Each]()
    for row, record in first.records.items():
        of_seeds = [result.records[row] for result in results]
        numbers, seeds = dict(record["numbers"]), {}
        for column in record["numbers"]:
            measured = [of_seed["numbers"].get(column) for of_seed in of_seeds]
            if None in measured:
                numbers[column] = None
            elif not COLUMNS[column].counted:
                seeds[column] = [mean_of(number) for number in measured]
                numbers[column] = fmean(seeds[column]), stdev(seeds[column])
        records[row] = {
            **record,
            "numbers": numbers,
            "seeds": seeds,
            "missing": {c: why for s in of_seeds for c, why in s["missing"].items()},
            "notes": [*dict.fromkeys(note for s in of_seeds for note in s["notes"])],
        }
        images = [result.each[row] for result in results]
        each[row] = {}
        if all(i and np.array_equal(i["k"], images[0]["k"]) for i in images):
            common = set[str].intersection(*map(set, images))
            each[row] = {name: np.mean([i[name] for i in images], axis=0) for name in common}
    pages = tuple(result.files[0] for result in results[1:])
    seconds = sum(result.seconds for result in results)
    return replace(first, records=records, each=each, seconds=seconds, pages=pages)


def write_result(result: Result) -> None:
    """Write `table.md` and `table.json`, both or neither."""
    page, values = result.files
    write_together({page: result.as_markdown().encode(), values: to_json(result.to_tree())})


# --------------------------------------------------------------------------------- the table
def table_lines(table: Table, numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Format a table in Markdown, laid out as in the paper, ours beside theirs."""

    def both(row: Row, column: str) -> tuple[str, str]:
        ours = numbers.get(row.name, {}).get(column)
        return show(column, row.paper.get(column), of_paper=True), show(column, ours)

    header = [*table.header]
    if table.transposed:
        rows = [[COLUMNS[column].title] for column in table.columns]
        for row in table.rows:
            header += [f"{row.label[0]} paper", "here"]
            for column, cells in zip(table.columns, rows, strict=True):
                cells += both(row, column)
        return markdown_table(header, rows)
    rows = [[*row.label] for row in table.rows]
    for column in table.all_columns:
        title = f"{COLUMNS[column].title}{ARROWS[COLUMNS[column].better]}"
        ours_alone = column not in table.columns
        header += [f"{title} here"] if ours_alone else [f"{title} paper", "here"]
        for row, cells in zip(table.rows, rows, strict=True):
            cells += both(row, column)[ours_alone:]
    return markdown_table(header, rows, left=len(table.header))


def show(column: str, value: Number | None, of_paper: bool = False) -> str:
    """Format a number of ours or of the paper's: a float, a mean with its ±, or a dash."""
    if value is None:
        return NOTHING
    form = f",.{COLUMNS[column].digits}f"
    if of_paper:
        digits = COLUMNS[column].printed
        form = "g" if digits is None else f".{digits}f"
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return " ± ".join(f"{part:{form}}" for part in parts)


# -------------------------------------------------------------------------------- the claims
def claim_lines(
    claims: Sequence[JudgedClaim], table: Table, listed: Collection[str] = ()
) -> list[str]:
    """Format claims: a line for each, and below it one for each of its columns.

    Long reasons that are `listed` below them are not repeated.
    """

    def short(why: str) -> str:
        return "see below" if why in listed and len(why) > LONG else why

    lines = []
    for judged in claims:
        reasons = {comparison.why for comparison in judged.comparisons}
        same = reasons.pop() if len(reasons) == 1 else ""
        alike = len({comparison.verdict for comparison in judged.comparisons}) == 1
        because = f" ({short(same)})" if same else ""
        lines.append(f"- **{judged.verdict}**{because}: {judged.claim.says}")
        for comparison in judged.comparisons:
            line = f"  - {_show_both(judged.claim, comparison, table)}"
            if len(judged.comparisons) > 1 and not (same and alike):
                line += f": {comparison.verdict}"
            if comparison.why and not same:
                line += f" ({short(comparison.why)})"
            lines.append(line)
    return lines


def _show_both(claim: Claim, comparison: Comparison, table: Table) -> str:
    """Two rows in one column: ours, their difference, and the paper's."""
    column, here, error = comparison.column, comparison.here, comparison.error
    papers = {row.name: row.paper.get(column) for row in table.rows}
    theirs = [papers[name] for name in (claim.row, claim.than)]
    text = "not the paper's"
    if None not in theirs:
        shown = (show(column, number, of_paper=True) for number in theirs)
        text = f"the paper's {' against '.join(shown)}"
    title, digits = COLUMNS[column].title, COLUMNS[column].digits
    if here is not None:
        ours = " against ".join(show(column, value) for value in here)
        if error is not None:
            if 0 < error < 10 ** (1 - digits):  # two figures of the error
                digits = min(6, 1 - floor(log10(error)))
            difference = f"{here[0] - here[1]:+.{digits}f} ± {error:.{digits}f}"
            ours += f" ({difference.replace('-', '−')})"
        text = f"{ours}, {text}"
    if table.transposed:
        title = f"{table.header[0]} = {title}"
    return f"{title}: {text}"


# --------------------------------------------------------- the differences from the paper
SILENT = (
    "Where the paper is silent (loss weights, widths of some networks, weight averaging), this "
    "toolkit's defaults: see docs/design.md."
)
ONE_SEED = (
    "One training of each recipe, with one seed: the variation between seeds is unknown. The ± of "
    "a difference is its standard error over images only; without one, the error is unknown."
)
SEEDS = (
    "Trainings of each recipe with seeds 0 to {}: a number is their mean ± standard deviation. The "
    "± of a difference is its standard error over seeds or over images, the larger."
)
EDM = (
    "Diffusion: EDM's preconditioning, noise and sampler (Karras et al. 2022); the paper follows "
    "latent diffusion (Rombach et al. 2022)."
)
KNOWN = {
    "data.source": "data",
    "data.held_out": "held-out images",
    "phases": "training",
    "batch_size": "batch size",
    "lr": "learning rate",
    "lr_schedule": "learning-rate schedule",
    "betas": "Adam's betas",
    "clip_norm": "largest gradient norm",
    "warmup_images": "warm-up in images",
    "ema_half_life_images": "half-life of the averaged weights in images",
    "decoder.channels": "base width of the decoder",
    "encoder.channels": "base width of the encoder",
    "encoder.extractor.channels": "base width of feature extraction",
    "encoder.aggregator.channels": "base width of feature aggregation",
    "encoder.aggregator.width": "width of the ViT",
    "encoder.aggregator.grid": "side of the ViT's grid of positions",
    "discriminator.channels": "base width of the discriminator",
    "discriminator.multipliers": "width multipliers of the discriminator",
    "discriminator.layers": "downsampling layers of the discriminator",
    "discriminator.resolution": "image size of the discriminator",
    "discriminator.max_channels": "largest width of the discriminator",
    "network.channels": "base width of the diffusion network",
    "network.head_width": "width of its attention heads",
    "resolution": "image size",
    "statistics_images": "images for the statistics of latents",
    "adversarial.start": "start of the discriminator, as a fraction of all steps",
    "adversarial.ramp": "ramp of its weight, as a fraction of all steps",
    "loss.lpips": "weight of LPIPS in the loss",
    "run.seed": "seed",
    "run.precision": "precision of the training",
}


def undone_differences(targets: Sequence[Target], settings: Sequence[str]) -> list[str]:
    """Return the keys in which the paper's rows differ, and by the user's settings ours do not."""
    trained = [target for target in targets if target.taken is None]
    here = [flatten(to_tree(target.training.recipe)) for target in trained]
    paper = [flatten(to_tree(published_recipe(target.row.preset))) for target in trained]

    def differ(trees: Sequence[Mapping[str, Any]], key: str) -> bool:
        return any(tree.get(key) != trees[0].get(key) for tree in trees)

    keys = dict.fromkeys(map(setting_key, settings))
    return [key for key in keys if differ(paper, key) and not differ(here, key)]


def _compare_recipes(targets: Sequence[Target]) -> Iterator[str]:
    """A line for every key in which the rows' recipes differ from the paper's."""
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for target in targets:
        stages = [("", target.training.recipe, target.row.preset)]
        if target.stage_two is not None:
            preset = target.stage_two.recipe.autoencoder
            stages.append(("stage one, ", target.stage_one.recipe, preset))
        for stage, recipe, preset in stages:
            ours, theirs = _settings(recipe), _settings(published_recipe(preset))
            for key in ours | theirs:
                if ours.get(key) != theirs.get(key):
                    values = _words(key, ours.get(key)), _words(key, theirs.get(key))
                    found[stage, key][" instead of ".join(values)] = None
    for (stage, key), ways in found.items():
        name = f"{stage}{KNOWN.get(key, key)}"
        line = f"{name[0].upper()}{name[1:]}: {'; '.join(ways)}"
        if key == "loss.lpips" and any(way.startswith("0 ") for way in ways):
            line += " (no VGG-16 is needed; ℓ1 and the row's other terms remain)"
        yield f"{line}."


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by dotted keys, without the name of its stage one."""
    settings = flatten(decisive(recipe))
    settings.pop("autoencoder", None)
    discriminator = getattr(recipe, "discriminator", None)
    if isinstance(discriminator, StyleGANConfig):  # resolve its default, null
        settings["discriminator.channels"] = discriminator.widths[0]
    return settings


def _words(key: str, value: Any) -> str:
    if key == "phases":
        sizes = [short_size(read_resolution(p["resolution"])) for p in value]
        steps = [f"{p['steps']:,} steps" for p in value]
        return ", then ".join(map(" at ".join, zip(steps, sizes, strict=True)))
    if key == "data.source" and value == PHOTOS:
        return "the photographs of scikit-image"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return str(value)
