"""EDM2's training as its paper writes it, beside ours: Karras et al. 2024 (arXiv 2312.02696).

The loop below shares the network with ours, and the draws; optimiser, learning rate, weighting,
weight normalisation and averages are written from the equations, in float64. The authors' code
agrees but for two orders: its first step has a rate of 0, and it normalises weights before a step.
"""

import math
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import train_diffusion
from pipelines.recipes import load_recipe
from pipelines.train_autoencoder import train_autoencoder
from tests.small import autoencoder_recipe, diffusion_recipe

slow = pytest.mark.slow
STEPS, BATCH, WARM, PLATEAU = 50, 4, 10, 20
LR, BETAS, MEAN, STD, SIGMA_DATA = 1e-2, (0.9, 0.99), -0.4, 1.0, 0.5
WIDTHS = (0.05, 0.1)
EDM2 = [
    "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8, "
    "attention_factors: [2]}",
    f"denoiser={{uncertainty: true, noise_mean: {MEAN}, noise_std: {STD}}}", "clip_norm=null",
    f"lr={LR}", "lr_schedule=inverse_sqrt", f"lr_decay_images={PLATEAU * BATCH}",
    f"warmup_images={WARM * BATCH}", f"betas={list(BETAS)}", f"ema_stds={list(WIDTHS)}",
    "data.labels=true", "label_dropout=0", f"steps={STEPS}", f"batch_size={BATCH}",
    "run.log_every_steps=50", "run.validate_every_steps=50", "run.save_every_steps=50",
]  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of ours: its state, the state's copy before the first step, its batches and losses."""
    folder = tmp_path_factory.mktemp("edm2")
    one = train_autoencoder(autoencoder_recipe(), "tiny", folder / "ae")
    kept, batches, losses = {}, [], []
    step, prepare = train_diffusion.train_step, train_diffusion.DiffusionState.prepare

    def keep(state, *arguments):
        kept.update(state=state, before=deepcopy(state.objective))
        prepare(state, *arguments)

    def watch(run, state, batch):
        batches.append(batch)
        loss, norm = step(run, state, batch)
        losses.append(loss.mean().item())
        return loss, norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_diffusion.DiffusionState, "prepare", keep)
        patch.setattr(train_diffusion, "train_step", watch)
        train_diffusion.train_diffusion(
            diffusion_recipe(one / "ckpt.pt", *EDM2), "tiny", folder / "run"
        )
    return kept["state"], kept["before"], batches, losses


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980, Algorithm 1)."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.t = weights, 0
        self.m, self.v = ([torch.zeros_like(w) for w in weights] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        self.t += 1
        (b1, b2), t = BETAS, self.t
        for w, g, m, v in zip(self.weights, gradients, self.m, self.v, strict=True):
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            w.sub_(lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8))


def normalised(w: Tensor) -> Tensor:
    """Filters of magnitude 1, as forced weight normalisation stores them (Eq. 66)."""
    return w * math.sqrt(w[0].numel()) / w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))


def rate(t: int) -> float:
    """α(t) after t images (Eq. 67), with a linear warm-up."""
    return LR * min(t / (WARM * BATCH), 1) / math.sqrt(max(t / (PLATEAU * BATCH), 1))


def gamma(width: float) -> float:
    """The exponent whose profile has the relative width σ_rel (Eq. 123), by bisection."""
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        is_wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if is_wide else (low, middle)
    return low


@pytest.fixture(scope="module")
def paper(ours):
    """The paper's loop on the same batches: network, uncertainty's weight, losses, averages."""
    _, before, batches, _ = ours
    network = deepcopy(before.denoiser.network).double().train()
    fourier = before.uncertainty.fourier
    frequencies, phases = fourier.frequencies.double(), fourier.phases.double()
    linear = before.uncertainty.linear.weight.detach().clone().double().requires_grad_()
    weights = [*network.parameters(), linear]
    adam, losses, trajectory = Adam(weights), [], []
    for number, batch in enumerate(batches, 1):
        z, noise = batch.z.double(), batch.noise.double()
        sigma = batch.sigma.double().view(-1, 1, 1, 1)
        total = sigma**2 + SIGMA_DATA**2
        # EDM's preconditioning and weighting (Karras et al. 2022, Table 1)
        c_noise = sigma.log().flatten() / 4
        noisy = z + sigma * noise
        f = network(noisy / total.sqrt(), c_noise, batch.labels)
        denoised = SIGMA_DATA**2 / total * noisy + sigma * SIGMA_DATA / total.sqrt() * f
        weighted = total / (sigma * SIGMA_DATA) ** 2 * (denoised - z) ** 2
        # Eq. 21, u a linear layer of filters of norm 1 (Eq. 46) on √2 cos(2π (f c + φ)) (Eq. 75)
        waves = math.sqrt(2) * torch.cos(2 * math.pi * (c_noise[:, None] * frequencies + phases))
        u = (waves @ (linear / linear.norm()).T).view(-1, 1, 1, 1)
        loss = (weighted / u.exp() + u).sum() / BATCH
        adam.step(torch.autograd.grad(loss, weights), rate(number * BATCH))
        losses.append(weighted.mean().item())
        with torch.no_grad():
            for w in weights:
                if w.ndim > 1:
                    w.copy_(normalised(w))
        trajectory.append([w.clone() for w in network.parameters()])
    averages = {}
    for width in WIDTHS:
        # the integral of (γ+1) τ^γ / t^(γ+1) over each step (Eq. 121)
        ends = np.arange(len(batches) + 1) / len(batches)
        shares = np.diff(ends ** (gamma(width) + 1))
        averages[width] = [
            sum(share * w for share, w in zip(shares.tolist(), each, strict=True))
            for each in zip(*trajectory, strict=True)
        ]
    return network, linear, losses, averages


@torch.no_grad()
def distance(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """Distance of two weights, as a fraction of the distance that training went."""
    return ((found.double() - expected).norm() / (expected - start.double()).norm()).item()


@slow
def test_losses_are_those_of_the_papers_loop(ours, paper):
    assert len(paper[2]) == STEPS
    assert ours[3] == pytest.approx(paper[2], rel=0.01)


@slow
def test_weights_are_those_of_the_papers_loop(ours, paper):
    state, before = ours[:2]
    start, expected = dict(before.denoiser.network.named_parameters()), paper[0]
    for (name, found), w in zip(state.network.named_parameters(), expected.parameters(),
                                strict=True):  # fmt: skip
        assert distance(found, w, start[name]) < 0.01, name
    linear = state.objective.uncertainty.linear.weight
    assert distance(linear, paper[1], before.uncertainty.linear.weight) < 0.01


@slow
@pytest.mark.parametrize("width", WIDTHS)
def test_averages_are_the_integrals_of_the_papers_profile(width, ours, paper):
    state, before = ours[:2]
    averaged = state.powers[width].ema_model.parameters()
    start = before.denoiser.network.parameters()
    for found, expected, w in zip(averaged, paper[3][width], start, strict=True):
        assert distance(found, expected, w) < 0.01


@pytest.mark.parametrize(
    ("preset", "channels", "lr", "dropout"),
    [("edm2-s", 192, 1e-2, 0.0), ("edm2-m", 256, 9e-3, 0.1)],
)
def test_presets_are_those_of_the_paper(preset, channels, lr, dropout):
    """Table 6, ImageNet-512; lengths as in the authors' code, in which a million is 2²⁰ images."""
    recipe = load_recipe("diffusion", preset)
    network, denoiser = recipe.network, recipe.trained
    assert (network.channels, recipe.lr, network.dropout) == (channels, lr, dropout)
    assert (network.multipliers, network.blocks, network.attention_factors) == (
        (1, 2, 3, 4), 3, (4, 8),
    )  # fmt: skip
    assert (recipe.batch_size, recipe.steps * recipe.batch_size) == (2048, 2048 * 2**20)
    assert (recipe.warmup_images, recipe.lr_decay_images) == (10_000_000, 70_000 * 2048)
    assert (denoiser.noise_mean, denoiser.noise_std, denoiser.sigma_data) == (-0.4, 1.0, 0.5)
    assert denoiser.uncertainty and recipe.betas == BETAS and recipe.clip_norm is None
    assert recipe.lr_schedule == "inverse_sqrt" and recipe.ema_stds == WIDTHS
    # guided by another model, without mirror images; a snapshot after every 8·2²⁰ images
    assert (recipe.label_dropout, recipe.data.flip, recipe.data.crop) == (0, False, "center")
    assert recipe.steps * recipe.batch_size // recipe.snapshots == 8 * 2**20
