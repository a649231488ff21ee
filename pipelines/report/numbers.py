"""What has been measured of runs, and all that each number depends on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.report import page
from pipelines.report.measurements import NAMES, Measurement, measurements
from pipelines.report.records import Record
from pipelines.report.settings import flatten


class Column(NamedTuple):
    """How a number is shown."""

    title: str
    digits: int
    scale: float = 1.0


COLUMNS = {
    "rfid": Column("rFID", 3),
    "fid": Column("FID", 3),
    "kid": Column("KID ×10³", 3, 1e3),
    "lpips": Column("LPIPS", 4),
    "psnr": Column("PSNR, dB", 2),
    "ssim": Column("SSIM", 4),
    "precision": Column("precision", 3),
    "recall": Column("recall", 3),
    "swd": Column("SWD ×10³", 2),  # as it is in our files
    "loss": Column("loss", 4),
}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def numbers_section(records: Sequence[Record], titles: Mapping[str, page.Markup], of: str) -> str:
    """A table of every measurement, what to mind, and folded, where each comes from."""
    found = [measured for record in records for measured in measurements(record)]
    names = [name for name in NAMES if any(name in each.numbers for each in found)]
    header = ["measured", *(COLUMNS[name].title for name in names)]
    rows = [
        [page.under(titles[each.record.label], each.what)] + [_shown(each, name) for name in names]
        for each in found
    ]
    table = page.columns(header, rows) if rows else page.note("Nothing has been measured yet.")
    text = (
        "What was measured, and when. Two rows may be compared where they are over the same "
        "images at the same resolution, by the same network: unfold where they come from."
    )
    origins = [page.folded(f"{r.label}: the run itself", page.table(_origin(r))) for r in records]
    origins += [
        page.folded(
            f"{each.record.label}: {each.what}",
            *(page.table(_about(path, tree)) for path, tree in each.sources),
        )
        for each in found
        if each.sources
    ]
    folded = page.folded("where they come from", *origins)
    return page.section(f"Numbers{of}", text, table, *_doubts(found), folded)


def _doubts(found: Sequence[Measurement]) -> list[str]:
    """What to mind, each sentence once, with the rows that it is said of."""
    concerned: dict[str, dict[str, list[str]]] = {}
    for each in found:
        for said in each.doubts:
            rows = concerned.setdefault(said, {})
            rows.setdefault(each.what, []).append(each.record.label)
    return [
        page.note(said, "; ".join(f"{', '.join(runs)}: {what}" for what, runs in rows.items()))
        for said, rows in concerned.items()
    ]


def _about(path: Path, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that a file says; how the model was trained is among the settings already."""
    rows, said = [("file", str(path))], {}
    for key, value in flatten(dict(tree)):
        if ".recipe." in key or value in (None, [], {}, ""):
            continue
        text = _text(value)
        first = said.setdefault(text, key)
        # a long sentence once, though it is said of several numbers
        rows.append((key, f"as {first}" if first != key and len(text) > 80 else text))
    return rows


def _origin(record: Record) -> list[tuple[str, str]]:
    """The command, the versions and the machine that made a run, and the model's hash."""
    rows = [("folder", str(record.folder))]
    rows += [(key, _text(value)) for key, value in flatten(record.described)]
    if record.sha256:
        rows.append(("ckpt.pt, SHA-256 of its weights", record.sha256))
    return rows


def _shown(measured: Measurement, name: str) -> str:
    if name not in measured.numbers:
        return ""
    digits, scale = COLUMNS[name].digits, COLUMNS[name].scale
    text = _number(scale * measured.numbers[name], digits)
    if name in measured.spread:
        text += (
            f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{_number(scale * measured.spread[name], digits)}"
        )
    return text


def _number(value: float, digits: int) -> str:
    """So many digits after the point; of more than seven before it, the power of ten."""
    plain = f"{value:.{digits}f}"
    if not math.isfinite(value) or len(plain.partition(".")[0].lstrip("-")) <= 7:
        return plain
    mantissa, _, power = f"{value:.2e}".partition("e+")
    return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPTS)}"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
