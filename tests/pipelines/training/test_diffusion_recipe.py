import pytest
import torch

from autoencoders import build_autoencoder
from ldm.data import open_source
from ldm.errors import UsageError
from pipelines.recipes import fit, latent_shape
from tests.small import autoencoder_recipe, diffusion_recipe


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return build_autoencoder(autoencoder_recipe().model)


def fitted(autoencoder, *settings):
    recipe = diffusion_recipe("none", *settings)
    return fit(recipe, autoencoder, open_source(recipe.data, "train", recipe.resolution))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["batch_size=4", "accumulate=3"], "batch_size must be a multiple of accumulate"),
        (["lr_schedule=inverse_sqrt"], "lr_decay_images goes with lr_schedule=inverse_sqrt"),
        (["lr_decay_images=5"], "lr_decay_images goes with lr_schedule=inverse_sqrt"),
        (["ema_stds=[0.05]"], "ema_stds: two different widths at least"),
        (["ema_stds=[0.05, 0.05]"], "ema_stds: two different widths at least"),
        (["ema_stds=[0.05, 0.5]"], "ema_stds: .* must be above 0 and at most 0.28868"),
        (["cache=x", "augment.probability=0.1"], "augment is for latents encoded on the fly"),
        (["augment.probability=0.1", "data.flip=true"], "data.flip would leak: data.flip=false"),
        (["cache=x", "data={source: y, crop: random}"], "cut at random cannot be cached"),
        (["cache=x", "data={source: photos, crop: center}"], "cut at random cannot be cached"),
        (["label_dropout=1.5"], "label_dropout"),
    ],
)
def test_settings_that_contradict_each_other(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        diffusion_recipe("none", *settings)


def test_the_network_takes_its_sizes_from_what_it_is_given(autoencoder):
    recipe = fitted(autoencoder, "data={labels: true, flip: false}", "augment.probability=0.1")
    network = recipe.network
    assert (network.latent_channels, network.classes, network.augment_parameters) == (4, 8, 9)
    assert latent_shape(recipe, autoencoder) == (4, 4, 4)
    plain = fitted(autoencoder).network
    assert (plain.classes, plain.augment_parameters) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["network.latent_channels=8"], "network.latent_channels=8, but it has to be 4 here"),
        (["network.classes=3"], "network.classes=3, but it has to be 0 here"),
        (["network.augment_parameters=2"], "augment_parameters=2, but it has to be 0 here"),
        (["resolution=40"], "resolution=40 must be a multiple of 16"),
        (["denoiser.type=discrete"], "discrete is for imported models: train edm"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(autoencoder, settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        fitted(autoencoder, *settings)
