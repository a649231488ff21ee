"""The columns of the paper's tables, which end of each is the better one, and what is alike."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A number that a table has of every row."""

    title: str
    """Its name and unit."""
    digits: int
    """After the point, of ours."""
    better: Literal["lower", "higher"] | None = None
    """Which end is the better one; None: it is no matter of quality."""
    share: float = 0.0
    """The yardstick of what is alike, as a share of the row compared with."""
    width: float = 0.0
    """The same in the number's own unit."""
    printed: int | None = None
    """Digits after the point of the paper's; None: as many as there are."""
    of_each_image: bool = False
    """Whether every image has its own share in it, by which two rows are compared."""
    counted: bool = False
    """Whether it is counted, and has no error."""

    @property
    def arrow(self) -> str:
        """↓, ↑ or nothing."""
        return {"lower": " ↓", "higher": " ↑", None: ""}[self.better]

    def gain(self, ours: float, other: float) -> float:
        """By how much a number is better than another one, in its unit."""
        return other - ours if self.better == "lower" else ours - other

    def yardstick(self, other: float) -> float:
        """How far from another number a number still is alike."""
        return self.share * abs(other) + self.width + 1e-9  # 0.88 − 0.86 is a hair above 0.02


# The yardsticks are the widest differences for the worse that the paper itself calls similar,
# comparable or equally good, rounded up: FID 4.3 % (Table 11, DeepFashion), LPIPS 11.1 % and PSNR
# 0.37 dB (Table 10, PatchGAN), SSIM 0.02 (Table 16).
COLUMNS = {
    "params": Column("Params (M)", 2, counted=True),
    "aggregator_params": Column("Params (M)", 2, "lower", counted=True),
    "rfid": Column("rFID", 2, "lower", share=0.05, printed=2),
    "lpips": Column("LPIPS", 3, "lower", share=0.12, printed=3, of_each_image=True),
    "psnr": Column("PSNR", 2, "higher", width=0.4, printed=2, of_each_image=True),
    "ssim": Column("SSIM", 3, "higher", width=0.02, printed=2, of_each_image=True),
    "fid": Column("FID", 2, "lower", share=0.05, printed=2),
    "swd": Column("SWD ×10³", 1, "lower"),
    "gmac": Column("GMAC", 2, "lower", counted=True),
    "memory": Column("Memory (MB)", 0, "lower", share=0.05),
    "images_per_second": Column("Throughput (img/s)", 1, "higher", share=0.05),
    **{f"mmd_{sigma}": Column(str(sigma), 3, "lower", share=0.05, printed=2, of_each_image=True)
       for sigma in (25, 50, 100, 250, 500)},
}  # fmt: skip

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)
"""Widths of the kernels of Table 6."""
