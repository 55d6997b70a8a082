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


def _attacks() -> Described:
    from analysis.attacks.registry import attacks

    return [(name, entry.description) for name, entry in sorted(attacks().items())]


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
    "attacks": _attacks,
}


RUNS = "runs"


WHAT = {
    "defences": "randomized defences and what each is",
    "backbones": "networks",
    "datasets": "data sets",
    "objectives": "what training minimizes",
    "methods": "a defence with its objective: the first part of a recipe's name",
    "settings": "data set, backbone and schedule: the second part of a recipe's name",
    "recipes": "what can be trained: a matrix of methods and settings",
    "sweeps": "searches that are shipped",
    "suites": "sets of attacks for an evaluation",
    "attacks": "what suites are made of",
    "runs": "what was trained in this home",
}


def _list(arguments: argparse.Namespace) -> None:
    if arguments.kind is None:
        console.result([{"name": name, "description": description} for name, description in WHAT.items()])
        if not arguments.json:
            console.table(None, ["rayndom list", "shows"], list(WHAT.items()))
        return
    if arguments.kind == RUNS:
        _list_runs(arguments)
        return
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


def _list_runs(arguments: argparse.Namespace) -> None:
    """Print the trainings of the home, the newest at the end."""
    from orchestration.home import Home
    from orchestration.trained_models.home_runs import runs_in
    from orchestration.trained_models.recipe_differences import all_differences, in_words

    home = Home.to_read(arguments.home)
    found = sorted(runs_in(home), key=lambda run: run.changed)
    rows, described = [], []
    for run, changes in zip(found, all_differences(run.experiment for run in found), strict=True):
        evaluation = run.evaluation
        headline = evaluation["headline"] if evaluation else None
        described.append(
            {
                "name": run.experiment.name,
                "run": run.fingerprint,
                "trained_as": sorted(run.kinds),
                "differs_from_its_recipe_in": changes,
                "state": run.state,
                "epochs": run.epochs,
                "T1": headline and {key: headline[key] for key in ("accuracy", "low", "high")} | {"suite": (evaluation or {})["suite"]},
                "date": run.changed.isoformat(timespec="seconds"),
            }
        )
        shown = "there is no such recipe here" if changes is None else in_words({name: _short(value) for name, value in changes.items()})
        kinds = ", ".join(sorted(run.kinds))
        total = run.experiment.training.epochs
        t1 = f"{100 * headline['accuracy']:.1f} %" if headline else ""
        t1 += " (do not quote)" if evaluation and evaluation["marked"] else ""
        epochs = f"{run.epochs}/{total}" + ("" if run.state == "finished" else f" {run.state}")
        rows.append([run.experiment.name, run.fingerprint, kinds, shown, epochs, t1, f"{run.changed:%Y-%m-%d %H:%M}"])
    console.result(described)
    if arguments.json:
        return
    if not rows:
        console.say(f"nothing was trained in {home.root}")
        return
    console.table(None, ["name", "run", "trained as", "differs from its recipe in", "epochs", "T1", "date"], rows)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _show(arguments: argparse.Namespace) -> None:
    if arguments.help or not arguments.recipe:
        if not arguments.help:
            raise UserError("show needs a recipe; `rayndom list recipes` names them")
        arguments.parser.print_help()
        return
    from orchestration.home import Home
    from orchestration.method_code import changed_files, digest_of_code, method_code
    from orchestration.recipes import load_recipe
    from orchestration.run_folder import RunFolder

    loaded = load_recipe(arguments.recipe, arguments.fields)
    experiment, parts = loaded.experiment, loaded.parts
    composed: dict[str, Any] = {}
    if parts is not None:
        composed = {"method": parts.method, "setting": parts.setting} | ({"variant": parts.variant} if parts.variant else {})
    files = method_code(experiment)
    code = {"digest": digest_of_code(files), "files": files}
    shown = {"fingerprint": experiment.fingerprint, "experiment": experiment.model_dump(mode="json"), "origins": loaded.origins}
    console.result(shown | composed | {"code": code})
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
    console.say(f"code {code['digest']}: {', '.join(files)}")
    known = RunFolder(Home.to_read(arguments.home).run(experiment.fingerprint)).code()
    if known and (changed := changed_files(known, files)):
        console.say(f"its run was trained with other code: {', '.join(changed)} changed since; `rayndom train --retrain` trains it anew")


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=tuple(WHAT), help="what to list (default: what can be listed)")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of a recipe, or a YAML file")


LIST = Command(
    "list", "list what there is", ("rayndom list recipes", "rayndom list defences --json", "rayndom list runs"), _add_kind, _list
)
SHOW = Command(
    "show",
    "show a recipe's whole configuration and where each value comes from",
    ("rayndom show ctrw_digits", "rayndom show ctrw_digits --threat_model.epsilon 8/255"),
    _add_recipe,
    _show,
    takes_fields=True,
)
