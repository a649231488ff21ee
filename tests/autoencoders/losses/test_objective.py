import contextlib
import math

import numpy as np
import ptwt
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.distributions import Normal, kl_divergence

from autoencoders import AutoencoderOutput, DiagonalGaussian, build_autoencoder
from autoencoders.discriminators import UNetDiscriminator, UNetDiscriminatorConfig, split
from autoencoders.losses import LPIPS, AdversarialConfig, LossConfig, Objective
from autoencoders.losses.adversarial import ldl
from autoencoders.losses.objective import blur, gaussian, kl, wavelet
from autoencoders.losses.perceptual import ESRGANPerceptual
from ldm.config import validate
from ldm.device import deterministic_algorithms
from ldm.errors import UsageError

DEFAULTS = {"l1", "lpips", "kl", "gaussian", "wavelet"}
EVERY = dict.fromkeys(("l2", "esrgan", "ldl"), 0.25)
TERMS = DEFAULTS | EVERY.keys()


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def objective(random_lpips):
    """With every term there is. ESRGAN's stands on a small network in VGG-19's place."""
    perceptual = {
        "lpips": LPIPS(random_lpips),
        "esrgan": ESRGANPerceptual(nn.Conv2d(3, 4, 3, padding=1)),
    }
    return Objective(LossConfig(**EVERY), AdversarialConfig(), perceptual)


@pytest.fixture
def ae():
    return build_autoencoder("tiny", decoder={"channels": 8})


@pytest.fixture
def discriminator():
    return UNetDiscriminator(UNetDiscriminatorConfig(channels=4, multipliers=(1, 2, 4)))


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32) * 2 - 1


def run(ae, images):
    return ae(images, noise=torch.randn(2, 4, 4, 4))


def largest_gradient(module):
    gradients = [p.grad.abs().max().item() for p in module.parameters() if p.grad is not None]
    return max(gradients, default=0.0)


def test_every_generator_term_reaches_the_encoder(objective, ae, discriminator, images):
    for name in (*sorted(TERMS), "adversarial"):
        ae.zero_grad()
        discriminator.requires_grad_(False)  # the frozen judge of the generator's pass
        out = run(ae, images)
        terms = objective.reconstruction(out, images)
        terms["adversarial"] = objective.generator_loss(discriminator(out.recon))
        terms[name].backward()
        assert largest_gradient(ae.encoder) > 0, name
        assert all(p.grad is None or p.grad.isfinite().all() for p in ae.parameters()), name
        assert largest_gradient(discriminator) == 0, name


def test_only_its_own_term_reaches_the_discriminator(objective, ae, discriminator, images):
    out = run(ae, images)
    real, fake = split(discriminator(torch.cat([images, out.recon.detach()])), 2)
    objective.discriminator_loss(real, fake).backward()
    assert largest_gradient(discriminator) > 0
    assert largest_gradient(ae) == 0


def test_only_terms_of_some_weight_are_computed(ae, images):
    def forbidden(*_):
        pytest.fail("a term of weight 0 was computed")

    loss = LossConfig(lpips=0, gaussian=0)
    networks = {"lpips": forbidden, "esrgan": forbidden}
    terms = Objective(loss, AdversarialConfig(), networks).reconstruction(run(ae, images), images)
    assert terms.keys() == {"l1", "kl", "wavelet"}


def test_by_default_the_terms_are_the_papers(random_lpips, ae, images):
    objective = Objective(LossConfig(), AdversarialConfig(), {"lpips": LPIPS(random_lpips)})
    assert objective.reconstruction(run(ae, images), images).keys() == DEFAULTS
    assert not objective.needs_averaged


def test_ldl_alone_needs_what_the_averaged_weights_make(objective, ae, images):
    assert objective.needs_averaged
    out, averaged = run(ae, images), run(ae, images).recon
    terms, without = (objective.reconstruction(out, images, x) for x in (averaged, None))
    assert torch.equal(terms["ldl"], ldl(out.recon, images, averaged))
    assert terms["ldl"] < without["ldl"] == ldl(out.recon, images)
    for name in TERMS - {"ldl"}:
        assert torch.equal(terms[name], without[name]), name


NUMBERED = ("l1", "l2", "lpips", "esrgan", "ldl", "kl", "gaussian", "wavelet", "adversarial")


def test_total_is_the_weighted_sum(objective):
    terms = {name: torch.tensor(float(value)) for value, name in enumerate(NUMBERED, 1)}
    recon = 1 * 1 + 2 * 0.25 + 3 * 1 + 4 * 0.25 + 5 * 0.25 + 7 * 0.5 + 8 * 1
    assert objective.recon_total(terms).item() == pytest.approx(recon)
    expected = recon + 6 * 1e-6 + 9 * 0.03
    assert objective.total(terms, 0.03).item() == pytest.approx(expected)
    assert objective.total(terms, torch.tensor(0.03)).item() == pytest.approx(expected)
    del terms["adversarial"]
    assert objective.total(terms, 0.0).item() == pytest.approx(expected - 0.27)


def test_the_ramp_waits_then_rises_then_stays():
    objective = Objective(LossConfig(lpips=0), AdversarialConfig())
    shares = [objective.ramp(p) for p in (0, 0.1999, 0.2, 0.225, 0.25, 0.9, 1)]
    assert shares == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])
    at_once = Objective(LossConfig(lpips=0), AdversarialConfig(start=0, ramp=0, weight=0.5))
    assert at_once.ramp(0.0) == 1


def test_the_adversarial_loss_is_chosen_by_name():
    real, fake = (torch.tensor([0.5]),), (torch.tensor([3.0]),)
    objectives = {
        name: Objective(LossConfig(lpips=0), AdversarialConfig(loss=name))
        for name in ("hinge", "logistic", "bce")
    }
    fooled = {name: o.generator_loss(fake).item() for name, o in objectives.items()}
    assert fooled == pytest.approx({"hinge": -3, "logistic": 0.0486, "bce": 0.0486}, abs=1e-4)
    judged = {name: o.discriminator_loss(real, fake).item() for name, o in objectives.items()}
    # ln(1 + e^−½) + ln(1 + e³)
    assert judged == pytest.approx({"hinge": 4.5, "logistic": 3.5227, "bce": 1.7613}, abs=1e-4)


def test_losses_are_float32_inside_autocast(objective, ae, images):
    out = run(ae, images)
    expected = objective.reconstruction(out, images)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective.reconstruction(out, images)
    assert terms.keys() == expected.keys() == TERMS
    for name, term in terms.items():
        assert torch.equal(term, expected[name]), name
    half = objective.reconstruction(
        out._replace(recon=out.recon.bfloat16()), images.bfloat16(), images.bfloat16()
    )
    assert {term.dtype for term in half.values()} == {torch.float32}


def test_a_perfect_reconstruction_gives_finite_gradients(objective, ae, images):
    out = run(ae, images)
    recon = images.clone().requires_grad_()
    objective.total(objective.reconstruction(out._replace(recon=recon), images), 0).backward()
    assert recon.grad.isfinite().all()


@pytest.mark.parametrize("name", ["lpips", "esrgan"])
def test_a_perceptual_term_without_its_network_is_refused(name):
    weights = {"lpips": 0, "esrgan": 0} | {name: 1}
    with pytest.raises(ValueError, match=rf"loss\.{name} needs .*load_{name}\(\)") as caught:
        Objective(LossConfig(**weights), AdversarialConfig(), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config_class", "tree"),
    [
        (LossConfig, {"l1": -1}),
        (AdversarialConfig, {"start": 1.5}),
        (LossConfig, {"lpips_network": "resnet"}),
        (AdversarialConfig, {"loss": "wasserstein"}),
        (AdversarialConfig, {"weighting": "often"}),
        (AdversarialConfig, {"cutmix": -1}),
    ],
)
def test_bad_values_are_refused(config_class, tree):
    with pytest.raises(UsageError, match=f"'{next(iter(tree))}': "):
        validate(config_class, tree)


# ------------------------------------------------------------------------- reconstruction, KL
def test_l1_and_l2_are_means_over_everything():
    recon, images = torch.tensor([0.5, -1.0, 1.0]), torch.tensor([0.0, -1.0, -1.0])
    latents = torch.zeros(1, 4, 1, 1)
    out = AutoencoderOutput(recon.view(1, 3, 1, 1), DiagonalGaussian(latents, latents), latents)
    loss = LossConfig(l1=1, l2=1, lpips=0, kl=0, gaussian=0, wavelet=0)
    terms = Objective(loss, AdversarialConfig()).reconstruction(out, images.view(1, 3, 1, 1))
    assert terms["l1"].item() == pytest.approx(2.5 / 3)
    assert terms["l2"].item() == pytest.approx(4.25 / 3)


def test_kl_is_in_nats_per_image_value():
    rng = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 2, 2, generator=rng)
    posterior, images = DiagonalGaussian(mean, logvar), torch.zeros(3, 3, 16, 16)
    divergence = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    expected = divergence.sum() / 3 / (3 * 16 * 16)
    torch.testing.assert_close(kl(posterior, images), expected)


@pytest.fixture
def pair():
    return tuple(torch.randn(2, 2, 3, 16, 20, generator=torch.Generator().manual_seed(0)))


def scipy_blur(images):
    over = (0, 0, 1.0, 1.0)
    return gaussian_filter(images.double().numpy(), over, mode="mirror", radius=(0, 0, 2, 2))


def test_blur_is_scipys(pair):
    np.testing.assert_allclose(blur(pair[0]).numpy(), scipy_blur(pair[0]), rtol=0, atol=1e-6)


def test_blur_keeps_flat_images_and_ignores_the_layout(pair):
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(blur(flat), flat)
    images = pair[0].to(memory_format=torch.channels_last)
    torch.testing.assert_close(blur(images), blur(pair[0]))


def test_gaussian_is_l1_of_both_high_passes(pair):
    high = [images.double().numpy() - scipy_blur(images) for images in pair]
    expected = np.abs(high[0] - high[1]).mean()
    assert gaussian(*pair).item() == pytest.approx(expected, rel=1e-5)


def test_wavelet_is_charbonnier_on_the_edges_of_ptwt(pair):
    edges = [ptwt.wavedec2(images.double(), "haar", level=1)[1] for images in pair]
    total, count = 0.0, 0
    for ours, theirs in zip(*edges, strict=True):
        for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True):
            total += math.sqrt((a - b) ** 2 + 1e-3**2)
            count += 1
    assert wavelet(*pair).item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("loss", [gaussian, wavelet])
def test_a_shift_of_brightness_costs_nothing(loss, pair):
    images = pair[0]
    # Charbonnier's floor is its ε
    assert loss(images + 0.5, images).item() == pytest.approx(
        1e-3 if loss is wavelet else 0, abs=1e-6
    )


@pytest.mark.parametrize("loss", [gaussian, wavelet])
def test_equal_images_give_finite_gradients(loss, pair):
    recon = pair[0].clone().requires_grad_()
    loss(recon, pair[0]).backward()
    assert recon.grad.isfinite().all()


def test_the_blur_is_the_same_by_deterministic_algorithms():
    images, outputs, gradients = torch.randn(2, 3, 9, 7, requires_grad=True), [], []
    for how in (contextlib.nullcontext(), deterministic_algorithms()):
        with how:
            outputs.append(blur(images))
            gradients.append(torch.autograd.grad(outputs[-1].square().sum(), images)[0])
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
