"""Samplers against their papers, other libraries and closed forms; churn, starts and callbacks."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffusion import EDM, UNet, UNetConfig
from diffusion.samplers import SAMPLERS, make_churn, sample_dpmpp_2m, sample_euler, sample_heun
from diffusion.schedules import SCHEDULES, karras_sigmas
from ldm.errors import UsageError
from ldm.seeds import normal
from tests.diffusion import known_answers

samplers = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS.keys())
churned = pytest.mark.parametrize("sample", [sample_heun, sample_euler])

MEAN, STD = 0.3, 0.7
denoise_gaussian = known_answers.gaussian(MEAN, STD)

# Two values a sample, three unequal components
MEANS = torch.tensor([[-1.0, 0.0], [0.8, 0.6], [0.5, -0.9]], dtype=torch.float64).view(3, 2, 1, 1)
STDS = torch.tensor([0.15, 0.1, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
denoise_mixture = known_answers.mixture(MEANS, STDS, WEIGHTS)


def noise(count=3, purpose="start", shape=(2, 4, 4)):
    return normal(0, purpose, range(count), shape)


def draw(step):
    return noise(purpose=f"churn {step}")


def enough(sample) -> int:
    """Steps after which what is left of the error is below the tolerances here."""
    return 1000 if sample is sample_euler else 100


# ------------------------------------------------------------------------- the algorithms
def algorithm_2(denoise, start, sigmas, draw, S_churn, S_min, S_max, S_noise, second_order=True):
    """Karras et al. 2022, Algorithm 2, value by value in Python's floats."""
    steps, samples = len(sigmas) - 1, []
    draws = [draw(i).double().flatten().tolist() for i in range(steps)]
    for index, first in enumerate(start.double().flatten().tolist()):
        x = first * sigmas[0]
        for i in range(steps):
            t, t_next = sigmas[i], sigmas[i + 1]
            gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= t <= S_max else 0
            epsilon = draws[i][index] * S_noise
            t_hat = t + gamma * t
            x_hat = x + math.sqrt(t_hat**2 - t**2) * epsilon
            d = (x_hat - denoise(x_hat, t_hat)) / t_hat
            x = x_hat + (t_next - t_hat) * d
            if t_next != 0 and second_order:
                d_next = (x - denoise(x, t_next)) / t_next
                x = x_hat + (t_next - t_hat) * (d / 2 + d_next / 2)
        samples.append(x)
    return torch.tensor(samples, dtype=torch.float64).view(start.shape)


@churned
@pytest.mark.parametrize(
    "churn",
    [
        (0, 0.0, math.inf, 1.0),
        (3, 0.05, 50.0, 1.003),  # γ = 0.25 in the middle
        (40, 0.0, math.inf, 1.0),  # γ at its bound √2 − 1
    ],
)
def test_heun_and_euler_are_algorithm_2_with_and_without_its_correction(sample, churn):
    sigmas = karras_sigmas(12)
    out = sample(denoise_gaussian, noise(), sigmas, make_churn(sigmas, draw, *churn))
    expected = algorithm_2(
        denoise_gaussian, noise(), sigmas.tolist(), draw, *churn, second_order=sample is sample_heun
    )
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def dpm_solver_2m(denoise, start, sigmas):
    """Lu et al. 2022, Algorithm 2 with α = 1, in their λ, value by value; then one step to 0."""
    samples, levels = [], sigmas[:-1]
    lambdas = [-math.log(sigma) for sigma in levels]
    for first in start.double().flatten().tolist():
        x, buffer = first * levels[0], []
        for i in range(1, len(levels)):
            buffer.append(denoise(x, levels[i - 1]))
            h = lambdas[i] - lambdas[i - 1]
            d = buffer[-1]
            if i > 1:
                r = (lambdas[i - 1] - lambdas[i - 2]) / h
                d = (1 + 1 / (2 * r)) * buffer[-1] - 1 / (2 * r) * buffer[-2]
            x = levels[i] / levels[i - 1] * x - (math.exp(-h) - 1) * d
        samples.append(denoise(x, levels[-1]))
    return torch.tensor(samples, dtype=torch.float64).view(start.shape)


@pytest.mark.parametrize("steps", [2, 3, 18])
def test_dpmpp_2m_is_algorithm_2_of_its_paper(steps):
    sigmas = karras_sigmas(steps)
    out = sample_dpmpp_2m(denoise_gaussian, noise(), sigmas)
    assert out.dtype == torch.float64
    expected = dpm_solver_2m(denoise_gaussian, noise(), sigmas.tolist())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 10, 25])
def test_dpmpp_2m_is_diffusers(steps):
    """Theirs holds x / √(1 + σ²), in float32; our schedule in place of the one they make."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="sample"
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas = karras_sigmas(steps, 0.02, 15.0)
    x = noise(4, shape=(2, 1, 1)).double() * sigmas[0] / (1 + sigmas[0] ** 2).sqrt()
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        denoised = denoise_mixture(x * (1 + sigma**2).sqrt(), sigma)
        x = scheduler.step(denoised, t, x).prev_sample
    out = sample_dpmpp_2m(denoise_mixture, noise(4, shape=(2, 1, 1)), sigmas)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 25])
def test_euler_is_diffusers(steps):
    from diffusers import EulerDiscreteScheduler

    sigmas = karras_sigmas(steps, 0.02, 15.0)
    scheduler = EulerDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    x = noise(4, shape=(2, 1, 1)).double() * sigmas[0]
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(denoise_mixture(x, sigma), t, x).prev_sample
    out = sample_euler(denoise_mixture, noise(4, shape=(2, 1, 1)), sigmas)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- the order
def solve_by_scipy(denoise, x, first, last):
    """dx/dσ = (x − D) / σ from σ = first to last, by an adaptive method of eighth order."""

    def slope(sigma, flat):
        state = torch.from_numpy(flat).view(x.shape)
        return ((state - denoise(state, sigma)) / sigma).numpy().ravel()

    flat = x.numpy().ravel()
    solved = solve_ivp(slope, (first, last), flat, method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solved.y[:, -1]).view(x.shape)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(name, order):
    """The slope of log error over log steps, on a mixture, at σ_min.

    (The last step, from σ_min to 0, is left out: its size is the same however many there are.)
    """
    start = noise(16, shape=(2, 1, 1))
    exact = solve_by_scipy(denoise_mixture, start.double() * 10, 10.0, 0.05)
    counts, errors = [64, 128, 256, 512], []
    for steps in counts:
        out = SAMPLERS[name](denoise_mixture, start, karras_sigmas(steps, 0.05, 10.0)[:-1])
        errors.append((out - exact).square().mean().sqrt().item())
    measured = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert measured == pytest.approx(order, abs=0.1), f"errors {errors}"
    assert all(coarse > fine for coarse, fine in pairwise(errors))


# -------------------------------------------------------------------------- exact outcomes
@samplers
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gaussian_is_reached_along_its_closed_path(sample, schedule):
    sigmas = SCHEDULES[schedule](1000)
    # from pure noise, the first step of `flow` is too large for averages over σ
    options = {"over": "t"} if (sample, schedule) == (sample_heun, "flow") else {}
    out = sample(denoise_gaussian, noise(), sigmas, **options)
    first = sigmas[0].item()
    exact = known_answers.gaussian_path(first * noise().double(), first, 0, MEAN, STD)
    tolerance = 0.02 if sample is sample_euler else 1e-3
    torch.testing.assert_close(out, exact, rtol=0, atol=tolerance)


@samplers
def test_samples_of_a_gaussian_have_its_mean_and_spread(sample):
    out = sample(denoise_gaussian, noise(4, "many", (1, 64, 64)), karras_sigmas(enough(sample)))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, abs=0.01)


@samplers
def test_samples_of_a_mixture_fall_to_its_components_by_weight(sample):
    start = noise(4000, shape=(2, 1, 1))
    out = sample(denoise_mixture, start, karras_sigmas(enough(sample)))
    distance = (out[:, None] - MEANS).flatten(2).norm(dim=2) / STDS
    nearest = distance.argmin(dim=1)
    for k in range(3):
        mine = out[nearest == k]
        assert len(mine) / 4000 == pytest.approx(WEIGHTS[k].item(), abs=0.025)  # 3 std of a count
        assert mine.mean(dim=0).flatten().tolist() == pytest.approx(
            MEANS[k].flatten().tolist(), abs=0.025
        )
        assert (mine - MEANS[k]).std().item() == pytest.approx(STDS[k].item(), rel=0.1)


@samplers
def test_samples_of_a_data_set_are_its_images(sample):
    images = normal(0, "data", range(4), (2, 4, 4)).double()
    out = sample(known_answers.dataset(images), noise(32), karras_sigmas(40))
    off = (out[:, None] - images).abs().amax(dim=(2, 3, 4))  # (32, 4)
    assert (off.amin(dim=1) < 1e-6).all()
    assert len(set(off.argmin(dim=1).tolist())) == 4, "every image is somebody's"


@samplers
def test_a_single_step_goes_straight_to_the_denoised(sample):
    out = sample(denoise_gaussian, noise(), karras_sigmas(1))
    assert torch.equal(out, denoise_gaussian(noise().double() * 80, 80))


# ------------------------------------------------------------------------------- the calls
@pytest.mark.parametrize("name, calls", [("heun", 35), ("euler", 18), ("dpmpp-2m", 18)])
def test_the_denoiser_is_called_as_often_as_said_and_never_at_0(name, calls):
    asked = []

    def counting(x, sigma):
        assert x.dtype == torch.float64
        assert sigma.shape == ()
        asked.append(float(sigma))
        return denoise_gaussian(x, sigma)

    SAMPLERS[name](counting, noise(), karras_sigmas(18))
    assert len(asked) == calls  # Karras et al. 2022, Table 2: 35 evaluations for Heun's 18 steps
    assert min(asked) > 0


@samplers
def test_a_denoiser_in_float32_still_gives_float64(sample):
    def single(x, sigma):
        return denoise_gaussian(x, sigma).float()

    out = sample(single, noise(), karras_sigmas(5))
    assert out.dtype == torch.float64
    exact = sample(denoise_gaussian, noise(), karras_sigmas(5))
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)


@samplers
def test_a_sample_does_not_depend_on_its_batch(sample):
    torch.manual_seed(0)
    config = UNetConfig(latent_channels=2, channels=16, multipliers=(1, 2), blocks=1, head_width=16)
    denoiser = EDM(UNet(config)).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sigmas = karras_sigmas(4)

    def draw_samples(ks):
        churn = make_churn(sigmas, lambda step: normal(7, f"churn {step}", ks, (2, 8, 8)), 2)
        options = {} if sample is sample_dpmpp_2m else {"churn": churn}
        with torch.no_grad():
            return sample(denoiser, normal(7, "start", ks, (2, 8, 8)), sigmas, **options)

    together = draw_samples([0, 1, 2, 3, 4])
    assert torch.equal(draw_samples([0, 1, 2, 3, 4]), together)
    torch.testing.assert_close(draw_samples([3]), together[3:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draw_samples([4, 1]), together[[4, 1]], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


# --------------------------------------------------------------------------------- options


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
