"""The CPU never waits for the device inside a step of training or sampling, nor breaks its graph.

Tensors on the device "meta" have no values: reading one raises, as does an operation whose result's
shape depends on values. Copies from the CPU, for which a GPU would wait, are caught as well.
"""

import sys
from contextlib import nullcontext
from functools import partial
from itertools import islice

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ldm.run
from autoencoders import build_autoencoder
from diffusion import (
    EDM,
    DenoiserConfig,
    NetworkConfig,
    build_denoiser,
    build_network,
    karras_sigmas,
    sample_heun,
)
from diffusion.edm import DenoisingLoss, Uncertainty
from diffusion.flow import FlowDenoiser
from ldm import device as devices
from ldm.config import validate
from ldm.data import Batch
from ldm.distributed import make_accelerator
from ldm.logbook import Logbook
from ldm.run import Run
from pipelines import train_autoencoder, train_diffusion
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining
from pipelines.latents import Codec
from pipelines.recipes import fit
from pipelines.sampling import model as sampling_model
from pipelines.sampling.model import LatentModel
from pipelines.sampling.settings import Classes, Sampling
from tests.small import autoencoder_recipe, diffusion_recipe

META = torch.device("meta")
QUIET = (
    "run={precision: fp32, log_every_steps: 1000, "
    "validate_every_steps: 1000, save_every_steps: 1000}"
)


# -------------------------------------------------------------------- a device without values
class Waits(TorchDispatchMode):
    """Raises where a GPU would make the CPU wait: a copy from unpinned memory, or a CPU tensor
    among those on the device."""

    pinned = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        on_device = any(t.device == META for t in tensors)
        from_cpu = any(t.device.type == "cpu" and t.ndim for t in tensors)
        assert self.pinned or not (on_device and from_cpu), f"{func} waits"
        return out

    def to_device(self, tensor, device):
        """`ldm.device.to_device`, whose copies come from pinned memory."""
        self.pinned = True
        try:
            return devices.to_device(tensor, device)
        finally:
            self.pinned = False


class ReadLater:
    """In place of `HostCopy`: no step was skipped, and nobody asked to stop."""

    def __init__(self, flags):
        assert flags.device == META

    def values(self):
        return [0.0, 0.0]


class Finite(ReadLater):
    """In place of `HostCopy`: all images are finite."""

    def values(self):
        return [True]


@pytest.fixture
def waits(monkeypatch):
    """The mode that raises at a wait; PyTorch itself would refuse autocast and Adam on "meta"."""
    mode = Waits()
    for module in list(sys.modules.values()):
        if getattr(module, "to_device", None) is devices.to_device and module is not devices:
            monkeypatch.setattr(module, "to_device", mode.to_device)
    monkeypatch.setattr(ldm.run, "HostCopy", ReadLater)
    adam, autocast = sys.modules["torch.optim.adam"], torch.autocast
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)

    def no_autocast(kind, *words, **options):
        return nullcontext() if kind == "meta" else autocast(kind, *words, **options)

    monkeypatch.setattr(torch, "autocast", no_autocast)
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, partial(on_cpu, getattr(torch, name)))
    return mode


def on_cpu(make, data, *, device=None, **options):
    """Make a tensor of Python numbers, but not on the device, to which they would be copied."""
    if device is not None and torch.device(device) == META:
        assert isinstance(data, torch.Tensor), "a constant is copied: a wait"
    return make(data, device=device, **options)


class MetaRun(Run):
    """A run on the device without values."""

    def __init__(self, folder, config):
        super().__init__(folder, config, make_accelerator("cpu"))
        self.device = META

    def prepare(self, module):
        return module


ON_A_GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
)


class Watch:
    """Runs steps: on "meta" under `Waits`, on a GPU under PyTorch's own debug mode."""

    def __init__(self, device, folder, waits):
        self.device, self.folder, self.waits = device, folder, waits

    def start(self, config) -> Run:
        if self.device == "meta":
            return MetaRun(self.folder, config)
        return Run(self.folder, config, make_accelerator("cuda"))

    def check(self, steps):
        """Call `steps` unwatched first: what is moved or compiled once may wait."""
        steps()
        if self.device == "meta":
            with self.waits:
                steps()
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=["meta", ON_A_GPU])
def watch(request, tmp_path):
    needs = request.getfixturevalue("waits") if request.param == "meta" else None
    return Watch(request.param, tmp_path, needs)


def unexpected(*_):
    pytest.fail("no step of this test validates or saves")


def test_reading_and_copying_are_caught(waits):
    values = torch.ones(2, device="meta")
    with waits:
        for wait in (
            lambda: values.sum().item(),
            lambda: bool(values.sum() > 0),
            lambda: values[values > 0],
            lambda: values.tolist(),
            lambda: values.cpu(),
            lambda: values + torch.ones(2),
            lambda: values[torch.tensor([0])],
            lambda: torch.ones(2).to(META, non_blocking=True),
            lambda: torch.tensor(0.5, device=META),
        ):
            with pytest.raises((AssertionError, RuntimeError)):
                wait()


# ------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "settings",
    [
        ["loss={lpips_network: squeeze, ldl: 1}", "adversarial.weighting=adaptive"],
        ["loss={lpips: 0}", "adversarial={cutmix: 1, cutmix_augmentation: 1, loss: bce}"],
        ["loss={lpips: 0, esrgan: 1}",
         "discriminator={type: stylegan, resolution: 32, channels: 4}"],
        ["loss={lpips: 0}", "discriminator={type: patchgan, channels: 4, layers: 2}",
         "encoder.wavelet=db2"],
    ],
    ids=["adaptive", "cutmix", "stylegan-esrgan", "patchgan-db2"],
)  # fmt: skip
def test_stage_one_never_waits_in_a_step(watch, settings):
    own = ["adversarial.start=0", "adversarial.ramp=0", *settings, QUIET]
    recipe = autoencoder_recipe("phases=[{resolution: 32, steps: 100}]", *own)
    run = watch.start(recipe.run)
    state = AutoencoderTraining(recipe, run).state
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.full((4,), -1)

    def steps():
        stream = (Batch(images, torch.arange(4) + 4 * i, labels) for i in range(2))
        train_autoencoder._train(run, state, stream, Logbook(None), unexpected)

    watch.check(steps)
    assert state.step == 4


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["augment.probability=0.9", "data.flip=false"],
        ["network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}",
         "denoiser.uncertainty=true", "ema_stds=[0.05, 0.1]", "snapshots=2"],
        ["network={type: dit, width: 32, depth: 1, heads: 2, positions: both}"],
    ],
    ids=["unet", "augmented", "edm2", "dit"],
)  # fmt: skip
def test_stage_two_never_waits_in_a_step(watch, settings, classes):
    own = ["steps=100", QUIET, f"data.labels={bool(classes)}", *settings]
    stage_one = autoencoder_recipe().model
    recipe = fit(diffusion_recipe("ae", *own), build_autoencoder(stage_one), classes)
    run = watch.start(recipe.run)
    training = DiffusionTraining(recipe, stage_one, run)
    stream = training._stream(32, 4)

    def steps():
        batches = islice(stream, 2)
        state = training.state
        train_diffusion._train(run, state, batches, Logbook(None), unexpected, unexpected)

    watch.check(steps)
    assert training.state.step == 4


# ------------------------------------------------------------------------------- sampling
def conditional(kind: str) -> nn.Module:
    """A small network of three classes."""
    sizes = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "head_width": 8}
    if kind == "dit":
        sizes = {"width": 32, "depth": 1, "heads": 2, "positions": "both"}
    sizes["classes"] = 3
    config = TypeAdapter(NetworkConfig).validate_python({"type": kind, **sizes})
    return build_network(config)


@pytest.mark.parametrize(
    "sampling",
    [
        {"guidance": 2.0, "interval": (0.1, 10.0), "churn": {"S_churn": 10}},
        {"sampler": "euler", "schedule": "cosine"},
        {"sampler": "dpmpp-2m", "guidance": 1.5},
    ],
    ids=["heun", "euler", "dpmpp-2m"],
)
@pytest.mark.parametrize("denoiser", ["edm", "discrete", "flow"])
def test_sampling_waits_for_the_images_alone(waits, monkeypatch, denoiser, sampling):
    waiting = []

    def cpu(tensor):
        if tensor.device == META:
            waiting.append(tensor)
        return torch.zeros(tensor.shape) if tensor.device == META else tensor

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(sampling_model, "HostCopy", Finite)
    config = TypeAdapter(DenoiserConfig).validate_python({"type": denoiser})
    model = object.__new__(LatentModel)
    model.denoiser = build_denoiser(conditional("ldm"), config).to(META)
    stage_one = build_autoencoder(autoencoder_recipe().model)
    model.codec = Codec(stage_one, torch.zeros(4), torch.ones(4)).to(META)
    model._in_bf16 = {}
    model.latent_shape, model.device, model.precision = (4, 4, 4), META, "fp32"
    model.classes = Classes(3)
    requested = validate(Sampling, {"steps": 3, **sampling})
    draw = partial(model.sample, range(2), 0, requested, labels=[0, 2])
    draw()  # the table of noise levels of discrete time is copied once
    waiting.clear()
    with waits:
        assert draw().shape == (2, 3, 32, 32)
    assert len(waiting) == 1


def test_a_schedule_on_the_device_is_read_once(waits, monkeypatch):
    sigmas, reads = karras_sigmas(4), []
    on_device = torch.empty(5, device=META, dtype=torch.float64)
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda t: reads.append(t) or sigmas if t is on_device else cpu(t)
    )
    with waits:
        sample_heun(lambda x, sigma: x / 2, torch.empty(2, 4, 4, 4, device=META), on_device)
    assert len(reads) == 1


# --------------------------------------------------------------------------------- graphs
@pytest.mark.parametrize("kind", ["ldm", "edm2", "dit"])
def test_labels_do_not_break_the_graph(kind):
    network, x, sigma = conditional(kind), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 2.0])
    labels = torch.tensor([0, -1])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, sigma, labels), network(x, sigma, labels))


@pytest.mark.parametrize("uncertainty", [None, Uncertainty()])
@pytest.mark.parametrize("denoiser", [EDM, FlowDenoiser])
def test_the_loss_of_stage_two_is_one_graph(denoiser, uncertainty):
    loss = DenoisingLoss(denoiser(conditional("ldm")), uncertainty)
    z, sigma, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 2.0]), torch.tensor([0, -1])
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for a, b in zip(
        compiled(z, sigma, z.flip(0), labels), loss(z, sigma, z.flip(0), labels), strict=True
    ):
        assert torch.equal(a, b)
