import pytest
import torch

from autoencoders import Autoencoder
from autoencoders.discriminators import build_discriminator
from autoencoders.losses import Objective
from ldm.distributed import make_accelerator
from ldm.run import Run, RunConfig
from pipelines.train_autoencoder import draw, train_step
from tests.small import autoencoder_recipe


class Recorder(torch.optim.SGD):
    """An optimiser that changes nothing and keeps the gradients it was given."""

    def step(self, closure=None):
        self.gradients = [
            None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]
        ]


def gradients(tmp_path, ramp: float, *settings: str, log_gradients: bool = False, **loss: float):
    """Gradients of one step: of the encoder, of the whole autoencoder, of the discriminator."""
    torch.manual_seed(0)
    recipe = autoencoder_recipe("adversarial.weight=1", *settings)
    run = Run(tmp_path, RunConfig(device="cpu"), make_accelerator("cpu"))
    ae, discriminator = Autoencoder(recipe.model), build_discriminator(recipe.discriminator)
    off = dict.fromkeys(recipe.loss.weights, 0.0)
    objective = Objective(
        recipe.loss.model_copy(update=off | loss), recipe.adversarial,
        perceptual=dict.fromkeys(("lpips", "esrgan"), lambda recon, x: (recon - x).abs().amax()),
    )  # fmt: skip
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    averaged = Autoencoder(recipe.model) if objective.needs_averaged else None
    opt_ae, opt_discriminator = Recorder(ae.parameters()), Recorder(discriminator.parameters())
    terms = train_step(
        run, ae, discriminator, opt_ae, opt_discriminator, images, draw(run, recipe, [0, 1], 32),
        objective, ramp, None, averaged, log_gradients,
    )  # fmt: skip
    encoder = len(list(ae.encoder.parameters()))
    return opt_ae.gradients[:encoder], opt_ae, opt_discriminator, terms, ae, discriminator


TERMS = ["l1", "l2", "lpips", "esrgan", "ldl", "kl", "gaussian", "wavelet"]


@pytest.mark.parametrize("term", TERMS)
def test_every_term_reaches_the_encoder_and_not_the_discriminator(tmp_path, term):
    encoder, _, opt_discriminator, terms, _, discriminator = gradients(tmp_path, 0.0, **{term: 1.0})
    assert sum(g.abs().sum() for g in encoder if g is not None) > 0
    assert set(terms) == {term, "gradient_norm", "adversarial_weight"}
    assert not hasattr(opt_discriminator, "gradients")
    assert all(p.grad is None for p in discriminator.parameters())


def test_every_term_changes_the_encoders_gradient(tmp_path):
    base, *_ = gradients(tmp_path, 0.0, l1=1.0)
    for ramp, extra in ((1.0, {}), *((0.0, {term: 1.0}) for term in TERMS[1:])):
        other, *_ = gradients(tmp_path, ramp, l1=1.0, **extra)
        assert any(not torch.allclose(a, b) for a, b in zip(base, other, strict=True)), extra


def test_the_discriminators_loss_does_not_reach_the_autoencoder(tmp_path):
    """With an adversarial weight of next to 0, training the discriminator must not show."""
    without, *_ = gradients(tmp_path, 0.0, l1=1.0)
    with_discriminator, _, opt_discriminator, terms, ae, _ = gradients(tmp_path, 1e-30, l1=1.0)
    assert "discriminator" in terms
    for a, b in zip(without, with_discriminator, strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in ae.parameters())
    # biases aside: real and fake pull the last ones in opposite directions, to exactly 0
    assert all(g.abs().sum() > 0 for g in opt_discriminator.gradients if g.ndim > 1)


def test_the_generators_terms_do_not_reach_the_discriminator(tmp_path):
    """Its gradient is that of its own loss, computed alone, whatever the generator's weights."""
    one = gradients(tmp_path, 1.0, l1=1.0)
    many = gradients(tmp_path, 50.0, l1=3.0, kl=2.0, wavelet=9.0)
    for a, b in zip(one[2].gradients, many[2].gradients, strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in one[5].parameters())


def test_an_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer(tmp_path):
    settings = ("adversarial={weighting: adaptive, weight: 0.5}",)
    _, _, _, terms, ae, _ = gradients(tmp_path, 0.5, *settings, l1=2.0, kl=7.0)
    # the two gradients again, one of them as a difference
    _, recon_only, *_ = gradients(tmp_path, 0.0, l1=2.0)
    last = [name for name, _ in ae.named_parameters()].index("decoder.conv_out.weight")
    recon = recon_only.gradients[last].norm()
    _, both, *_ = gradients(tmp_path, 1.0, l1=2.0)
    adversarial = (both.gradients[last] - recon_only.gradients[last]).norm()
    assert terms["gradient_ratio"].item() == pytest.approx(
        (recon / (adversarial + 1e-4)).item(), rel=1e-3
    )
    weight = 0.5 * 0.5 * terms["gradient_ratio"].item()  # ramp × Equation 2
    assert float(terms["adversarial_weight"]) == pytest.approx(weight, rel=1e-6)


def test_logging_the_ratio_changes_no_gradient(tmp_path):
    plain = gradients(tmp_path, 1.0, l1=1.0)
    logged = gradients(tmp_path, 1.0, l1=1.0, log_gradients=True)
    assert "gradient_ratio" in logged[3] and "gradient_ratio" not in plain[3]
    for which in (1, 2):
        pairs = zip(plain[which].gradients, logged[which].gradients, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_cutmix_adds_to_the_discriminators_gradient_alone(tmp_path):
    plain = gradients(tmp_path, 1.0, l1=1.0)
    mixed = gradients(tmp_path, 1.0, "adversarial.cutmix=1", l1=1.0)
    assert mixed[3]["cutmix"] > 0 and "cutmix" not in plain[3]
    assert all(torch.equal(a, b) for a, b in zip(plain[0], mixed[0], strict=True))
    pairs = zip(plain[2].gradients, mixed[2].gradients, strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)
