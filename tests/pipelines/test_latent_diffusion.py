"""The sampling pipeline for Python users: sampling, interpolation, editing, inpainting."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.samplers import inpaint, make_churn, sample_heun
from diffusion.schedules import karras_sigmas
from ldm.errors import LdmError
from ldm.images import to_float, to_uint8
from ldm.seeds import generator, normal
from pipelines.latent_diffusion import fill_hidden, latent_mask, slerp
from pipelines.sampling.settings import Churn
from tests.pipelines.untrained import CLASSES, SIZE, load, make_model, pipeline, said

FEW = {"steps": 3}


@pytest.fixture
def pipe():
    return pipeline(0)


@pytest.fixture
def conditional():
    return pipeline(0, CLASSES)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-1, 1, (3, 3, 4, 4))).float()
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")
    return to_float(to_uint8(smooth))


# -------------------------------------------------------------------------------- sampling
def test_call_runs_the_sampler_on_the_seeds_noise(pipe):
    noise = normal(7, "sample", range(2), pipe.latent_shape)
    expected = pipe.codec.decode(sample_heun(pipe.denoiser, noise, karras_sigmas(3)))
    assert torch.equal(pipe(2, 7, **FEW), expected)


def test_batch_size_does_not_matter(pipe):
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


def test_output_as_pil_images(pipe):
    pictures = pipe(2, output="pil", **FEW)
    assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 2
    expected = to_uint8(pipe(2, **FEW)[1]).permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(pictures[1]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 3}, "unknown option 'stepz'; did you mean 'steps'?"),
        ({"S_churn": 3}, "unknown option 'S_churn'; did you mean 'churn'?"),
        ({"steps": 0}, "'steps': input should be greater than 0 (got 0)"),
        ({"sampler": "magic"}, "'sampler': input should be 'heun', 'euler' or 'dpmpp-2m'"),
        ({"n": 0}, "n=0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: it must be a whole number"),
        ({"batch_size": "4"}, "batch_size='4': it must be a whole number"),
        ({"n": 1.0}, "n=1.0: it must be a whole number"),
        ({"seed": 0.5}, "seed=0.5: it must be a whole number"),
        ({"output": "numpy"}, "'output': input should be 'tensor' or 'pil' (got 'numpy')"),
        ({"sigma_max": 81}, "sigma_max=81: this model denoises σ from 0.002 to 80"),
        ({"sigma_min": 2, "sigma_max": 1}, "noise must fall"),
        (
            {"churn": 3, "sampler": "dpmpp-2m"},
            "dpmpp-2m does not support churn: use sampler=heun",
        ),
        ({"churn": {"S_chum": 3}}, "unknown key 'churn.S_chum'"),
        ({"interval": (3, 2)}, "interval (3, 2): the second number must be larger"),
        ({"labels": 3}, "label 3: this model has no classes; omit labels"),
        ({"guidance": 2}, "a model without classes cannot guide itself: give a guide"),
        ({"guide": "nowhere"}, "a guide has no effect without guidance: set guidance"),
    ],
)
def test_invalid_options_are_refused(pipe, options, message):
    assert message in said(lambda: pipe(**options))


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
def test_labels_by_number_by_name_and_per_image(conditional):
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


def test_omitted_labels_are_drawn_uniformly(conditional):
    drawn = conditional.classes.choose(None, 600, 5)
    assert [drawn.count(label) / 600 for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert drawn[3] == generator(5, "class", 3).integers(3)
    given = conditional(3, 5, labels=drawn[:3], **FEW)
    assert torch.equal(conditional(3, 5, **FEW), given)


# ------------------------------------------------------------------------------ not finite
def test_images_that_are_not_finite_are_an_error(pipe, monkeypatch):
    monkeypatch.setattr(pipe.denoiser, "forward", lambda x, *_, **__: x * torch.nan)
    with pytest.raises(LdmError) as error:
        pipe(3, batch_size=2, **FEW)
    assert "images 0 to 1 are not finite" in str(error.value)


# --------------------------------------------------------------------------- interpolation
def test_interpolation_ends_in_the_seeds_own_samples(pipe):
    way = pipe.interpolate(3, 4, count=5, batch_size=2, **FEW)
    assert way.shape == (5, 3, SIZE, SIZE)
    for end, seed in ((0, 3), (-1, 4)):
        assert (way[end] - pipe(1, seed, **FEW)[0]).abs().max() < 1 / 255
    steps = (way[1:] - way[:-1]).abs().mean(dim=(1, 2, 3))
    assert (steps < (way[0] - way[-1]).abs().mean()).all()


def test_invalid_interpolation_is_refused(pipe, conditional):
    assert "count=1" in said(lambda: pipe.interpolate(0, 1, count=1))
    assert "omit churn" in said(lambda: pipe.interpolate(0, 1, churn=3))
    assert "needs labels" in said(lambda: conditional.interpolate(0, 1))
    assert len(conditional.interpolate(0, 1, count=2, labels="cat", **FEW)) == 2


def test_slerp_stays_on_the_sphere():
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


# --------------------------------------------------------------------------------- editing
def test_strength_0_reconstructs_and_1_samples_anew(pipe, images):
    untouched = pipe.edit(images, strength=0, **FEW)
    assert torch.equal(untouched, pipe.codec.decode(pipe.codec.encode(images)))
    assert torch.equal(pipe.edit(images, strength=1, seed=2, **FEW), pipe(3, 2, **FEW))


def test_edit_starts_within_the_schedule(pipe, images):
    sigmas = karras_sigmas(4)
    noise = normal(5, "sample", range(3), pipe.latent_shape)
    start = pipe.codec.encode(images) + sigmas[2] * noise.double()
    z = sample_heun(pipe.denoiser, noise, sigmas[2:], start=start)
    edited = pipe.edit(images, strength=0.5, seed=5, steps=4)
    assert torch.equal(edited, pipe.codec.decode(z))


def test_edit_takes_pil_images(pipe, images):
    pictures = [Image.fromarray(to_uint8(i).permute(1, 2, 0).numpy()) for i in images]
    assert torch.equal(pipe.edit(pictures, 0.5, steps=2), pipe.edit(images, 0.5, steps=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i[0], "images are (3, 32, 32), not (B, 3, 32, 32)"),
        (lambda i: i[..., :24], "images are (3, 3, 32, 24)"),
        (lambda i: i[:0], "images are (0, 3, 32, 32)"),
        (lambda i: i * 2, "must be floating point in [−1, 1]"),
        (lambda i: i * torch.nan, "must be floating point in [−1, 1]"),
        (lambda i: to_uint8(i), "must be floating point in [−1, 1]"),
        (lambda i: [], "give at least one"),
        (lambda i: [Image.new("RGB", (32, 32)), Image.new("RGB", (8, 8))], "all of one size"),
    ],
)
def test_invalid_images_are_refused(pipe, images, change, message):
    assert message in said(lambda: pipe.edit(change(images)))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_invalid_strength_is_refused(pipe, images, strength):
    assert "must lie between 0 and 1" in said(lambda: pipe.edit(images, strength))


# ------------------------------------------------------------------------------ inpainting
@pytest.fixture
def mask():
    """A window, off the grid of latents' patches, of each of three images."""
    mask = torch.zeros(3, 1, SIZE, SIZE)
    mask[:, :, 5:18, 7:30] = 1
    return mask


def test_inpaint_changes_only_masked_pixels(pipe, images, mask):
    painted = pipe.inpaint(images, mask, batch_size=2, **FEW)
    hidden = mask.bool().expand_as(images)
    assert torch.equal(painted[~hidden], images[~hidden])
    assert (painted[hidden] != images[hidden]).float().mean() > 0.9


def test_inpaint_ignores_masked_pixels(pipe, images, mask):
    changed = torch.where(mask > 0, -images.flip(0), images)
    assert torch.equal(pipe.inpaint(images, mask, **FEW), pipe.inpaint(changed, mask, **FEW))


def test_inpaint_holds_the_known_latents(pipe, images, mask):
    """Rebuilt from the parts: fill hidden pixels, encode, hold latents that are fully known."""
    sigmas = karras_sigmas(3)
    known, where = pipe.codec.encode(fill_hidden(images, mask)), latent_mask(mask, (4, 4))

    def draw(step):
        return normal(5, f"churn {step}", range(3), pipe.latent_shape)

    noise = normal(5, "sample", range(3), pipe.latent_shape)
    churn = make_churn(sigmas, draw, math.inf, sigma_max=80)
    z = sample_heun(inpaint(pipe.denoiser, known, where), noise, sigmas, churn)
    painted = torch.where(mask > 0, pipe.codec.decode(z), images)
    assert torch.equal(pipe.inpaint(images, mask, seed=5, **FEW), painted)


def test_empty_and_full_masks(pipe, images):
    none = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    assert torch.equal(pipe.inpaint(images, none, **FEW), images)
    whole = pipe.inpaint(images, ~none, seed=4, churn=0, **FEW)
    torch.testing.assert_close(whole, pipe(3, 4, **FEW), atol=1e-6, rtol=0)


def test_inpaint_churns_fully_by_default(pipe, images, mask):
    much = pipe.inpaint(images, mask, churn=float("inf"), **FEW)
    assert torch.equal(pipe.inpaint(images, mask, **FEW), much)
    assert not torch.equal(pipe.inpaint(images, mask, churn=0, **FEW), much)
    assert pipe.inpaint(images, mask, sampler="dpmpp-2m", **FEW).shape == images.shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 1, 16, 16), "mask is (3, 1, 16, 16), not (3, 1, 32, 32)"),
        (torch.zeros(2, 1, SIZE, SIZE), "mask is (2, 1, 32, 32)"),
        (torch.zeros(3, 3, SIZE, SIZE), "mask is (3, 3, 32, 32)"),
        (torch.zeros(SIZE, SIZE), "mask is (32, 32)"),
        (torch.full((1, 1, SIZE, SIZE), 0.5), "1 where to generate and 0 elsewhere"),
    ],
)
def test_invalid_masks_are_refused(pipe, images, wrong, message):
    assert message in said(lambda: pipe.inpaint(images, wrong))


def test_churn_stays_within_the_levels_of_a_discrete_model(images, mask, tmp_path, monkeypatch):
    pipe = load(make_model(tmp_path, 0, settings=("denoiser={type: discrete}",)))
    asked, denoise = [], pipe.denoiser.forward

    def watched(x, sigma, **how):
        asked.append(float(sigma))
        return denoise(x, sigma, **how)

    monkeypatch.setattr(pipe.denoiser, "forward", watched)
    pipe.inpaint(images, mask, **FEW)
    assert max(asked) == pytest.approx(pipe.denoiser.sigma_max) and len(asked) == 5
    assert len(set(asked)) > 3, "noise is raised below it"


# ------------------------------------------------------------------------------------- masks
def test_hidden_pixels_become_the_mean_of_known_neighbours():
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4) / 16
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0, 0] = 1  # its square of 2 knows 1, 4 and 5
    mask[..., 2:, 2:] = 1  # a square of 2 that knows nothing: the mean of the other three
    filled = fill_hidden(images, mask)
    assert torch.equal(torch.where(mask > 0, 0, filled), torch.where(mask > 0, 0, images))
    assert torch.allclose(filled[0, :, 0, 0], torch.tensor((1 + 4 + 5) / 3 / 16))
    # all eleven count alike, however many of a square of 2 there are
    eleven = (1 + 4 + 5) + (2 + 3 + 6 + 7) + (8 + 9 + 12 + 13)
    assert torch.allclose(filled[0, :, 2:, 2:], torch.tensor(eleven / 11 / 16))


def test_mean_is_over_the_smallest_square_with_known_pixels():
    """Square by square, on sides that are no powers of 2."""
    torch.manual_seed(0)
    images, mask = torch.rand(1, 3, 11, 6), (torch.rand(1, 1, 11, 6) < 0.95).float()
    filled = fill_hidden(images, mask)
    for row in range(11):
        for column in range(6):
            side, at = 1, (..., slice(row, row + 1), slice(column, column + 1))
            while mask[at].all():
                side *= 2
                top, left = row // side * side, column // side * side
                at = (..., slice(top, top + side), slice(left, left + side))
            known = mask[at] == 0
            mean = images[at][known.expand_as(images[at])].view(3, -1).mean(1)
            assert torch.allclose(filled[0, :, row, column], mean)


def test_constant_image_is_filled_with_its_colour():
    torch.manual_seed(0)
    for sides in ((13, 7), (1, 5), (32, 32)):
        mask = (torch.rand(2, 1, *sides) < 0.8).float()
        mask[..., 0, 0] = 0
        images = torch.full((2, 3, *sides), 0.3)
        assert torch.allclose(fill_hidden(images, mask), images)


def test_hidden_values_are_ignored_and_nothing_known_is_grey():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:7, 1:6] = 1
    images = torch.rand(1, 3, 8, 8)
    changed = torch.where(mask > 0, -images, images)
    assert torch.equal(fill_hidden(images, mask), fill_hidden(changed, mask))
    assert (fill_hidden(images, torch.ones_like(mask)) == 0).all()


def test_latent_is_hidden_if_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 7, 8] = 1
    assert torch.equal(latent_mask(mask, (2, 2)), torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]))
