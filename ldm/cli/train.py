"""`ldm train-ae`, `ldm train-diffusion`, `ldm ema`, `ldm sample`; `ldm presets`, `ldm show`."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ldm.cli import options
from ldm.errors import UsageError

CHURN = ("S_churn", "S_min", "S_max", "S_noise")

Model = Annotated[
    str | None,
    Argument(
        help="A stage-two ckpt.pt or run folder, or a repository of the Hugging Face Hub "
        "(owner/name). Default: the newest run."
    ),
]
SamplesFolder = Annotated[
    Path | None,
    Option(
        "--out",
        help="Folder. Default: samples/ next to the model; of one on the Hub, in "
        "runs/owner--name/.",
    ),
]
Labels = Annotated[
    str | None,
    Option(
        help="Classes to cycle through: 3, or cat,dog; balanced: all of them. Default: drawn at "
        "random."
    ),
]
Npz = Annotated[
    Path | None,
    Option(
        help="Also write the images to this new .npz, for ADM's evaluator (arr_0, classes arr_1)."
    ),
]
Size = Annotated[
    str | None,
    Option(
        metavar="R|HxW",
        help="Image size in pixels, R for R×R, or HEIGHTxWIDTH. Default: that of the training.",
    ),
]
Schedule = Annotated[
    Literal["karras", "cosine", "linear", "flow"] | None,
    Option(help="Spacing of the noise levels. Default: flow for flow models, else karras."),
]
Shift = Annotated[
    float | None, Option(help="Shift of the schedule flow. Default: the model's own.")
]
GuidedChannels = Annotated[
    int | None, Option(help="Guide the first so many channels only, such as 3. Default: all.")
]
Format = Annotated[
    Literal["png", "zip", "shards"],
    Option("--format", help="PNG files, one zip, or tar shards for training."),
]


def train_ae(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[PRESET] key=value …",
            help="A preset (`ldm presets`), by default finetune with --from and distil-b with "
            "--teacher; then settings.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        Option(
            "--from",
            help="Begin from the weights of this autoencoder: a run, a model file, a diffusers "
            "folder, a CompVis checkpoint, or owner/name on the Hugging Face Hub.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        Option(help="Train a new encoder for the latents and the decoder of this autoencoder."),
    ] = None,
    run: options.RunFolder = None,
) -> None:
    """Train an autoencoder (stage one), fine-tune one, or distil its encoder. The same command
    resumes an interrupted run.

    ldm train-ae litevae-b data.source=data/ffhq256

    ldm train-ae --from my-vae/ data.source=my-images/

    ldm train-ae distil-b --teacher my-vae/ data.source=my-images/
    """
    from pipelines.doctor.timing import flops_per_image
    from pipelines.recipes import load_recipe
    from pipelines.train_autoencoder import train_autoencoder

    words = list(words or [])
    if words and "=" not in words[0]:
        preset = words.pop(0)
    elif source or teacher:
        preset = "distil-b" if teacher else "finetune"
    else:
        raise UsageError(
            "give a preset, such as litevae-b (`ldm presets` lists them), or an autoencoder to "
            "begin from, by --from"
        )
    options.add_setting(words, "--from", "init.source", source)
    options.add_setting(words, "--teacher", "teacher.source", teacher)
    kind, preset = options.find_presets(preset, options.STAGE_ONE)[0]
    recipe = load_recipe(kind, preset, words)
    folder = train_autoencoder(recipe, preset, run, count_flops=flops_per_image)
    options.say(
        f"done: {folder}/ckpt.pt",
        options.next_step("ldm train-diffusion --ae {}", folder / "ckpt.pt"),
    )


def train_diffusion(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[PRESET] key=value …", help="A preset (default: ffhq256), then settings."
        ),
    ] = None,
    ae: options.StageOne = None,
    cache: Annotated[
        Path | None, Option(help="Encode the data once, into this folder. Default: on the fly.")
    ] = None,
    run: options.RunFolder = None,
) -> None:
    """Train a latent diffusion model (stage two) on images that are encoded on the fly.

    The same command resumes an interrupted run.

    ldm train-diffusion --ae runs/x/ckpt.pt
    """
    from pipelines.doctor.timing import flops_per_image
    from pipelines.recipes import find_stage_one, load_recipe
    from pipelines.train_diffusion import train_diffusion

    words = list(words or [])
    preset = words.pop(0) if words and "=" not in words[0] else "ffhq256"
    _, preset = options.find_presets(preset, options.STAGE_TWO)[0]
    options.add_setting(words, "--cache", "cache", cache)
    options.add_setting(words, "--ae", "autoencoder", ae)
    recipe = load_recipe("diffusion", preset, words)
    file = find_stage_one(recipe, preset, run)
    options.say(f"autoencoder: {file}")
    recipe = recipe.model_copy(update={"autoencoder": str(file)})
    folder = train_diffusion(recipe, preset, run, flops_per_image)
    options.say(f"done: {folder}/ckpt.pt", options.next_step("ldm sample {} --n 50000", folder))


def ema(
    std: Annotated[
        float,
        Option(
            help="Width of the average as a fraction of the training, such as 0.07; at most 0.2886."
        ),
    ],
    run: Annotated[
        Path | None, Argument(help="A stage-two run folder. Default: the newest with snapshots.")
    ] = None,
    at: Annotated[
        int | None,
        Option(help="Average up to the snapshot at this many images. Default: the newest."),
    ] = None,
    out: Annotated[
        Path | None, Option(help="The .pt to write. Default: ckpt-ema<STD>.pt in the run folder.")
    ] = None,
) -> None:
    """Compute an EMA of any width after training, from the snapshots of a run (EDM2).

    The run must have been trained with ema_stds, such as ema_stds=[0.05, 0.1].

    ldm ema --std 0.07
    """
    from ldm.ema import synthesize_ema
    from ldm.run_folder import newest_run

    if run is None:
        run = newest_run("diffusion", needs="ema")
        options.say(f"run: {run}")
    path = synthesize_ema(run, std, at, out)
    options.say(f"wrote {path}", options.next_step("ldm sample {}", path))


def sample(
    model: Model = None,
    n: Annotated[int, Option(help="Number of images.")] = 64,
    seed: options.Seed = 0,
    size: Size = None,
    steps: options.Steps = 18,
    sampler: Annotated[
        Literal["heun", "euler", "dpmpp-2m"],
        Option(help="Sampler; heun evaluates the network twice per step."),
    ] = "heun",
    schedule: Schedule = None,
    shift: Shift = None,
    guidance: Annotated[
        float | None,
        Option(help="Guidance scale, classifier-free or with --guide; 1: no guidance."),
    ] = None,
    interval: Annotated[str, Option(help="Noise levels σ to guide in, such as 0.2,3.")] = "0,inf",
    guided_channels: GuidedChannels = None,
    guide: options.Guide = None,
    labels: Labels = None,
    churn: Annotated[
        str, Option(help="EDM's stochastic sampling: S_churn, or S_churn,S_min,S_max,S_noise.")
    ] = "0",
    files: Format = "png",
    npz: Npz = None,
    batch_size: options.BatchSize = 64,
    out: SamplesFolder = None,
    device: options.Device = "auto",
    precision: Annotated[
        options.Precision, Option(help="auto: bf16 where the device supports it.")
    ] = "auto",
) -> None:
    """Generate images. The same command resumes an interrupted one.

    ldm sample --n 50000

    ldm sample --n 50000 --guidance 1.5 --interval 0.2,3 --format zip
    """
    from ldm.run_folder import newest_run
    from pipelines.sample import sample_images

    guided = options.parse_numbers("interval", interval, counts=(2,))
    churned = zip(CHURN, options.parse_numbers("churn", churn, counts=(1, 4)), strict=False)
    if model is None:
        model = str(newest_run("diffusion"))
        options.say(f"model: {model}")
    folder = sample_images(
        model, n, out, seed, size=options.parse_size("size", size),
        labels=labels.split(",") if labels is not None else None, guide=guide, files=files,
        npz=npz, batch_size=batch_size, device=device, precision=precision,
        steps=steps, sampler=sampler, schedule=schedule, shift=shift, guidance=guidance,
        interval=guided, guided_channels=guided_channels, churn=dict(churned),
    )  # fmt: skip
    options.say(
        f"done: {n:,} images in {folder}, an overview in {folder}/grid.png",
        options.next_step("ldm fid {}", folder),
    )


def presets() -> None:
    """List the presets of both stages and of the paper's tables."""
    from rich.table import Table

    from ldm.config import list_presets, preset_summary
    from ldm.logbook import console

    for kind, title in options.KINDS.items():
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name in list_presets(kind):
            table.add_row(name, preset_summary(kind, name))
        console.print(table, "")


def show(
    preset: Annotated[str, Argument(help="A preset, such as litevae-b or diffusion/tiny.")],
    settings: options.Settings = None,
) -> None:
    """Print every setting of a preset with its value and meaning.

    ldm show litevae-b batch_size=32
    """
    from ldm.config import describe, published
    from pipelines.recipes import load_recipe

    found = options.find_presets(preset)
    if len(found) > 1 and settings:
        choices = " or ".join("/".join(one) for one in found)
        raise UsageError(f"'{preset}' is a preset of both stages: use {choices}")
    for kind, name in found:
        config = load_recipe(kind, name, settings or [])
        options.echo(f"# {kind}/{name}", bold=True)
        if paper := published(kind, name):
            numbers = ", ".join(f"{key} {value}" for key, value in paper.items())
            options.echo(f"# the paper: {numbers}", bold=True)
        for line, doc in describe(config):
            options.echo(f"{line:<44}", nl=False)
            options.echo(f" # {doc}" if doc else "", dim=True)
