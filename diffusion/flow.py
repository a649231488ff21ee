"""Rectified flow: a network that predicts a velocity, as a denoiser D(x; σ).

Straight lines x_t = (1 − t) x₀ + t ε join data x₀ and noise ε, with t from 0 to 1 and the velocity
v = ε − x₀ (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022, arXiv 2210.02747; the linear path
of SiT, Ma et al. 2024, arXiv 2401.08740). Divided by 1 − t, x_t is x₀ plus noise of standard
deviation σ = t / (1 − t), so every sampler over σ can use the network; a step of Euler's sampler in
σ is one in t.
"""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.edm import Denoiser
from diffusion.schedules import FLOW_SIGMA_MAX
from ldm.config import Config

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SIGMA_MIN = 1e-5
"""σ of the first t in training. The loss there is a difference of numbers of about 1, divided by t:
for a smaller t, float32 would not resolve it."""


class FlowConfig(Config):
    """The noise levels seen in training, and the convention of the network."""

    type: Literal["flow"] = "flow"
    """Type of the denoiser."""
    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the time t in training: logit-normal (SD3), which is a log-normal σ, or
    uniform (SiT)."""
    noise_mean: FiniteFloat = 0.0
    """Mean of ln σ = ln(t / (1 − t)) in training, logit-normal (SD3's m)."""
    noise_std: Positive = 1.0
    """Standard deviation of ln σ in training, logit-normal (SD3's s)."""
    shift: Positive = 1.0
    """Factor of every σ, in training and in the schedule `flow`: above 1 for larger latents, whose
    noise averages out (SD3's α)."""
    time_scale: Annotated[float, Field(ge=1e-3, allow_inf_nan=False)] = 1000.0
    """Factor of the time t that the network gets as input: 1000 for sinusoids of networks trained
    here, as in SD3; 1 for SiT's networks and `network.type=edm2`."""
    reversed: bool = False
    """Count the network's time from noise to data, and let its velocity point to the data (SiT)."""
    direction: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of a term of the loss for the velocity's direction: 1 − the cosine between it and its
    target at each position (LightningDiT: 1)."""
    uncertainty: bool = False
    """Weight noise levels also by a learned uncertainty of their loss (EDM2)."""

    sigma_data: ClassVar[float] = 1.0
    """Standard deviation of the standardised latents: that of the noise."""

    @property
    def summary(self) -> str:
        """The target, for people."""
        return "it predicts a velocity (rectified flow)"

    @field_validator("noise_mean", "noise_std")
    @classmethod
    def _acts(cls, given: float, info: ValidationInfo) -> float:
        default = cls.model_fields[str(info.field_name)].default
        if info.data.get("distribution") == "uniform" and given != default:
            raise ValueError("has no effect with distribution=uniform: omit it")
        return given

    def log_sigma(self, normal_draws: Tensor) -> Tensor:
        """Turn standard normal draws (B,) into ln σ (B,), within the denoiser's range of σ."""
        if self.distribution == "uniform":
            # t = Φ(n) is uniform; logit t = ln Φ(n) − ln Φ(−n) is accurate at both ends
            tails = torch.special.log_ndtr(normal_draws), torch.special.log_ndtr(-normal_draws)
            log_sigma = tails[0] - tails[1]
        else:
            # Esser et al. 2024 (arXiv 2403.03206), Eq. 19: logit t ~ N(m, s²)
            log_sigma = self.noise_mean + self.noise_std * normal_draws
        # Eq. 23, t' = α t / (1 + (α − 1) t), is σ' = α σ
        log_sigma = log_sigma + math.log(self.shift)
        return log_sigma.clamp(math.log(SIGMA_MIN), math.log(FLOW_SIGMA_MAX))


class FlowDenoiser(Denoiser):
    """D(x; σ) of a network of velocities, for data of standard deviation 1; see `Denoiser`."""

    sigma_data = FlowConfig.sigma_data
    sigma_min, sigma_max = SIGMA_MIN, FLOW_SIGMA_MAX
    schedule = "flow"

    def __init__(self, network: nn.Module, config: FlowConfig | None = None):
        super().__init__(network)
        self.config = config or FlowConfig()
        sign, time = ("", "") if self.config.reversed else ("-", " sigma")
        self.words = {
            "c_skip": "1 / (sigma + 1)",
            "c_out": f"{sign}sigma / (sigma + 1)",
            "c_in": "1 / (sigma + 1)",
            "timestep": f"time_scale{time} / (sigma + 1)",
        }

    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_in = 1 / (1 + sigma)  # 1 − t, and x_t = (1 − t) x
        t = sigma * c_in
        # x₀ = x_t − t v
        time, c_out = (c_in, t) if self.config.reversed else (t, -t)
        return c_in, c_out, c_in, self.config.time_scale * time

    def further_loss(
        self, z: Tensor, sigma: Tensor, noise: Tensor, denoised: Tensor
    ) -> Tensor | float:
        if not self.config.direction:
            return 0.0
        # x₀ = x_t − t v: the velocity is wrong by what D is, divided by −t
        target, t = noise - z, (sigma / (1 + sigma)).view(-1, 1, 1, 1)
        velocity = target + (z - denoised) / t
        # Yao et al. 2025 (arXiv 2501.01423), Section 4: the cosine over the channels
        alike = F.cosine_similarity(velocity, target, dim=1)
        return self.config.direction * (1 - alike).mean(dim=(1, 2))

    def schedule_options(self, schedule: str) -> dict[str, Any]:
        if schedule == "flow":
            return {"sigma_max": self.sigma_max, "shift": self.config.shift}
        # Karras et al. 2022, Table 1, for σ_data = 1 in place of 0.5: the other schedules would
        # spend most of their steps on the ends of a wider range
        return {"sigma_min": 0.004, "sigma_max": 160.0}

    def sampler_options(self, sampler: str) -> dict[str, Any]:
        # from pure noise, the first step of `flow` is too large for averages over σ
        return {"over": "t"} if sampler == "heun" else {}
