"""Sampling settings and classes: accepted, refused, named."""

import json
from math import inf, nan, sqrt
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from diffusion import EDM, FlowConfig, FlowDenoiser
from diffusion.samplers import SAMPLERS
from diffusion.schedules import SCHEDULES, flow_sigmas, karras_sigmas
from ldm.config import to_tree, validate
from ldm.errors import UsageError
from ldm.seeds import generator
from pipelines.sampling.settings import (
    Classes,
    Sampling,
    fill_in,
    guided_levels,
    labels_slug,
    noise_levels,
    settings_slug,
)

CLASSES = Classes(3, ("cat", "dog", "2 emus"))


def test_every_sampler_and_schedule_can_be_chosen():
    fields = Sampling.model_fields
    assert set(get_args(fields["sampler"].annotation)) == set(SAMPLERS)
    schedules, _none = get_args(fields["schedule"].annotation)
    assert set(get_args(schedules)) == set(SCHEDULES)


def test_settings_survive_json():
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
        ({"schedule": "karras"}, "steps18"),
        ({"schedule": "flow", "shift": 3}, "steps18-flow-shift3"),
        ({"guidance": 4, "guided_channels": 3}, "steps18-guidance4-guided_channels3"),
    ],
)
def test_slug_names_the_non_default_settings(settings, name):
    assert settings_slug(validate(Sampling, settings)) == name


def test_slug_leaves_out_the_schedule_of_the_model():
    for schedule, name in ((None, "steps18"), ("flow", "steps18"), ("karras", "steps18-karras")):
        assert settings_slug(validate(Sampling, {"schedule": schedule}), "flow") == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": (0.2, 3)}, "interval has no effect without guidance: set guidance"),
        ({"guided_channels": 3}, "guided_channels has no effect without guidance"),
        ({"guidance": 2, "guided_channels": 0}, "'guided_channels': input should be greater"),
        ({"shift": 0}, "'shift': input should be greater than 0"),
        ({"churn": {"S_churn": 5, "S_min": 3, "S_max": 1}}, "S_min=3 must not exceed S_max=1"),
        ({"churn": {"S_noise": 1.5}}, "have no effect without S_churn"),
        ({"churn": {"S_min": 1.5}}, "have no effect without S_churn"),
        ({"churn": {"S_churn": 1, "S_noise": inf}}, "'churn.S_noise': input should be a finite"),
        ({"churn": {"S_churn": nan}}, "'churn.S_churn': input should be greater"),
        ({"guidance": inf}, "'guidance': input should be a finite number"),
        ({"guidance": nan}, "'guidance': input should be a finite number"),
        ({"sigma_max": inf}, "'sigma_max': input should be a finite number"),
        ({"guidance": 2, "interval": (nan, 1)}, "'interval.0': input should be greater"),
        ({"steps": 10**13}, "'steps': input should be less than or equal to 100000"),
    ],
)
def test_invalid_or_ineffective_settings_are_refused(settings, message):
    with pytest.raises(UsageError) as error:
        validate(Sampling, settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_guided_levels_cover_the_interval_and_churn():
    model = EDM(nn.Identity())
    model.sigma_min, model.sigma_max = 0.1, 20.0

    def asked(**settings):
        return guided_levels(validate(Sampling, {"steps": 6, "guidance": 2} | settings), model)

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


# ------------------------------------------------------------------------- schedules of a model
def test_a_flow_is_sampled_evenly_in_t_with_its_shift():
    model = FlowDenoiser(nn.Identity(), FlowConfig(shift=2))
    assert torch.equal(noise_levels(Sampling(steps=5), model), flow_sigmas(5, shift=2))
    asked = validate(Sampling, {"steps": 5, "shift": 4, "sigma_max": 50})
    assert torch.equal(noise_levels(asked, model), flow_sigmas(5, None, 50, shift=4))
    assert fill_in(Sampling(), model).schedule == "flow"
    # of the other schedules few steps are spent where nothing happens
    for name in ("karras", "cosine", "linear"):
        levels = noise_levels(validate(Sampling, {"steps": 18, "schedule": name}), model)
        assert (levels[0].item(), levels[-2].item()) == (160, 0.004)
        assert ((levels > 0.05) & (levels < 20)).sum() >= 8


def test_an_edm_is_sampled_as_before_flows():
    model = EDM(nn.Identity())
    assert torch.equal(noise_levels(Sampling(), model), karras_sigmas(18))
    assert fill_in(Sampling(), model).schedule == "karras"
    levels = noise_levels(validate(Sampling, {"schedule": "flow"}), model)
    assert torch.equal(levels, flow_sigmas(18, 0.002, 80.0))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (EDM, {"shift": 3}, "shift has no effect with schedule karras: use flow"),
        (FlowDenoiser, {"shift": 3, "schedule": "cosine"}, "no effect with schedule cosine"),
        (FlowDenoiser, {"sigma_max": 1e9}, "sigma_max=1e+09: this model denoises σ from 1e-05 to"),
        (FlowDenoiser, {"sigma_min": 1e-6}, "sigma_min=1e-06: this model denoises"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(model, settings, message):
    with pytest.raises(UsageError) as error:
        fill_in(validate(Sampling, settings), model(nn.Identity()))
    assert message in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ classes
@pytest.mark.parametrize(
    ("label", "number"),
    [
        (1, 1), (-1, -1), (np.int64(1), 1), (np.uint8(2), 2), (np.array(1), 1),
        (torch.tensor(1), 1), ("1", 1), ("-1", -1), (" 2 ", 2), ("+1", 1), ("dog", 1),
        (" dog", 1), ("2 emus ", 2),
    ],
)  # fmt: skip
def test_label_names_one_class(label, number):
    assert CLASSES.number(label) == number and type(CLASSES.number(label)) is int
    assert CLASSES.read(label) == (number,)
    assert CLASSES.choose(label, 3, seed=0) == (number,) * 3


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0], (1, 0), ["dog", 0], np.array([1, 0]), torch.tensor([1, 0]), [np.int64(1), "0"],
        [torch.tensor(1), np.uint8(0)], ["dog", " cat"], iter([1, 0]),
    ],
)  # fmt: skip
def test_labels_name_several_classes(labels):
    assert CLASSES.choose(labels, 2, seed=0) == (1, 0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "label 3: classes are 0 to 2 (cat, dog, 2 emus), or -1 for none"),
        (-2, "label -2: classes are 0 to 2"),
        (np.int64(9), "label 9: classes are"),
        ("7", "label 7: classes are"),
        ("cow", "label 'cow': classes are"),
        ("", "label '': classes are"),
        ("--1", "label '--1': classes are"),
        ("1.5", "label '1.5': classes are"),
        ("\u0661", "label '\u0661': classes are"),
        (1.5, "label 1.5: classes are"),
        (1.0, "label 1.0: classes are"),
        (True, "label True: classes are"),
        (np.bool_(True), "classes are"),
        (torch.tensor(1.0), "classes are"),
        (None, "label None: classes are"),
        ([1], "label [1]: classes are"),
        (torch.tensor([1]), "classes are"),
    ],
)
def test_unknown_class_is_refused(label, message):
    for ask in (lambda: CLASSES.number(label), lambda: CLASSES.read([0, label])):
        with pytest.raises(UsageError) as error:
            ask()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_balanced_labels_are_all_classes_in_turn():
    classes = Classes(3, ("cat", "dog", "emu"))
    for given in ("balanced", ["balanced"], ("balanced",)):
        assert classes.read(given) == (0, 1, 2) and classes.describe(given) == "balanced"
        assert classes.choose(given, 7, seed=0) == (0, 1, 2, 0, 1, 2, 0)
    assert classes.describe(["dog", 0]) == [1, 0] and classes.describe(None) is None
    assert labels_slug("balanced") == ["balanced"] and labels_slug([1, 0]) == ["class1_0"]
    named = Classes(2, ("balanced", "other"))
    assert named.read("balanced") == (0,) and named.describe("balanced") == [0]
    with pytest.raises(UsageError, match="has no classes"):
        Classes().read("balanced")


def test_number_of_labels_must_fit():
    with pytest.raises(UsageError, match="3 labels for 2 images: give one, or one per image"):
        CLASSES.choose([0, 1, 2], 2, seed=0)
    for none in ([], (), np.array([], int)):
        with pytest.raises(UsageError, match="labels are empty: give at least one"):
            CLASSES.choose(none, 2, seed=0)
        with pytest.raises(UsageError, match="labels are empty"):
            Classes().read(none)


def test_omitted_labels_are_drawn_uniformly():
    drawn = [CLASSES.draw(5, i) for i in range(600)]
    assert [drawn.count(label) / 600 for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert drawn[3] == generator(5, "class", 3).integers(3)
    assert CLASSES.choose(None, 4, seed=5) == tuple(drawn[:4])


def test_model_without_classes_takes_no_label():
    assert Classes().choose(None, 2, seed=0) is None and Classes().draw(0, 5) == -1
    with pytest.raises(UsageError, match="label -1: this model has no classes; omit labels"):
        Classes().number(-1)


def test_classes_may_have_no_names():
    with pytest.raises(UsageError, match=r"label 5: classes are 0 to 4, or -1 for none"):
        Classes(5).number(5)
