"""Hostile files: made to run code, fill the memory, hang, write elsewhere, forge the terminal."""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from benchmarks.mutations import ALIASES, SAMPLE_ONE
from benchmarks.world import AUTOENCODER, DIFFUSION, EVAL, FID, JOBS, PREPARE, SAMPLE

ESCAPE = "\x1b]0;owned\x07"
RAW = ("\x1b]", "\x07")
"""Of `ESCAPE`: what must not reach the terminal."""
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(canary) (w) file\n"
)
DEEP = "[" * 100_000
TRAIN = ("train-ae", *AUTOENCODER, "data.source=images", "--out", "runs/new")
SCANS = {
    "sample": ("sample", *SAMPLE_ONE), "train-ae": ("train-ae", *AUTOENCODER),
    "train-diffusion": ("train-diffusion", *DIFFUSION[:-2]), "report": ("report", "runs"),
    "ema": ("ema", "--std", "0.07", "--out", "x.pt"),
}  # fmt: skip
"""Commands that look through `runs/`."""


@dataclass(frozen=True)
class Case:
    """A command, and what is done to the files that it meets."""

    what: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    prepare: Callable[[Path], object]


class Payload:
    """A pickle of this runs a shell command when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('touch "$CANARY"',)


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    groups = (_postscript, _bombs, _pipes, _links, _pickles, _escapes, _configs, _scans)
    return {f"{name}": case for group in groups for name, case in group()}


def _put(name: str, content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return prepare


def _prepare(source: str = "images") -> tuple[str, ...]:
    return ("data", "prepare", source, "prepared", *PREPARE)


# -------------------------------------------------------------------------------- code in images
def _postscript() -> Iterator[tuple[str, Case]]:
    what = "PostScript under the name of an image"
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        bad = _put(f"images/0.{suffix}", POSTSCRIPT)
        yield f"PostScript.{suffix}, data prepare", Case(what, _prepare(), ("images",), bad)
    bad = _put("images/0.png", POSTSCRIPT)
    yield "PostScript, train-ae", Case(what, TRAIN, ("images",), bad)
    bad = _put("samples/00000/img00000000.png", POSTSCRIPT)
    needs = ("samples", "data", "inception.pt", "runs/ldm", "runs/ae")
    yield "PostScript, fid", Case(what, (*FID, "--force"), needs, bad)
    yield "PostScript, neighbours", Case(what, JOBS["neighbours"].words, needs, bad)
    yield "PostScript, sample again", Case(what, JOBS["sample"].words, needs, bad)
    yield (
        "PostScript, eval-ae",
        Case(
            what,
            ("eval-ae", *EVAL, "images"),
            ("runs/ae", "images"),
            _put("images/15.png", POSTSCRIPT),
        ),
    )
    yield (
        "PostScript, zip",
        Case(
            what,
            _prepare("bad.zip"),
            (),
            lambda folder: _zip(folder / "bad.zip", "x.png", POSTSCRIPT),
        ),
    )
    yield (
        "PostScript, tar",
        Case(
            what,
            _prepare("bad.tar"),
            (),
            lambda folder: _tar(folder / "bad.tar", "x.png", POSTSCRIPT),
        ),
    )


def _zip(path: Path, name: str, content: bytes) -> None:
    with ZipFile(path, "w") as pack:
        pack.writestr(name, content)


def _tar(path: Path, name: str, content: bytes) -> None:
    with tarfile.open(path, "w") as pack:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        pack.addfile(info, io.BytesIO(content))


# ----------------------------------------------------------------------------------------- bombs
def _zeros(count: int, begin: bytes = b"") -> bytes:
    """Raw deflate of `begin` and about `count` zeros, made without compressing them all."""
    block = 1 << 24
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(begin) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    middle = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + middle * (count // block) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def _zip_bomb(
    path: Path, name: str, declared: int, begin: bytes = b"", size: int = 2 << 30
) -> None:
    """Write a zip of one entry that grows to `size` and declares `declared` bytes."""
    data, text = _zeros(size, begin), name.encode()
    about = struct.pack("<HHHIIIH", 8, 0, 33, 0, len(data), declared, len(text))
    local = b"PK\3\4" + struct.pack("<HH", 20, 0) + about + struct.pack("<H", 0) + text + data
    entry = b"PK\1\2" + struct.pack("<HHH", 20, 20, 0) + about
    entry += struct.pack("<HHHHII", 0, 0, 0, 0, 0, 0) + text
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(local + entry + end)


def _png(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", b"\x78\x01" + data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _array(shape: str, kind: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": ()})
    header = file.getvalue()[10:].replace(b"()", shape.encode()).rstrip() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header


def _bombs() -> Iterator[tuple[str, Case]]:
    for declared in (100, 2 << 30):
        yield f"zip bomb that declares {declared}", Case(
            "an entry of 2 GiB", _prepare("bomb.zip"), (),
            lambda folder, declared=declared: _zip_bomb(folder / "bomb.zip", "x.png", declared),
        )  # fmt: skip
    for depth, color, size in ((8, 2, 3), (16, 6, 8)):

        def put(folder: Path, depth: int = depth, color: int = color, size: int = size) -> None:
            data = _zeros(13_000 * (13_000 * size + 1) + (1 << 24))
            (folder / "images/0.png").write_bytes(_png(13_000, 13_000, depth, color, data))

        yield f"PNG bomb, {depth} bits", Case("13,000²", _prepare(), ("images",), put)
    what = "an array of 3.8 GB in 4 MB"
    begin = _array("(475000000,)")
    for words, name in (
        ((*FID[:2], "--reference", "kept/statistics/x.npz", *FID[4:]), "kept/statistics/x.npz"),
        ((*FID, "--force"), None),
    ):

        def npz(folder: Path, name: str | None = name) -> None:
            path = folder / name if name else next((folder / "kept/statistics").glob("*.npz"))
            _zip_bomb(path, "mean.npy", 3_800_000_128, begin, 3_800_000_000)

        needs = ("samples", "data", "inception.pt", "kept")
        yield f"npz bomb, {'named' if name else 'kept'}", Case(what, words, needs, npz)
    for shape in ("(100000, 100000, 3)", "(3, 1000000000000)"):
        bad = _put("images/0.npy", _array(shape, "|u1") + bytes(100))
        yield f"npy of {shape}", Case("a shape alone", _prepare(), ("images",), bad)
    yield "npy of latents", Case(
        "a shape alone", (*JOBS["train-diffusion --cache"].words[:-4], "--out", "runs/again",
                          "--cache", "cache"),
        ("cache", "runs/ae", "data"), _put("cache/latents-00000.npy", _array("(12, 1, 2, 10**12)")),
    )  # fmt: skip


# ------------------------------------------------------------- pipes, devices, links, and pickles
READS = {
    "images/0.png": (_prepare(), ("images",)),
    "images/00.png": (TRAIN, ("images",)),
    "runs/ldm/ckpt.pt": (SAMPLE, ("runs/ldm",)),
    "runs/ae/ckpt.pt": (("train-diffusion", *DIFFUSION, "--out", "runs/new"), ("runs/ae", "data")),
    "runs/ldm/run.json": (("sample", *SAMPLE_ONE), ("runs/ae", "runs/ldm")),
    "runs/ldm/config.yaml": (("report", "runs/ldm", "--device", "cpu"), ("runs/ldm",)),
    "runs/ldm/metrics.jsonl": (("report", "runs/ldm", "--device", "cpu"), ("runs/ldm",)),
    "runs/ae/result.json": (("report", "runs/ae", "--device", "cpu"), ("runs/ae", "data")),
    "data/manifest.json": (JOBS["eval-ae"].words, ("runs/ae", "data")),
    "data/train-00000.tar": (JOBS["eval-ae"].words, ("runs/ae", "data")),
    "data/train-00000.tar.json": (JOBS["data prepare"].words, ("images", "data")),
    "samples/samples.json": ((*FID, "--force"), ("samples", "data", "inception.pt")),
    "samples/00000/img00000000.png": ((*FID, "--force"), ("samples", "data", "inception.pt")),
    "cache/cache.json": (JOBS["train-diffusion --cache"].words, ("cache", "runs/ae", "data")),
    "cache/latents-00000.npy": (
        (*JOBS["train-diffusion --cache"].words[:-3], "runs/again", "--cache", "cache"),
        ("cache", "runs/ae", "data"),
    ),
    "diffusers/config.json": (("import", "diffusers", "new.pt"), ("diffusers",)),
    "bad.zip": (_prepare("bad.zip"), ()),
    "bad.ckpt": (("import", "bad.ckpt", "new.pt"), ()),
    "bad.npz": ((*FID[:2], "--reference", "bad.npz", *FID[4:]), ("samples", "inception.pt")),
}  # fmt: skip
"""Files that commands read, by name, with the command and what it needs."""


def _pipes() -> Iterator[tuple[str, Case]]:
    for name, (words, needs) in READS.items():
        for kind in ("pipe", "/dev/zero"):

            def put(folder: Path, name: str = name, kind: str = kind) -> None:
                path = folder / name
                path.unlink(missing_ok=True)
                os.mkfifo(path) if kind == "pipe" else path.symlink_to(kind)

            yield f"{kind} as {name}", Case(f"a {kind} in place of a file", words, needs, put)


WRITTEN = {
    "runs/new/.lock": (("train-ae", *AUTOENCODER, "--out", "runs/new"), ("data",)),
    "runs/new/metrics.jsonl": (("train-ae", *AUTOENCODER, "--out", "runs/new"), ("data",)),
    "runs/ae/.lock": (JOBS["train-ae"].words, ("data", "stopped/train-ae/runs/ae>runs/ae")),
    "runs/ae/metrics.jsonl": (JOBS["train-ae"].words, ("data", "stopped/train-ae/runs/ae>runs/ae")),
    "samples/.lock": (JOBS["sample"].words, ("runs/ldm",)),
    "samples/samples.json": (JOBS["sample"].words, ("runs/ldm",)),
    "data/.lock": (JOBS["data prepare"].words, ("images",)),
    "cache/.lock": (JOBS["train-diffusion --cache"].words, ("runs/ae", "data")),
    "diffusers/.lock": (JOBS["export"].words, ("sdvae.pt",)),
    "diffusers/config.json": ((*JOBS["export"].words, "--force"), ("sdvae.pt",)),
    "analysis/.lock": (JOBS["analyze mmd"].words, ("runs/ae", "data")),
    "eval.json": ((*JOBS["eval-ae"].words,), ("runs/ae", "data")),
    "fid.json": (JOBS["fid"].words, ("samples", "data", "inception.pt")),
    "report.html": (JOBS["report"].words, ("runs/ae", "runs/ldm", "data")),
    "imported.pt": ((*JOBS["import"].words, "--force"), ("diffusers",)),
}
"""Files that commands write at fixed names."""


def _links() -> Iterator[tuple[str, Case]]:
    for name, (words, needs) in WRITTEN.items():

        def link(folder: Path, name: str = name) -> None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(folder.parent / "precious.txt")

        yield f"link at {name}", Case("a link to a file elsewhere", words, needs, link)


def _pickles() -> Iterator[tuple[str, Case]]:
    import torch

    zipped, array = io.BytesIO(), io.BytesIO()
    torch.save({"kind": "diffusion", "format": 1, "config": Payload()}, zipped)
    np.save(array, np.array([Payload()], dtype=object), allow_pickle=True)
    packed = io.BytesIO()
    np.savez(packed, mean=np.array([Payload()], dtype=object))
    contents = {"pickle": pickle.dumps(Payload()), "zip": zipped.getvalue()}
    contents |= {"npy": array.getvalue(), "npz": packed.getvalue()}
    for name, (words, needs) in READS.items():
        if name.endswith((".pt", ".npy", ".ckpt", ".npz", ".png", ".tar")):
            for kind, content in contents.items():
                case = Case("a pickle that runs a command", words, needs, _put(name, content))
                yield f"{kind} as {name}", case
    words, needs = _prepare(), ("images",)
    yield (
        "npy as an image",
        Case("an array of objects", words, needs, _put("images/0.npy", contents["npy"])),
    )
    yield "pickle as diffusers' .bin", Case(
        "a pickle that runs a command", ("import", "diffusers", "new.pt"), ("diffusers",),
        lambda folder: (
            (folder / "diffusers/diffusion_pytorch_model.safetensors").unlink(),
            _put("diffusers/diffusion_pytorch_model.bin", contents["pickle"])(folder),
        ),
    )  # fmt: skip
    for file in ("runs/ae/state/4/state.pt",):
        for kind in ("pickle", "zip"):

            def put(folder: Path, file: str = file, kind: str = kind) -> None:
                _put(file, contents[kind])(folder)
                (folder / "runs/ae/result.json").unlink()

            words, needs = JOBS["train-ae"].words, ("data", "runs/ae")
            yield f"{kind} as {file}", Case("a pickle that runs a command", words, needs, put)


# ---------------------------------------------------------------------- texts, sizes, and scans
def _escapes() -> Iterator[tuple[str, Case]]:
    what = "escape sequences in a name"
    name = f"{ESCAPE}x.png"
    yield (
        "name in a zip",
        Case(
            what,
            _prepare("bad.zip"),
            (),
            lambda folder: _zip(folder / "bad.zip", name, b"no image"),
        ),
    )
    yield (
        "name in a tar",
        Case(
            what,
            _prepare("bad.tar"),
            (),
            lambda folder: _tar(folder / "bad.tar", name, b"no image"),
        ),
    )
    yield "name in a folder", Case(what, _prepare(), ("images",), _put(f"images/{name}", b"none"))
    yield (
        "name in a folder, train-ae",
        Case(what, (*TRAIN, "data.held_out=0"), ("images",), _put(f"images/{name}", b"none")),
    )
    for edit in (
        {"kind": ESCAPE}, {"format": ESCAPE}, {"config": {ESCAPE: 1}},
        {"config": {"network": ESCAPE}},
        {"weights": {ESCAPE: 1}}, {"statistics": {"mean": ESCAPE}}, {"statistics": ESCAPE},
        {"config": {"network": {"type": ESCAPE}}}, {"provenance": {"images_seen": ESCAPE}},
    ):  # fmt: skip
        yield f"ckpt.pt with {json.dumps(edit)[:60]}", Case(
            "escape sequences in a checkpoint", SAMPLE, ("runs/ldm",),
            lambda folder, edit=edit: _edit_torch(folder / "runs/ldm/ckpt.pt", edit),
        )  # fmt: skip
    for file, (words, needs) in READS.items():
        if file.endswith(".json"):
            for key in ("kind", "format", "splits", "model", "settings", "name", "_class_name"):

                def put(folder: Path, file: str = file, key: str = key) -> None:
                    path = folder / file
                    tree = json.loads(path.read_text())
                    path.write_text(json.dumps({**tree, key: ESCAPE, ESCAPE: ESCAPE}))

                yield f"{file} with {key}", Case("escape sequences in JSON", words, needs, put)


def _edit_torch(path: Path, edit: dict[str, Any]) -> None:
    import torch

    tree = torch.load(path, weights_only=True)
    torch.save(_merged(tree, edit), path)


def _merged(tree: Any, edit: Any) -> Any:
    if not isinstance(tree, dict) or not isinstance(edit, dict):
        return edit
    return {**tree, **{key: _merged(tree.get(key), value) for key, value in edit.items()}}


def _configs() -> Iterator[tuple[str, Case]]:
    import torch

    what = "an absurd size in a checkpoint"
    for section, key, value in (
        ("decoder", "blocks", 10_000_000), ("decoder", "channels", 2**40),
        ("decoder", "multipliers", [1] * 100_000), ("encoder", "depth", 10**6),
    ):  # fmt: skip
        edit: dict[str, Any] = {"config": {"model": {section: {key: value}}, section: {key: value}}}
        for run, words in (("ae", ("eval-ae", *EVAL, "data")),):

            def put(folder: Path, run: str = run, edit: dict[str, Any] = edit) -> None:
                path = folder / f"runs/{run}/ckpt.pt"
                tree = torch.load(path, weights_only=True)
                known = {k: v for k, v in edit["config"].items() if k in tree["config"]}
                torch.save(_merged(tree, {"config": known}), path)

            case = Case(what, words, ("runs/ae", "data"), put)
            yield f"stage one with {section}.{key}", case
    for key, value in (
        ("channels", 2**40), ("blocks", 10**7), ("multipliers", [1] * 10_000),
        ("latent_channels", 10**12), ("classes", 10**12),
    ):  # fmt: skip
        config = {"config": {"network": {key: value}}}
        yield f"stage two with network.{key}", Case(
            what, SAMPLE, ("runs/ldm",),
            lambda folder, config=config: _edit_torch(folder / "runs/ldm/ckpt.pt", config),
        )  # fmt: skip
    for key, value in (
        ("layers_per_block", 10**7), ("block_out_channels", [2**40]), ("latent_channels", 10**12),
    ):  # fmt: skip

        def edited(folder: Path, key: str = key, value: Any = value) -> None:
            path = folder / "diffusers/config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

        words = ("import", "diffusers", "new.pt")
        yield f"diffusers with {key}", Case(what, words, ("diffusers",), edited)
    for name, tensor in (
        ("NaN", torch.tensor([float("nan")])), ("complex", torch.ones(1, dtype=torch.complex64)),
        ("meta", torch.empty(10**6, 10**6, device="meta")),
        ("huge", torch.ones(1).expand(10**6, 10**6)),
    ):  # fmt: skip

        def weights(folder: Path, tensor: torch.Tensor = tensor) -> None:
            path = folder / "compvis.ckpt"
            tree = torch.load(path, weights_only=True)
            state = tree.get("state_dict", tree)
            state[next(iter(state))] = tensor
            torch.save(tree, path)

        words = ("import", "compvis.ckpt", "new.pt")
        yield f"CompVis with {name}", Case("a tensor", words, ("compvis.ckpt",), weights)
    yield "eval-ae --resolution 9999999", Case(
        "more than can be had", ("eval-ae", *EVAL, "data", "--resolution", "9999999"),
        ("runs/ae", "data"), lambda folder: None,
    )  # fmt: skip


def _scans() -> Iterator[tuple[str, Case]]:
    described = json.dumps({"kind": "autoencoder", "preset": "tiny"})
    for command, words in SCANS.items():
        for what, run, config in (
            ("aliases", described, ALIASES), ("deep YAML", described, DEEP),
            ("deep JSON", DEEP, ""),
            ("kinds of list", '{"kind": ["diffusion"], "preset": ["tiny"]}', ""),
            ("kinds of escape", json.dumps({"kind": ESCAPE, "preset": ESCAPE}), ""),
        ):  # fmt: skip

            def put(folder: Path, run: str = run, config: str = config) -> None:
                _put("runs/bad/run.json", run)(folder)
                _put("runs/bad/config.yaml", config)(folder)
                _put("runs/bad/ckpt.pt", b"")(folder)

            case = Case("a bad run among others", words, ("runs/ae", "runs/ldm", "data"), put)
            yield f"{command} beside {what}", case
