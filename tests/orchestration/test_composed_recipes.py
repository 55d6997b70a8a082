"""Recipes are a method on a setting: all combinations work, the listed ones are the experiments they have always been."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from models.errors import UserError
from orchestration.recipes import library, list_recipes, listed_recipes, load_recipe, split_name
from orchestration.recipes.library import method_files, read_method, read_setting, setting_files
from orchestration.recipes.matrix import matrix_lines
from orchestration.recipes.trees import merge

FINGERPRINTS = dict(line.split() for line in Path(__file__).with_name("recipe_fingerprints.txt").read_text().splitlines())
"""Of the listed recipes. One changes only where an experiment is meant to become another one, which is then trained anew."""


def all_names() -> list[str]:
    """Return every method on every setting, without and with each of its variants."""
    parts = [(method, setting, "") for method, setting in product(method_files(), setting_files())]
    parts += [
        (method, setting, variant)
        for method, setting in product(method_files(), setting_files())
        for variant in read_method(method).variants
    ]
    return ["_".join(part for part in each if part) for each in parts]


def test_listed_recipes_are_the_experiments_they_have_always_been():
    assert {name: load_recipe(name).experiment.fingerprint for name in list_recipes()} == FINGERPRINTS
    assert len(set(FINGERPRINTS.values())) == len(FINGERPRINTS), "no two are the same experiment"


@pytest.mark.parametrize("method", sorted(method_files()))
def test_a_method_works_with_every_setting(method):
    for name in all_names():
        if split_name(name).method != method:
            continue
        loaded = load_recipe(name)
        assert loaded.experiment.name == name
        assert loaded.experiment.description
        if name not in FINGERPRINTS:
            assert "no paper used this combination" in loaded.experiment.description
        assert set(loaded.origins) == set(loaded.experiment.flatten())


def test_every_name_is_split_where_it_was_joined():
    for method, setting in product(method_files(), setting_files()):
        for variant in ("", *read_method(method).variants):
            parts = split_name("_".join(part for part in (method, setting, variant) if part))
            assert (parts.method, parts.setting, parts.variant) == (method, setting, variant)


def test_origins_name_the_layer_of_each_value():
    origins = load_recipe("rna_imagenet_resnet50", ["--seed", "3"]).origins
    assert origins["defence.name"] == "method"
    assert origins["defence.pool"] == "exception"
    assert origins["training.epochs"] == "exception"
    assert origins["threat_model.epsilon"] == "setting"
    assert origins["training.redraw"] == "default"
    assert origins["seed"] == "flag"
    official = load_recipe("rna_cifar10_resnet18_official").origins
    assert official["training.optimizer.gradients_when_unused"] == "variant"
    assert load_recipe("ctrw_digits_paper").origins["defence.upper_bound"] == "variant", "a preset's values come from where it is named"
    assert load_recipe("ctrw_digits", ["--defence.preset", "paper"]).origins["defence.upper_bound"] == "flag"
    # Adam replaces the section in which the setting gave a momentum to SGD.
    assert load_recipe("adp_cifar10_resnet18").origins["training.optimizer.momentum"] == "default"


@pytest.mark.parametrize("name", sorted(FINGERPRINTS))
def test_a_value_is_the_one_of_the_layer_that_it_is_said_to_come_from(name):
    """Recomputed from the files, layer by layer, without the code that composes."""
    loaded = load_recipe(name)
    flat = loaded.experiment.flatten()
    parts = loaded.parts
    method = read_method(parts.method)
    variant = method.variants.get(parts.variant)
    plain = variant is None or not variant.without_exceptions
    setting = read_setting(method.uses.get(parts.setting, parts.setting) if plain else parts.setting)
    trees = {"setting": setting.tree, "method": method.tree, "exception": method.exceptions.get(parts.setting, {}) if plain else {}}
    trees["variant"] = variant.tree if variant else {}

    def value(tree, dotted):
        for part in dotted.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else tree if part == "name" else None
        return tree

    for field, origin in loaded.origins.items():
        stated = {layer: value(tree, field) for layer, tree in trees.items()}
        if field in ("name", "description") or "preset" in str(trees):
            continue
        if origin == "default":
            continue
        last = [layer for layer, found in stated.items() if found is not None][-1]
        assert origin == last, field
        if isinstance(stated[last], int | str) and not isinstance(flat[field], list | float):
            assert flat[field] == stated[last], field


def test_natural_training_keeps_the_last_checkpoint_wherever_it_comes_from():
    for name in ("natural_digits", "natural_cifar10_wrn34_10", "natural_tiny_imagenet_resnet18"):
        assert load_recipe(name).experiment.training.validation.select == "last"
    changed = load_recipe("single_normalization_cifar10_resnet18", ["--training.objective.name", "natural"]).experiment
    assert changed.training.validation.select == "last"
    assert load_recipe("natural_digits", ["--training.validation.select", "best"]).experiment.training.validation.select == "best"
    assert load_recipe("at_digits").experiment.training.validation.select == "best"
    # What was stored with a choice keeps it.
    stored = load_recipe("natural_digits", ["--training.validation.select", "best"]).experiment
    assert type(stored)(**stored.model_dump(mode="json")) == stored


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ctrw_digit", ["'ctrw' is a method", "no setting 'digit'", "'ctrw_digits'"]),
        ("ctwr_digits", ["'digits' is a setting", "no method 'ctwr'", "'ctrw_digits'"]),
        ("ctrw_digits_oficial", ["no variant 'oficial'", "'ctrw_digits_official'"]),
        ("at_digits_official", ["'at' has no variant", "It has none"]),
        ("trades", ["'trades' is a method", "<method>_<setting>", "'trades_digits'"]),
        ("digits", ["'digits' is a setting", "<method>_<setting>"]),
        ("something", ["neither a method nor a setting"]),
        ("", ["neither a method nor a setting"]),
        ("x" * 5000, ["neither a method nor a setting"]),
        ("ctrw_" + "x" * 5000, ["no setting 'xxx"]),
        ("ctrw\0_digits", ["no method"]),
        ("../ctrw_digits", ["no method"]),
    ],
)
def test_an_unknown_name_says_which_part_is_unknown(name, parts):
    with pytest.raises(UserError) as caught:
        load_recipe(name)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 700


def test_merging_replaces_a_section_whose_name_changes():
    assert merge({"defence": {"name": "ctrw", "lower_bound": 3}}, {"defence": {"name": "at"}}) == {"defence": {"name": "at"}}
    assert merge({"objective": "adversarial"}, {"objective": {"name": "red", "lambda_a": 1}}) == {
        "objective": {"name": "red", "lambda_a": 1}
    }


def test_the_matrix_fits_a_screen_and_holds_every_listed_recipe():
    lines = matrix_lines()
    assert max(map(len, lines)) < 80
    assert len(lines) < 45
    cells = sum(line.split()[1:].count(mark) for line in lines if line.split()[:1] and line.split()[0] in method_files() for mark in "xv")
    assert cells == len({(each.method, each.setting) for each in listed_recipes()})


def test_the_readme_shows_the_matrix():
    readme = (Path(library.__file__).parent / "README.md").read_text()
    assert "\n".join(matrix_lines()) in readme, "put what `rayndom list recipes` prints at the end of orchestration/recipes/README.md"
