"""`rayndom list` and `rayndom show`: what there is, and what a recipe is in full."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import Command

KINDS = ("defences", "backbones", "datasets", "objectives", "recipes", "sweeps", "suites")


def _rows(kind: str) -> Iterable[tuple[str, str]]:
    if kind == "defences":
        from models.registry import defence_models

        return [(name, entry.description) for name, entry in defence_models().items()]
    if kind == "backbones":
        from models.backbones import backbone_entries

        return [(f"{name}:NAME" if entry.is_family else name, entry.description) for name, entry in backbone_entries().items()]
    if kind == "datasets":
        from trainers.data import DATASETS

        return [(name, info.description) for name, info in DATASETS.items()]
    if kind == "objectives":
        from trainers.objective import objectives

        return [(name, entry.description) for name, entry in objectives().items()]
    if kind == "recipes":
        from orchestration.recipes import list_recipes

        return list_recipes().items()
    if kind == "sweeps":
        from orchestration.sweeping.config import list_sweeps

        return list_sweeps().items()
    from analysis.evaluation.suites import PAPER, list_suites, load_suite

    paper = "the attacks and settings of the paper that proposed the model's defence, under T0"
    return [(name, paper if name == PAPER else load_suite(name).description) for name in list_suites()]


def _list(arguments: argparse.Namespace) -> None:
    rows = list(_rows(arguments.kind))
    if arguments.json:
        console.result([{"name": name, "description": description} for name, description in rows])
        return
    console.table(None, [arguments.kind, "what it is"], rows)


def _show(arguments: argparse.Namespace) -> None:
    from orchestration.recipes import load_recipe

    if arguments.help or not arguments.recipe:
        if not arguments.help:
            raise UserError("show needs a recipe; `rayndom list recipes` names them")
        arguments.parser.print_help()
        return
    loaded = load_recipe(arguments.recipe, arguments.fields)
    experiment = loaded.experiment
    if arguments.json:
        console.result({"fingerprint": experiment.fingerprint, "experiment": experiment.model_dump(mode="json")})
        return
    rows = [
        (name, "null" if value is None else value, loaded.origins[name])
        for name, value in experiment.flatten().items()
        if name not in ("name", "description")
    ]
    console.table(f"{experiment.name}: {experiment.description}", ["field", "value", "from"], rows)
    console.say(f"fingerprint {experiment.fingerprint}")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, help="what to list")


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
