"""What a training costs before anything has run, counted in forward passes of one network."""

from __future__ import annotations

from models.ensemble import num_members_of
from orchestration.experiment import ExperimentConfig
from trainers.objective import build_objective


def training_passes(experiment: ExperimentConfig) -> float:
    """Return the forward passes of all epochs for each training image, see `Objective.passes`; validation is not counted."""
    training = experiment.training
    objective = build_objective(training.objective)
    members = num_members_of(experiment.defence.parameters)
    return sum(objective.passes(training.attack.steps, members, epoch) for epoch in range(training.epochs))
