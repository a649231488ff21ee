import math

import torch
from PIL import Image, ImageColor

from diffusion import EDMConfig, sample_sigma
from ldm.charts import colour
from pipelines.validation import EDGES, band_losses, band_names, draw_bands


def test_each_loss_counts_in_the_band_of_its_noise_level():
    sigma = torch.tensor([0.05, 0.1, 0.2, 2.99, 3.0, 80.0])
    means = band_losses(torch.tensor([1.0, 2, 4, 8, 16, 32]), sigma)
    found = [mean.item() for mean in means.values()]
    assert found[0] == 1 and found[1] == 3 and found[3] == 8 and found[4] == 24
    assert math.isnan(found[2])
    assert list(means) == list(band_names().values())


def test_the_bands_hold_the_shares_that_are_told():
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    counts = torch.histogram(
        sample_sigma(draws, EDMConfig()), torch.tensor([*EDGES[:-1], 1e9])
    ).hist
    shares = (100 * counts / len(draws)).round().tolist()
    assert shares == [18, 32, 34, 13, 3]


def test_a_picture_of_curves(tmp_path):
    names = list(band_names().values())
    rows = [{"images_seen": k, names[0]: 1 / k, names[3]: 2 / k} for k in range(1, 9)]
    draw_bands(rows, tmp_path / "bands.png")
    with Image.open(tmp_path / "bands.png") as picture:
        # two curves in the colours of their bands, and none of the others
        found = {pixel for _, pixel in picture.convert("RGB").getcolors(1 << 20)}
    drawn = [ImageColor.getrgb(colour(index)) in found for index in range(len(names))]
    assert drawn == [True, False, False, True, False]
    draw_bands([], tmp_path / "none.png")
    assert (tmp_path / "none.png").is_file()
