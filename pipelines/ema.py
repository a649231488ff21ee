"""A run's model with its weights averaged over another stretch of the training, made afterwards."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import load_model, save_model, shown
from ldm.errors import LdmError, UsageError
from ldm.posthoc_ema import combine, fit_snapshots, list_snapshots


def synthesize_ema(run: Path, std: float, at: int | None = None, out: Path | None = None) -> Path:
    """Write a run's `ckpt.pt` with the power-function average of any width in it.

    All but the weights is that of `ckpt.pt`; its provenance says how the weights were averaged:
    `ema_std`, `ema_images` and `ema_residual` (see `ldm.posthoc_ema.Fit`).

    Args:
        run: the folder of a stage-two run that kept snapshots (`ema_stds`).
        std: width of the average, as a share of the images seen, in (0, 0.2886].
        at: images seen, as of a snapshot; the newest if left out.
        out: the `.pt` to write, which must not be there yet. Left out: `ckpt-ema<std>.pt` in the
            run's folder, with `-<at>` where that is given; one made before is replaced.

    Returns:
        The `.pt`; its `.safetensors` twin is beside it.

    Raises:
        UsageError: no average has that width, or `out` is no `.pt`.
        LdmError: no such run, no snapshots in it, none at `at`, snapshots that cannot express the
            average, that are damaged or of another network, or `out` is there already.
    """
    out = _target(run, std, at, out)
    if not run.is_dir():
        raise LdmError(f"no run folder at {run}")
    fit = fit_snapshots(list_snapshots(run / "ema"), std, at)
    file = load_model(run, "diffusion")
    print(
        f"{run / 'ema'}: average of std {std} at {fit.images_seen:,} images, from "
        f"{len(fit.snapshots)} snapshots, exact to {fit.residual:.1%}"
    )
    weights = combine(fit)
    _check_same_network(weights, file.weights, run)
    weights = {name: weights[name].to(tensor.dtype) for name, tensor in file.weights.items()}
    told = {"ema_std": std, "ema_images": fit.images_seen, "ema_residual": fit.residual}
    save_model(out, replace(file, weights=weights, provenance=file.provenance | told))
    return out


def _target(run: Path, std: float, at: int | None, out: Path | None) -> Path:
    if out is None:
        return run / (f"ckpt-ema{std}.pt" if at is None else f"ckpt-ema{std}-{at}.pt")
    if out.suffix != ".pt":
        raise UsageError(f"{out}: the file to write must end in .pt, such as {out.stem}.pt")
    for path in (out, out.with_suffix(".safetensors")):
        if path.exists():
            raise LdmError(f"{path} is there already: give --out another name")
    return out


def _check_same_network(ours: dict[str, Tensor], theirs: dict[str, Tensor], run: Path) -> None:
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise LdmError(
                f"the snapshots in {run / 'ema'} are not of the network in {run / 'ckpt.pt'}: "
                f"tensor {shown(name)} differs"
            )
