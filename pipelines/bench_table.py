"""Table 3 of the paper (Sadat et al. 2024) on this machine, the paper's numbers beside ours.

<out>/bench.json   every number, the machine, the versions, the command
<out>/bench.md     the same as tables to read
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.device import resolve_device
from ldm.files import write_atomically, write_json
from ldm.run_folder import provenance
from ldm.timing import name_device
from pipelines.bench import (
    BATCH,
    ENCODERS,
    PAPER,
    REFERENCE,
    RESOLUTION,
    SOURCE,
    EncoderCost,
    fill,
    measure_encoders,
)

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
