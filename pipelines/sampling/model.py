"""A trained model that samples one batch, and the images 0 … n−1 of one seed and its settings."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from autoencoders import Autoencoder, AutoencoderConfig
from autoencoders.sdvae.formats import pick_settings, scalar_statistics
from diffusion import build_denoiser, build_network, samplers
from diffusion.network import check_labels
from diffusion.samplers import SAMPLERS, Denoise, make_churn
from ldm import hub
from ldm.checkpoint import Damaged, ModelFile, build_with, load_model
from ldm.config import Resolution, drop_defaults, plain_size, size_word, to_tree, validate
from ldm.data import Batch
from ldm.device import (
    HostCopy,
    cast_for_autocast,
    full_float32,
    keep_freed_memory,
    memory_format,
    resolve_device,
    resolve_precision,
    to_device,
)
from ldm.distributed import join_processes
from ldm.errors import LdmError, UsageError
from ldm.foreign import read_described
from ldm.images import Pixels
from ldm.run_folder import RUNS
from ldm.seeds import normal
from pipelines.latents import Codec
from pipelines.recipes import latent_shape, read_recipe
from pipelines.sampling.settings import (
    Classes,
    Label,
    Sampling,
    check_channels,
    fill_in,
    find_shape,
    find_size,
    guided_levels,
    integer,
    labels_slug,
    noise_levels,
    settings_slug,
)

PRECISIONS: dict[Any, Any] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MODEL_TYPE = "latent-diffusion"  # of a `config.json`


class LatentModel:
    """A denoiser of latents and the codec that maps images to latents and back.

    Attributes:
        latent_shape: (n_z, h, w) of the latents of one image of the training's size.
        identifiers: names the model in a `samples.json`, beside its path: the `sha256` of the
            network's weights, and the `identity`, over everything that decides a picture.
        provenance: how the model was trained, or where it was `imported` from.
        autoencoder_origin: the same of an autoencoder's weights that came from elsewhere.
        folder: the folder that holds the file; None for a repository of the Hub.
    """

    def __init__(self, file: ModelFile, path: str | Path) -> None:
        try:
            recipe = read_recipe(file.config)
        except UsageError as error:
            raise LdmError(f"{path}: its config does not fit this version: {error}") from error
        inner, named = file.autoencoder, file.provenance.get("autoencoder_sha256")
        if inner is None or inner.sha256 != named:
            other = "another autoencoder than it was trained on"
            state = "no autoencoder" if inner is None else other
            raise LdmError(f"{path} holds {state}: the file was altered, copy it again")
        config = validate(AutoencoderConfig, inner.config)
        autoencoder = build_with(lambda: Autoencoder(config), inner.weights, path)
        network = build_with(lambda: build_network(recipe.network), file.weights, path)
        self.denoiser = build_denoiser(network, recipe.denoiser).eval().requires_grad_(False)
        self.codec = Codec.from_statistics(autoencoder, file.statistics, path)
        measured = scalar_statistics(file.statistics["mean"], file.statistics["std"])
        autoencoder.settings = pick_settings(inner.provenance.get("imported")) or measured
        self._in_bf16: dict[str, Any] = {}  # copies of the two that run under autocast
        self.latent_shape = latent_shape(recipe, autoencoder)
        self.classes = Classes(recipe.network.classes, tuple(file.statistics.get("classes", ())))
        self.autoencoder_config = config
        self.recipe, self.sha256, self.autoencoder_sha256 = recipe, file.sha256, inner.sha256
        network_tree, ae_tree = to_tree(recipe.network), to_tree(config)
        # earlier versions had none of these; `codes` and `variance` show in the weights
        network_tree.pop("embedding_multiplier", None)
        ae_tree.pop("codes")
        ae_tree["encoder"].pop("variance", None)
        late = {"group_channels": 1, "shortcut": "none", "reduction": "average"}
        drop_defaults(ae_tree, late | {"image_channels": 3, "pixels": to_tree(Pixels())})
        parts = {
            "network": [self.sha256, network_tree],
            "denoiser": to_tree(recipe.denoiser),
            "autoencoder": [self.autoencoder_sha256, ae_tree],
            "statistics": self.codec.statistics(),
            "resolution": plain_size(recipe.resolution),
        }
        identity = new_sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self.identifiers = {"sha256": self.sha256, "identity": identity}
        self.provenance, origin = file.provenance, inner.provenance.get("imported")
        self.autoencoder_origin = origin if isinstance(origin, dict) else {}
        self.folder: Path | None = None
        self.device, self.precision, self._requested = torch.device("cpu"), "fp32", "auto"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "auto",
        precision: str | torch.dtype = "auto",
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Load a model from this machine or from the Hugging Face Hub; nothing in it is executed.

        Args:
            name_or_path: a `ckpt.pt`, its `.safetensors` twin, a run folder, a folder of
                `save_pretrained`, or a repository of the Hub, the string `owner/name`. What is on
                this machine comes first. Of a repository, only `config.json` and
                `model.safetensors` are fetched, or found where they were fetched before.
            device, precision: see `to`.
            revision: branch, tag or commit of the repository.
            token: of an account that may read it; None: that of `hf auth login`, if there is one.
            cache_dir: folder to fetch into; None: that of the Hub's client.

        Raises:
            UsageError: a revision of what is on this machine, or an unknown precision.
            LdmError: it is neither here nor on the Hub; a stage-one model, damaged weights, or a
                missing device.
        """
        wanted = (hub.CONFIG_FILE, hub.WEIGHTS_FILE)
        found = hub.find(name_or_path, wanted, revision, token, cache_dir)
        is_here = found == Path(name_or_path).expanduser()
        is_described = (found / hub.CONFIG_FILE).is_file()
        # a run, whatever else lies beside it; but a repository is read by its config.json alone
        if is_here and ((found / "ckpt.pt").is_file() or not is_described):
            model = cls(load_model(found, "diffusion"), found)
        elif is_described:
            model = cls._read_described(found)
        else:
            raise LdmError(
                f"{name_or_path} on the Hugging Face Hub holds no {hub.CONFIG_FILE}, so it is no "
                "model of this toolkit: fetch models of others, and convert them by `ldm import "
                "--diffusion`"
            )
        model.folder = (found if found.is_dir() else found.parent) if is_here else None
        return model.to(device, precision)

    @classmethod
    def _read_described(cls, folder: Path) -> Self:
        """Read a folder of `save_pretrained`."""
        described = read_described(folder / hub.CONFIG_FILE)
        path = hub.check_described(folder, described, MODEL_TYPE, "no latent diffusion model")
        file = load_model(path, "diffusion")
        model = cls(file, path) if described["config"] == file.config else None
        if model is None or described.get("sha256") != model.sha256:
            raise Damaged(
                f"{path} is not the model that {hub.CONFIG_FILE} beside it describes: copy or "
                "fetch both again"
            )
        return model

    def to(
        self,
        device: str | torch.device | torch.dtype | None = None,
        precision: str | torch.dtype | None = None,
    ) -> Self:
        """Move to a device and set the precision; an omitted argument keeps its current value.

        >>> pipe.to("cuda"); pipe.to("cuda:1", "bf16"); pipe.to(torch.bfloat16)

        Args:
            device: auto, cpu, cuda, cuda:1, or torch's.
            precision: fp32, bf16 (networks under autocast, in copies with weights in bf16), auto
                (bf16 where the device supports it), or torch's dtype.

        Raises:
            LdmError: no such device.
            UsageError: an unknown precision.
        """
        if isinstance(device, torch.dtype):
            device, precision = None, device
        requested = self._requested if precision is None else PRECISIONS.get(precision, precision)
        if requested not in ("auto", *PRECISIONS.values()):
            raise UsageError(f"precision {requested}: it must be auto, fp32 or bf16")
        if device is not None:
            self.device = resolve_device(str(device))
        self._requested, self.precision = requested, resolve_precision(requested, self.device)
        self._in_bf16 = {}
        for name in ("denoiser", "codec"):
            module = getattr(self, name)
            module.to(device=self.device).to(memory_format=memory_format(self.device))
            if self.precision == "bf16":
                self._in_bf16[name] = cast_for_autocast(module)
        return self

    def shape_of(self, size: Resolution | None = None) -> tuple[int, int, int]:
        """Shape (n_z, h, w) of the latents of images of a size; None: that of the training."""
        return self.latent_shape if size is None else find_shape(size, self.codec, self.denoiser)

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        seed: int,
        sampling: Sampling = Sampling(),
        labels: Sequence[int] | None = None,
        guide: "LatentModel | None" = None,
        *,
        size: Resolution | None = None,
        noise: Tensor | None = None,
        skip: int = 0,
        from_z: Tensor | None = None,
        wrap: Callable[[Denoise], Denoise] = lambda denoise: denoise,
        finish: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> Tensor:
        """Sample one batch: images `indices` of a seed, (len, C, H, W) in [−1, 1] on the CPU.

        Args:
            labels: the class of each image, −1 for none.
            guide: the guiding model, from `load_guide`.
            size: of the images, in pixels; None: that of the training. See `shape_of`.
            noise: initial noise, in place of the seed's.
            skip: steps to leave out at the beginning.
            from_z: latents to start from, noised to the level of the first step that is run.
            wrap: applied to the guided denoiser.
            finish: applied to the images before they leave the device.
        """
        shape = self.shape_of(size)

        def draw(purpose: str) -> Tensor:
            return to_device(normal(seed, purpose, indices, shape), self.device)

        sigmas = noise_levels(sampling, self.denoiser)
        noise = draw("sample") if noise is None else noise.to(self.device)
        start = None if from_z is None else from_z + sigmas[skip] * noise.double()
        denoise = wrap(self._guided(sampling, labels, guide))
        extra = {"start": start, **self.denoiser.sampler_options(sampling.sampler)}
        if sampling.churn.S_churn > 0:
            churn = sampling.churn.model_dump() | {"sigma_max": self.denoiser.sigma_max}
            extra["churn"] = make_churn(sigmas, lambda step: draw(f"churn {step}"), **churn)
        with self._autocast():
            z = SAMPLERS[sampling.sampler](denoise, noise, sigmas[skip:], **extra)
            images = self._running("codec").decode(z)
        finite = HostCopy(images.isfinite().all()[None])  # read below: a GPU is waited for once
        images = finish(images).cpu()
        if not all(finite.values()):
            raise LdmError(
                f"images {indices[0]} to {indices[-1]} are not finite: lower the guidance, use "
                "precision fp32, or another model"
            )
        return images

    def load_guide(
        self,
        sampling: Sampling,
        guide: "LatentModel | str | Path | None",
        labels: Sequence[int] | None = None,
    ) -> "LatentModel | None":
        """Load the guiding model, if there is one, and check that guidance is possible."""
        check_channels(sampling, self.latent_shape[0])
        if guide is None:
            if sampling.guidance is not None:
                self.classes.check_guidance(self.recipe.label_dropout, labels)
            return None
        if sampling.guidance is None:
            raise UsageError("a guide has no effect without guidance: set guidance, its scale")
        if not isinstance(guide, LatentModel):
            guide = LatentModel.from_pretrained(guide, self.device, self.precision)
        if other := self._difference(guide):
            raise UsageError(f"the guide has {other} than this model: guidance needs the same")
        low, high = guide.denoiser.sigma_min, guide.denoiser.sigma_max
        levels = guided_levels(sampling, self.denoiser)
        if levels and not low <= levels[0] <= levels[1] <= high:
            raise UsageError(
                f"guidance evaluates the guide at σ from {levels[0]:g} to {levels[1]:g}, and it "
                f"denoises {low:g} to {high:g}: narrow the interval, or sigma_min and sigma_max"
            )
        return guide.to(self.device)

    def _difference(self, guide: "LatentModel") -> str | None:
        """The first property of the guide's latents or classes that differs from this model's."""
        if guide.latent_shape != self.latent_shape:
            return f"latents of another shape, {guide.latent_shape} against {self.latent_shape},"
        if guide.autoencoder_sha256 != self.autoencoder_sha256:
            return "another autoencoder"
        # measured over other images of the same data they differ a little: 1 % does no harm
        a, b = self.codec, guide.codec
        mean_differs = ((a.mean - b.mean.to(a.mean)).abs() > 0.01 * a.std).any()
        scale_differs = (a.std / b.std.to(a.std) * b.sigma_data / a.sigma_data - 1).abs() > 0.01
        if mean_differs or scale_differs.any():
            return "other statistics of the latents"
        if guide.classes.count and guide.classes != self.classes:
            return "other classes"
        return None

    def _guided(
        self, sampling: Sampling, labels: Sequence[int] | None, guide: "LatentModel | None"
    ) -> Denoise:
        chosen = None if labels is None else torch.tensor(labels)
        if chosen is not None:
            check_labels(chosen, self.classes.count)  # here, where no GPU has to wait
            chosen = to_device(chosen, self.device)
        strong = partial(self._running("denoiser"), labels=chosen)
        if (scale := sampling.guidance) is None:
            return strong
        if guide is None:
            weak: Denoise = self._running("denoiser")
        else:
            its = chosen if guide.classes.count else None
            # its copy in bf16 needs the autocast of a model in bf16
            as_ours = guide.precision == self.precision
            weak = partial(guide._running("denoiser") if as_ours else guide.denoiser, labels=its)
        return samplers.guide(strong, weak, scale, sampling.interval, sampling.guided_channels)

    def _running(self, name: str) -> Any:
        """The denoiser or the codec, or the copy that runs in its place."""
        return self._in_bf16.get(name, getattr(self, name))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [−1, 1] as their posteriors' means z, on the device."""
        with self._autocast():
            return self._running("codec").encode(images.to(self.device))

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        is_bf16 = self.precision == "bf16"
        with full_float32(), torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
            yield


class ModelSamples:
    """Images 0 … n−1 of one model, one seed and one set of settings, in any batches.

    `ldm sample` writes them to disk; `ldm fid --model` measures them without writing. For the
    arguments see `sample_images`.

    Attributes:
        made_with: everything that decides an image, in the form of `samples.json`.
        folder: the folder that holds the model; of one on the Hub `runs/owner--name`.
        channels, pixels: of the images, and the values of their files.
        ranks: the processes launched together; each loads the model.
    """

    def __init__(
        self,
        path: Path | str,
        n: int,
        seed: int = 0,
        *,
        size: Resolution | None = None,
        labels: Label | Sequence[Label] | None = None,
        guide: Path | str | None = None,
        device: str = "auto",
        precision: str = "auto",
        **sampling: Any,
    ) -> None:
        self._n, self.seed = integer("--n ", n, least=1), integer("--seed ", seed)
        self.path, self.sampling = Path(path).expanduser(), validate(Sampling, sampling)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        if not self.path.exists():  # a repository of the Hub
            self.folder = RUNS / "--".join(self.path.parts)
        self.ranks, where = join_processes(device)
        keep_freed_memory(where)
        self.model = LatentModel.from_pretrained(path, where, precision)
        self.sampling = fill_in(self.sampling, self.model.denoiser)
        self._labels = None if labels is None else self.model.classes.read(labels)
        self._named_labels = self.model.classes.describe(labels)
        self._guide = self.model.load_guide(self.sampling, guide, self._labels)
        self.resolution = find_size(self.model, self._guide, size)
        ae_config = self.model.autoencoder_config
        self.channels, self.pixels = ae_config.image_channels, ae_config.pixels
        self.what = f"{self._n} images of {self.path}, seed {self.seed}"
        self.made_with: dict[str, Any] = {
            "n": self._n,
            "model": {"path": str(path), **self.model.identifiers},
            "seed": self.seed,
            **to_tree(self.sampling),
            "weaker": self._guide and {"path": str(guide), **self._guide.identifiers},
            "labels": self._named_labels,
            "precision": self.model.precision,
            "resolution": plain_size(self.resolution),
            "data": to_tree(self.model.recipe.data.of(ae_config)),
            **{"image_channels": self.channels, "pixels": to_tree(self.pixels)},
        }

    def __len__(self) -> int:
        return self._n

    def name(self, index: int) -> str:
        return f"image {index} of seed {self.seed}"

    def sample(self, indices: Sequence[int]) -> Tensor:
        """Sample images (len, C, H, W), on the CPU, rounded as files would: see `Pixels.round`."""
        labels = [self.label(i) for i in indices] if self.model.classes.count else None
        how = (self.seed, self.sampling, labels, self._guide)
        return self.model.sample(indices, *how, size=self.resolution, finish=self.pixels.round)

    def label(self, i: int) -> int:
        """Return the class of image i, −1 for none."""
        if self._labels is None:
            return self.model.classes.draw(self.seed, i)
        return self._labels[i % len(self._labels)]

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Sample every image once over all processes; there are no workers."""
        share = -(-batch_size // world)
        for first in range(rank * share, self._n, world * share):
            indices = range(first, min(first + share, self._n))
            labels = torch.tensor([self.label(i) for i in indices])
            yield Batch(self.sample(indices), torch.tensor(indices), labels)

    @property
    def result_path(self) -> Path:
        """The file for a measurement of the samples, beside the model."""
        return self.folder / "fid" / f"{self.slug()}-n{self._n}.json"

    def slug(self, files: str = "png") -> str:
        """Name these samples beside others of the same model: `seed0-steps18-guidance2`."""
        words = [f"seed{self.seed}", settings_slug(self.sampling, self.model.denoiser.schedule)]
        other_size = self.resolution != self.model.recipe.resolution
        words += [size_word(self.resolution)] if other_size else []
        words += [f"weaker{self._guide.sha256[:8]}"] if self._guide else []
        words += labels_slug(self._named_labels)
        words += [files] if files != "png" else []
        # ckpt-ema0.05.pt lies beside ckpt.pt
        if self.path.is_file() and (name := self.path.stem.removeprefix("ckpt").strip("-")):
            words.append(name)
        return "-".join(words)
