"""Time and memory to open large data sets of tar shards, from their kept index.

    python -m benchmarks.data_start [--shards 100000] [--images 1000] [--folder FOLDER]

The shards are empty files, and their index is written for images that do not exist: opening reads
no shard. A new process opens the training split, then takes images of the random order. Memory is
what it holds beyond the imports: its own, and pages of the mapped index, which the system shares
among processes and takes back at need.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from benchmarks.comparison import make_parser
from ldm.data import DataConfig, open_source
from ldm.data.shard_index import INDEX, RECORD, IndexWriter, ShardBlock, Stamp
from ldm.tables import text_table

LOOKS = 10_000
"""Images that are looked up."""


def main(arguments: Sequence[str]) -> int:
    """Make the listing, and open it in new processes."""
    parser = make_parser(__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=1000, help="in each shard")
    parser.add_argument("--folder", type=Path, help="where to make it; by default a temporary one")
    parser.add_argument(
        "--open", type=Path, metavar="FOLDER", help="only open one, in this process"
    )
    given = parser.parse_args(arguments)
    if given.open is not None:
        print(json.dumps(open_once(given.open)))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        make_listing(Path(folder), given.shards, given.images)
        command = [sys.executable, "-m", "benchmarks.data_start", "--open", folder]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(3)]
    rows = [[key, *(f"{run[key]:,.3f}" for run in runs)] for key in runs[0]]
    print("\n".join(text_table(["", "first", "second", "third"], rows)))
    return 0


def make_listing(folder: Path, shards: int, images: int) -> None:
    """Write empty shards, and the index of images that they could hold, beside them."""
    sizes = np.random.default_rng(0).integers(50_000, 200_000, images)
    names = [b"%08d.png" % i for i in range(images)]
    records = np.zeros(images, RECORD)
    records["size"], records["label"] = sizes, np.arange(images)
    records["offset"] = np.cumsum(sizes + 1024) - sizes
    records["name_end"] = list(accumulate(map(len, names)))
    block = ShardBlock(records, b"".join(names), [], {})
    with (folder / INDEX).open("wb") as file:
        writer = IndexWriter(file, labels=True)
        for number in range(shards):
            path = folder / f"{number:06d}.tar"
            path.touch()
            writer.add(Stamp(path.name, 0, path.stat().st_mtime_ns), block)
        writer.finish()


def open_once(folder: Path) -> dict[str, float]:
    """Open the training split; return seconds and MB."""
    config, before = DataConfig(source=str(folder), labels=True), memory()
    start = time.perf_counter()
    source = open_source(config, "train", 64)
    opened = time.perf_counter() - start
    travelling = len(pickle.dumps(source)) / 1e6
    start = time.perf_counter()
    for k in range(LOOKS):
        index = source.shuffled(0, k)
        source.name(index), source.label(index)
    looked = (time.perf_counter() - start) / LOOKS
    own, mapped = (after - b for after, b in zip(memory(), before, strict=True))
    return {
        "images, in millions": len(source) / 1e6,
        "seconds to open": opened,
        "milliseconds to find an image": looked * 1e3,
        "MB of its own": own,
        "MB of mapped pages": mapped,
        "MB sent to a worker": travelling,
        "GB of the index": (folder / INDEX).stat().st_size / 1e9,
    }


def memory() -> tuple[float, float]:
    """Resident memory of this process in MB: its own, and of mapped files."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[key].split()[0]) / 1e3 for key in ("RssAnon", "RssFile"))
    return own, mapped


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
