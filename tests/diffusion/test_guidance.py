"""Guidance and inpainting, where the outcome is known in closed form."""

import math

import pytest
import torch

from diffusion.samplers import SAMPLERS, guide, inpaint, make_churn, sample_euler, sample_heun
from diffusion.schedules import karras_sigmas
from ldm.errors import UsageError
from ldm.seeds import normal
from tests.diffusion import known_answers

samplers = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS.keys())


def noise(count=3, shape=(2, 4, 4)):
    return normal(0, "start", range(count), shape)


class Counting:
    """A denoiser that keeps the σ it was asked at."""

    def __init__(self, denoise):
        self.denoise, self.asked = denoise, []

    def __call__(self, x, sigma):
        self.asked.append(float(sigma))
        return self.denoise(x, sigma)


# -------------------------------------------------------------------------------- guidance
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_two_gaussians_guide_to_a_third(scale):
    """D is linear in the mean: guidance between N(0.1, s²) and N(0.4, s²) is N(their line, s²)."""
    strong, weak = known_answers.gaussian(0.4, 0.7), known_answers.gaussian(0.1, 0.7)
    mean = 0.1 + scale * (0.4 - 0.1)
    x = 3 * noise().double()
    torch.testing.assert_close(
        guide(strong, weak, scale)(x, torch.tensor(1.5, dtype=torch.float64)),
        known_answers.gaussian(mean, 0.7)(x, 1.5),
        rtol=1e-12,
        atol=1e-12,
    )
    out = sample_heun(guide(strong, weak, scale), noise(), karras_sigmas(400))
    exact = known_answers.gaussian_path(80 * noise().double(), 80, 0, mean, 0.7)
    torch.testing.assert_close(out, exact, rtol=0, atol=2e-4)


def test_guidance_sharpens_as_the_product_of_densities_does():
    """Of N(m, 1) against N(m, 4) at one σ: score = score_weak + w (score_strong − score_weak)."""
    strong, weak, w, sigma = known_answers.gaussian(0.3, 1), known_answers.gaussian(0.3, 2), 3, 0.8
    x = noise().double()
    score = -(x - 0.3) * (1 / (4 + sigma**2) + w * (1 / (1 + sigma**2) - 1 / (4 + sigma**2)))
    denoised = guide(strong, weak, w)(x, torch.tensor(sigma, dtype=torch.float64))
    # Karras et al. 2022, Eq. 3: score = (D − x) / σ²
    torch.testing.assert_close((denoised - x) / sigma**2, score, rtol=1e-12, atol=1e-12)


def test_weak_is_not_evaluated_at_scale_1():
    strong = Counting(known_answers.gaussian(0.4, 0.7))
    alone = sample_heun(strong.denoise, noise(), karras_sigmas(6))
    guided = guide(strong, lambda x, sigma: pytest.fail("asked the weak one"), 1.0)
    assert torch.equal(sample_heun(guided, noise(), karras_sigmas(6)), alone)
    assert len(strong.asked) == 11


def test_weak_is_evaluated_only_inside_the_interval():
    sigmas = karras_sigmas(20)
    low, high = sigmas[12].item(), sigmas[7].item()
    strong = Counting(known_answers.gaussian(0.4, 0.7))
    weak = Counting(known_answers.gaussian(0.1, 0.7))
    sample_euler(guide(strong, weak, 2.0, (low, high)), noise(), sigmas)
    assert strong.asked == sigmas[:-1].tolist()
    assert weak.asked == sigmas[7:12].tolist(), "low < σ ≤ high"


def test_outside_the_interval_the_strong_one_answers():
    strong, weak = known_answers.gaussian(0.4, 0.7), known_answers.gaussian(0.1, 0.7)
    guided, x = guide(strong, weak, 2.0, (0.5, 3.0)), noise().double()
    for sigma in (0.2, 0.5, 3.1):
        assert torch.equal(guided(x, torch.tensor(sigma)), strong(x, torch.tensor(sigma)))
    for sigma in (0.51, 3.0):
        assert not torch.allclose(guided(x, torch.tensor(sigma)), strong(x, torch.tensor(sigma)))


@pytest.mark.parametrize("interval", [(-1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 1.0)])
def test_an_interval_that_holds_nothing_is_refused(interval):
    with pytest.raises(UsageError, match="low < σ ≤ high"):
        guide(known_answers.gaussian(0, 1), known_answers.gaussian(0, 1), 2.0, interval)


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(UsageError, match="finite scale"):
        guide(known_answers.gaussian(0, 1), known_answers.gaussian(0, 1), scale)


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.5, 3.0)])
def test_guidance_of_some_channels_leaves_the_others_to_the_strong_one(interval):
    strong, weak = known_answers.gaussian(0.4, 0.7), known_answers.gaussian(0.1, 0.7)
    x = noise(shape=(4, 3, 3)).double()
    some = guide(strong, weak, 4.0, interval, channels=3)
    for sigma in (torch.tensor(0.2), torch.tensor(1.0)):
        every = guide(strong, weak, 4.0, interval)(x, sigma)
        assert torch.equal(some(x, sigma)[:, :3], every[:, :3])
        assert torch.equal(some(x, sigma)[:, 3:], strong(x, sigma)[:, 3:])
    assert not torch.equal(every[:, 3:], strong(x, sigma)[:, 3:])


def test_guidance_of_no_channel_is_refused():
    with pytest.raises(UsageError, match="acts on 1 channel or more, not on 0"):
        guide(known_answers.gaussian(0, 1), known_answers.gaussian(0, 1), 2.0, channels=0)


# ------------------------------------------------------------------------------ inpainting
KNOWN = normal(0, "known", range(3), (2, 4, 4))
LEFT = torch.zeros(3, 1, 4, 4)
LEFT[..., :2] = 1  # the left half is to be made


@samplers
def test_the_known_part_ends_as_it_was_bit_for_bit(sample):
    denoise = inpaint(known_answers.gaussian(0.3, 0.7), KNOWN, LEFT)
    out = sample(denoise, noise(), karras_sigmas(7))
    assert torch.equal(out[..., 2:], KNOWN[..., 2:].double())
    assert not torch.isclose(out[..., :2].float(), KNOWN[..., :2]).any()


@samplers
def test_the_known_part_stands_on_its_line_of_noise_at_every_step(sample):
    """dx/dσ = (x − z) / σ has the solution x = z + σ n, which all samplers follow exactly."""
    sigmas, states = karras_sigmas(9), []
    denoise = inpaint(known_answers.gaussian(0.3, 0.7), KNOWN, LEFT)
    start = KNOWN.double() + noise().double() * sigmas[0]
    sample(denoise, noise(), sigmas, start=start, callback=lambda i, x, d: states.append(x))
    for sigma, x in zip(sigmas[1:], states, strict=True):
        on_line = KNOWN.double() + sigma * noise().double()
        torch.testing.assert_close(x[..., 2:], on_line[..., 2:], rtol=0, atol=1e-12)


@samplers
def test_where_pixels_are_independent_the_rest_is_as_without_inpainting(sample):
    plain = known_answers.gaussian(0.3, 0.7)
    out = sample(inpaint(plain, KNOWN, LEFT), noise(), karras_sigmas(9))
    assert torch.equal(out[..., :2], sample(plain, noise(), karras_sigmas(9))[..., :2])


def test_of_a_data_set_the_image_that_fits_is_made():
    """One half of one of four images is known: four samples in five complete that very image."""
    images, sigmas, hits = normal(0, "data", range(4), (2, 4, 4)), karras_sigmas(100), 0
    for image in images.split(1):
        denoise = inpaint(known_answers.dataset(images), image, LEFT[:1])
        churn = make_churn(sigmas, lambda i: normal(1, f"churn {i}", range(16), (2, 4, 4)), 100)
        out = sample_heun(denoise, noise(16), sigmas, churn)
        hits += ((out - image).abs().amax(dim=(1, 2, 3)) < 1e-3).sum().item()
    assert hits / 64 >= 0.8


def test_churn_brings_the_rest_near_its_conditional_distribution():
    """Two values of correlation 0.8, one known to be 1: the other is N(0.8, 0.6²)."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    plain = known_answers.correlated_gaussian(torch.zeros(1, 1, 2), covariance)
    denoise = inpaint(plain, torch.ones(1, 1, 1, 2), torch.tensor([[[[0.0, 1.0]]]]))
    sigmas, means = karras_sigmas(400), []
    for S_churn in (0, 80, 165):
        churn = make_churn(
            sigmas, lambda i: normal(1, f"churn {i}", [0], (4000, 1, 2))[0][:, None], S_churn
        )
        made = sample_heun(denoise, normal(0, "many", [0], (4000, 1, 2))[0][:, None], sigmas, churn)
        means.append(made[..., 1].mean().item())
    assert means[0] < 0.5, "without churn the rest follows too little"
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(0.8, abs=0.1)
    assert made[..., 1].std().item() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (1, 1, 4, 4), (1, 2, 4, 4)])
def test_a_mask_of_any_fitting_shape_does_the_same(shape):
    whole = inpaint(known_answers.gaussian(0.3, 0.7), KNOWN, LEFT)
    mask = LEFT[: shape[0]].expand(shape).bool()
    other = inpaint(known_answers.gaussian(0.3, 0.7), KNOWN, mask)
    x = noise().double()
    assert torch.equal(other(x, torch.tensor(2.0)), whole(x, torch.tensor(2.0)))


def test_a_soft_mask_blends():
    plain = known_answers.gaussian(0.3, 0.7)
    x, sigma = noise().double(), torch.tensor(2.0)
    blended = inpaint(plain, KNOWN, torch.full((1, 1, 4, 4), 0.25))(x, sigma)
    torch.testing.assert_close(blended, 0.25 * plain(x, sigma) + 0.75 * KNOWN.double())


def test_one_known_picture_serves_a_whole_batch():
    out = sample_heun(
        inpaint(known_answers.gaussian(0.3, 0.7), KNOWN[:1], LEFT[:1]), noise(), karras_sigmas(4)
    )
    assert torch.equal(out[..., 2:], KNOWN[:1, ..., 2:].double().expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    "known, mask",
    [
        ((3, 2, 4, 4), (3, 1, 8, 8)),  # the mask in pixels, not in latents
        ((3, 2, 4, 4), (2, 1, 4, 4)),
        ((3, 2, 4, 4), (3, 4, 4)),  # the axis of channels forgotten
        ((2, 4, 4), (2, 4, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(known, mask):
    with pytest.raises(UsageError, match=r"takes known \(B, C, H, W\) and a mask") as refused:
        inpaint(known_answers.gaussian(0, 1), torch.zeros(known), torch.zeros(mask))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (3, 2, 8, 8), (3, 4, 4, 4)])
def test_an_x_that_does_not_fit_is_refused(shape):
    denoise = inpaint(known_answers.gaussian(0, 1), KNOWN, LEFT)
    with pytest.raises(UsageError, match="do not fit x"):
        denoise(torch.zeros(shape, dtype=torch.float64), torch.tensor(1.0))


@pytest.mark.parametrize("value", [255.0, -1.0, math.nan])
def test_a_mask_outside_0_to_1_is_refused(value):
    with pytest.raises(UsageError, match=r"mask lies in \[0, 1\]"):
        inpaint(known_answers.gaussian(0, 1), KNOWN, value * LEFT)
