"""Members of tars: images, where they lie, and their classes."""

import re
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from ldm.data.labels import LABEL_COLUMNS
from ldm.data.sources import LeftOut
from ldm.data.transforms import LARGE, MAX_BYTES, CorruptImage, is_image
from ldm.errors import LdmError, brief
from ldm.files import HeaderReader, find_compression, lfs_pointer, open_regular
from ldm.records import parse_json

MAX_HEADER = 2**20
"""Bytes of an extended header in a tar, such as a long name."""
MAX_GLOBAL = 100
"""Global headers in a tar; reading a member goes through all of them."""


class Member(NamedTuple):
    """An image in a tar: its name, the position of its bytes, and its class, if that was read."""

    name: str
    offset: int
    size: int
    label: int | str | None = None


def index_shard(
    path: Path,
    expected: int | None = None,
    labels: bool = False,
    left_out: LeftOut | None = None,
) -> list[Member]:
    """List the images in a tar, in its order: members with one dot, and the suffix of an image.

    A manifest can tell the number `expected`. With labels, `.cls` and `.json` members are read too,
    each with the class of the images with the same key; of both, `.cls` counts. Other members are
    counted in `left_out`.
    """
    left_out = LeftOut() if left_out is None else left_out
    members: list[tuple[str, Member]] = []  # and their keys
    texts: dict[str, dict[str, bytes]] = {".cls": {}, ".json": {}}  # by their keys
    try:
        with HeaderReader(path, MAX_HEADER) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                cast(Any, tar).members.clear()  # it would keep all, with their headers
                if member.size < 0 or member.issparse():  # the first would go around in circles
                    raise tarfile.ReadError("a member is sparse or of a negative size")
                if len(tar.pax_headers) > MAX_GLOBAL:
                    raise tarfile.ReadError(f"more than {MAX_GLOBAL} global headers")
                inside = PurePosixPath(member.name)
                if not member.isfile():
                    if member.issym() or member.islnk():
                        left_out.add("links", member.name)
                    continue
                suffix, key = inside.suffix.lower(), member.name.rpartition(".")[0]
                two_dots = inside.name.count(".") > 1  # to webdataset, a.seg.png is no image of a
                if labels and suffix in (".cls", ".json") and not two_dots:
                    content = tar.extractfile(member)
                    assert content is not None  # as of every regular file
                    # .cls: six digits, and white space
                    texts[suffix][key] = content.read(32 if suffix == ".cls" else MAX_HEADER)
                elif is_image(member.name) and two_dots:
                    left_out.add("images with two dots in their names", member.name)
                elif left_out.keeps(member.name):
                    image = Member(member.name, member.offset_data, member.size)
                    members.append((key, image))
            file.seek(tar.offset)
            # cut between two members, or with a broken header, a tar reads as a shorter one
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive marker")
        if expected is not None and len(members) != expected:
            raise tarfile.ReadError(f"{len(members)} images, {expected} in the manifest")
    except FileNotFoundError as error:
        raise LdmError(f"shard {path} does not exist") from error
    except LdmError:
        raise
    except Exception as error:  # damage makes tarfile raise nearly anything
        if kind := find_compression(path):
            raise LdmError(f"shard {path} is compressed: unpack it by {kind} first") from error
        message = f"shard {path} is truncated or corrupt ({error}): copy or prepare it again"
        raise LdmError(lfs_pointer(path, "the shard") or message) from error
    return [image._replace(label=_class_of(path, key, texts)) for key, image in members]


def read_member(path: Path, member: Member) -> tuple[bytes, str]:
    """Read an image's file in a tar, and the suffix of its name; or raise `CorruptImage`."""
    if member.size > MAX_BYTES:
        raise CorruptImage(f"{LARGE}{member.size:,} bytes, more than {MAX_BYTES:,}")
    with open_regular(path) as file:
        try:
            file.seek(member.offset)
            return file.read(member.size), Path(member.name).suffix
        except OSError as error:
            raise CorruptImage(brief(error)) from error


def _class_of(path: Path, key: str, texts: Mapping[str, Mapping[str, bytes]]) -> int | str | None:
    """The class in an image's member `.cls`, else in its `.json`; None if it has none."""
    if key in texts[".cls"]:
        return _class_number(texts[".cls"][key], f"{path}/{key}.cls")
    if key in texts[".json"]:
        return _described_class(texts[".json"][key], f"{path}/{key}.json")
    return None


def _class_number(text: bytes, where: str) -> int:
    # at most six digits: a damaged number must not become millions of classes
    if not re.fullmatch(rb"\s*\d{1,6}\s*", text):
        raise LdmError(
            f"{where} holds {text!r}, not a class number from 0 to 999999: repair it, or omit "
            "labels"
        )
    return int(text)


def _described_class(text: bytes, where: str) -> int | str | None:
    """The class in a member of JSON, a number or a name; None if it has none."""
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise LdmError(f"{where} is damaged ({error}): repair it, or omit labels") from error
    found = (tree.get(key) for key in LABEL_COLUMNS) if isinstance(tree, dict) else ()
    return next((label for label in found if type(label) in (int, str)), None)
