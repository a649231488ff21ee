"""Autoencoders from the Hugging Face Hub, and onto it."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from autoencoders.autoencoder import Autoencoder
from autoencoders.hub_folder import WEIGHTS_FILE, save_pretrained
from autoencoders.loading import load_autoencoder
from ldm.errors import LdmError, UsageError

# owner/name, as the Hub allows it; what ends like a file is meant as one
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)(?<!\.ckpt)(?<!\.bin)(?<!\.safetensors)")
LOG_IN = "log in with `hf auth login`"
# what is fetched: a repository often holds the same weights several times
FILES = ("config.json", WEIGHTS_FILE, "diffusion_pytorch_model*.safetensors")


def from_pretrained(
    name_or_path: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    device: str | torch.device = "cpu",
) -> Autoencoder:
    """A trained autoencoder in eval mode, from this machine or the Hub.

    Args:
        name_or_path: what `load_autoencoder` takes, or a repository (`owner/name`) of ours or of a
            diffusers `AutoencoderKL`.
        revision: branch, tag or commit of the repository.
        subfolder: where in it the model is, such as `vae`.

    Raises:
        LdmError: it is neither here nor to be fetched, or cannot be read.
    """
    return load_autoencoder(find_pretrained(name_or_path, revision, subfolder), device)


def find_pretrained(
    name_or_path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The file or folder of that name, else the folder that a Hub repository was fetched into.

    Raises:
        UsageError: a revision of what is on this machine.
        LdmError: there is neither, or the Hub could not be reached.
    """
    path, subfolder = Path(name_or_path), (subfolder or "").strip("/")
    if path.exists():
        if revision:
            raise UsageError(
                f"{path} is on this machine: only a repository of the Hub has a revision"
            )
    else:
        if not REPOSITORY.fullmatch(str(name_or_path)):
            raise LdmError(
                f"no model at {name_or_path}: it is no file or folder here, nor the name of a "
                "repository on the Hugging Face Hub (owner/name)"
            )
        path = _fetch(str(name_or_path), revision, subfolder)
        if not (path / subfolder / "config.json").is_file():
            raise LdmError(
                f"{name_or_path} on the Hugging Face Hub holds no {subfolder or '.'}/config.json: "
                "name the folder that has one, in a pipeline mostly vae, as its subfolder"
            )
    return path / subfolder


def push_to_hub(
    ae: Autoencoder, repo_id: str, private: bool = False, token: str | None = None
) -> str:
    """Save to a repository of the Hub (`owner/name`), made if it is not there; its address.

    A model card that is there stays.

    Args:
        token: of an account that may write there; None takes that of `hf auth login`.

    Raises:
        LdmError: the Hub could not be reached, or refused.
    """
    hub = _client()
    with TemporaryDirectory() as folder:
        save_pretrained(ae, folder)
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
                f"could not push to {repo_id} on the Hugging Face Hub ({_brief(error)}): check the "
                f"connection and the name, and {LOG_IN}"
            ) from error
    return str(url)


def _fetch(repo_id: str, revision: str | None, subfolder: str) -> Path:
    hub = _client()
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in FILES]
    try:
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client lets through whatever its own libraries raise
        raise LdmError(
            f"{repo_id} is no file or folder here, and could not be fetched from the Hugging Face "
            f"Hub ({_brief(error)}): check name and connection, "
            f"{f'{LOG_IN}, ' if _may_not(error) else ''}or give a folder on this machine"
        ) from error


def _client():
    try:
        import huggingface_hub
    except ImportError as error:
        raise LdmError(
            "the Hugging Face Hub needs its client: pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line.strip().rstrip(".:") for line in lines[:1])])


def _may_not(error: Exception) -> bool:
    """Whether the Hub wants to know who asks; it does of a repository that is none, too."""
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
