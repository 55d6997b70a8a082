"""What a sweep may be called: a shipped sweep, a recipe (the search space of its defence), a file of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import UserError, unknown_name
from models.plugins import files_of_plugins
from models.yaml_text import read_yaml
from orchestration.recipes import is_recipe, possible_names, split_name

FOLDER = Path(__file__).parent.parent / "sweeps"

NUM_TRIALS = 20
"""Of a sweep that a recipe's name stands for."""


def list_sweeps() -> dict[str, str]:
    """Return names and descriptions of the shipped sweeps and those of plug-ins."""
    return {name: str(read_yaml(path).get("description", "")) for name, path in _sweep_files().items()}


def _sweep_files() -> dict[str, Path]:
    return {path.stem: path for path in (*files_of_plugins("sweeps"), *sorted(FOLDER.glob("*.yaml")))}


def sweep_tree(sweep: str) -> tuple[dict[str, Any], str]:
    """Return the content of a sweep with its `name`, and what to call it in errors.

    Args:
        sweep: name of a shipped sweep or of a recipe, or path of a YAML file.

    Raises:
        UserError: there is no such sweep, or its file cannot be read.
    """
    path = Path(sweep)
    if sweep.endswith((".yaml", ".yml")):
        if not path.is_file():
            raise UserError(f"no sweep file {sweep[:300]}")
    else:
        shipped = _sweep_files()
        if sweep not in shipped:
            if not is_recipe(sweep):
                _refuse_item(sweep)
                raise unknown_name("sweep or recipe", sweep[:300], [*shipped, *possible_names()])
            return sweep_of_recipe(sweep) | {"name": sweep}, sweep
        path = shipped[sweep]
    content = read_yaml(path)
    if content.get("name") not in (None, "", path.stem):
        raise UserError(f"{path.name}: name: a sweep is called like its file, {path.stem}; leave `name` out, or rename the file")
    return content | {"name": path.stem}, path.name


def sweep_of_recipe(recipe: str) -> dict[str, Any]:
    """Return the sweep that a recipe's name stands for: the search space of its defence, beside natural and adversarial training."""
    setting = split_name(recipe).setting
    baselines = [name for name in (f"natural_{setting}", f"at_{setting}") if name != recipe]
    return {"description": f"the search space of {recipe}'s defence", "recipe": recipe, "num_trials": NUM_TRIALS, "baselines": baselines}


def _refuse_item(sweep: str) -> None:
    """Raise a UserError if a name means a table or figure of a paper, whose rows are a sweep of their own."""
    from orchestration.sweeping.item_grid import item_like

    item = item_like(sweep) or item_like(sweep.replace(".", "_"))
    if item is not None:
        raise UserError(f"{sweep!r} is a table or figure of a paper: `rayndom sweep --item {item}` searches the grid of its rows")
