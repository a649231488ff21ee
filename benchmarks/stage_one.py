"""Compare stage one's speed and memory with diffusers' `AutoencoderKL`, in one run, as ratios.

    python -m benchmarks.stage_one [--quick] [--device auto] [--out docs/results]

Both sides have the same precision, batch and random weights (SD-VAE's are equal). Times are medians
of interleaved repeats, so that other load on the machine affects all sides alike. Peak memory is
that of one forward pass in a fresh process. On a CPU: float32, eager. On a CUDA GPU: bfloat16,
channels last and `torch.compile` on both sides.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from autoencoders import Autoencoder, build_autoencoder
from autoencoders.sdvae.formats import from_diffusers
from autoencoders.wavelet import dwt_cascade
from benchmarks.comparison import (
    Row,
    Target,
    compare,
    describe_machine,
    judge,
    measuring_parser,
    write,
)
from ldm.device import (
    keep_freed_memory,
    memory_format,
    resolve_device,
    synchronise,
    time_interleaved,
)

PEER = "diffusers"
OURS = ("litevae-s", "litevae-b", "litevae-m", "litevae-l", "sdvae")


@dataclass(frozen=True)
class Setting:
    """The device, the size of the inputs, and the number of repeats."""

    device: torch.device
    batch: int
    """Images in a batch."""
    resolution: int
    """Side of the images, in pixels; a training step takes half of it."""
    repeats: int
    """Timed calls of each side, after an untimed one."""
    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of SD-VAE at each resolution, the image's first."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


ENCODER, DECODER, WAVELET, STEP = "encoder", "decoder", "Haar, 3 levels", "training step"
PARTS, WHOLE = "training step, sdvae", "train=all"
CPU_TARGETS = (
    Target("encoder B", ENCODER, "litevae-b", PEER, 5),
    Target("encoder S", ENCODER, "litevae-s", PEER, 24),
    Target("SD-VAE's encoder", ENCODER, "sdvae", PEER, 1.25),
    Target("encoder B", ENCODER, "litevae-b", PEER, 0.36, of_memory=True),
    Target("wavelet transform", WAVELET, "ours", "ptwt", 2.4),
    Target("fused SMC decoder", DECODER, "SMC, fused", PEER, 1.2),
)
GPU_TARGETS = (
    Target("encoder B", ENCODER, "litevae-b", PEER, 3),
    Target("encoder B", ENCODER, "litevae-b", PEER, 0.36, of_memory=True),
)


# ------------------------------------------------------------------------------------- models
def peer(widths: tuple[int, ...]) -> Any:
    """Build diffusers' AutoencoderKL with SD-VAE's config, in eval mode."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=2,
    ).eval()


def ours(name: str, widths: tuple[int, ...], **decoder: Any) -> Autoencoder:
    """Build one of our presets, in eval mode."""
    torch.manual_seed(0)
    sizes = {"channels": widths[0], "multipliers": [width // widths[0] for width in widths]}
    encoder = {"encoder": sizes} if name == "sdvae" else {}
    return build_autoencoder(name, decoder={**sizes, **decoder}, **encoder).eval()


def twin(widths: tuple[int, ...]) -> Autoencoder:
    """Build our SD-VAE with the peer's weights, in eval mode."""
    ae = ours("sdvae", widths)
    ae.load_state_dict(from_diffusers(peer(widths).state_dict()))
    return ae


def placed(model: Any, setting: Setting) -> Any:
    """Move a model to the device, in its usual layout; on a GPU, compile both networks."""
    model.to(setting.device, memory_format=memory_format(setting.device))
    if setting.on_gpu:
        model.encoder.compile()
        model.decoder.compile()
    return model


def images_for(setting: Setting, resolution: int) -> Tensor:
    """Draw images (B, 3, resolution, resolution) in [−1, 1], always the same."""
    shape = (setting.batch, 3, resolution, resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(setting.device, memory_format=memory_format(setting.device))


# ---------------------------------------------------------------------------------- measuring
@contextmanager
def inference(setting: Setting) -> Iterator[None]:
    """Turn gradients off; bfloat16 on a GPU."""
    with torch.no_grad(), precision(setting):
        yield


def precision(setting: Setting) -> torch.autocast:
    """bfloat16 for networks on a GPU, float32 on a CPU."""
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.on_gpu)


def peak_mib(name: str, setting: Setting) -> float:
    """Measure the memory of one encoder pass, in MiB beyond the loaded model.

    The process must be fresh.
    """
    model = placed(peer(setting.widths) if name == PEER else ours(name, setting.widths), setting)
    images = images_for(setting, setting.resolution)
    with inference(setting):
        model.encode(images[:1, :, :64, :64])  # libraries and kernels are loaded before the count
        if setting.on_gpu:
            model.encode(images)  # and compiled for this shape
            synchronise(setting.device)
            torch.cuda.reset_peak_memory_stats(setting.device)
            before = torch.cuda.memory_allocated(setting.device)
            model.encode(images)
            return (torch.cuda.max_memory_allocated(setting.device) - before) / 2**20
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model.encode(images)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units_in_a_mib = 2**20 if sys.platform == "darwin" else 2**10  # macOS: bytes; Linux: KiB
    return (after - before) / units_in_a_mib


def peak_in_fresh_process(name: str, arguments: list[str]) -> float:
    """Run `peak_mib` in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.stage_one", *arguments, "--peak-of", name]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(answer.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------- the groups
def measure_encoders(setting: Setting, arguments: list[str]) -> list[Row]:
    """Time and measure the encoders: images to posteriors."""
    names = (*OURS, PEER)
    peaks = {name: peak_in_fresh_process(name, arguments) for name in names}
    models: dict[str, Any] = {name: ours(name, setting.widths) for name in OURS}
    models |= {"sdvae": twin(setting.widths), PEER: peer(setting.widths)}
    images = images_for(setting, setting.resolution)
    with inference(setting):
        calls = {
            name: lambda model=placed(model, setting): model.encode(images)
            for name, model in models.items()
        }
        return compare(
            ENCODER,
            time_interleaved(calls, setting.repeats, setting.device),
            PEER,
            setting.batch,
            peaks,
        )


def measure_decoders(setting: Setting) -> list[Row]:
    """Time the decoders, with GroupNorm or self-modulated convolution, as they are or fused."""
    smc = ours("sdvae", setting.widths, norm="smc")
    models = {
        "GroupNorm": twin(setting.widths),
        "GroupNorm, fused": twin(setting.widths).fuse(),
        "SMC": smc,
        "SMC, fused": smc.fuse(),
        PEER: peer(setting.widths),
    }
    side = setting.resolution // 2 ** (len(setting.widths) - 1)
    latents = torch.randn(setting.batch, 4, side, side, device=setting.device)
    latents = latents.contiguous(memory_format=memory_format(setting.device))
    with inference(setting):
        calls = {
            name: lambda model=placed(model, setting): model.decode(latents)
            for name, model in models.items()
        }
        return compare(
            DECODER, time_interleaved(calls, setting.repeats, setting.device), PEER, setting.batch
        )


def measure_wavelets(setting: Setting) -> list[Row]:
    """Time three levels of the Haar transform, in float32, eager: ptwt does not compile."""
    import ptwt

    images = images_for(setting, setting.resolution).contiguous()
    with torch.no_grad():
        calls = {
            "ours": lambda: [dwt_cascade(images, 3) for _ in range(10)],
            "ptwt": lambda: [ptwt.wavedec2(images, "haar", level=3) for _ in range(10)],
        }
        return compare(
            WAVELET,
            time_interleaved(calls, setting.repeats, setting.device),
            "ptwt",
            10 * setting.batch,
        )


def measure_training(setting: Setting) -> list[Row]:
    """Time training steps at half the resolution, where training begins."""
    images = images_for(setting, setting.resolution // 2)
    calls = {
        name: training_step(ours(name, setting.widths), setting, images)
        for name in ("litevae-b", "sdvae")
    }
    calls[PEER] = training_step(peer(setting.widths), setting, images)
    return compare(
        STEP, time_interleaved(calls, setting.repeats, setting.device), PEER, setting.batch
    )


def measure_parts(setting: Setting) -> list[Row]:
    """Time training steps of SD-VAE's parts, and of encoders distilled from it, beside its own."""
    images = images_for(setting, setting.resolution // 2)
    calls = {WHOLE: training_step(ours("sdvae", setting.widths), setting, images)}
    for learned, frozen in (("decoder", "encoder"), ("encoder", "decoder")):
        model = freeze(ours("sdvae", setting.widths), frozen)
        calls[f"train={learned}"] = training_step(model, setting, images)
    for name in ("litevae-s", "litevae-b"):
        student = freeze(ours(name, setting.widths), "decoder")
        teacher = placed(ours("sdvae", setting.widths).requires_grad_(False), setting)
        calls[f"{name} distilled"] = training_step(student, setting, images, teacher)
    return compare(
        PARTS, time_interleaved(calls, setting.repeats, setting.device), WHOLE, setting.batch
    )


def freeze(model: Autoencoder, part: str) -> Autoencoder:
    """Freeze the encoder or the decoder, with its 1×1 convolution, as `train=` does."""
    beside = {"encoder": model.quant_conv, "decoder": model.post_quant_conv}[part]
    for network in (getattr(model, part), beside):
        network.requires_grad_(False)
    return model


def training_step(
    model: nn.Module, setting: Setting, images: Tensor, teacher: Autoencoder | None = None
) -> Callable[[], None]:
    """Make a model's training step: encode, draw, decode, ℓ1, backward, Adam.

    With a teacher, which encodes too: the mean is decoded, and ℓ1 of the moments is added.
    """
    placed(model.train(), setting)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=1e-4, betas=(0.5, 0.9), fused=True)

    def step() -> None:
        loss: Tensor | float = 0.0
        with precision(setting):
            if isinstance(model, Autoencoder):
                recon, posterior, _ = model(images, sample=teacher is None)
            else:
                recon = model(images, sample_posterior=True).sample
            if teacher is not None:
                with torch.no_grad():
                    target = teacher.encode(images)
                loss = (posterior.mean - target.mean).abs().mean()
                loss = loss + 0.1 * (posterior.logvar - target.logvar).abs().mean()
        (loss + (recon.float() - images).abs().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------------------------- run
def main(arguments: list[str]) -> None:
    """Measure, write, and print the page."""
    parser = measuring_parser(__doc__, "narrow models, 64² images", "4; 32 on a GPU")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # for a process of our own
    given = parser.parse_args(arguments)
    device = resolve_device(given.device)
    on_gpu = device.type == "cuda"
    if given.quick:
        setting = Setting(device, 2, 64, 2, widths=(32, 64, 64, 64))
    elif on_gpu:
        setting = Setting(device, 32, 256, 20)
    else:
        setting = Setting(device, 4, 256, 3)
    if given.batch:
        setting = replace(setting, batch=given.batch)
    if given.peak_of:
        print(peak_mib(given.peak_of, setting))
        return
    if given.keep_memory:
        keep_freed_memory(device)
    table = measure_encoders(setting, arguments) + measure_decoders(setting)
    table += measure_wavelets(setting) + measure_training(setting) + measure_parts(setting)
    targets = () if given.quick else GPU_TARGETS if on_gpu else CPU_TARGETS
    facts = {
        "command": " ".join(["python -m benchmarks.stage_one", *arguments]),
        **describe_machine(device, "bfloat16, compiled" if on_gpu else "float32"),
        "images": f"{setting.batch} of {setting.resolution}² in a batch; training at half the side",
        "repeats": setting.repeats,
    }
    title = "Stage one: speed and memory beside diffusers' AutoencoderKL"
    name = "stage_one-keep-memory" if given.keep_memory else "stage_one"
    print(write(given.out, name, title, facts, table, judge(targets, table)))


if __name__ == "__main__":
    main(sys.argv[1:])
