"""From a table of noise levels, as checkpoints of discrete time hold them, to their schedule."""

import torch
from torch import Tensor

from diffusion.discrete import DiscreteConfig, log_sigmas
from ldm.config import validate
from ldm.errors import LdmError, UsageError


def find_schedule(betas: Tensor | None = None, alpha_bars: Tensor | None = None) -> DiscreteConfig:
    """The schedule that a table of noise levels was made from (Ho et al. 2020, arXiv 2006.11239).

    Args:
        betas: β_t, floating (T,).
        alpha_bars: ᾱ_t = Π (1 − β_s), floating (T,). One of the two at least, and both must fit.

    Returns:
        Number of time steps, first and last β, and their spacing; the prediction is left at ε.

    Raises:
        LdmError: they are no such tables, or of a schedule that `DiscreteConfig` cannot say.
    """
    tables = [table for table in (betas, alpha_bars) if table is not None]
    if any(t.ndim != 1 or not t.is_floating_point() or len(t) < 2 for t in tables):
        raise LdmError("its noise levels are no table of two numbers or more")
    steps = len(tables[0])
    if betas is not None:
        ends = betas[[0, -1]].double()
    else:
        # Ho et al. 2020, above Equation 4: ᾱ_t = ᾱ_{t−1} (1 − β_t), and ᾱ_0 = 1 − β_0
        below = torch.cat([alpha_bars.new_ones(1), alpha_bars])[[0, -2]].double()
        ends = 1 - alpha_bars[[0, -1]].double() / below
    first, last = ends.tolist()
    # people write a β in few digits, and a table in low precision blurs the others
    for digits in (3, 5, 7):
        for schedule in ("scaled_linear", "linear"):
            tree = {
                "timesteps": steps,
                "beta_start": float(f"{first:.{digits}g}"),
                "beta_end": float(f"{last:.{digits}g}"),
                "schedule": schedule,
            }
            try:
                config = validate(DiscreteConfig, tree)
            except UsageError:  # such as a last β of 1
                continue
            if _fits(config, betas, alpha_bars):
                return config
    raise LdmError(
        f"its {steps} noise levels, β from {first:.4g} to {last:.4g}, are of another schedule than "
        "those known here, evenly spaced in √β (scaled_linear) or β (linear)"
    )


def _fits(config: DiscreteConfig, betas: Tensor | None, alpha_bars: Tensor | None) -> bool:
    # σ² = (1 − ᾱ) / ᾱ (Karras et al. 2022, arXiv 2206.00364, Appendix C.3.4), so ln ᾱ = −ln(1 + σ²)
    log_alpha_bars = -torch.nn.functional.softplus(2 * log_sigmas(config))
    if alpha_bars is not None and not _close(alpha_bars, log_alpha_bars.exp(), 1):
        return False
    # Ho et al. 2020, above Equation 4: β_t = 1 − ᾱ_t / ᾱ_{t−1}
    expected = -torch.expm1(log_alpha_bars.diff(prepend=log_alpha_bars.new_zeros(1)))
    return betas is None or _close(betas, expected, 0)


def _close(table: Tensor, expected: Tensor, largest: float) -> bool:
    """Whether a table is the expected one but for its dtype's rounding, of numbers of up to 1 where
    they came from a subtraction or a product."""
    rounding = 4 * torch.finfo(table.dtype).eps
    if table.shape != expected.shape:
        return False
    near = max(1e-4, rounding)
    return torch.allclose(table.double(), expected, rtol=near, atol=largest * rounding)
