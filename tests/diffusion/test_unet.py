"""The UNet: its size, what it is told, its gradients, what it refuses, and that it learns."""

import pytest
import torch
from torch import nn

from diffusion import EDM, UNet, UNetConfig, edm_loss
from diffusion.unet import ResidualBlock
from ldm.config import validate
from ldm.errors import LdmError, UsageError

TINY = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, head_width=8)
TOLD = TINY.model_copy(update={"classes": 3, "augment_parameters": 9})
FULL = TOLD.model_copy(update={"scale_shift": True, "resample_blocks": True, "heads": 2})
EVERY = pytest.mark.parametrize("config", [TINY, TOLD, FULL], ids=["tiny", "told", "full"])


def build(config=TINY, scramble=False, seed=0):
    """A UNet from a seed; scrambled, so that the layers that start at 0 count too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(config)
        if scramble:
            for parameter in network.parameters():
                nn.init.normal_(parameter, std=0.1)
    return network


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_default_is_the_network_of_ffhq_256():
    with torch.device("meta"):
        network = UNet(UNetConfig())
        out = network(torch.empty(2, 4, 32, 32), torch.empty(2))
    # Rombach et al.'s UNet of FFHQ-256 with 4 channels in and out
    assert sum(parameter.numel() for parameter in network.parameters()) == 274_060_196
    assert out.shape == (2, 4, 32, 32)


# ------------------------------------------------------------------------------- behaviour
@EVERY
def test_starts_as_zero_made_of_identities(config):
    network, h = build(config), normal(2, 32, 4, 4)
    assert network.config is config
    assert network(normal(2, 4, 8, 8), torch.zeros(2)).abs().max() == 0
    assert torch.equal(network.middle_in(h, normal(2, 64)), h)


@EVERY
def test_gradient_reaches_every_parameter(config):
    network = build(config, scramble=True).double()
    x = normal(3, 4, 8, 8).double().requires_grad_()
    c_noise, labels, augment = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0, 1, 2]), None
    if config.augment_parameters:
        augment = normal(3, 9)
    labels = labels if config.classes else None
    network(x, c_noise.double(), labels, augment).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name  # rounding alone gives 1e-17
    assert x.grad.abs().min() > 0


def test_told_nothing_every_parameter_still_has_a_gradient():
    """DDP waits for one of each."""
    network = build(TOLD, scramble=True)
    network(normal(1, 4, 8, 8), torch.zeros(1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.embed.classes.weight.grad.abs().max() == 0


def test_no_label_and_no_augmentation_are_minus_one_and_zeros():
    network, x, c_noise = build(FULL, scramble=True).eval(), normal(3, 4, 8, 8), torch.zeros(3)
    nothing = network(x, c_noise)
    labels, augment = torch.tensor([-1, 2, -1]), torch.zeros(3, 9)
    assert torch.equal(network(x, c_noise, torch.full((3,), -1), augment), nothing)
    labelled = network(x, c_noise, labels)
    torch.testing.assert_close(labelled[[0, 2]], nothing[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (labelled[1] - nothing[1]).abs().max() > 1e-3
    assert not torch.allclose(network(x, c_noise, torch.tensor([-1, 1, -1]))[1], labelled[1])
    augment[0, 3] = 1
    augmented = network(x, c_noise, None, augment)
    assert (augmented[0] - nothing[0]).abs().max() > 1e-3
    torch.testing.assert_close(augmented[1:], nothing[1:], rtol=1e-4, atol=1e-5)


def test_a_network_without_classes_is_the_same_with_labels_of_none():
    network, x = build(scramble=True).eval(), normal(2, 4, 8, 8)
    assert torch.equal(
        network(x, torch.zeros(2), torch.tensor([-1, -1])), network(x, torch.zeros(2))
    )


@EVERY
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_in_bfloat16_it_is_nearly_the_same(config, way):
    network = build(config, scramble=True).eval()
    x, c_noise = normal(2, 4, 8, 8), torch.tensor([-1.0, 0.5])
    labels = torch.tensor([0, -1]) if config.classes else None
    plain = network(x, c_noise, labels)
    if way == "weights":
        answer = network.to(torch.bfloat16)(x.bfloat16(), c_noise.bfloat16(), labels)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(x, c_noise, labels)
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_a_time_step_keeps_its_precision_in_a_network_of_bfloat16():
    """999 is 1000 in bfloat16, so it is given in float32."""
    network = build(scramble=True).eval().bfloat16()
    x = normal(1, 4, 8, 8).bfloat16()
    answers = [network(x, torch.tensor([t])) for t in (999.0, 1000.0)]
    assert not torch.equal(*answers)


def test_noise_level_matters_and_images_do_not_mix():
    network = build(scramble=True).eval()
    x, c_noise = normal(3, 4, 8, 8), torch.tensor([-1.0, 0.0, 1.0])
    out = network(x, c_noise)
    assert (out - network(x, c_noise + 0.5)).abs().max() > 1e-3
    torch.testing.assert_close(network(x[1:2], c_noise[1:2]), out[1:2], rtol=1e-4, atol=1e-5)


def test_channels_last_gives_the_same():
    network = build(scramble=True).eval()
    x, c_noise = normal(2, 4, 8, 8), torch.tensor([-1.0, 0.5])
    plain = network(x, c_noise)
    network, x = (t.to(memory_format=torch.channels_last) for t in (network, x))
    inside = []
    network.middle_in.register_forward_hook(lambda *call: inside.append(call[-1]))
    torch.testing.assert_close(network(x, c_noise), plain, rtol=1e-4, atol=1e-5)
    assert inside[0].is_contiguous(memory_format=torch.channels_last)


def test_dropout_acts_in_training_only():
    network = build(TINY.model_copy(update={"dropout": 0.5}), scramble=True)
    batch = normal(1, 4, 8, 8), torch.zeros(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network(*batch), network(*batch))
    network.eval()
    assert torch.equal(network(*batch), network(*batch))


def test_attention_stands_where_it_is_asked_for():
    config = UNetConfig(channels=16, multipliers=(1, 2, 2), attention_factors=(2,), head_width=16)
    network = build(config)

    def attends(blocks):
        return [not isinstance(block.attention, nn.Identity) for block in blocks]

    assert [attends(level) for level in network.encoder] == [[False] * 2, [True] * 2, [False] * 2]
    assert [attends(level) for level in network.decoder] == [[False] * 3, [True] * 3, [False] * 3]
    assert attends([network.middle_in, network.middle_out]) == [True, False]


@pytest.mark.parametrize("heads, expected", [(None, [8, 8]), (2, [8, 16]), (1, [16, 32])])
def test_heads_are_counted_or_of_one_width(heads, expected):
    network = build(TINY.model_copy(update={"heads": heads, "attention_factors": (1,)}))
    found = [network.encoder[0][0].attention.head_width, network.middle_in.attention.head_width]
    assert found == expected


def test_blocks_that_resample_stand_between_the_levels():
    network = build(FULL)
    assert [type(layer) for layer in network.enter] == [nn.Conv2d, ResidualBlock]
    assert [type(layer) for layer in network.leave] == [ResidualBlock, nn.Sequential]
    assert [network.enter[1].resample, network.leave[0].resample] == ["down", "up"]
    assert network.middle_in.residual.resample is None


def test_sides_that_cannot_be_halved_are_refused():
    network = build(UNetConfig(channels=16, multipliers=(1, 1, 1), blocks=1, head_width=8))
    with pytest.raises(LdmError, match=r"10×8 do not fit this UNet.*multiples of 4"):
        network(normal(1, 4, 10, 8), torch.zeros(1))
    assert network(normal(1, 4, 12, 8), torch.zeros(1)).shape == (1, 4, 12, 8)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"channels": 48}, "'head_width'.*must divide the 144 channels at factor 4"),
        ({"channels": 15}, "'channels'.*multiple of 2"),
        ({"multipliers": []}, "'multipliers'"),
        ({"channels": 48, "heads": 7}, "'heads'.*must divide the 144 channels at factor 4"),
        ({"heads": 0}, "'heads'"),
        ({"classes": -1}, "'classes'"),
        ({"dropout": 1.0}, "'dropout'"),
        ({"type": "adm"}, "'type'"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(tree, message):
    with pytest.raises(UsageError, match=message):
        validate(UNetConfig, {"multipliers": [1, 2, 3], "attention_factors": [4], **tree})


def test_where_heads_are_counted_their_width_is_not_asked():
    config = validate(UNetConfig, {"channels": 48, "multipliers": [1, 2], "heads": 8})
    assert config.attending_widths() == {96}


def test_heads_must_fit_the_middle_even_without_other_attention():
    with pytest.raises(UsageError, match="must divide the 48 channels at factor 1"):
        validate(UNetConfig, {"channels": 48, "multipliers": [1], "attention_factors": []})


def test_learns_four_images():
    """Trained on four latents, it denoises them far better than Gaussian data can be denoised."""
    z = 0.5 * normal(4, 4, 8, 8).repeat_interleave(4, dim=0)  # every image at every noise level
    sigma = torch.tensor([0.2, 0.5, 1.0, 2.0]).repeat(4)
    denoiser = EDM(build())
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)

    def loss(seed):
        return edm_loss(denoiser, z, sigma, normal(16, 4, 8, 8, seed=seed)).mean()

    before = loss(seed=1).item()  # the network is 0: as good as the best for Gaussian data
    for step in range(150):
        optimizer.zero_grad()
        loss(seed=2 + step).backward()
        optimizer.step()
    assert before == pytest.approx(1, abs=0.1)
    assert loss(seed=1).item() < 0.45
