"""Averages of a model's weights: tracked in training, or computed afterwards from snapshots.

Half-lives and widths are in images. Post-hoc EMA is that of Karras et al. 2023 (arXiv 2312.02696),
Section 3.2 and Appendix C.3. A power-function average is the integral of the weights over the run
against a profile of closed form. A profile that is nearly a sum of the snapshots' profiles gives
its average as the same sum of their weights.

<run>/ema/<images_seen>-<std>.safetensors    the network's averaged weights
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ema_pytorch import EMA
from ema_pytorch.post_hoc_ema import sigma_rel_to_gamma
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ldm.checkpoint import (
    Damaged,
    fingerprint,
    fingerprint_each,
    first_difference,
    load_model,
    open_safetensors,
    save_model,
    to_safetensors,
)
from ldm.errors import LdmError, UsageError
from ldm.files import check_writable, finish_set, write_atomically
from ldm.logbook import console

LARGEST_STD = math.sqrt(1 / 12)
"""Relative width of the mean over a whole run (γ = 0)."""

TOLERANCE = 0.05
"""Largest residual of a fit that is accepted; see `solve_coefficients`."""

SNAPSHOT = re.compile(r"(\d{12,})-(\d+(?:\.\d+)?(?:e-\d+)?)\.safetensors")


class Average(EMA, ABC):
    """A copy of a model, `ema_model`, whose weights average the model's.

    It is in eval mode and without gradients. Updates depend on the model and the count of images
    alone, so that processes with equal weights keep equal averages without communication.

    Args:
        model: the module on its device, before DDP wraps it.
        shared: parts of it that do not change, and are not copied.
    """

    def __init__(self, model: nn.Module, shared: Iterable[nn.Module] = ()):
        parts = {id(part): part for part in shared}  # a copy takes these for copied already
        constant = {id(tensor) for part in parts.values() for tensor in part.parameters()}
        super().__init__(
            model, deepcopy(model, parts), include_online_model=False, use_foreach=True,
            ignore_names={name for name, p in model.named_parameters() if id(p) in constant},
        )  # fmt: skip
        self.ema_model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Average":
        """Stay in eval mode."""
        return self

    @abstractmethod
    def decay(self, images_seen: int, batch_size: int) -> float:
        """Return the weight that the average keeps in the update after `images_seen` images, of
        which `batch_size` came after the update before."""

    def update(self, images_seen: int, batch_size: int) -> None:
        """Update after a step of `batch_size` images, which `images_seen` includes, both over all
        processes. The first update copies the model."""
        decay = self.decay(images_seen, batch_size) if self.initted else 0.0
        self.update_moving_average(self.ema_model, self.model, decay)
        self.initted.fill_(True)
        for average, online in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            if not average.is_floating_point():  # counters have no mean
                average.copy_(online)


class Ema(Average):
    """Exponential moving average.

    Args:
        half_life_images: images after which an update has half its weight, at most 5 % of those
            seen, so that the initial weights fade quickly; 0 copies the model.
    """

    def __init__(self, model: nn.Module, half_life_images: float, shared: Iterable[nn.Module] = ()):
        super().__init__(model, shared)
        self.half_life_images = half_life_images

    def decay(self, images_seen: int, batch_size: int) -> float:
        # Karras et al. 2022, appendix on training: half-life in images, ramped up with them
        half_life = min(self.half_life_images, 0.05 * images_seen)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


class PowerEma(Average):
    """Power-function average of Karras et al. 2023 (arXiv 2312.02696, Section 3.1).

    The weights after τ images count in proportion to τ^γ: the average always spans the same
    fraction of the run so far. For a constant batch size the updates equal that integral over
    weights that are constant between steps.

    Args:
        std: width of the average as a fraction of the images seen (the paper's σ_rel), the standard
            deviation of τ under the profile; above 0, at most √(1/12) ≈ 0.2886.
    """

    def __init__(self, model: nn.Module, std: float):
        self.gamma = gamma_of_std(std)  # checks std before the model is copied
        super().__init__(model)

    def decay(self, images_seen: int, batch_size: int) -> float:
        # Karras et al. 2023, Eq. 127: β_γ(t) = (1 − Δt/t)^(γ+1)
        return (1 - batch_size / images_seen) ** (self.gamma + 1)


def gamma_of_std(std: float) -> float:
    """Return the exponent γ ≥ 0 of the power-function profile of a relative width."""
    if not 0 < std <= LARGEST_STD:
        raise UsageError(
            f"std={std}: the width of an average must be above 0 and at most "
            f"{LARGEST_STD:.5f}, the mean over the whole run"
        )
    return sigma_rel_to_gamma(std)  # Karras et al. 2023, Algorithm 2


# ------------------------------------------------------------------------------- snapshots
class Snapshot(NamedTuple):
    """A power-function average of width `std` after `images_seen`."""

    images_seen: int
    std: float
    path: Path


def save_snapshot(
    folder: Path, images_seen: int, std: float, weights: Mapping[str, Tensor]
) -> None:
    """Write a snapshot to the run's `ema/` folder, atomically; on the main process alone.

    The tensors keep their type. Half precision would save half the space, but for an average of
    width 0.07 of weights on a random walk, from 40 snapshots each of widths 0.05 and 0.1, its error
    is 2e-4 (1e-3 at width 0.03), against 5e-7 with float32.
    """
    path = folder / f"{images_seen:012d}-{float(std)}.safetensors"
    write_atomically(path, to_safetensors(weights, sha256=fingerprint(weights)))


def list_snapshots(folder: Path) -> list[Snapshot]:
    """List the snapshots in a run's `ema/`, oldest first; an LdmError if there are none."""
    found = [
        Snapshot(int(named[1]), float(named[2]), path)
        for path in folder.glob("*.safetensors")
        if (named := SNAPSHOT.fullmatch(path.name))
    ]
    if not found:
        raise LdmError(
            f"no snapshots of averages in {folder}: train with ema_stds, such as "
            "ema_stds=[0.05, 0.1], to keep them"
        )
    return sorted(found)


def fit_snapshots(
    snapshots: Sequence[Snapshot], std: float, at: int | None = None
) -> tuple[dict[Snapshot, float], float]:
    """Fit the average of width `std` after `at` images by a run's snapshots up to then.

    `at` is the time of one of the snapshots, by default the newest. Return the coefficients of
    those used, and the residual of `solve_coefficients`.
    """
    gamma = gamma_of_std(std)
    times = sorted({snapshot.images_seen for snapshot in snapshots})
    at = times[-1] if at is None else at
    if at not in times:
        near = min(times, key=lambda time: abs(time - at))
        raise LdmError(
            f"no snapshot at {at} images: there are {len(times)}, from {times[0]} to {times[-1]}, "
            f"the nearest at {near}"
        )
    used = [snapshot for snapshot in snapshots if snapshot.images_seen <= at]
    coefficients, residual = solve_coefficients(
        [gamma_of_std(each.std) for each in used], [each.images_seen for each in used], gamma, at
    )
    if residual > TOLERANCE:
        stds = ", ".join(map(str, sorted({snapshot.std for snapshot in used})))
        raise LdmError(
            f"the average of std {std} at {at} images cannot be made of the snapshots up to then "
            f"({len(used)}, of std {stds}): it would be off by {residual:.0%}, {TOLERANCE:.0%} is "
            "allowed; choose a std nearer to those, or a later time"
        )
    return dict(zip(used, coefficients.tolist(), strict=True)), residual


def solve_coefficients(
    gammas: ArrayLike, times: ArrayLike, gamma: float, time: float
) -> tuple[NDArray[np.float64], float]:
    """Find the coefficients (n,), of sum 1, with which profiles (γᵢ, tᵢ) best fit (γ, t) in L2.

    Returns:
        The coefficients, and the residual ‖p − Σ xᵢ pᵢ‖ / ‖p‖ over the profiles p, in L2. If the
        weights of the steps were noise around a mean, the noise of the average would be off by this
        fraction. If they move slowly the error is far smaller, because the coefficients sum to 1.
    """
    gammas = np.asarray(gammas, np.float64)
    times = np.asarray(times, np.float64) / time  # a residual does not depend on the unit
    # Karras et al. 2023, Algorithm 3: A x = b, with the inner products among the snapshots'
    # profiles and with the wanted one. Here a Lagrange multiplier adds Σx = 1, so that constant
    # weights are reproduced, and the profiles are scaled to unit norm.
    a = inner_product(gammas[:, None], times[:, None], gammas, times)
    b = inner_product(gammas, times, gamma, 1.0)
    norm = np.sqrt(a.diagonal())
    system = np.block([[a / np.outer(norm, norm), 1 / norm[:, None]], [1 / norm, np.zeros((1, 1))]])
    # least squares of least norm: profiles may be equal up to rounding
    solution = np.linalg.lstsq(system, np.append(b / norm, 1.0), rcond=None)[0]
    x = solution[:-1] / norm
    total = inner_product(gamma, 1.0, gamma, 1.0).item()
    residual = np.sqrt(max(0.0, total - 2 * x @ b + x @ a @ x) / total)
    return x, float(residual)


def inner_product(
    gamma_a: ArrayLike, time_a: ArrayLike, gamma_b: ArrayLike, time_b: ArrayLike
) -> NDArray[np.float64]:
    """∫ p_a(τ) p_b(τ) dτ of the profiles p_{γ,t}(τ) = (γ+1) τ^γ / t^(γ+1) on [0, t].

    Exponents γ are ≥ 0, ends t above 0 and in one unit; all are broadcast.
    """
    ga, ta, gb, tb = (np.asarray(v, np.float64) for v in (gamma_a, time_a, gamma_b, time_b))
    # Karras et al. 2023, Eq. 151: with t the earlier end and T the later one, of exponent γ_T, the
    # integral over [0, t] is (γ_a+1) (γ_b+1) / (γ_a+γ_b+1) · (t/T)^γ_T / T
    later = np.maximum(ta, tb)
    share = (np.minimum(ta, tb) / later) ** np.where(ta < tb, gb, ga)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * share / later


# ------------------------------------------------------------------------------- synthesis
def synthesize_ema(run: Path, std: float, at: int | None = None, out: Path | None = None) -> Path:
    """Write a copy of a run's `ckpt.pt` whose weights are a power-function average.

    Its provenance states the average: `ema_std`, `ema_images` and `ema_residual`, as returned by
    `fit_snapshots`. The file `out` must be new; by default it is `ckpt-ema<std>.pt` in the run's
    folder, with `-<at>` if that is given, and replaces an earlier one. Return the `.pt`; its
    `.safetensors` twin is beside it.
    """
    if out is not None and out.suffix != ".pt":
        raise UsageError(f"{out}: the file must end in .pt, such as {out.stem}.pt")
    new = [] if out is None else [out, out.with_suffix(".safetensors")]
    interrupted = finish_set(new[0].parent) if new else []  # by a kill: they are written again
    for path in new:
        if path.exists() and path not in interrupted:
            raise LdmError(f"{path} already exists: give --out another name")
    if not run.is_dir():
        raise LdmError(f"no run folder at {run}")
    check_writable(out or run / "ckpt-ema.pt")
    coefficients, residual = fit_snapshots(list_snapshots(run / "ema"), std, at)
    images_seen = max(snapshot.images_seen for snapshot in coefficients)
    file = load_model(run, "diffusion")
    console.print(
        f"{run / 'ema'}: average of std {std} at {images_seen:,} images, from "
        f"{len(coefficients)} snapshots, exact to {residual:.1%}",
        markup=False,
    )
    weights = combine(coefficients, file.weights)
    average = {"ema_std": std, "ema_images": images_seen, "ema_residual": residual}
    out = out or run / (f"ckpt-ema{std}.pt" if at is None else f"ckpt-ema{std}-{at}.pt")
    save_model(out, replace(file, weights=weights, provenance=file.provenance | average))
    return out


def combine(
    coefficients: Mapping[Snapshot, float], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sum snapshots on the CPU: the average of the network whose weights are `like`.

    Integers (counters) are the newest snapshot's. One tensor is read at a time and summed in
    float64: memory is 8 bytes per weight.
    """
    sums: dict[str, Tensor] = {}
    for snapshot in sorted(coefficients, key=lambda snapshot: -snapshot.images_seen):
        with open_safetensors(snapshot.path, "delete it to use the others") as file:
            names, stated = [*file.keys()], file.metadata()
            # earlier versions wrote none
            if stated and stated != {"sha256": fingerprint_each(names, file.get_tensor)}:
                raise Damaged(f"{snapshot.path} was altered: delete it to use the others")
            for name in [*names, *(name for name in like if name not in names)]:
                found = {name: file.get_tensor(name)} if name in names else {}
                if first_difference(found, {name: like[name]} if name in like else {}):
                    raise LdmError(
                        f"{snapshot.path} is not of the network in the run's ckpt.pt: tensor "
                        f"{name} differs; delete the snapshots of another run"
                    )
                if not (tensor := found[name]).is_floating_point():
                    sums.setdefault(name, tensor)
                    continue
                if name not in sums:
                    sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
                sums[name].add_(tensor.double(), alpha=coefficients[snapshot])
    # one by one, to free the float64 sums early
    return {name: sums.pop(name).to(tensor.dtype) for name, tensor in like.items()}
