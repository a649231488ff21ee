"""Training that starts with weights: those it begins from, or those of a teacher.

Fine-tuning begins from the weights of a source, in its own architecture or in a preset's that they
fit; `train` chooses what learns, and the rest stays as it is, to the bit.

Distillation teaches a new encoder the posterior that a teacher's encoder gives. The decoder and the
1×1 convolutions around the latent are the teacher's and stay, so that the new encoder takes the
teacher's place wherever its latents are used.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder, DiagonalGaussian
from autoencoders.autoencoder import assemble, grey_weights
from autoencoders.losses import LossConfig
from autoencoders.pretrained import describe_source, find_pretrained, read_autoencoder
from autoencoders.sdvae.formats import SETTINGS
from ldm.checkpoint import fingerprint, first_difference
from ldm.config import flatten, to_tree
from ldm.data import Source, batches
from ldm.device import full_float32
from ldm.distributed import fail_together, from_main
from ldm.errors import LdmError, UsageError
from ldm.images import as_float
from ldm.run import Run
from pipelines.latents import measure_latents
from pipelines.recipes import AutoencoderRecipe, InitConfig, TeacherConfig

PARTS = {
    "encoder": ("encoder.", "pre_conv."),
    "decoder": ("quantizer.", "post_conv.", "decoder."),
}
"""Prefixes of each part's tensors in state dicts: a part has its 1×1 convolution at the latent."""


class Given(NamedTuple):
    """The autoencoder that a training starts with."""

    ae: Autoencoder
    sha256: str
    """Of its weights, by our names."""
    origin: dict[str, Any]
    """Its source, for the provenance of the model that is trained."""


# ------------------------------------------------------------------------ the given weights
def _read(source: str) -> Given:
    path = find_pretrained(source)
    found = read_autoencoder(path)
    ae = assemble(found, path)
    sha256 = fingerprint(ae.state_dict())
    return Given(ae, sha256, describe_source(source, found, path) | {"sha256": sha256})


def read_given(recipe: AutoencoderRecipe) -> tuple[AutoencoderRecipe, Given | None]:
    """Read the weights that a recipe starts with, and note their SHA-256 in it.

    Raises:
        UsageError: the recipe trains one part, and has no weights for the other.
        LdmError: they cannot be read, or are not those of the recipe's SHA-256.
    """
    key = "teacher" if recipe.teacher.source else "init"
    config: InitConfig | TeacherConfig = getattr(recipe, key)
    if not config.source:
        if recipe.train != "all" and (recipe.encoder.type != "dwt" or recipe.conv1x1):
            how = "--from" if recipe.train == "decoder" else "--teacher or --from"
            raise UsageError(
                f"train={recipe.train} needs weights for the rest: name them by {how}, or set "
                "train=all"
            )
        return recipe, None
    given = _read(config.source)
    if config.sha256 not in ("", given.sha256):
        raise LdmError(
            f"{config.source} holds other weights than {key}.sha256 says: give the file that was "
            f"meant, or omit {key}.sha256"
        )
    noted = config.model_copy(update={"sha256": given.sha256})
    return recipe.model_copy(update={key: noted}), given


# -------------------------------------------------------------------------- weights and parts
def load_given(ae: Autoencoder, recipe: AutoencoderRecipe, given: Given) -> None:
    """Copy into a new autoencoder the parts that its recipe takes from the given one.

    Raises:
        LdmError: a part is not there, or a tensor or a setting does not fit.
    """
    if recipe.teacher.source:
        source, parts = recipe.teacher.source, ["decoder"]
    else:
        source, parts = recipe.init.source, [*recipe.init.parts]
    weights, expected = _fitting_weights(given.ae, ae, recipe, source), ae.state_dict()
    faults = {}
    for part in parts:
        prefixes = PARTS[part]
        if recipe.teacher.source and _has_moments(given):
            prefixes += ("pre_conv.",)
        theirs, ours = (
            {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
            for tensors in (weights, expected)
        )
        if difference := first_difference(theirs, ours) or _other_setting(part, given.ae, ae):
            faults[part] = difference
        elif not any(name.startswith(part) for name in ours) and parts == [part]:
            faults[part] = f"it has no weights for the {part}"  # as of a dwt encoder
        expected |= theirs
    if faults:
        fitting = [part for part in parts if part not in faults]
        hint = f"init.parts=[{fitting[0]}] train=all, or " if fitting else ""
        raise LdmError(
            f"{source} does not fit this autoencoder: {next(iter(faults.values()))}: {hint}omit "
            "the preset and its settings, for the architecture of the weights"
        )
    ae.load_state_dict(expected)


def _fitting_weights(
    given: Autoencoder, ae: Autoencoder, recipe: AutoencoderRecipe, source: str
) -> dict[str, Tensor]:
    """The given weights, adapted to the number of the images' channels where that is requested."""
    theirs, ours = given.config.image_channels, ae.config.image_channels
    if theirs == ours:
        return given.state_dict()
    way = f"set image_channels={theirs}"
    if recipe.init.source and ours == 1:
        if recipe.init.adapt == "sum":
            return grey_weights(given, recipe.init.parts)
        way = "set init.adapt=sum (the first convolution's weights summed, the last's averaged)"
    raise LdmError(f"{source} is of images of {theirs} channels, this model of {ours}: {way}")


def _other_setting(part: str, theirs: Autoencoder, ours: Autoencoder) -> str | None:
    """Describe the first setting of a part that differs: no tensor shows a wavelet."""
    a, b = (flatten(to_tree(getattr(ae.config, part))) for ae in (theirs, ours))
    if _groups(getattr(theirs, part)) == _groups(getattr(ours, part)):  # wide enough for both
        a, b = ({k: v for k, v in t.items() if not k.endswith("group_channels")} for t in (a, b))
    key = next((key for key in {**a, **b} if a.get(key) != b.get(key)), None)
    return key and f"{part}.{key} is {a.get(key)} in the file, {b.get(key)} in the model"


def _groups(network: nn.Module) -> list[int]:
    return [module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)]


def begin(
    recipe: AutoencoderRecipe, run: Run, given: Given | None
) -> tuple[Autoencoder, list[nn.Module], Autoencoder | None]:
    """Build the autoencoder as its training begins, where the run computes.

    Returns:
        The autoencoder; those of its parts that do not learn, which are frozen; and the teacher,
        frozen and without its decoder, which is the autoencoder's.
    """
    ae, teacher = Autoencoder(recipe.model), None
    if given is not None:
        first = from_main(run.accelerator, lambda: given.sha256)
        with fail_together(run.accelerator):
            if given.sha256 != first:
                raise LdmError("the processes have read different weights: give all the same file")
            load_given(ae, recipe, given)
    init = recipe.init
    if (init.mean_gain, init.logvar) != (1, 0) and (given is None or "encoder" not in init.parts):
        ae.adjust_posterior(init.mean_gain, init.logvar)
    ae = run.place(ae)
    still = {
        "all": [],
        "decoder": [ae.encoder, ae.quant_conv],
        "encoder": [ae.decoder, ae.post_quant_conv, ae.quantizer],
    }[recipe.train]
    if given is not None and recipe.teacher.source:
        still += [ae.quant_conv] if _has_moments(given) else []
        given.ae.decoder = given.ae.post_quant_conv = nn.Identity()
        teacher = run.place(given.ae).eval().requires_grad_(False)
    for part in still:
        part.eval().requires_grad_(False)
    return ae, still, teacher


def origin_of(recipe: AutoencoderRecipe, given: Given | None) -> dict[str, Any]:
    """Describe the given weights, with the scaling of their latents where these stay in use."""
    if given is None:
        return {}
    keeps = recipe.teacher.source or "encoder" in recipe.init.parts
    return {k: v for k, v in given.origin.items() if keeps or k not in SETTINGS}


def _has_moments(given: Given) -> bool:
    """Test for a 1×1 convolution of means and variances: of a VQ model it has no variances, and a
    student learns its own."""
    return getattr(given.ae.config.encoder, "variance", True)


def learned(network: nn.Module) -> list[nn.Parameter]:
    """List the parameters of a network that learn."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def loss_weights(recipe: AutoencoderRecipe, ae: Autoencoder) -> LossConfig:
    """The recipe's weights of the terms, without those of terms that nothing moves or needs."""
    off = ["kl"] if recipe.teacher.source else ["latent", "logvar"]
    if not (learned(ae.encoder) or learned(ae.quant_conv)):
        off.append("kl")
    return recipe.loss.model_copy(update=dict.fromkeys(off, 0.0))


def last_learned(ae: Autoencoder, recipe: AutoencoderRecipe) -> Tensor:
    """The last weight that learns, where the gradients of two terms are compared."""
    if recipe.train != "encoder":
        return ae.decoder.conv_out.weight
    encoding = [*learned(ae.encoder), *learned(ae.quant_conv)]
    return [weight for weight in encoding if weight.ndim > 1][-1]


# --------------------------------------------------------------------------------- a teacher
@full_float32()
@torch.no_grad()
def measure_teacher(
    run: Run, recipe: AutoencoderRecipe, teacher: Autoencoder, source: Source
) -> Tensor:
    """Measure the standard deviation (n_z,) of each channel of a teacher's latents, over the first
    images of the run's own stream at its last resolution.

    Raises:
        LdmError: they are not finite, or a channel does not vary.
    """
    micro_batch = recipe.batch_size // recipe.accumulate  # over all processes
    count = -(-recipe.teacher.statistics_images // micro_batch) * micro_batch
    run.say(f"measuring the standard deviation of the teacher's latents of {count:,} images")
    stream = batches(
        source, recipe.data, recipe.phases[-1].resolution, run.seed, 0, count, micro_batch,
        rank=run.rank, world=run.world,
    )  # fmt: skip

    def posteriors() -> Iterator[DiagonalGaussian]:
        for batch in stream:
            if run.stop_requested():
                raise run.interrupted(f"stopped before the first step of {run.folder}")
            yield teacher.encode(as_float(run.place(batch.images)))

    with run.autocast():
        _, std = measure_latents(posteriors(), drawn=False, reduce=run.sum)
    if not (std.isfinite().all() and std.min() > 1e-6):
        shown = ", ".join(f"{value:.3g}" for value in std.tolist())
        raise LdmError(
            f"the teacher's latents have standard deviations {shown}: one that is trained is needed"
        )
    return std.float()


def describe_start(recipe: AutoencoderRecipe) -> str:
    """Say in a line of its own what training starts with and what learns; "" if all is new."""
    start = ""
    if recipe.init.source:
        start += f"\nbegins from the {' and the '.join(recipe.init.parts)} of {recipe.init.source}"
    if recipe.teacher.source:
        is_vq = recipe.codes or getattr(recipe.decoder, "class_name", None) == "VQModel"
        what = "latents, before the nearest codes," if is_vq else "posterior"
        start += f"\nthe encoder learns the {what} of {recipe.teacher.source}"
    elif recipe.train != "all":
        start += f"; only the {recipe.train} learns"
    return start
