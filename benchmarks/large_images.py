"""One large image through a full-size autoencoder, tile by tile: seconds and peak memory.

    python -m benchmarks.large_images [--preset litevae-b] [--side 2048] [--out docs/results]

Random weights: neither time nor memory asks what they are. Writes large_images.md.
"""

import argparse
import resource
import shlex
import sys
import time
from pathlib import Path

import torch

from autoencoders import build_autoencoder, decode_tiled, encode_tiled
from ldm.timing import describe_machine


def main() -> None:
    """Encode, decode, write the page, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="litevae-b")
    parser.add_argument("--side", type=int, default=2048, help="of the image, in pixels")
    parser.add_argument("--tile", type=int, default=512, help="of a tile, in pixels")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder to write to")
    given = parser.parse_args()

    ae = build_autoencoder(given.preset).eval().fuse()
    # a smooth picture: a gradient, and waves of half its side
    axis = torch.linspace(-1, 1, given.side)
    waves = 0.5 * torch.sin(2 * torch.pi * axis)[:, None] * torch.cos(2 * torch.pi * axis)
    image = torch.stack([waves, axis.expand_as(waves) / 2, axis[:, None].expand_as(waves) / 2])[
        None
    ]

    rows = [("model and image", 0.0, peak_gib())]
    start = time.perf_counter()
    latents = encode_tiled(ae, image, tile=given.tile).mode()
    rows.append(("encode", time.perf_counter() - start, peak_gib()))
    start = time.perf_counter()
    recon = decode_tiled(ae, latents, image.shape[-2:], tile=given.tile)
    rows.append(("decode", time.perf_counter() - start, peak_gib()))
    assert recon.shape == image.shape and recon.isfinite().all()

    page = as_markdown(given, rows)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "large_images.md").write_text(page, "utf-8")
    print(page)


def peak_gib() -> float:
    """The most memory that this process has held so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts in bytes


def as_markdown(given: argparse.Namespace, rows: list[tuple[str, float, float]]) -> str:
    """The page: what ran on what, and a line for each part."""
    machine = describe_machine(torch.device("cpu"), "float32")
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = [f"| {what} | {seconds:.0f} | {gib:.2f} |" for what, seconds, gib in rows]
    command = shlex.join(["python", "-m", "benchmarks.large_images", *sys.argv[1:]])
    return "\n".join([
        f"# {given.preset}: one image of {given.side}×{given.side}, in tiles of {given.tile}", "",
        "| | seconds | peak memory of the process so far, GiB |", "|---|---:|---:|", *lines, "",
        f"{about}.", "", f"    {command}", "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
