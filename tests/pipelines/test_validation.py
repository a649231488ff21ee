"""Scores of autoencoders whose output is known, and losses by noise level."""

import math
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from skimage import data

from autoencoders import build_autoencoder
from diffusion import EDMConfig, FlowConfig, sample_sigma
from ldm.charts import colour
from ldm.data import Batch, DataConfig, Source, evaluation_batches, open_source
from ldm.errors import LdmError
from ldm.images import to_float
from pipelines.validation import (
    EDGES,
    Pair,
    Scores,
    band_losses,
    band_names,
    draw_bands,
    evaluate_autoencoder,
    reconstruct,
)
from tests.pipelines.measuring.reconstructed import (
    Adding,
    by_scikit_image,
    crops,
    random_autoencoder,
)

CPU = torch.device("cpu")


class Crops(Source):
    """A source of 32×32 crops of one photograph."""

    def __init__(self, count: int) -> None:
        self.images = [data.astronaut()[i : i + 32, 200 + i : 232 + i] for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"crop {index}"

    def load(self, index: int) -> np.ndarray:
        return self.images[index]


# --------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("batch_size", [2, 7])
def test_means_over_images_of_8_bit_reconstructions(batch_size):
    """0.05 is 6.375 levels: what is measured is rounded to 6, and clipped at white."""
    source = Crops(7)
    result = evaluate_autoencoder(Adding(0.05), source, 32, batch_size, CPU)
    recon = [(image.astype(int) + 6).clip(0, 255).astype(np.uint8) for image in source.images]
    psnr, ssim = by_scikit_image(source.images, recon)
    assert result["count"] == 7
    assert result["psnr"] == pytest.approx(psnr, abs=1e-5)
    assert result["ssim"] == pytest.approx(ssim, abs=1e-6)
    assert "lpips" not in result


def test_an_exact_reconstruction_counts_100_db():
    result = evaluate_autoencoder(Adding(0.0), Crops(3), 32, 2, CPU)
    assert result == {"psnr": 100.0, "ssim": pytest.approx(1.0), "count": 3}


def test_the_perceptual_distance_is_a_mean_over_images():
    def distance(recon, images):
        return (recon - images + images).mean(dim=(1, 2, 3))  # differs from image to image

    source = Crops(5)
    result = evaluate_autoencoder(Adding(0.0), source, 32, 2, CPU, perceptual=distance)
    stacked = to_float(torch.from_numpy(np.stack(source.images)))
    assert result["lpips"] == pytest.approx(stacked.mean().item(), abs=1e-6)


def test_a_limit_takes_the_first_images():
    assert evaluate_autoencoder(Adding(0.0), Crops(5), 32, 2, CPU, limit=3)["count"] == 3


def test_a_model_in_training_is_put_back():
    model = Adding(0.0).train()
    evaluate_autoencoder(model, Crops(2), 32, 1, CPU)
    assert model.modes == [False, False]
    assert model.training


def test_the_mode_is_decoded_in_eval_mode_without_gradients():
    torch.manual_seed(0)
    ae = build_autoencoder("tiny")
    source = open_source(DataConfig(), "val", 32)
    result = evaluate_autoencoder(ae, source, 32, 4, CPU, limit=4)
    batch = next(evaluation_batches(source, 32, 4))
    with torch.no_grad():
        recon = ae.eval().decode(ae.encode(to_float(batch.images)).mean)
    levels = ((recon + 1) * 127.5).round().clamp(0, 255).byte()
    lists = [t.permute(0, 2, 3, 1).numpy() for t in (batch.images, levels)]
    psnr, ssim = by_scikit_image(*lists)
    assert (result["psnr"], result["ssim"]) == pytest.approx((psnr, ssim), abs=1e-4)


# ---------------------------------------------------------------------------------- errors
def test_no_images_is_an_error():
    with pytest.raises(LdmError, match="no image to evaluate"):
        evaluate_autoencoder(Adding(0.0), Crops(0), 32, 2, CPU)


def test_images_below_ssims_window_are_refused():
    with pytest.raises(LdmError, match="SSIM needs images of 11×11"):
        evaluate_autoencoder(Adding(0.0), Crops(1), 8, 2, CPU)


# -------------------------------------------------------------------------------- the loop
def stream(count: int, size: int = 32, batch_size: int = 2):
    images = torch.from_numpy(np.stack(crops(count, size))).permute(0, 3, 1, 2)
    for ks in torch.arange(count).split(batch_size):
        yield Batch(images[ks], ks, torch.full_like(ks, -1))


def test_pixels_go_in_and_come_out_rounded():
    """0.05 is 6.375 levels: rounded to 6, and clipped at white."""
    pairs = list(reconstruct(Adding(0.05), stream(3), CPU))
    assert [pair.k.tolist() for pair in pairs] == [[0, 1], [2]]
    images = np.stack(crops(3))
    recon = (images.astype(int) + 6).clip(0, 255)
    assert np.array_equal(torch.cat([p.images for p in pairs]).permute(0, 2, 3, 1), images)
    assert np.array_equal(torch.cat([p.recon for p in pairs]).permute(0, 2, 3, 1), recon)


def test_a_model_in_training_is_put_back_even_where_the_reader_stops():
    model = Adding(0.0).train()
    with closing(reconstruct(model, stream(4), CPU)) as pairs:
        next(pairs)
        assert not model.training
    assert model.modes == [False] and model.training


def test_nothing_of_a_gradient_is_kept():
    pairs = list(reconstruct(random_autoencoder(), stream(1), CPU))
    assert not pairs[0].recon.requires_grad and torch.is_grad_enabled()


def test_sides_that_are_no_multiple_of_f_are_cropped_back():
    (pair,) = reconstruct(random_autoencoder(), stream(1, size=43), CPU)
    assert pair.recon.shape == pair.images.shape == (1, 3, 43, 43)


def test_reconstructions_that_are_not_finite_are_refused():
    with pytest.raises(LdmError, match="reconstructions are not finite: use an earlier checkpoint"):
        next(reconstruct(Adding(float("nan")), stream(1), CPU))


def test_shares_merge_to_the_whole():
    def distance(recon, images):
        return images.mean(dim=(1, 2, 3))

    whole, parts = Scores(), (Scores(), Scores())
    for i, pair in enumerate(reconstruct(Adding(0.1), stream(5), CPU)):
        whole.add(pair, distance)
        parts[i % 2].add(pair, distance)
    parts[0].merge(parts[1])
    assert parts[0].count == whole.count == 5
    assert parts[0].means() == pytest.approx(whole.means(), rel=1e-12)
    images = to_float(torch.from_numpy(np.stack(crops(5))))
    assert whole.means()["lpips"] == pytest.approx(images.mean().item(), abs=1e-6)
    each, again = whole.in_order(), parts[0].in_order()
    assert each["k"].tolist() == [0, 1, 2, 3, 4] and each.keys() == {"k", "psnr", "ssim", "lpips"}
    assert all(np.array_equal(each[name], again[name]) for name in each), "whoever saw which"
    assert np.allclose(each["lpips"], images.mean(dim=(1, 2, 3)), atol=1e-6)


def test_an_empty_share_changes_nothing():
    whole = Scores()
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    whole.add(Pair(pixels, pixels, torch.tensor([0])), None)
    whole.merge(Scores())
    assert whole.means() == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    with pytest.raises(LdmError, match="no image to evaluate"):
        Scores().means()


# ------------------------------------------------------------------------ losses by noise level
def test_each_loss_counts_in_the_band_of_its_noise_level():
    sigma = torch.tensor([0.05, 0.1, 0.2, 2.99, 3.0, 80.0])
    means = band_losses(torch.tensor([1.0, 2, 4, 8, 16, 32]), sigma)
    found = [mean.item() for mean in means.values()]
    assert found[0] == 1 and found[1] == 3 and found[3] == 8 and found[4] == 24
    assert math.isnan(found[2])
    assert list(means) == list(band_names().values())


@pytest.mark.parametrize(
    ("config", "documented"),
    [
        (EDMConfig(), [18, 32, 34, 13, 3]),
        (FlowConfig(), [1, 10, 39, 36, 14]),
        (FlowConfig(distribution="uniform"), [9, 14, 27, 25, 25]),
    ],
    ids=["edm", "flow", "uniform"],
)
def test_bands_hold_the_documented_shares_of_noise_levels(config, documented):
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    counts = torch.histogram(sample_sigma(draws, config), torch.tensor([*EDGES[:-1], 1e9])).hist
    assert (100 * counts / len(draws)).round().tolist() == documented


def test_band_losses_are_drawn_in_their_colours(tmp_path):
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
