"""The Hub's client, with repositories in a folder: what is asked of it is written down."""

from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import huggingface_hub
from huggingface_hub.utils import filter_repo_objects

FUNCTIONS = (
    "snapshot_download", "create_repo", "model_info", "create_branch", "file_exists",
    "upload_folder",
)  # fmt: skip


def fake_hub(root: Path, monkeypatch, public: bool = False) -> dict[str, Any]:
    """Replace the client's functions, and return what they are asked.

    Args:
        public: every repository stays public, as one that exists.
    """
    asked: dict[str, Any] = {}

    def snapshot_download(
        repo_id, *, revision=None, allow_patterns=None, token=None, cache_dir=None
    ):
        asked["download"] = (repo_id, revision, allow_patterns)
        asked["access"] = (token, cache_dir)
        snapshot = root.parent / "snapshots" / repo_id
        names = [p.relative_to(root / repo_id) for p in (root / repo_id).rglob("*") if p.is_file()]
        for name in filter_repo_objects(map(str, names), allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes((root / repo_id / name).read_bytes())
        return str(snapshot)

    def create_repo(repo_id, *, token=None, private=None, exist_ok=False):
        asked["create"] = (repo_id, token, private, exist_ok)
        return f"https://huggingface.co/{repo_id}"

    def model_info(repo_id, *, token=None):
        return SimpleNamespace(private=asked["create"][2] and not public)

    def create_branch(repo_id, *, branch, token=None, exist_ok=False):
        asked["branch"] = (repo_id, branch, token, exist_ok)

    def file_exists(repo_id, filename, *, revision=None, token=None):
        return (root / repo_id / filename).exists()

    def upload_folder(*, repo_id, folder_path, token=None, commit_message=None, revision=None):
        asked["upload"] = (repo_id, token, sorted(p.name for p in Path(folder_path).iterdir()))
        asked["commit"] = (commit_message, revision)
        copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    fakes = locals()
    for name in FUNCTIONS:
        monkeypatch.setattr(huggingface_hub, name, fakes[name])
    return asked
