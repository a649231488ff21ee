"""Trained autoencoders on disk and on the Hugging Face Hub: ours, diffusers' and CompVis's.

`read_autoencoder` tells them apart by content. A folder of ours is as `ldm.hub` describes it; its
config.json has the usage settings of an import, too.
"""

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from autoencoders.diffusers_parts import KINDS, read_other
from autoencoders.sdvae.formats import (
    COMPVIS_FIRST,
    COMPVIS_PREFIXES,
    DIFFUSERS_FIRST,
    pick_settings,
    read_compvis,
    read_diffusers,
)
from ldm import hub
from ldm.checkpoint import (
    Damaged,
    fingerprint,
    is_safetensors,
    load_model,
    open_safetensors,
    read_safetensors,
    refuse_unusual,
    to_safetensors,
)
from ldm.config import parse_yaml, to_tree
from ldm.errors import LdmError
from ldm.files import read_bytes, to_json, write_together
from ldm.foreign import find_prefix, read_described, read_weights, weights_files
from ldm.hub import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, code

MODEL_TYPE = "autoencoder"
# a repository often holds the same weights several times: fetch one copy
FILES = (CONFIG_FILE, WEIGHTS_FILE, "diffusion_pytorch_model*.safetensors", CARD_FILE)

CARD = """{front}

# An image autoencoder ({ae.config.encoder.type})

Images (3, H, W) in [−1, 1] ↔ latents ({ae.config.latent_channels}, H/{ae.downsampling}, \
W/{ae.downsampling}); {parameters:,} parameters.
{origin}
```python
from autoencoders import Autoencoder

ae = Autoencoder.from_pretrained("this repository")
latents = ae.encode(images).mode()
recon = ae.decode(latents)
```
"""
CARD_HEAD = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)
CARD_LIMIT = 2**20
"""Bytes of a model card."""


# ----------------------------------------------------------------------------------- reading
class AutoencoderFile(NamedTuple):
    """An autoencoder as read from disk: its config, its weights and where it comes from."""

    tree: dict[str, Any]
    """Of an `AutoencoderConfig`, not yet validated."""
    weights: dict[str, Tensor]
    """By our names."""
    format: Literal["ldm", "hub", "diffusers", "compvis"]
    """Ours, ours by the Hub's conventions, diffusers' `AutoencoderKL`, or CompVis's."""
    files: tuple[Path, ...]
    """The files that hold the weights."""
    provenance: dict[str, Any]
    """Ours: how it was trained, or where it was `imported` from. A folder's config.json: its usage
    settings, under `imported`."""


def read_autoencoder(path: str | Path) -> AutoencoderFile:
    """Read any format of `load_autoencoder` without building the model."""
    path = Path(path)
    if not (path / "ckpt.pt").is_file():  # a run, whatever else lies beside it
        if (path / "config.json").is_file():
            return _read_folder(path)
        if (path / "model_index.json").is_file():
            raise LdmError(
                f"{path} is a whole diffusers pipeline: give the folder of its autoencoder, "
                f"mostly {path / 'vae'} (or --subfolder vae)"
            )
    if path.is_file() and (found := _read_compvis(path)):
        return found
    model = load_model(path, "autoencoder")
    file = path / "ckpt.pt" if path.is_dir() else path
    return AutoencoderFile(model.config, model.weights, "ldm", (file,), model.provenance)


def _read_folder(folder: Path) -> AutoencoderFile:
    described = read_described(folder / "config.json")
    if described.get("library_name") == hub.LIBRARY:
        return _read_ours(folder, described)
    read = read_other if described.get("_class_name") in tuple(KINDS) else read_diffusers
    tree, weights = read(folder, described)
    settings = {"imported": pick_settings(described)}
    return AutoencoderFile(tree, weights, "diffusers", tuple(weights_files(folder)), settings)


def _read_ours(folder: Path, described: Mapping[str, Any]) -> AutoencoderFile:
    path = hub.check_described(folder, described, MODEL_TYPE, "no autoencoder")
    settings = {"imported": pick_settings(described.get("imported"))}
    weights = read_safetensors(path)
    refuse_unusual(weights, path)
    if described.get("sha256") not in (None, fingerprint(weights)):  # earlier versions had none
        raise Damaged(f"{path} was altered: its SHA-256 is not config.json's: fetch it again")
    return AutoencoderFile(described["config"], weights, "hub", (path,), settings)


def _read_compvis(path: Path) -> AutoencoderFile | None:
    """A CompVis checkpoint; None where the file may be ours."""
    if path.suffix == ".json":
        raise LdmError(f"{path} is a config without weights: give its folder, {path.parent}")
    if is_safetensors(path):
        with open_safetensors(path) as file:
            if "ldm" in (file.metadata() or {}):
                return None
    weights = read_weights(path)
    prefix = find_prefix(weights, COMPVIS_PREFIXES, COMPVIS_FIRST)
    if prefix is None:
        _refuse_other_names(weights, path)
        return None
    tree, ours = read_compvis(weights, prefix, path)
    settings: dict[str, Any] = {"scaling_factor": 1.0} if "codes" in tree else {}
    if "scale_factor" in weights:  # of a diffusion model that was trained on unit variance
        settings = {"scaling_factor": weights["scale_factor"].squeeze().tolist()}
    return AutoencoderFile(tree, ours, "compvis", (path,), {"imported": settings})


def _refuse_other_names(names: Collection[str], path: Path) -> None:
    """Refuse weights that lack a config, or have an unknown prefix."""
    first = next((name for name in names if name.endswith(f".{COMPVIS_FIRST}")), None)
    if first:
        raise LdmError(
            f"{path} holds an autoencoder's weights under the unknown prefix "
            f"{first.removesuffix(COMPVIS_FIRST)!r}: save its state_dict without that prefix"
        )
    theirs = any(name.endswith(DIFFUSERS_FIRST) for name in names)
    advice = "save the model as a folder by diffusers' save_pretrained, and give that"
    if is_safetensors(path):
        advice = "give the folder of the model, with its config.json"
        if (path.parent / "config.json").is_file():
            advice = f"give its folder, {path.parent}"
    if theirs or is_safetensors(path):
        kind = "weights of diffusers," if theirs else "weights"
        raise LdmError(f"{path} holds {kind} without a config: {advice}")


def describe_source(source: str, found: AutoencoderFile, path: Path) -> dict[str, Any]:
    """Describe where an autoencoder comes from, for the provenance of what is made from it.

    Args:
        source: the path or name that was given.
        path: where it was found.

    Returns:
        source, format; the Hub's commit, the licence of its card, its usage settings, and where it
        was itself `imported` from, if known.
    """
    imported = found.provenance.get("imported")
    before = imported if isinstance(imported, dict) else {}
    # of a folder in the Hub's cache
    commit = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    details = {
        "commit": commit and commit[1],
        "license": find_license(path) or before.get("license"),
        "imported": "source" in before and before,
    }
    return {
        "source": source,
        "format": found.format,
        **{key: value for key, value in details.items() if value},
        **pick_settings(before),
    }


def find_origin(source: str, found: AutoencoderFile) -> dict[str, Any]:
    """Return where the weights of an autoencoder came from, by `describe_source`; an empty dict for
    those that were trained here from the start."""
    if found.format != "ldm":
        return describe_source(source, found, Path(source))
    imported = found.provenance.get("imported")
    return imported if isinstance(imported, dict) else {}


def find_license(path: Path) -> str | None:
    """The licence that the model card in a folder states, or the card of the whole pipeline.

    A file has no card: what lies beside it may be of anything.
    """
    whole = path.absolute().parent
    cards = [path / "README.md", whole / "README.md"]
    for card in cards if (whole / "model_index.json").is_file() else cards[:1]:
        with suppress(OSError, ValueError):
            head = CARD_HEAD.match(read_bytes(card, CARD_LIMIT).decode("utf-8", "replace"))
            tree = parse_yaml(head[1]) if head else None
            named = tree if isinstance(tree, dict) else {}
            key = "license_name" if named.get("license") == "other" else "license"
            if isinstance(license := named.get(key), str):
                return license
    return None


# ----------------------------------------------------------------------------------- the Hub
class HubMixin(nn.Module):
    """The Hub's two methods of writing, for an autoencoder."""

    config: Any
    downsampling: int
    settings: dict[str, Any]

    def save_pretrained(
        self, folder: str | Path, imported: Mapping[str, Any] | None = None
    ) -> list[Path]:
        """Write config.json, model.safetensors and, unless there is one, a model card.

        Args:
            imported: where the model comes from, with usage settings, as `describe_source` says it
                and a file's provenance holds it. None: the model's own `settings`.

        Returns:
            The files written.

        Raises:
            LdmError: the folder cannot be written.
        """
        described = hub.describe(MODEL_TYPE, to_tree(self.config), fingerprint(self.state_dict()))
        if settings := pick_settings(self.settings if imported is None else imported):
            described["imported"] = settings
        files, readme = {}, Path(folder, CARD_FILE)
        if not readme.exists():  # an existing card stays
            files[readme] = self._card(imported or {}).encode()
        files[Path(folder, WEIGHTS_FILE)] = to_safetensors(self.state_dict(), format="pt")
        files[Path(folder, CONFIG_FILE)] = to_json(described)
        write_together(files)
        return list(reversed(files))

    def _card(self, imported: Mapping[str, Any]) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        terms, origin = imported.get("license"), ""
        if source := imported.get("source"):
            of = f", whose licence is {code(terms)}" if terms else ""
            hashes = imported.get("sha256", "unknown")
            each = hashes.values() if isinstance(hashes, dict) else [hashes]
            sums = ", ".join(map(code, each))
            origin = f"\nMade from {code(source)}{of} (SHA-256 {sums}).\n"
        tags = ["autoencoder", "latent-diffusion", self.config.encoder.type]
        front = hub.front_matter(terms, tags=tags)
        return CARD.format(ae=self, parameters=parameters, front=front, origin=origin)

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Save to a repository of the Hub, created if needed, and return its address.

        A model card that is there stays.

        Args:
            repo_id: `owner/name`.
            private: create it as a private repository.
            token: of an account that may write there; None: that of `hf auth login`.

        Raises:
            LdmError: the Hub could not be reached, or refused.
        """
        return hub.push(self.save_pretrained, repo_id, "Upload an autoencoder", private, token)


def find_pretrained(
    name_or_path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """Find the file or folder of that name, or fetch the Hub repository of that name."""
    subfolder = (subfolder or "").strip("/")
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in FILES]
    wanted += [CARD_FILE] if subfolder else []  # of the whole, with its licence
    found = hub.find(name_or_path, wanted, revision)
    path = found / subfolder
    if found != Path(name_or_path).expanduser() and not (path / CONFIG_FILE).is_file():
        raise LdmError(
            f"{name_or_path} on the Hugging Face Hub holds no {subfolder or '.'}/{CONFIG_FILE}: "
            "name the folder that has one, in a pipeline mostly vae, as its subfolder"
        )
    return path
