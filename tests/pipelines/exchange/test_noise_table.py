"""Tables of noise levels, against the formulas of the codes that write them."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion.discrete import DiscreteConfig
from ldm.errors import LdmError
from pipelines.exchange.diffusion import find_schedule

SPACED = {
    # CompVis' "linear", diffusers' "scaled_linear"; CompVis' "sqrt_linear", diffusers' "linear"
    "scaled_linear": lambda a, b, n: torch.linspace(a**0.5, b**0.5, n, dtype=torch.float64) ** 2,
    "linear": lambda a, b, n: torch.linspace(a, b, n, dtype=torch.float64),
}
ENDS = [(1000, 0.0015, 0.0195), (1000, 0.00085, 0.012), (1000, 0.0001, 0.02), (20, 0.0123456, 0.5)]


def tables(schedule, steps, first, last, dtype=torch.float32):
    betas = SPACED[schedule](first, last, steps)
    return betas.to(dtype), (1 - betas).cumprod(0).to(dtype)


@pytest.mark.parametrize("schedule", list(SPACED))
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("given", ["both", "betas", "alpha_bars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_schedule_of_a_table(schedule, ends, given, dtype):
    betas, alpha_bars = tables(schedule, *ends, dtype)
    found = find_schedule(
        betas if given != "alpha_bars" else None, alpha_bars if given != "betas" else None
    )
    assert (found.schedule, found.timesteps) == (schedule, ends[0])
    # the odd one has more digits than a table of ᾱ in float32 can tell
    near = 1e-5 if len(str(ends[1])) < 8 else 2e-4
    assert found.beta_start == pytest.approx(ends[1], rel=near)
    assert found.beta_end == pytest.approx(ends[2], rel=1e-9)
    if len(str(ends[1])) < 8:
        assert (found.beta_start, found.beta_end) == ends[1:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", list(SPACED))
def test_a_table_in_half_precision_is_of_the_schedule_it_was_rounded_from(schedule, dtype):
    betas, alpha_bars = tables(schedule, 1000, 0.0015, 0.0195, dtype)
    found = find_schedule(betas, alpha_bars)
    expected = {"schedule": schedule, "beta_start": 0.0015, "beta_end": 0.0195}
    assert found == DiscreteConfig(**expected)


def cosine(steps):
    # Nichol & Dhariwal 2021, Equation 17
    bar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)])


def changed(table, place, factor):
    table = table.clone()
    table[place] *= factor
    return table


BETAS, ALPHA_BARS = tables("scaled_linear", 1000, 0.0015, 0.0195)
OTHER = "its 1000 noise levels, β from 0.0015 to 0.0195, are of another schedule than"


@pytest.mark.parametrize(
    ("betas", "alpha_bars", "told"),
    [
        (cosine(1000), None, "are of another schedule than those known here, evenly spaced in √β"),
        (changed(BETAS, 500, 1.001), None, OTHER),
        (None, changed(ALPHA_BARS, 500, 0.999), "are of another schedule"),
        (BETAS, changed(ALPHA_BARS, -1, 0.0), OTHER),  # rescaled to have no signal at the end
        (BETAS, tables("linear", 1000, 0.0015, 0.0195)[1], OTHER),
        (BETAS, ALPHA_BARS[:-1], OTHER),
        (changed(BETAS, 0, math.nan), None, "β from nan to 0.0195"),
        (BETAS.flip(0), None, "β from 0.0195 to 0.0015"),
        (torch.zeros(1000), None, "β from 0 to 0"),
        (BETAS[:1], None, "are no table of two numbers or more"),
        (BETAS[None], None, "are no table"),
        (torch.arange(1000), None, "are no table"),
        (BETAS, torch.tensor(0.5), "are no table"),
    ],
)
def test_tables_of_other_schedules_are_refused(betas, alpha_bars, told):
    with pytest.raises(LdmError) as caught:
        find_schedule(betas, alpha_bars)
    assert told in str(caught.value) and "\n" not in str(caught.value)
