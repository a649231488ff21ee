"""Image files from strangers: no format but those we read, no bombs, no damage that passes."""

import ast
import io
import struct
from pathlib import Path

import pytest
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.data.transforms import FORMATS, SUFFIXES, CorruptImage, decode

from .pictures import encode, noise

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
    assert [name for name, _ in opened] == ["transforms.py"] and not imported
    path = PACKAGES[0] / "data" / "transforms.py"
    calls = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    (call,) = [call for call in calls if ast.unparse(call.func) == "Image.open"]
    assert {key.arg: ast.unparse(key.value) for key in call.keywords} == {"formats": "FORMATS"}
