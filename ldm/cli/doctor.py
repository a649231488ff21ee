"""`ldm doctor`: what a preset needs, what is missing, and how long it would take here."""

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.options import COMMAND, STAGE_ONE, STAGE_TWO, find_preset, find_presets
from ldm.cli.train import Settings

if TYPE_CHECKING:
    from pipelines.doctor.doctor import Diagnosis

Rows = list[tuple[str, ...]]
COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


def doctor(
    preset: Annotated[str, typer.Argument(help="A preset, such as litevae-b or diffusion/tiny.")],
    settings: Settings = None,
    ae: Annotated[
        str | None,
        typer.Option(
            help="Stage two: its stage one, as for train-diffusion: a ckpt.pt, a run folder, or a "
            "preset. Left out: the newest run."
        ),
    ] = None,
    trial: Annotated[
        bool, typer.Option(help="Time some training steps here, for up to half a minute.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    processes: Annotated[
        int, typer.Option(min=1, help="How many processes would train together, a GPU each.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Say what training a preset needs, what is missing, and how long it takes here.

    Nothing is written or downloaded. The exit status is 1 if the run would stop.

    ldm doctor ffhq256 --ae runs/x/ckpt.pt
    """
    from ldm.config import load_preset, resolve
    from ldm.errors import UsageError

    found = find_presets(preset)
    kind, name = find_preset(preset, STAGE_TWO) if ae is not None else found[0]
    words = list(settings or [])
    if device != "auto":
        words.append(f"run.device={device}")
    if ae is not None:
        if any(word.partition("=")[0].strip() == "autoencoder" for word in words):
            raise UsageError("the autoencoder is given twice: --ae and autoencoder= are the same")
        words.append(f"autoencoder={json.dumps(ae)}")
    how = {"processes": processes} | ({} if trial else {"seconds": 0})
    if kind in STAGE_ONE:
        from pipelines.doctor.doctor import diagnose_autoencoder
        from pipelines.recipes import AutoencoderRecipe

        recipe = resolve(AutoencoderRecipe, load_preset(kind, name), words)
        diagnosis = diagnose_autoencoder(recipe, name, **how)
    else:
        from pipelines.doctor.doctor import diagnose_diffusion
        from pipelines.recipes import DiffusionRecipe

        recipe = resolve(DiffusionRecipe, load_preset(kind, name), words)
        diagnosis = diagnose_diffusion(recipe, name, **how)

    if as_json:
        typer.echo(json.dumps(asdict(diagnosis) | {"ready": diagnosis.ready}, ensure_ascii=False))
    else:
        for other in found:
            if other != (kind, name):
                typer.echo(f"(there is {'/'.join(other)}, too: ldm doctor {'/'.join(other)})")
        command = shlex.join(["ldm", COMMAND[kind], name, *words])
        _print(diagnosis, f"{kind}/{name}", command)
    raise typer.Exit(0 if diagnosis.ready else 1)


# ----------------------------------------------------------------------------------- report
def _print(d: "Diagnosis", preset: str, command: str) -> None:
    """The report: what it is, what it takes, what is wrong, and what to do next."""
    from ldm.logbook import console

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False)

    length, machine = d.length, d.machine
    line(f"{preset} on {machine.device} ({machine.name}), {machine.precision}", "bold")
    if d.autoencoder is not None:
        line(f"  stage one  {d.autoencoder}")
    there = "not there" if length.data is None else f"{length.data:,} images to train on"
    line(f"  data       {d.source}: {there}")
    epochs = f", {length.images / length.data:,.1f} epochs" if length.data else ""
    line(f"  length     {length.steps:,} steps, {length.images:,} images{epochs}")
    batch = f"{length.batch_size}"
    if length.batch_size == length.processes * length.accumulate * length.each:
        parts = [
            _many(length.processes, "process", "processes"),
            _many(length.accumulate, "micro-batch", "micro-batches"),
            _many(length.each, "image"),
        ]
        batch += f" = {' × '.join(parts)}"
    line(f"  batch      {batch}")

    if d.memory is not None:
        _print_costs(d)

    console.print()
    for problem in sorted(d.problems, key=lambda problem: list(COLOURS).index(problem.level)):
        line(f"{problem.level}: {problem.text}", COLOURS[problem.level])
    stopping = sum(problem.level == "error" for problem in d.problems)
    if stopping:
        line(f"{_many(stopping, 'error')} would stop this run", "bold red")
    else:
        line(f"ready: {command}", "bold green")


def _print_costs(d: "Diagnosis") -> None:
    """What it takes, table by table."""
    sides = list(d.step_gmac)
    rows = [(p.name, f"{p.parameters:,}", *(f"{p.gmac[s]:,.2f}" for s in sides)) for p in d.parts]
    whole = [f"{d.step_gmac[side]:,.2f}" for side in sides]
    rows.append(("a training step, forward and backward", "", *whole))
    _table(["networks", "parameters", *(f"GMAC an image of {s}²" for s in sides)], rows)
    _table(*_sizes("memory of a process", _memory(d)))
    _table(*_sizes("disk", _disk(d)))
    if d.trial is not None:
        _table(["trial", "measured on", "images/s", "takes"], _trial(d))


def _table(header: list[str], rows: Rows) -> None:
    """Rows under a header, numbers to the right; never cut, however narrow the terminal."""
    from ldm.logbook import console

    rows = [tuple(header), *((f"  {row[0]}", *row[1:]) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    console.print()
    for number, (name, *cells) in enumerate(rows):
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        text = "   ".join([name.ljust(widths[0]), *numbers]).rstrip()
        console.print(text, style="" if number else "bold", markup=False)


def _memory(d: "Diagnosis") -> dict[str, int]:
    """What takes how many bytes of it, in the end what is free."""
    memory, images = d.memory, _many(d.length.each, "image")
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "gradients on their way to other processes": memory.buckets,
        "Adam's moments": memory.adam,
        "averaged weights": memory.averages,
        "networks that are not trained": memory.frozen,
        f"activations of {images}, estimated": memory.activations,
        f"stage one encoding {images}, estimated": memory.encoding,
        "together": memory.total,
        "free here": d.machine.memory,
    }


def _disk(d: "Diagnosis") -> dict[str, int]:
    """What takes how many bytes of it, in the end what is free."""
    disk, apart = d.disk, d.machine.cache_disk
    sizes = {
        "states to resume from": disk.states,
        "models": disk.models,
        "snapshots of averages": disk.snapshots,
        "besides, while files are replaced": disk.writing,
    }
    if apart is None:
        return sizes | {
            "cached latents": disk.cache, "together": disk.total, "free here": d.machine.disk
        }  # fmt: skip
    return sizes | {
        "together": disk.run,
        "free here": d.machine.disk,
        "cached latents, on another disk": disk.cache,
        "free there": apart,
    }


def _sizes(title: str, sizes: dict[str, int]) -> tuple[list[str], Rows]:
    """A table of bytes, all in the unit that suits their sum."""
    unit, length = ("GiB", 2**30) if sizes["together"] >= 2**30 else ("MiB", 2**20)
    rows: Rows = [(name, f"{size / length:,.1f}") for name, size in sizes.items() if size]
    return [title, unit], rows


def _trial(d: "Diagnosis") -> Rows:
    """How fast each stretch of the run goes, and how long it takes."""
    rows = []
    for speed in d.trial.speeds:
        load, name = speed.load, f"{speed.load.steps:,} steps at {speed.load.resolution}²"
        if d.stage == "autoencoder" and any(part.name == "discriminator" for part in d.parts):
            name += (
                ", with the discriminator"
                if load.adversarial_active
                else ", without the discriminator"
            )
        measured = f"{_many(speed.measured_batch, 'image')} of {speed.measured_side}²"
        if scaled := speed.measured_side != load.resolution:
            measured += ", scaled"  # small images keep a device less busy: it may be quicker
        rate = f"{'over ' * scaled}{speed.images_per_second:,.3g}"
        rows.append((name, measured, rate, f"{'under ' * scaled}{_duration(speed.seconds)}"))
    whole = "to the end, but for loading images and validating"
    rows.append((whole, "", "", _duration(d.trial.seconds)))
    if (processes := d.length.processes) > 1:
        rows.append((f"as if {processes} processes never waited for each other", "", "", ""))
    if d.machine.compiles:
        told = "tried without run.compile, which has slow first steps and then quicker ones"
        rows.append((told, "", "", ""))
    if d.trial.peak is not None:
        largest = max(d.trial.speeds, key=lambda s: s.measured_batch * s.measured_side**2)
        of = f"with {_many(largest.measured_batch, 'image')} of {largest.measured_side}²"
        if d.trial.out_of_memory:
            of = "before there was no more"
        told = f"{d.trial.peak / 2**30:,.2f} GiB of GPU memory at the peak, {of}"
        rows.append((told, "", "", ""))
    return rows


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"
