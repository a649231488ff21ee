"""The pipeline people call from Python: what goes in decides what comes out, and nothing else."""

import numpy as np
import pytest
import torch

from diffusion.samplers import make_churn, sample_heun
from diffusion.schedules import karras_sigmas
from ldm.errors import LdmError
from ldm.images import to_uint8
from ldm.seeds import generator, normal
from pipelines.sampling.settings import Churn
from tests.pipelines.untrained import CLASSES, SIZE, pipeline, said

FEW = {"steps": 3}


@pytest.fixture
def pipe():
    return pipeline(0)


@pytest.fixture
def conditional():
    return pipeline(0, CLASSES)


# -------------------------------------------------------------------------------- sampling
def test_it_is_the_sampler_on_the_seeds_noise(pipe):
    noise = normal(7, "sample", range(2), pipe.latent_shape)
    expected = pipe.codec.decode(sample_heun(pipe.denoiser, noise, karras_sigmas(3)))
    assert torch.equal(pipe(2, 7, **FEW), expected)


def test_the_batch_size_does_not_matter(pipe):
    done = []
    together = pipe(5, 3, churn=20, **FEW)
    apart = pipe(5, 3, churn=20, batch_size=2, callback=done.append, progress=True, **FEW)
    assert (together - apart).abs().max() < 1 / 255
    assert done == [2, 4, 5]


def test_churn_is_drawn_for_seed_image_and_step(pipe):
    churned = pipe(2, 1, churn=Churn(S_churn=9, S_min=0.1, S_noise=1.01), **FEW)
    noise, sigmas = normal(1, "sample", range(2), pipe.latent_shape), karras_sigmas(3)

    def draw(step):
        return normal(1, f"churn {step}", range(2), pipe.latent_shape)

    churn = make_churn(sigmas, draw, 9, 0.1, S_noise=1.01, sigma_max=80)
    expected = pipe.codec.decode(sample_heun(pipe.denoiser, noise, sigmas, churn))
    assert torch.equal(churned, expected)
    assert not torch.equal(churned, pipe(2, 1, **FEW))


@pytest.mark.parametrize(
    "setting",
    [
        {"sampler": "euler"},
        {"sampler": "dpmpp-2m"},
        {"schedule": "cosine"},
        {"schedule": "linear"},
        {"sigma_max": 20.0},
        {"sigma_min": 0.1},
        {"steps": 4},
        {"churn": {"S_churn": 5}},
    ],
)
def test_every_setting_changes_the_image(pipe, setting):
    assert not torch.equal(pipe(1, **FEW), pipe(1, **(FEW | setting)))


def test_pictures(pipe):
    pictures = pipe(2, output="pil", **FEW)
    assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 2
    expected = to_uint8(pipe(2, **FEW)[1]).permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(pictures[1]), expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stepz": 3}, "unknown option 'stepz'; did you mean 'steps'?"),
        ({"steps": 0}, "'steps': input should be greater than 0 (got 0)"),
        ({"sampler": "magic"}, "'sampler': input should be 'heun', 'euler' or 'dpmpp-2m'"),
        ({"n": 0}, "n=0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: it must be a whole number"),
        ({"batch_size": "4"}, "batch_size='4': it must be a whole number"),
        ({"n": 1.0}, "n=1.0: it must be a whole number"),
        ({"seed": 0.5}, "seed=0.5: it must be a whole number"),
        ({"output": "numpy"}, "output='numpy': it must be 'tensor' or 'pil'"),
        ({"sigma_max": 81}, "sigma_max=81: this model denoises σ from 0.002 to 80"),
        ({"sigma_min": 2, "sigma_max": 1}, "noise must fall"),
        ({"churn": 3, "sampler": "dpmpp-2m"}, "dpmpp-2m knows no churn"),
        ({"churn": {"S_chum": 3}}, "unknown key 'churn.S_chum'"),
        ({"interval": (3, 2)}, "the interval begins at 3 and must end above it"),
        ({"labels": 3}, "label 3: this model has no classes, leave labels out"),
        ({"guidance": 2}, "needs a weaker model to be guided away from"),
        ({"weaker": "nowhere"}, "a weaker model is for guidance: give guidance"),
    ],
)
def test_options_that_cannot_be(pipe, options, told):
    assert told in said(lambda: pipe(**options))


# ----------------------------------------------------------------------- device, precision
def test_to_takes_devices_and_dtypes(pipe):
    try:
        assert pipe.to(torch.device("cpu"), torch.bfloat16).precision == "bf16"
        assert pipe.to("cpu").precision == "bf16"  # what was asked for stays
        rounded = pipe(1, **FEW)
        assert pipe.to(torch.float32).precision == "fp32"
        assert 0 < (rounded - pipe(1, **FEW)).abs().max() < 0.2
        assert "precision torch.float16: it must be" in said(lambda: pipe.to(torch.float16))
        assert "precision fp8" in said(lambda: pipe.to("cpu", "fp8"))
    finally:
        pipe.to("cpu", "fp32")


# ---------------------------------------------------------------------------------- labels
def test_a_class_by_number_by_name_and_for_each(conditional):
    dog = conditional(2, labels="dog", **FEW)
    assert torch.equal(dog, conditional(2, labels=1, **FEW))
    mixed = conditional(2, labels=["cat", 1], **FEW)
    assert (mixed[1] - dog[1]).abs().max() < 1 / 255
    assert (mixed[0] - dog[0]).abs().max() > 1e-3
    assert torch.equal(mixed, conditional(2, labels=torch.tensor([0, 1]), **FEW))
    none = conditional(2, labels=-1, **FEW)
    noise = normal(0, "sample", range(2), conditional.latent_shape)
    z = sample_heun(conditional.denoiser, noise, karras_sigmas(3))
    assert torch.equal(none, conditional.codec.decode(z))


def test_labels_left_out_are_drawn_evenly(conditional):
    drawn = conditional.classes.draw(5, range(600))
    assert [drawn.count(label) / 600 for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert drawn[3] == generator(5, "class", 3).integers(3)
    given = conditional(3, 5, labels=drawn[:3], **FEW)
    assert torch.equal(conditional(3, 5, **FEW), given)


# ------------------------------------------------------------------------------ not finite
def test_images_that_are_not_finite_are_told(pipe, monkeypatch):
    monkeypatch.setattr(pipe.denoiser, "forward", lambda x, *_: x * torch.nan)
    with pytest.raises(LdmError) as error:
        pipe(3, batch_size=2, **FEW)
    assert "images 0 to 1 came out with numbers that are not finite" in str(error.value)


# --------------------------------------------------------------------------- interpolation
def test_an_interpolation_ends_in_the_seeds_own_samples(pipe):
    way = pipe.interpolate(3, 4, count=5, batch_size=2, **FEW)
    assert way.shape == (5, 3, SIZE, SIZE)
    for end, seed in ((0, 3), (-1, 4)):
        assert (way[end] - pipe(1, seed, **FEW)[0]).abs().max() < 1 / 255
    steps = (way[1:] - way[:-1]).abs().mean(dim=(1, 2, 3))
    assert (steps < (way[0] - way[-1]).abs().mean()).all()


def test_interpolation_that_cannot_be(pipe, conditional):
    assert "count=1" in said(lambda: pipe.interpolate(0, 1, count=1))
    assert "leave churn out" in said(lambda: pipe.interpolate(0, 1, churn=3))
    assert "give labels" in said(lambda: conditional.interpolate(0, 1))
    assert len(conditional.interpolate(0, 1, count=2, labels="cat", **FEW)) == 2
