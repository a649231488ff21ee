"""Post-hoc EMA: a run's model with a power-function average of any width."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import load_model, save_model, shown
from ldm.errors import LdmError, UsageError
from ldm.posthoc_ema import combine, fit_snapshots, list_snapshots


def synthesize_ema(run: Path, std: float, at: int | None = None, out: Path | None = None) -> Path:
    """Write a copy of a run's `ckpt.pt` whose weights are a power-function average.

    Its provenance states the average: `ema_std`, `ema_images` and `ema_residual` (see
    `ldm.posthoc_ema.Fit`).

    Args:
        run: the folder of a stage-two run that kept snapshots (`ema_stds`).
        std: width of the average as a fraction of the images seen (EDM2's σ_rel), in (0, 0.2886].
        at: images seen at the end of the average, those of a snapshot; None: the newest.
        out: the `.pt` to write, which must not exist; None: `ckpt-ema<std>.pt` in the run's
            folder, with `-<at>` if that is given, replacing an earlier one.

    Returns:
        The `.pt`; its `.safetensors` twin is beside it.
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
    average = {"ema_std": std, "ema_images": fit.images_seen, "ema_residual": fit.residual}
    save_model(out, replace(file, weights=weights, provenance=file.provenance | average))
    return out


def _target(run: Path, std: float, at: int | None, out: Path | None) -> Path:
    if out is None:
        return run / (f"ckpt-ema{std}.pt" if at is None else f"ckpt-ema{std}-{at}.pt")
    if out.suffix != ".pt":
        raise UsageError(f"{out}: the file must end in .pt, such as {out.stem}.pt")
    for path in (out, out.with_suffix(".safetensors")):
        if path.exists():
            raise LdmError(f"{path} already exists: give --out another name")
    return out


def _check_same_network(ours: dict[str, Tensor], theirs: dict[str, Tensor], run: Path) -> None:
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise LdmError(
                f"the snapshots in {run / 'ema'} are not of the network in {run / 'ckpt.pt'}: "
                f"tensor {shown(name)} differs"
            )
