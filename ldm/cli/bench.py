"""`ldm bench`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def bench(
    encoders: Annotated[
        list[str] | None,
        typer.Argument(help="Presets of stage one. Left out: SD-VAE and LiteVAE S, B, M, L."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch size whose peak memory is told.")] = 32,
    timed: Annotated[
        int | None,
        typer.Option(help="Images in a batch that is timed. Left out: --batch; 2 on a CPU."),
    ] = None,
    resolution: Annotated[int, typer.Option(help="Side of the images, pixels.")] = 256,
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs of each encoder. Left out: 20; 3 on a CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="bf16 is autocast, as in training.")
    ] = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write bench.json and bench.md to.")
    ] = None,
) -> None:
    """Measure what encoding costs here, beside the paper's Table 3.

    Parameters, multiply-accumulates, peak memory, and speed, of encoders that take turns.

    ldm bench litevae-b sdvae --out results
    """
    from rich.table import Table

    from ldm.logbook import console
    from pipelines.bench import ENCODERS, SOURCE
    from pipelines.bench_table import PAPERS, bench_encoders

    result = bench_encoders(
        encoders or ENCODERS, resolution, batch, device, repeats, timed, precision, out
    )
    for title, header, rows in result.tables():
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for number, name in enumerate(header):
            # what the paper says stands back
            style = "dim" if name.startswith(PAPERS) else ""
            # whose on a line of its own: side by side they would not fit into 80 columns
            title = name.replace(f"{PAPERS} ", f"{PAPERS}\n") if style else f"\n{name}"
            table.add_column(title, justify="right" if number else "left", style=style)
        for row in rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print(f"\nmemory {result.facts['memory']}", markup=False)
    console.print(f"speed  {result.facts['speed']}, {precision}", markup=False)
    console.print(f"paper  {SOURCE}", markup=False)
    if "note" in result.facts:
        console.print(f"note   {result.facts['note']}", markup=False)
    if out is not None:
        typer.echo(f"wrote {out}/bench.md and bench.json")
