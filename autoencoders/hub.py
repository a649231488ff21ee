"""Autoencoders as folders of the Hugging Face Hub's conventions, from the Hub and onto it.

config.json         library, kind and version, the config, and the usage settings of an import
model.safetensors   the weights, by our names
README.md           the model card
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from operator import methodcaller
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from autoencoders.sdvae.formats import pick_settings
from ldm.checkpoint import read_safetensors, shown
from ldm.config import to_tree
from ldm.errors import LdmError, UsageError
from ldm.files import to_json, write_together
from ldm.foreign import to_safetensors
from ldm.run_folder import installed_version

LIBRARY, MODEL_TYPE, FORMAT = "ldm", "autoencoder", 1
WEIGHTS_FILE = "model.safetensors"
# owner/name, as the Hub allows it, unless it ends like a file
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)(?<!\.ckpt)(?<!\.bin)(?<!\.safetensors)")
LOG_IN = "log in with `hf auth login`"
# a repository often holds the same weights several times: fetch one copy
FILES = ("config.json", WEIGHTS_FILE, "diffusion_pytorch_model*.safetensors")

CARD = """---
library_name: {library}
tags: [autoencoder, latent-diffusion, {encoder}]
---

# An image autoencoder ({encoder})

Images (3, H, W) in [−1, 1] ↔ latents ({n_z}, H/{f}, W/{f}); {parameters:,} parameters.

```python
from autoencoders import Autoencoder

ae = Autoencoder.from_pretrained("this repository")
latents = ae.encode(images).mode()
recon = ae.decode(latents)
```
"""


class HubMixin(nn.Module, ABC):
    """The Hub's three methods, for an autoencoder that has a `config` and a `load`."""

    config: Any
    downsampling: int

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Load a trained model from a file or a folder on this machine."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Load a trained autoencoder, in eval mode, from this machine or the Hub.

        Args:
            name_or_path: a path for `load_autoencoder`, or a repository (`owner/name`) of ours or
                of a diffusers `AutoencoderKL`.
            revision: branch, tag or commit of the repository.
            subfolder: folder of the model inside it, such as `vae`.

        Raises:
            LdmError: it is neither here nor on the Hub, or cannot be read.
        """
        return cls.load(find_pretrained(name_or_path, revision, subfolder), device)

    def save_pretrained(
        self, folder: str | Path, imported: Mapping[str, Any] | None = None
    ) -> list[Path]:
        """Write config.json, model.safetensors and, unless there is one, a model card.

        Args:
            imported: the config that the model came with from another toolkit; its usage settings
                are kept.

        Returns:
            The files written.

        Raises:
            LdmError: the folder cannot be written.
        """
        folder = Path(folder)
        described = {
            "library_name": LIBRARY,
            "model_type": MODEL_TYPE,
            "format": FORMAT,
            "version": installed_version(LIBRARY),
            "config": to_tree(self.config),
        }
        if settings := pick_settings(imported):
            described["imported"] = settings
        files = {
            folder / WEIGHTS_FILE: to_safetensors(self.state_dict()),
            folder / "config.json": to_json(described),
        }
        readme = folder / "README.md"
        if not readme.exists():  # keep a card that somebody wrote
            card = CARD.format(
                library=LIBRARY, encoder=self.config.encoder.type, n_z=self.config.latent_channels,
                f=self.downsampling, parameters=sum(p.numel() for p in self.parameters()),
            )  # fmt: skip
            files = {readme: card.encode(), **files}
        write_together({path: methodcaller("write", text) for path, text in files.items()})
        return list(reversed(files))

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
        import huggingface_hub as hub

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                url = hub.create_repo(repo_id, token=token, private=private, exist_ok=True)
                if hub.file_exists(repo_id, "README.md", token=token):
                    (Path(folder) / "README.md").unlink()
                hub.upload_folder(
                    repo_id=repo_id, folder_path=folder, token=token,
                    commit_message="Upload an autoencoder",
                )  # fmt: skip
            except Exception as error:  # the client lets through whatever its own libraries raise
                raise LdmError(
                    f"could not push to {repo_id} on the Hugging Face Hub ({_brief(error)}): check "
                    f"the connection and the name, and {LOG_IN}"
                ) from error
        return str(url)


def find_pretrained(
    name_or_path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """Find the file or folder of that name, or fetch the Hub repository of that name."""
    path, subfolder = Path(name_or_path), (subfolder or "").strip("/")
    if path.exists():
        if revision:
            raise UsageError(
                f"{path} is on this machine: only a repository of the Hub has a revision"
            )
        return path / subfolder
    if not REPOSITORY.fullmatch(str(name_or_path)):
        raise LdmError(
            f"no model at {name_or_path}: it is no file or folder here, nor the name of a "
            "repository on the Hugging Face Hub (owner/name)"
        )
    path = _fetch(str(name_or_path), revision, subfolder) / subfolder
    if not (path / "config.json").is_file():
        raise LdmError(
            f"{name_or_path} on the Hugging Face Hub holds no {subfolder or '.'}/config.json: "
            "name the folder that has one, in a pipeline mostly vae, as its subfolder"
        )
    return path


def read_pretrained(
    folder: Path, described: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a folder of `save_pretrained` with this config.json: (tree of a config, weights)."""
    kind, form, tree = (described.get(key) for key in ("model_type", "format", "config"))
    if kind != MODEL_TYPE or not isinstance(tree, dict):
        raise LdmError(f"{folder}/config.json describes no autoencoder, but a model_type {kind!r}")
    if not isinstance(form, int) or form > FORMAT:
        raise LdmError(
            f"{folder} has format {shown(form)}, this version reads up to {FORMAT}: upgrade ldm"
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: copy or fetch it again")
    return tree, read_safetensors(path)


def _fetch(repo_id: str, revision: str | None, subfolder: str) -> Path:
    import huggingface_hub as hub

    wanted = [f"{subfolder}/{name}" if subfolder else name for name in FILES]
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client lets through whatever its own libraries raise
        raise LdmError(
            f"{repo_id} is no file or folder here, and could not be fetched from the Hugging Face "
            f"Hub ({_brief(error)}): check name and connection, "
            f"{f'{LOG_IN}, ' if _is_refused(error) else ''}or give a folder on this machine"
        ) from error


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line.strip().rstrip(".:") for line in lines[:1])])


def _is_refused(error: Exception) -> bool:
    """Return whether the Hub asked for a login, as it also does for a name that does not exist."""
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
