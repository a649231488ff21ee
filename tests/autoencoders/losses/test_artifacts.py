import numpy as np
import pytest
import torch

from autoencoders.losses.adversarial import artifact_map, ldl, local_variance


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
