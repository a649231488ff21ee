"""Every network of the public surface computes in the type of its parameters."""

from copy import deepcopy

import pytest
import torch

from autoencoders import build_autoencoder
from autoencoders.discriminators import (
    PatchGANConfig,
    StyleGANConfig,
    UNetDiscriminatorConfig,
    build_discriminator,
)
from diffusion import (
    EDM,
    DiscreteConfig,
    DiscreteDenoiser,
    DiTConfig,
    EDM2Config,
    FlowDenoiser,
    UNetConfig,
    build_network,
)
from diffusion.edm import Uncertainty
from ldm.device import cast_for_autocast

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NARROW = {"channels": 8, "multipliers": [1, 2]}
DECODER = {"channels": 8, "multipliers": [1, 1, 2, 2]}
LITEVAE = {"extractor": NARROW, "aggregator": NARROW}
AUTOENCODERS = {
    "litevae": {"encoder": LITEVAE, "decoder": DECODER},
    "smc": {"encoder": LITEVAE, "decoder": DECODER | {"norm": "smc"}, "conv1x1": True},
    "nafnet": {
        "encoder": LITEVAE | {"extractor": {"type": "nafnet"}, "shared": True},
        "decoder": {"channels": 8, "multipliers": [1, 1, 2], "output": "wavelet"},
    },
    "vit": {"encoder": {"aggregator": {"type": "vit"}, "extractor": NARROW}, "decoder": DECODER},
    "db2": {"encoder": LITEVAE | {"wavelet": "db2"}, "decoder": DECODER},
    "sdvae": {"encoder": {"type": "sdvae"} | DECODER, "decoder": DECODER, "conv1x1": True},
    "dwt": {"encoder": {"type": "dwt"}, "decoder": DECODER, "conv1x1": True},
}
DISCRIMINATORS = [
    UNetDiscriminatorConfig(channels=4, multipliers=(1, 2)),
    PatchGANConfig(channels=4, layers=2),
    StyleGANConfig(resolution=32, channels=4),
]
NETWORKS = [
    UNetConfig(channels=16, multipliers=(1, 2), blocks=1, head_width=8, classes=3),
    EDM2Config(channels=16, multipliers=(1, 2), blocks=1, head_width=8, classes=3),
    DiTConfig(width=32, depth=2, heads=2, classes=3),
    DiTConfig(
        width=32, depth=2, heads=2, classes=3, mlp="swiglu", norm="rms", positions="both",
        qk_norm=True,
    ),
]  # fmt: skip


def check(outputs, exact, dtype):
    """Finite, and near the outputs of float64."""
    tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02}.get(dtype, 1e-4)
    for output, expected in zip(outputs, exact, strict=True):
        assert output.isfinite().all()
        error = (output.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(side=32):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoders(name):
    latent_channels = {"latent_channels": 12} if name == "dwt" else {}
    model = build_autoencoder("litevae-b", **AUTOENCODERS[name], **latent_channels).eval()
    exact = None
    for dtype in DTYPES:
        network = deepcopy(model).to(dtype)
        for each in (network, network.fuse()):
            for given in (images(), images().to(dtype)):
                posterior = each.encode(given)
                latents = posterior.mean if exact is None else exact[0]
                outputs = posterior.mean, each.decode(latents)
                assert {output.dtype for output in (*outputs, each(given).recon)} == {torch.float32}
                exact = exact or outputs
                check(outputs, exact, dtype)


@pytest.mark.parametrize("config", DISCRIMINATORS, ids=lambda config: config.type)
def test_discriminators(config):
    discriminator, exact = build_discriminator(config).eval(), None
    for dtype in DTYPES:
        logits = deepcopy(discriminator).to(dtype)(images().to(dtype))
        assert {maps.dtype for maps in logits} == {torch.float32}
        exact = exact or logits
        check(logits, exact, dtype)


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.type)
@torch.no_grad()
def test_denoisers(config):
    network = build_network(config).eval()
    for parameter in network.parameters():  # an untrained network answers 0
        if not parameter.any():
            parameter.normal_(std=0.1)
    x = torch.randn(2, 4, 16, 16)
    for denoiser in (
        EDM(network),
        DiscreteDenoiser(network, DiscreteConfig()),
        FlowDenoiser(network),
    ):
        exact = None
        for dtype in DTYPES:
            sigma, labels = torch.tensor([0.5, 2.0]), torch.tensor([0, 2])
            output = deepcopy(denoiser).to(dtype)(x, sigma, labels)
            assert output.dtype == torch.promote_types(dtype, torch.float32)
            exact = exact or (output,)
            check((output,), exact, dtype)


def test_uncertainty():
    uncertainty, c_noise = Uncertainty(8), torch.linspace(-1, 1, 5)
    exact = deepcopy(uncertainty).double()(c_noise)
    for dtype in DTYPES:
        check((deepcopy(uncertainty).to(dtype)(c_noise),), (exact,), dtype)


# ----------------------------------------------------------- weights that autocast casts, cast once
@torch.no_grad()
def same_under_autocast(network, call):
    """The copy's outputs are the network's to the bit, and its large weights need no cast."""
    copy = cast_for_autocast(network)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(call(copy), call(network), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    changed = [tensor.dtype for tensor in copy.state_dict().values()]
    assert changed[0] == torch.float32 and torch.bfloat16 in changed
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    norms = [part for part in copy.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert all(norm.weight.dtype == torch.float32 for norm in norms)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_cast_once_computes_the_same_bits(name):
    latent_channels = {"latent_channels": 12} if name == "dwt" else {}
    model = build_autoencoder("litevae-b", **AUTOENCODERS[name], **latent_channels).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    def call(ae):
        posterior = ae.encode(images())
        return posterior.mean, posterior.logvar, ae.decode(posterior.mean)

    same_under_autocast(model, call)


@pytest.mark.parametrize("config", [NETWORKS[0], *NETWORKS[2:]], ids=["ldm", "dit", "lightning"])
def test_a_denoiser_cast_once_computes_the_same_bits(config):
    denoiser = EDM(build_network(config)).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)  # as samplers have it
    labels = torch.tensor([0, -1])
    same_under_autocast(denoiser, lambda d: [d(x, 2.0, labels), d(x.float(), 0.1)])
