"""DiT as other toolkits store it: checkpoints of its authors and successors, and diffusers'
`DiTTransformer2DModel`.

The code of DiT (Peebles and Xie 2023), SiT (Ma et al. 2024, arXiv 2401.08740) and LightningDiT (Yao
et al. 2025) names its tensors alike. A checkpoint has no config: the sizes are the tensors'. They
tell attention's heads only where queries and keys are turned or normalised; else those of the
published width are taken, or given ones. Networks that also predict a variance answer twice as many
channels: the first half is kept. The table of positions is no weight here; it must be the one that
we compute.

diffusers repeats the embedding of noise level and class in every block, and spaces the noise
level's frequencies by 1/127, where the authors' code has 1/128: `frequency_shift` of our config.
"""

import re
from collections.abc import Mapping
from math import ceil, isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.discrete import DiscreteConfig
from diffusion.dit import DiT, DiTConfig, coordinates, rotation, sincos
from diffusion.flow import FlowConfig
from diffusion.formats import join_qkv, read_folder, split_qkv
from ldm import foreign
from ldm.checkpoint import Damaged, refuse_damaged
from ldm.config import validate
from ldm.errors import LdmError, UsageError

DENOISERS: dict[str, DiscreteConfig | FlowConfig] = {
    "discrete": DiscreteConfig(beta_start=1e-4, beta_end=0.02, schedule="linear"),
    "flow": FlowConfig(distribution="uniform", time_scale=1, reversed=True),
}
"""Denoisers of checkpoints' networks, by `denoiser.type`: that of DiT, and that of SiT and
LightningDiT."""

PLAIN, OPTIONS = DiTConfig(), ("mlp", "norm", "positions", "qk_norm")
"""A DiT, and what only LightningDiT changes."""

# --------------------------------------------------------------------- the authors' checkpoints
FIRST, LAST, TABLE = "x_embedder.proj.weight", "final_layer.linear", "pos_embed"
ROTATIONS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
HEADS_SHOW = (ROTATIONS[0], "blocks.0.attn.q_norm.weight")
"""Tensors as wide as a head."""
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Heads by width: S, B, L, XL of DiT, and the two larger ones of LightningDiT."""
VARIANCE = (
    "its last layer has twice the channels, for DiT's variance, which SiT leaves unused: the "
    "second half is left out"
)


def holds_dit(weights: Mapping[str, Tensor]) -> bool:
    """True for tensors of a checkpoint by the names of DiT's authors."""
    return FIRST in weights


def authors_names(config: DiTConfig) -> foreign.Pairs:
    """The table (ours, theirs) of names."""
    inner, outer = ("w12", "w3") if config.mlp == "swiglu" else ("fc1", "fc2")
    return [
        ("patches", "x_embedder.proj"),
        ("embed.linear_in", "t_embedder.mlp.0"),
        ("embed.linear_out", "t_embedder.mlp.2"),
        ("embed.classes", "y_embedder.embedding_table"),
        ("last.norm", "final_layer.norm_final"),
        ("last", "final_layer"),
        # parts of a block
        ("attention", "attn"),
        ("query_norm", "q_norm"),
        ("key_norm", "k_norm"),
        ("mlp.linear_in", f"mlp.{inner}"),
        ("mlp.linear_out", f"mlp.{outer}"),
        ("modulation", "adaLN_modulation.1"),
    ]


def read_checkpoint(
    path: Path, heads: int | None = None
) -> tuple[DiTConfig, dict[str, Tensor], list[str]]:
    """Read a checkpoint of DiT, SiT or LightningDiT: (our config, weights by our names, notes).

    Averaged weights come first, as everywhere.

    Args:
        heads: of its attention; None: those of the published network of its width.
    """
    weights = foreign.read_weights(path)
    try:
        refuse_damaged(weights, path)
        config = config_from_authors(weights, heads)
        theirs, notes = cut_variance(weights, LAST, config)
        if heads is None and not any(name in weights for name in HEADS_SHOW):
            notes.append(
                f"attention is assumed to have {config.heads} heads, as the published network of "
                f"{config.width} channels: for others give --heads"
            )
        return config, from_authors(theirs, config), notes
    except Damaged:
        raise
    except LdmError as error:
        raise LdmError(f"{path} cannot be read: {error}") from error


def config_from_authors(weights: Mapping[str, Tensor], heads: int | None = None) -> DiTConfig:
    """Find the config of a network in the shapes of its authors' tensors, or refuse them."""
    width, n_z = foreign.layer_sizes(weights, FIRST)
    patch = weights[FIRST].shape[2]
    blocks = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
    gated = "blocks.0.mlp.w12.weight" in weights
    inner = "blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"
    _, hidden = foreign.layer_sizes(weights, inner, 2)
    rows, _ = foreign.layer_sizes(weights, "y_embedder.embedding_table.weight", 2)
    modulated, _ = foreign.layer_sizes(weights, "blocks.0.adaLN_modulation.1.weight", 2)
    if modulated == 4 * width:
        raise LdmError("its blocks have no shifts (wo_shift of LightningDiT): it cannot be used")
    heads, grid = _find_heads(weights, width, heads), _find_grid(weights, width)
    _check_rotations(weights, grid, width // heads)
    tree = {
        "latent_channels": n_z, "classes": rows - 1, "width": width, "depth": len(blocks),
        "patch": patch, "mlp": "swiglu" if gated else "gelu",
        "norm": "rms" if "blocks.0.norm1.weight" in weights else "layer",
        "positions": "both" if ROTATIONS[0] in weights else "sincos",
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "heads": heads, "grid": grid,
    }  # fmt: skip
    config = validate(DiTConfig, tree)
    if config.hidden_width == hidden:
        return config
    # a product that is rounded down to what is rounded down to `hidden`
    whole = ceil(1.5 * hidden) if gated else hidden
    return validate(DiTConfig, {**tree, "mlp_ratio": (whole + 0.5) / width})


def _find_heads(weights: Mapping[str, Tensor], width: int, heads: int | None) -> int:
    """The heads that tensors show, else those given, else those of the published network."""
    for name in HEADS_SHOW:
        if name in weights:
            found = width // max(1, weights[name].shape[-1])
            if heads not in (None, found):
                raise LdmError(f"its tensor {name} is that of {found} heads, not {heads}")
            return found
    if heads is None and width not in PUBLISHED_HEADS:
        raise LdmError(f"no tensor shows the heads of its {width} channels: give --heads")
    return heads or PUBLISHED_HEADS[width]


def _find_grid(weights: Mapping[str, Tensor], width: int) -> int:
    """Patches along a side of a training latent; other tables than of sinusoids are refused."""
    table = weights.get(TABLE, torch.empty(0))
    side = isqrt(table.shape[1]) if table.ndim == 3 and table.is_floating_point() else 0
    if table.shape == (1, side**2, width) and side and width % 4 == 0:
        at = coordinates(side, side, torch.device("cpu"))
        rounding = max(1e-4, 4 * torch.finfo(table.dtype).eps)
        if torch.allclose(table[0].double(), sincos(at, at, width), rtol=0, atol=rounding):
            return side
    raise LdmError(f"its {TABLE} is not the table of sinusoids of a square grid of patches")


def _check_rotations(weights: Mapping[str, Tensor], grid: int, head_width: int) -> None:
    """Refuse tables of rotations, if there are any, other than those that we compute."""
    at = coordinates(grid, grid, torch.device("cpu"))
    for name, turns in zip(ROTATIONS, rotation(at, at, head_width), strict=True):
        expected = turns.repeat_interleave(2, dim=1)  # of a pair of channels
        table = weights.get(name, expected)
        rounding = max(1e-4, 4 * torch.finfo(table.dtype).eps) if table.is_floating_point() else 0
        if table.shape != expected.shape or not torch.allclose(
            table.double(), expected, rtol=0, atol=rounding
        ):
            raise LdmError(f"its {name} is not the table of a square grid of patches")


def cut_variance(
    weights: Mapping[str, Tensor], last: str, config: DiTConfig
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights whose last layer answers n_z channels for each value of a patch, not 2 n_z with the
    logarithm of a variance, and a note where one was left out."""
    values, n_z = config.patch**2, config.latent_channels
    rows, _ = foreign.layer_sizes(weights, f"{last}.weight", 2)
    if rows != 2 * values * n_z:
        return dict(weights), []
    cut = {  # rows in the order patch × patch × channels
        name: t.unflatten(0, (values, 2 * n_z))[:, :n_z].flatten(0, 1)
        for name, t in weights.items()
        if name.rpartition(".")[0] == last and t.shape[:1] == (rows,)
    }
    return {**weights, **cut}, [VARIANCE]


def from_authors(weights: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Turn the authors' weights, of n_z channels in the last layer, into ours."""
    theirs = {name: t for name, t in weights.items() if name not in (TABLE, *ROTATIONS)}
    names = authors_names(config)
    if not config.classes:
        _fold_none(theirs, foreign.rename("embed.classes.weight", names),
                   foreign.rename("embed.linear_out.bias", names))  # fmt: skip
    return foreign.fit(theirs, _sketch(config).state_dict(), names)


def _fold_none(weights: dict[str, Tensor], table: str, bias: str) -> None:
    """Add the only row of a table of classes, that of none, to the bias that it is added to."""
    if table in weights and bias in weights and weights[table].shape[1:] == weights[bias].shape:
        weights[bias] = weights[bias] + weights.pop(table)[0]


def _sketch(config: DiTConfig) -> DiT:
    """A network without memory for its values."""
    with torch.device("meta"):
        return DiT(config)


# ------------------------------------------------------------------------------------ diffusers
SIZES = (
    "_class_name", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim",
    "patch_size", "sample_size", "num_embeds_ada_norm",
)  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),  # the second until 2024
    "dropout": (0.0,),
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "upcast_attention": (False,),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    # of one of a block's two norms; both are 1e-6 here: 5e-6 of an activation of variance 1
    "norm_eps": (1e-5, 1e-6),
    "cross_attention_dim": (None,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
}
OWN = ("cross_attention_dim", "only_cross_attention", "double_self_attention")  # of older versions
FREQUENCIES = (
    "diffusers spaces the frequencies of timestep by 1/127, this network by 1/128: set "
    "norm1.emb.time_proj.downscale_freq_shift = 0 in every one of transformer_blocks"
)
DIFFUSERS_PARTS: foreign.Pairs = (
    ("patches", "pos_embed.proj"),
    ("embed.linear_in", "norm1.emb.timestep_embedder.linear_1"),
    ("embed.linear_out", "norm1.emb.timestep_embedder.linear_2"),
    ("embed.classes", "norm1.emb.class_embedder.embedding_table"),
    ("last.modulation", "proj_out_1"),
    ("last.linear", "proj_out_2"),
    # parts of a block
    ("blocks", "transformer_blocks"),
    ("attention.proj", "attn1.to_out.0"),
    ("attention", "attn1"),
    ("mlp.linear_in", "ff.net.0.proj"),
    ("mlp.linear_out", "ff.net.2"),
    ("modulation", "norm1.linear"),
)
EMBEDDING = "norm1.emb."


def diffusers_config(
    config: DiTConfig, sample_size: int | list[int] | None = None
) -> dict[str, Any]:
    """Turn our config into the config.json of a `DiTTransformer2DModel`, or refuse it.

    Args:
        sample_size: sides of the latents, for a config without the grid of its training.
    """
    for key in (*OPTIONS, "mlp_ratio"):
        if (value := getattr(config, key)) != (only := getattr(PLAIN, key)):
            raise _cannot(f"its {key} is {value}, not {only}")
    known = isinstance(sample_size, int) and sample_size // config.patch
    if not isinstance(grid := config.grid or known, int) or not grid:
        raise _cannot("it is not of square latents")
    return {
        **{key: known[0] for key, known in FIXED.items() if key not in OWN},
        "norm_eps": 1e-6,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "patch_size": config.patch,
        "sample_size": grid * config.patch,
        "num_embeds_ada_norm": config.classes,
    }


def config_from_diffusers(described: Mapping[str, Any]) -> DiTConfig:
    """Turn the config.json of a `DiTTransformer2DModel` into ours, or refuse it."""
    foreign.check_described(described, FIXED, SIZES)
    sizes = {key: described[key] for key in SIZES[1:]}
    for key, size in sizes.items():
        if not isinstance(size, int) or not 0 <= size <= 65_536:
            raise LdmError(f"{key} is {size!r:.40}, not a whole number up to 65536")
    n_z, patch = sizes["in_channels"], max(1, sizes["patch_size"])
    foreign.check_described({"out_channels": n_z, **described}, {"out_channels": (n_z, 2 * n_z)})
    return validate(
        DiTConfig,
        {
            "latent_channels": n_z,
            "classes": sizes["num_embeds_ada_norm"],
            "width": sizes["num_attention_heads"] * sizes["attention_head_dim"],
            "depth": sizes["num_layers"],
            "heads": sizes["num_attention_heads"],
            "patch": sizes["patch_size"],
            "grid": sizes["sample_size"] // patch,
            "frequency_shift": 1,
        },
    )


def _cannot(why: str) -> LdmError:
    return LdmError(f"no diffusers DiTTransformer2DModel can express this network: {why}")


def to_diffusers(weights: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Turn the weights of our DiT into those of diffusers' `DiTTransformer2DModel`.

    The embedding of augmentations is left out: without one it adds nothing. A network without
    classes has the one of none, of zeros.
    """
    ours = split_qkv({name: t for name, t in weights.items() if name != "embed.augment.weight"})
    if not config.classes:
        ours["embed.classes.weight"] = weights["patches.weight"].new_zeros(1, config.width)
    theirs = foreign.renamed(ours, DIFFUSERS_PARTS)
    for name in [name for name in theirs if name.startswith(EMBEDDING)]:
        shared = theirs.pop(name)
        for index in range(config.depth):  # copies: no file may hold a tensor by two names
            theirs[f"transformer_blocks.{index}.{name}"] = shared.clone()
    return theirs


def from_diffusers(weights: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Turn the weights of a `DiTTransformer2DModel` into ours, without a variance."""
    theirs, _ = cut_variance(weights, "proj_out_2", config)
    shared = re.compile(rf"transformer_blocks\.\d+\.({re.escape(EMBEDDING)}.+)")
    single: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        found = shared.fullmatch(name)
        kept = single.setdefault(found[1] if found else name, tensor)
        if kept is not tensor and not torch.equal(kept, tensor):
            raise LdmError(f"{name} is not that of the first block: a DiT has one for all")
    names = list(DIFFUSERS_PARTS)
    if not config.classes:
        _fold_none(single, foreign.rename("embed.classes.weight", names),
                   foreign.rename("embed.linear_out.bias", names))  # fmt: skip
    return join_qkv(foreign.fit(single, split_qkv(_sketch(config).state_dict()), names))


def read_diffusers(folder: Path) -> tuple[DiTConfig, dict[str, Tensor], list[str]]:
    """Read the folder of a `DiTTransformer2DModel`: (our config, weights by our names, notes)."""
    config, weights = read_folder(folder, config_from_diffusers, from_diffusers)
    described = foreign.read_described(folder / "config.json")
    notes = [VARIANCE] if described.get("out_channels") == 2 * config.latent_channels else []
    notes.append(
        "it reads the time step as diffusers does (network.frequency_shift=1); weights that others "
        "trained for the authors' code, as Meta did, want their checkpoint imported instead"
    )
    return config, weights, notes


def write_diffusers(
    folder: Path, network: DiT, sample_size: int | list[int] | None = None, **notes: Any
) -> list[Path]:
    """Write a folder for diffusers' `DiTTransformer2DModel.from_pretrained`, with NAME.json of each
    note, and return its files; see `diffusers_config`."""
    described = diffusers_config(network.config, sample_size)
    weights = to_diffusers(network.state_dict(), network.config)
    return foreign.write_folder(folder, described, weights, **notes)


def frequencies(config: Any) -> dict[str, str]:
    """A note on an exported network's time step, where it needs one."""
    is_ours = isinstance(config, DiTConfig) and not config.frequency_shift
    return {"frequencies": FREQUENCIES} if is_ours else {}


def find_denoiser(
    kind: str | None, config: DiTConfig
) -> tuple[DiscreteConfig | FlowConfig, list[str]]:
    """The denoiser that a checkpoint's network is for, and a note where it had to be assumed.

    Args:
        kind: discrete or flow; None: flow for the options that only LightningDiT has, else DiT's.

    Raises:
        UsageError: another kind.
    """
    is_dit = all(getattr(config, key) == getattr(PLAIN, key) for key in OPTIONS)
    chosen = kind or ("discrete" if is_dit else "flow")
    if chosen not in DENOISERS:
        raise UsageError(f"--denoiser {chosen}: must be {' or '.join(DENOISERS)}")
    is_known = kind or chosen == "flow"  # by LightningDiT's options
    assumed = (
        "a DiT and a SiT have the same tensors: DiT is assumed, for a SiT give --denoiser flow"
    )
    return DENOISERS[chosen], [] if is_known else [assumed]
