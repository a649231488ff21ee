"""`ldm doctor`: requirements of a preset, what is missing, and the time it would take here."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from ldm.cli import options

if TYPE_CHECKING:
    from pipelines.doctor.doctor import Diagnosis, Disk, Machine, Memory
    from pipelines.doctor.timing import Timing

Rows = list[tuple[str, ...]]
COLOURS = {"error": "red", "warning": "yellow", "note": "bright_black"}
UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60}


def doctor(
    preset: Annotated[str, Argument(help="A preset, such as litevae-b or diffusion/tiny.")],
    settings: options.Settings = None,
    ae: options.StageOne = None,
    trial: Annotated[bool, Option(help="Time a few steps here, for up to half a minute.")] = True,
    device: options.Device = "auto",
    processes: Annotated[int, Option(min=1, help="Processes that would train, a GPU each.")] = 1,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Print what training a preset needs, what is missing, and how long it would take here.

    Nothing is written or downloaded. The exit status is 1 if the run would fail.

    ldm doctor ffhq256 --ae runs/x/ckpt.pt
    """
    from pipelines.doctor.doctor import SECONDS, diagnose
    from pipelines.recipes import load_recipe

    found = options.find_presets(preset, options.KINDS if ae is None else options.STAGE_TWO)
    kind, name = found[0]
    words = list(settings or [])
    if device != "auto":
        words.append(f"run.device={device}")
    options.add_setting(words, "--ae", "autoencoder", ae)
    recipe = load_recipe(kind, name, words)
    diagnosis = diagnose(recipe, name, processes, SECONDS if trial else 0)

    if as_json:
        options.echo(json.dumps(asdict(diagnosis) | {"ready": diagnosis.ready}))
    else:
        for other in found[1:]:
            options.echo(f"(also a preset: ldm doctor {'/'.join(other)})")
        command = shlex.join(["ldm", options.COMMAND[kind], name, *words])
        _print(diagnosis, f"{kind}/{name}", command)
    raise typer.Exit(0 if diagnosis.ready else 1)


# ----------------------------------------------------------------------------------- report
def _print(d: "Diagnosis", preset: str, command: str) -> None:
    """Print the report: size, requirements, problems, and the next command."""
    length, machine = d.length, d.machine
    options.echo(f"{preset} on {machine.device} ({machine.name}), {machine.precision}", bold=True)
    if d.autoencoder is not None:
        options.echo(f"  stage one  {d.autoencoder}")
    count = "missing" if length.data is None else f"{length.data:,} images to train on"
    options.echo(f"  data       {d.source}: {count}")
    epochs = f", {length.images / length.data:,.1f} epochs" if length.data else ""
    options.echo(f"  length     {length.steps:,} steps, {length.images:,} images{epochs}")
    batch = f"{length.batch_size}"
    if length.batch_size == length.processes * length.accumulate * length.each:
        processes = options.many(length.processes, "process", "processes")
        micro_batches = options.many(length.accumulate, "micro-batch", "micro-batches")
        batch += f" = {processes} × {micro_batches} × {options.many(length.each, 'image')}"
    options.echo(f"  batch      {batch}")

    if d.memory is not None and d.disk is not None:
        sides = list(d.step_gmac)
        rows = [
            (p.name, f"{p.parameters:,}", *(f"{p.gmac[s]:,.2f}" for s in sides)) for p in d.parts
        ]
        step = [f"{d.step_gmac[side]:,.2f}" for side in sides]
        rows.append(("a training step, forward and backward", "", *step))
        heads = [f"{side}²" if isinstance(side, int) else side for side in sides]
        _table(["networks", "parameters", *(f"GMAC an image of {head}" for head in heads)], rows)
        memory = _memory(d.memory, options.many(length.each, "image"), machine.memory)
        _table(*_sizes("memory of a process", memory))
        _table(*_sizes("disk", _disk(d.disk, machine)))
    if d.trial is not None:
        _table(["timing", "measured on", "images/s", "takes"], _timing(d, d.trial))

    options.echo("")
    for problem in sorted(d.problems, key=lambda problem: list(COLOURS).index(problem.level)):
        options.echo(f"{problem.level}: {problem.text}", fg=COLOURS[problem.level])
    if d.ready:
        options.echo(f"ready: {command}", bold=True, fg="green")
    else:
        errors = sum(problem.level == "error" for problem in d.problems)
        options.echo(f"{options.many(errors, 'error')} would stop this run", bold=True, fg="red")


def _table(header: list[str], rows: Rows) -> None:
    """Print rows indented under a header, after an empty line."""
    from ldm.tables import text_table

    first, *others = text_table(header, [(f"  {row[0]}", *row[1:]) for row in rows], gap="   ")
    options.echo("")
    options.echo(first, bold=True)
    for line in others:
        options.echo(line)


def _memory(memory: "Memory", images: str, free: int) -> dict[str, int]:
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "buckets of gradients, to exchange them": memory.buckets,
        "Adam's moments": memory.adam,
        "averaged weights": memory.averages,
        "frozen networks": memory.frozen,
        f"activations of {images}, estimated": memory.activations,
        f"stage one encoding {images}, estimated": memory.encoding,
        "copies of what is being saved": memory.saving,
        "total": memory.total,
        "free here": free,
    }


def _disk(disk: "Disk", machine: "Machine") -> dict[str, int]:
    sizes = {
        "states to resume from": disk.states,
        "models": disk.models,
        "snapshots of averages": disk.snapshots,
        "temporary, while files are replaced": disk.writing,
    }
    if machine.cache_disk is None:
        cached = {"cached latents": disk.cache}
        return sizes | cached | {"total": disk.total, "free here": machine.disk}
    sizes |= {"total": disk.run, "free here": machine.disk}
    return sizes | {"cached latents, on another disk": disk.cache, "free there": machine.cache_disk}


def _sizes(title: str, sizes: Mapping[str, int]) -> tuple[list[str], Rows]:
    """A table of bytes, all in the unit that suits their total."""
    unit, length = ("GiB", 2**30) if sizes["total"] >= 2**30 else ("MiB", 2**20)
    return [title, unit], [(name, f"{n / length:,.1f}") for name, n in sizes.items() if n]


def _timing(d: "Diagnosis", timing: "Timing") -> Rows:
    """Speed and duration of each stretch of the run, and of the whole."""
    from ldm.config import pixel_count, short_size

    rows: Rows = []
    adversarial = any(part.name == "discriminator" for part in d.parts)
    for speed in timing.speeds:
        stretch = speed.load
        name = f"{stretch.steps:,} steps at {short_size(stretch.resolution)}"
        if adversarial:
            name += f", with{'' if stretch.adversarial_active else 'out'} the discriminator"
        measured = options.many(speed.measured_batch, "image")
        measured += f" of {short_size(speed.measured_side)}"
        if scaled := speed.measured_side != stretch.resolution:
            measured += ", scaled"  # small images keep a device less busy: it may be faster
        rate = f"{'over ' * scaled}{speed.images_per_second:,.3g}"
        rows.append((name, measured, rate, f"{'under ' * scaled}{_duration(speed.seconds)}"))
    whole = "to the end, without loading images and validating"
    rows.append((whole, "", "", _duration(timing.seconds)))
    notes = []
    if d.length.processes > 1:
        notes.append(f"as if {d.length.processes} processes never waited for each other")
    if d.machine.compiles:
        notes.append("timed without run.compile, whose first steps are slow and the others faster")
    if timing.peak is not None:
        largest = max(timing.speeds, key=lambda s: s.measured_batch * pixel_count(s.measured_side))
        images = options.many(largest.measured_batch, "image")
        size = f"with {images} of {short_size(largest.measured_side)}"
        where = "before it ran out" if timing.out_of_memory else size
        notes.append(f"{timing.peak / 2**30:,.2f} GiB of GPU memory at the peak, {where}")
    return rows + [(note,) + ("",) * 3 for note in notes]


def _duration(seconds: float) -> str:
    for unit, length in UNITS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
