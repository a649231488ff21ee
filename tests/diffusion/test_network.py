"""The contract of `Network`: conditions, precision, gradients and refusals of every network."""

import pytest
import torch
from torch import nn

from diffusion import EDM, DiTConfig, EDM2Config, UNetConfig, build_network, denoising_loss
from diffusion.edm2 import MPModule
from ldm.errors import LdmError


def change(config, **fields):
    return config.model_copy(update=fields)


UNET = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, head_width=8)
EDM2 = EDM2Config(
    channels=16, multipliers=(1, 2), blocks=1, attention_factors=(2,), head_width=16
)  # fmt: skip
DIT = DiTConfig(width=32, depth=2, heads=2)
CONDITIONS = {"classes": 3, "augment_parameters": 9}
CONFIGS = {
    "unet": UNET,
    "unet-conditional": change(UNET, **CONDITIONS),
    "unet-full": change(UNET, **CONDITIONS, scale_shift=True, resample_blocks=True, heads=2),
    "edm2": EDM2,
    "edm2-conditional": change(EDM2, **CONDITIONS),
    "dit": DIT,
    "dit-conditional": change(DIT, **CONDITIONS),
    "dit-lightning": change(
        DIT, **CONDITIONS, mlp="swiglu", norm="rms", positions="both", qk_norm=True, patch=1,
        mlp_ratio=3.3,
    ),
    "dit-rotary": change(DIT, positions="rotary", qk_norm=True, frequency_shift=1),
}  # fmt: skip


def each(holds=lambda config: True):
    """Parametrise a test over the configs of which `holds` is true."""
    chosen = {name: config for name, config in CONFIGS.items() if holds(config)}
    return pytest.mark.parametrize("config", chosen.values(), ids=chosen)


def build(config, scramble=False, seed=0):
    """A network from a seed; scrambled, so that the layers that start at 0 count too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config)
        for parameter in network.parameters() if scramble else ():
            if parameter.ndim:
                nn.init.normal_(parameter, std=0.15)
            else:  # a gain of EDM2, whose filters are used at norm 1
                nn.init.constant_(parameter, 0.7)
    return network


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(config, *labels):
    """Latents and noise levels, and labels and augmentations as far as the network has them."""
    count = len(labels)
    known = torch.tensor(labels).clamp(max=config.classes - 1)  # −1, none, without classes
    augment = normal(count, config.augment_parameters, seed=1)
    return normal(count, 4, 8, 4), torch.linspace(-1, 1, count), known, augment


@each()
def test_starts_as_zero(config):
    network = build(config)
    assert network.config is config
    assert network(*inputs(config, 0, -1)).abs().max() == 0


@each()
def test_state_dict_round_trip(config):
    ours, theirs = (build(config, scramble=True, seed=seed).eval() for seed in (0, 1))
    batch = inputs(config, 0, -1)
    assert not torch.equal(ours(*batch), theirs(*batch))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(*batch), theirs(*batch))


# ------------------------------------------------------------------------------ conditions
@each()
def test_noise_level_matters_and_images_do_not_mix(config):
    network, batch = build(config, scramble=True).eval(), inputs(config, 0, 1, 2)
    out, (x, c_noise, *conditions) = network(*batch), batch
    assert (out - network(x, c_noise + 0.5, *conditions)).abs().max() > 5e-3
    alone = network(*(part[1:2] for part in batch))
    torch.testing.assert_close(alone, out[1:2], rtol=1e-4, atol=1e-5)


@each()
def test_no_label_is_minus_one_and_no_augmentation_is_zeros(config):
    network, batch = build(config, scramble=True).eval(), (normal(2, 4, 8, 8), torch.zeros(2))
    nothing = torch.full((2,), -1), torch.zeros(2, config.augment_parameters)
    assert torch.equal(network(*batch, *nothing), network(*batch))


@each(lambda config: config.classes)
def test_classes_and_augmentations_matter_to_their_image_alone(config):
    network, batch = build(config, scramble=True).eval(), (normal(3, 4, 8, 8), torch.zeros(3))
    nothing, augment = network(*batch), torch.zeros(3, 9)
    answers = [nothing[1]]
    for label in range(3):
        labels = torch.tensor([-1, label, -1])
        out = network(*batch, labels)
        assert torch.equal(network(*batch, labels, augment), out)
        torch.testing.assert_close(out[::2], nothing[::2], rtol=1e-4, atol=1e-5)
        answers.append(out[1])
    assert torch.pdist(torch.stack(answers).flatten(1), torch.inf).min() > 5e-3
    augment[0, 3] = 1
    out = network(*batch, None, augment)
    assert (out[0] - nothing[0]).abs().max() > 5e-3
    torch.testing.assert_close(out[1:], nothing[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [UNET, EDM2, DIT], ids=["unet", "edm2", "dit"])
@pytest.mark.parametrize(
    ("knows", "labels", "augment", "message"),
    [
        ({"classes": 3}, [0, 3], None, "label 3 is none of this network's 3 classes: use 0"),
        ({"classes": 3}, [-2, 0], None, "label -2 is none of"),
        ({}, [-1, 0], None, "label 0 was given to a network without classes: leave labels out"),
        ({"augment_parameters": 9}, None, 8, "augmentation parameters are .2, 8.: .* takes .2, 9"),
        ({}, None, 9, "augmentation parameters are .2, 9.: .* takes .2, 0"),
        ({"classes": 3}, 1, None, "labels are torch.int64 .*: they must be int64 .2,.$"),
        ({"classes": 3}, [1], None, "labels are torch.int64 .1,."),
        ({"classes": 3}, [0.5, 1.0], None, "labels are torch.float32"),
    ],
)
def test_unknown_conditions_are_refused(config, knows, labels, augment, message):
    labels = None if labels is None else torch.tensor(labels)
    augment = None if augment is None else torch.zeros(2, augment)
    with pytest.raises(LdmError, match=f"^{message}"):
        build(change(config, **knows))(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, augment)


@pytest.mark.parametrize(
    "config",
    [change(UNET, multipliers=(1,) * 3), change(EDM2, multipliers=(1,) * 3), change(DIT, patch=4)],
    ids=["unet", "edm2", "dit"],
)
def test_sides_that_are_no_multiples_are_refused(config):
    network = build(config)
    for sides in ((10, 8), (8, 7)):
        message = f"{sides[0]}×{sides[1]} do not fit this {type(network).__name__}: both sides .*"
        with pytest.raises(LdmError, match=message + "multiples of 4$"):
            network(normal(1, 4, *sides), torch.zeros(1))
    assert network(normal(1, 4, 12, 8), torch.zeros(1)).shape == (1, 4, 12, 8)


# ------------------------------------------------------------------------------- precision
@each()
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_in_bfloat16_it_is_nearly_the_same(config, way):
    network, (x, c_noise, *conditions) = build(config, scramble=True).eval(), inputs(config, 0, -1)
    plain = network(x, c_noise, *conditions)
    if way == "weights":
        answer = network.bfloat16()(x.bfloat16(), c_noise.bfloat16(), *conditions)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(x, c_noise, *conditions)
    assert answer.dtype == torch.bfloat16
    assert 0 < (answer - plain).abs().max() < 0.05 * plain.abs().max()


@each()
def test_a_time_step_keeps_its_precision_in_a_network_of_bfloat16(config):
    """999 is 1000 in bfloat16, so it is given in float32."""
    network, x = build(config, scramble=True).eval().bfloat16(), normal(1, 4, 8, 8).bfloat16()
    assert not torch.equal(*(network(x, torch.tensor([t])) for t in (999.0, 1000.0)))


@each()
def test_channels_last_gives_the_same(config):
    network, (x, *rest) = build(config, scramble=True).eval(), inputs(config, 0, -1)
    plain, inside = network(x, *rest), []
    network, x = (t.to(memory_format=torch.channels_last) for t in (network, x))
    if config.type != "dit":  # its blocks see tokens
        network.middle_in.register_forward_hook(
            lambda *call: inside.append(call[-1].is_contiguous(memory_format=torch.channels_last))
        )
    torch.testing.assert_close(network(x, *rest), plain, rtol=1e-4, atol=1e-5)
    assert inside == [True] * (config.type != "dit")


# -------------------------------------------------------------------------------- training
@each()
def test_gradient_reaches_every_parameter(config):
    network = build(config, scramble=True).double()
    x, c_noise, *conditions = inputs(config, 0, 1, 2, -1)
    x = x.double().requires_grad_()
    network(x, c_noise.double(), *conditions).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name  # rounding alone gives 1e-17
    assert x.grad.abs().min() > 0


@each()
def test_every_parameter_has_a_gradient_without_conditions(config):
    """DDP waits for one of each."""
    network = build(config, scramble=True)
    network(normal(1, 4, 8, 8), torch.zeros(1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    if config.classes:
        embed = network.embed
        rows = embed.label.weight.grad.T if config.type == "edm2" else embed.classes.weight.grad
        assert rows[:3].abs().max() == 0
        assert len(rows) == 3 or rows[3].abs().max() > 0  # DiT has one of none


@each(lambda config: hasattr(config, "dropout"))
def test_dropout_acts_in_training_only(config):
    network, batch = build(change(config, dropout=0.5), scramble=True), inputs(config, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(network(*batch), network(*batch))
    network.eval()
    assert torch.equal(network(*batch), network(*batch))


@pytest.mark.parametrize(
    ("config", "side", "lr", "steps", "bound"),
    [(UNET, 8, 3e-3, 150, 0.45), (EDM2, 8, 2e-2, 80, 0.5), (DIT, 4, 3e-3, 150, 0.6)],
    ids=["unet", "edm2", "dit"],
)
def test_learns_four_images(config, side, lr, steps, bound):
    """Trained on four latents, it denoises them far better than Gaussian data can be denoised."""
    z = 0.5 * normal(4, 4, side, side).repeat_interleave(4, dim=0)  # each at every noise level
    sigma = torch.tensor([0.2, 0.5, 1.0, 2.0]).repeat(4)
    network = build(config)
    denoiser, optimizer = EDM(network), torch.optim.Adam(network.parameters(), lr=lr)

    def loss(seed):
        return denoising_loss(denoiser, z, sigma, normal(*z.shape, seed=seed)).mean()

    before = loss(seed=1).item()  # the network is 0: as good as the best for Gaussian data
    for step in range(steps):
        optimizer.zero_grad()
        loss(seed=2 + step).backward()
        optimizer.step()
        if isinstance(network, MPModule):
            network.normalize_weights()
    assert before == pytest.approx(1, abs=0.1)
    assert loss(seed=1).item() < bound


# ---------------------------------------------------------------------- gradient checkpointing
def gradients_and_memory(network, autocast):
    """Gradients of a sum of squares, and the bytes that the forward pass keeps for them."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network.zero_grad()
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        torch.manual_seed(1)  # of dropout
        loss = network(normal(2, 4, 16, 16), torch.zeros(2)).float().square().sum()
    loss.backward()
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in own)
    return {name: p.grad.clone() for name, p in network.named_parameters()}, bytes_kept


@pytest.mark.parametrize("autocast", [False, True])
@each()
def test_checkpointing_keeps_less_and_gives_the_same_gradients(config, autocast):
    if hasattr(config, "dropout"):
        config = change(config, dropout=0.2)
    network = build(config, scramble=True)
    names = list(network.state_dict())
    plain, plain_bytes = gradients_and_memory(network, autocast)
    network.checkpoint_blocks()
    recomputed, fewer_bytes = gradients_and_memory(network, autocast)
    assert list(network.state_dict()) == names
    assert fewer_bytes < plain_bytes / 3
    for parameter in plain:
        assert torch.equal(recomputed[parameter], plain[parameter]), parameter


@each()
def test_checkpointing_is_idle_without_gradients(config, monkeypatch):
    network, calls = build(config).eval(), []
    network.checkpoint_blocks()
    monkeypatch.setattr("diffusion.network.checkpoint", lambda *a, **k: calls.append(a))
    with torch.no_grad():
        network(normal(1, 4, 8, 8), torch.zeros(1))
    assert calls == []
