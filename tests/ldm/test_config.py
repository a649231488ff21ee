import json
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from ldm.config import (
    Config,
    Resolution,
    describe,
    did_you_mean,
    flatten,
    format_size,
    height_width,
    key_paths,
    list_presets,
    load_preset,
    merge,
    parse_override,
    pixel_count,
    preset_summary,
    resolve,
    short_size,
    size_word,
    to_tree,
    validate,
)
from ldm.errors import UsageError


class Round(Config):
    type: Literal["round"] = "round"
    radius: float = 1.0
    """Radius, in metres."""


class Square(Config):
    type: Literal["square"] = "square"
    side: float = 1.0
    """Side, in metres."""


class Stage(Config):
    steps: int = 10
    """Steps."""


class Thing(Config):
    shape: Annotated[Round | Square, Field(discriminator="type")] = Round()
    """Its look."""
    stages: tuple[Stage, ...] = (Stage(),)
    """In turn."""
    name: str = "thing"
    """Its name."""
    lr: float = 1e-3
    """Learning rate."""
    limit: float | None = None
    """At most."""


def refused(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(Thing, {}, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_reach_every_depth():
    thing = resolve(Thing, {"name": "a"}, ["shape.radius=2", "lr=3e-4", "limit=null", "name=b"])
    assert (thing.shape.radius, thing.lr, thing.limit, thing.name) == (2.0, 3e-4, None, "b")


def test_a_list_takes_an_index_or_a_whole_value():
    tree = {"stages": [{"steps": 1}, {"steps": 2}]}
    assert resolve(Thing, tree, ["stages.1.steps=7"]).stages[1].steps == 7
    assert resolve(Thing, tree, ["stages=[{steps: 5}]"]).stages == (Stage(steps=5),)
    with pytest.raises(UsageError, match="entries 0 to 1"):
        resolve(Thing, tree, ["stages.2.steps=7"])
    with pytest.raises(UsageError, match=r"needs an index, such as stages\.0\.steps"):
        resolve(Thing, tree, ["stages.steps=7"])
    with pytest.raises(UsageError, match=r"did you mean 'stages\.0\.steps'"):
        resolve(Thing, tree, ["steps=7"])


def test_another_type_replaces_the_section_in_any_order():
    tree = {"shape": {"type": "round", "radius": 3}}
    for order in (["shape.type=square", "shape.side=4"], ["shape.side=4", "shape.type=square"]):
        assert resolve(Thing, tree, order).shape == Square(side=4)
    assert merge(tree, {"shape": {"type": "square"}}) == {"shape": {"type": "square"}}


def test_resolve_does_not_change_its_argument():
    tree = {"shape": {"type": "round", "radius": 3}}
    resolve(Thing, tree, ["shape.radius=5"])
    assert tree == {"shape": {"type": "round", "radius": 3}}


def test_unknown_key_offers_the_nearest():
    assert "unknown key 'nme'; did you mean 'name'?" in refused("nme=b")
    assert "did you mean 'shape.radius'?" in refused("shape.radus=1")


def test_a_key_of_another_section_is_found_by_its_last_part():
    assert "did you mean 'shape.radius'?" in refused("radius=1")


def test_a_key_of_another_variant_is_refused():
    assert "unknown key 'shape.side'" in refused("shape.side=1")


def test_wrong_type_names_path_and_expected_type():
    text = refused("shape.radius=wide")
    assert "'shape.radius'" in text and "number" in text and "'wide'" in text
    assert "'stages.0.steps'" in refused("stages=[{steps: few}]")


def test_several_problems_are_still_one_line():
    assert refused("shape.radius=wide", "lr=low").endswith("(and 1 more)")


def test_malformed_overrides_are_refused():
    assert "key=value" in refused("name")
    assert "not YAML" in refused("name=[")


def test_a_key_below_a_value_is_refused():
    assert "'stages.0.steps': input should be a valid integer" in refused("stages.0.steps.more=1")
    assert "'lr': input should be a valid number" in refused("lr.more=1")
    assert "'shape': input tag" in refused("shape.type=round", "shape.type.more=square")


def test_overrides_are_yaml():
    assert parse_override("a.b=[1, 2]") == (["a", "b"], [1, 2])
    assert parse_override("a=b=c") == (["a"], "b=c")


@pytest.mark.parametrize("word", ["2024", "no", "1e5", "0123", "2024-01-02", "null", "[a]", "a: b"])
def test_strings_are_not_parsed_as_yaml(word):
    assert resolve(Thing, {}, [f"name={word}"]).name == word
    assert resolve(Thing, {}, ["stages=[{steps: 1}]", f"name= {word} "]).name == word


def test_only_string_fields_become_strings():
    text = refused("stages.0.steps=[3]", "name=2024")
    assert "'stages.0.steps'" in text and text.endswith("(got [3])")
    assert resolve(Thing, {}, ["name=2024", "limit=null"]).limit is None


def test_round_numbers_may_be_written_with_an_exponent():
    thing = resolve(Thing, {}, ["stages.0.steps=1e5", "lr=1e-4", "limit=-2.5E3"])
    assert (thing.stages[0].steps, thing.lr, thing.limit) == (100_000, 1e-4, -2500.0)
    assert resolve(Thing, {}, ["stages=[{steps: 2e3}]"]).stages[0].steps == 2000
    assert "'stages.0.steps'" in refused("stages.0.steps=1e-1")
    assert parse_override("a=1e5x") == (["a"], "1e5x")


def test_tree_and_back():
    thing = resolve(Thing, {}, ["shape={type: square, side: 2}"])
    assert resolve(Thing, yaml.safe_load(yaml.safe_dump(to_tree(thing)))) == thing


def test_describe_is_yaml_with_every_docstring():
    lines = list(describe(Thing()))
    assert yaml.safe_load("\n".join(line for line, _ in lines)) == to_tree(Thing())
    docs = dict(lines)
    assert docs["lr: 0.001"] == "Learning rate."
    assert docs["  radius: 1.0"] == "Radius, in metres."


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Thing().name = "other"


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(UsageError, match="no preset 'litevae-c'; did you mean 'litevae-"):
        load_preset("ae", "litevae-c")


def test_a_preset_lies_over_its_base():
    base, over = load_preset("ae", "litevae-b"), load_preset("ae", "litevae-m")
    assert over["encoder"]["extractor"]["channels"] == 64
    assert over["encoder"]["aggregator"] == base["encoder"]["aggregator"]
    assert "base" not in over


@pytest.mark.parametrize("kind", ["ae", "diffusion"])
def test_every_preset_resolves_and_has_a_summary(kind):
    from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

    recipe = {"ae": AutoencoderRecipe, "diffusion": DiffusionRecipe}[kind]
    for name in list_presets(kind):
        assert resolve(recipe, load_preset(kind, name))
        assert len(preset_summary(kind, name)) > 20, name


def test_every_setting_has_a_docstring():
    from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

    for kind, recipe in (("ae", AutoencoderRecipe), ("diffusion", DiffusionRecipe)):
        for name in list_presets(kind):
            for line, doc in describe(resolve(recipe, load_preset(kind, name))):
                assert doc or line.strip().startswith("type:"), f"{kind}/{name}: {line}"
    assert "phases.steps" in set(key_paths(AutoencoderRecipe))


def test_describe_lists_choices():
    from pipelines.recipes import AutoencoderRecipe

    config = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"))
    docs = {line.strip().partition(":")[0]: doc for line, doc in describe(config)}
    assert docs["encoder"].endswith("[type=litevae | type=sdvae | type=dwt]")
    assert docs["aggregator"].endswith("[type=unet | type=vit]")
    assert docs["discriminator"].endswith("[type=unet | type=patchgan | type=stylegan]")
    assert docs["weighting"].endswith("[constant | adaptive]")


def test_a_long_list_of_names_is_cut():
    printed = did_you_mean("zzz", [f"name{i:03d}" for i in range(100)])
    assert printed.startswith("; there are: name000, ") and printed.endswith(", and 88 more")


def test_flatten_names_every_value_by_its_dotted_key():
    tree = {"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": {}, "g": None}
    assert flatten(tree) == {"a.b.c": 1, "a.d": [{"e": 2}], "f": {}, "g": None}


# --------------------------------------------------------------------------------- resolutions
class Sized(Config):
    """Images."""

    resolution: Resolution = 64
    """Their size."""


@pytest.mark.parametrize(
    ("given", "found", "dumped"),
    [("96", 96, 96), ("[96, 64]", (96, 64), [96, 64]), ("[64, 64]", 64, 64)],
)
def test_a_resolution_is_one_number_or_height_and_width(given, found, dumped):
    config = resolve(Sized, {}, [f"resolution={given}"])
    assert config.resolution == found
    assert to_tree(config) == {"resolution": dumped}
    assert validate(Sized, to_tree(config)) == config
    assert validate(Sized, json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("given", ["[0, 64]", "[96]", "[96, 64, 3]", "x96", "0", "null", "96x64"])
def test_other_resolutions_are_refused_in_one_line(given):
    with pytest.raises(UsageError, match="'resolution': must be a number of pixels") as error:
        resolve(Sized, {}, [f"resolution={given}"])
    assert "\n" not in str(error.value)


def test_a_size_names_its_height_first():
    assert (format_size((96, 64)), short_size((96, 64)), size_word((96, 64))) == (
        "96×64", "96×64", "96x64",
    )  # fmt: skip
    assert (format_size(64), short_size(64), size_word(64)) == ("64×64", "64²", "64")
    assert (height_width(64), pixel_count((96, 64))) == ((64, 64), 6144)
