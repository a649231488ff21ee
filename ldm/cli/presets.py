"""`ldm presets` and `ldm show`: what there is to train, and every setting of it."""

from typing import Annotated

import typer

from ldm.cli.names import KINDS, STAGE_ONE, find_presets


def presets() -> None:
    """List the presets of both stages, and of the paper's tables."""
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
    from ldm.config import describe, load_preset, published, resolve
    from ldm.errors import UsageError
    from ldm.logbook import console

    found = find_presets(preset)
    if len(found) > 1 and settings:
        choices = " or ".join("/".join(one) for one in found)
        raise UsageError(f"'{preset}' is a preset of both stages: say {choices}")
    for kind, name in found:
        config = resolve(_recipe_class(kind), load_preset(kind, name), settings or [])
        console.print(f"# {kind}/{name}", style="bold", markup=False)
        if paper := published(kind, name):
            numbers = ", ".join(f"{key} {value}" for key, value in paper.items())
            console.print(f"# the paper: {numbers}", style="bold", markup=False)
        for line, doc in describe(config):
            console.print(f"{line:<44}", end="", markup=False)
            console.print(f" # {doc}" if doc else "", style="dim", markup=False)


def _recipe_class(kind: str) -> type:
    if kind in STAGE_ONE:
        from pipelines.training.autoencoder_recipe import AutoencoderRecipe

        return AutoencoderRecipe
    from pipelines.training.diffusion_recipe import DiffusionRecipe

    return DiffusionRecipe
