"""Repositories of the Hub, found and pushed to, and model cards. Nothing goes online."""

from inspect import signature
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from ldm import hub
from ldm.errors import LdmError, UsageError
from tests.fake_hub import FUNCTIONS, fake_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORGERIES = (
    "mit\n---\n# forged", "a: [b", "x\u2028y", "`code` **bold** <b>", "| cell |", "\x1b[2K",
    "{repo_id}", "", "   ", "x" * 5000,
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The real client without a connection, and one repository in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--me--x"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_fakes_have_the_signatures_of_the_client():
    def parameters(name):
        return signature(getattr(huggingface_hub, name)).parameters.keys()

    theirs = {name: parameters(name) for name in FUNCTIONS}
    with pytest.MonkeyPatch.context() as patch:
        fake_hub(Path("hub"), patch)
        assert all(parameters(name) <= theirs[name] for name in FUNCTIONS)


# ------------------------------------------------------------------------------------ finding
def test_what_is_here_comes_before_a_repository_of_that_name(asked):
    Path("me/x").mkdir(parents=True)
    assert hub.find("me/x", ["config.json"]) == Path("me/x")
    assert "download" not in asked
    with pytest.raises(UsageError, match="is on this machine: only a repository of the Hub has a"):
        hub.find("me/x", ["config.json"], revision="main")


@pytest.mark.parametrize("name", [Path("me/x"), "runs/gone", "nowhere", "a/b.pt", "./a/b", ""])
def test_paths_and_runs_are_never_looked_for_online(asked, name):
    if name == "":
        assert hub.find(name, []) == Path()
        return
    with pytest.raises(LdmError, match="it is no file or folder here, nor the name of a repo"):
        hub.find(name, ["config.json"])
    assert "download" not in asked


def test_every_argument_reaches_the_client(asked):
    hub.find("me/x", ("a.json", "b*"), "v2", "secret", "kept")
    assert asked["download"] == ("me/x", "v2", ["a.json", "b*"])
    assert asked["access"] == ("secret", "kept")


def test_what_was_fetched_before_is_found_offline(offline, tmp_path):
    for revision in (None, "main", COMMIT):
        found = hub.find("me/x", ["config.json"], revision, cache_dir=tmp_path / "cache")
        assert found.resolve() == offline.resolve()


@pytest.mark.parametrize("revision", [None, "v2"])
def test_what_was_not_fetched_is_one_line_offline(offline, tmp_path, revision):
    with pytest.raises(LdmError, match="could not be fetched from the Hugging Face") as caught:
        hub.find("me/y", ["config.json"], revision, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ pushing
def card_and_weights(folder):
    (folder / "README.md").write_text("a card")
    (folder / "model.safetensors").write_bytes(b"weights")


def test_push_creates_a_repository_and_uploads(asked):
    url = hub.push(card_and_weights, "me/x", "A message", True, "secret", "v2")
    assert url == "https://huggingface.co/me/x"
    assert asked["create"] == ("me/x", "secret", True, True)
    assert asked["branch"] == ("me/x", "v2", "secret", True)
    assert asked["upload"] == ("me/x", "secret", ["README.md", "model.safetensors"])
    assert asked["commit"] == ("A message", "v2")


def test_main_branch_and_pull_requests_are_not_created(asked):
    for revision in (None, "refs/pr/1"):
        hub.push(card_and_weights, "me/x", "A message", revision=revision)
        assert "branch" not in asked and asked["commit"][1] == revision


def test_a_card_on_the_hub_stays_and_a_line_says_so(asked, tmp_path, capsys):
    for _ in range(2):
        hub.push(card_and_weights, "me/x", "A message")
        (tmp_path / "hub/me/x/README.md").write_text("my own")
    assert asked["upload"][2] == ["model.safetensors"]
    assert (tmp_path / "hub/me/x/README.md").read_text() == "my own"
    assert capsys.readouterr().out == "note: me/x keeps the model card that it has\n"


def test_private_never_means_a_public_repository(tmp_path, monkeypatch):
    asked = fake_hub(tmp_path / "hub", monkeypatch, public=True)
    with pytest.raises(LdmError, match="me/x exists, and is public: make it private"):
        hub.push(card_and_weights, "me/x", "A message", private=True)
    assert "upload" not in asked
    hub.push(card_and_weights, "me/x", "A message")


@pytest.mark.parametrize("fails", ["create_repo", "upload_folder"])
def test_a_refusal_is_one_line_without_the_token(asked, monkeypatch, fails):
    def refuse(*_args, **_kwargs):
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(huggingface_hub, fails, refuse)
    saved = []
    with pytest.raises(LdmError) as caught:
        hub.push(saved.append, "me/x", "A message", token="secret")
    text = str(caught.value)
    assert "could not push to me/x on the Hugging Face Hub (ConnectionError: no route)" in text
    assert "log in with `hf auth login`" in text and "\n" not in text and "secret" not in text
    assert bool(saved) == (fails == "upload_folder")  # which may take long


@pytest.mark.parametrize("name", ["x", "a/b/c", 'me/x"\n', "/me/x", ""])
def test_what_is_no_repository_is_not_pushed_to(asked, name):
    with pytest.raises(UsageError, match="it must be owner/name"):
        hub.push(card_and_weights, name, "A message")
    assert "create" not in asked


# ----------------------------------------------------------------------------------- the card
@pytest.mark.parametrize("text", FORGERIES)
def test_front_matter_cannot_be_forged(text):
    head = hub.front_matter(text, tags=[text, "b"])
    assert head.count("\n---") == 1 and head.endswith("\n---") and head.isascii()
    tree = yaml.safe_load(head.removesuffix("---"))
    assert tree["tags"] == [text, "b"] and tree["library_name"] == "ldm"
    assert tree.get("license") == ("other" if text else None)
    assert tree.keys() <= {"library_name", "tags", "license", "license_name"}


def test_licences_that_the_hub_does_not_know_have_a_name():
    assert hub.front_matter("openrail++").endswith('\nlicense: "openrail++"\n---')
    unknown = yaml.safe_load(hub.front_matter("FLUX.1 [dev] Licence").removesuffix("---"))
    assert unknown["license"] == "other" and unknown["license_name"] == "flux.1-dev-licence"
    for nothing in (None, "", ["mit"], {"a": 1}, 3):
        assert "license" not in hub.front_matter(nothing)


@pytest.mark.parametrize("text", FORGERIES)
def test_inline_code_cannot_be_left(text):
    shown = hub.code(text)
    assert shown.count("`") == 2 and shown[0] == shown[-1] == "`" and len(shown) < 500
    assert shown.isprintable() and "|" not in shown and shown != "``"
