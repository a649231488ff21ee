import pytest
import torch

from autoencoders import build_autoencoder
from autoencoders.posterior import DiagonalGaussian
from ldm.errors import LdmError
from pipelines.codec import Codec, measure_latents
from tests.small import autoencoder_recipe


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return build_autoencoder(autoencoder_recipe().model).eval()


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) * 2 - 1


def test_statistics_are_those_of_the_sampled_latents(autoencoder):
    with torch.no_grad():
        mean, std = measure_latents(map(autoencoder.encode, images(48).split(8)))
        posterior = autoencoder.encode(images(48))
        draws = torch.stack([
            posterior.sample(torch.Generator().manual_seed(i)) for i in range(200)
        ]).double()  # fmt: skip
    flat = draws.transpose(0, 2).flatten(1)
    assert torch.allclose(mean, flat.mean(1), atol=5e-3)
    assert torch.allclose(std, flat.std(1), rtol=5e-3)


def test_statistics_of_the_means_leave_the_posteriors_width_out():
    mean = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    posteriors = [DiagonalGaussian(mean, torch.full_like(mean, 1.0))]
    _, of_draws = measure_latents(posteriors)
    _, of_means = measure_latents(posteriors, drawn=False)
    torch.testing.assert_close(of_means, mean.double().transpose(0, 1).flatten(1).std(1, False))
    torch.testing.assert_close(of_draws.square() - of_means.square(), torch.ones(2).double().exp())


def test_z_is_standardised_to_sigma_data(autoencoder):
    with torch.no_grad():
        mean, std = measure_latents(map(autoencoder.encode, images(48).split(8)))
    codec = Codec(autoencoder, mean, std, sigma_data=0.5)
    noise = torch.randn(48, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    z = codec.encode(images(48), noise)
    assert z.mean((0, 2, 3)).abs().max() < 0.03
    assert (z.std((0, 2, 3)) - 0.5).abs().max() < 0.03


def test_decode_undoes_the_standardisation(autoencoder):
    codec = Codec(autoencoder, torch.tensor([1.0, -2, 3, 0.5]), torch.tensor([2.0, 0.1, 1, 7]))
    with torch.no_grad():
        direct = autoencoder.decode(autoencoder.encode(images(2)).mode()).clamp(-1, 1)
    assert (codec.decode(codec.encode(images(2))) - direct).abs().max() < 1e-4
    again = Codec.from_statistics(autoencoder, codec.statistics())
    assert torch.equal(again.encode(images(2)), codec.encode(images(2)))


def test_it_is_frozen_whatever_happens(autoencoder):
    codec = Codec(autoencoder, torch.zeros(4), torch.ones(4)).train()
    assert not codec.training and not codec.autoencoder.training
    assert not any(p.requires_grad for p in codec.parameters())


@pytest.mark.parametrize("std", [[1, 1, 0, 1], [1, float("nan"), 1, 1]])
def test_degenerate_statistics_are_told(autoencoder, std):
    with pytest.raises(LdmError, match="degenerate"):
        Codec(autoencoder, torch.zeros(4), torch.tensor(std).float())


def test_pixels_in_the_wrong_range_are_told(autoencoder):
    with pytest.raises(ValueError, match="must lie in"):
        Codec(autoencoder, torch.zeros(4), torch.ones(4)).encode(images(1) * 255)


def test_z_has_the_layout_that_training_is_quick_in(autoencoder):
    """Channels last, which the encoder is quick in, costs a UNet's training step a fifth here."""
    codec = Codec(autoencoder, torch.zeros(4), torch.ones(4))
    assert codec.encode(images(2)).is_contiguous()
    assert codec.encode(images(2), torch.randn(2, 4, 4, 4)).is_contiguous()
