"""Two sides to compare, and a network that does it: small, and known in closed form."""

import json
from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from scipy import linalg, ndimage

from pipelines.sampling.sample_folder import image_name
from tests.ldm.metrics.fake_inception import Layers

SIZE = 24
DIM = 8


def pictures(count: int, seed: int, blur: float = 1.0) -> np.ndarray:
    """Blurred colour noise (count, SIZE, SIZE, 3) uint8."""
    noise = np.random.default_rng(seed).standard_normal((count, SIZE, SIZE, 3))
    noise = ndimage.gaussian_filter(noise, (0, blur, blur, 0))
    return (noise / noise.std() * 60 + 128).clip(0, 255).astype(np.uint8)


def enlarged(images: np.ndarray) -> np.ndarray:
    """Twice as high and as wide, every pixel four times."""
    return images.repeat(2, axis=1).repeat(2, axis=2)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """PNGs by their numbers: `000.png` …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(images):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder


def write_samples(folder: Path, images: np.ndarray, data: Path | None) -> Path:
    """As `ldm sample` writes them, and what it says of them."""
    for i, picture in enumerate(images):
        path = folder / image_name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    Image.fromarray(pictures(1, seed=9)[0]).save(folder / "grid.png")
    mark = {"format": 1, "n": len(images), "seed": 0, "model": {"sha256": "abc"}}
    if data is not None:
        mark["data"] = {"source": str(data), "held_out": 3, "workers": 0}
    (folder / "samples.json").write_text(json.dumps(mark))
    return folder


def direct_features(images: np.ndarray, dim: int = DIM) -> np.ndarray:
    """(n, dim) float64 by clean-fid's resizer and the fake network."""
    resize, layers = build_resizer("clean"), Layers(dim)
    resized = np.stack([resize(image) for image in images])
    inputs = torch.from_numpy((resized - 128) / 128).permute(0, 3, 1, 2)
    return layers(inputs).double().numpy()


def direct_fid(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The definition in float64: clean-fid's resizer, numpy's covariance, scipy's matrix root."""
    sides = [direct_features(ours), direct_features(theirs)]
    # in the span of all features, since a general root of a singular matrix is ill-conditioned
    basis = linalg.orth(np.concatenate(sides).T)
    (mean_a, cov_a), (mean_b, cov_b) = (
        ((side @ basis).mean(0), np.cov(side @ basis, rowvar=False)) for side in sides
    )
    root = linalg.sqrtm(cov_a @ cov_b).real
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def to_nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)
