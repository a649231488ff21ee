"""What an encoder costs on this machine, and what the paper's Table 3 says of it.

Table 3 of the paper (Sadat et al. 2024) on this machine, the paper's numbers beside ours.

<out>/bench.json   every number, the machine, the versions, the command
<out>/bench.md     the same as tables to read
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autoencoders import Autoencoder, build_autoencoder
from ldm.config import did_you_mean, list_presets
from ldm.device import memory_format, resolve_device
from ldm.errors import LdmError, UsageError
from ldm.files import write_atomically, write_json
from ldm.logbook import console
from ldm.run_folder import provenance
from ldm.timing import name_device, synchronise, take_turns
from pipelines.doctor.costs import Holder, count_gmac, count_parameters

ENCODERS = ("sdvae", "litevae-s", "litevae-b", "litevae-m", "litevae-l")
REFERENCE = "sdvae"
BATCH = 32
CPU_BATCH = 2  # a CPU encodes a few at a time whatever the batch, so that more tell nothing more
REPEATS = {"cpu": 3, "cuda": 20}
MIB = 2**20


class Published(NamedTuple):
    """A row of the paper's Table 3."""

    parameters: float
    """Millions."""
    peak_mb: float
    images_per_second: float
    gmac: float | None = None
    """10⁹ multiply-accumulates of a 256² image."""


RESOLUTION = 256
SOURCE = (
    "Sadat et al. 2024, Table 3: one Quadro RTX 6000, batch 32; images of 256², to judge by the "
    "VAE's GMAC, the one that the paper tells (Section 1)"
)
# GMAC: the paper calls them GFLOPS, of Stable Diffusion 2.1's encoder
PAPER = {
    "sdvae": Published(34.16, 8860, 68, gmac=135.59),
    "litevae-s": Published(1.03, 1324, 384),
    "litevae-b": Published(6.75, 3155, 129),
    "litevae-m": Published(32.75, 12130, 42.24),
    "litevae-l": Published(41.425, 12130, 41.6),
}


class EncoderCost(NamedTuple):
    """What it takes to turn images into posteriors."""

    name: str
    parameters: int
    """Of the encoder alone."""
    gmac: float
    """10⁹ multiply-accumulates per image."""
    peak_mib: float
    """Memory at the worst moment of encoding a batch, with the encoder and the images, in MiB."""
    images_per_second: float


def measure_encoders(
    names: Sequence[str] = ENCODERS,
    resolution: int = RESOLUTION,
    batch: int = BATCH,
    device: str | torch.device = "auto",
    repeats: int | None = None,
    timed: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> list[EncoderCost]:
    """What encoders of presets cost: images (B, 3, R, R) to posteriors, random weights, eager.

    Parameters and arithmetic are counted on tensors without values. So is memory on a CPU, which
    does not tell what it allocates: what is held between two operations when all images of the
    batch are encoded at once, as on a GPU; a GPU's allocator measures that, and its scratch, too.

    Args:
        names: presets of stage one.
        resolution: side R of the images, in pixels.
        batch: images whose memory is told.
        repeats: timed turns of each; by default 20 on a GPU and 3 on a CPU.
        timed: images in a batch that is timed; by default `batch` on a GPU and 2 on a CPU.
        precision: bf16 is autocast, as in training.

    Returns:
        The costs, in the order of `names`, each name once.

    Raises:
        UsageError: no such preset, a number below one, or a resolution that an encoder's
            downsampling does not divide.
        LdmError: no such device, or not enough memory on it.
    """
    where = resolve_device(device) if isinstance(device, str) else device
    names = list(dict.fromkeys(names))
    _check(names, resolution, batch, repeats, timed)
    timed, repeats = fill(where, batch, timed, repeats)
    console.print(
        f"timing {', '.join(names)}: {timed} image(s) of {resolution}² at a time, "
        f"{repeats} turn(s) each, on {name_device(where)}",
        markup=False,
    )
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.no_grad(), autocast:
            counted = {name: _on_paper(name, resolution, batch) for name in names}
            encoders, peaks = {}, {}
            for name in names:
                encoders[name], peaks[name] = _place(name, resolution, batch, where)
            images = _images(timed, resolution, where)
            calls = {name: lambda ae=ae: ae.encode(images) for name, ae in encoders.items()}
            seconds = take_turns(calls, repeats, where)
    except torch.OutOfMemoryError as error:
        raise LdmError(
            f"{batch} images of {resolution}² do not fit into the memory of {where}: lower --batch"
        ) from error
    return [
        cost._replace(
            peak_mib=cost.peak_mib if peaks[name] is None else peaks[name],
            images_per_second=timed / seconds[name],
        )
        for name, cost in counted.items()
    ]


def _check(
    names: Sequence[str], resolution: int, batch: int, repeats: int | None, timed: int | None
) -> None:
    if not names:
        raise UsageError(f"no encoder to measure: name one or more, such as {', '.join(ENCODERS)}")
    known = list_presets("ae")
    for name in names:
        if name not in known:
            raise UsageError(f"no preset '{name}'{did_you_mean(name, known)}; see `ldm presets`")
    for option, value in (("resolution", resolution), ("batch", batch), ("repeats", repeats),
                          ("timed", timed)):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"--{option} {value}: it must be at least 1")


def fill(
    device: torch.device, batch: int, timed: int | None, repeats: int | None
) -> tuple[int, int]:
    """What is timed and how often, where that was left out."""
    if timed is None:
        timed = batch if device.type == "cuda" else min(batch, CPU_BATCH)
    return timed, REPEATS[device.type] if repeats is None else repeats


@torch.no_grad()
def _on_paper(name: str, resolution: int, batch: int) -> EncoderCost:
    """What can be said of an encoder without running it: all but how fast it is."""
    with FakeTensorMode():
        autoencoder = _without_decoder(name)
        if resolution % autoencoder.downsampling:
            raise UsageError(
                f"--resolution {resolution}: it must be a multiple of "
                f"{autoencoder.downsampling}, the downsampling of {name}"
            )
        image = torch.zeros(1, 3, resolution, resolution)
        gmac = count_gmac(lambda: autoencoder.encoder(image))
        with Holder() as holder:
            autoencoder.encoder(torch.zeros(batch, 3, resolution, resolution))
        weights = sum(parameter.nbytes for parameter in autoencoder.encoder.parameters())
        parameters = count_parameters(autoencoder.encoder)
    return EncoderCost(name, parameters, gmac, (holder.worst + weights) / MIB, nan)


def _place(
    name: str, resolution: int, batch: int, device: torch.device
) -> tuple[Autoencoder, float | None]:
    """An encoder on its device, and the MiB that it takes to encode a batch, where that is told."""
    autoencoder = _without_decoder(name)
    if device.type != "cuda":
        return autoencoder, None
    before = torch.cuda.memory_allocated(device)
    autoencoder.to(device, memory_format=memory_format(device))
    images = _images(batch, resolution, device)
    autoencoder.encode(images)  # what libraries allocate once is there before the count
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    autoencoder.encode(images)
    return autoencoder, (torch.cuda.max_memory_allocated(device) - before) / MIB


def _without_decoder(name: str) -> Autoencoder:
    autoencoder = build_autoencoder(name).eval()
    autoencoder.decoder = nn.Identity()  # it would only take room
    return autoencoder


def _images(count: int, resolution: int, device: torch.device) -> Tensor:
    """(count, 3, R, R) in [−1, 1], always the same."""
    shape = (count, 3, resolution, resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.to(device, memory_format=memory_format(device))


PAPERS = "paper's"
"""The title of each of the paper's columns begins so."""
OTHER_IMAGES = (
    f"not the paper's batch of {BATCH} images of {RESOLUTION}²: compare the ratios, "
    "not the numbers themselves"
)


@dataclass(frozen=True)
class Bench:
    """The costs of some encoders, and what they were measured on."""

    costs: list[EncoderCost]
    facts: dict[str, Any]

    def to_tree(self) -> dict[str, Any]:
        """Plain values: facts, then a row for each encoder with the paper's beside it."""
        rows = []
        for cost in self.costs:
            row: dict[str, Any] = cost._asdict()
            if cost.name in PAPER:
                row["paper"] = PAPER[cost.name]._asdict()
            rows.append(row)
        return {**self.facts, "paper": SOURCE, "encoders": rows}

    def as_markdown(self) -> str:
        """Facts and tables as a page."""
        lines = ["# What encoding costs", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items() if name != "versions"]
        versions = ", ".join(f"{name} {v}" for name, v in self.facts.get("versions", {}).items())
        lines += [f"- versions: {versions}", f"- paper: {SOURCE}"]
        for title, header, rows in self.tables():
            lines += ["", f"{title}:", "", f"| {' | '.join(header)} |"]
            lines += [f"|---|{'---:|' * (len(header) - 1)}"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join(lines) + "\n"

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, header, rows): what was measured, and as multiples of the VAE if it was."""
        header = ["encoder", "weights, M", f"{PAPERS} weights, M", "GMAC", f"{PAPERS} GMAC"]
        header += ["MiB", f"{PAPERS} MB", "images/s", f"{PAPERS} images/s"]
        tables = [("here, beside the paper", header, [_measured(cost) for cost in self.costs])]
        reference = {cost.name: cost for cost in self.costs}.get(REFERENCE)
        if reference is not None and len(self.costs) > 1:
            header = ["encoder", "weights", f"{PAPERS} weights", "GMAC", "memory"]
            header += [f"{PAPERS} memory", "images/s", f"{PAPERS} images/s"]
            ratios = [_ratios(cost, reference) for cost in self.costs if cost is not reference]
            title = f"as multiples of {REFERENCE}'s"
            tables.append((title, header, ratios))
        return tables


def _measured(cost: EncoderCost) -> list[str]:
    """An encoder's numbers, the paper's beside each."""
    theirs = PAPER.get(cost.name)
    return [
        cost.name,
        *(f"{cost.parameters / 1e6:.2f}", f"{theirs.parameters:.2f}" if theirs else ""),
        *(f"{cost.gmac:.2f}", f"{theirs.gmac:.2f}" if theirs and theirs.gmac else ""),
        *(f"{cost.peak_mib:,.0f}", f"{theirs.peak_mb:,.0f}" if theirs else ""),
        *(_rate(cost.images_per_second), _rate(theirs.images_per_second) if theirs else ""),
    ]


def _ratios(cost: EncoderCost, to: EncoderCost) -> list[str]:
    """An encoder's numbers over the reference's, the paper's ratio beside each."""
    theirs, vae = PAPER.get(cost.name), PAPER[REFERENCE]

    def ratio(field: str, paper: str) -> list[str]:
        ours = getattr(cost, field) / getattr(to, field)
        published = getattr(theirs, paper) / getattr(vae, paper) if theirs else None
        return [f"{ours:.2f}", "" if published is None else f"{published:.2f}"]

    return [
        cost.name,
        *ratio("parameters", "parameters"),
        f"{cost.gmac / to.gmac:.2f}",
        *ratio("peak_mib", "peak_mb"),
        *ratio("images_per_second", "images_per_second"),
    ]


def _rate(images_per_second: float) -> str:
    if images_per_second >= 100:
        return f"{images_per_second:,.0f}"
    return f"{images_per_second:.3g}"


def bench_encoders(
    names: Sequence[str] = ENCODERS,
    resolution: int = RESOLUTION,
    batch: int = BATCH,
    device: str = "auto",
    repeats: int | None = None,
    timed: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    out: Path | None = None,
) -> Bench:
    """`measure_encoders` with what it was measured on; written to a folder, if one is given."""
    where = resolve_device(device)
    costs = measure_encoders(names, resolution, batch, where, repeats, timed, precision)
    timed, repeats = fill(where, batch, timed, repeats)
    told = "measured" if where.type == "cuda" else "on paper, all at once as a GPU takes them"
    made_by = provenance()
    facts = {
        "command": made_by["command"],
        "device": name_device(where),
        "precision": precision,
        "memory": f"of {batch} image(s) of {resolution}², with the encoder; {told}",
        "speed": f"{timed} image(s) of {resolution}² in a batch, median of {repeats} turn(s)",
        **({"note": OTHER_IMAGES} if (resolution, batch) != (RESOLUTION, BATCH) else {}),
        "created": made_by["created"],
        "versions": made_by["versions"],
    }
    result = Bench(costs, facts)
    if out is not None:
        text = result.as_markdown().encode()
        write_atomically(out / "bench.md", lambda file: file.write(text))
        write_json(out / "bench.json", result.to_tree())
    return result
