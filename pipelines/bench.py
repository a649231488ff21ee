"""Measure the cost of encoders on this machine, next to the paper's Table 3 (Sadat et al. 2024).

<out>/bench.json   every number, the machine, the versions, the command
<out>/bench.md     the same as tables
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from autoencoders import Autoencoder, AutoencoderConfig, build_autoencoder
from autoencoders.pretrained import read_autoencoder
from ldm.config import list_presets, validate
from ldm.device import memory_format, name_device, resolve_device, synchronise, time_interleaved
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.files import check_writable, to_json, write_together
from ldm.logbook import console
from ldm.run_folder import provenance
from ldm.tables import markdown_table
from pipelines.doctor.costs import AllocationTracker, count_gmac, count_parameters

ENCODERS = ("sdvae", "litevae-s", "litevae-b", "litevae-m", "litevae-l")
REFERENCE = "sdvae"
RESOLUTION, BATCH = 256, 32
CPU_BATCH = 2  # a CPU encodes a few images at a time whatever the batch: more would say no more
REPEATS = {"cpu": 3, "cuda": 20}
MIB = 2**20
PAPERS = "paper's"  # begins the title of each of the paper's columns
SOURCE = (
    f"Sadat et al. 2024, Table 3: one Quadro RTX 6000, batch size {BATCH}; the image size is not "
    f"given, {RESOLUTION}² fits the VAE's GMAC of Section 1"
)
OTHER_IMAGES = (
    f"not the paper's batch of {BATCH} images of {RESOLUTION}²: compare the ratios, "
    "not the numbers themselves"
)

TITLES = [
    "encoder", "weights, M", f"{PAPERS} weights, M", "GMAC", f"{PAPERS} GMAC", "MiB",
    f"{PAPERS} MB", "images/s", f"{PAPERS} images/s",
]  # fmt: skip
RATIO_TITLES = [
    "encoder", "weights", f"{PAPERS} weights", "GMAC", "memory", f"{PAPERS} memory", "images/s",
    f"{PAPERS} images/s",
]  # fmt: skip
FORMS = (
    "{:.2f}".format, "{:.2f}".format, "{:,.0f}".format,
    lambda rate: f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
)  # fmt: skip


class PaperCosts(NamedTuple):
    """A row of the paper's Table 3."""

    parameters: float
    """Millions."""
    gmac: float | None
    """10⁹ multiply-accumulates of a 256² image, which the paper calls GFLOPs."""
    peak_mb: float
    images_per_second: float


PAPER = {
    "sdvae": PaperCosts(34.16, 135.59, 8860, 68),  # of Stable Diffusion 2.1's encoder
    "litevae-s": PaperCosts(1.03, None, 1324, 384),
    "litevae-b": PaperCosts(6.75, None, 3155, 129),
    "litevae-m": PaperCosts(32.75, None, 12130, 42.24),
    "litevae-l": PaperCosts(41.425, None, 12130, 41.6),
}


class EncoderCost(NamedTuple):
    """The cost of encoding images to posteriors."""

    name: str
    parameters: int
    """Of the encoder alone."""
    gmac: float
    """10⁹ multiply-accumulates per image."""
    peak_mib: float
    """Peak memory of encoding a batch, in MiB, including the encoder and the images."""
    images_per_second: float

    @property
    def numbers(self) -> tuple[float, ...]:
        """In the order of `PaperCosts`."""
        return self.parameters / 1e6, self.gmac, self.peak_mib, self.images_per_second


def bench_encoders(
    names: Sequence[str] = ENCODERS,
    resolution: int = RESOLUTION,
    batch: int = BATCH,
    device: str = "auto",
    repeats: int | None = None,
    timed: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    out: Path | None = None,
) -> "Bench":
    """Measure encoders: images (B, 3, R, R) to posteriors, random weights, eager.

    Parameters and multiply-accumulates are counted on tensors without values. On a GPU the
    allocator measures the memory, scratch included. A CPU does not report its allocations: there
    the bytes alive between two operations are counted, as if it encoded the whole batch at once.

    Args:
        names: presets of stage one, or what `load_autoencoder` takes; each is measured once.
        resolution: side R of the images, in pixels.
        batch: batch size for the memory.
        repeats: timed runs of each encoder; by default 20 on a GPU and 3 on a CPU.
        timed: batch size for the speed; by default `batch` on a GPU and 2 on a CPU.
        precision: bf16 is autocast, as in training.
        out: folder for `bench.json` and `bench.md`.
    """
    where = resolve_device(device)
    names = list(dict.fromkeys(names))
    if not names:
        raise UsageError(f"no encoder to measure: name one or more, such as {', '.join(ENCODERS)}")
    check_at_least(1, resolution=resolution, batch=batch, repeats=repeats, timed=timed)
    if out is not None:
        check_writable(out / "bench.json", advice="give --out another folder")
    timed = timed or (batch if where.type == "cuda" else min(batch, CPU_BATCH))
    repeats = repeats or REPEATS[where.type]
    with torch.no_grad(), torch.autocast(where.type, torch.bfloat16, precision == "bf16"):
        counted = [_count(name, resolution, batch) for name in names]
        console.print(
            f"timing {', '.join(names)}: batch size {timed} at {resolution}², {repeats} run(s) "
            f"each, on {name_device(where)}",
            markup=False,
        )
        costs = _measure(counted, resolution, batch, timed, repeats, where)
    memory = "measured" if where.type == "cuda" else "counted, all at once as on a GPU"
    result = Bench(costs, {
        "device": name_device(where),
        "precision": precision,
        "memory": f"batch size {batch} at {resolution}², encoder included; {memory}",
        "speed": f"batch size {timed} at {resolution}², median of {repeats} run(s)",
        **({"note": OTHER_IMAGES} if (resolution, batch) != (RESOLUTION, BATCH) else {}),
        **provenance(),
    })  # fmt: skip
    if out is not None:
        page, values = result.as_markdown().encode(), to_json(result.to_tree())
        write_together({out / "bench.md": page, out / "bench.json": values})
    return result


def _measure(
    counted: Sequence[EncoderCost],
    resolution: int,
    batch: int,
    timed: int,
    repeats: int,
    device: torch.device,
) -> list[EncoderCost]:
    """Complete counted costs by measurements on the device."""
    try:
        placed = [_place(cost, resolution, batch, device) for cost in counted]
        draw = cache(partial(_images, timed, resolution, device))
        calls = {
            cost.name: partial(ae.encode, draw(ae.config.image_channels)) for ae, cost in placed
        }
        seconds = time_interleaved(calls, repeats, device)
    except torch.OutOfMemoryError as error:
        raise LdmError(
            f"{batch} images of {resolution}² do not fit into the memory of {device}: lower --batch"
        ) from error
    return [cost._replace(images_per_second=timed / seconds[cost.name]) for _, cost in placed]


def _count(name: str, resolution: int, batch: int) -> EncoderCost:
    """Count an encoder's cost without running it: all but its speed."""
    with FakeTensorMode():
        autoencoder = _without_decoder(name)
        if resolution % autoencoder.downsampling:
            raise UsageError(
                f"--resolution {resolution}: it must be a multiple of "
                f"{autoencoder.downsampling}, the downsampling of {name}"
            )
        channels = autoencoder.config.image_channels
        image = torch.zeros(1, channels, resolution, resolution)
        gmac = count_gmac(lambda: autoencoder.encoder(image))
        with AllocationTracker() as tracker:
            autoencoder.encoder(torch.zeros(batch, channels, resolution, resolution))
        weights = sum(parameter.nbytes for parameter in autoencoder.encoder.parameters())
        parameters = count_parameters(autoencoder.encoder)
    return EncoderCost(name, parameters, gmac, (tracker.peak + weights) / MIB, nan)


def _place(
    cost: EncoderCost, resolution: int, batch: int, device: torch.device
) -> tuple[Autoencoder, EncoderCost]:
    """Move an encoder to the device; on a GPU, measure its peak memory."""
    autoencoder = _without_decoder(cost.name)
    if device.type != "cuda":
        return autoencoder, cost
    before = torch.cuda.memory_allocated(device)
    autoencoder.to(device).to(memory_format=memory_format(device))
    images = _images(batch, resolution, device, autoencoder.config.image_channels)
    autoencoder.encode(images)  # libraries allocate their workspaces before the count
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    autoencoder.encode(images)
    peak = torch.cuda.max_memory_allocated(device) - before
    return autoencoder, cost._replace(peak_mib=peak / MIB)


def _without_decoder(name: str) -> Autoencoder:
    config: Any = name
    if name not in list_presets("ae") and Path(name).exists():
        with unset_fake_temporarily():  # a file has real tensors
            config = validate(AutoencoderConfig, read_autoencoder(name).tree)
    autoencoder = build_autoencoder(config).eval()
    del autoencoder.decoder  # free its memory
    return autoencoder


def _images(count: int, resolution: int, device: torch.device, channels: int = 3) -> Tensor:
    """Draw images (count, C, R, R) in [−1, 1], always the same."""
    shape = (count, channels, resolution, resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(device, memory_format=memory_format(device))


@dataclass(frozen=True)
class Bench:
    """The costs of some encoders, and the conditions of the measurement."""

    costs: list[EncoderCost]
    facts: dict[str, Any]

    def to_tree(self) -> dict[str, Any]:
        """Return plain values: the facts, then a row for each encoder with the paper's."""
        rows = [
            cost._asdict() | ({"paper": PAPER[cost.name]._asdict()} if cost.name in PAPER else {})
            for cost in self.costs
        ]
        return {**self.facts, "paper": SOURCE, "encoders": rows}

    def as_markdown(self) -> str:
        """Format facts and tables as a page."""
        lines = ["# Cost of encoding", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items() if name != "versions"]
        versions = ", ".join(f"{name} {v}" for name, v in self.facts.get("versions", {}).items())
        lines += [f"- versions: {versions}", f"- paper: {SOURCE}"]
        for title, header, rows in self.tables():
            lines += ["", f"{title}:", "", *markdown_table(header, rows)]
        return "\n".join(lines) + "\n"

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Return (title, header, rows): the costs, and as multiples of the VAE's if it is there."""
        tables = [("here, beside the paper", TITLES, [_measured(cost) for cost in self.costs])]
        reference = {cost.name: cost for cost in self.costs}.get(REFERENCE)
        if reference is not None and len(self.costs) > 1:
            ratios = [_ratios(cost, reference) for cost in self.costs if cost is not reference]
            tables.append((f"as multiples of {REFERENCE}'s", RATIO_TITLES, ratios))
        return tables


def _measured(cost: EncoderCost) -> list[str]:
    """An encoder's costs, the paper's beside each."""
    cells = [cost.name]
    paper = PAPER.get(cost.name, (None,) * 4)
    for ours, published, form in zip(cost.numbers, paper, FORMS, strict=True):
        cells += [form(ours), "" if published is None else form(published)]
    return cells


def _ratios(cost: EncoderCost, reference: EncoderCost) -> list[str]:
    """An encoder's costs over the reference's, the paper's ratio beside all but the GMAC."""
    ours = [a / b for a, b in zip(cost.numbers, reference.numbers, strict=True)]
    weights, gmac, memory, speed = (f"{ratio:.2f}" for ratio in ours)
    paper = ["", "", ""]
    if theirs := PAPER.get(cost.name):
        pairs = zip(theirs, PAPER[REFERENCE], strict=True)
        paper = [f"{a / b:.2f}" for a, b in pairs if a is not None and b is not None]
    return [cost.name, weights, paper[0], gmac, memory, paper[1], speed, paper[2]]
