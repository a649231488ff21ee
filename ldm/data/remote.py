"""Tar shards on object storage, web servers and pipes: fetched whole, ahead of use, and kept.

    s3://BUCKET/FOLDER, gs://…, https://…, hf://…   a folder with the manifest of `ldm data prepare`
                                                    and its shards, or with .tar files
    https://…/train-{000..099}.tar                  some shards
    https://…/index.json                            a list of shards, as webdataset's `wids` writes
    pipe:aws s3 cp s3://BUCKET/{000..099}.tar -     the output of commands

A training run needs the number of images in each shard, from a manifest or a list; without one,
every shard is read once before.
"""

import math
import os
import threading
import time
import weakref
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

from ldm.config import Resolution
from ldm.data.shard_cache import PIPE, Shard, ShardCache, file_system, read_small
from ldm.data.shard_index import (
    ShardBlock,
    ShardIndex,
    Stamp,
    kept_index,
)
from ldm.data.shards import MANIFEST, check_manifest, class_names, listed_shards
from ldm.data.sources import UTF8, Indices, Source, tell
from ldm.data.tars import read_member
from ldm.data.transforms import decode, image_size, is_hidden
from ldm.errors import LdmError, UsageError, brief
from ldm.hub import cache_folder
from ldm.logbook import show_progress
from ldm.records import Count, checked, parse_json, schema
from ldm.seeds import Order

AT_ONCE, AHEAD = 8, 2
"""Shards that a process fetches at a time: before a run begins, and during it."""
OPEN = 256
"""Shards that a process keeps open, at least."""
USED = 60
"""Seconds after which a shard counts as used again."""
MOST_IMAGES, LONGEST = 2**48, 4096
"""Images of a data set; characters of a shard's URL."""
MARKS = ("ETag", "etag", "LastModified", "updated", "last_modified", "mtime", "blob_id", "xet_hash")
"""Entries of a file system's listing that change with the content of a file."""


def is_remote(source: str) -> bool:
    """True for a URL or a pipe as a `DataConfig.source`; hf:OWNER/NAME is a table of the Hub."""
    return "://" in source or source.startswith(PIPE)


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
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._wanted: SimpleQueue[Shard | None] = SimpleQueue()
        self._threads = 0
        self._seen: OrderedDict[int, None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_open", "_wanted", "_threads", "_seen", "manifest")
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
        index_of, shard = (
            (self._index, shard) if self._index else (self._opened(shard).of_images, 0)
        )
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
            opened = self._opened(shard)
            with suppress(FileNotFoundError):
                stat = opened.path.stat()
                if stat.st_ino == opened.inode:
                    if time.time() - stat.st_mtime > USED:
                        os.utime(opened.path)  # or it may be the first to make room
                    return read_member(opened.path, opened.of_images.member(0, number))
            del self._open[shard]  # others needed the room, or have fetched it again

    def _share_smaller(self, resolution: Resolution) -> str:
        return ""  # it would fetch many shards

    def _opened(self, shard: int) -> "_Opened":
        if shard not in self._open:
            path, index = self._cache.open(self._shard(shard))
            expected = int(self._starts[shard + 1] - self._starts[shard])
            if len(index.table) != 1 or index.starts[-1] != expected:
                raise LdmError(
                    f"{self._shard(shard).url} holds {index.starts[-1]} images, not {expected} as "
                    f"listed: repair the list, or delete {cache_folder() / 'indexes'}"
                )
            self._open[shard] = _Opened(path, index, path.stat().st_ino)
            if len(self._open) > self._most:
                self._open.popitem(last=False)
            if not self._seen and shard < self._find(len(self) - 1)[0]:  # in sequence
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
        self._most = max(OPEN, 2 * streams * (window + 1))
        starts = self._starts.clip(self.span.start, self.span.stop)
        self._order = Order(np.diff(starts), streams, window)

    def shuffled(self, seed: int, k: int) -> int:
        shard, number = self._order.find(seed, k)
        return max(int(self._starts[shard]) - self.span.start, 0) + number

    def fetch_ahead(self, seed: int, k: int) -> None:
        """Begin to fetch the shards of image k's window and of the next, once for each window."""
        window = self._order.window(seed, k)
        if window.first not in self._seen:
            self._seen[window.first] = None
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)
            self._want(window.shards + self._order.window(seed, window.next).shards)

    def fetch_first(self, seed: int, start: int, rank: int, world: int) -> None:
        """Fetch the shards with which a process begins a run at image `start`, and show it."""
        ks = range(start + rank, start + math.lcm(self._streams, world), world)
        shards = list(dict.fromkeys(s for k in ks for s in self._order.window(seed, k).shards))
        needed = 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            progress = show_progress("fetching shards", len(shards), rank == 0, "shards")
            with progress as advance:
                for _, index in pool.map(lambda s: self._cache.open(self._shard(s)), shards):
                    needed += int(index.table["bytes"][0])
                    advance(1)
        # of all processes that share the cache
        needed *= min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self._streams)
        if 2 * needed > self._cache.limit:
            tell(
                f"this run reads {needed / 1e9:.1f} GB of shards at a time, and fetches as much "
                "ahead; again and again if data.cache_gb is too small: set it to "
                f"{2.5 * needed / 1e9:.1f} or more, or lower data.streams"
            )

    def _want(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background; an error is raised where they are used."""
        for shard in shards:
            self._wanted.put(self._shard(shard))
        while self._threads < AHEAD:
            self._threads += 1
            work = (self._wanted, self._cache)  # and not this source, which they would keep alive
            threading.Thread(target=_fetch_wanted, args=work, daemon=True).start()
            weakref.finalize(self, self._wanted.put, None)


class _Opened(NamedTuple):
    path: Path
    of_images: ShardIndex
    inode: int


def _fetch_wanted(wanted: "SimpleQueue[Shard | None]", cache: ShardCache) -> None:
    """Fetch shards until None comes."""
    while shard := wanted.get():
        with suppress(Exception):
            cache.open(shard)


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

        try:
            shards, counts = [Shard(url) for url in braceexpand(source)], None
        except ValueError as error:
            raise UsageError(f"data.source: {source} has a brace without its other") from error
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
    if not 0 < counts.astype(float).sum() < MOST_IMAGES:
        raise LdmError(f"no images in {source}, or more than there can be: check its shards")
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
    for name in (entry["url"] for entry in entries):
        # a list may come from anywhere: its shards are where it is itself, and no commands
        scheme, _, inside = name.rpartition("://")
        is_safe = ".." not in inside and "::" not in name and not name.startswith((PIPE, "/"))
        if not is_safe or scheme not in ("", url.partition("://")[0]) or len(name) > LONGEST:
            raise LdmError(f"{url} lists {name:.200}, which is no shard beside it: make it again")
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
    by_name = {file["name"]: file for file in found if file["name"].lower().endswith(".tar")}
    tars = sorted(name for name in by_name if not is_hidden(name.rpartition("/")[2]))
    if not tars:
        raise LdmError(f"no .tar in {folder}: give a folder of shards, or shards by a pattern")
    return [
        Shard(
            system.unstrip_protocol(name),
            by_name[name].get("size") or 0,
            crc32(str([by_name[name].get(key) for key in MARKS]).encode()),
        )
        for name in tars
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
