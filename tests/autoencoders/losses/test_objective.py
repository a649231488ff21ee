import pytest
import torch

from autoencoders import build_autoencoder
from autoencoders.discriminators.unet import UNetDiscriminator, UNetDiscriminatorConfig
from autoencoders.losses import LPIPS, AdversarialConfig, LossConfig, Objective
from ldm.config import validate
from ldm.errors import UsageError

TERMS = {"l1", "lpips", "kl", "gaussian", "wavelet"}


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def objective(random_lpips):
    return Objective(LossConfig(), AdversarialConfig(), LPIPS(random_lpips))


@pytest.fixture
def ae():
    return build_autoencoder("tiny", decoder={"channels": 8})


@pytest.fixture
def critic():
    return UNetDiscriminator(UNetDiscriminatorConfig(channels=4, multipliers=(1, 2, 4)))


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32) * 2 - 1


def run(ae, images):
    return ae(images, noise=torch.randn(2, 4, 4, 4))


def largest_gradient(module):
    gradients = [p.grad.abs().max().item() for p in module.parameters() if p.grad is not None]
    return max(gradients, default=0.0)


def test_every_generator_term_reaches_the_encoder(objective, ae, critic, images):
    for name in (*sorted(TERMS), "adversarial"):
        ae.zero_grad()
        critic.requires_grad_(False)  # the frozen judge of the generator's pass
        out = run(ae, images)
        terms = objective.reconstruction(out, images)
        terms["adversarial"] = objective.fool(critic(out.recon))
        terms[name].backward()
        assert largest_gradient(ae.encoder) > 0, name
        assert all(p.grad is None or p.grad.isfinite().all() for p in ae.parameters()), name
        assert largest_gradient(critic) == 0, name


def test_only_its_own_term_reaches_the_discriminator(objective, ae, critic, images):
    out = run(ae, images)
    real, fake = critic(torch.cat([images, out.recon.detach()])).chunk(2)
    objective.judge(real, fake).backward()
    assert largest_gradient(critic) > 0
    assert largest_gradient(ae) == 0


def test_only_terms_of_some_weight_are_computed(ae, images):
    def forbidden(*_):
        pytest.fail("a term of weight 0 was computed")

    loss = LossConfig(lpips=0, gaussian=0)
    terms = Objective(loss, AdversarialConfig(), forbidden).reconstruction(run(ae, images), images)
    assert terms.keys() == {"l1", "kl", "wavelet"}


def test_total_is_the_weighted_sum(objective):
    terms = {
        name: torch.tensor(float(value))
        for value, name in enumerate(("l1", "lpips", "kl", "gaussian", "wavelet", "adversarial"), 1)
    }
    expected = 1 * 1 + 2 * 1 + 3 * 1e-6 + 4 * 0.5 + 5 * 1 + 6 * 0.03
    assert objective.total(terms, 0.03).item() == pytest.approx(expected)
    del terms["adversarial"]
    assert objective.total(terms, 0.0).item() == pytest.approx(expected - 0.18)


def test_adversarial_weight_waits_then_rises_then_stays():
    objective = Objective(LossConfig(lpips=0), AdversarialConfig())
    weights = [objective.adversarial_weight(p) for p in (0, 0.1999, 0.2, 0.225, 0.25, 0.9, 1)]
    assert weights == pytest.approx([0, 0, 0, 0.05, 0.1, 0.1, 0.1])
    at_once = Objective(LossConfig(lpips=0), AdversarialConfig(start=0, ramp=0, weight=0.5))
    assert at_once.adversarial_weight(0.0) == 0.5


def test_hinge_and_logistic_are_chosen_by_name():
    fake = (torch.tensor([3.0]),)
    hinge, logistic = (
        Objective(LossConfig(lpips=0), AdversarialConfig(loss=name)).fool(fake).item()
        for name in ("hinge", "logistic")
    )
    assert hinge == -3
    assert logistic == pytest.approx(0.0486, abs=1e-4)


def test_losses_are_float32_inside_autocast(objective, ae, images):
    out = run(ae, images)
    expected = objective.reconstruction(out, images)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective.reconstruction(out, images)
    assert terms.keys() == expected.keys() == TERMS
    for name, term in terms.items():
        assert torch.equal(term, expected[name]), name
    half = objective.reconstruction(out._replace(recon=out.recon.bfloat16()), images.bfloat16())
    assert {term.dtype for term in half.values()} == {torch.float32}


def test_a_perfect_reconstruction_gives_finite_gradients(objective, ae, images):
    out = run(ae, images)
    recon = images.clone().requires_grad_()
    objective.total(objective.reconstruction(out._replace(recon=recon), images), 0).backward()
    assert recon.grad.isfinite().all()


def test_lpips_without_a_network_is_refused():
    with pytest.raises(ValueError, match=r"loss\.lpips needs a perceptual loss"):
        Objective(LossConfig(), AdversarialConfig(), None)


@pytest.mark.parametrize(
    ("config_class", "tree"),
    [
        (LossConfig, {"l1": -1}),
        (AdversarialConfig, {"start": 1.5}),
        (AdversarialConfig, {"loss": "wasserstein"}),
    ],
)
def test_bad_values_are_refused(config_class, tree):
    with pytest.raises(UsageError, match=f"'{next(iter(tree))}': "):
        validate(config_class, tree)
