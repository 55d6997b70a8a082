"""What a training differs from the recipe of its name in: as values, in words, and in the name that its run bears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.recipes import load_recipe

MOST_NAME = 200
"""Characters of a run's name."""
_OPERATIONAL = ("name", "description", "resources.", "checkpoints.", "tracking.")


def differences(experiment: ExperimentConfig, own: ExperimentConfig) -> dict[str, Any]:
    """Return the scientific fields in which a training differs from its recipe, with its values."""
    usual = own.flatten()
    return {key: value for key, value in experiment.flatten().items() if usual.get(key) != value and not key.startswith(_OPERATIONAL)}


def all_differences(experiments: Iterable[ExperimentConfig]) -> list[dict[str, Any] | None]:
    """Return each experiment's `differences` from the recipe of its name, None where there is no such recipe here."""
    recipes: dict[str, ExperimentConfig | None] = {}
    found = []
    for experiment in experiments:
        name = experiment.name
        if name not in recipes:
            try:
                recipes[name] = load_recipe(name).experiment
            except UserError:
                recipes[name] = None
        own = recipes[name]
        found.append(None if own is None else differences(experiment, own))
    return found


def in_words(changes: Mapping[str, Any]) -> str:
    """Return differences in one line."""
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def named_by_changes(experiment: ExperimentConfig) -> str:
    """Return a name for a training that says what differs from its recipe, e.g. `ctrw_digits epochs=5, seed=1`."""
    name = experiment.name or experiment.defence.name
    changes = all_differences([experiment])[0] or {}
    shown = in_words({key.rpartition(".")[2]: value for key, value in changes.items()})
    return f"{name} {shown}".strip()[:MOST_NAME]
