"""A table as the paper prints it, ours beside theirs, in Markdown that reads as it stands.

What differs from the paper's conditions, in words: all of it, found by comparing recipes.

What came of a table: to read, to paste, and to compute with.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from math import floor, log10
from pathlib import Path
from typing import Any

from autoencoders.discriminators.stylegan import StyleGANConfig
from ldm.config import flatten, to_tree
from ldm.data.dataset import PHOTOS
from ldm.files import to_json, write_together
from ldm.run_folder import provenance
from pipelines.reproduce.claims import Finding, Judgement, judge
from pipelines.reproduce.plan import (
    DECISIVE,
    Job,
    Plan,
    Recipe,
    kind_of_stage_one,
    published_recipe,
    setting_key,
)
from pipelines.reproduce.rows import read_each
from pipelines.reproduce.tables import COLUMNS, Claim, Number, Row, Table

NOTHING = "–"
BESIDE = {
    "reconstruction": ("psnr", "swd"), "generation": ("swd",), "mmd": (), "encoder": ("gmac",)
}  # fmt: skip
"""What is shown beside the paper's columns, and never in their place."""

LONG = 60
"""Characters of a reason that still stands beside a claim."""

Numbers = Mapping[str, Mapping[str, Number | None]]


def shown_columns(table: Table) -> tuple[str, ...]:
    """The paper's columns, then ours."""
    theirs = table.config.columns
    return (*theirs, *(name for name in BESIDE[table.config.measure] if name not in theirs))


def table_lines(table: Table, numbers: Numbers) -> list[str]:
    """The table in Markdown, its columns padded.

    Args:
        numbers: what was measured, by row and column.
    """
    grid = _across(table, numbers) if table.config.transposed else _down(table, numbers)
    return _aligned(grid, left=1 if table.config.transposed else len(table.config.header))


def _down(table: Table, numbers: Numbers) -> list[list[str]]:
    """Rows as rows: the label, then every column of the paper's beside ours."""
    header = list(table.config.header)
    for name in shown_columns(table):
        column = COLUMNS[name]
        if name in table.config.columns:
            header += [f"{column.title}{column.arrow} paper", "here"]
        else:
            header.append(f"{column.title}{column.arrow} here")
    return [header, *([*row.label, *_cells(table, row, numbers)] for row in table.rows)]


def _cells(table: Table, row: Row, numbers: Numbers) -> Iterator[str]:
    for name in shown_columns(table):
        both = _both(row, name, numbers)
        yield from both if name in table.config.columns else both[1:]


def _across(table: Table, numbers: Numbers) -> list[list[str]]:
    """Rows as columns: each of the paper's beside ours."""
    names = chain.from_iterable((f"{row.label[0]} paper", "here") for row in table.rows)
    grid = [[table.config.header[0], *names]]
    for column in table.config.columns:
        pairs = (_both(row, column, numbers) for row in table.rows)
        grid.append([COLUMNS[column].title, *chain.from_iterable(pairs)])
    return grid


def _both(row: Row, column: str, numbers: Numbers) -> tuple[str, str]:
    """The paper's number and ours."""
    ours = numbers.get(row.name, {}).get(column)
    return _printed(column, row.paper.get(column)), show(column, ours)


def claim_lines(judgements: Sequence[Judgement], table: Table) -> list[str]:
    """A line for each claim, and under it one for each column that it is about."""
    lines = []
    for judgement in judgements:
        reasons = {finding.why for finding in judgement.findings}
        same = reasons.pop() if len(reasons) == 1 else ""
        alike = len({finding.verdict for finding in judgement.findings}) == 1
        because = f" ({_short(same)})" if same else ""
        lines.append(f"- **{judgement.verdict}**{because}: {judgement.claim.says}")
        for finding in judgement.findings:
            line = f"  - {_comparison(judgement.claim, finding, table)}"
            if len(judgement.findings) > 1 and not (same and alike):
                line += f": {finding.verdict}"
            if finding.why and not same:
                line += f" ({_short(finding.why)})"
            lines.append(line)
    return lines


def _short(why: str) -> str:
    """A reason, or where it is said in full."""
    return why if len(why) <= LONG else "see below"


def _comparison(claim: Claim, finding: Finding, table: Table) -> str:
    """Two rows in one column: ours, and the paper's."""
    papers = {row.name: row.paper[finding.column] for row in table.rows}
    theirs = (_printed(finding.column, papers[name]) for name in (claim.row, claim.than))
    told = f"the paper's {' against '.join(theirs)}"
    if finding.here is not None:
        ours = " against ".join(show(finding.column, value) for value in finding.here)
        if finding.error is not None:
            difference = finding.here[0] - finding.here[1]
            ours += f" ({_signed(finding.column, difference, finding.error)})"
        told = f"{ours}, {told}"
    title = COLUMNS[finding.column].title
    if table.config.transposed:
        title = f"{table.config.header[0]} = {title}"
    return f"{title}: {told}"


def show(column: str, value: Number | None) -> str:
    """One of our numbers, a mean with its ±, or a dash."""
    if value is None:
        return NOTHING
    digits = COLUMNS[column].digits
    if isinstance(value, (tuple, list)):
        return f"{value[0]:,.{digits}f} ± {value[1]:,.{digits}f}"
    return f"{value:,.{digits}f}"


def _signed(column: str, difference: float, error: float) -> str:
    """A difference with its standard error."""
    digits = COLUMNS[column].digits
    if 0 < error < 10 ** (1 - digits):  # two figures of it
        digits = min(6, 1 - floor(log10(error)))
    return f"{difference:+.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def _printed(column: str, value: Number | None) -> str:
    """One of the paper's numbers."""
    if value is None:
        return NOTHING
    digits = COLUMNS[column].printed
    form = "g" if digits is None else f".{digits}f"
    parts = value if isinstance(value, tuple) else (value,)
    return " ± ".join(f"{part:{form}}" for part in parts)


def _aligned(grid: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of cells as Markdown, numbers to the right.

    Args:
        left: how many of the first columns are words.
    """
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    rule = "|".join(
        f":{'-' * (w + 1)}" if i < left else f"{'-' * (w + 1)}:" for i, w in enumerate(widths)
    )
    return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]


UNTOLD = ("run.", "validate_images", "data.workers", "autoencoder")
"""How keys begin that change no number, all but `DECISIVE`; or that are told elsewhere."""
STANDING = (
    "Where the paper is silent (the losses' weights, the widths of some networks, the averaging of "
    "weights), this toolkit's defaults: the README lists them.",
    "One training of each recipe, of one seed: how much two seeds differ is not known. The ± of a "
    "difference is its standard error over the images, no more; where there is none, it is not "
    "known.",
)
EDM = (
    "Diffusion: EDM's preconditioning, noise and sampler (Karras et al. 2022); the paper follows "
    "latent diffusion's (Rombach et al. 2022)."
)
KNOWN = {
    "data.source": "data",
    "data.held_out": "images held out",
    "phases": "training",
    "steps": "steps",
    "batch_size": "images a step",
    "lr": "learning rate",
    "betas": "Adam's betas",
    "clip_norm": "largest norm of a gradient",
    "warmup_images": "images of warm-up",
    "ema_half_life_images": "half-life of the averaged weights, images",
    "decoder.channels": "base width of the decoder",
    "encoder.channels": "base width of the encoder",
    "encoder.extractor.channels": "base width of feature extraction",
    "encoder.aggregator.channels": "base width of feature aggregation",
    "encoder.aggregator.width": "width of the ViT",
    "encoder.aggregator.grid": "side of the ViT's grid of positions",
    "discriminator.channels": "base width of the discriminator",
    "discriminator.multipliers": "widths of the discriminator's halvings",
    "discriminator.layers": "halvings of the discriminator",
    "discriminator.resolution": "side the discriminator is made for",
    "discriminator.max_channels": "largest width of the discriminator",
    "network.channels": "base width of the diffusion network",
    "network.head_width": "width of its attention heads",
    "resolution": "side of the images",
    "statistics_images": "images the latents' statistics are taken over",
    "adversarial.start": "where the discriminator begins, as a fraction of all steps",
    "adversarial.ramp": "how long its weight takes to rise, likewise",
    "loss.lpips": "weight of LPIPS in the loss",
    "run.seed": "seed",
    "run.precision": "precision of the training",
}


def deviations(
    table: Table,
    jobs: Sequence[Job],
    settings: Sequence[str],
    records: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Lines on everything that is not as in the paper.

    Args:
        settings: given by hand.
        records: of the rows that are done.
    """
    lines = []
    if table.config.measure == "encoder":
        lines.append("The machine: see below; the paper's is a Quadro RTX 6000.")
    else:
        trained = [job for job in jobs if not (records.get(job.row.name) or {}).get("taken")]
        lines += _of_recipes(trained)
        lines += [
            f"Row {name} is {record['taken']['path']}, given by hand: trained as its own file says."
            for name, record in records.items()
            if record["taken"]
        ]
        lines += _shared(jobs)
        lines += STANDING
        lines += [EDM] if table.config.measure == "generation" else []
    if settings:
        lines.append(f"Set by hand: {', '.join(settings)}.")
    notes = (note for record in records.values() for note in record["notes"])
    return [*lines, *dict.fromkeys(notes)]


def levelled(jobs: Sequence[Job], settings: Sequence[str]) -> list[str]:
    """Keys set by hand in which the paper's rows differ, and these no longer do."""
    trained = [job for job in jobs if job.taken is None]
    here = [flatten(to_tree(job.training.recipe)) for job in trained]
    rows = (job.row for job in trained)
    paper = [flatten(to_tree(published_recipe(row.kind, row.preset))) for row in rows]
    return [
        key
        for key in dict.fromkeys(map(setting_key, settings))
        if _differ(paper, key) and not _differ(here, key)
    ]


def _differ(trees: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(tree.get(key) != trees[0].get(key) for tree in trees)


def _of_recipes(jobs: Sequence[Job]) -> Iterator[str]:
    """A line for every key in which the rows' recipes differ from the paper's."""
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for job in jobs:
        for stage, here, paper in _pairs(job):
            ours, theirs = _settings(here), _settings(paper)
            for key in ours | theirs:
                if is_told(key) and ours.get(key) != theirs.get(key):
                    told = _words(key, ours.get(key)), _words(key, theirs.get(key))
                    found[stage, key][f"{told[0]} in place of {told[1]}"] = None
    for (stage, key), ways in found.items():
        name = f"{stage}{KNOWN.get(key, key)}"
        yield f"{name[0].upper()}{name[1:]}: {'; '.join(ways)}{_why(key, ways)}."


def _pairs(job: Job) -> Iterator[tuple[str, Recipe, Recipe]]:
    """Of both stages: which, the recipe, and the paper's."""
    row = job.row
    yield "", job.training.recipe, published_recipe(row.kind, row.preset)
    if job.stage_two is not None and job.taken is None:
        name = job.stage_two.recipe.autoencoder
        published = published_recipe(kind_of_stage_one(name), name)
        yield "stage one, ", job.stage_one.recipe, published


def is_told(key: str) -> bool:
    """Whether a key, dotted, is told of where a recipe differs from the paper's."""
    return key in DECISIVE or not key.startswith(UNTOLD)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by dotted keys."""
    settings = flatten(to_tree(recipe))
    judge = getattr(recipe, "discriminator", None)
    if isinstance(judge, StyleGANConfig):  # null is a width, too
        settings["discriminator.channels"] = judge.widths[0]
    return settings


def _why(key: str, ways: Iterable[str]) -> str:
    if key == "loss.lpips" and any(way.startswith("0 ") for way in ways):
        return " (no VGG-16 is needed; ℓ1 and the other terms of the row remain)"
    return ""


def _words(key: str, value: Any) -> str:
    if key == "phases":
        return ", then ".join(f"{p['steps']:,} steps at {p['resolution']}²" for p in value)
    if key == "data.source" and value == PHOTOS:
        return "the photographs inside scikit-image"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return str(value)


def _shared(jobs: Sequence[Job]) -> Iterator[str]:
    by_folder: dict[Any, list[str]] = defaultdict(list)
    for job in jobs:
        by_folder[job.training.folder].append(job.row.name)
    for names in by_folder.values():
        if len(names) > 1:
            yield (
                f"Rows {', '.join(names)} differ in their data alone, of which there is one here: "
                "one training stands for them."
            )


FORMAT = 1
MARKDOWN, JSON = "table.md", "table.json"
PAPER = "Sadat et al. 2024 (arXiv 2405.14477)"


@dataclass(frozen=True)
class Result:
    """A table, row by row.

    Attributes:
        records: of the rows, by name; see `pipelines.reproduce.rows`.
        seconds: that this call took.
    """

    table: Table
    plan: Plan
    jobs: Sequence[Job]
    records: Mapping[str, Mapping[str, Any]]
    seconds: float

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.plan.folder(self.table.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """What is written."""
        return self.folder / MARKDOWN, self.folder / JSON

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """What was measured, by row and column."""
        return {name: dict(record["numbers"]) for name, record in self.records.items()}

    @cached_property
    def judgements(self) -> tuple[Judgement, ...]:
        """What became of the paper's claims."""
        missing = {name: record["missing"] for name, record in self.records.items()}
        scale = self.plan.scale
        why = "" if scale.judges else f"scale {scale.name} is too short to judge by"
        if undone := levelled(self.jobs, self.plan.settings):
            why = why or f"set by hand is what the rows differ in: {', '.join(undone)}"
        each = {job.row.name: read_each(job.folder) for job in self.jobs}
        counted = {name for r in self.records.values() for name in r.get("counted", ())}
        return judge(self.table, self.numbers, missing, why, each, counted)

    @cached_property
    def deviations(self) -> list[str]:
        """What differs from the paper's conditions."""
        return deviations(self.table, self.jobs, self.plan.settings, self.records)

    def summary(self) -> list[str]:
        """The table, the claims, and why what is empty is: as lines."""
        title = f"{self.table.number}: {self.table.config.title}"
        lines = [f"# {title}", "", *table_lines(self.table, self.numbers), ""]
        lines += ["Does what the paper says hold here?", ""]
        lines += claim_lines(self.judgements, self.table)
        if empty := self._empty():
            lines += ["", "Empty, or not to be judged by:", "", *empty]
        return lines

    def as_markdown(self) -> str:
        """All of it as a page."""
        scale = self.plan.scale
        lines = [*self.summary(), "", "## What differs from the paper", ""]
        lines += [f"- {line}" for line in self.deviations]
        lines += ["", "## How it was made", "", f"- scale: {scale.name}, {scale.summary}"]
        lines += [f"- {line}" for line in self._made()]
        lines += ["", "| row | trained in | seconds | measured over | seconds | on |"]
        lines += ["|:--|:--|--:|--:|--:|:--|", *(self._made_row(job) for job in self.jobs)]
        return "\n".join(lines) + "\n"

    def to_tree(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "table": self.table.number,
            "title": self.table.config.title,
            "paper": PAPER,
            "scale": self.plan.scale.name,
            "columns": {n: asdict(COLUMNS[n]) for n in shown_columns(self.table)},
            "rows": [
                {"name": r.name, "label": r.label, "preset": r.preset, "paper": r.paper}
                | {"here": self.records.get(r.name)}
                for r in self.table.rows
            ],
            "claims": [
                {**j.claim.model_dump(mode="json"), "verdict": j.verdict}
                | {"findings": [asdict(finding) for finding in j.findings]}
                for j in self.judgements
            ],
            "deviations": self.deviations,
            "settings": list(self.plan.settings),
            "seconds": self.seconds,
            "machine": ", ".join(self._of_rows(lambda record: record["machine"])),
            "data": self._data(),
            **provenance(),
        }

    # ------------------------------------------------------------------------------- parts
    def _empty(self) -> list[str]:
        """A line for every reason, with the columns and rows that it is of."""
        reasons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name, record in self.records.items():
            for column, why in record["missing"].items():
                reasons[why][COLUMNS[column].title].append(name)
        lines = []
        for why, columns in reasons.items():
            rows = next(iter(columns.values()))
            of_all = len(rows) == len(self.records)
            which = "" if of_all else f" of {', '.join(rows)}"
            lines.append(f"- {', '.join(columns)}{which}: {why}")
        return lines

    def _made(self) -> Iterator[str]:
        """What the rows were measured by, in a line where they agree, and this page."""
        ways: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "command": lambda record: record["command"],
            "machine": lambda record: record["machine"],
            "versions": _versions,
        }
        for what, way in ways.items():
            found = self._of_rows(way)
            for told, rows in found.items():
                which = f" of {', '.join(rows)}" if len(found) > 1 else ""
                yield f"{what}{which}: {told}"
        if self.table.config.measure != "encoder":
            yield "these are of the measuring; those of a training are in its run.json"
            yield f"data: {self._data()}"
        now = provenance()
        yield f"this page: {now['command']}, {now['created']}, {self.seconds:,.1f} s"

    def _data(self) -> str:
        return ", ".join(dict.fromkeys(job.data.source for job in self.jobs))

    def _of_rows(self, told: Callable[[Mapping[str, Any]], str]) -> dict[str, list[str]]:
        """What is told of the rows that were measured, and of which."""
        rows = defaultdict(list)
        for name, record in self.records.items():
            if "machine" in record:
                rows[told(record)].append(name)
        return dict(rows)

    def _made_row(self, job: Job) -> str:
        record = self.records.get(job.row.name) or {}
        seconds = record.get("seconds") or {}
        where = record.get("trained_in") or "–"
        if record.get("taken"):
            where = f"taken: {record['taken']['path']}"
        count = record.get("count")
        cells = (
            job.row.name, where, _plain(seconds.get("training"), ".1f"),
            f"{count:,} images" if count else "–", _plain(seconds.get("measuring"), ".1f"),
            record.get("created", "–"),
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def write_result(result: Result) -> None:
    """Write `table.md` and `table.json`, both or neither."""
    text, tree = result.as_markdown().encode(), to_json(result.to_tree())
    page, values = result.files
    write_together({page: lambda file: file.write(text), values: lambda file: file.write(tree)})


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:,{form}}"
