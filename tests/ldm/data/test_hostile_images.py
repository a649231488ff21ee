"""Image files from strangers: no format but those we read, no bombs, no damage that passes."""

import ast
import io
import os
import resource
import signal
import socket
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from copy import copy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import DataConfig, evaluation_batches, open_source, sources, transforms
from ldm.data.dataset import content_identity, open_images
from ldm.data.shards import index_shard
from ldm.data.transforms import FORMATS, MAX_PIXELS, SUFFIXES, CorruptImage, decode
from ldm.errors import LdmError
from tests.ldm.data.pictures import encode, noise, png_folder, zip_file

ROOT = Path(__file__).parents[3]
PACKAGES = [ROOT / name for name in ("ldm", "autoencoders", "diffusion", "pipelines")]
READ = {*FORMATS, "MPO"}  # several JPEGs in one file
READERS = ("imageio", "cv2", "skimage.io", "torchvision.io", "matplotlib.image", "tifffile")


# ---------------------------------------------------------------------------------- formats
def saved(format: str) -> bytes | None:
    """An image in a format; None if Pillow does not write it."""
    for mode in ("RGB", "L", "1", "RGBA", "P"):
        file = io.BytesIO()
        try:
            Image.new(mode, (16, 16)).save(file, format)
        except Exception:
            continue
        return file.getvalue()
    return None


@cache
def foreign() -> dict[str, bytes]:
    """Files in every format that Pillow writes and we do not read, and in some that it reads."""
    Image.init()
    files = {name: saved(name) for name in sorted(Image.SAVE) if name not in READ}
    by_hand = {
        "EPS by hand": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n\n{ } loop\n",
        "EPS in DOS": struct.pack("<4sIIIIII", b"\xc5\xd0\xd3\xc6", 32, 90, 0, 0, 0, 0) + b"%!PS",
        "PDF": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
        "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(64),
        "EMF": b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(64),
        "FPX, MIC": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "MVG": b"push graphic-context\nimage over 0,0 0,0 '|id'\npop graphic-context\n",
        "XPM": b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #ffffff", "a"};\n',
        "PSD": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(600),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "DjVu": b"AT&TFORM" + bytes(64),
        "FLI": bytes(4) + b"\x11\xaf" + bytes(200),
        "MPEG": b"\0\0\x01\xb3\x01\0\x10" + bytes(64),
        "text": b"#!/bin/sh\nid\n",
        "nothing": b"",
    }
    return {name: data for name, data in (files | by_hand).items() if data is not None}


@pytest.mark.parametrize("name", foreign())
def test_no_other_format_is_read_whatever_the_suffix(name, monkeypatch):
    def called(*_):
        raise AssertionError(f"the reader of {name} was called")

    for other in set(Image.OPEN) - READ:
        monkeypatch.setitem(Image.OPEN, other, (called, None))
    for suffix in (*SUFFIXES, "", ".eps"):
        with pytest.raises(CorruptImage):
            decode(foreign()[name], suffix)


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow hands PostScript to `gs`, and some other formats to programs of their own."""
    programs, touched = tmp_path / "bin", tmp_path / "touched"
    programs.mkdir()
    for name in ("gs", "gswin64c", "djpeg", "ppmquant", "ppmtogif"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {touched}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    (tmp_path / "images").mkdir()
    for suffix in SUFFIXES:
        (tmp_path / "images" / f"x{suffix}").write_bytes(foreign()["EPS by hand"])
    source = open_source(DataConfig(source=str(tmp_path / "images")), "all", 8)
    assert len(source) == len(SUFFIXES)
    for index in range(len(source)):
        with pytest.raises(CorruptImage):
            source.load(index)
    assert not touched.exists()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_that_is_named_is_read(format):
    assert decode(encode(noise(0), format), ".png").shape == (48, 40, 3)
    assert any(Image.registered_extensions()[suffix] == format for suffix in SUFFIXES[:-1])


def test_images_are_opened_in_one_place_only():
    """Everywhere else, another format, a bomb or a damaged checksum would get through."""
    opened, imported = [], []
    for path in (file for package in PACKAGES for file in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("open", "imread", "Parser"):
                if ast.unparse(node.value).split(".")[-1] in ("Image", "PIL", "ImageFile", "plt"):
                    opened.append((path.name, node.lineno))
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported += [name for name in names if name in ("PIL.Image.open", "PIL.ImageFile")]
                imported += [name for name in names if name.startswith(READERS)]
            elif isinstance(node, ast.Import):
                imported += [n.name for n in node.names if n.name.startswith((*READERS, "PIL"))]
    assert {name for name, _ in opened} == {"transforms.py"} and not imported
    path = PACKAGES[0] / "data" / "transforms.py"
    calls = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    opening = [call for call in calls if ast.unparse(call.func) == "Image.open"]
    assert len(opening) == 2, "its pixels, and its size"
    for call in opening:
        assert {key.arg: ast.unparse(key.value) for key in call.keywords} == {"formats": "FORMATS"}


# ------------------------------------------------------------------------------------ bombs
MEMORY, SECONDS = 2**28, 30
GROWN = 2**29
"""Bytes that a bomb grows to; more than a process under test may have."""


def bounded(work: Callable[[], object]) -> str:
    """The error message, or "read", of work in a process of its own with limits."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(SECONDS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        warnings.simplefilter("ignore")
        try:
            work()
            said = "read"
        except (CorruptImage, LdmError) as error:
            said = str(error)
        except BaseException as error:
            said = f"unexpected: {error!r}"
        os.write(send, said.encode("utf-8", "backslashreplace")[:4096])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "took too long"
    assert "Memory" not in said and "unexpected" not in said and "\n" not in said, said
    return said


@cache
def zeros(wbits: int = zlib.MAX_WBITS) -> bytes:
    """A deflated bomb of half a megabyte."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, wbits)
    return b"".join(deflate.compress(bytes(2**24)) for _ in range(GROWN >> 24)) + deflate.flush()


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(data: bytes, *more: tuple[int, int, int], side: int = 8, compression: int = 8) -> bytes:
    """Grey, with further tags (tag, count, value); a value of −1 is the position of `data`."""
    tags = [(256, 1, side), (257, 1, side), (258, 1, 8), (259, 1, compression), (262, 1, 1), *more]
    place = 8 + 2 + 12 * len(tags) + 4
    rows = (struct.pack("<HHII", t, 4, n, place if v < 0 else v) for t, n, v in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(rows) + bytes(4) + data


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + data


def resized(format: str) -> bytes:
    """A small file of a format, whose header says 9000 × 9000."""
    data = encode(noise(0, 16, 16), format)
    big = {
        "PNG": ("16s", ">II", 16), "BMP": ("18s", "<ii", 18), "GIF": ("6s", "<HH", 6),
    }  # fmt: skip
    if format in big:
        _, pattern, at = big[format]
    elif format == "JPEG":
        pattern, at = ">HH", data.index(b"\xff\xc0") + 5
    elif format == "AVIF":
        pattern, at = ">II", data.index(b"ispe") + 8
    elif format == "WEBP":  # an extended header, which names the canvas
        canvas = struct.pack("<I", 8999)[:3] * 2
        body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + canvas + data[12:]
        return b"RIFF" + struct.pack("<I", len(body)) + body
    else:
        return tiff(zeros(), (273, 1, -1), (279, 1, len(zeros())), side=9000)
    data = data[:at] + struct.pack(pattern, 9000, 9000) + data[at + struct.calcsize(pattern) :]
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:] if at == 16 else data


@cache
def bombs() -> dict[str, tuple[bytes, str]]:
    """Files that grow, and the reasons for which they are refused; "read" for what is left out."""
    place, size = (273, 1, -1), (279, 1, len(zeros()))
    tile = [(324, 1, -1), (325, 1, len(zeros()))]
    many = [(40000 + i, 2**16, -1) for i in range(4000)]
    exif = tiff(bytes(2**18), *many)
    text = chunk(b"zTXt", b"Comment\0\0" + zeros())
    pixel = zlib.compress(bytes(4))
    jpeg = encode(noise(0), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return {
        "PNG of 13,000²": (png(13000, 13000, 8, 2, zeros()), "13000×13000 pixels"),
        "PNG of 13,000², RGBA of 16 bits": (png(13000, 13000, 16, 6, zeros()), "13000×13000"),
        "PNG of few rows": (png(2**31 - 1, 1, 8, 2, zeros()), "."),
        "PNG with more pixels than announced": (png(1, 1, 8, 2, zeros()), "."),
        "PNG with text": (png(1, 1, 8, 2, pixel, text), "."),
        "PNG with a profile": (png(1, 1, 8, 2, pixel, chunk(b"iCCP", b"x\0\0" + zeros())), "."),
        "PNG with EXIF": (png(1, 1, 8, 2, pixel, chunk(b"eXIf", exif)), "."),
        "TIFF of 2³¹ × 2³¹": (tiff(zeros(), place, size, side=2**31 - 1), "."),
        "TIFF with large tiles": (tiff(zeros(), (322, 1, 40000), (323, 1, 40000), *tile), "40000"),
        "TIFF with wide tiles": (tiff(zeros(), (322, 1, 2**31), (323, 1, 16), *tile), "pixels"),
        "TIFF with tall strips": (tiff(zeros(), place, size, (278, 1, 2**32 - 1)), "."),
        "TIFF with long strips": (tiff(b"abc", place, (279, 1, 2**32 - 1), compression=1), "."),
        "TIFF with absurd tags": (tiff(bytes(2**18), place, (279, 1, 64), *many), "tags"),
        "TIFF with endless tags": (tiff(bytes(9), place, (279, 1, 64), (338, 2**31, -1)), "tags"),
        "JPEG with many scans": (jpeg[:-2] + scan * 2000 + jpeg[-2:], "scans"),
        # libwebp asks for a canvas first, and does not touch it
        **{
            f"large {each}": (resized(each), "9000×9000" if each != "WEBP" else ".")
            for each in FORMATS
        },
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_from_their_headers(name):
    data, reason = bombs()[name]
    said = bounded(partial(decode, data, ".png"))
    assert reason in said or reason == ".", said


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 4, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2, 3)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (4294967296, 4294967296, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 2, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 3, " + "1, " * 40 + ")}",
        "{'descr': '(9999999999,)u1', 'fortran_order': False, 'shape': (1, 4, 3)}",
        "{'descr': '|V9999999999', 'fortran_order': False, 'shape': (1, 4, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 3)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 3)}",
        "(" * 5000,
        "",
    ],
)
def test_arrays_are_refused_by_their_headers(header):
    bounded(partial(decode, npy(header, bytes(12)), ".npy"))
    with pytest.raises(CorruptImage):
        decode(npy(header, bytes(12)), ".npy")


@pytest.mark.parametrize("format", FORMATS)
def test_the_limit_is_of_pixels_in_every_format(format, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 256)
    assert decode(encode(noise(0, 16, 16), format), "").shape == (16, 16, 3)
    with pytest.raises(CorruptImage, match="16×17 pixels, more than 256"):
        decode(encode(noise(0, 17, 16), format), "")
    assert MAX_PIXELS >= 8192**2


# --------------------------------------------------------------------------------- archives
def packed(path: Path, data: bytes, declared: int, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip with one compressed image, whose directory and header declare another size."""
    sizes = struct.pack("<III", 0, len(data), declared)
    local = struct.pack("<HHHHH", 20, 0, method, 0, 33) + sizes + struct.pack("<HH", 5, 0)
    head = b"PK\3\4" + local + b"x.png" + data
    directory = b"PK\1\2\x14\0" + local + bytes(10) + struct.pack("<I", 0) + b"x.png"
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(directory), len(head), 0)
    path.write_bytes(head + directory + b"PK\5\6" + end)
    return path


def first(path: Path) -> Callable[[], object]:
    return lambda: open_images(path).load(0)


@pytest.mark.parametrize("declared", [100, GROWN, 2**32 - 2], ids=["less", "as it is", "more"])
def test_a_zip_entry_is_inflated_to_the_size_it_declares_and_to_the_limit(
    declared, tmp_path, monkeypatch
):
    path = packed(tmp_path / "x.zip", zeros(-15), declared)
    monkeypatch.setattr(sources, "MAX_BYTES", 2**26)
    said = bounded(first(path))
    assert said == ("Bad CRC-32 for file 'x.png'" if declared == 100 else said)
    assert declared == 100 or "more than 67,108,864" in said


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_inflate_at_once_are_refused(method, tmp_path):
    path = packed(tmp_path / "x.zip", b"BZh9", 100, method)
    assert bounded(first(path)) == "compressed by another method than deflate"


def test_a_photograph_with_a_film_behind_it_is_read():
    """As phones write them; its bytes hold the marks of scans by chance."""
    film = b"\xff\xda" + bytes(range(8))
    data = encode(noise(0), "JPEG")
    np.testing.assert_array_equal(decode(data + 999 * film, ".jpg"), decode(data, ".jpg"))


def test_a_zip_of_many_names_and_its_limit(tmp_path, monkeypatch):
    path = zip_file(tmp_path / "x.zip", {f"{n}.png": encode(noise(n, 2, 2)) for n in range(50)})
    assert len(open_images(path)) == 50
    monkeypatch.setattr(sources, "MAX_DIRECTORY", 2000)
    with pytest.raises(LdmError, match=r"not a zip archive \(a header of [0-9,]+ bytes"):
        open_images(path)


def test_of_two_entries_with_one_name_the_last_counts_as_in_unzip(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for n in range(3):
            archive.writestr("x.png", encode(noise(n)))
    source = open_images(tmp_path / "x.zip")
    assert len(source) == 1
    np.testing.assert_array_equal(source.load(0), noise(2))


def test_entries_over_one_another_and_zips_in_zips_are_bounded(tmp_path):
    """A thousand names for the same bytes, each of which grows."""
    path = packed(tmp_path / "x.zip", zeros(-15), GROWN)
    with zipfile.ZipFile(path, "a") as archive:
        (entry,) = archive.filelist
        archive.filelist += [copy(entry) for _ in range(1000)]
        for n, each in enumerate(archive.filelist):
            each.filename = f"{n:05d}.png"
        archive._didModify = True
    source = open_images(path)
    assert "corrupt" in bounded(lambda: list(evaluation_batches(source, 8, 4)))
    (tmp_path / "x.zip").rename(tmp_path / "inner.png")
    outer = zip_file(tmp_path / "outer.zip", {"x.png": (tmp_path / "inner.png").read_bytes()})
    assert "not an image" in bounded(first(outer))


def tar_header(name: str, size: int, kind: bytes = b"0", **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: dict[str, str], kind: bytes = b"x", size: int | None = None) -> bytes:
    body = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 12) if n == len(rest) + len(str(n)))
        body += str(length).encode() + rest
    padded = body + bytes(-len(body) % 512)
    return tar_header("pax", len(body) if size is None else size, kind) + padded


IMAGE = encode(noise(0))
MEMBER = tar_header("x.png", len(IMAGE)) + IMAGE + bytes(-len(IMAGE) % 512)
END = bytes(1024)


def tars() -> dict[str, bytes]:
    """Tars that are refused as a whole."""
    sparse = tar_header("x.png", 0, tarfile.GNUTYPE_SPARSE)
    return {
        "a member of 2⁶⁰ bytes": tar_header("x.png", 2**60) + bytes(512) + END,
        "a member of 2⁸⁰ bytes": tar_header("x.png", 2**80) + bytes(512) + END,
        "a negative member": MEMBER + tar_header("y.png", -1024) + END,
        "a negative other member": MEMBER + tar_header("y", -1024, b"Z") + END,
        "a negative size in a header": MEMBER + pax({"size": "-2048"}) + MEMBER + END,
        "a negative header": tar_header("x", -1024, b"x") + MEMBER + END,
        "a header of 8 GB": tar_header("x", 2**33, b"x") + MEMBER + END,
        "a long header": pax({"comment": "x" * 2**21}) + MEMBER + END,
        "a long name": tar_header("x", 2**21, b"L") + bytes(2**21) + MEMBER + END,
        "headers of headers": pax({"comment": "x"}) * 5000 + MEMBER + END,
        "names of names": (tar_header("x", 2, b"L") + b"y\0" + bytes(510)) * 5000 + MEMBER + END,
        "a sparse member": sparse + END,
        "a sparse member by PAX": pax({"GNU.sparse.map": "0,9"}) + MEMBER + END,
        "an endless sparse map": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        + tar_header("x.png", 512) + b"99999999\n" + bytes(503) + END,
        "many global headers": pax({f"k{n}": "v" for n in range(5000)}, b"g") + MEMBER + END,
        "no end": MEMBER,
        "no tar": b"x" * 2000,
        "nothing": b"",
    }  # fmt: skip


@pytest.mark.parametrize("name", tars())
def test_hostile_tars_are_refused_in_one_line(name, tmp_path):
    (tmp_path / "x.tar").write_bytes(tars()[name])
    said = bounded(lambda: index_shard(tmp_path / "x.tar"))
    assert said.startswith(f"shard {tmp_path}/x.tar is truncated or corrupt"), said


def test_links_and_devices_in_a_tar_are_no_images(tmp_path):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
    others = b"".join(tar_header("y.png", 0, kind, linkname="/etc/passwd") for kind in kinds)
    (tmp_path / "x.tar").write_bytes(others + MEMBER + others + END)
    source = open_images(tmp_path / "x.tar")
    assert len(source) == 1
    np.testing.assert_array_equal(source.load(0), noise(0))


def test_a_large_member_of_a_tar_is_a_corrupt_image(tmp_path, monkeypatch):
    (tmp_path / "x.tar").write_bytes(MEMBER + END)
    source = open_images(tmp_path / "x.tar")
    monkeypatch.setattr("ldm.data.tars.MAX_BYTES", 100)
    with pytest.raises(CorruptImage, match="bytes, more than 100"):
        source.load(0)


# ---------------------------------------------------------------------------- special files
def special(path: Path, kind: str) -> None:
    """Put something that is no regular file at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        short = Path(os.path.relpath(path))  # a socket's path has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(short))
    else:
        path.symlink_to({"loop": path, "nothing": path.parent / "nowhere"}.get(kind, kind))


KINDS = ["pipe", "folder", "socket", "loop", "nothing", "/dev/zero", "/dev/tty", "/proc/self/mem"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_a_corrupt_image(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = png_folder(tmp_path / "images", [noise(n) for n in range(2)])
    source = open_source(DataConfig(source=str(images)), "all", 8)
    (images / "0000.png").unlink()
    special(images / "0000.png", kind)
    assert "unexpected" not in bounded(lambda: source.load(0))
    with pytest.raises(CorruptImage):
        source.load(0)
    if kind != "/proc/self/mem":  # a regular file, to the kernel
        assert "could not read" in bounded(lambda: content_identity(source, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives_that_are_no_regular_files_are_refused(suffix, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    special(tmp_path / f"x{suffix}", kind)
    said = bounded(lambda: open_images(tmp_path / f"x{suffix}"))
    assert said != "read" and str(tmp_path) in said


# ----------------------------------------------------------------------------------- damage
SMALL = [
    encode(noise(0, 5, 4)),
    encode(np.full((7, 9, 3), 40, np.uint8), compress_level=0),
    encode(noise(1, 6, 6)[..., 0], dpi=(72, 72), pnginfo=None),
]


@pytest.mark.parametrize("data", SMALL)
def test_every_flipped_byte_of_a_png_is_noticed_or_of_no_effect(data):
    whole = decode(data, ".png")
    for place in range(len(data)):
        for mask in (1, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= mask
            try:
                np.testing.assert_array_equal(decode(bytes(damaged), ".png"), whole)
            except CorruptImage:
                continue


@pytest.mark.parametrize("data", SMALL)
def test_every_shortened_png_is_refused(data):
    for length in range(len(data)):
        with pytest.raises(CorruptImage):
            decode(data[:length], ".png")
    assert decode(data + b"more", ".png").size


def test_the_checksum_inside_the_pixels_counts_too():
    """One of zlib's, which a program that mends the chunks' checksums leaves wrong."""
    rows = b"".join(b"\0" + row.tobytes() for row in noise(0, 300, 300))
    pixels = zlib.compress(rows)
    assert decode(png(300, 300, 8, 2, pixels), "").shape == (300, 300, 3)
    with pytest.raises(CorruptImage):
        decode(png(300, 300, 8, 2, pixels[:-1] + bytes([pixels[-1] ^ 1])), "")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
def test_floats_are_no_pixels_whether_finite_or_not(value, dtype):
    array = np.full((8, 8, 3), 0.5).astype(dtype)
    array[2, 3] = value
    file = io.BytesIO()
    np.save(file, array)
    with pytest.raises(CorruptImage, match=f"a {np.dtype(dtype)} array"):
        decode(file.getvalue(), ".npy")
    with pytest.raises(CorruptImage, match="floating-point"):
        decode(encode(np.real(array[..., 0]).astype(np.float32), "TIFF"), ".tif")
