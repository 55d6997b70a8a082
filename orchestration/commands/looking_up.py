"""`rayndom list` and `rayndom show`: what there is, and what a recipe is in full."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command

Described = Iterable[tuple[str, str]]


def _defences() -> Described:
    from models.registry import defence_models

    return [(name, entry.description) for name, entry in defence_models().items()]


def _backbones() -> Described:
    from models.backbones import backbone_entries

    return [(f"{name}:NAME" if entry.is_family else name, entry.description) for name, entry in backbone_entries().items()]


def _datasets() -> Described:
    from trainers.data import DATASETS

    return [(name, info.description) for name, info in DATASETS.items()]


def _objectives() -> Described:
    from trainers.objective import objectives

    return [(name, entry.description) for name, entry in objectives().items()]


def _methods() -> Described:
    from orchestration.recipes.library import readable_methods

    return sorted((method.name, method.description) for method in readable_methods())


def _settings() -> Described:
    from orchestration.recipes.library import readable_settings

    return sorted((setting.name, setting.description) for setting in readable_settings())


def _recipes() -> Described:
    from orchestration.recipes import list_recipes

    return list_recipes().items()


def _sweeps() -> Described:
    from orchestration.sweeping.named import list_sweeps

    return list_sweeps().items()


def _suites() -> Described:
    from analysis.evaluation.suites import PAPER, list_suites, load_suite

    paper = "the attacks and settings of the paper that proposed the model's defence, under T0"
    return [(name, paper if name == PAPER else load_suite(name).description) for name in list_suites()]


KINDS: Mapping[str, Callable[[], Described]] = {
    "defences": _defences,
    "backbones": _backbones,
    "datasets": _datasets,
    "objectives": _objectives,
    "methods": _methods,
    "settings": _settings,
    "recipes": _recipes,
    "sweeps": _sweeps,
    "suites": _suites,
}


def _list(arguments: argparse.Namespace) -> None:
    if arguments.kind in ("methods", "settings", "recipes"):
        from orchestration.recipes.library import problems

        for problem in problems():
            console.warn(problem)
    if arguments.kind == "recipes":
        _list_recipes(arguments.json)
        return
    rows = list(KINDS[arguments.kind]())
    console.result([{"name": name, "description": description} for name, description in rows])
    if not arguments.json:
        console.table(None, [arguments.kind, "what it is"], rows)


def _list_recipes(as_json: bool) -> None:
    """Print the listed recipes: a matrix for people, each one with its parts for programs."""
    from orchestration.recipes import list_recipes, listed_recipes
    from orchestration.recipes.matrix import matrix_lines

    if as_json:
        descriptions = list_recipes()
        console.result(
            [
                {"name": str(each), "description": descriptions[str(each)], "method": each.method, "setting": each.setting}
                | ({"variant": each.variant} if each.variant else {})
                for each in listed_recipes()
            ]
        )
        return
    for line in matrix_lines():
        console.say(line)


def _show(arguments: argparse.Namespace) -> None:
    from orchestration.recipes import load_recipe

    if arguments.help or not arguments.recipe:
        if not arguments.help:
            raise UserError("show needs a recipe; `rayndom list recipes` names them")
        arguments.parser.print_help()
        return
    loaded = load_recipe(arguments.recipe, arguments.fields)
    experiment, parts = loaded.experiment, loaded.parts
    composed: dict[str, Any] = {}
    if parts is not None:
        composed = {"method": parts.method, "setting": parts.setting} | ({"variant": parts.variant} if parts.variant else {})
    console.result(
        {"fingerprint": experiment.fingerprint, "experiment": experiment.model_dump(mode="json"), "origins": loaded.origins} | composed
    )
    if arguments.json:
        return
    rows = [
        (name, "null" if value is None else value, loaded.origins[name])
        for name, value in experiment.flatten().items()
        if name not in ("name", "description")
    ]
    console.table(f"{experiment.name}: {experiment.description}", ["field", "value", "from"], rows)
    if composed:
        console.say("; ".join(f"{kind} {name}" for kind, name in composed.items()))
    console.say(f"fingerprint {experiment.fingerprint}")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=tuple(KINDS), help="what to list; recipes: a matrix of methods and settings")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of a recipe, or a YAML file")


LIST = Command("list", "list what there is", ("rayndom list recipes", "rayndom list defences --json"), _add_kind, _list)
SHOW = Command(
    "show",
    "show a recipe's whole configuration and where each value comes from",
    ("rayndom show ctrw_digits", "rayndom show ctrw_digits --threat_model.epsilon 8/255"),
    _add_recipe,
    _show,
    takes_fields=True,
)
