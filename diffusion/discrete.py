"""Networks of discrete time (DDPM, iDDPM, latent diffusion) as a denoiser D(x; σ).

Such a network was trained on T noise levels x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε, with the integer t as its
input (Ho et al. 2020, arXiv 2006.11239). Divided by √ᾱ_t, x_t is x₀ plus noise of standard
deviation σ_t = √((1−ᾱ_t) / ᾱ_t), so every sampler over σ can use the network (Karras et al. 2022,
arXiv 2206.00364, Appendix C.3).
"""

from contextlib import suppress
from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from torch import Tensor, nn

from diffusion.edm import Denoiser
from ldm.config import Config
from ldm.errors import LdmError

Beta = Annotated[float, Field(gt=0, lt=1)]


class DiscreteConfig(Config):
    """The noise levels and the target that a network was trained with; the defaults are those of
    Rombach et al. 2022's unconditional models: `linear_start`, `linear_end`, ε."""

    type: Literal["discrete"] = "discrete"
    """Type of the denoiser."""
    timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
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

    @property
    def summary(self) -> str:
        """The target and the noise levels, for people."""
        return (
            f"it predicts {self.prediction}; {self.timesteps} noise levels, "
            f"β {self.beta_start:g} to {self.beta_end:g} ({self.schedule})"
        )

    @field_validator("beta_end")
    @classmethod
    def _rises(cls, beta_end: float, info: ValidationInfo) -> float:
        start = info.data.get("beta_start")
        if start is not None and beta_end <= start:
            raise ValueError(f"must be above beta_start, {start}")
        return beta_end


def betas_of(config: DiscreteConfig) -> Tensor:
    """β_t for t = 0 … T−1, rising: float64 (T,), on the CPU."""
    power = 2 if config.schedule == "scaled_linear" else 1
    start, end = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    return torch.linspace(start, end, config.timesteps, dtype=torch.float64) ** power


def log_sigmas(config: DiscreteConfig) -> Tensor:
    """ln σ_t for t = 0 … T−1, rising: float64 (T,), on the CPU."""
    # Ho et al. 2020, above Equation 4: ᾱ_t = Π (1 − β_s); its logarithm does not underflow
    log_alpha_bar = torch.log1p(-betas_of(config)).cumsum(0)
    # Karras et al. 2022, Appendix C.3.4: σ_t² = (1 − ᾱ_t) / ᾱ_t
    return (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar) / 2


class DiscreteDenoiser(Denoiser):
    """D(x; σ) of a network of discrete time, for data of standard deviation 1; see `Denoiser`.

    The network's time step is interpolated in ln σ between its noise levels, and clamped to the
    first and the last, which are sigma_min and sigma_max.
    """

    sigma_data = 1.0

    def __init__(self, network: nn.Module, config: DiscreteConfig | None = None):
        super().__init__(network)
        self.config = config or DiscreteConfig()
        self.log_sigmas = log_sigmas(self.config)  # no buffer: `to` would change its dtype
        self.sigma_min, self.sigma_max = self.log_sigmas[[0, -1]].exp().tolist()
        is_epsilon = self.config.prediction == "epsilon"
        self.words = {
            "c_skip": "1" if is_epsilon else "1 / (sigma^2 + 1)",
            "c_out": "-sigma" if is_epsilon else "-sigma / sqrt(sigma^2 + 1)",
            "c_in": "1 / sqrt(sigma^2 + 1)",
            "timestep": "t between 0 and timesteps - 1 of which sqrt((1 - alpha_bar_t) / "
            "alpha_bar_t) = sigma, interpolated in ln(sigma)",
        }

    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # √ᾱ, the scale of the network's input in training
        c_in = 1 / (sigma**2 + 1).sqrt()
        if self.config.prediction == "epsilon":
            # Karras et al. 2022, Table 1, columns "VP" and "iDDPM": x₀ = x − σ ε
            return torch.ones_like(sigma), -sigma, c_in, self.time_of(sigma)
        # Salimans and Ho 2022, Section 4: x₀ = √ᾱ x_t − √(1−ᾱ) v, and x_t = √ᾱ x
        return c_in**2, -sigma * c_in, c_in, self.time_of(sigma)

    def time_of(self, sigma: Tensor) -> Tensor:
        """Time steps t in [0, T−1] of noise levels, interpolated in ln σ: float64."""
        table = self.log_sigmas = self.log_sigmas.to(sigma.device)  # copied once
        wanted = sigma.double().log()
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        below = above - 1
        part = (wanted - table[below]) / (table[above] - table[below])
        return below + part.clamp(0, 1)


def find_schedule(betas: Tensor | None = None, alpha_bars: Tensor | None = None) -> DiscreteConfig:
    """Find the schedule behind a table of β_t, of ᾱ_t = Π (1 − β_s) or of both, floating (T,)."""
    tables = [table for table in (betas, alpha_bars) if table is not None]
    if any(t.ndim != 1 or not t.is_floating_point() or len(t) < 2 for t in tables):
        raise LdmError("its noise levels are not a table of at least two numbers")
    given = tables[0].double()
    if betas is None:  # ᾱ_t = ᾱ_{t−1} (1 − β_t), and ᾱ_0 = 1 − β_0
        given = 1 - given / torch.cat([given.new_ones(1), given[:-1]])
    steps, first, last = len(given), given[0].item(), given[-1].item()
    # people write a β in few digits, and a table in low precision blurs the others
    for digits, schedule in product((3, 5, 7), ("scaled_linear", "linear")):
        start, end = (float(f"{beta:.{digits}g}") for beta in (first, last))
        tree = {"timesteps": steps, "beta_start": start, "beta_end": end, "schedule": schedule}
        with suppress(ValidationError):  # such as of a last β of 1
            config = DiscreteConfig.model_validate(tree)
            expected = betas_of(config)
            if _close(betas, expected, 0) and _close(alpha_bars, (1 - expected).cumprod(0), 1):
                return config
    raise LdmError(
        f"its {steps} noise levels, β from {first:.4g} to {last:.4g}, are evenly spaced neither in "
        "√β (scaled_linear) nor in β (linear)"
    )


def _close(table: Tensor | None, expected: Tensor, largest: float) -> bool:
    """Return whether a table, if any, is the expected one up to the rounding of its dtype, of which
    numbers up to `largest` were rounded on the way."""
    if table is None or table.shape != expected.shape:
        return table is None
    rounding = 4 * torch.finfo(table.dtype).eps
    near = max(1e-4, rounding)
    return torch.allclose(table.double(), expected, rtol=near, atol=largest * rounding)
