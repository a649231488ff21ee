"""The UNet: its size, its twin in diffusers, its gradients, and that it learns."""

import pytest
import torch
from torch import nn

from diffusion import EDM, UNet, UNetConfig, edm_loss
from diffusion.layers import group_norm, sinusoids
from ldm.config import validate
from ldm.errors import LdmError, UsageError

TINY = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, head_width=8)


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


# ------------------------------------------------------------------------------- diffusers
RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "shift": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}


def diffusers_weights(network, config):
    """Our weights under the names of diffusers' UNet2DModel."""
    levels, parts = len(config.multipliers), {}

    def put(theirs, ours):
        parts.update({f"{theirs}.{name}": value for name, value in ours.state_dict().items()})

    def put_block(theirs, index, ours):
        for name, module in ours.residual.named_children():
            put(f"{theirs}.resnets.{index}.{RESIDUAL.get(name, name)}", module)
        attention = ours.attention
        if not isinstance(attention, nn.Identity):
            prefix = f"{theirs}.attentions.{index}"
            put(f"{prefix}.group_norm", attention.norm)
            put(f"{prefix}.to_out.0", attention.proj)
            for kind in ("weight", "bias"):
                three = getattr(attention.qkv, kind).detach().chunk(3)
                for name, part in zip("qkv", three, strict=True):
                    parts[f"{prefix}.to_{name}.{kind}"] = part

    put("time_embedding.linear_1", network.embed.linear_in)
    put("time_embedding.linear_2", network.embed.linear_out)
    put("conv_in", network.enter[0])
    for level in range(levels):
        if level > 0:
            put(f"down_blocks.{level - 1}.downsamplers.0.conv", network.enter[level])
        for index, block in enumerate(network.encoder[level]):
            put_block(f"down_blocks.{level}", index, block)
    put_block("mid_block", 0, network.middle_in)
    put_block("mid_block", 1, network.middle_out)
    for level in range(levels):
        for index, block in enumerate(network.decoder[level]):
            put_block(f"up_blocks.{level}", index, block)
        if level < levels - 1:
            put(f"up_blocks.{level}.upsamplers.0.conv", network.leave[level].conv)
    put("conv_norm_out", network.leave[-1][0])
    put("conv_out", network.leave[-1][2])
    return parts


def test_same_weights_give_the_same_as_in_diffusers():
    from diffusers import UNet2DModel

    config = UNetConfig(
        latent_channels=3,
        channels=64,
        multipliers=(1, 2, 3),
        blocks=2,
        attention_factors=(2, 4),
        head_width=16,
    )
    network = build(config, scramble=True).eval()
    twin = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(64, 128, 192),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=32,
        flip_sin_to_cos=True,
        freq_shift=0,
    ).eval()
    twin.load_state_dict(diffusers_weights(network, config))  # strict: every weight has its twin
    x, c_noise = normal(2, 3, 16, 24), torch.tensor([-1.3, 0.9])
    with torch.no_grad():
        ours, theirs = network(x, c_noise), twin(x, c_noise).sample
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


# ------------------------------------------------------------------------------- behaviour
def test_the_noise_level_is_embedded_as_cosines_and_sines():
    waves = sinusoids(torch.tensor([0.5, -2.0]), 4)
    expected = torch.tensor([[0.5, 0.005], [-2.0, -0.02]])
    torch.testing.assert_close(waves, torch.cat([expected.cos(), expected.sin()], 1))


@pytest.mark.parametrize(
    "width, groups", [(224, 32), (64, 32), (32, 16), (16, 8), (48, 16), (36, 4), (2, 1)]
)
def test_group_count(width, groups):
    assert group_norm(width).num_groups == groups


def test_starts_as_zero_made_of_identities():
    network, h = build(), normal(2, 32, 4, 4)
    assert network(normal(2, 4, 8, 8), torch.zeros(2)).abs().max() == 0
    assert torch.equal(network.middle_in(h, normal(2, 64)), h)


def test_gradient_reaches_every_parameter():
    network = build(scramble=True).double()
    x = normal(2, 4, 8, 8).double().requires_grad_()
    network(x, torch.tensor([-1.0, 0.5]).double()).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name  # rounding alone gives 1e-17
    assert x.grad.abs().min() > 0


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
        ({"dropout": 1.0}, "'dropout'"),
        ({"type": "adm"}, "'type'"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(tree, message):
    with pytest.raises(UsageError, match=message):
        validate(UNetConfig, {"multipliers": [1, 2, 3], "attention_factors": [4], **tree})


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
    for step in range(250):
        optimizer.zero_grad()
        loss(seed=2 + step).backward()
        optimizer.step()
    assert before == pytest.approx(1, abs=0.1)
    assert loss(seed=1).item() < 0.2
