import pytest
import torch

from autoencoders.discriminators import (
    PatchGAN,
    PatchGANConfig,
    UNetDiscriminator,
    UNetDiscriminatorConfig,
    split,
)
from autoencoders.losses import cutmix_consistency, cutmix_masks


def uniforms(count, seed=0):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))


def test_every_mask_is_one_whole_box_of_the_area_drawn():
    draws = uniforms(200)
    masks = cutmix_masks(draws, 24, 40)
    assert masks.shape == (200, 1, 24, 40)
    assert masks.dtype == torch.bool
    for (mixing, *_), mask in zip(draws.tolist(), masks[:, 0], strict=True):
        side = (1 - mixing) ** 0.5
        assert mask.any(1).sum().item() == round(side * 24)
        assert mask.any(0).sum().item() == round(side * 40)
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows) and len(columns):
            box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
            assert mask.sum() == box.numel()


def test_areas_are_uniform_and_boxes_reach_every_corner():
    masks = cutmix_masks(uniforms(4000), 32, 32).float()
    areas = masks.mean(dim=(1, 2, 3)).sort().values
    # Beta(1, 1) is uniform: its quantiles are themselves
    torch.testing.assert_close(areas, torch.linspace(0, 1, 4000), rtol=0, atol=0.05)
    corners = masks[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
    torch.testing.assert_close(corners, corners.mean().expand(4), rtol=0, atol=0.03)


@pytest.mark.parametrize("draw", [(0.0, 0.0, 0.0), (1 - 2**-24, 1 - 2**-24, 1 - 2**-24)])
def test_the_ends_of_the_interval(draw):
    mask = cutmix_masks(torch.tensor([draw]), 16, 16)
    assert mask.all() if draw[0] == 0 else not mask.any()


def test_a_mask_belongs_to_its_image():
    draws = uniforms(5)
    assert torch.equal(cutmix_masks(draws, 16, 24)[3:4], cutmix_masks(draws[3:4], 16, 24))


def test_consistency_is_the_mean_square_over_pixels():
    rng = torch.Generator().manual_seed(0)
    mixed, real, fake = torch.randn(3, 2, 1, 4, 6, generator=rng)
    mask = cutmix_masks(uniforms(2), 4, 6)
    total = 0.0
    for index in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        b, c, i, j = index
        expected = real[b, c, i, j] if mask[b, c, i, j] else fake[b, c, i, j]
        total += (mixed[b, c, i, j] - expected).item() ** 2
    image_logits = torch.randn(2, 1)  # the second head: it has no part in it
    logits = [(pixels, image_logits) for pixels in (mixed, real, fake)]
    assert cutmix_consistency(*logits, mask).item() == pytest.approx(total / mask.numel())
    half = [(pixels.bfloat16(), image_logits) for pixels in (mixed, real, fake)]
    with torch.autocast("cpu", torch.bfloat16):
        assert cutmix_consistency(*half, mask).dtype == torch.float32


def test_what_judges_each_pixel_alone_is_consistent():
    rng = torch.Generator().manual_seed(0)
    images, recon = torch.rand(2, 2, 3, 8, 8, generator=rng) * 2 - 1
    mask = cutmix_masks(uniforms(2), 8, 8)
    judged = [(x.square().sum(1, keepdim=True),) for x in (images, recon)]
    mixed = (torch.where(mask, images, recon).square().sum(1, keepdim=True),)
    assert cutmix_consistency(mixed, *judged, mask).item() == 0


def test_it_teaches_the_unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = UNetDiscriminator(UNetDiscriminatorConfig(channels=4, multipliers=(1, 2)))
    images, recon = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = cutmix_masks(uniforms(2), 16, 16)
    batch = torch.cat([images, recon, torch.where(mask, images, recon)])
    real, fake, mixed = split(discriminator(batch), 3)
    loss = cutmix_consistency(mixed, real, fake, mask)
    loss.backward()
    assert loss.item() > 0
    weight = discriminator.down[0].conv1.parametrizations.weight.original
    assert weight.grad.abs().max() > 0


def test_a_map_of_patches_is_refused():
    logits = PatchGAN(PatchGANConfig(channels=2, layers=1))(torch.zeros(1, 3, 16, 16))
    with pytest.raises(AssertionError, match="a logit for every pixel"):
        cutmix_consistency(*[logits] * 3, cutmix_masks(uniforms(1), 16, 16))
