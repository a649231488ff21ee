"""A training step's arithmetic and memory, counted while it runs on paper or for real.

What training costs, worked out on paper: the real step, on tensors that have no values.

The networks and the step are those of the training itself, run under PyTorch's `FakeTensorMode`:
shapes, types and autocast are as on the device, and nothing is computed or allocated.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from autoencoders import Autoencoder, AutoencoderConfig
from autoencoders.discriminators import build_discriminator
from autoencoders.layers import checkpoint_blocks
from autoencoders.losses import LPIPS, Objective
from autoencoders.losses.perceptual import CONV5_4, ESRGANPerceptual
from diffusion.build import build_denoiser, build_network
from diffusion.edm import EDMLoss, Uncertainty
from pipelines.latents import LatentBatch
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.train_autoencoder import Draws
from pipelines.train_autoencoder import train_step as train_autoencoder_step
from pipelines.train_diffusion import train_step as train_diffusion_step


class Counter(TorchDispatchMode):
    """Counts what is done inside, by PyTorch's own formulas.

    Its `FlopCounterMode` says the same, and which module did it, in one and a half times the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops = 0

    @property
    def gmac(self) -> float:
        """10⁹ multiply-accumulates so far: of convolutions, matrix products and attention."""
        return self._flops / 2e9

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self._flops += formula(*args, **kwargs, out_val=out)
        return out


def count_gmac(call: Callable[[], Any]) -> float:
    """10⁹ multiply-accumulates of a call."""
    # attention as its two products: not every PyTorch knows what its fused kernels cost
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        call()
    return counter.gmac


class Holder(TorchDispatchMode):
    """Watches what the operations inside make, and when it is let go of.

    Attributes:
        worst: bytes of it held at the worst moment between two operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.worst = 0
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
        self.worst = max(self.worst, sum(size for _, size in self._held.values()))
        return out


def count_parameters(module: nn.Module) -> int:
    """Learned values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


class PaperRun:
    """Stands in for a `Run` in a training step: backward passes on paper, and no updates.

    Args:
        modules: whose own tensors are no activations.
    """

    def __init__(self, device: torch.device, precision: str, *modules: nn.Module) -> None:
        self.device, self.precision, self.worst = device, precision, 0
        self._own = {
            tensor.untyped_storage()._cdata
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._kept: dict[int, Any] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the operations inside keep for their backward passes."""

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._kept[storage._cdata] = storage  # once, however many views are kept of it
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield

    def step(self, loss: Tensor, module: nn.Module, *_: Any) -> None:
        """The backward pass, which lets go of all that was kept."""
        self.worst = max(self.worst, sum(storage.nbytes() for storage in self._kept.values()))
        loss.backward()
        self._kept.clear()
        module.zero_grad(set_to_none=True)

    def accumulate(self, *_: nn.Module) -> AbstractContextManager:
        """Every micro-batch is one of its own."""
        return nullcontext()

    def unwrap(self, module: nn.Module) -> nn.Module:
        """Nothing is wrapped."""
        return module

    def mean(self, tensor: Tensor) -> Tensor:
        """There is one process."""
        return tensor

    def autocast(self) -> AbstractContextManager:
        """As `Run.autocast`."""
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class StepCost(NamedTuple):
    """What one training step costs."""

    activations: int
    """Bytes kept for the backward pass at the worst moment, of the whole micro-batch."""
    gmac: float
    """10⁹ multiply-accumulates per image, forward and backward, of every network in the step."""


def blank_perceptual(recipe: AutoencoderRecipe) -> dict[str, LPIPS | ESRGANPerceptual]:
    """The perceptual losses of a recipe, of random weights: what they cost, not what they say."""
    losses: dict[str, LPIPS | ESRGANPerceptual] = {}
    if recipe.loss.lpips:
        import lpips

        how = {"pretrained": False, "pnet_rand": True, "verbose": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
            losses["lpips"] = LPIPS(lpips.LPIPS(net=recipe.loss.lpips_network, **how))
    if recipe.loss.esrgan:
        from torchvision.models import vgg19

        losses["esrgan"] = ESRGANPerceptual(vgg19().features[: CONV5_4 + 1])
    return losses


# -------------------------------------------------------------------------------- stage one
class PaperAutoencoder:
    """Stage one's networks on paper.

    Args:
        device: where the training would run; it need not have the room.
        precision: "fp32" or "bf16".
        batch: images in a micro-batch: on paper, many take no longer than one.
    """

    def __init__(
        self, recipe: AutoencoderRecipe, device: torch.device, precision: str, batch: int
    ) -> None:
        self.recipe, self.device, self.precision, self.batch = recipe, device, precision, batch
        self._costs: dict[tuple[int, bool, int], StepCost] = {}
        self._mode = FakeTensorMode()
        with self._mode, torch.device(device):
            self.autoencoder = Autoencoder(recipe.model)
            self.discriminator = build_discriminator(recipe.discriminator)
            perceptual = blank_perceptual(recipe)
        objective = Objective(recipe.loss, recipe.adversarial, perceptual)
        compared = objective.needs_averaged and recipe.ema_half_life_images
        # as an `AutoencoderState`, but its average is a copy, which cannot be on paper
        self._state: Any = SimpleNamespace(
            recipe=recipe, objective=objective, autoencoder=self.autoencoder, opt_autoencoder=None,
            discriminator=self.discriminator, opt_discriminator=None,
            averaged=self.autoencoder if compared else None,
        )  # fmt: skip
        self.trained: list[nn.Module] = [self.autoencoder, self.discriminator]
        self.averaged: list[nn.Module] = [self.autoencoder]
        self.frozen: list[nn.Module] = [
            loss.network if isinstance(loss, LPIPS) else loss.features
            for loss in perceptual.values()
        ]
        for network in self.frozen:
            # the losses put their network where the images are: it is there, and tensors on paper
            # cannot be exchanged
            network.to = lambda *_, network=network: network
        if recipe.checkpointing:
            checkpoint_blocks(self.autoencoder)

    def gmac(self, resolution: int) -> dict[str, float]:
        """10⁹ multiply-accumulates of each network for one image, forward."""
        latent, batch = resolution // self.recipe.encoder.downsampling, self.batch
        shape = (batch, self.recipe.latent_channels, latent, latent)
        # as in a step: what is known of its operations need not be worked out again
        with self._mode, PaperRun(self.device, self.precision).autocast():
            images = torch.zeros(batch, 3, resolution, resolution, device=self.device)
            latents = torch.zeros(shape, device=self.device)
            counted = {
                "encoder": count_gmac(lambda: self.autoencoder.encode(images)),
                "decoder": count_gmac(lambda: self.autoencoder.decode(latents)),
            }
            if self.recipe.adversarial.weight:
                counted["discriminator"] = count_gmac(lambda: self.discriminator(images))
        return {name: gmac / batch for name, gmac in counted.items()}

    def cost(
        self, resolution: int, adversarial_active: bool = True, batch: int | None = None
    ) -> StepCost:
        """Of a step with `batch` images, or `self.batch`. Worked out once.

        Args:
            adversarial_active: with the discriminator, if there is one.
        """
        key = (
            resolution,
            adversarial_active and self.recipe.adversarial.weight > 0,
            batch or self.batch,
        )
        if key not in self._costs:
            self._costs[key] = self._work_out(*key)
        return self._costs[key]

    def _work_out(self, resolution: int, adversarial_active: bool, batch: int) -> StepCost:
        recipe, net, device = self.recipe, self.autoencoder, self.device
        side = resolution // recipe.encoder.downsampling
        run = PaperRun(device, self.precision, net, self.discriminator, *self.frozen)
        with self._mode:
            images = torch.zeros(batch, 3, resolution, resolution, device=device)
            noise = torch.zeros(batch, recipe.latent_channels, side, side, device=device)
            boxes = torch.zeros(batch, 3, device=device) if recipe.adversarial.cutmix else None
            with Counter() as counter, run.watching():
                draws = Draws(noise, boxes)
                train_autoencoder_step(run, self._state, images, draws, float(adversarial_active))
        return StepCost(run.worst, counter.gmac / batch)


# -------------------------------------------------------------------------------- stage two
class PaperDiffusion:
    """Stage two's networks on paper.

    Args:
        recipe: with the network's sizes filled in; see `diffusion_recipe.fit`.
        config: of the autoencoder that makes the latents.
        device, precision, batch: as of `PaperAutoencoder`.
    """

    def __init__(
        self,
        recipe: DiffusionRecipe,
        config: AutoencoderConfig,
        device: torch.device,
        precision: str,
        batch: int,
    ) -> None:
        self.recipe, self.device, self.precision, self.batch = recipe, device, precision, batch
        self._gmac: dict[int, dict[str, float]] = {}
        self._costs: dict[tuple[int, int], StepCost] = {}
        self._mode = FakeTensorMode()
        with self._mode, torch.device(device):
            self.autoencoder = Autoencoder(config).eval().requires_grad_(False)
            self.network = build_network(recipe.network)
            uncertainty = Uncertainty() if recipe.denoiser.uncertainty else None
            self.objective = EDMLoss(build_denoiser(self.network, recipe.denoiser), uncertainty)
        self._state: Any = SimpleNamespace(recipe=recipe, objective=self.objective, optimizer=None)
        self.trained: list[nn.Module] = [self.objective]
        self.averaged: list[nn.Module] = [self.network] * (1 + len(recipe.ema_stds))
        self.frozen: list[nn.Module] = [self.autoencoder]

    def gmac(self, resolution: int) -> dict[str, float]:
        """10⁹ multiply-accumulates of each network for one image, forward."""
        if resolution not in self._gmac:
            with self._mode:
                images = torch.zeros(1, 3, resolution, resolution, device=self.device)
                z = torch.zeros(1, *self._shape(resolution), device=self.device)
                sigma = torch.ones(1, device=self.device)
                self._gmac[resolution] = {
                    "network": count_gmac(lambda: self.network(z, sigma)),
                    "encoder": count_gmac(lambda: self.autoencoder.encode(images)),
                }
        return self._gmac[resolution]

    def cost(self, resolution: int, batch: int | None = None) -> StepCost:
        """Of a step with `batch` images, or `self.batch`, encoded on the fly unless the recipe has
        a cache. Worked out once."""
        key = (resolution, batch or self.batch)
        if key not in self._costs:
            self._costs[key] = self._work_out(*key)
        return self._costs[key]

    def encoding(self, resolution: int, batch: int | None = None) -> int:
        """Bytes that stage one holds at the worst moment while it encodes so many images."""
        autocast = PaperRun(self.device, self.precision).autocast()
        with self._mode, Holder() as holder, torch.no_grad(), autocast:
            shape = (batch or self.batch, 3, resolution, resolution)
            self.autoencoder.encode(torch.zeros(shape, device=self.device))
        return holder.worst

    def _work_out(self, resolution: int, batch: int) -> StepCost:
        run = PaperRun(self.device, self.precision, self.objective)
        with self._mode:
            z = torch.zeros(batch, *self._shape(resolution), device=self.device)
            sigma = torch.ones(batch, device=self.device)
            images = LatentBatch(z, sigma, torch.zeros_like(z), None, None)
            with Counter() as counter, run.watching():
                train_diffusion_step(run, self._state, images)
        gmac = counter.gmac / batch
        if not self.recipe.cache:
            gmac += self.gmac(resolution)["encoder"]
        return StepCost(run.worst, gmac)

    def _shape(self, resolution: int) -> tuple[int, int, int]:
        side = resolution // self.autoencoder.downsampling
        return (self.recipe.network.latent_channels, side, side)
