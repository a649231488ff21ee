"""`ldm presets` and `ldm show`: what there is to train, and every setting of it."""

from typing import Annotated

import typer

KINDS = {"ae": "stage one: autoencoders", "diffusion": "stage two: diffusion models"}


def presets() -> None:
    """List the presets of both stages."""
    from rich.table import Table

    from ldm.config import list_presets, preset_summary
    from ldm.logbook import console

    for kind, title in KINDS.items():
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name in list_presets(kind):
            table.add_row(name, preset_summary(kind, name))
        console.print(table, "")


def show(
    preset: Annotated[str, typer.Argument(help="A preset, such as litevae-b or diffusion/tiny.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="key=value …")] = None,
) -> None:
    """Print the resolved settings of a preset, each with what it means."""
    from ldm.config import describe, did_you_mean, list_presets, load_preset, resolve
    from ldm.errors import UsageError
    from ldm.logbook import console

    kind, slash, name = preset.rpartition("/")
    kinds = [kind] if slash else [kind for kind in KINDS if preset in list_presets(kind)]
    if not kinds or kinds[0] not in KINDS:
        known = [name for kind in KINDS for name in list_presets(kind)]
        raise UsageError(f"no preset '{preset}'{did_you_mean(preset, known)}")
    if len(kinds) > 1 and settings:
        choices = " or ".join(f"{kind}/{name}" for kind in kinds)
        raise UsageError(f"'{preset}' is a preset of both stages: say {choices}")
    for kind in kinds:
        config = resolve(_recipe_class(kind), load_preset(kind, name), settings or [])
        console.print(f"# {kind}/{name}", style="bold", markup=False)
        for line, doc in describe(config):
            console.print(f"{line:<44}", end="", markup=False)
            console.print(f" # {doc}" if doc else "", style="dim", markup=False)


def _recipe_class(kind: str) -> type:
    if kind == "ae":
        from pipelines.train_autoencoder import AutoencoderRecipe

        return AutoencoderRecipe
    from pipelines.train_diffusion import DiffusionRecipe

    return DiffusionRecipe
