"""The Hugging Face Hub: repositories, found, fetched and pushed to, and the text of model cards;
and published weights, found in the usual caches or downloaded once.

A repository of ours, or a folder of `save_pretrained`, holds

config.json         library, kind, format and version, the config, the SHA-256 of the model
model.safetensors   the weights
README.md           the model card
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from urllib.request import Request, urlopen

from ldm.errors import LdmError, UsageError, brief, escape, refuse_newer
from ldm.files import write_atomically
from ldm.logbook import console, show_progress
from ldm.run_folder import RUNS, installed_version

LIBRARY, FORMAT = "ldm", 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
# owner/name, as the Hub allows it, unless it ends like a file
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.pt)(?<!\.ckpt)(?<!\.bin)(?<!\.safetensors)")
LOG_IN = "log in with `hf auth login`"
LICENSES = {
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "cc0-1.0", "cc-by-4.0",
    "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "openrail++",
    "creativeml-openrail-m",
}  # fmt: skip
"""Names that the Hub knows; it takes any other one as the `license_name` of the licence `other`."""
LONGEST = 400
"""Characters of a text from a file, in a card."""
PATIENCE = 30
"""Seconds without a byte after which a download is given up."""


# ---------------------------------------------------------------------------- repositories
def find(
    name_or_path: str | Path,
    files: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Find the file or folder of that name, else fetch the repository of that name.

    A repository is named by a string, `owner/name`; a Path, or a name in `runs/`, is of this
    machine. Without a connection, what was fetched before is found.

    Args:
        files: patterns of the files to fetch.
        revision: branch, tag or commit of the repository.
        token: of an account that may read it; None: that of `hf auth login`, if there is one.
        cache_dir: folder to fetch into; None: the Hub client's own.

    Raises:
        UsageError: a revision of what is on this machine.
        LdmError: it is neither here nor on the Hub.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        if revision:
            raise UsageError(
                f"{path} is on this machine: only a repository of the Hub has a revision"
            )
        return path
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or not _is_repository(name):
        raise LdmError(
            f"no model at {name}: it is no file or folder here, nor the name of a "
            "repository on the Hugging Face Hub (owner/name)"
        )
    import huggingface_hub as client

    try:
        return Path(
            client.snapshot_download(
                name, revision=revision, allow_patterns=[*files], token=token, cache_dir=cache_dir
            )
        )
    except Exception as error:  # the client lets through whatever its own libraries raise
        # the Hub asks for a login for a name that does not exist, too
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise LdmError(
            f"{name} is no file or folder here, and could not be fetched from the Hugging Face "
            f"Hub ({type(error).__name__}: {brief(error)}): check name and connection, "
            f"{f'{LOG_IN}, ' if status in (401, 403) else ''}or give a folder on this machine"
        ) from error


def _is_repository(name: str) -> bool:
    # a run that is not there is a slip, and nobody else's business
    return bool(REPOSITORY.fullmatch(name)) and not name.startswith(f"{RUNS.name}/")


def check_name(repo_id: str) -> None:
    """Raise a UsageError for what cannot be the name of a repository."""
    if not REPOSITORY.fullmatch(repo_id):
        raise UsageError(f"repo_id {repo_id!r}: it must be owner/name, as on the Hub")


def push(
    save: Callable[[Path], Any],
    repo_id: str,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload the files that `save` writes into a folder, and return the repository's address.

    The repository is created if needed, and before `save` is called, which may take long. A model
    card that is there stays, and a line says so.

    Args:
        repo_id: `owner/name`.
        message: of the commit.
        private: create it as a private repository; None: as its owner has set.
        token: of an account that may write there; None: that of `hf auth login`.
        revision: branch to push to, created if needed; None: the main one.

    Raises:
        UsageError: `repo_id` is no name of a repository.
        LdmError: the Hub could not be reached, or refused; or a private repository is wanted, and
            this one is public.
    """
    import huggingface_hub as client

    check_name(repo_id)

    def call(name: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(client, name)(*arguments, **options, token=token)
        except Exception as error:  # the client lets through whatever its own libraries raise
            raise LdmError(
                f"could not push to {repo_id} on the Hugging Face Hub ({type(error).__name__}: "
                f"{brief(error)}): check the connection and the name, and {LOG_IN}"
            ) from error

    url = call("create_repo", repo_id, private=private, exist_ok=True)
    # one that exists stays as public as it is
    if private and not call("model_info", repo_id).private:
        raise LdmError(f"{repo_id} exists, and is public: make it private on the Hub first")
    if revision and not revision.startswith("refs/"):
        call("create_branch", repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        if call("file_exists", repo_id, CARD_FILE, revision=revision):
            (folder / CARD_FILE).unlink(missing_ok=True)
            console.print(f"note: {repo_id} keeps the model card that it has", markup=False)
        call(
            "upload_folder", repo_id=repo_id, folder_path=folder, commit_message=message,
            revision=revision,
        )  # fmt: skip
    return str(url)


# ----------------------------------------------------------------------------- config.json
def describe(model_type: str, config: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    """Return the content of a `config.json`."""
    return {
        "library_name": LIBRARY,
        "model_type": model_type,
        "format": FORMAT,
        "version": installed_version(LIBRARY),
        "config": config,
        "sha256": sha256,
    }


def check_described(folder: Path, described: Mapping[str, Any], model_type: str, kind: str) -> Path:
    """Check that a folder's `config.json` is of a model of this kind, and return the path of its
    weights; `kind` names it in errors, as "no autoencoder"."""
    found, form, tree = (described.get(key) for key in ("model_type", "format", "config"))
    if found != model_type or not isinstance(tree, dict) or not isinstance(form, int):
        raise LdmError(f"{folder}/{CONFIG_FILE} describes {kind}, but a model_type {found!r}")
    refuse_newer(folder, form, FORMAT)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: copy or fetch it again")
    return path


# --------------------------------------------------------------------------------- the card
def front_matter(license: object, **fields: Any) -> str:
    """Return the YAML at the head of a card, values as JSON, which is YAML that nothing ends."""
    lines = [f"library_name: {LIBRARY}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    known = license if isinstance(license, str) else ""
    if known in LICENSES:
        lines.append(f"license: {json.dumps(known)}")
    elif known:
        name = re.sub(r"[^a-z0-9.+-]+", "-", known[:LONGEST].lower()).strip("-")
        lines += ["license: other", f"license_name: {json.dumps(name or 'unknown')}"]
    return "\n".join(["---", *lines, "---"])


def code(text: object) -> str:
    """Return text from a file as Markdown's inline code, in which nothing is markup, on one line
    and in a cell of a table."""
    shown = escape(text).replace("`", "'").replace("|", "¦").strip()
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
    return f"`{shown or '?'}`"


# ---------------------------------------------------------------------------- published weights
def cache_folder() -> Path:
    """Return the folder of downloaded weights: `$LDM_CACHE`, or `~/.cache/ldm`."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")


def find_or_fetch(
    name: str, url: str, hash_prefix: str, folders: Sequence[Path], instead: str
) -> Path:
    """Find the file `name` in one of `folders`, or download it into the first."""
    found = (folder / name for folder in folders if (folder / name).is_file())
    return next(found, None) or fetch(name, url, hash_prefix, folders[0], instead)


def fetch(name: str, url: str, hash_prefix: str, folder: Path, instead: str) -> Path:
    """Download the file `name` into a folder.

    It is written beside its final name, its SHA-256 checked against `hash_prefix`, and renamed: a
    broken download leaves nothing, and concurrent processes all get the complete file.

    Args:
        instead: the end of the error message: an alternative to downloading the file.
    """
    target = folder / name

    def write(file: IO[bytes]) -> None:
        digest = sha256()
        for data in _download(url, name):
            file.write(data)
            digest.update(data)
        if not (found := digest.hexdigest()).startswith(hash_prefix):
            raise ValueError(f"its SHA-256 is {found}, not {hash_prefix}…")

    try:
        write_atomically(target, write)
    except ValueError as error:
        raise LdmError(
            f"{name} is not on this machine and could not be fetched from {url} ({error}): "
            f"put the file at {from_home(target)}, or {instead}"
        ) from error
    return target


def _download(url: str, name: str) -> Iterator[bytes]:
    """Yield the parts of a file; raise a ValueError, since an OSError would be the disk's."""
    # torch.hub's download waits for ever, unless all sockets of the process are given a limit
    request = Request(url, headers={"User-Agent": LIBRARY})
    arrived = 0
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            size = int(answer.headers.get("Content-Length", 0))
            with show_progress(f"fetching {name}", size, unit="bytes") as advance:
                while data := answer.read(2**20):
                    arrived += len(data)
                    advance(len(data))
                    yield data
    except (OSError, HTTPException) as error:
        raise ValueError(getattr(error, "reason", None) or brief(error)) from error
    if arrived < size:
        raise ValueError(f"it ended after {arrived} of {size} bytes")


def from_home(path: Path) -> str:
    """Shorten a path in the home folder to `~/…`."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
