"""Tar shards on object storage, web servers and pipes: fetched whole, ahead of use, and kept.

    s3://BUCKET/FOLDER, gs://…, https://…, hf://…   a folder with the manifest of `ldm data prepare`
                                                    and its shards, or with .tar files
    https://…/train-{000..099}.tar                  some shards
    https://…/index.json                            a list of shards, as webdataset's `wids` writes
    pipe:aws s3 cp s3://BUCKET/{000..099}.tar -     the output of commands

A training run needs the number of images in each shard, from a manifest or a list; without one,
every shard is read once before.
"""

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from ldm.data.shard_cache import PIPE, Shard, ShardCache, file_system, read_small
from ldm.data.shard_index import (
    ShardBlock,
    ShardIndex,
    Stamp,
    kept_index,
)
from ldm.data.shards import MANIFEST, check_manifest, class_names, listed_shards, read_member
from ldm.data.sources import UTF8, Indices, Source, tell
from ldm.data.transforms import decode, image_size
from ldm.errors import LdmError, UsageError, brief
from ldm.hub import cache_folder
from ldm.logbook import show_progress
from ldm.records import Count, checked, parse_json, schema
from ldm.seeds import generator, permuted

AT_ONCE, AHEAD = 8, 2
"""Shards that a process fetches at a time: before a run begins, and during it."""
OPEN = 256
"""Shards that a process keeps open."""


def is_remote(source: str) -> bool:
    """True for a URL or a pipe as a `DataConfig.source`; hf:OWNER/NAME is a table of the Hub."""
    return "://" in source or source.startswith(PIPE)


# -------------------------------------------------------------------------------------- order
class Window(NamedTuple):
    """A part of the random order: images of a few shards, which are shuffled together."""

    first: int
    """Number of its first image in the epoch's line of all images; and of all epochs before."""
    shards: list[int]
    next: int
    """Image k of the run with which the next window of the same stream begins."""


class _Place(NamedTuple):
    epoch: int
    shards: np.ndarray  # in this epoch's order
    starts: np.ndarray  # of each in the line of all images, and the end
    line: int  # the place of an image there, if windows were not shuffled
    low: int
    high: int  # its window, [low, high)


class Order:
    """The order of a training run over shards: image k of it, a function of (seed, k) alone.

    In each epoch the shards are shuffled and their images lined up; the line is cut into `streams`
    of equal length, which are read side by side: image p of the epoch is element p div V of stream
    p mod V. In a stream, the images of each `window` shards that follow each other are shuffled.

    So with R processes that take every R-th image, each reads its own streams, one window after the
    other, and any number of processes can resume at any image.

    Args:
        counts: images of each shard.
    """

    def __init__(self, counts: np.ndarray, streams: int, window: int) -> None:
        self._counts, self._window, self._count = counts, window, int(counts.sum())
        self._streams = min(streams, self._count)
        self._epochs: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def find(self, seed: int, k: int) -> tuple[int, int]:
        """Return the shard of image k, and its number there."""
        epoch, shards, starts, line, low, high = self._locate(seed, k)
        place = epoch * self._count + low  # of the window, in all epochs
        line = low + permuted(seed, "window", place, line - low, high - low)
        shard = int(np.searchsorted(starts, line, "right")) - 1
        return int(shards[shard]), line - int(starts[shard])

    def window(self, seed: int, k: int) -> Window:
        """Return the window with image k."""
        epoch, shards, starts, line, low, high = self._locate(seed, k)
        first, last = np.searchsorted(starts, (low, high - 1), "right") - 1
        following = k + self._streams * (high - line)
        if following >= (epoch + 1) * self._count:  # it was the last of its stream
            following = (epoch + 1) * self._count + (k - epoch * self._count) % self._streams
        own = shards[first : last + 1]
        return Window(epoch * self._count + low, own[self._counts[own] > 0].tolist(), following)

    def _locate(self, seed: int, k: int) -> _Place:
        epoch, position = divmod(k, self._count)
        element, stream = divmod(position, self._streams)
        length, longer = divmod(self._count, self._streams)
        start = stream * length + min(stream, longer)  # the first streams have one image more
        stop = start + length + (stream < longer)
        shards, starts = self._shuffled(seed, epoch)
        line = start + element
        first, own = np.searchsorted(starts, (start, line), "right") - 1
        low = int(first + (own - first) // self._window * self._window)
        high = min(low + self._window, len(shards))
        within = max(start, int(starts[low])), min(stop, int(starts[high]))
        return _Place(epoch, shards, starts, line, *within)

    def _shuffled(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if (seed, epoch) not in self._epochs:
            shards = generator(seed, "shards", epoch).permutation(len(self._counts))
            starts = np.concatenate([[0], np.cumsum(self._counts[shards], dtype=np.int64)])
            self._epochs[seed, epoch] = shards, starts
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[seed, epoch]


# ------------------------------------------------------------------------------------- source
class RemoteSource(Source):
    """Every image in shards elsewhere, shard by shard in the order given, or a range of these.

    Args:
        shards: in their order.
        counts: images of each.
        index: of all shards, if they were read for one.
    """

    manifest: dict[str, Any] | None = None
    """That of `ldm data prepare`, if it wrote the shards."""
    span: range
    """These images, among those of all shards."""

    def __init__(
        self,
        cache: ShardCache,
        shards: Sequence[Shard],
        counts: np.ndarray,
        index: ShardIndex | None = None,
    ) -> None:
        self._cache, self._index = cache, index
        # one array of all URLs, of the same beginning, is a hundredth of as many objects
        self._root = os.path.commonprefix([shard.url for shard in shards])  # noqa: RUF071
        urls = [shard.url.removeprefix(self._root).encode(*UTF8) for shard in shards]
        self._urls, self._digests = np.array(urls), np.array([s.sha256.encode() for s in shards])
        self._stamps = np.array([(shard.bytes, shard.version) for shard in shards])
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.span = range(int(self._starts[-1]))
        self.arrange(streams=16, window=2)
        self._begin()

    def _begin(self) -> None:
        """Set what belongs to one process."""
        self._open: OrderedDict[int, tuple[Path, ShardIndex]] = OrderedDict()
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._seen: OrderedDict[int, None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_open", "_wanted", "_threads", "_seen")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def __len__(self) -> int:
        return len(self.span)

    def name(self, index: int) -> str:
        shard, number = self._find(index)
        inside = number if self._index is None else self._index.member(shard, number).name
        return f"{self._shard(shard).url}/{inside}"

    def file(self, index: int) -> Path:
        return Path(self._shard(self._find(index)[0]).url)

    def label(self, index: int) -> int:
        if not self.classes:
            return -1
        shard, number = self._find(index)
        index_of, shard = (self._index, shard) if self._index else (self._opened(shard)[1], 0)
        if (label := index_of.label(shard, number)) >= len(self.classes) or label < 0:
            raise UsageError(
                f"{self.name(index)} has class {label}, but {MANIFEST} names only classes below "
                f"{len(self.classes)}: prepare the images again, or omit labels"
            )
        return label

    def identity(self) -> str:
        shards = [self._shard(shard) for shard in range(len(self._urls))]
        return sha256(f"{shards}{self._starts.tolist()}".encode(*UTF8)).hexdigest()

    def part(self, indices: Indices) -> "RemoteSource":
        """Return a range of the images as a source."""
        if not isinstance(indices, range):
            raise UsageError(
                "of shards elsewhere, fewer images cannot be held out than their manifest does: "
                "omit data.held_out"
            )
        part = self.__new__(type(self))
        part.__setstate__(self.__getstate__())
        part.span = self.span[indices.start : indices.stop]
        part.arrange(self._streams, self._window)
        return part

    def load(self, index: int) -> np.ndarray:
        return decode(*self._read(index), self.channels, self.keep)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(*self._read(index), self.channels)

    def _read(self, index: int) -> tuple[bytes, str]:
        """The file of an image, and the suffix of its name."""
        shard, number = self._find(index)
        while True:
            path, found = self._opened(shard)
            try:
                return read_member(path, found.member(0, number))
            except FileNotFoundError:  # others needed the room
                del self._open[shard]

    def _opened(self, shard: int) -> tuple[Path, ShardIndex]:
        if shard not in self._open:
            path, index = self._cache.open(self._shard(shard))
            expected = int(self._starts[shard + 1] - self._starts[shard])
            if len(index.table) != 1 or index.starts[-1] != expected:
                raise LdmError(
                    f"{self._shard(shard).url} holds {index.starts[-1]} images, not {expected} as "
                    f"listed: repair the list, or delete {cache_folder() / 'indexes'}"
                )
            self._open[shard] = path, index
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
            if not self._seen and shard + 1 < len(self._urls):  # in sequence, not at random
                self._want([shard + 1])
        return self._open[shard]

    def _find(self, index: int) -> tuple[int, int]:
        place = self.span[index]
        shard = int(np.searchsorted(self._starts, place, "right")) - 1
        return shard, place - int(self._starts[shard])

    def _shard(self, shard: int) -> Shard:
        size, version = self._stamps[shard].tolist()
        url = self._root + bytes(self._urls[shard]).decode(*UTF8)
        return Shard(url, size, version, bytes(self._digests[shard]).decode())

    # ------------------------------------------------------------------------- random order
    def arrange(self, streams: int, window: int) -> None:
        """Set the order of training runs, see `Order`."""
        self._streams, self._window = streams, window
        starts = self._starts.clip(self.span.start, self.span.stop)
        self._order = Order(np.diff(starts), streams, window)

    def shuffled(self, seed: int, k: int) -> int:
        shard, number = self._order.find(seed, k)
        return max(int(self._starts[shard]) - self.span.start, 0) + number

    def fetch_ahead(self, seed: int, k: int) -> None:
        window = self._order.window(seed, k)
        if window.first not in self._seen:
            self._seen[window.first] = None
            if len(self._seen) > OPEN:
                self._seen.popitem(last=False)
            self._want(window.shards + self._order.window(seed, window.next).shards)

    def fetch_first(self, seed: int, start: int, rank: int, world: int) -> None:
        """Fetch the shards with which a process begins a run at image `start`, and show it."""
        ks = range(start + rank, start + max(self._streams, rank + 1), world)
        shards = list(dict.fromkeys(s for k in ks for s in self._order.window(seed, k).shards))
        needed = sum(self._shard(shard).bytes for shard in shards)
        if 2 * needed > self._cache.limit:
            tell(
                f"this run reads {len(shards)} shards, {needed / 1e9:.1f} GB, at a time, and "
                "fetches as many ahead, or again and again if data.cache_gb is too small: set it "
                f"to {2.5 * needed / 1e9:.1f} or more, or lower data.streams"
            )
        with ThreadPoolExecutor(AT_ONCE) as pool:
            progress = show_progress("fetching shards", len(shards), rank == 0, "shards")
            with progress as advance:
                for _ in pool.map(lambda shard: self._cache.open(self._shard(shard)), shards):
                    advance(1)

    def _want(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background; an error is raised where they are used."""
        for shard in shards:
            self._wanted.put(shard)
        while len(self._threads) < AHEAD:
            self._threads.append(threading.Thread(target=self._fetch_wanted, daemon=True))
            self._threads[-1].start()

    def _fetch_wanted(self) -> None:
        while True:
            with suppress(Exception):
                self._cache.open(self._shard(self._wanted.get()))


# ---------------------------------------------------------------------------------- open one
_LIST = schema(shardlist=list[schema(url=str, nsamples=Count)])  # type: ignore[misc]


def open_remote(source: str, labels: bool, cache_gb: float) -> RemoteSource:
    """Open shards elsewhere, a `DataConfig.source`.

    Without a manifest or a list, or with labels of which these do not name the classes, every shard
    is read once; what was found is kept in `$LDM_CACHE/indexes`.
    """
    cache, manifest = ShardCache(int(cache_gb * 1e9), labels), None
    if source.startswith(PIPE) or source.endswith(".tar"):
        from braceexpand import braceexpand

        shards, counts = [Shard(url) for url in braceexpand(source)], None
    elif source.endswith(".json"):
        shards, counts = _read_list(source)
    elif manifest := read_remote_manifest(source):
        folder, entries = source.rstrip("/"), listed_shards(manifest)
        shards = [
            Shard(f"{folder}/{name}", entry.get("bytes", 0), 0, entry.get("sha256", ""))
            for name, entry in entries.items()
        ]
        counts = np.array([entry["count"] for entry in entries.values()])
    else:
        shards, counts = _list_shards(source), None
    index, classes = None, tuple((manifest or {}).get("classes") or ())
    if counts is None or (labels and not classes):
        index = _read_all(source, shards, cache)
        counts = index.table["count"]
    if not counts.sum():
        raise LdmError(f"no images in {source}: check its shards")
    opened = RemoteSource(cache, shards, counts, index)
    if labels:
        opened.classes = classes if index is None else class_names(index, opened.name, source, None)
    opened.manifest = manifest
    if manifest:
        opened.held_out = manifest["splits"]["val"]["count"]
        opened.channels = manifest.get("channels", 3)
    return opened


@lru_cache(maxsize=8)
def read_remote_manifest(folder: str) -> dict[str, Any] | None:
    """Read the manifest of `ldm data prepare` in a folder elsewhere; None if there is none."""
    if folder.startswith(PIPE) or folder.endswith((".tar", ".json")):
        return None
    url = f"{folder.rstrip('/')}/{MANIFEST}"
    content = read_small(url)
    return None if content is None else check_manifest(_parse(content, url), url)


def _read_list(url: str) -> tuple[list[Shard], np.ndarray]:
    content = read_small(url)
    if content is None:
        raise LdmError(f"{url} does not exist: check it, and your access")
    tree = _parse(content, url)
    checked(_LIST, tree, url, "make it again")
    folder, entries = url.rpartition("/")[0], tree["shardlist"]
    urls = [e["url"] if is_remote(e["url"]) else f"{folder}/{e['url']}" for e in entries]
    return list(map(Shard, urls)), np.array([entry["nsamples"] for entry in entries])


def _parse(content: bytes, url: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise LdmError(f"{url} is damaged ({error}): make it again") from error


def _list_shards(folder: str) -> list[Shard]:
    try:
        system, inside = file_system(folder)
        found = system.ls(inside, detail=True)
    except Exception as error:  # of any library
        text = f"{folder} cannot be listed ({brief(error)}): check it, and your access"
        raise LdmError(text) from error
    tars = sorted((file["name"], file) for file in found if file["name"].lower().endswith(".tar"))
    if not tars:
        raise LdmError(f"no .tar in {folder}: give a folder of shards, or shards by a pattern")
    marks = [file.get("ETag") or file.get("LastModified") or "" for _, file in tars]
    return [
        Shard(system.unstrip_protocol(name), file.get("size") or 0, crc32(str(mark).encode()))
        for (name, file), mark in zip(tars, marks, strict=True)
    ]


def _read_all(source: str, shards: Sequence[Shard], cache: ShardCache) -> ShardIndex:
    """The index of all shards, each of which is fetched, unless it is kept."""
    stamps = [Stamp(shard.url, shard.bytes, shard.version) for shard in shards]
    by_url = {shard.url: shard for shard in shards}

    def read(names: Sequence[str]) -> Generator[ShardBlock]:
        waiting: deque[Future[tuple[Path, ShardIndex]]] = deque()
        left = iter(names)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for name in islice(left, AT_ONCE):
                waiting.append(pool.submit(cache.open, by_url[name]))
            while waiting:
                _, index = waiting.popleft().result()
                for name in islice(left, 1):
                    waiting.append(pool.submit(cache.open, by_url[name]))
                yield index.whole_block(0)

    return kept_index(source, stamps, {}, cache.labels, read)
