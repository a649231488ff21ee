"""Lines for the person at the prompt, once however many processes were launched.

Presets as people name them: `litevae-b`, `t10-patchgan`, or with the kind, `diffusion/tiny`.
"""

import os

import typer


def say(*lines: str) -> None:
    """Print lines on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            typer.echo(line)


KINDS = {
    "ae": "stage one: autoencoders",
    "recipes": "stage one: rows of the paper's tables, and what they stand on",
    "diffusion": "stage two: diffusion models",
}
STAGE_ONE, STAGE_TWO = ("ae", "recipes"), ("diffusion",)
COMMAND = {"ae": "train-ae", "recipes": "train-ae", "diffusion": "train-diffusion"}


def find_presets(name: str) -> list[tuple[str, str]]:
    """Every (kind, name) a name may mean.

    Raises:
        UsageError: there is none; the nearest name.
    """
    from ldm.config import did_you_mean, list_presets
    from ldm.errors import UsageError

    kind, _, bare = name.rpartition("/")
    found = [(k, bare) for k in KINDS if kind in ("", k) and bare in list_presets(k)]
    if not found:
        known = [preset for k in KINDS if kind in ("", k) for preset in list_presets(k)]
        raise UsageError(f"no preset '{name}'{did_you_mean(bare, known)} (see `ldm presets`)")
    return found


def find_preset(name: str, kinds: tuple[str, ...]) -> tuple[str, str]:
    """The (kind, name) of one stage that a name means.

    Raises:
        UsageError: there is none; the nearest name, or the command that trains it.
    """
    from ldm.errors import UsageError

    found = find_presets(name)
    fitting = [(kind, bare) for kind, bare in found if kind in kinds]
    if not fitting:
        kind, bare = found[0]
        raise UsageError(f"'{name}' belongs to the other stage: `ldm {COMMAND[kind]} {bare}`")
    return fitting[0]
