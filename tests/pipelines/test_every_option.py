"""Every option of stage one: built by `key=value`, trained, saved, loaded.

Each row of `OPTIONS` is a model or a way to train it that the paper has or compares with.
"""

import lpips
import pytest
import torch

from autoencoders import load_autoencoder
from autoencoders.losses import LPIPS
from autoencoders.losses.perceptual import ESRGANPerceptual
from ldm.checkpoint import ModelFile, save_model
from ldm.config import load_preset, resolve, to_tree
from ldm.data import DataConfig, batches, open_source
from ldm.distributed import make_accelerator
from ldm.images import to_float
from ldm.run import Run, RunConfig
from pipelines.recipes import AutoencoderRecipe
from pipelines.train_autoencoder import AutoencoderState, train_step

RESOLUTION, BATCH, STEPS = 32, 4, 20
SMALL = [
    f"phases=[{{resolution: {RESOLUTION}, steps: {STEPS}}}]", f"batch_size={BATCH}", "lr=2e-3",
    "betas=[0.9, 0.99]", "clip_norm=1",
    "loss={lpips: 0}", "adversarial={weight: 0}", "run.precision=fp32",
]  # fmt: skip
LITEVAE = [
    "encoder={extractor: {channels: 8, multipliers: [1, 2], blocks: 1}, "
    "aggregator: {channels: 8, multipliers: [1, 2], blocks: 1}}",
    "decoder={channels: 8, multipliers: [1, 1, 2, 2], blocks: 1}",
]
SDVAE = ["encoder={type: sdvae, channels: 8, multipliers: [1, 1, 2, 2], blocks: 1}", *LITEVAE[1:]]
DWT = ["encoder={type: dwt}", "latent_channels=12", "loss.kl=0", *LITEVAE[1:]]
FIGHT = ["adversarial={weight: 0.1, start: 0, ramp: 0}"]
UNET = [*FIGHT, "discriminator={type: unet, channels: 4, multipliers: [1, 2, 2]}"]

OPTIONS = {
    "litevae": LITEVAE,
    "sdvae": SDVAE,
    "sdvae, 1x1 convolutions": [*SDVAE, "conv1x1=true"],
    "1x1 convolutions": [*LITEVAE, "conv1x1=true"],
    "dwt": DWT,
    "dwt-2": [*DWT, "encoder.levels=2", "latent_channels=48"],
    "nafnet": [*LITEVAE, "encoder.extractor={type: nafnet, channels: 8}"],
    "vit": [*LITEVAE, "encoder.aggregator={type: vit, width: 16, depth: 1, heads: 2, grid: 4}"],
    "vit, another grid": [
        *LITEVAE, "encoder.aggregator={type: vit, width: 16, depth: 1, heads: 2, grid: 16}",
    ],
    "shared extractor": [*LITEVAE, "encoder.shared=true"],
    "last two levels": [*LITEVAE, "encoder.levels=[2, 3]"],
    "first level alone": [*LITEVAE, "encoder.levels=[1]"],
    "f = 4": [*LITEVAE, "encoder.depth=2", "decoder.multipliers=[1, 1, 2]"],
    "f = 16": [*LITEVAE, "encoder.depth=4", "decoder.multipliers=[1, 1, 1, 2, 2]"],
    "db2": [*LITEVAE, "encoder.wavelet=db2"],
    "bior2.2": [*LITEVAE, "encoder.wavelet=bior2.2"],
    "dwt, sym2": [*DWT, "encoder.wavelet=sym2"],
    "n_z 12": [*LITEVAE, "latent_channels=12"],
    "smc": [*LITEVAE, "decoder.norm=smc"],
    "wavelet output": [*LITEVAE, "decoder={output: wavelet, multipliers: [1, 2, 2]}"],
    "smc, wavelet output": [
        *LITEVAE, "decoder={norm: smc, output: wavelet, multipliers: [1, 2, 2]}",
    ],
    "l2": [*LITEVAE, "loss={l1: 0, l2: 1}"],
    "lpips": [*LITEVAE, "loss={lpips: 1, lpips_network: squeeze}"],
    "esrgan": [*LITEVAE, "loss={esrgan: 1}"],
    "ldl": [*LITEVAE, "loss={ldl: 1}"],
    "no high-frequency losses": [*LITEVAE, "loss={gaussian: 0, wavelet: 0}"],
    "hinge": [*LITEVAE, *UNET],
    "logistic": [*LITEVAE, *UNET, "adversarial.loss=logistic"],
    "bce": [*LITEVAE, *UNET, "adversarial.loss=bce"],
    "adaptive": [*LITEVAE, *UNET, "adversarial={weighting: adaptive, weight: 0.1}"],
    "cutmix": [*LITEVAE, *UNET, "adversarial.cutmix=1"],
    "patchgan": [*LITEVAE, *FIGHT, "discriminator={type: patchgan, channels: 8, layers: 2}"],
    "stylegan": [
        *LITEVAE, *FIGHT, "discriminator={type: stylegan, resolution: 32, channels: 8}",
    ],
    "checkpointing": [*LITEVAE, "checkpointing=true"],
    "accumulation": [*LITEVAE, "accumulate=2"],
    "bf16": [*LITEVAE, *UNET, "run.precision=bf16"],
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs():
    data = DataConfig()
    source = open_source(data, "train", RESOLUTION)
    return next(batches(source, data, RESOLUTION, 0, 0, BATCH, BATCH))


def untrained_networks() -> dict:
    """Perceptual losses with random weights: the test is that they are minimised."""
    squeeze = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    features = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)
    )
    return {"lpips": LPIPS(squeeze), "esrgan": ESRGANPerceptual(features)}


@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains_and_loads_from_a_file(option, photographs, tmp_path):
    torch.manual_seed(0)
    recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"), [*SMALL, *OPTIONS[option]])
    run = Run(tmp_path, RunConfig(device="cpu", precision=recipe.run.precision),
              make_accelerator("cpu", recipe.accumulate))  # fmt: skip
    state = AutoencoderState(recipe, run, untrained_networks())
    state.averaged = state.autoencoder if state.objective.needs_averaged else None
    state.prepare(run)
    ae, discriminator = state.autoencoder, state.discriminator
    images = to_float(photographs.images)

    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    losses = []
    for _ in range(STEPS):
        for _ in range(recipe.accumulate):
            terms = train_step(run, state, images, photographs.k.tolist(), 1.0)
        losses.append(
            state.objective.recon_total({k: terms[k] for k in terms if k in recipe.loss.weights})
        )
    assert losses[-1] < 0.9 * losses[0]
    fought = any(not torch.equal(before[name], t) for name, t in discriminator.state_dict().items())
    assert fought == (recipe.adversarial.weight > 0)

    config = to_tree(recipe.model)
    save_model(tmp_path / "ckpt.pt", ModelFile("autoencoder", config, ae.state_dict()))
    loaded = load_autoencoder(tmp_path / "ckpt.pt")
    noise = torch.randn_like(ae.encode(images).mean)
    with torch.no_grad():
        ours, theirs = (net(images, noise) for net in (ae.eval(), loaded))
    assert torch.equal(ours.recon, theirs.recon) and ours.recon.shape == images.shape
    assert torch.equal(ours.posterior.logvar, theirs.posterior.logvar)
