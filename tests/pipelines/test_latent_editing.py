"""Images changed in part: SDEdit and inpainting."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.guidance import inpaint
from diffusion.samplers import make_churn, sample_heun
from diffusion.schedules import karras_sigmas
from ldm.images import to_float, to_uint8
from ldm.seeds import normal
from pipelines.sampling.settings import fill_hidden, latent_mask
from tests.pipelines.untrained import SIZE, load, make_model, pipeline, said

FEW = {"steps": 3}


@pytest.fixture
def pipe():
    return pipeline(0)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (3, 3, 4, 4))).float()
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")
    return to_float(to_uint8(smooth))


# --------------------------------------------------------------------------------- editing
def test_the_ends_of_editing(pipe, images):
    untouched = pipe.edit(images, strength=0, **FEW)
    assert torch.equal(untouched, pipe.codec.decode(pipe.codec.encode(images)))
    assert torch.equal(pipe.edit(images, strength=1, seed=2, **FEW), pipe(3, 2, **FEW))


def test_editing_starts_in_the_midst_of_the_schedule(pipe, images):
    sigmas = karras_sigmas(4)
    noise = normal(5, "sample", range(3), pipe.latent_shape)
    start = pipe.codec.encode(images) + sigmas[2] * noise.double()
    z = sample_heun(pipe.denoiser, noise, sigmas[2:], start=start)
    edited = pipe.edit(images, strength=0.5, seed=5, steps=4)
    assert torch.equal(edited, pipe.codec.decode(z))


def test_pictures_go_in_too(pipe, images):
    pictures = [Image.fromarray(to_uint8(i).permute(1, 2, 0).numpy()) for i in images]
    assert torch.equal(pipe.edit(pictures, 0.5, steps=2), pipe.edit(images, 0.5, steps=2))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda i: i[0], "the images are (3, 32, 32): they must be (B, 3, 32, 32)"),
        (lambda i: i[..., :24], "the images are (3, 3, 32, 24)"),
        (lambda i: i[:0], "the images are (0, 3, 32, 32)"),
        (lambda i: i * 2, "must be floating point in [−1, 1]"),
        (lambda i: i * torch.nan, "must be floating point in [−1, 1]"),
        (lambda i: to_uint8(i), "must be floating point in [−1, 1]"),
        (lambda i: [], "0 pictures"),
        (lambda i: [Image.new("RGB", (32, 32)), Image.new("RGB", (8, 8))], "all of one size"),
    ],
)
def test_images_that_cannot_be_edited(pipe, images, change, told):
    assert told in said(lambda: pipe.edit(change(images)))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strengths_that_cannot_be(pipe, images, strength):
    assert "must lie between 0 and 1" in said(lambda: pipe.edit(images, strength))


# ------------------------------------------------------------------------------ inpainting
@pytest.fixture
def mask():
    """A window, off the grid of latents' patches, of each of three images."""
    mask = torch.zeros(3, 1, SIZE, SIZE)
    mask[:, :, 5:18, 7:30] = 1
    return mask


def test_known_pixels_stay_exactly_and_the_others_change(pipe, images, mask):
    painted = pipe.inpaint(images, mask, batch_size=2, **FEW)
    hidden = mask.bool().expand_as(images)
    assert torch.equal(painted[~hidden], images[~hidden])
    assert (painted[hidden] != images[hidden]).float().mean() > 0.9


def test_what_is_under_the_mask_is_not_looked_at(pipe, images, mask):
    changed = torch.where(mask > 0, -images.flip(0), images)
    assert torch.equal(pipe.inpaint(images, mask, **FEW), pipe.inpaint(changed, mask, **FEW))


def test_the_known_part_is_held_while_the_new_one_is_made(pipe, images, mask):
    """Step by step from the parts: what is hidden filled in, encoded, held where all is known."""
    sigmas = karras_sigmas(3)
    known, where = pipe.codec.encode(fill_hidden(images, mask)), latent_mask(mask, (4, 4))

    def draw(step):
        return normal(5, f"churn {step}", range(3), pipe.latent_shape)

    noise = normal(5, "sample", range(3), pipe.latent_shape)
    churn = make_churn(sigmas, draw, math.inf, sigma_max=80)
    z = sample_heun(inpaint(pipe.denoiser, known, where), noise, sigmas, churn)
    painted = torch.where(mask > 0, pipe.codec.decode(z), images)
    assert torch.equal(pipe.inpaint(images, mask, seed=5, **FEW), painted)


def test_nothing_and_everything_hidden(pipe, images):
    none = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    assert torch.equal(pipe.inpaint(images, none, **FEW), images)
    whole = pipe.inpaint(images, ~none, seed=4, churn=0, **FEW)
    torch.testing.assert_close(whole, pipe(3, 4, **FEW), atol=1e-6, rtol=0)


def test_churn_of_inpainting_is_much_or_as_asked(pipe, images, mask):
    much = pipe.inpaint(images, mask, churn=float("inf"), **FEW)
    assert torch.equal(pipe.inpaint(images, mask, **FEW), much)
    assert not torch.equal(pipe.inpaint(images, mask, churn=0, **FEW), much)
    assert pipe.inpaint(images, mask, sampler="dpmpp-2m", **FEW).shape == images.shape


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (torch.zeros(3, 1, 16, 16), "the mask is (3, 1, 16, 16): it must be (3, 1, 32, 32)"),
        (torch.zeros(2, 1, SIZE, SIZE), "the mask is (2, 1, 32, 32)"),
        (torch.zeros(3, 3, SIZE, SIZE), "the mask is (3, 3, 32, 32)"),
        (torch.zeros(SIZE, SIZE), "the mask is (32, 32)"),
        (torch.full((1, 1, SIZE, SIZE), 0.5), "1 where to paint and 0 elsewhere"),
    ],
)
def test_masks_that_cannot_be(pipe, images, wrong, told):
    assert told in said(lambda: pipe.inpaint(images, wrong))


def test_noise_is_raised_no_higher_than_a_discrete_model_knows(images, mask, tmp_path, monkeypatch):
    pipe = load(make_model(tmp_path, 0, settings=("denoiser={type: discrete}",)))
    asked, denoise = [], pipe.denoiser.forward

    def watched(x, sigma, *how):
        asked.append(float(sigma))
        return denoise(x, sigma, *how)

    monkeypatch.setattr(pipe.denoiser, "forward", watched)
    pipe.inpaint(images, mask, **FEW)
    assert max(asked) == pytest.approx(pipe.denoiser.sigma_max) and len(asked) == 5
    assert len(set(asked)) > 3, "noise is raised below it"
