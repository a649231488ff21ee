"""Networks of discrete time (DDPM, iDDPM, latent diffusion) as a denoiser D(x; σ).

Such a network was trained on T noise levels x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε, with the integer t as its
input (Ho et al. 2020, arXiv 2006.11239). Divided by √ᾱ_t, x_t is x₀ plus noise of standard
deviation σ_t = √((1−ᾱ_t) / ᾱ_t), so every sampler over σ can use the network (Karras et al. 2022,
arXiv 2206.00364, Appendix C.3).
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import Config, validate
from ldm.errors import LdmError, UsageError

Beta = Annotated[float, Field(gt=0, lt=1)]


class DiscreteConfig(Config):
    """The noise levels and the target that a network was trained with; the defaults are those of
    Rombach et al. 2022's unconditional models: `linear_start`, `linear_end`, ε."""

    type: Literal["discrete"] = "discrete"
    """Type of the denoiser."""
    timesteps: Annotated[int, Field(ge=2)] = 1000
    """Noise levels in training, T."""
    beta_start: Beta = 0.0015
    """β of the first time step."""
    beta_end: Beta = 0.0195
    """β of the last time step, above the first."""
    schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """Even spacing of √β (scaled_linear, which CompVis' code calls linear) or of β (linear, as in
    DDPM; CompVis' sqrt_linear)."""
    prediction: Literal["epsilon", "v"] = "epsilon"
    """The network's output: the noise ε, or v = √ᾱ ε − √(1−ᾱ) x₀ (Salimans and Ho 2022)."""

    @field_validator("beta_end")
    @classmethod
    def _rises(cls, beta_end: float, info: ValidationInfo) -> float:
        start = info.data.get("beta_start")
        if start is not None and beta_end <= start:
            raise ValueError(f"must be above beta_start, {start}")
        return beta_end


def log_sigmas(config: DiscreteConfig) -> Tensor:
    """ln σ_t for t = 0 … T−1, rising: float64 (T,), on the CPU."""
    start, end, steps = config.beta_start, config.beta_end, config.timesteps
    if config.schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    # Ho et al. 2020, above Equation 4: ᾱ_t = Π (1 − β_s); its logarithm does not underflow
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    # Karras et al. 2022, Appendix C.3.4: σ_t² = (1 − ᾱ_t) / ᾱ_t
    return (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar) / 2


class DiscreteDenoiser(nn.Module):
    """D(x; σ) built around a network F of discrete time, for data of standard deviation 1.

    The network's time step is interpolated in ln σ between its noise levels, and clamped to the
    first and the last. The network runs in its parameters' dtype, or under autocast; all else in
    x's dtype, at least float32.

    Args:
        network: (x (B, C, H, W), t (B,)) → (B, C, H, W); also takes `labels` and `augment` if they
            are given.

    Attributes:
        sigma_min, sigma_max: the first and the last noise level in training.
        sigma_data: standard deviation of the training data: 1.
    """

    sigma_data = 1.0

    def __init__(self, network: nn.Module, config: DiscreteConfig | None = None):
        super().__init__()
        self.network = network
        self.config = config or DiscreteConfig()
        self.log_sigmas = log_sigmas(self.config)  # no buffer: `to` would change its dtype
        self.sigma_min, self.sigma_max = self.log_sigmas[[0, -1]].exp().tolist()

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Denoise latents x₀ + σ ε; see `EDM.forward` for the arguments."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        inner = next(self.network.parameters(), x).dtype
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(len(x))
        time = self.time_of(sigma).to(torch.promote_types(inner, torch.float32))
        sigma = sigma.view(-1, 1, 1, 1)
        # √ᾱ, the scale of the network's input in training
        c_in = 1 / (sigma**2 + 1).sqrt()
        if self.config.prediction == "epsilon":
            # Karras et al. 2022, Table 1, columns "VP" and "iDDPM": x₀ = x − σ ε
            c_skip, c_out = torch.ones_like(sigma), -sigma
        else:
            # Salimans and Ho 2022, Section 4: x₀ = √ᾱ x_t − √(1−ᾱ) v, and x_t = √ᾱ x
            c_skip, c_out = c_in**2, -sigma * c_in
        given = {"labels": labels, "augment": augment}
        condition = {key: value for key, value in given.items() if value is not None}
        output = self.network((c_in * x).to(inner), time, **condition)
        # Karras et al. 2022, Equation 7
        return c_skip * x + c_out * output

    def time_of(self, sigma: Tensor) -> Tensor:
        """Time steps t in [0, T−1] of noise levels (B,), interpolated in ln σ: float64 (B,)."""
        table = self.log_sigmas.to(sigma.device)
        wanted = sigma.double().log()
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        below = above - 1
        part = (wanted - table[below]) / (table[above] - table[below])
        return below + part.clamp(0, 1)


def find_schedule(betas: Tensor | None = None, alpha_bars: Tensor | None = None) -> DiscreteConfig:
    """Find the schedule behind a table of noise levels (Ho et al. 2020, arXiv 2006.11239).

    Args:
        betas: β_t, floating (T,).
        alpha_bars: ᾱ_t = Π (1 − β_s), floating (T,). At least one of the two; both must fit.
    """
    tables = [table for table in (betas, alpha_bars) if table is not None]
    if any(t.ndim != 1 or not t.is_floating_point() or len(t) < 2 for t in tables):
        raise LdmError("its noise levels are not a table of at least two numbers")
    steps = len(tables[0])
    if betas is not None:
        ends = betas[[0, -1]].double()
    else:
        assert alpha_bars is not None
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
        f"its {steps} noise levels, β from {first:.4g} to {last:.4g}, are evenly spaced neither in "
        "√β (scaled_linear) nor in β (linear)"
    )


def _fits(config: DiscreteConfig, betas: Tensor | None, alpha_bars: Tensor | None) -> bool:
    # σ² = (1 − ᾱ) / ᾱ (Karras et al. 2022, arXiv 2206.00364, Appendix C.3.4), so ln ᾱ = −ln(1 + σ²)
    log_alpha_bars = -F.softplus(2 * log_sigmas(config))
    if alpha_bars is not None and not _close(alpha_bars, log_alpha_bars.exp(), 1):
        return False
    # Ho et al. 2020, above Equation 4: β_t = 1 − ᾱ_t / ᾱ_{t−1}
    expected = -torch.expm1(log_alpha_bars.diff(prepend=log_alpha_bars.new_zeros(1)))
    return betas is None or _close(betas, expected, 0)


def _close(table: Tensor, expected: Tensor, largest: float) -> bool:
    """Return whether a table is the expected one up to the rounding of its dtype, of which numbers
    up to `largest` were rounded on the way."""
    rounding = 4 * torch.finfo(table.dtype).eps
    if table.shape != expected.shape:
        return False
    near = max(1e-4, rounding)
    return torch.allclose(table.double(), expected, rtol=near, atol=largest * rounding)
