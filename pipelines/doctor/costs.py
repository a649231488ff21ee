"""Arithmetic, memory and disk of a training, from its own step run on tensors without values.

Under PyTorch's `FakeTensorMode` shapes, types and autocast are as on the device, and nothing is
computed or allocated.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autoencoders.layers import PIXELS_AT_ONCE
from ldm.config import Resolution, pixel_count
from ldm.distributed import make_accelerator
from ldm.run import Run, RunConfig
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining, Training
from pipelines.finetune import learned

OVERHEAD = 1.2
"""Memory that activations take in the end, as a multiple of what is kept of them: the gradients
that travel back, kernels' buffers, gaps."""


# -------------------------------------------------------------------------------- counting
def count_gmac(call: Callable[[], Any]) -> float:
    """Count the 10⁹ multiply-accumulates of a call: convolutions, matrix products, attention."""
    # attention as its two products: not every PyTorch has a formula for its fused kernels
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


class AllocationTracker(TorchDispatchMode):
    """Tracks the tensors that the operations inside make, until they are freed.

    Attributes:
        peak: bytes of them held at the worst moment between two operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                seen = StorageWeakRef(storage)  # keeps its address from being used again
                self._held.setdefault(seen.cdata, (seen, storage.nbytes()))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return out


def count_parameters(module: nn.Module) -> int:
    """Count the learned values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def gradient_bytes(module: nn.Module) -> int:
    """Bytes of the gradients of a module's parameters that learn."""
    return sum(parameter.nbytes for parameter in learned(module))


def module_bytes(module: nn.Module, shared: Collection[int] = ()) -> int:
    """Bytes of a module's parameters and buffers, except those whose `id` is in `shared`."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.nbytes for tensor in tensors if id(tensor) not in shared)


def adam_bytes(module: nn.Module) -> int:
    """Bytes of Adam's state: two moments of every value, and a counter of every tensor."""
    return 2 * gradient_bytes(module) + 4 * len(learned(module))


def average_bytes(training: Training) -> list[int]:
    """Bytes of each average of weights, except the parts that it shares with the network."""
    own = {id(parameter) for module in training.trained for parameter in module.parameters()}
    return [module_bytes(average.ema_model, own) for average in training.state.averages]


# --------------------------------------------------------------------------------- dry run
class DryRun(Run):
    """A run on tensors without values, whose steps end with the backward pass.

    Attributes:
        kept: bytes kept for a backward pass at the worst moment, since `record` was entered.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        config = config.model_copy(update={"compile": False})
        super().__init__(Path(), config, make_accelerator(str(device)))
        self.device = device  # of several processes, each has its own
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kept = 0
        self._storages: dict[int, Any] = {}

    def place(self, tensor_or_module: Any) -> Any:
        """Move tensors only: networks are built on the device, and cannot be moved."""
        is_module = isinstance(tensor_or_module, nn.Module)
        return tensor_or_module if is_module else super().place(tensor_or_module)

    def sum(self, tensor: Tensor) -> Tensor:
        """Leave other processes alone."""
        return tensor

    mean = sum

    def prepare(self, module: nn.Module) -> nn.Module:
        """Return the module as it is."""
        return module

    @contextmanager
    def record(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Note the tensors kept for backward passes inside, but for the modules' own."""
        own = {
            tensor.untyped_storage()._cdata
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                self._storages[storage._cdata] = storage  # once, however many views are kept
            return tensor

        self.kept = 0
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield

    def step(self, loss: Tensor, module: nn.Module, *_: Any, **__: Any) -> None:
        """Run the backward pass, which frees all that was kept."""
        self.kept = max(self.kept, sum(storage.nbytes() for storage in self._storages.values()))
        loss.backward()
        self._storages.clear()
        module.zero_grad(set_to_none=True)


class StepCost(NamedTuple):
    """Costs of a training step."""

    activations: int
    """Bytes kept for the backward pass at the worst moment, of the whole micro-batch."""
    gmac: float
    """10⁹ multiply-accumulates per image, forward and backward, of every network in the step."""


class Costs:
    """Costs of a training, from a dry run of it.

    Args:
        build: sets the training up on a run.
        device: where the training would run; its memory need not suffice.
        batch: images of a micro-batch on one process: many take as long here as one.
    """

    def __init__(
        self, build: Callable[[Run], Training], config: RunConfig, device: torch.device, batch: int
    ) -> None:
        self.run, self.batch = DryRun(config, device), batch
        # averages are deep copies, and without its own mode a copied buffer would be garbage
        with self.run.fake, FakeCopyMode(self.run.fake), device:
            self.training = build(self.run)
        self._steps: dict[tuple[Resolution, bool, int], StepCost] = {}

    def step(
        self, resolution: Resolution, adversarial_active: bool = True, batch: int | None = None
    ) -> StepCost:
        """Costs of a step on `batch` images, or `self.batch`; worked out once.

        Args:
            adversarial_active: with the discriminator, if there is one.
        """
        active = adversarial_active and "discriminator" in self.training.networks
        key = (resolution, active, batch or self.batch)
        if key not in self._steps:
            own = [*self.training.trained, *self.training.frozen]
            with self.run.fake, self.run.record(own), FlopCounterMode(display=False) as counter:
                self.training.step(resolution, key[-1], active)
            gmac = counter.get_total_flops() / 2e9 / key[-1]
            if isinstance(self.training, DiffusionTraining):
                with self.run.fake:
                    gmac += count_gmac(partial(self.training.encode, resolution, 1))
            self._steps[key] = StepCost(self.run.kept, gmac)
        return self._steps[key]

    def gmac(self, resolution: Resolution) -> dict[str, float]:
        """10⁹ multiply-accumulates of each reported network for one image, forward."""
        with self.run.fake, self.run.autocast():
            calls = self.training.calls(resolution, 1)
            return {name: count_gmac(call) for name, call in calls.items()}

    def encoding(self, resolution: Resolution, batch: int | None = None) -> int:
        """Most bytes that stage one holds while it encodes for stage two."""
        if isinstance(self.training, AutoencoderTraining):
            return 0
        batch, kind = batch or self.batch, self.training.autoencoder.config.encoder.type
        few = max(PIXELS_AT_ONCE[kind] // pixel_count(resolution), 1)
        if self.run.device.type != "cpu" or batch <= 3 * few:
            return self._encoding(resolution, batch)
        # a CPU encodes few at a time: of more it holds their pixels and moments, twice in the end
        two, three = (self._encoding(resolution, parts * few) for parts in (2, 3))
        config, pixels = self.training.autoencoder.config, pixel_count(resolution)
        values = config.image_channels * pixels + 4 * prod(config.latent_shape(resolution))
        return max(three + (batch - 3 * few) * (three - two) // few, 4 * batch * values)

    def _encoding(self, resolution: Resolution, batch: int) -> int:
        assert isinstance(self.training, DiffusionTraining)
        with self.run.fake, AllocationTracker() as tracker:
            self.training.encode(resolution, batch)
        return tracker.peak


# ------------------------------------------------------------------------- memory and disk
@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs while it trains."""

    weights: int
    """Weights of the trained networks."""
    gradients: int
    """Their gradients."""
    buckets: int
    """DDP's buckets, to exchange the gradients, which they may hold; 0 on one process."""
    adam: int
    """Adam's two moments."""
    averages: int
    """Averaged weights."""
    frozen: int
    """Networks that are not trained: perceptual losses and a teacher, or stage one."""
    activations: int
    """Estimate: `OVERHEAD` × what a micro-batch of the largest images keeps for its backward; with
    checkpointing, without the block that is being recomputed."""
    encoding: int
    """Estimate: `OVERHEAD` × what stage one holds while it encodes a micro-batch for stage two. A
    CUDA GPU encodes the next while it trains on one; a CPU takes turns, and only what encoding
    needs more than training counts. 0 for stage one, and with a cache."""
    saving: int
    """Upper bound, on a CPU: copies of the state, ckpt.pt and best.pt that are being written, and
    the content of a `.safetensors`. 0 on a GPU: they are in the host's memory."""

    @property
    def lasting(self) -> int:
        """The part that does not depend on the micro-batch."""
        return self.total - self.activations - self.encoding

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes on the disk, without pictures and logs."""

    states: int
    """States to resume from: the newest `run.keep_states`."""
    models: int
    """ckpt.pt and best.pt with their .safetensors twins."""
    snapshots: int
    """Snapshots of averages, for `ldm ema`."""
    writing: int
    """Temporary: a file is replaced once its successor is whole."""
    cache: int
    """Cached latents still to be made; 0 without a cache, or if the data are missing."""

    @property
    def run(self) -> int:
        """The part in the run's own folder."""
        return self.total - self.cache

    @property
    def total(self) -> int:
        """All of it, at the worst moment."""
        return sum(vars(self).values())


def training_memory(
    costs: Costs,
    resolutions: Sequence[Resolution],
    processes: int = 1,
    accumulate: int = 1,
    batch: int | None = None,
) -> Memory:
    """Memory of one of the processes that train together.

    Args:
        batch: images of a micro-batch on one process; None: `costs.batch`.
    """
    training = costs.training
    gradients = [gradient_bytes(module) for module in training.updated]
    on_cpu = costs.run.device.type == "cpu"
    kept = max(costs.step(side, batch=batch).activations for side in resolutions)
    held = max(costs.encoding(side, batch) for side in resolutions)
    # DDP's buckets hold the gradients, unless they accumulate before they are exchanged
    held_gradients = sum(gradients) if accumulate > 1 else 0 if processes > 1 else max(gradients)
    if on_cpu:
        held = max(held - kept, 0)
    return Memory(
        weights=sum(map(module_bytes, training.trained)),
        # networks take turns, and keep no gradients unless they accumulate them
        gradients=held_gradients,
        buckets=sum(map(gradient_bytes, training.trained)) if processes > 1 else 0,
        adam=sum(map(adam_bytes, training.updated)),
        averages=sum(average_bytes(training)),
        frozen=sum(map(module_bytes, training.frozen)),
        activations=int(OVERHEAD * kept),
        encoding=int(OVERHEAD * held),
        saving=on_cpu * (state_bytes(training) + 3 * sum(map(module_bytes, training.exported))),
    )


def state_bytes(training: Training) -> int:
    """Bytes of a saved state."""
    weights, moments = map(module_bytes, training.trained), map(adam_bytes, training.updated)
    return sum(weights) + sum(moments) + sum(average_bytes(training))


def training_disk(
    training: Training, config: RunConfig, keeps_best: bool, snapshots: int = 0, cache: int = 0
) -> Disk:
    """Disk space of a run.

    Args:
        keeps_best: with a best.pt, chosen by held-out images.
        snapshots: of each power-function average.
        cache: bytes of latents that are still to be cached.
    """
    averages, state = average_bytes(training), state_bytes(training)
    model = sum(map(module_bytes, training.exported))
    saves, keep = ceil(training.state.total_steps / config.save_every_steps), config.keep_states
    # the oldest state and the old model files go once the new ones are whole, one at a time
    replaced = [state] * (saves > keep) + [model] * (saves > 1)
    return Disk(
        states=min(keep, saves) * state,
        models=(4 if keeps_best else 2) * model,
        snapshots=snapshots * sum(averages[1:]),
        writing=max(replaced, default=0),
        cache=cache,
    )
