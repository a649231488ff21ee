from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoencoders import Autoencoder, DiagonalGaussian, build_autoencoder
from autoencoders.tiling import cut, decode_tiled, encode_tiled, reconstruct_tiled
from ldm.errors import LdmError, UsageError

LEVEL = 1 / 255  # a step of uint8, of a range of 1


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small(norm="group"):
    return build_autoencoder("tiny", decoder={"channels": 8, "norm": norm}).eval()


def smooth(height, width):
    """Low frequencies in [−1, 1], (1, 3, height, width)."""
    coarse = torch.rand(1, 3, 4, 5) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


class Local(nn.Module):
    """Stands for an autoencoder with f = 8 that sees no farther than 8 pixels from a latent."""

    pad = Autoencoder.pad

    def __init__(self):
        super().__init__()
        self.config = build_autoencoder("tiny", decoder={"channels": 8}).config
        self.downsampling = 8
        self.down = nn.Conv2d(3, 8, 24, stride=8, padding=8)
        self.up = nn.ConvTranspose2d(4, 3, 24, stride=8, padding=8)
        self.seen = []

    def encode(self, images):
        self.seen.append(images.shape)
        return DiagonalGaussian.from_moments(self.down(images))

    def decode(self, latents):
        self.seen.append(latents.shape)
        return self.up(latents)


def test_images_smaller_than_a_latent_are_refused_as_by_encode():
    with pytest.raises(LdmError, match="9×4 pixels are smaller than one latent of 8×8"):
        encode_tiled(small(), torch.zeros(1, 3, 9, 4), tile=16, overlap=8)


# ------------------------------------------------------------------------------------ blending
@pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (32, 8), (32, 16), (32, 24), (64, 32)])
@pytest.mark.parametrize("side", [3, 8, 9, 21, 40])
def test_weights_add_up_to_one_and_tiles_reach_both_borders(side, tile, overlap):
    spans = cut(side, tile // 8, overlap // 8, out_scale=8)
    total = torch.zeros(8 * side)
    for start, end, weight in spans:
        assert end - start == min(side, tile // 8)
        assert weight.min() > 0
        total[8 * start : 8 * end] += weight
    torch.testing.assert_close(total, torch.ones(8 * side))
    assert spans[0][0] == 0 and spans[-1][1] == side
    for (_, end, _), (start, _, _) in pairwise(spans):
        assert end - start >= overlap // 8


@torch.no_grad()
def test_where_a_tiles_border_is_out_of_sight_tiles_change_nothing():
    ae, images = Local(), torch.rand(2, 3, 128, 192) * 2 - 1
    latents = torch.randn(2, 4, 16, 24)
    tiled, whole = encode_tiled(ae, images, tile=64, overlap=0), ae.encode(images)
    pairs = [(tiled.mean, whole.mean, 1), (tiled.logvar, whole.logvar, 1)]
    pairs += [(decode_tiled(ae, latents, tile=64, overlap=0), ae.decode(latents), 8)]
    for ours, plain, scale in pairs:
        # cuts at 64 and 128 pixels spoil the latents on both sides of them
        rows, columns = (
            torch.tensor([k // scale % 8 not in (0, 7) for k in range(side)])
            for side in plain.shape[-2:]
        )
        inner = rows[:, None] & columns
        torch.testing.assert_close(ours[..., inner], plain[..., inner])
        assert not torch.allclose(ours, plain)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["group", "smc"])
def test_no_seam_is_seen_in_a_smooth_image(norm):
    """Across the seam, neighbouring pixels differ by what they do inside the two tiles."""
    ae = small(norm)
    learn_grey_levels(ae)
    latents = ae.encode(smooth(64, 896)).mode()  # (1, 4, 8, 112): two of the default tiles
    left, right = ae.decode(latents[..., :64]), ae.decode(latents[..., 48:])
    recon = decode_tiled(ae, latents)
    assert torch.equal(recon[..., :384], left[..., :384])
    assert torch.equal(recon[..., 512:], right[..., 128:])
    # the overlap, and a pixel more on either side
    inside = torch.zeros(1, 3, 64, 129)
    inside[..., :128] = steps(left[..., 383:])
    inside[..., 1:] = torch.maximum(inside[..., 1:], steps(right[..., :129]))
    cut = torch.cat([left[..., 383:448], right[..., 64:129]], dim=3)  # without a blend
    seam, hard = ((steps(x) - inside).max() / 2 for x in (recon[..., 383:513], cut))
    assert seam <= LEVEL
    assert hard > max(LEVEL, 5 * seam)  # it would have been seen


def steps(images):
    """Differences of each pixel to the one on its right, (…, H, W − 1)."""
    return images.diff(dim=3).abs()


def learn_grey_levels(ae, count=20):
    """A few steps towards decoding smooth images, so that tiles are alike as a trained one's."""
    optimizer = torch.optim.Adam(ae.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(count):
            images = torch.cat([smooth(32, 32) for _ in range(2)])
            (ae(images, sample=False).recon - images).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


# ------------------------------------------------------------------------------- pieces, sizes
@torch.no_grad()
def test_what_fits_in_a_tile_is_the_plain_call():
    ae, images = small(), torch.rand(2, 3, 40, 64) * 2 - 1
    tiled, plain = encode_tiled(ae, images, tile=64, overlap=8, batch=2), ae.encode(images)
    assert torch.equal(tiled.mean, plain.mean)
    assert torch.equal(tiled.logvar, plain.logvar)
    latents = plain.mode()
    assert torch.equal(decode_tiled(ae, latents, tile=64, overlap=8, batch=2), ae.decode(latents))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_never_more_than_a_batch_of_tiles_at_once(batch):
    ae, images = Local(), torch.rand(3, 3, 96, 64) * 2 - 1
    latents = encode_tiled(ae, images, tile=64, overlap=32, batch=batch).mode()
    decode_tiled(ae, latents, tile=64, overlap=32, batch=batch)
    encoded, decoded = ae.seen[: len(ae.seen) // 2], ae.seen[len(ae.seen) // 2 :]
    for seen, size in ((encoded, (3, 64, 64)), (decoded, (4, 8, 8))):
        assert {tuple(shape[1:]) for shape in seen} == {size}
        assert max(shape[0] for shape in seen) == batch
        assert sum(shape[0] for shape in seen) == 3 * 2  # two tiles an image


@torch.no_grad()
def test_odd_sizes_are_padded_by_repetition_and_cropped():
    ae, images = small(), torch.rand(1, 3, 93, 141) * 2 - 1
    settings = {"tile": 64, "overlap": 32}
    padded = F.pad(images, (0, 3, 0, 3), mode="replicate")
    latents = encode_tiled(ae, images, **settings).mode()
    assert torch.equal(latents, encode_tiled(ae, padded, **settings).mode())
    recon = reconstruct_tiled(ae, images, **settings)
    assert recon.shape == images.shape
    assert torch.equal(recon, decode_tiled(ae, latents, **settings)[..., :93, :141])
    assert torch.equal(recon, decode_tiled(ae, latents, size=(93, 141), **settings))


def test_no_gradient_and_no_image():
    ae = small()
    recon = reconstruct_tiled(ae, torch.zeros(1, 3, 16, 16))
    assert not recon.requires_grad
    assert reconstruct_tiled(ae, torch.zeros(0, 3, 16, 16)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tile": 60}, "tile=60, overlap=128: both must be multiples of 8"),
        ({"overlap": 12}, "tile=512, overlap=12: both must be multiples of 8"),
        ({"tile": 0, "overlap": 0}, "tile=0, overlap=0: both must be multiples of 8"),
        ({"tile": 64, "overlap": 64}, "overlap=64, tile=64: overlap must be 0 to 56"),
        ({"overlap": -8}, "overlap=-8, tile=512: overlap must be 0 to 504"),
        ({"batch": 0}, "batch=0: must be at least 1"),
    ],
)
def test_tilings_that_cannot_be(settings, said):
    ae = small()
    calls = (encode_tiled, torch.zeros(1, 3, 8, 8)), (decode_tiled, torch.zeros(1, 4, 1, 1))
    for function, given in calls:
        with pytest.raises(UsageError) as caught:
            function(ae, given, **settings)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
