"""`ldm doctor`: requirements of a preset, what is missing, and the time it would take here."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.options import (
    COMMAND,
    STAGE_ONE,
    STAGE_TWO,
    Device,
    Settings,
    add_autoencoder,
    find_preset,
    find_presets,
    resolve_recipe,
)

if TYPE_CHECKING:
    from pipelines.doctor.doctor import Diagnosis, Disk, Machine, Memory
    from pipelines.doctor.timing import Timing

Rows = list[tuple[str, ...]]
COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60}


def doctor(
    preset: Annotated[str, typer.Argument(help="A preset, such as litevae-b or diffusion/tiny.")],
    settings: Settings = None,
    ae: Annotated[
        str | None,
        typer.Option(
            help="Stage two: its autoencoder, a ckpt.pt, a run folder or a preset. Default: the "
            "newest run."
        ),
    ] = None,
    trial: Annotated[
        bool, typer.Option(help="Time some training steps here, for up to half a minute.")
    ] = True,
    device: Device = "auto",
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that would train together, a GPU each.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Print what training a preset needs, what is missing, and how long it would take here.

    Nothing is written or downloaded. The exit status is 1 if the run would fail.

    ldm doctor ffhq256 --ae runs/x/ckpt.pt
    """
    from pipelines.doctor.doctor import SECONDS, diagnose_autoencoder, diagnose_diffusion

    found = find_presets(preset)
    kind, name = find_preset(preset, STAGE_TWO) if ae is not None else found[0]
    words = list(settings or [])
    if device != "auto":
        words.append(f"run.device={device}")
    add_autoencoder(words, ae)
    diagnose = diagnose_autoencoder if kind in STAGE_ONE else diagnose_diffusion
    recipe = resolve_recipe(kind, name, words)
    diagnosis = diagnose(recipe, name, processes, SECONDS if trial else 0)

    if as_json:
        typer.echo(json.dumps(asdict(diagnosis) | {"ready": diagnosis.ready}, ensure_ascii=False))
    else:
        for other in found:
            if other != (kind, name):
                typer.echo(f"(also a preset: ldm doctor {'/'.join(other)})")
        command = shlex.join(["ldm", COMMAND[kind], name, *words])
        _print(diagnosis, f"{kind}/{name}", command)
    raise typer.Exit(0 if diagnosis.ready else 1)


# ----------------------------------------------------------------------------------- report
def _print(d: "Diagnosis", preset: str, command: str) -> None:
    """Print the report: size, requirements, problems, and the next command."""
    length, machine = d.length, d.machine
    _line(f"{preset} on {machine.device} ({machine.name}), {machine.precision}", "bold")
    if d.autoencoder is not None:
        _line(f"  stage one  {d.autoencoder}")
    count = "missing" if length.data is None else f"{length.data:,} images to train on"
    _line(f"  data       {d.source}: {count}")
    epochs = f", {length.images / length.data:,.1f} epochs" if length.data else ""
    _line(f"  length     {length.steps:,} steps, {length.images:,} images{epochs}")
    batch = f"{length.batch_size}"
    if length.batch_size == length.processes * length.accumulate * length.each:
        processes = _many(length.processes, "process", "processes")
        micro_batches = _many(length.accumulate, "micro-batch", "micro-batches")
        batch += f" = {processes} × {micro_batches} × {_many(length.each, 'image')}"
    _line(f"  batch      {batch}")

    if d.memory is not None and d.disk is not None:
        sides = list(d.step_gmac)
        rows = [
            (p.name, f"{p.parameters:,}", *(f"{p.gmac[s]:,.2f}" for s in sides)) for p in d.parts
        ]
        step = [f"{d.step_gmac[side]:,.2f}" for side in sides]
        rows.append(("a training step, forward and backward", "", *step))
        _table(["networks", "parameters", *(f"GMAC an image of {s}²" for s in sides)], rows)
        memory = _memory(d.memory, _many(length.each, "image"), machine.memory)
        _table(*_sizes("memory of a process", memory))
        _table(*_sizes("disk", _disk(d.disk, machine)))
    if d.trial is not None:
        _table(["timing", "measured on", "images/s", "takes"], _timing(d, d.trial))

    _line("")
    for problem in sorted(d.problems, key=lambda problem: list(COLOURS).index(problem.level)):
        _line(f"{problem.level}: {problem.text}", COLOURS[problem.level])
    if d.ready:
        _line(f"ready: {command}", "bold green")
    else:
        errors = sum(problem.level == "error" for problem in d.problems)
        _line(f"{_many(errors, 'error')} would stop this run", "bold red")


def _line(text: str, style: str = "") -> None:
    from ldm.logbook import console

    console.print(text, style=style, markup=False, soft_wrap=True)


def _table(header: list[str], rows: Rows) -> None:
    """Print rows indented under a header, after an empty line."""
    from ldm.tables import text_table

    first, *others = text_table(header, [(f"  {row[0]}", *row[1:]) for row in rows], gap="   ")
    _line("")
    _line(first, "bold")
    for line in others:
        _line(line)


def _memory(memory: "Memory", images: str, free: int) -> dict[str, int]:
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "copies of gradients, to exchange them": memory.buckets,
        "Adam's moments": memory.adam,
        "averaged weights": memory.averages,
        "frozen networks": memory.frozen,
        f"activations of {images}, estimated": memory.activations,
        f"stage one encoding {images}, estimated": memory.encoding,
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
        sizes |= {"cached latents": disk.cache, "total": disk.total, "free here": machine.disk}
        return sizes
    sizes |= {"total": disk.run, "free here": machine.disk}
    return sizes | {"cached latents, on another disk": disk.cache, "free there": machine.cache_disk}


def _sizes(title: str, sizes: Mapping[str, int]) -> tuple[list[str], Rows]:
    """A table of bytes, all in the unit that suits their total."""
    unit, length = ("GiB", 2**30) if sizes["total"] >= 2**30 else ("MiB", 2**20)
    return [title, unit], [(name, f"{n / length:,.1f}") for name, n in sizes.items() if n]


def _timing(d: "Diagnosis", timing: "Timing") -> Rows:
    """Speed and duration of each stretch of the run, and of the whole."""
    rows: Rows = []
    adversarial = any(part.name == "discriminator" for part in d.parts)
    for speed in timing.speeds:
        stretch = speed.load
        name = f"{stretch.steps:,} steps at {stretch.resolution}²"
        if adversarial:
            name += f", with{'' if stretch.adversarial_active else 'out'} the discriminator"
        measured = f"{_many(speed.measured_batch, 'image')} of {speed.measured_side}²"
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
        largest = max(timing.speeds, key=lambda s: s.measured_batch * s.measured_side**2)
        size = f"with {_many(largest.measured_batch, 'image')} of {largest.measured_side}²"
        where = "before it ran out" if timing.out_of_memory else size
        notes.append(f"{timing.peak / 2**30:,.2f} GiB of GPU memory at the peak, {where}")
    return rows + [(note,) + ("",) * 3 for note in notes]


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _duration(seconds: float) -> str:
    for unit, length in UNITS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
