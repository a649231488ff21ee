"""Which autoencoder a stage-two run means, by a path, a name, or nothing."""

from pathlib import Path

from ldm.config import list_presets
from ldm.run_folder import differences, newest_run, preset_of, read_config, unfinished_runs
from pipelines.training.diffusion_recipe import DiffusionRecipe

PRESETS = ("ae", "recipes")  # the folders of stage one's presets


def find_stage_one(recipe: DiffusionRecipe, preset: str, out: Path | None = None) -> Path:
    """The file or folder of a recipe's autoencoder.

    A path is that; the name of a preset is its newest run; nothing is the newest run of all. Where
    the same command began a run that is not finished, that run goes on with the autoencoder it
    has, whatever has been trained since.

    Args:
        preset: name of the stage-two preset.
        out: folder of the run, where it was given.

    Raises:
        LdmError: no run of that name, or none at all.
    """
    given = Path(recipe.autoencoder).expanduser()
    if recipe.autoencoder and given.exists():
        return _file(given)
    wanted = recipe.autoencoder or None  # the name of a preset, or any
    if wanted and not any(wanted in list_presets(kind) for kind in PRESETS):
        return given  # loading it says what is wrong
    for folder in [out] if out else unfinished_runs("diffusion", preset):
        theirs = (read_config(folder) or {}).get("autoencoder")
        if not isinstance(theirs, str):  # the folder was damaged, or is not ours
            continue
        same = recipe.model_copy(update={"autoencoder": theirs})
        if wanted in (None, preset_of(Path(theirs).parent)) and not differences(folder, same):
            return Path(theirs)
    return _file(newest_run("autoencoder", preset=wanted))


def _file(path: Path) -> Path:
    return path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path
