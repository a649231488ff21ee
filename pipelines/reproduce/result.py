"""What came of a table: to read, to paste, and to compute with."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldm.files import to_json, write_together
from ldm.run_folder import provenance
from pipelines.reproduce.claims import Judgement, judge
from pipelines.reproduce.columns import COLUMNS
from pipelines.reproduce.deviations import deviations, levelled
from pipelines.reproduce.layout import claim_lines, shown_columns, table_lines
from pipelines.reproduce.plan import Job, Plan
from pipelines.reproduce.records import read_each
from pipelines.reproduce.tables import Table

FORMAT = 1
MARKDOWN, JSON = "table.md", "table.json"
PAPER = "Sadat et al. 2024 (arXiv 2405.14477)"


@dataclass(frozen=True)
class Result:
    """A table, row by row.

    Attributes:
        records: of the rows, by name; see `pipelines.reproduce.records`.
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
