"""Properties of every discriminator, at every resolution of the paper."""

import copy

import pytest
import torch
from pydantic import ValidationError

from autoencoders.discriminators import (
    DISCRIMINATORS,
    DiscriminatorConfig,
    PatchGANConfig,
    StyleGANConfig,
    UNetDiscriminatorConfig,
    build_discriminator,
    split,
)
from autoencoders.losses.adversarial import hinge_discriminator
from ldm.config import Config, resolution_of, resolve
from ldm.errors import LdmError, UsageError


class Recipe(Config):
    """A config that has a discriminator, as a training recipe does."""

    discriminator: DiscriminatorConfig = UNetDiscriminatorConfig()
    """Judges."""


SMALL = {
    "unet": lambda resolution: UNetDiscriminatorConfig(channels=2, multipliers=(1, 2, 2, 4, 4)),
    "patchgan": lambda resolution: PatchGANConfig(channels=4),
    "stylegan": lambda resolution: StyleGANConfig(
        channels=2, max_channels=4, resolution=resolution
    ),
}


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=SMALL)
def kind(request):
    return request.param


def images_of(resolution, count=2):
    return torch.rand(count, 3, resolution, resolution) * 2 - 1


def test_every_kind_is_tried_here():
    assert SMALL.keys() == DISCRIMINATORS.keys()


@pytest.mark.parametrize("resolution", [64, 128, 256, 512])
def test_judges_and_learns_at_every_resolution(kind, resolution):
    config = SMALL[kind](resolution)
    config.check_resolution(resolution)
    net = build_discriminator(config)
    assert type(net) is DISCRIMINATORS[kind]
    images = images_of(resolution).requires_grad_()
    logits = net(images)
    assert isinstance(logits, tuple)
    shapes = {
        "unet": [(2, 1, resolution, resolution), (2, 1)],
        "patchgan": [(2, 1, resolution // 8 - 2, resolution // 8 - 2)],
        "stylegan": [(2, 1)],
    }
    assert [tuple(head.shape) for head in logits] == shapes[kind]
    assert {head.dtype for head in logits} == {torch.float32}
    sum((head - 1).square().mean() for head in logits).backward()
    # every image, everywhere: a discriminator that overlooks a part lets it be anything
    assert images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_bf16_autocast_answers_in_float32(kind):
    net = build_discriminator(SMALL[kind](64))
    twin, images = copy.deepcopy(net), images_of(64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images)
    for head, other in zip(logits, twin(images), strict=True):
        assert head.dtype == torch.float32
        assert (head - other).abs().max() < 0.1 * (1 + other.abs().max())


def test_a_logit_does_not_depend_on_the_batch(kind):
    """One pass over real and fake is two; where the network holds no batch statistics."""
    net = build_discriminator(SMALL[kind](64)).eval()
    real, fake = images_of(64), images_of(64)
    together = split(net(torch.cat([real, fake])), 2)
    for logits, images in zip(together, (real, fake), strict=True):
        alone = net(images)
        assert type(logits) is type(alone)
        for head, expected in zip(logits, alone, strict=True):
            torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-5)


def test_training_mode_judges_as_eval_mode_does(kind):
    net = build_discriminator(SMALL[kind](64))
    images = images_of(64)
    for _ in range(100 if kind == "unet" else 1):
        trained = net(images)  # spectral norm's iteration converges
    for head, expected in zip(net.eval()(images), trained, strict=True):
        torch.testing.assert_close(head, expected, rtol=1e-2, atol=1e-3)


def test_state_dict_round_trip(kind):
    net, twin = (build_discriminator(SMALL[kind](64)) for _ in range(2))
    images = images_of(64)
    twin.load_state_dict(net.state_dict())
    for head, other in zip(net.eval()(images), twin.eval()(images), strict=True):
        assert torch.equal(head, other)


def test_learns_to_tell_two_kinds_of_image_apart(kind):
    """20 steps of hinge loss on noisy against plain images."""
    wider = {"unet": UNetDiscriminatorConfig(channels=8, multipliers=(1, 2))}
    net = build_discriminator(wider.get(kind, SMALL[kind](64)))
    rate = 5e-2 if kind == "stylegan" else 5e-3  # of unit weights, which move by less of themselves
    optimizer = torch.optim.Adam(net.parameters(), rate, (0.5, 0.9))
    losses = []
    for _ in range(20):
        plain = (torch.rand(4, 3, 1, 1) * 2 - 1).expand(4, 3, 64, 64)
        real, fake = split(net(torch.cat([images_of(64, count=4), plain])), 2)
        loss = hinge_discriminator(real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_split_takes_equal_parts_in_order():
    maps, images = torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6.0).view(6, 1)
    parts = split((maps, images), 3)
    assert [head.flatten().tolist() for head in parts[1]] == [[2, 3], [2, 3]]
    assert len(parts) == 3
    with pytest.raises(AssertionError, match="6 images in 4"):
        split((maps, images), 4)


# -------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (SMALL["unet"](64), (64, 48), "halves images 5 times, .* multiples of 32"),
        (SMALL["unet"](64), (0, 64), "multiples of 32"),
        (SMALL["patchgan"](64), (23, 64), "3 layers needs images of at least 24 pixels"),
        (SMALL["patchgan"](64), (64, 8), "lower discriminator.layers"),
        (
            SMALL["stylegan"](64),
            (128, 128),
            r"discriminator\.resolution=64, not 128: set ",
        ),
        (
            SMALL["stylegan"](64),
            (64, 32),
            "takes square images, not 64×32: .* discriminator.type=unet or patchgan",
        ),
    ],
)
def test_images_of_another_size_are_refused(config, size, said):
    with pytest.raises(LdmError, match=f"{size[0]}×{size[1]} pixels: the .*{said}") as caught:
        build_discriminator(config)(torch.zeros(1, 3, *size))
    assert "\n" not in str(caught.value)
    # the same words before any training
    with pytest.raises(ValueError, match=said):
        config.check_resolution(resolution_of(*size))


@pytest.mark.parametrize("resolution", [4, 0, 96, 100, -64])
def test_stylegan_takes_powers_of_two(resolution):
    with pytest.raises(ValidationError, match=r"power of two|greater than 0"):
        StyleGANConfig(resolution=resolution)


def test_the_type_chooses_and_a_key_of_another_is_refused():
    chosen = resolve(Recipe, {}, ["discriminator.type=patchgan", "discriminator.layers=2"])
    assert chosen.discriminator == PatchGANConfig(layers=2)
    assert resolve(Recipe, {}).discriminator == UNetDiscriminatorConfig()
    with pytest.raises(UsageError, match=r"'discriminator\.layers': it belongs to another type"):
        resolve(Recipe, {}, ["discriminator.type=stylegan", "discriminator.layers=2"])
    with pytest.raises(UsageError, match="discriminator"):
        resolve(Recipe, {}, ["discriminator.type=vit"])
