"""The benchmark's parts, on models small enough; nothing here looks at a clock."""

import pytest
import torch

from benchmarks.comparison import compare
from benchmarks.stage_one import (
    CPU_TARGETS,
    DECODER,
    ENCODER,
    GPU_TARGETS,
    PARTS,
    PEER,
    STEP,
    WAVELET,
    WHOLE,
    Setting,
    freeze,
    images_for,
    measure_decoders,
    measure_parts,
    measure_training,
    measure_wavelets,
    ours,
    peer,
    training_step,
    twin,
)
from pipelines import finetune

SMALL = Setting(torch.device("cpu"), 1, 32, repeats=1, widths=(32, 32, 32, 32))


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
def test_both_sides_compute_the_same():
    model, theirs, images = twin(SMALL.widths), peer(SMALL.widths), images_for(SMALL, 32)
    latents = model.encode(images).mean
    torch.testing.assert_close(latents, theirs.encode(images).latent_dist.mean, rtol=0, atol=1e-4)
    recon = theirs.decode(latents).sample
    torch.testing.assert_close(model.decode(latents), recon, rtol=0, atol=1e-4)


def test_every_target_has_its_rows():
    rows = [*measure_decoders(SMALL), *measure_wavelets(SMALL)]
    rows += compare(ENCODER, dict.fromkeys(("litevae-s", "litevae-b", "sdvae", PEER), 1.0), PEER, 1)
    names = {(row.group, row.name) for row in rows}
    assert {row.group for row in rows} == {ENCODER, DECODER, WAVELET}
    for target in (*CPU_TARGETS, *GPU_TARGETS):
        assert (target.group, target.name) in names
        assert (target.group, target.reference) in names


def test_training_steps_move_the_weights_of_both_sides():
    images = images_for(SMALL, 16)
    for model in (ours("sdvae", SMALL.widths), peer(SMALL.widths)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        training_step(model, SMALL, images)()
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_training_is_measured_beside_the_peer():
    rows = measure_training(SMALL)
    assert [(row.group, row.name) for row in rows] == [
        (STEP, "litevae-b"), (STEP, "sdvae"), (STEP, PEER)
    ]  # fmt: skip
    assert rows[-1].ratio == 1


@pytest.mark.parametrize("part", finetune.PARTS)
def test_a_frozen_part_stays_and_the_other_moves(part):
    model = freeze(ours("sdvae", SMALL.widths), part)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step(model, SMALL, images_for(SMALL, 16))()
    for name, weight in model.named_parameters():
        # in files, the 1×1 convolutions have other names
        key = name.replace("post_quant_conv", "post_conv").replace("quant_conv", "pre_conv")
        assert torch.equal(weight, before[name]) == key.startswith(finetune.PARTS[part]), name


def test_a_distillation_step_moves_the_encoder_alone():
    model = freeze(ours("litevae-s", SMALL.widths), "decoder")
    teacher = ours("sdvae", SMALL.widths).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step(model, SMALL, images_for(SMALL, 16), teacher)()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("decoder"), name


def test_parts_are_measured_beside_the_whole():
    rows = measure_parts(SMALL)
    assert [row.name for row in rows] == [
        WHOLE, "train=decoder", "train=encoder", "litevae-s distilled", "litevae-b distilled"
    ]  # fmt: skip
    assert {row.group for row in rows} == {PARTS} and rows[0].ratio == 1
