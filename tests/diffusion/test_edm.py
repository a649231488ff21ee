"""EDM: preconditioning, loss, noise levels and learned uncertainty against their definitions."""

import math

import pytest
import torch
from torch import nn

from diffusion import EDM, DenoisingLoss, EDMConfig, UNet, UNetConfig, denoising_loss, sample_sigma
from diffusion.edm import Uncertainty, weigh

SIGMAS = torch.logspace(-3, 2, 21, dtype=torch.float64)


class Affine(nn.Module):
    """A network with a closed form: F(x; c) = a·x + b·c + 1."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.3))
        self.dtypes = None

    def forward(self, x, c_noise):
        self.dtypes = x.dtype, c_noise.dtype
        return self.a * x + self.b * c_noise[:, None, None, None] + 1


class Zero(nn.Module):
    def forward(self, x, c_noise):
        return torch.zeros_like(x)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_preconditioning_gives_unit_variance(sigma_data):
    c_skip, c_out, c_in, c_noise = EDM(Zero(), sigma_data).precondition(SIGMAS)
    # input: c_in (y + n), with Var y = σ_data² and Var n = σ²
    torch.testing.assert_close(c_in**2 * (sigma_data**2 + SIGMAS**2), torch.ones_like(SIGMAS))
    # effective target: (y − c_skip (y + n)) / c_out
    target = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMAS**2) / c_out**2
    torch.testing.assert_close(target, torch.ones_like(SIGMAS))
    # Karras et al. 2022, Appendix B.6: this c_skip is the one that makes c_out smallest
    for off in (0.99, 1.01):
        other = c_skip * off
        assert ((1 - other) ** 2 * sigma_data**2 + other**2 * SIGMAS**2 > c_out**2).all()
    assert c_noise.tolist() == pytest.approx([math.log(s) / 4 for s in SIGMAS.tolist()])


def test_weighted_loss_is_the_plain_loss_of_the_network():
    """Eq. 8: λ‖D − z‖² = ‖F(c_in x; c_noise) − (z − c_skip x)/c_out‖², since λ c_out² = 1."""
    network = Affine().double()
    z, noise = 0.5 * normal(21, 4, 3, 3, dtype=torch.float64), normal(21, 4, 3, 3, seed=1).double()
    loss = denoising_loss(EDM(network), z, SIGMAS, noise)
    by_hand = []
    for i, sigma in enumerate(SIGMAS.tolist()):
        total = sigma**2 + 0.25
        c_skip, c_out, c_in = 0.25 / total, sigma * 0.5 / math.sqrt(total), 1 / math.sqrt(total)
        x = z[i] + sigma * noise[i]
        output = network.a * c_in * x + network.b * math.log(sigma) / 4 + 1
        by_hand.append((output - (z[i] - c_skip * x) / c_out).square().mean())
    assert loss.shape == (21,)
    torch.testing.assert_close(loss, torch.stack(by_hand))


def test_untrained_denoiser_is_the_best_for_gaussian_data():
    """For N(0, σ_data²) the best denoiser is E[z | x] = x σ_d² / (σ_d² + σ²): the network is 0."""
    x = normal(21, 4, 4, 4, dtype=torch.float64)
    best = x * (0.25 / (0.25 + SIGMAS**2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(EDM(Zero())(x, SIGMAS), best)
    network = UNet(UNetConfig(channels=8, multipliers=(1,), blocks=1, head_width=8))
    torch.testing.assert_close(EDM(network)(x.float(), SIGMAS.float()), best.float())


def test_ideal_loss_is_one_before_training():
    """The effective target has variance 1, so a network that answers 0 has loss 1."""
    z, noise = 0.5 * normal(64, 4, 16, 16), normal(64, 4, 16, 16, seed=1)
    sigma = sample_sigma(normal(64, seed=2), EDMConfig())
    loss = denoising_loss(EDM(Zero()), z, sigma, noise)
    assert loss.mean().item() == pytest.approx(1, abs=0.02)
    assert (loss - 1).abs().max() < 0.25


def test_objective_is_the_loss_weighted_by_uncertainty():
    denoiser = EDM(Affine(), sigma_data=0.8)
    batch = normal(3, 4, 2, 2), torch.tensor([0.1, 1.0, 10.0]), normal(3, 4, 2, 2, seed=1)
    plain = denoising_loss(denoiser, *batch)
    minimised, shown = DenoisingLoss(denoiser)(*batch)
    torch.testing.assert_close((minimised, shown), (plain, plain))
    assert minimised.requires_grad and not shown.requires_grad

    uncertainty = Uncertainty(16)
    minimised, shown = DenoisingLoss(denoiser, uncertainty)(*batch)
    u = uncertainty(batch[1].log() / 4)
    # Karras et al. 2024, Eq. 21
    torch.testing.assert_close(minimised, plain / u.exp() + u)
    torch.testing.assert_close(shown, plain)
    minimised.sum().backward()
    assert all(p.grad is not None for p in uncertainty.parameters())


def test_network_gets_only_the_given_conditions():
    class Listener(nn.Module):
        def forward(self, x, c_noise, **told):
            self.told = told
            return x

    network, x = Listener(), normal(2, 4, 2, 2)
    EDM(network)(x, 1.0)
    assert network.told == {}
    labels, augment = torch.tensor([1, -1]), torch.zeros(2, 9)
    denoising_loss(EDM(network), x, torch.ones(2), x, labels, augment)
    assert network.told["labels"] is labels and network.told["augment"] is augment


def test_sigma_data_enters_the_loss():
    z, noise, sigma = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1), torch.tensor([0.3])
    x = z + sigma * noise
    error = (x * 0.64 / (0.64 + 0.09) - z).square().mean()
    expected = (0.09 + 0.64) / (0.3 * 0.8) ** 2 * error
    torch.testing.assert_close(denoising_loss(EDM(Zero(), 0.8), z, sigma, noise), expected[None])


@pytest.mark.parametrize("sigma", [2.0, torch.tensor(2.0), torch.full((3,), 2.0).double()])
def test_scalar_and_batched_sigma_agree(sigma):
    denoiser, x = EDM(Affine()), normal(3, 4, 2, 2)
    out = denoiser(x, sigma)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, denoiser(x, torch.full((3,), 2.0)))


def test_float64_latents_keep_their_precision_around_a_float32_network():
    denoiser, x = EDM(Affine()), normal(3, 4, 2, 2, dtype=torch.float64)
    out = denoiser(x, torch.tensor(1e-3, dtype=torch.float64))
    assert denoiser.network.dtypes == (torch.float32, torch.float32)
    assert out.dtype == torch.float64
    exact = EDM(Affine().double())(x, 1e-3)
    # the network's float32 error comes in through c_out ≈ σ alone
    assert (out - exact).abs().max() < 1e-9


def test_low_precision_latents_are_summed_in_float32():
    denoiser = EDM(Affine().bfloat16())
    assert denoiser(normal(2, 4, 2, 2).bfloat16(), 1.0).dtype == torch.float32
    assert denoiser.network.dtypes == (torch.bfloat16, torch.float32)


def test_autocast_leaves_the_sum_in_float32():
    torch.manual_seed(0)
    config = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, head_width=16)
    denoiser = EDM(UNet(config))
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, sigma = normal(2, 4, 8, 8), torch.tensor([0.05, 5.0])
    plain = denoiser(x, sigma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = denoiser(x, sigma)
        loss = denoising_loss(denoiser, x, sigma, normal(2, 4, 8, 8, seed=1))
    assert cast.dtype == loss.dtype == torch.float32
    assert 0 < (cast - plain).abs().max() < 0.03
    # had the sum been in bf16, the error at a low σ would be that of bf16: 2⁻⁸ of x
    assert (cast - plain)[0].abs().max() < 0.003
    loss.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in denoiser.parameters())


def test_noise_levels_are_log_normal():
    config = EDMConfig(noise_mean=-0.4, noise_std=1.1)
    sigma = sample_sigma(torch.tensor([0.0, 1.0, -2.0]), config)
    expected = [math.exp(-0.4), math.exp(0.7), math.exp(-2.6)]
    assert sigma.tolist() == pytest.approx(expected, rel=1e-6)
    logs = sample_sigma(normal(100_000), EDMConfig()).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert logs.std().item() == pytest.approx(1.2, abs=0.02)


# ----------------------------------------------------------------------------- uncertainty
def build(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Uncertainty()


def test_weighing_divides_by_the_expected_loss_and_charges_for_it():
    loss, u = torch.tensor([0.5, 2.0]), torch.tensor([0.0, math.log(4)])
    expected = [0.5, 2 / 4 + math.log(4)]
    assert weigh(loss, u).tolist() == pytest.approx(expected)


def test_least_where_the_exponential_of_u_is_the_mean_loss():
    losses = torch.tensor([0.1, 0.7, 2.2, 0.2], dtype=torch.float64)
    u = losses.mean().log().requires_grad_()
    weigh(losses, u).mean().backward()
    assert u.grad.item() == pytest.approx(0, abs=1e-12)
    best = weigh(losses, u).mean()
    for off in (-0.1, 0.1):
        assert weigh(losses, u + off).mean() > best


def test_gradient_of_the_loss_is_scaled_by_the_expected_loss():
    loss = torch.tensor([0.5, 2.0], requires_grad=True)
    weigh(loss, torch.tensor([0.3, -1.0])).sum().backward()
    assert loss.grad.tolist() == pytest.approx([math.exp(-0.3), math.exp(1.0)])


def test_one_number_for_each_noise_level_from_128_weights():
    uncertainty, c_noise = build(), torch.tensor([-0.9, 0.0, 0.6])
    out = uncertainty(c_noise)
    assert out.shape == (3,)
    weight, fourier = uncertainty.linear.weight[0], uncertainty.fourier
    assert [p.numel() for p in uncertainty.parameters()] == [128]
    for u, number in zip(out.tolist(), c_noise.tolist(), strict=True):
        angles = 2 * math.pi * (fourier.frequencies * number + fourier.phases)
        expected = (weight * math.sqrt(2) * angles.cos()).sum() / weight.norm()
        assert u == pytest.approx(expected.item(), abs=1e-3)


def test_state_dict_round_trip():
    ours, theirs, c_noise = build(), build(seed=1), torch.tensor([-0.5, 0.5])
    assert not torch.equal(ours(c_noise), theirs(c_noise))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(c_noise), theirs(c_noise))


def test_stays_in_float32_under_autocast():
    uncertainty, c_noise = build(), torch.tensor([-0.5, 0.5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = uncertainty(c_noise)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, uncertainty(c_noise))


def expected_loss(ln_sigma):
    """A loss that differs 30-fold between noise levels, as those of a trained denoiser do."""
    return 0.03 + torch.exp(-((ln_sigma + 0.4) ** 2))


def test_training_finds_the_expected_loss_at_every_noise_level():
    """Random losses of a known mean at every σ: e^u comes to that mean."""
    uncertainty = build()
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.03, betas=(0.9, 0.99))
    for step in range(600):
        ln_sigma = -0.4 + normal(256, seed=2 * step)
        loss = expected_loss(ln_sigma) * normal(256, seed=2 * step + 1).square()  # of mean 1
        optimizer.param_groups[0]["lr"] = 0.03 / max(step / 100, 1) ** 0.5
        optimizer.zero_grad()
        weigh(loss, uncertainty(ln_sigma / 4)).mean().backward()
        optimizer.step()
        uncertainty.normalize_weights()
    ln_sigma = torch.linspace(-2.0, 1.2, 17)  # where 19 of 20 noise levels are drawn
    learned = uncertainty(ln_sigma / 4).exp()
    torch.testing.assert_close(learned, expected_loss(ln_sigma), rtol=0.2, atol=0)
    assert uncertainty.linear.weight.norm().item() == pytest.approx(math.sqrt(128), rel=1e-6)
