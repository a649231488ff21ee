"""The loop that every measurement of stage one is: what it feeds, rounds, sums and refuses."""

from contextlib import closing

import numpy as np
import pytest
import torch

from ldm.data import Batch
from ldm.errors import LdmError
from ldm.images import to_float
from pipelines.validation import Pair, Scores, reconstruct
from tests.pipelines.measuring.reconstructed import Adding, crops, random_autoencoder

CPU = torch.device("cpu")


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


def test_what_is_not_finite_is_refused():
    with pytest.raises(LdmError, match="hold a NaN or an infinity: the autoencoder's weights"):
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
