"""A fingerprint stands for one experiment: whatever differs in what is computed differs in it."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest

from models.configuration import Config
from models.registry import list_defences
from orchestration.catalogue import catalogue
from orchestration.experiment import ExperimentConfig
from orchestration.recipes import load_recipe
from trainers.config import TrainingConfig
from trainers.objective import objectives


def experiment(defence: str = "at", objective: dict[str, object] | None = None) -> ExperimentConfig:
    return ExperimentConfig(
        defence=defence, backbone="resnet8", data={"name": "digits"}, training={} if objective is None else {"objective": objective}
    )


def settings_of(name: str) -> list[dict[str, object]]:
    """Return the defaults of an objective, and each choice of a field that is no default."""
    found: list[dict[str, object]] = [{"name": name}]
    for field, info in objectives()[name].config.model_fields.items():
        if field != "name" and get_origin(info.annotation) is Literal:
            found += [{"name": name, field: value} for value in get_args(info.annotation) if value != info.default]
    return found


@pytest.mark.parametrize("defence", list_defences())
def test_two_objectives_are_two_experiments_under_every_defence(defence):
    seen: dict[str, dict[str, object]] = {}
    for name in objectives():
        for settings in settings_of(name):
            try:
                fingerprint = experiment(defence, settings).fingerprint
            except ValueError:  # these two choices exclude each other
                continue
            assert fingerprint not in seen, f"{settings} and {seen[fingerprint]} under {defence} have one fingerprint"
            seen[fingerprint] = settings


@pytest.mark.parametrize("defence", sorted(catalogue()))
def test_a_defence_s_own_objective_needs_no_name(defence):
    # Runs of earlier versions, whose fingerprints left the name out, stay what they are.
    own = catalogue()[defence].objective
    if own != "natural":  # it has no parameters of its own, so its name was always part
        assert "name" not in experiment(defence, {"name": own}).scientific().get("training", {}).get("objective", {})


@pytest.mark.parametrize("place", ["defence", "objective", "inside the objective"])
def test_a_revision_is_another_experiment(place, monkeypatch):
    before = load_recipe("awp_digits").experiment
    config: Config = {
        "defence": before.defence.parameters,
        "objective": before.training.objective,
        "inside the objective": before.training.objective.weight_perturbation,
    }[place]
    fingerprint = before.fingerprint
    monkeypatch.setattr(type(config), "revision", 7)
    assert load_recipe("awp_digits").experiment.fingerprint != fingerprint


def test_the_first_meaning_leaves_no_trace():
    assert TrainingConfig().revision == 0
    assert "revision" not in str(experiment().scientific())
