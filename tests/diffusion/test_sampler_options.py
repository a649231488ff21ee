"""What samplers can be told: to churn, to begin in the midst, and whom to show their steps."""

import math

import pytest
import torch

from diffusion.samplers import SAMPLERS, make_churn, sample_euler, sample_heun
from diffusion.schedules import karras_sigmas
from ldm.errors import UsageError
from ldm.seeds import normal
from tests.diffusion import known_answers

samplers = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS.keys())
churned = pytest.mark.parametrize("sample", [sample_heun, sample_euler])

MEAN, STD = 0.3, 0.7
denoise_gaussian = known_answers.gaussian(MEAN, STD)


def noise(count=3, purpose="start", shape=(2, 4, 4)):
    return normal(0, purpose, range(count), shape)


def draw(step):
    return noise(purpose=f"churn {step}")


@churned
def test_churned_samples_keep_the_distribution(sample):
    """Fresh noise moves every sample, yet leaves their mean and spread as they are."""
    sigmas = karras_sigmas(1000 if sample is sample_euler else 100)
    start = noise(4, "many", (1, 64, 64))
    churn = make_churn(sigmas, lambda i: noise(4, f"many {i}", (1, 64, 64)), 20)
    out = sample(denoise_gaussian, start, sigmas, churn)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, abs=0.02)
    plain = sample(denoise_gaussian, start, sigmas)
    assert torch.corrcoef(torch.stack([out.flatten(), plain.flatten()]))[0, 1] < 0.5


@churned
def test_no_churn_draws_nothing_and_changes_nothing(sample):
    sigmas = karras_sigmas(8)
    plain = sample(denoise_gaussian, noise(), sigmas)
    for churn in (
        make_churn(sigmas, lambda i: pytest.fail("drew noise"), 0),
        make_churn(sigmas, lambda i: pytest.fail("drew noise"), 10, S_min=100.0),
    ):
        assert torch.equal(sample(denoise_gaussian, noise(), sigmas, churn), plain)


@churned
@pytest.mark.parametrize("sigma_max", [14.0, 5.0])
def test_churn_goes_no_higher_than_the_denoiser_knows(sample, sigma_max):
    """As Algorithm 2 below that level; at it, and above it, nothing is drawn."""
    sigmas, asked, drawn = karras_sigmas(8, 0.03, 14.0), [], []

    def denoise(x, sigma):
        asked.append(sigma.item())
        return denoise_gaussian(x, sigma)

    def drawing(step):
        drawn.append(step)
        return draw(step)

    sample(denoise, noise(), sigmas, make_churn(sigmas, drawing, math.inf, sigma_max=sigma_max))
    raised = [min(s * math.sqrt(2), sigma_max) for s in sigmas[:-1].tolist()]
    expected = [max(pair) for pair in zip(raised, sigmas[:-1].tolist(), strict=True)]
    first = asked if sample is sample_euler else asked[::2]  # Heun's second question is σ_next
    assert first == pytest.approx(expected)
    assert drawn == [i for i, s in enumerate(sigmas[:-1].tolist()) if s < sigma_max]
    # the variance that was added is that between the two levels
    churn = make_churn(sigmas, draw, math.inf, sigma_max=sigma_max)
    x, sigma = noise().double(), sigmas[sigmas < sigma_max][0]
    x_hat, sigma_hat = churn(x, sigma)
    step = int((sigmas > sigma).sum())
    torch.testing.assert_close(x_hat - x, (sigma_hat**2 - sigma**2).sqrt() * draw(step).double())


@pytest.mark.parametrize(
    "amounts",
    [(-1.0,), (math.nan,), (1.0, 3.0, 2.0), (1.0, 0.0, 9.0, math.inf), (1.0, 0.0, 9.0, -1.0)],
)
def test_churn_that_cannot_be_is_refused(amounts):
    with pytest.raises(UsageError, match="churn needs S_churn ≥ 0, S_min ≤ S_max"):
        make_churn(karras_sigmas(4), draw, *amounts)


@samplers
def test_the_callback_sees_every_step(sample):
    sigmas, asked, seen = karras_sigmas(6), [], []

    def denoise(x, sigma):
        denoised = denoise_gaussian(x, sigma)
        asked.append((float(sigma), denoised))
        return denoised

    out = sample(
        denoise,
        noise(),
        sigmas,
        callback=lambda step, x, denoised: seen.append((step, x, denoised)),
    )
    assert [step for step, _, _ in seen] == list(range(6))
    assert torch.equal(seen[-1][1], out)
    # the last answer at a noise level is that for the state a step set out from
    answers = dict(asked)
    for (step, x, denoised), sigma in zip(seen, sigmas, strict=False):
        assert torch.equal(denoised, answers[sigma.item()])
        # the state at the step's end is what a schedule that breaks off there comes to
        assert torch.equal(x, sample(denoise_gaussian, noise(), sigmas[: step + 2]))


@churned
def test_a_start_in_the_midst_goes_on_as_the_whole_would_have(sample):
    sigmas, states = karras_sigmas(10), []
    churn = make_churn(sigmas, draw, 3)
    whole = sample(
        denoise_gaussian, noise(), sigmas, churn, callback=lambda i, x, d: states.append(x)
    )
    rest = sample(denoise_gaussian, noise(purpose="other"), sigmas[4:], churn, start=states[3])
    assert torch.equal(rest, whole)


@samplers
def test_a_start_takes_the_place_of_the_noise(sample):
    sigmas = karras_sigmas(10)[4:]
    from_noise = sample(denoise_gaussian, noise(), sigmas)
    start = noise().double() * sigmas[0]
    from_start = sample(denoise_gaussian, noise(purpose="other"), sigmas, start=start)
    assert torch.equal(from_start, from_noise)
    assert torch.equal(start, noise().double() * sigmas[0]), "the start was written to"


@samplers
def test_a_little_noise_on_an_image_leads_back_to_it(sample):
    """SDEdit: from noise far below what parts four images, each comes back as it was."""
    images = normal(0, "data", range(4), (2, 4, 4)).double()
    sigmas = karras_sigmas(12, 0.002, 0.5)
    start = images + noise(4) * sigmas[0]
    out = sample(known_answers.dataset(images), noise(4), sigmas, start=start)
    torch.testing.assert_close(out, images, rtol=0, atol=1e-6)


@samplers
def test_a_start_of_another_shape_is_refused(sample):
    with pytest.raises(UsageError, match=r"shape \(3, 2, 4, 4\), not \(1, 2, 4, 4\)"):
        sample(denoise_gaussian, noise(), karras_sigmas(4), start=noise(1))
