"""Compare stage two's training from pixels, from cached latents, and with diffusers, in one run.

    python -m benchmarks.stage_two [--quick] [--device auto] [--out docs/results]

The LDM UNet (274 M parameters) is trained on latents of 256² images: encoded on the fly by
LiteVAE-B, by our SD-VAE or by diffusers' `AutoencoderKL`, or read from memory as from a cache. Both
sides take the same step: preconditioning, loss, Adam. Weights are random, and equal on both sides
for the same network. Times are medians of interleaved repeats. On a CPU: float32, eager. On a CUDA
GPU: bfloat16, channels last and `torch.compile` on both sides; our next batch is encoded on a
separate stream, as in `ldm train-diffusion`.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from torch import Tensor, nn

from autoencoders import build_autoencoder
from benchmarks.comparison import (
    Row,
    Target,
    compare,
    describe_machine,
    judge,
    measuring_parser,
    write,
)
from diffusion import EDM, DenoisingLoss, EDMConfig, UNet, UNetConfig, karras_sigmas, sample_heun
from diffusion.edm import sample_sigma
from diffusion.formats import diffusers_config, to_diffusers
from ldm.device import keep_freed_memory, memory_format, one_ahead, resolve_device, time_interleaved
from ldm.images import to_float
from pipelines.latents import Codec

PEER = "diffusers"
TRAINING, STEP, SAMPLING, ENCODING = (
    "training, from 256² pixels", "UNet's training step", "sampling, latents", "encoding a batch"
)  # fmt: skip
LITEVAE, SDVAE, CACHED = "LiteVAE-B, on the fly", "SD-VAE, on the fly", "cached latents"
CPU_TARGETS = (
    Target("LiteVAE-B beside SD-VAE", TRAINING, LITEVAE, SDVAE, 1.8),
    Target("LiteVAE-B beside the cache", TRAINING, LITEVAE, CACHED, 0.6),
    Target("UNet's training step", STEP, "ours", PEER, 1.15),
)
GPU_TARGETS = (
    Target("LiteVAE-B beside the cache", TRAINING, LITEVAE, CACHED, 0.9),
    Target("SD-VAE, encoded one ahead, beside diffusers in turn", TRAINING, SDVAE, PEER, 1.3),
    Target("UNet's training step", STEP, "ours", PEER, 1.3),
)


@dataclass(frozen=True)
class Setting:
    """The device, the size of the inputs, and the number of repeats."""

    device: torch.device
    batch: int
    """Images in a batch."""
    resolution: int
    """Side of the images, in pixels."""
    repeats: int
    """Timed calls of each side, after an untimed one."""
    batches: int
    """Training steps in a call: enough on a GPU for the next batch to be encoded meanwhile."""
    network: UNetConfig = field(default_factory=UNetConfig)
    """The UNet, on both sides."""
    sampling_steps: int = 4
    """Steps of Heun's sampler."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


# ------------------------------------------------------------------------------------- models
class Peer(nn.Module):
    """diffusers' UNet with our weights, called as our `EDM` calls a network."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        config = diffusers_config(network.config)
        self.unet: Any = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
        self.unet.load_state_dict(to_diffusers(network.state_dict(), network.config))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """(B, n_z, h, w), (B,) → (B, n_z, h, w)."""
        return self.unet(x, c_noise).sample


def ours(setting: Setting) -> UNet:
    """Build our UNet with random weights, none of them 0: no work is skipped or denormal."""
    torch.manual_seed(0)
    network = UNet(setting.network)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def placed(module: Any, setting: Setting) -> Any:
    """Move a module to the device, in its usual layout; compile it on a GPU."""
    module.to(setting.device, memory_format=memory_format(setting.device))
    if setting.on_gpu:
        module.compile()
    return module


def codec(name: str, setting: Setting) -> Codec:
    """Build one of our autoencoders as stage two sees it."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(name)
    placed(autoencoder.encoder, setting)
    return Codec(autoencoder, torch.zeros(4), torch.ones(4)).to(setting.device)


def peer_encoder(setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """Build diffusers' SD-VAE; images and posterior noise to latents, as our `Codec.encode`."""
    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    ).eval()
    model.requires_grad_(False)
    placed(model.encoder, setting)
    model.to(setting.device)

    @torch.no_grad()
    def encode(images: Tensor, noise: Tensor) -> Tensor:
        posterior = model.encode(images).latent_dist
        return (posterior.mean + posterior.std * noise) * 0.5

    return encode


# ---------------------------------------------------------------------------------- measuring
def precision(setting: Setting) -> torch.autocast:
    """bfloat16 for networks on a GPU, float32 on a CPU."""
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.on_gpu)


def training_step(network: nn.Module, setting: Setting) -> Callable[[Tensor], None]:
    """Make a network's training step on a batch of latents."""
    objective = DenoisingLoss(EDM(placed(network, setting)))
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-5, fused=True)
    draws = torch.Generator().manual_seed(0)

    def step(z: Tensor) -> None:
        sigma = sample_sigma(torch.randn(len(z), generator=draws), EDMConfig()).to(z.device)
        noise = torch.randn(z.shape, generator=draws).to(z.device)
        with precision(setting):
            minimised, _ = objective(z, sigma, noise)
        minimised.mean().backward()
        norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()

    return step


def pixels(setting: Setting) -> list[Tensor]:
    """Draw batches of uint8 images as the loader returns them."""
    draws = torch.Generator().manual_seed(0)
    shape = (setting.batch, 3, setting.resolution, setting.resolution)
    batches = [
        torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8)
        for _ in range(setting.batches)
    ]
    return [batch.pin_memory() for batch in batches] if setting.on_gpu else batches


def prepare(
    encode: Callable[[Tensor, Tensor], Tensor], setting: Setting, images: Tensor
) -> tuple[Tensor]:
    """Encode uint8 images on the host to latents on the device."""
    layout = memory_format(setting.device)
    images = images.to(setting.device, non_blocking=True).contiguous(memory_format=layout)
    noise = torch.randn(latent_shape(setting), device=setting.device)
    with precision(setting):
        return (encode(to_float(images), noise).float(),)


def latent_shape(setting: Setting) -> tuple[int, int, int, int]:
    """(B, n_z, h, w)."""
    side = setting.resolution // 8
    return (setting.batch, setting.network.latent_channels, side, side)


def train(step: Callable[[Tensor], None], latents: Iterable[tuple[Tensor]]) -> None:
    """Take a step on each batch of latents."""
    for (z,) in latents:
        step(z)


# --------------------------------------------------------------------------------- the groups
def measure_training(setting: Setting) -> list[Row]:
    """Time training with its data path, and the UNet's step and the encoders alone."""
    network = ours(setting)
    theirs = Peer(network)
    step, their_step = training_step(network, setting), training_step(theirs, setting)
    encoders: dict[str, Callable[..., Tensor]] = {
        LITEVAE: codec("litevae-b", setting).encode,
        SDVAE: codec("sdvae", setting).encode,
    }
    encoders[PEER] = peer_encoder(setting)
    images = pixels(setting)
    cached = [(torch.randn(latent_shape(setting)) * 0.5,) for _ in images]

    def on_the_fly(name: str, step: Callable[[Tensor], None], ahead: bool) -> None:
        make = partial(prepare, encoders[name], setting)
        train(step, one_ahead(images, make, setting.device) if ahead else map(make, images))

    def from_cache(step: Callable[[Tensor], None]) -> None:
        train(step, ((z.to(setting.device),) for (z,) in cached))

    calls: dict[str, Callable[[], Any]] = {
        LITEVAE: partial(on_the_fly, LITEVAE, step, True),
        SDVAE: partial(on_the_fly, SDVAE, step, True),
        CACHED: partial(from_cache, step),
        PEER: partial(on_the_fly, PEER, their_step, False),
        f"{PEER}, {CACHED}": partial(from_cache, their_step),
    }
    calls |= {
        f"encode {name}": lambda name=name: [prepare(encoders[name], setting, i) for i in images]
        for name in encoders
    }
    seconds = time_interleaved(calls, setting.repeats, setting.device)
    count = setting.batch * setting.batches
    whole = {name: seconds[name] for name in (LITEVAE, SDVAE, CACHED, PEER)}
    steps = {"ours": seconds[CACHED], PEER: seconds[f"{PEER}, {CACHED}"]}
    encoding = {name: seconds[f"encode {name}"] for name in encoders}
    return [
        *compare(TRAINING, whole, PEER, count),
        *compare(STEP, steps, PEER, count),
        *compare(ENCODING, encoding, PEER, count),
    ]


def measure_sampling(setting: Setting) -> list[Row]:
    """Time Heun's sampler around either UNet, without the decoder."""
    network = ours(setting).eval()
    noise, sigmas = torch.randn(latent_shape(setting)), karras_sigmas(setting.sampling_steps)
    denoisers = {"ours": EDM(network), PEER: EDM(Peer(network).eval())}
    for denoiser in denoisers.values():
        placed(denoiser.network, setting)
    with torch.no_grad(), precision(setting):
        calls = {
            name: partial(sample_heun, denoiser, noise.to(setting.device), sigmas)
            for name, denoiser in denoisers.items()
        }
        seconds = time_interleaved(calls, setting.repeats, setting.device)
    return compare(SAMPLING, seconds, PEER, setting.batch)


# ---------------------------------------------------------------------------------------- run
def main(arguments: list[str]) -> None:
    """Measure, write, and print the page."""
    parser = measuring_parser(__doc__, "a narrow UNet, 64² images", "4; 48 on a GPU")
    given = parser.parse_args(arguments)
    device = resolve_device(given.device)
    if given.keep_memory:
        keep_freed_memory(device)
    if given.quick:
        narrow = UNetConfig(channels=64, multipliers=(1, 2))
        setting = Setting(device, 2, 64, 2, 1, narrow, sampling_steps=2)
    elif device.type == "cuda":
        setting = Setting(device, 48, 256, 5, 20, sampling_steps=18)
    else:
        setting = Setting(device, 4, 256, 3, 1)
    if given.batch:
        setting = replace(setting, batch=given.batch)
    table = measure_training(setting) + measure_sampling(setting)
    targets = () if given.quick else GPU_TARGETS if setting.on_gpu else CPU_TARGETS
    facts: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.stage_two", *arguments]),
        **describe_machine(device, "bfloat16, compiled" if setting.on_gpu else "float32"),
        "batch": f"{setting.batch} images of {setting.resolution}²",
        "repeats": f"{setting.repeats} of {setting.batches} training step(s)",
        "sampling": f"{setting.sampling_steps} steps of Heun's sampler",
    }
    title = "Stage two: training and sampling beside a cache and diffusers"
    name = "stage_two-keep-memory" if given.keep_memory else "stage_two"
    print(write(given.out, name, title, facts, table, judge(targets, table)))


if __name__ == "__main__":
    main(sys.argv[1:])
