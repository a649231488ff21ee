"""`ldm reproduce`, a build cache: target → up to date? → build → measure → judge → print."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from pydantic import Field

from ldm.data import open_source
from ldm.device import name_device, resolve_device
from ldm.distributed import from_main, join_processes
from ldm.errors import LdmError, UsageError, try_call
from ldm.files import Content, check_writable, lock, to_json, write_together
from ldm.logbook import console
from ldm.metrics.inception import SHA256, digest, published_weights
from ldm.records import Count, checked, read_arrays, read_each, read_tree, schema
from ldm.run_folder import provenance
from pipelines.reproduce.figures import Drawing, draw_figure, find_figure
from pipelines.reproduce.output import Result, pool_seeds, write_result
from pipelines.reproduce.plan import (
    SCALES,
    BuildPlan,
    Target,
    load_scale,
    setting_key,
)
from pipelines.reproduce.rows import (
    OF_FEATURES,
    Checkpoint,
    RowNumbers,
    check_images,
    has_weights,
    is_main,
    listing_of,
    load_taken,
    make_model,
    measure,
    measure_costs,
    missing_weights,
    same_listing,
)
from pipelines.reproduce.tables import Row, Table, all_tables, find_tables

FORMAT = 3
RECORD, EACH = "row.json", "images.npz"
REMEASURE = "delete it to measure the row again"


NUMBER = Annotated[float, Field(allow_inf_nan=True)]
BEGUN = schema(
    format=(Count, 0), state=(str, ""), taken=(schema(path=str, sha256=str) | None, None)
)
"""A record of any format."""
RECORD_SCHEMA = schema(
    asked=schema(trained=dict[str, dict[str, Any]], measured=dict[str, Any],
                 listings=(dict[str, str | None], {})),
    numbers=dict[str, NUMBER | Annotated[list[NUMBER], Field(min_length=2, max_length=2)] | None],
    missing=dict[str, str], lacked=list[str], notes=list[str], each=list[str],
    taken=dict[str, Any] | None, trained_in=str | None, count=Count | None, machine=str,
    seconds=dict[str, float | None], extractor=(dict[str, Any] | None, None),
    force=(bool | None, None), counted=(list[str], []), created=(str, ""), platform=(str, ""),
    versions=(dict[str, str], {}),
)  # fmt: skip
Record = dict[str, Any]


def reproduce(
    word: str,
    scale: str = "small",
    data: Sequence[str] = (),
    take: Sequence[str] = (),
    settings: Sequence[str] = (),
    out: Path = Path("reproduce"),
    weights: Path | None = None,
    force: bool = False,
    seeds: int = 1,
    ours: bool = False,
) -> list[Result] | list[Drawing]:
    """Build and write the tables or the figure that a word names.

    After an interruption the same call resumes: finished rows are reused, and a row in training
    continues from its last saved state. Arguments are as of `ldm reproduce`.
    """
    check_writable(out / "table.md", advice="give --out another folder")
    listing_of.cache_clear()  # data sets may have changed since an earlier call
    figure = find_figure(word)
    tables = [] if figure else find_tables(word)
    if scale not in SCALES:
        raise UsageError(f"--scale {scale}: it must be one of {', '.join(SCALES)}")
    plan = BuildPlan(load_scale(scale), data, settings, out, weights, force)
    if figure:
        if take:
            raise UsageError(f"--take is for tables: draw {figure} of checkpoints by `ldm analyze`")
        if seeds > 1 or ours:
            raise UsageError(f"--seeds and --ours are for tables: omit them for {figure}")
        return [draw_figure(figure, plan)]
    if ours and not any(table.ours.rows for table in tables):
        with_ours = ", ".join(table.number for table in all_tables() if table.ours.rows)
        raise UsageError(f"{tables[0].number} has no rows of ours; these have: {with_ours}")
    tables = [table.with_ours() if ours else table for table in tables]
    if seeds > 1:
        return _build_seeds(tables, plan, take, seeds)
    if take and len(tables) > 1:
        numbers = " or ".join(table.number.lower() for table in tables)
        raise LdmError(f"--take is for one table: give {numbers}")
    targets = {table.name: plan.targets(table, take) for table in tables}
    return [_build_table(table, targets[table.name], plan) for table in tables]


def _build_seeds(
    tables: Sequence[Table], plan: BuildPlan, take: Sequence[str], seeds: int
) -> list[Result]:
    """Build tables with every seed, those after the first in folders of their own, and pool them.

    All tables are built with a seed before any is with the next, so that early pages have all rows.
    """
    if any(table.measure == "encoder" for table in tables):
        raise UsageError(f"{tables[0].number} trains nothing: omit --seeds")
    if take or any(setting_key(text) == "run.seed" for text in plan.settings):
        raise UsageError("--seeds trains every row with seeds 0, 1 …: omit --take and run.seed")
    plans = [plan] + [
        replace(plan, settings=(*plan.settings, f"run.seed={k}"), out=plan.out / f"seed-{k}")
        for k in range(1, seeds)
    ]
    targets = [[each.targets(table) for table in tables] for each in plans]  # all checked first
    for target in chain(*targets[0]):
        record = read_tree(target.folder / RECORD, BEGUN, REMEASURE)
        if record and record["taken"]:
            raise UsageError(
                f"row '{target.row.name}' was measured with --take: give --out another folder"
            )
    built = [
        [
            _build_table(table, of_table, each)
            for table, of_table in zip(tables, of_seed, strict=True)
        ]
        for each, of_seed in zip(plans, targets, strict=True)
    ]
    pooled = [pool_seeds(results) for results in zip(*built, strict=True)]
    if is_main():
        for result in pooled:
            write_result(result)
    return pooled


def row_states(out: Path, row: Row) -> dict[str, str]:
    """Return the state of a row by scale: done, begun, or a dash."""
    states = {}
    for scale in SCALES:
        folder = out / scale / row.table / row.name
        begun_row = read_each([folder / RECORD], lambda path: read_tree(path, BEGUN))
        done = any(found and found.get("state") == "done" for found in begun_row.values())
        # a folder without a run shares the training of another row
        runs = [path for path in folder.glob("*") if path.is_dir()]
        begun = folder.is_dir() and all(any(run.glob("state/*/state.pt")) for run in runs)
        states[scale] = "done" if done else "begun" if begun else "–"
    return states


def _build_table(table: Table, targets: Sequence[Target], plan: BuildPlan) -> Result:
    start = time.monotonic()
    if table.measure == "encoder":
        records = _build_costs(table, targets, plan)
    else:
        ranks, _ = join_processes(targets[0].device)
        # decided once for all processes: each would wait for the others in another step
        rows: list[_Status] = from_main(ranks, lambda: _check_rows(targets, plan))
        targets = [row.target for row in rows]
        records, seed = {}, targets[0].training.recipe.run.seed
        which = f", seed {seed}" if seed else ""
        for number, row in enumerate(rows, start=1):
            label = " · ".join(row.target.row.label)
            done = ", done already" if row.record else ""
            _say(f"{table.number}{which}, row {number} of {len(rows)}: {label}{done}")
            name = row.target.row.name
            records[name] = row.record or _build_row(table, row, plan, ranks)
    each = {target.row.name: _read_each(target.folder) for target in targets}
    seconds = round(time.monotonic() - start, 1)
    result = Result(table, plan, targets, records, each, seconds)
    if is_main():
        write_result(result)
    return result


# -------------------------------------------------------------------------------- up to date?
@dataclass(frozen=True)
class _Status:
    """A target, and its record if that is up to date."""

    target: Target
    request: dict[str, Any]
    """The settings that its numbers depend on."""
    taken: Checkpoint | None
    record: Record | None


def _check_rows(targets: Sequence[Target], plan: BuildPlan) -> list[_Status]:
    """Find the rows to build, and raise now what would fail after hours of training."""
    rows = [_check_row(target, plan) for target in targets]
    to_build = [row for row in rows if row.record is None]
    needed = dict.fromkeys((row.target.data, row.target.resolution) for row in to_build)
    for data, resolution in needed:
        open_source(data, "train", resolution)
    for row in to_build:
        check_images(row.target, row.taken)
    return rows


def _check_row(target: Target, plan: BuildPlan) -> _Status:
    request, taken = target.request(plan.scale.protocol), load_taken(target)
    sources = {run.recipe.data.source for run in (target.stage_one, target.training)}
    request["listings"] = {source: listing_of(source) for source in sorted(sources)}
    record = up_to_date(target, request, taken, plan)
    before = (read_tree(target.folder / RECORD, BEGUN, REMEASURE) or {}).get("taken")
    if taken is None and before:
        path = Path(before["path"])
        target = replace(target, taken=path)
        if record is None:  # measure it again, rather than train
            taken = load_taken(target) if path.exists() else None
            if taken is None or taken.sha256 != before["sha256"]:
                change = "is missing" if taken is None else "is another model now"
                name = target.row.name
                raise LdmError(
                    f"row '{name}' was measured with {path}, which {change}: give --take "
                    f"{name}=PATH, or remove {target.folder / RECORD} to train the row"
                )
    return _Status(target, request, taken, record)


def up_to_date(
    target: Target, request: dict[str, Any], taken: Checkpoint | None, plan: BuildPlan
) -> Record | None:
    """Return the record of a row that need not be built again.

    A row that was measured with a --take checkpoint stays so until another one is given.
    A row is measured again if weights that it lacked are there now, or if its numbers are
    of another Inception than now: no table mixes two. Versions decide nothing.
    """
    path = target.folder / RECORD
    record = read_tree(path, BEGUN, REMEASURE) or {}
    if record.get("format") != FORMAT or record.get("state") != "done":
        return None
    checked(RECORD_SCHEMA, record, path, REMEASURE)
    then, before = target.complete(record["asked"]), record["taken"]
    listings = then.get("listings", {})
    current = (
        then["measured"] == request["measured"]
        and (before is not None or then["trained"] == request["trained"])
        and (taken is None or taken.sha256 == (before or {}).get("sha256"))
        and all(same_listing(listings.get(k), v) for k, v in request.get("listings", {}).items())
        and _read_each(target.folder).keys() >= set(record["each"])
        and _is_same_network(record, plan.weights)
        and record.get("force") in (None, plan.force)
        and not any(has_weights(number, plan.weights) for number in record["lacked"])
    )
    return record if current else None


def _is_same_network(record: Record, weights: Path | None) -> bool:
    """Return true unless another Inception computed the record's numbers."""
    if all(record["numbers"].get(name) is None for name in OF_FEATURES):
        return True
    if weights is None and published_weights() is None:
        return True  # no network here could measure them again
    now = SHA256 if weights is None else digest(weights)
    return (record.get("extractor") or {}).get("sha256") == now


# -------------------------------------------------------------------------------------- build
def _build_row(table: Table, row: _Status, plan: BuildPlan, ranks: PartialState) -> Record:
    """Train and measure a row; write and return its record."""
    target, taken = row.target, row.taken
    substitutes = not plan.scale.protocol.published
    if not (substitutes or taken):
        why = from_main(ranks, lambda: missing_weights(target.stage_one.recipe))
        if why is not None:  # not written: tried again next time
            _say(f"  left out: {why}")
            empty = RowNumbers(dict.fromkeys(table.columns), dict.fromkeys(table.columns, why))
            return _fields(empty, row.request)
    if target.training.folder.parent != target.folder and taken is None:
        training = target.training
        _say(f"  same recipe as {training.preset}: trained once for both, in {training.folder}")
    with ExitStack() as held:
        from_main(ranks, lambda: held.enter_context(lock(target.folder)))
        model = make_model(target, taken, substitutes)
        start = time.monotonic()
        measured = measure(table, target, model, plan)
    seconds = {"training": model.seconds, "measuring": round(time.monotonic() - start, 2)}
    lacked = [name for name in measured.missing if not has_weights(name, plan.weights)]
    return _write_record(
        target, measured, row.request,
        seconds=seconds,
        lacked=[] if substitutes else lacked,
        model=model.to_tree(),
        taken=taken and {"path": str(taken.path), "sha256": taken.sha256},
        trained_in=None if model.taken else str(target.training.folder),
    )  # fmt: skip


def _build_costs(table: Table, targets: Sequence[Target], plan: BuildPlan) -> dict[str, Record]:
    """Measure the encoders of Table 3: all of them, or none."""
    if any(target.taken for target in targets):
        raise LdmError(f"{table.number} measures encoders of presets: it takes no checkpoints")
    if others := [s for s in plan.settings if setting_key(s) != "run.device"]:
        raise UsageError(
            f"{table.number} measures encoders of presets: omit {', '.join(others)}; the only "
            "setting is run.device"
        )
    device, protocol = targets[0].device, plan.scale.protocol
    requests = {target.row.name: target.request(protocol) for target in targets}
    records: dict[str, Any] = {
        t.row.name: up_to_date(t, requests[t.row.name], None, plan) for t in targets
    }
    machine = name_device(resolve_device(device))  # costs are of the machine
    if all(record and record["machine"] == machine for record in records.values()):
        _say("  done already")
        return records
    if not is_main():
        return {}
    start = time.monotonic()
    costs = measure_costs(table, device, protocol)
    seconds = {"training": None, "measuring": round(time.monotonic() - start, 2)}
    for target in targets:
        name = target.row.name
        records[name] = _write_record(target, costs[name], requests[name], seconds=seconds)
    return records


def _fields(measured: RowNumbers, request: dict[str, Any]) -> Record:
    """The fields of a record, as of a row without a model."""
    fields = {name: value for name, value in vars(measured).items() if name != "each"}
    fields |= dict.fromkeys(("model", "taken", "trained_in"))
    seconds = {"training": None, "measuring": None}
    return fields | {"asked": request, "lacked": [], "seconds": seconds}


def _write_record(
    target: Target, measured: RowNumbers, request: dict[str, Any], **about: Any
) -> Record:
    """Write and return the record of a finished row, and write the numbers of every image."""
    each = measured.each
    record = {"format": FORMAT, "state": "done", "each": sorted(each)}
    record |= _fields(measured, request) | about
    record |= {"machine": name_device(resolve_device(target.device)), **provenance()}

    def write_each(file: IO[bytes]) -> None:
        np.savez(file, **each)  # type: ignore[arg-type]

    if is_main():
        files: dict[Path, Content] = {target.folder / EACH: write_each} if each else {}
        write_together(files | {target.folder / RECORD: to_json(record)})
    return record


def _read_each(folder: Path) -> dict[str, NDArray]:
    """The numbers of every image of a row; {} if there are none."""
    each = try_call(read_arrays, folder / EACH)
    if isinstance(each, LdmError) or "k" not in each:
        return {}
    fits = ((v.shape, v.dtype.kind in "iuf") == (each["k"].shape[:1], True) for v in each.values())
    return each if all(fits) else {}


def _say(text: str) -> None:
    if is_main():
        console.print(text, markup=False)
