"""The benchmark's parts, on models small enough; nothing here looks at a clock."""

import pytest
import torch

from benchmarks.stage_two import (
    CPU_TARGETS,
    GPU_TARGETS,
    Peer,
    Setting,
    codec,
    latent_shape,
    measure_sampling,
    measure_training,
    ours,
    peer_encoder,
    prepare,
    training_step,
)
from diffusion import UNetConfig

NARROW = UNetConfig(channels=64, multipliers=(1, 2), blocks=1)
SMALL = Setting(torch.device("cpu"), 1, 32, 1, 2, NARROW, sampling_steps=2)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
def test_both_unets_compute_the_same():
    network = ours(SMALL)
    x, c_noise = torch.randn(latent_shape(SMALL)), torch.tensor([0.3])
    theirs = Peer(network).eval()(x, c_noise)
    torch.testing.assert_close(network.eval()(x, c_noise), theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.01


def test_both_sides_encode_to_latents_of_the_same_shape():
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    for encode in (codec("litevae-s", SMALL).encode, peer_encoder(SMALL)):
        (z,) = prepare(encode, SMALL, images)
        assert z.shape == latent_shape(SMALL) and z.isfinite().all() and not z.requires_grad


def test_a_training_step_moves_the_weights_of_both_sides():
    network = ours(SMALL)
    for module in (network, Peer(network)):
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        training_step(module, SMALL)(torch.randn(latent_shape(SMALL)))
        assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.slow
def test_every_target_has_its_rows():
    rows = measure_training(SMALL) + measure_sampling(SMALL)
    names = {(row.group, row.name) for row in rows}
    for target in (*CPU_TARGETS, *GPU_TARGETS):
        assert (target.group, target.name) in names
        assert (target.group, target.reference) in names
