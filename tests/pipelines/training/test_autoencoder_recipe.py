import pytest

from ldm.errors import UsageError
from tests.small import autoencoder_recipe


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("accumulate=3", "multiple of accumulate"),
        ("phases=[]", "phases is empty"),
        ("phases.0.steps=0", r"'phases.0.steps': .*greater than 0"),
        ("phases.0.resolution=36", "resolution 36 must be a multiple of 8"),
        ("discriminator.multipliers=[1, 2, 2, 2, 2, 2]", "multiples of 64"),
        (
            "discriminator={type: stylegan, resolution: 64}",
            "one resolution: discriminator.resolution=64, not 32",
        ),
        ("discriminator={type: patchgan, layers: 5}", "at least 96 pixels a side"),
        ("discriminator.type=transformer", "'discriminator'"),
        ("latent_channels=0", "'latent_channels'"),
        ("encoder={type: dwt}", "set latent_channels=12"),
        ("encoder.depth=2", "the encoder downsamples 4×"),
        ("loss={l1: 0, lpips: 0}", "one of l1, l2, lpips, esrgan must be above 0"),
        ("encoder.wavelet=db20", "too small for a transform of depth 3 by the wavelet 'db20'"),
        ("encoder.wavelet=harr", "did you mean 'haar'"),
        ("encoder.levels=[2, 5]", "'encoder.levels'"),
        ("best_by=fid", "'best_by'"),
        ("clip_norm=0", "'clip_norm'"),
        ("lr=-1", "'lr'"),
        ("run.log_every_steps=0", "'run.log_every_steps'"),
        ("run.keep_states=0", "'run.keep_states'"),
        ("validate_images=0", "'validate_images'"),
    ],
)
def test_recipes_that_cannot_be(setting, told):
    with pytest.raises(UsageError, match=told) as caught:
        autoencoder_recipe(setting)
    assert "\n" not in str(caught.value)


def test_cutmix_needs_a_discriminator_of_pixels():
    with pytest.raises(UsageError, match=r"it needs discriminator\.type=unet"):
        autoencoder_recipe("adversarial.cutmix=1", "discriminator={type: patchgan, layers: 2}")


def test_without_an_adversary_no_discriminator_is_in_the_way():
    recipe = autoencoder_recipe("adversarial.weight=0", "discriminator={type: stylegan}")
    assert recipe.discriminator.resolution == 128
