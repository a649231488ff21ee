"""`ldm eval-ae`, `ldm fid`, `ldm neighbours`, `ldm bench`."""

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from ldm.cli import options

if TYPE_CHECKING:
    from pipelines.bench import Bench

Samples = Annotated[
    Path | None,
    Argument(help="Images: a folder of `ldm sample`, a zip or shards. Default: the newest."),
]
Reference = Annotated[
    str | None,
    Option(
        help="Compare with this instead of data: clean-fid's statistics ffhq256 or ffhq1024 "
        "(70,000 images), a .npz from $LDM_CACHE/statistics (~/.cache/ldm/statistics), or ADM's "
        "reference batch (.npz), which adds sFID and IS."
    ),
]
Metrics = Annotated[
    str | None,
    Option(
        metavar="fid,kid,…",
        help="Metrics: fid, sfid, is, kid, precision, recall, swd, fd-dinov2. Default: fid, kid, "
        "precision, recall, swd; with ADM's reference batch sfid and is, too.",
    ),
]
InceptionResize = Annotated[
    Literal["clean", "legacy-tensorflow"] | None,
    Option(
        help="Resizing before Inception: clean-fid's, or the original FID code's. Default: clean; "
        "with ADM's reference batch legacy-tensorflow."
    ),
]
Guidance = Annotated[float | None, Option(help="With --model: guidance scale, as in `ldm sample`.")]
Size = Annotated[
    str | None, Option(metavar="R|HxW", help="With --model: image size, as in `ldm sample`.")
]
Precision = Annotated[
    options.Precision | None, Option(help="With --model: precision, as in `ldm sample`.")
]
Model = Annotated[
    str | None,
    Option(
        help="Sample from this stage-two ckpt.pt, run folder or repository of the Hugging Face "
        "Hub, without writing images."
    ),
]
Labels = Annotated[str | None, Option(help="With --model: classes, as in `ldm sample`.")]
Limit = Annotated[
    int | None,
    Option(
        help="Use at most this many samples and images of the data; an ADM batch is used whole."
    ),
]
ResultFile = Annotated[
    Path | None,
    Option(
        help="Result file. Default: fid.json next to the samples, or with the options that are "
        "not at their default, such as fid-photos-val.json."
    ),
]


def eval_ae(
    models: Annotated[
        list[Path] | None,
        Argument(
            metavar="[CKPT …]",
            help="Stage-one ckpt.pt files, run folders or pretrained autoencoders, a table row "
            "each. Default: the newest run.",
        ),
    ] = None,
    data: options.Data = None,
    split: options.Split = "val",
    resolution: Annotated[
        list[str] | None,
        Option(help="Sizes in pixels, such as 128,256 or 96x64. Default: as in training."),
    ] = None,
    batch_size: options.BatchSize = 16,
    limit: options.Limit = None,
    fid: Annotated[
        bool, Option(" /--no-fid", help="Skip rFID, KID, precision and recall.", show_default=False)
    ] = True,
    weights: options.InceptionWeights = None,
    features: options.Features = None,
    mode: options.Resize = "clean",
    layout: Annotated[
        Literal["table", "markdown", "latex", "json"],
        Option("--format", help="Output format; all but table print nothing else."),
    ] = "table",
    out: Annotated[
        Path | None,
        Option(help="One JSON file for all. Default: one each, in eval/ next to the model."),
    ] = None,
    force: options.Force = False,
    device: options.Device = "auto",
) -> None:
    """Measure reconstructions: rFID, LPIPS, PSNR, SSIM, KID, precision, recall, SWD.

    Metrics whose weights are unavailable are skipped and reported as missing.

    ldm eval-ae runs/x --data data/ffhq256 --resolution 128,256

    ldm eval-ae runs/x runs/y sd-vae.pt --data data/ffhq256 --resolution 256 --format latex
    """
    from pipelines.evaluate import evaluate_checkpoints
    from pipelines.measuring.evaluation import format_evaluations

    words = [word for each in resolution or () for word in each.split(",")]
    sizes = [options.parse_size("resolution", word) or 0 for word in words]
    # a pipe gets the table alone, progress goes to stderr
    with nullcontext() if layout == "table" else redirect_stdout(sys.stderr):
        evaluations = evaluate_checkpoints(
            models or (), data, split, sizes or None, batch_size, limit=limit, device=device,
            fid=fid, weights=weights, features=features, mode=mode, out=out, force=force,
        )  # fmt: skip
    options.say(format_evaluations(evaluations, layout))
    if layout == "table":
        options.say(*(f"done: {path}" for path in dict.fromkeys(each.path for each in evaluations)))


def fid(
    samples: Samples = None,
    data: options.Data = None,
    split: Annotated[
        Literal["train", "val", "all"] | None,
        Option(help="Part of the data to compare with. Default: all, as in papers."),
    ] = None,
    reference: Reference = None,
    model: Model = None,
    n: Annotated[int | None, Option(help="With --model: images. Default: 50,000.")] = None,
    seed: Annotated[int | None, Option(help="With --model: seed. Default: 0.")] = None,
    steps: Annotated[int | None, Option(help="With --model: sampling steps. Default: 18.")] = None,
    guidance: Guidance = None,
    guide: options.Guide = None,
    size: Size = None,
    precision: Precision = None,
    labels: Labels = None,
    metrics: Metrics = None,
    mode: InceptionResize = None,
    features: options.Features = None,
    weights: options.InceptionWeights = None,
    bootstrap: Annotated[
        int, Option(help="Resamplings for a 95 % interval of FID, such as 100; one process.")
    ] = 0,
    force: Annotated[
        bool, Option("--force", help="Compare despite warnings; they are stored with the result.")
    ] = False,
    batch_size: options.BatchSize = 64,
    limit: Limit = None,
    out: ResultFile = None,
    device: options.Device = "auto",
) -> None:
    """Compare samples with data: FID, KID, precision, recall, and SWD (which needs no weights).

    On request sFID, the Inception Score and FD-DINOv2.

    ldm fid runs/x/samples/seed0-steps18 --data data/ffhq256

    ldm fid --model runs/x --n 50000 --reference ffhq256 --bootstrap 100

    ldm fid --model runs/x --n 50000 --reference VIRTUAL_imagenet256_labeled.npz
    """
    from pipelines.fid import measure_fid

    sampling = {
        "n": n, "seed": seed, "steps": steps, "guidance": guidance, "guide": guide,
        "size": options.parse_size("size", size), "precision": precision,
        "labels": labels.split(",") if labels is not None else None,
    }  # fmt: skip
    result = measure_fid(
        samples, data, split, model=model, reference=reference, weights=weights, device=device,
        batch_size=batch_size, limit=limit,
        sampling={name: value for name, value in sampling.items() if value is not None},
        mode=mode, features=features, bootstrap=bootstrap, force=force, out=out,
        metrics=None if metrics is None else tuple(map(str.strip, metrics.split(","))),
    )  # fmt: skip
    options.say(*_fid_lines(result))


def _fid_lines(result: dict[str, Any]) -> list[str]:
    def shown(name: str, digits: int = 3, scale: float = 1) -> str | None:
        return None if result[name] is None else f"{scale * result[name]:.{digits}f}"

    ours, theirs = result["samples"], result["reference"]
    given = theirs.get("given", ())
    images = {
        name: f"  all {ours['count']:,} samples, "
        + ("the file's statistics" if name in given else f"all {theirs['count']:,} images")
        for name in ("fid", "sfid", "fd_dinov2")
    }
    interval, labels, swd = result["fid_interval"], ours["labels"], result["swd"]
    if interval is not None:
        ends = f"{interval['low']:.3f} to {interval['high']:.3f}"
        images["fid"] = f"  (95 %: {ends}, {interval['draws']} bootstrap draws){images['fid']}"
    networks = [result["extractor"], result["extractors"].get("fd_dinov2")]
    rows = {
        "FID": (fid := shown("fid")) and fid + images["fid"],
        "sFID": (sfid := shown("sfid")) and sfid + images["sfid"],
        "IS": shown("is", 2),
        "FD-DINOv2": (fd := shown("fd_dinov2")) and fd + images["fd_dinov2"],
        "KID ×10³": (kid := shown("kid", 3, 1e3)) and f"{kid} ± {1e3 * result['kid_std']:.3f}",
        "precision": shown("precision"),
        "recall": shown("recall"),
        "SWD ×10³": swd is not None and f"{swd['mean']:.3f}  {result['swd_images']:,} of each",
        "samples": ours["what"],
        "labels": labels
        and f"{labels['classes']:,} classes, {_many(labels['images'])} images each",
        "reference": theirs["what"],
        "features": "; ".join(each["name"] for each in networks if each),
        "statistics": theirs.get("statistics"),
        "written": result["written"],
    }
    return [f"{name:<10} {value}" for name, value in rows.items() if value]


def _many(counts: list[int]) -> str:
    return " to ".join(f"{count:,}" for count in dict.fromkeys(counts))


def neighbours(
    samples: Samples = None,
    data: options.Data = None,
    count: Annotated[int, Option(help="Number of samples to look up, the first ones.")] = 8,
    nearest: Annotated[int, Option(help="Neighbours to show for each sample.")] = 5,
    space: Annotated[
        Literal["latents", "pixels"],
        Option(help="Compare latents (needs the model) or 64×64 pixels."),
    ] = "latents",
    model: Annotated[
        Path | None, Option(help="Model of the samples. Default: as recorded.")
    ] = None,
    batch_size: options.BatchSize = 64,
    device: options.Device = "auto",
) -> None:
    """Find the training images nearest to samples, to see whether a model memorizes its data.

    ldm neighbours runs/x/samples/seed0-steps18
    """
    from pipelines.neighbours import find_neighbours

    result = find_neighbours(samples, data, count, nearest, space, model, batch_size, device)
    ours, theirs = result["median_nearest"]["samples"], result["median_nearest"]["held_out"]
    line = f"median distance to the nearest training image, {result['unit']}: samples {ours:.3f}"
    options.echo(line + ("" if theirs is None else f", held-out images {theirs:.3f}"))
    options.echo(f"done: {result['folder']}/neighbours.png, neighbours.json")


def bench(
    encoders: Annotated[
        list[str] | None,
        Argument(
            help="Stage-one presets, or files and folders of autoencoders, of which only the sizes "
            "are used. Default: SD-VAE, LiteVAE S, B, M, L."
        ),
    ] = None,
    batch: Annotated[int, Option(help="Batch size for the peak memory.")] = 32,
    timed: Annotated[
        int | None, Option(help="Batch size for the speed. Default: --batch; 2 on a CPU.")
    ] = None,
    resolution: Annotated[int, Option(help="Image size in pixels.")] = 256,
    repeats: Annotated[int | None, Option(help="Timed runs each. Default: 20; 3 on a CPU.")] = None,
    device: options.Device = "auto",
    precision: Annotated[
        Literal["fp32", "bf16"], Option(help="bf16 is autocast, as in training.")
    ] = "fp32",
    out: Annotated[Path | None, Option(help="Folder to write bench.json and bench.md to.")] = None,
) -> None:
    """Measure the cost of encoders on this machine, next to the paper's Table 3.

    Parameters, multiply-accumulates, peak memory and speed; encoders are timed alternately.

    ldm bench litevae-b sdvae --out results
    """
    from pipelines.bench import ENCODERS, bench_encoders

    result = bench_encoders(
        encoders or ENCODERS, resolution, batch, device, repeats, timed, precision, out
    )
    _print_bench(result, precision)
    if out is not None:
        options.echo(f"wrote {out}/bench.md and bench.json")


def _print_bench(result: "Bench", precision: str) -> None:
    from rich.table import Table

    from ldm.logbook import console
    from pipelines.bench import PAPERS, SOURCE

    for title, header, rows in result.tables():
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for number, name in enumerate(header):
            style = "dim" if name.startswith(PAPERS) else ""
            # two lines, for the columns would not fit into 80 characters side by side
            title = name.replace(f"{PAPERS} ", f"{PAPERS}\n") if style else f"\n{name}"
            table.add_column(title, justify="right" if number else "left", style=style)
        for row in rows:
            table.add_row(*row)
        console.print("", table, sep="\n")
    options.echo(f"\nmemory {result.facts['memory']}")
    options.echo(f"speed  {result.facts['speed']}, {precision}")
    options.echo(f"paper  {SOURCE}")
    if "note" in result.facts:
        options.echo(f"note   {result.facts['note']}")
