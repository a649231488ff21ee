import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoencoders.discriminators import (
    PatchGAN,
    PatchGANConfig,
    UNetDiscriminator,
    UNetDiscriminatorConfig,
    split,
)
from autoencoders.losses.adversarial import (
    ADVERSARIAL,
    adaptive_weight,
    artifact_map,
    bce_discriminator,
    cutmix_augmentation,
    cutmix_consistency,
    cutmix_masks,
    gradient_ratio,
    hinge_discriminator,
    hinge_generator,
    ldl,
    local_variance,
    logistic_discriminator,
    logistic_generator,
)

REAL = ([[2.0, 0.5], [-1.0, 1.0]], [[0.3], [3.0]])
FAKE = ([[-2.0, 0.5], [0.0, -1.0]], [[-0.2], [-4.0]])


def heads(values):
    return tuple(torch.tensor(head) for head in values)


def mean_of_heads(values, term):
    """The average of a term over each head, then over the heads, in Python."""
    per_head = [[term(logit) for row in head for logit in row] for head in values]
    return sum(sum(terms) / len(terms) for terms in per_head) / len(per_head)


def log_sigmoid(logit):
    return math.log(1 / (1 + math.exp(-logit)))


def test_hinge():
    assert hinge_generator(heads(FAKE)).item() == pytest.approx(mean_of_heads(FAKE, lambda d: -d))
    expected = mean_of_heads(REAL, lambda d: max(0, 1 - d)) + mean_of_heads(
        FAKE, lambda d: max(0, 1 + d)
    )
    assert hinge_discriminator(heads(REAL), heads(FAKE)).item() == pytest.approx(expected)


def test_logistic():
    fooled = mean_of_heads(FAKE, lambda d: -log_sigmoid(d))
    assert logistic_generator(heads(FAKE)).item() == pytest.approx(fooled)
    expected = mean_of_heads(REAL, lambda d: -log_sigmoid(d)) + mean_of_heads(
        FAKE, lambda d: -log_sigmoid(-d)
    )
    assert logistic_discriminator(heads(REAL), heads(FAKE)).item() == pytest.approx(expected)


def test_bce_adds_the_heads_cross_entropies():
    real, fake = heads(REAL), heads(FAKE)
    per_head = []
    for r, f in zip(real, fake, strict=True):
        logits = torch.cat([r.flatten(), f.flatten()])
        labels = torch.cat([torch.ones(r.numel()), torch.zeros(f.numel())])
        per_head.append(F.binary_cross_entropy_with_logits(logits, labels))
    torch.testing.assert_close(bce_discriminator(real, fake), sum(per_head))
    generator, discriminator = ADVERSARIAL["bce"]
    assert discriminator is bce_discriminator
    labels = [F.binary_cross_entropy_with_logits(head, torch.ones_like(head)) for head in fake]
    torch.testing.assert_close(generator(fake), sum(labels) / 2)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_computed_in_float32(name):
    generator, discriminator = ADVERSARIAL[name]
    real, fake = (tuple(head.bfloat16() for head in heads(values)) for values in (REAL, FAKE))
    wide_real, wide_fake = (tuple(head.float() for head in values) for values in (real, fake))
    expected = generator(wide_fake), discriminator(wide_real, wide_fake)
    with torch.autocast("cpu", torch.bfloat16):
        losses = generator(fake), discriminator(real, fake)
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_a_large_logit_is_no_overflow():
    assert logistic_generator((torch.tensor([-1e4]),)).item() == pytest.approx(1e4)


@pytest.fixture
def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(4, 3, 3, padding=1)


@pytest.fixture
def features():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def losses(layer, features):
    out = layer(features)
    return out.abs().mean(), -out.square().mean()


def numerical_norm(layer, features, which, step=1e-6):
    """Norm of a loss's gradient by central differences, in float64, weight by weight."""
    weight = layer.weight.detach().double().clone()
    squares = 0.0
    for index in range(weight.numel()):
        values = []
        for sign in (1, -1):
            moved = weight.clone()
            moved.view(-1)[index] += sign * step
            out = nn.functional.conv2d(features.double(), moved, layer.bias.double(), padding=1)
            values.append((out.abs().mean(), -out.square().mean())[which].item())
        squares += ((values[0] - values[1]) / (2 * step)) ** 2
    return squares**0.5


def test_ratio_is_that_of_the_gradients_norms(layer, features):
    with torch.no_grad():
        recon, adversarial = (numerical_norm(layer, features, which) for which in (0, 1))
    ratio = gradient_ratio(*losses(layer, features), layer.weight, delta=1e-2)
    assert ratio.item() == pytest.approx(recon / (adversarial + 1e-2), rel=1e-4)
    assert ratio.dtype == torch.float32
    assert not ratio.requires_grad


def test_no_gradient_is_left_and_the_graphs_stay(layer, features):
    recon, adversarial = losses(layer, features)
    gradient_ratio(recon, adversarial, layer.weight)
    assert layer.weight.grad is None
    (recon + adversarial).backward()
    assert layer.weight.grad.isfinite().all()


def test_gradients_are_averaged_before_their_norm_is_taken(layer, features):
    """Two processes' halves of a batch, whose gradients point apart: as one process with both."""
    whole = gradient_ratio(*losses(layer, features), layer.weight, delta=0)
    others = (
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
        for loss in losses(layer, features[1:])
    )
    halves = gradient_ratio(
        *losses(layer, features[:1]), layer.weight,
        reduce=lambda gradient: (gradient + next(others)) / 2, delta=0,
    )  # fmt: skip
    torch.testing.assert_close(halves, whole)


def test_bf16_autocast_measures_in_float32(layer, features):
    expected = gradient_ratio(*losses(layer, features), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        ratio = gradient_ratio(*losses(layer, features), layer.weight)
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(expected.item(), rel=0.05)


def test_a_discriminator_without_gradient_gives_no_nan(layer, features):
    recon, adversarial = losses(layer, features)
    ratio = gradient_ratio(recon, 0 * adversarial, layer.weight, delta=1e-9)
    assert adaptive_weight(0.5, ratio).item() == 0.5 * 1e4  # the ratio is bounded, as in taming
    assert gradient_ratio(0 * recon, 0 * adversarial, layer.weight).item() == 0


def test_half_of_the_ratio_is_the_papers_weight():
    assert adaptive_weight(0.5, torch.tensor(3.0)).item() == 1.5


def uniforms(count, seed=0):
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))


def test_every_mask_is_one_whole_box_of_the_area_drawn_or_all_around_it():
    draws = uniforms(200)
    masks = cutmix_masks(draws, 24, 40)
    assert masks.shape == (200, 1, 24, 40)
    assert masks.dtype == torch.bool
    for (mixing, *_, kind), mask in zip(draws.tolist(), masks[:, 0], strict=True):
        mask = mask if kind >= 0.5 else ~mask
        side = (1 - mixing) ** 0.5
        assert mask.any(1).sum().item() == round(side * 24)
        assert mask.any(0).sum().item() == round(side * 40)
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows) and len(columns):
            box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.all()
            assert mask.sum() == box.numel()


def test_areas_are_uniform_and_boxes_reach_every_corner():
    draws = uniforms(4000)
    draws[:, 3] = 1
    masks = cutmix_masks(draws, 32, 32).float()
    areas = masks.mean(dim=(1, 2, 3)).sort().values
    # Beta(1, 1) is uniform: its quantiles are themselves
    torch.testing.assert_close(areas, torch.linspace(0, 1, 4000), rtol=0, atol=0.05)
    corners = masks[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
    torch.testing.assert_close(corners, corners.mean().expand(4), rtol=0, atol=0.03)


@pytest.mark.parametrize("draw", [(0.0, 0.0, 0.0, 0.5), (*[1 - 2**-24] * 3, 0.5)])
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


def test_augmentation_labels_each_pixel_and_calls_the_image_fake():
    rng = torch.Generator().manual_seed(0)
    pixels, image = torch.randn(2, 1, 4, 6, generator=rng), torch.randn(2, 1, generator=rng)
    mask = cutmix_masks(uniforms(2), 4, 6)
    terms = [
        -log_sigmoid(logit if label else -logit)
        for logit, label in zip(pixels.flatten().tolist(), mask.flatten().tolist(), strict=True)
    ]
    whole = [-log_sigmoid(-logit) for logit in image.flatten().tolist()]
    expected = sum(terms) / len(terms) + sum(whole) / len(whole)
    assert cutmix_augmentation((pixels, image), mask).item() == pytest.approx(expected)
    assert cutmix_augmentation((pixels.bfloat16(), image), mask).dtype == torch.float32


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


@pytest.fixture
def trio():
    """Images, their reconstruction, and that of the averaged weights, about as good."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 12, 10, generator=rng) * 2 - 1
    errors = torch.randn(2, 2, 3, 12, 10, generator=rng) * 0.2
    return images, images + errors[0], images + errors[1]


def map_by_loops(images, recon, averaged):
    """Liang et al. 2022, Section 3.2, pixel by pixel in float64, on images in [0, 1]."""
    images, recon, averaged = (
        None if x is None else (x.double().numpy() + 1) / 2 for x in (images, recon, averaged)
    )
    residual = np.abs(images - recon).sum(1)  # (B, H, W)
    steady = None if averaged is None else np.abs(images - averaged).sum(1)
    expected = np.zeros_like(residual)
    for b, plane in enumerate(residual):
        scale = np.var(plane, ddof=1) ** (1 / 5)
        padded = np.pad(plane, 3, mode="reflect")
        for i, j in np.ndindex(plane.shape):
            if steady is None or plane[i, j] >= steady[b, i, j]:
                expected[b, i, j] = scale * np.var(padded[i : i + 7, j : j + 7], ddof=1)
    return expected[:, None]


@pytest.mark.parametrize("refined", [True, False])
def test_map_and_loss_are_the_papers(trio, refined):
    images, recon, averaged = trio
    averaged = averaged if refined else None
    expected = map_by_loops(images, recon, averaged)
    found = artifact_map(recon, images, averaged)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-8)
    share = (expected == 0).mean()
    assert (0.3 < share < 0.7) if refined else share == 0
    loss = np.abs(expected * (recon - images).double().numpy()).mean()
    assert ldl(recon, images, averaged).item() == pytest.approx(loss, rel=1e-4)


def test_the_map_carries_no_gradient(trio):
    images, recon, averaged = trio
    recon = recon.clone().requires_grad_()
    averaged = averaged.clone().requires_grad_()
    ldl(recon, images, averaged).backward()
    weights = artifact_map(recon, images, averaged)
    expected = weights * (recon - images).sign() / recon.numel()
    torch.testing.assert_close(recon.grad, expected)
    assert averaged.grad is None


def test_perfect_and_evenly_wrong_images_have_no_artifacts(trio):
    images = trio[0].clone().requires_grad_()
    for recon in (images, images + 0.25):
        loss = ldl(recon, images.detach())
        assert loss.item() == pytest.approx(0, abs=1e-9)
        (gradient,) = torch.autograd.grad(loss, images)
        assert gradient.isfinite().all()


def test_local_variance_keeps_its_digits_far_from_zero():
    plane = torch.rand(
        1, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = local_variance(plane)
    found = local_variance((plane * 1e-2 + 10).float()) * 1e4
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)
