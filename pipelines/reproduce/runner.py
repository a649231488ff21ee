"""`ldm reproduce`: train what is missing, measure, print ours beside the paper's, and judge.

<out>/<scale>/<table>/table.md     the table, the claims, what differs from the paper, how it was
                                   made
<out>/<scale>/<table>/table.json   the same as numbers, with the recipes of all rows
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ldm.data import open_source
from ldm.device import resolve_device
from ldm.distributed import from_main, join_processes
from ldm.errors import LdmError, UsageError
from ldm.logbook import console
from ldm.run_folder import provenance
from ldm.timing import name_device
from pipelines.reproduce.figures import Drawing, draw_figure, find_figure
from pipelines.reproduce.measures import Measured, Tools, measure, measure_costs
from pipelines.reproduce.output import Result, write_result
from pipelines.reproduce.plan import Job, Plan, find_scale, setting_key
from pipelines.reproduce.rows import (
    RECORD,
    Taken,
    asked_of,
    check_images,
    check_weights,
    find_taken,
    finished,
    is_main,
    lacking,
    listing_of,
    listings_of,
    make_model,
    taken_before,
    write_record,
)
from pipelines.reproduce.tables import Table, find_tables


def reproduce(
    word: str,
    scale: str = "small",
    data: Sequence[str] = (),
    take: Sequence[str] = (),
    settings: Sequence[str] = (),
    out: Path = Path("reproduce"),
    weights: Path | None = None,
    force: bool = False,
) -> list[Result | Drawing]:
    """Run the tables that a word means, all but what is finished of them; or draw a figure.

    Stopped at any moment, the same call goes on: finished rows are not redone, a row that was
    begun goes on from its last saved state.

    Args:
        word: t9; t2 is both halves of Table 2; f5 is Figure 5.
        scale: smoke, small or paper.
        data: PATH, or NAME=PATH for one of the paper's data sets; none: the built-in photographs,
            or at scale paper those of the recipes.
        take: ROW=PATH: a checkpoint to measure in place of training.
        settings: `key=value` over the recipes of all rows.
        out: the folder of all.
        weights: Inception's, where they do not lie as usual.
        force: measure images as held out that were trained on, and note it.

    Returns:
        A result for each table, written to its folder, too; or what was drawn.

    Raises:
        UsageError: no such table, scale, row or setting, or settings that undo what a table varies;
            or `out` is a file.
        LdmError: as training and measuring; rows that are done stay so.
        Interrupted: asked to stop while training.
    """
    if out.is_file():
        raise UsageError(f"--out {out}: it is a file, give a folder")
    listing_of.cache_clear()  # a notebook may have changed them since
    if figure := find_figure(word):
        if take:
            raise UsageError(f"--take is for tables: {figure} is drawn of others by `ldm analyze`")
        return [draw_figure(figure, Plan(find_scale(scale), data, settings, out), weights, force)]
    tables = find_tables(word)
    plan = Plan(find_scale(scale), data, settings, out)
    if take and len(tables) > 1:
        numbers = " or ".join(table.number.lower() for table in tables)
        raise LdmError(f"--take is for one table: say {numbers}")
    jobs = {table.name: plan.jobs(table, take) for table in tables}
    tools = Tools(plan.scale.measuring, weights, force)
    return [_run(table, jobs[table.name], plan, tools) for table in tables]


def _run(table: Table, jobs: Sequence[Job], plan: Plan, tools: Tools) -> Result:
    began = time.monotonic()
    if table.config.measure == "encoder":
        records = _costs(table, jobs, plan, tools)
    else:
        ranks, _ = join_processes(jobs[0].training.recipe.run.device)
        # once for all processes, which would wait for each other if they did not do the same
        tasks: list[_Task] = from_main(ranks, lambda: _plan(jobs, tools))
        jobs = [task.job for task in tasks]
        records = {}
        for number, task in enumerate(tasks, start=1):
            label = " · ".join(task.job.row.label)
            done = ", done already" if task.done else ""
            _say(f"{table.number}, row {number} of {len(tasks)}: {label}{done}")
            records[task.job.row.name] = task.done or _do(table, task, tools, ranks)
    result = Result(table, plan, jobs, records, round(time.monotonic() - began, 1))
    if is_main():
        write_result(result)
    return result


@dataclass(frozen=True)
class _Task:
    """A row, and how far it is."""

    job: Job
    asked: dict[str, Any]
    """All that decides its numbers."""
    taken: Taken | None
    done: dict[str, Any] | None
    """Its record, where it is finished."""

    @classmethod
    def of(cls, job: Job, tools: Tools) -> "_Task":
        asked, taken = asked_of(job, tools.how), find_taken(job)
        asked["listings"] = listings_of(job)
        done = finished(job, asked, taken and taken.sha256, tools.weights, tools.force)
        if taken is None and (before := taken_before(job)):
            path, sha256 = before
            job = replace(job, taken=path)
            if done is None:  # measured again, rather than trained
                taken = _taken_again(job, sha256)
        return cls(job, asked, taken, done)


def _taken_again(job: Job, sha256: str) -> Taken:
    """The checkpoint that a row was measured with before.

    Raises:
        LdmError: it is not there any more, or another one is.
    """
    assert job.taken is not None
    now = find_taken(job) if job.taken.exists() else None
    if now is not None and now.sha256 == sha256:
        return now
    what = "not there" if now is None else "another model now"
    raise LdmError(
        f"row '{job.row.name}' was measured with {job.taken}, which is {what}: give --take "
        f"{job.row.name}=PATH, or remove {job.folder / RECORD} to have the row trained"
    )


def _plan(jobs: Sequence[Job], tools: Tools) -> list[_Task]:
    """What is to be done; all that can be refused is, before anything is trained."""
    tasks = [_Task.of(job, tools) for job in jobs]
    _check_data(tasks)
    return tasks


def _check_data(tasks: Sequence[_Task]) -> None:
    """Open all data that is needed, rather than miss it when a row's turn comes; and see that what
    was begun is gone on with on the same."""
    needed = {
        (t.job.data.source, t.job.resolution): t.job.data for t in tasks if t.done is None
    }  # fmt: skip
    for (_, resolution), data in needed.items():
        open_source(data, "train", resolution)
    for task in tasks:
        if task.done is None:
            check_images(task.job, task.taken)


def _do(table: Table, task: _Task, tools: Tools, ranks: PartialState) -> Mapping[str, Any]:
    """Train and measure a row; its record, which is kept."""
    job, taken = task.job, task.taken
    stand_in, lacks = not tools.how.published, None
    if not (stand_in or taken):
        lacks = from_main(ranks, lambda: check_weights(job.stage_one.recipe))
    if lacks is not None:
        _say(f"  left out: {lacks}")
        return _left_out(task.asked, table, lacks)
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.training.folder.parent != job.folder and taken is None:
        _say(f"  the very recipe of {job.training.preset}: trained in {job.training.folder}")
    model = make_model(job, taken, stand_in)
    began = time.monotonic()
    measured = measure(table, job, model, tools)
    if stand_in and job.stage_one.recipe.loss.esrgan:
        measured.notes.append("ESRGAN's loss looked through a VGG-19 of random weights.")
    record = {
        **_described(task.asked, measured),
        "lacked": [] if stand_in else lacking(measured.missing, tools.weights),
        "model": model.to_tree(),
        "taken": taken and {"path": str(taken.path), "sha256": taken.sha256},
        "trained_in": None if model.taken else str(job.training.folder),
        "seconds": {"training": model.seconds, "measuring": round(time.monotonic() - began, 2)},
        **_made_by(job),
    }
    write_record(job, record, measured.each)
    return record


def _costs(
    table: Table, jobs: Sequence[Job], plan: Plan, tools: Tools
) -> dict[str, Mapping[str, Any]]:
    """Records of encoders, which are measured together or not at all."""
    if any(job.taken for job in jobs):
        raise LdmError(f"{table.number} measures encoders of presets: it takes no checkpoints")
    if others := [s for s in plan.settings if setting_key(s) != "run.device"]:
        raise UsageError(
            f"{table.number} measures encoders of presets: leave out {', '.join(others)}; "
            "of settings it takes run.device alone"
        )
    machine = name_device(resolve_device(jobs[0].training.recipe.run.device))
    asked = {job.row.name: asked_of(job, plan.scale.measuring) for job in jobs}
    found = {j.row.name: finished(j, asked[j.row.name], None, tools.weights) for j in jobs}
    # what encoding costs is of the machine: on another one it is measured again
    if all(record and record["machine"] == machine for record in found.values()):
        _say("  done already")
        return found
    if not is_main():
        return {}
    began = time.monotonic()
    costs = measure_costs(table, jobs[0].training.recipe.run.device, plan.scale.measuring)
    seconds = {"training": None, "measuring": round(time.monotonic() - began, 2)}
    records = {}
    for job in jobs:
        measured = costs[job.row.name]
        records[job.row.name] = {
            **_described(asked[job.row.name], measured),
            "lacked": [], "model": None, "taken": None, "trained_in": None,
            "seconds": seconds, **_made_by(job),
        }  # fmt: skip
        write_record(job, records[job.row.name])
    return records


def _described(asked: dict[str, Any], measured: Measured) -> dict[str, Any]:
    return {
        "numbers": measured.numbers,
        "missing": measured.missing,
        "notes": measured.notes,
        "count": measured.count,
        "extractor": measured.extractor,
        "force": measured.force,
        "counted": measured.counted,
        "asked": asked,
    }


def _made_by(job: Job) -> dict[str, Any]:
    device = resolve_device(job.training.recipe.run.device)
    return {"machine": name_device(device), **provenance()}


def _left_out(asked: dict[str, Any], table: Table, why: str) -> dict[str, Any]:
    """What stands for a row that could not be trained; it is not kept, and tried again."""
    columns = table.config.columns
    empty = Measured(dict.fromkeys(columns), dict.fromkeys(columns, why))
    return {
        **_described(asked, empty),
        "model": None, "taken": None, "trained_in": None,
        "seconds": {"training": None, "measuring": None},
    }  # fmt: skip


def _say(text: str) -> None:
    if is_main():
        console.print(text, markup=False)
