"""Model cards of pipelines: what they state, what they leave out, and that nothing forges them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autoencoders import load_autoencoder
from ldm.checkpoint import load_model, save_model
from ldm.files import write_json
from pipelines.model_card import last_name, published
from pipelines.sample import sample_images
from pipelines.train_diffusion import train_diffusion
from tests.pipelines.report.run_folders import stage_two
from tests.pipelines.untrained import CLASSES, load, make_model
from tests.small import diffusion_recipe, sdvae

ESC = "\x1b[2K`|**x**<b>\n---\nlicense: forged\n# forged\n| a | b |"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def card(pipe, name="saved"):
    """The text of the card, and its front matter."""
    pipe.save_pretrained(name, samples=0)
    text = Path(name, "README.md").read_text("utf-8")
    _, head, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return text, yaml.safe_load(head)


def rows(text):
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def measure(pipe, path, **other):
    """Write what `ldm fid` would, of samples of a pipeline."""
    made = {"model": {"path": "/home/me/run", **pipe.identifiers}, "seed": 3, "steps": 30,
            "sampler": "dpmpp-2m", "guidance": 1.5, "precision": "bf16", "labels": None,
            "weaker": {"path": "/home/me/weak", "sha256": "abcdef0123456789"}}  # fmt: skip
    tree = {
        "fid": 12.5, "fid_interval": {"std": 0.25}, "kid": 0.002, "kid_std": 0.001, "recall": None,
        "swd": {"mean": 8.0}, "mode": "clean", "warnings": [],
        "samples": {"path": "/home/me/run/samples/s", "count": 5000, "made_with": made},
        "reference": {"what": "/home/me/faces, train: 900 images", "split": "train", "count": 900,
                      "data": {"source": "/home/me/faces"}},
        "extractor": {"name": "inception-2015-12-05.pt, clean resizing", "is_published": True},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, tree | other)


# ---------------------------------------------------------------------------------- the facts
def test_a_card_states_how_the_model_was_trained():
    run = stage_two(Path("run"))
    file = load_model(run, "diffusion")
    facts = {"images_seen": 12_345, "versions": {"ldm": "9.8", "torch": "7.6"}}
    save_model(run / "ckpt.pt", replace(file, provenance=file.provenance | facts))
    text, head = card(load(run))
    assert "A latent diffusion model of 32×32 images" in text
    assert "Trained on `photos`, 12,345 images seen, in batches of 4, preset `tiny`." in text
    assert "average of half-life 3,000 images." in text and "`ldm 9.8, torch 7.6`" in text
    assert file.sha256 in text and file.autoencoder.sha256 in text
    assert head["library_name"] == "ldm" and "latent-diffusion" in head["tags"]
    assert head["pipeline_tag"] == "unconditional-image-generation" and "license" not in head
    again, _ = card(load(Path("saved")), "again")
    assert again == text


def test_a_bare_checkpoint_states_no_more_than_it_holds():
    text, head = card(load(make_model(Path("run"), 0, CLASSES)))
    assert "3 classes: `cat`, `dog`, `emu`." in text and "pipeline_tag" not in head
    for absent in ("Numbers", "images seen", "preset", "Written with", "FID", "Samples"):
        assert absent not in text


def test_averages_are_named():
    run = make_model(Path("run"), 0, settings=("ema_half_life_images=0",))
    assert "Weights: the last ones, not an average." in card(load(run))[0]
    file = load_model(run, "diffusion")
    save_model(run / "ckpt.pt", replace(file, provenance=file.provenance | {"ema_std": 0.07}))
    assert "a power-function average of relative width `0.07`" in card(load(run), "two")[0]


@pytest.mark.slow
def test_the_licence_of_given_weights_binds_what_is_made_of_them(tmp_path):
    """From a folder of diffusers through a training to the card."""
    from autoencoders.sdvae.formats import write_diffusers

    write_diffusers(tmp_path / "theirs/vae", sdvae(), 0.3)
    (tmp_path / "theirs/vae/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    recipe = diffusion_recipe(tmp_path / "theirs/vae", "steps=2", "data.workers=0")
    run = train_diffusion(recipe, "tiny", Path("run"))
    pipe = load(run)
    assert pipe.codec.autoencoder.settings["scaling_factor"] == 0.3
    text, head = card(pipe)
    assert head["license"] == "cc-by-nc-4.0"
    assert "autoencoder was made from `vae`, whose licence is `cc-by-nc-4.0`." in text
    assert str(tmp_path) not in text and "8 images seen" in text
    again, _ = card(load(Path("saved")), "again")
    assert again == text


# --------------------------------------------------------------------------------- the numbers
def test_numbers_stand_with_their_provenance():
    pipe = load(stage_two(Path("run")))
    measure(pipe, Path("run/samples/s/fid.json"))
    measure(pipe, Path("run/fid/s-n5000.json"), fid=11.0, fid_interval=None, swd=None)
    text, _ = card(pipe)
    header, rule, *found = rows(text[text.index("## Numbers") :])
    assert header[3:] == ["FID", "KID ×10³", "SWD ×10³"] and len(rule) == 6
    kid = "2.000\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.000"
    samples = "`5,000 images, seed 3, steps30-dpmpp-2m-guidance1.5, guide abcdef012345, "
    for row in found:
        assert row[0] == samples + "precision bf16`"
        assert row[1:3] == [
            "`faces, train, 900 images`", "`inception-2015-12-05.pt, clean resizing`"
        ]  # fmt: skip
    assert [row[3:] for row in found] == [
        ["11.000", kid, ""],
        ["12.500\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.250", kid, "8.00"],
    ]
    assert "/home/me" not in text


def test_numbers_of_other_weights_are_left_out():
    pipe = load(stage_two(Path("run")))
    other = load(make_model(Path("other"), 1))
    measure(other, Path("run/fid/other.json"))
    measure(pipe, Path("run/fid/unknown.json"), samples={"count": 3})
    write_json(Path("run/fid/list.json"), [])
    Path("run/fid/broken.json").write_text("{")
    text, _ = card(pipe)
    assert "Numbers" not in text
    # the same file in another folder
    measure(pipe, Path("run/fid/ours.json"))
    assert "12.500" in card(pipe, "two")[0]


def test_measured_samples_of_a_run_are_found(monkeypatch, weights):
    from pipelines.fid import measure_fid

    run = stage_two(Path("run"))
    out = sample_images(run, 10, device="cpu", precision="fp32", steps=2)
    result = measure_fid(out, "photos", weights=weights, device="cpu", force=True)
    text, _ = card(load(run))
    ((row),) = rows(text[text.index("## Numbers") :])[2:]
    assert row[0] == "`10 images, seed 0, steps2, precision fp32`"
    assert row[1].startswith("`photos, all, ") and row[2].endswith("not the published weights`")
    assert row[3].startswith(f"{result['fid']:.3f}")
    assert "the network is not the published Inception" in text


def test_warnings_stand_without_paths():
    pipe = load(stage_two(Path("run")))
    warnings = [
        "/home/me/faces, train: 900 images were downsampled by box, and others by lanczos",
        "1 of 10 samples (such as /home/me/run/samples/s/0.png) are images of the reference",
        "C:\\Users\\me\\x differs from ~/y/z, and/or from 1/2",
    ]
    measure(pipe, Path("run/fid/ours.json"), warnings=[*warnings, warnings[0], 3])
    text, _ = card(pipe)
    notes = [line for line in text[text.index("## Numbers") :].splitlines() if line[:2] == "- "]
    assert notes == [
        "- `faces, train: 900 images were downsampled by box, and others by lanczos`",
        "- `1 of 10 samples (such as s/0.png) are images of the reference`",
        "- `x differs from z, and/or from 1/2`",
        "- `3`",
    ]


# ------------------------------------------------------------------------------- no forgeries
def test_text_from_files_forges_neither_yaml_nor_markdown():
    run = stage_two(Path("run"))
    file = load_model(run, "diffusion")
    origin = {"source": ESC, "format": ESC, "license": ESC, "imported": {"source": ESC}}
    known = {"images_seen": ESC, "versions": {ESC: ESC}, "ema_std": ESC, "created": ESC}
    config = file.config | {"data": file.config["data"] | {"source": ESC}}
    inner = replace(file.autoencoder, provenance={"imported": origin})
    classes = [ESC, "b", "c"]
    model = make_model(Path("model"), 0, CLASSES)
    for path, other in ((run, {}), (model, {"imported": origin})):
        file = load_model(path, "diffusion")
        save_model(
            path / "ckpt.pt",
            replace(
                file, provenance=file.provenance | known | other, autoencoder=inner,
                config=file.config | {"data": config["data"]},
                statistics=file.statistics | ({"classes": classes} if path is model else {}),
            ),
        )  # fmt: skip
        write_json(path / "run.json", {"kind": "diffusion", "preset": ESC})
        pipe = load(path)
        measured = {"what": ESC, "split": ESC, "data": {"source": ESC}}
        measure(pipe, path / "fid/a.json", warnings=[ESC], reference=measured,
                extractor={"name": ESC})  # fmt: skip
        text, head = card(pipe, f"saved-{path.name}")
        assert head["license"] == "other" and text.count("\n---\n") == 1
        assert text.count("\n# ") == 1 and text.count("\n## ") == 2
        spaces = text.replace("\N{NO-BREAK SPACE}", " ")
        assert all(line.isprintable() for line in spaces.splitlines())
        assert spaces.count(" ± ") == 2 and len(rows(text)) == 3
        outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        assert "`" not in outside and "<b>" not in outside and "**" not in outside
        assert outside.count("forged") == 2  # the licence's name, in the front matter


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/me/ffhq256", "ffhq256"), ("data/ffhq256/", "ffhq256"), ("photos", "photos"),
        ("C:\\data\\ffhq.zip", "ffhq.zip"), ("runs/ae/ckpt.pt", "ae"), ("runs/ae/best.pt", "ae"),
        ("a/{000..009}.tar", "{000..009}.tar"), ("ckpt.pt", "ckpt.pt"), ("/", "unknown"),
        (".", "unknown"), ("", "unknown"), ("/a/ckpt-ema0.07.pt", "ckpt-ema0.07.pt"),
        ("hf:me/faces@main:train", "hf:me/faces@main:train"), ("hf://me/faces", "faces"),
        ("/data/ckpt", "ckpt"), ("/data/best.zip", "best.zip"), ("a/ckpt.safetensors", "a"),
    ],
)  # fmt: skip
def test_a_path_becomes_its_last_name(path, name):
    assert last_name(path) == name


def test_a_source_on_the_hub_keeps_its_owner_and_a_path_does_not():
    run = make_model(Path("run"), 0)
    pipe = load(run)
    known = {"license": "mit", "sha256": {"a.safetensors": "f00d"}}
    for source, commit, shown in (
        ("stabilityai/sd-vae", {"commit": "c0ffee"}, "stabilityai/sd-vae"),
        ("stabilityai/sd-vae", {}, "sd-vae"),
        ("/me/hub/snapshots/c0ffee", {"commit": "c0ffee"}, "c0ffee"),
    ):
        pipe.autoencoder_origin = {"source": source, "command": "/me", **known, **commit}
        kept = published(pipe).autoencoder.provenance["imported"]
        assert kept == {"source": shown, **known, **commit}


def test_an_imported_autoencoder_keeps_no_path_in_its_config():
    from tests.autoencoders import other_models

    pipe = load(make_model(Path("run"), 0))
    other_models.tiny().save_pretrained("tiny")
    tiny = load_autoencoder("tiny")
    described = tiny.config.encoder.described | {"_name_or_path": "/home/me/vae"}
    encoder = tiny.config.encoder.model_copy(update={"described": described})
    tiny.config = tiny.config.model_copy(update={"encoder": encoder, "decoder": encoder})
    pipe.codec.autoencoder = tiny
    config = published(pipe).autoencoder.config
    assert config["encoder"]["described"]["_name_or_path"] == "vae"
    assert config["encoder"]["described"].keys() >= {"_class_name", "latent_channels"}
