"""The settings of runs side by side: those that differ, and all."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from ldm.config import Tree
from ldm.run_folder import WATCHING
from pipelines.report import page
from pipelines.report.records import Record

ABSENT = "–"


def settings_section(records: Sequence[Record], titles: Sequence[page.Markup], of: str) -> str:
    """A table of the settings that differ between runs of one stage, and, folded, of all."""
    flat = [dict(flatten(record.config)) for record in records]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return ""
    header = ["setting", *titles]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [
            [page.breakable(key), *(_shown(settings, key) for settings in flat)] for key in chosen
        ]

    differing = [key for key in keys if _differs(key, flat)]
    if len(records) == 1:
        text, table = "What it was trained with.", ""
    elif differing:
        text = "Those in which the runs differ. How they were watched and saved does not count."
        table = page.columns(header, rows(differing))
    else:
        text, table = "The runs have the same settings.", ""
    everything = page.folded(f"all {len(keys)} settings", page.columns(header, rows(keys)))
    return page.section(f"Settings{of}", text, table, everything)


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differs(key: str, flat: Sequence[Tree]) -> bool:
    if key.rpartition(".")[2] in WATCHING:
        return False
    return any(_shown(settings, key) != _shown(flat[0], key) for settings in flat)


def _shown(settings: Tree, key: str) -> str:
    """A value as YAML has it on one line."""
    if key not in settings:
        return ABSENT
    value = settings[key]
    if isinstance(value, str):
        return value or "''"
    flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return flow.removesuffix("\n").removesuffix("...").strip()
