"""A trained model that samples one batch: networks, codec, device, guidance."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder, AutoencoderConfig
from diffusion.build import build_denoiser, build_network
from diffusion.guidance import guide
from diffusion.samplers import Denoise
from ldm.checkpoint import ModelFile, build_with, fingerprint, load_model
from ldm.config import to_tree, validate
from ldm.device import memory_format, resolve_device, resolve_precision
from ldm.errors import LdmError, UsageError
from ldm.seeds import normal
from pipelines.codec import Codec
from pipelines.recipes import DiffusionRecipe
from pipelines.sampling.settings import Classes, Sampling, asked_levels, noise_levels, solve

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class LatentModel:
    """A denoiser of latents and the codec between them and images.

    Attributes:
        latent_shape: (n_z, h, w) of one image's latents.
        sha256: identity of the network's weights.
        identity: SHA-256 over all that makes pictures: the weights and configs of network and
            autoencoder, the denoiser, the latents' statistics and the resolution.
        classes: those it is conditioned on, if any.
        recipe: how it was trained; None where it was put together by hand.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        codec: Codec,
        latent_shape: tuple[int, int, int],
        sha256: str = "",
        classes: Classes = Classes(),
        recipe: DiffusionRecipe | None = None,
        identity: str = "",
    ) -> None:
        self.denoiser, self.codec = denoiser.eval().requires_grad_(False), codec
        self.latent_shape, self.sha256 = latent_shape, sha256
        self.classes, self.recipe, self.identity = classes, recipe, identity
        self.device, self.precision, self._asked = torch.device("cpu"), "fp32", "auto"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        precision: str | torch.dtype = "auto",
    ) -> Self:
        """Load a `ckpt.pt`, its `.safetensors` twin, or a run folder; `to` says where and how.

        Raises:
            LdmError: no such file, a stage-one file, damaged weights, or a device not there.
        """
        file = load_model(path, "diffusion")
        try:
            recipe = validate(DiffusionRecipe, file.config)
        except UsageError as error:
            raise LdmError(f"the config in {path} is not of this version: {error}") from error
        autoencoder = _load_autoencoder(file, path)
        network = build_with(lambda: build_network(recipe.network), file.weights, path)
        denoiser = build_denoiser(network, recipe.denoiser)
        codec = Codec.from_statistics(autoencoder, file.statistics)
        side = recipe.resolution // autoencoder.downsampling
        shape = (recipe.network.latent_channels, side, side)
        classes = Classes(recipe.network.classes, tuple(file.statistics.get("classes", ())))
        sha256 = file.sha256
        identity = _identify(sha256, recipe, file.provenance["autoencoder_sha256"], codec)
        model = cls(denoiser, codec, shape, sha256, classes, recipe, identity)
        return model.to(device, precision)

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        precision: str | torch.dtype | None = None,
    ) -> Self:
        """Move to a device, and compute in a precision; what is left out stays as it was asked for.

        >>> pipe.to("cuda"); pipe.to("cuda:1", "bf16"); pipe.to(torch.bfloat16)

        Args:
            device: auto, cpu, cuda, cuda:1, or torch's.
            precision: fp32, bf16 (networks under autocast, their weights stay float32), auto (bf16
                where the device has it), or torch's dtype.

        Raises:
            LdmError: there is no such device.
            UsageError: another precision.
        """
        if isinstance(device, torch.dtype):
            device, precision = None, device
        asked = self._asked if precision is None else PRECISIONS.get(precision, precision)
        if asked not in ("auto", *PRECISIONS.values()):
            raise UsageError(f"precision {asked}: it must be auto, fp32 or bf16")
        if device is not None:
            self.device = resolve_device(str(device))
        self._asked, self.precision = asked, resolve_precision(asked, self.device)
        for module in (self.denoiser, self.codec):
            module.to(self.device, memory_format=memory_format(self.device))
        return self

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        seed: int,
        sampling: Sampling = Sampling(),
        labels: Sequence[int] | None = None,
        weaker: "LatentModel | None" = None,
        *,
        noise: Tensor | None = None,
        skip: int = 0,
        from_z: Tensor | None = None,
        hold: Callable[[Denoise], Denoise] = lambda denoise: denoise,
    ) -> Tensor:
        """One batch: the images with these numbers under a seed, (len, 3, H, W) on the CPU.

        Args:
            labels: the class of each, −1 for none.
            weaker: what `check_guidance` returned.
            noise: to begin with, in place of the seed's.
            skip: steps at the beginning that are left out.
            from_z: latents to be noised to where sampling begins, in place of noise alone.
            hold: what is done to the denoiser last.

        Raises:
            LdmError: the images are not finite.
        """

        def draw(purpose: str) -> Tensor:
            return normal(seed, purpose, indices, self.latent_shape).to(self.device)

        sigmas = noise_levels(sampling, self.denoiser)
        noise = draw("sample") if noise is None else noise.to(self.device)
        start = None if from_z is None else from_z + sigmas[skip] * noise.double()
        denoise = hold(self._guided(sampling, labels, weaker))
        with self._autocast():
            z = solve(
                sampling, denoise, noise, sigmas, lambda step: draw(f"churn {step}"), skip, start,
                self.denoiser.sigma_max,
            )  # fmt: skip
            images = self.codec.decode(z).cpu()
        if not images.isfinite().all():
            raise LdmError(
                f"images {indices[0]} to {indices[-1]} came out with numbers that are not finite: "
                "lower guidance, take precision fp32, or another model"
            )
        return images

    def is_named_by(self, named: Mapping[str, Any]) -> bool:
        """Whether a `samples.json` speaks of this model; one of an older version says less."""
        ours = {"sha256": self.sha256, "identity": self.identity}
        return all(named.get(key, value) == value for key, value in ours.items())

    def check_guidance(
        self,
        sampling: Sampling,
        weaker: "LatentModel | str | Path | None",
        labels: Sequence[int] | None = None,
    ) -> "LatentModel | None":
        """The model to be guided away from, loaded and on this one's device, if there is one.

        Args:
            labels: the classes that are asked for; None: drawn, or none where there are none.

        Raises:
            UsageError: guidance has nothing to guide by, or `weaker` does not speak of the same
                latents or classes, or does not denoise all noise levels at which it is asked.
            LdmError: `weaker` cannot be loaded.
        """
        if sampling.guidance is None:
            if weaker is not None:
                raise UsageError("a weaker model is for guidance: give guidance, its scale, too")
            return None
        if weaker is None:
            self._check_classifier_free(labels)
            return None
        if not isinstance(weaker, LatentModel):
            weaker = LatentModel.from_pretrained(weaker, self.device, self.precision)
        if other := self._differs(weaker):
            raise UsageError(f"the weaker model has {other} than this one: guidance needs the same")
        low, high = weaker.denoiser.sigma_min, weaker.denoiser.sigma_max
        asked = asked_levels(sampling, self.denoiser)
        if asked and not low <= asked[0] <= asked[1] <= high:
            raise UsageError(
                f"guidance asks the weaker model at σ from {asked[0]:g} to {asked[1]:g}, and it "
                f"denoises {low:g} to {high:g}: narrow the interval, or sigma_min and sigma_max"
            )
        return weaker.to(self.device)

    def _check_classifier_free(self, labels: Sequence[int] | None) -> None:
        """Refuse guidance from no label to a label where the model knows only one of them."""
        if not self.classes.count:
            raise UsageError(
                "guidance of a model without classes needs a weaker model to be guided away "
                "from: give weaker, or leave guidance out"
            )
        if self.recipe and self.recipe.label_dropout == 0:
            raise UsageError(
                "this model was trained with label_dropout=0 and knows no image without a label "
                "to be guided away from: give weaker, or leave guidance out"
            )
        if labels is not None and -1 in labels:
            raise UsageError(
                "guidance leads away from images without a label, and label -1 asks for one: "
                "give another label, or weaker, or leave guidance out"
            )

    def _differs(self, weaker: "LatentModel") -> str | None:
        """What keeps two models' latents, or classes, from being the same."""
        if weaker.latent_shape != self.latent_shape:
            return f"latents of another shape, {weaker.latent_shape} against {self.latent_shape},"
        if weaker.autoencoder_sha256 != self.autoencoder_sha256:
            return "another autoencoder"
        # measured over other images of the same data they differ a little: 1 % does no harm
        a, b = self.codec, weaker.codec
        mean_differs = ((a.mean - b.mean.to(a.mean)).abs() > 0.01 * a.std).any()
        scale_differs = (a.std / b.std.to(a.std) * b.sigma_data / a.sigma_data - 1).abs() > 0.01
        if mean_differs or scale_differs.any():
            return "other statistics of the latents"
        if weaker.classes.count and weaker.classes != self.classes:
            return "other classes"
        return None

    @cached_property
    def autoencoder_sha256(self) -> str:
        """Identity of stage one's weights."""
        return fingerprint(self.codec.autoencoder.state_dict())

    def _guided(
        self,
        sampling: Sampling,
        labels: Sequence[int] | None,
        weaker: "LatentModel | None",
    ) -> Denoise:
        # on the CPU, where the network's check of them makes no GPU wait at every step
        chosen = None if labels is None else torch.tensor(labels)

        def strong(x: Tensor, sigma: Tensor) -> Tensor:
            return self.denoiser(x, sigma, chosen)

        def weak(x: Tensor, sigma: Tensor) -> Tensor:
            if weaker is None:
                return self.denoiser(x, sigma, None)
            return weaker.denoiser(x, sigma, chosen if weaker.classes.count else None)

        if sampling.guidance is None:
            return strong
        return guide(strong, weak, sampling.guidance, sampling.interval)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] → their posteriors' means as z, on the device."""
        with self._autocast():
            return self.codec.encode(images.to(self.device))

    def _autocast(self) -> AbstractContextManager:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _identify(sha256: str, recipe: DiffusionRecipe, autoencoder_sha256: str, codec: Codec) -> str:
    made_by = {
        "network": [sha256, to_tree(recipe.network)],
        "denoiser": to_tree(recipe.denoiser),
        "autoencoder": [autoencoder_sha256, to_tree(codec.autoencoder.config)],
        "statistics": codec.statistics(),
        "resolution": recipe.resolution,
    }
    return new_sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def _load_autoencoder(file: ModelFile, path: str | Path) -> Autoencoder:
    inner = file.autoencoder
    named = file.provenance.get("autoencoder_sha256")
    if inner is None or inner.sha256 != named:
        state = "lacks" if inner is None else "carries another"
        raise LdmError(f"{path} {state} autoencoder than the one it was trained on: it is altered")
    config = validate(AutoencoderConfig, inner.config)
    return build_with(lambda: Autoencoder(config), inner.weights, path)
