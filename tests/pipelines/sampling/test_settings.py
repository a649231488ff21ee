from math import inf, nan, sqrt
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from diffusion.samplers import SAMPLERS
from diffusion.schedules import SCHEDULES
from ldm.config import to_tree, validate
from ldm.errors import UsageError
from ldm.seeds import normal
from pipelines.sampling.settings import Sampling, asked_levels, noise_levels, slerp, told_apart


def test_what_can_be_asked_for_is_what_there_is():
    fields = Sampling.model_fields
    assert set(get_args(fields["sampler"].annotation)) == set(SAMPLERS)
    assert set(get_args(fields["schedule"].annotation)) == set(SCHEDULES)


def test_settings_survive_json():
    import json

    asked = validate(Sampling, {"churn": inf, "interval": (0.2, inf), "guidance": 2})
    text = json.dumps(to_tree(asked), allow_nan=False)
    assert validate(Sampling, json.loads(text)) == asked


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "steps18"),
        ({"steps": 40, "sampler": "euler", "schedule": "cosine"}, "steps40-euler-cosine"),
        ({"guidance": 1.5, "interval": (0.2, 3)}, "steps18-guidance1.5-interval0.2to3"),
        ({"guidance": 2, "interval": (0.2, inf)}, "steps18-guidance2-interval0.2toinf"),
        ({"churn": {"S_churn": 40, "S_max": 50}}, "steps18-S_churn40-S_max50"),
        ({"sigma_max": 20}, "steps18-sigma_max20"),
    ],
)
def test_names_tell_settings_apart(settings, name):
    assert told_apart(validate(Sampling, settings)) == name


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"interval": (0.2, 3)}, "the interval is where guidance acts: give guidance"),
        ({"churn": {"S_churn": 5, "S_min": 3, "S_max": 1}}, "churn begins at S_min=3"),
        ({"churn": {"S_noise": 1.5}}, "are of churn: give S_churn"),
        ({"churn": {"S_min": 1.5}}, "are of churn: give S_churn"),
        ({"churn": {"S_churn": 1, "S_noise": inf}}, "'churn.S_noise': input should be a finite"),
        ({"churn": {"S_churn": nan}}, "'churn.S_churn': input should be greater"),
        ({"guidance": inf}, "'guidance': input should be a finite number"),
        ({"guidance": nan}, "'guidance': input should be a finite number"),
        ({"sigma_max": inf}, "'sigma_max': input should be a finite number"),
        ({"guidance": 2, "interval": (nan, 1)}, "'interval.0': input should be greater"),
        ({"steps": 10**13}, "'steps': input should be less than or equal to 100000"),
    ],
)
def test_settings_that_change_nothing_or_are_no_numbers(settings, told):
    with pytest.raises(UsageError) as error:
        validate(Sampling, settings)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_levels_at_which_guidance_asks():
    model = SimpleNamespace(sigma_min=0.1, sigma_max=20.0)

    def asked(**settings):
        return asked_levels(validate(Sampling, {"steps": 6, "guidance": 2} | settings), model)

    levels = noise_levels(validate(Sampling, {"steps": 6}), model).tolist()
    assert asked() == (0.1, 20)
    assert asked(interval=(0.2, levels[2])) == (levels[4], levels[2])
    assert asked(interval=(levels[0], inf)) is None
    # raised noise asks in between, and no higher than the model knows
    assert asked(churn=9) == (0.1, 20)
    assert asked(churn=9, sigma_max=10) == (0.1, pytest.approx(10 * sqrt(2)))
    for highest, expected in ((levels[3], levels[3] * sqrt(2)), (levels[4], levels[3])):
        churn = {"S_churn": 9, "S_max": highest}
        top = asked(churn=churn, interval=(0.2, levels[2] - 0.1))[1]
        assert top == pytest.approx(expected)


def test_slerp_keeps_to_the_sphere():
    a, b = (normal(seed, "sample", [0], (4, 8, 8)) for seed in (0, 1))
    t = torch.linspace(0, 1, 7)
    way = slerp(a, b, t)
    assert torch.equal(way[:1], a) and torch.equal(way[-1:], b)
    flat = way.flatten(1).double()
    # between lengths that differ a little the length goes over a little, never through the ball
    assert (flat.norm(dim=1) > 0.98 * min(flat[0].norm(), flat[-1].norm())).all()
    unit = flat / flat.norm(dim=1, keepdim=True)
    angles = (unit[1:] * unit[:-1]).sum(1).acos()
    assert angles.max() / angles.min() < 1.1
    assert torch.equal(slerp(a, a, t), a.expand(7, -1, -1, -1))
