"""`ldm fid`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ldm.cli.say import say


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
