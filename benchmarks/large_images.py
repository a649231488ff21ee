"""Encode and decode one large image tile by tile: seconds and peak memory.

    python -m benchmarks.large_images [--preset litevae-b] [--side 2048] [--out docs/results]

The full-size autoencoder has random weights, on which neither time nor memory depends. Writes
large_images.md.
"""

import argparse
import resource
import shlex
import sys
import time

import torch

from autoencoders import build_autoencoder, decode_tiled, encode_tiled
from benchmarks.comparison import add_out, describe_machine, make_parser
from ldm.tables import markdown_table


def main() -> None:
    """Encode, decode, write the page, and print it."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="litevae-b")
    parser.add_argument("--side", type=int, default=2048, help="side of the image in pixels")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile in pixels")
    add_out(parser)
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
    recon = decode_tiled(ae, latents, (given.side, given.side), tile=given.tile)
    rows.append(("decode", time.perf_counter() - start, peak_gib()))
    assert recon.shape == image.shape and recon.isfinite().all()

    page = as_markdown(given, rows)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "large_images.md").write_text(page, "utf-8")
    print(page)


def peak_gib() -> float:
    """Peak memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts in bytes


def as_markdown(given: argparse.Namespace, rows: list[tuple[str, float, float]]) -> str:
    """Format the page: the machine, the command, and a row for each part."""
    machine = describe_machine(torch.device("cpu"), "float32")
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    header = ("", "seconds", "peak memory of the process so far, GiB")
    cells = [(what, f"{seconds:.0f}", f"{gib:.2f}") for what, seconds, gib in rows]
    command = shlex.join(["python", "-m", "benchmarks.large_images", *sys.argv[1:]])
    return "\n".join([
        f"# {given.preset}: one image of {given.side}×{given.side}, in tiles of {given.tile}", "",
        *markdown_table(header, cells), "",
        f"{about}.", "", f"    {command}", "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
