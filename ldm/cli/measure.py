"""`ldm eval-ae`.

`ldm fid`.

`ldm neighbours`.

`ldm bench`.
"""

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ldm.cli.options import say


def eval_ae(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CKPT …]",
            help="Stage-one ckpt.pt files or run folders, or third-party SD-VAEs; several give a "
            "table. Left out: the newest.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="`photos` (built in), a folder, a zip, or shards. Left out: what each was trained "
            "on."
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val", "all"], typer.Option(help="Which part of the data.")
    ] = "val",
    resolution: Annotated[
        list[str] | None,
        typer.Option(
            help="Side of the images, pixels; several as 128,256. Left out: that at which each "
            "one's training ended."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time, per process.")] = 16,
    limit: Annotated[int | None, typer.Option(help="At most this many images.")] = None,
    fid: Annotated[
        bool,
        typer.Option(
            " /--no-fid", help="Leave out rFID, KID, precision and recall.", show_default=False
        ),
    ] = True,
    weights: Annotated[
        Path | None,
        typer.Option(help="Path of inception-2015-12-05.pt. Left out: the cache, or fetched."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="module:function",
            help="A network of your own, for Inception: function(device) gives a callable of uint8 "
            "images (B, 3, H, W) that gives (B, dim).",
        ),
    ] = None,
    mode: Annotated[
        Literal["clean", "legacy-tensorflow"],
        typer.Option(help="How Inception's images are resized."),
    ] = "clean",
    layout: Annotated[
        Literal["table", "markdown", "latex", "json"],
        typer.Option("--format", help="What is printed; all but table is fit for a pipe."),
    ] = "table",
    out: Annotated[
        Path | None,
        typer.Option(
            help="One JSON for all. Left out: one of each in eval/ beside its checkpoint."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Measure held-out images that were trained on, and rFID over fewer images than "
            "features; both are noted.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Measure autoencoders' reconstructions: rFID, LPIPS, PSNR, SSIM, KID, precision, recall, SWD.

    What needs unavailable weights is left out.

    ldm eval-ae runs/x --data data/ffhq256 --resolution 128,256

    ldm eval-ae runs/x runs/y sd-vae.pt --data data/ffhq256 --resolution 256 --format latex
    """
    from pipelines.evaluate import evaluate_checkpoints
    from pipelines.measuring.evaluation import format_evaluations

    sides = _sides(resolution) if resolution else None
    # what a pipe takes is the table alone
    with nullcontext() if layout == "table" else redirect_stdout(sys.stderr):
        evaluations = evaluate_checkpoints(
            models or (), data, split, sides, batch_size, limit, device, fid, weights, features,
            mode, out, force,
        )  # fmt: skip
    say(format_evaluations(evaluations, layout))
    if layout == "table":
        say(*(f"done: {path}" for path in dict.fromkeys(each.path for each in evaluations)))


def _sides(words: list[str]) -> list[int]:
    """Whole numbers, with commas between them or each given by itself.

    Raises:
        UsageError: a word is none.
    """
    from ldm.errors import UsageError

    given = ",".join(words)
    try:
        return [int(word) for word in given.split(",")]
    except ValueError:
        raise UsageError(
            f"--resolution {given}: it must be a whole number, or several with commas between"
        ) from None


def fid(
    samples: Annotated[
        Path | None,
        typer.Argument(
            help="A folder of images, as `ldm sample` writes it, a zip or shards. Left out: the "
            "newest."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="`photos` (built in), a folder, a zip, or shards. Left out: the run's own."
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val", "all"] | None,
        typer.Option(help="Which part of the data. Left out: all, as papers on FFHQ do."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Statistics in place of data: clean-fid's ffhq256 or ffhq1024 (70,000 images), "
            "or a .npz of those kept in $LDM_CACHE/statistics (~/.cache/ldm/statistics); no SWD."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="A stage-two ckpt.pt or run folder, to sample from without writing images."
        ),
    ] = None,
    n: Annotated[
        int | None, typer.Option(help="How many images of the model. Left out: 50,000.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the model's images. Left out: 0.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the sampler, as in `ldm sample`.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of the model's guidance, as in `ldm sample`.")
    ] = None,
    weaker: Annotated[
        Path | None, typer.Option(help="A model to be guided away from, as in `ldm sample`.")
    ] = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"] | None,
        typer.Option(help="Of the model, as in `ldm sample`."),
    ] = None,
    mode: Annotated[
        Literal["clean", "legacy-tensorflow"],
        typer.Option(help="How Inception's images are resized: as today, or as the first FIDs."),
    ] = "clean",
    features: Annotated[
        str | None,
        typer.Option(
            metavar="module:function",
            help="A network of your own, for Inception: function(device) gives a callable of uint8 "
            "images (B, 3, H, W) that gives (B, dim).",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Path of inception-2015-12-05.pt. Left out: the cache, or fetched."),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option(help="Draws of a 95 % interval about FID, such as 100; on one process.")
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Measure what there are doubts about, and note them.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    limit: Annotated[
        int | None,
        typer.Option(help="At most this many samples, and this many images of the data."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File of the result. Left out: fid.json by the samples, named after all that is "
            "not as by default, as fid-photos-val.json."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Measure samples against data: FID, KID, precision, recall, and SWD (needs no weights).

    ldm fid runs/x/samples/seed0-steps18 --data data/ffhq256

    ldm fid --model runs/x --n 50000 --reference ffhq256 --bootstrap 100
    """
    from pipelines.fid import fid_of_samples

    sampling = {
        "n": n, "seed": seed, "steps": steps, "guidance": guidance, "weaker": weaker,
        "precision": precision,
    }  # fmt: skip
    result = fid_of_samples(
        samples, data, split, weights, device, batch_size, limit, model=model, reference=reference,
        sampling={name: value for name, value in sampling.items() if value is not None},
        mode=mode, features=features, bootstrap=bootstrap, force=force, out=out,
    )  # fmt: skip
    say(*_lines(result))


def _lines(result: dict[str, Any]) -> list[str]:
    """Each number, and what it is of."""
    ours, theirs = result["samples"]["count"], result["reference"]["count"]
    fid, interval = f"{result['fid']:.3f}", result["fid_interval"]
    if interval is not None:
        ends = f"{interval['low']:.3f} to {interval['high']:.3f}"
        fid += f"  (95 %: {ends}, {interval['draws']} bootstrap draws)"
    rows = [("FID", f"{fid}  all {ours:,} samples, all {theirs:,} images")]
    if result["kid"] is not None:
        kid, std = 1e3 * result["kid"], 1e3 * result["kid_std"]
        rows += [
            ("KID ×10³", f"{kid:.3f} ± {std:.3f}"),
            ("precision", f"{result['precision']:.3f}"),
            ("recall", f"{result['recall']:.3f}"),
        ]
    if result["swd"] is not None:
        rows.append(("SWD ×10³", f"{result['swd']['mean']:.3f}  {result['swd_images']:,} of each"))
    kept = result["reference"].get("statistics")
    rows += [
        ("samples", result["samples"]["what"]),
        ("reference", result["reference"]["what"]),
        ("features", result["extractor"]["name"]),
        *([("statistics", kept)] if kept else []),
        ("written", result["written"]),
    ]
    return [f"{name:<10} {value}" for name, value in rows]


def neighbours(
    samples: Annotated[
        Path | None,
        typer.Argument(help="A folder of images, as `ldm sample` writes it. Left out: the newest."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="`photos` (built in), a folder, a zip, or shards. Left out: what was learnt from."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="How many samples, the first ones.")] = 8,
    nearest: Annotated[int, typer.Option(help="How many training images for each.")] = 5,
    space: Annotated[
        Literal["latents", "pixels"],
        typer.Option(help="Distances between latents (needs the model), or 64×64 pixels."),
    ] = "latents",
    model: Annotated[
        Path | None, typer.Option(help="The samples' model. Left out: as the samples say.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Show the training images nearest to samples: has the model learnt them by heart?

    ldm neighbours runs/x/samples/seed0-steps18
    """
    from pipelines.neighbours import find_neighbours

    result = find_neighbours(samples, data, count, nearest, space, model, batch_size, device)
    ours, theirs = result["median_nearest"]["samples"], result["median_nearest"]["held_out"]
    compared = "" if theirs is None else f"; held-out images': {theirs:.3f}"
    typer.echo(f"samples' nearest training image, median: {ours:.3f} {result['unit']}{compared}")
    typer.echo(f"done: {result['folder']}/neighbours.png, neighbours.json")


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
    from pipelines.bench import ENCODERS, PAPERS, SOURCE, bench_encoders

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
