"""Building the networks that a sweep may come to, before it begins: a backbone may lack what a value of the space asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.sweeping.checks import extreme_points
from orchestration.sweeping.config import SweepConfig
from orchestration.trained_models.initial_weights import InitialWeights
from orchestration.training.preparation import build_for
from trainers.data import Splits, load_data


def ends_of(config: SweepConfig) -> list[tuple[str, ExperimentConfig]]:
    """Return, each with what it is in words, the recipes of a sweep and its trials at every end of the search space."""
    starts = [(f"recipe {base.name}", base) for base in config.base_experiments()]
    return starts + [(title, config.experiment(values)) for title, values in extreme_points(config)]


def check_networks(config: SweepConfig, data_root: Path | None, weights: Mapping[str, InitialWeights]) -> None:
    """Read the data sets of a sweep and build the network of every end of its search space, each different one once, with the weights that
    it begins with.

    Args:
        data_root: folder of the data sets; None: the default. weights: by the name that an experiment has for them.

    Raises:
        UserError: a data set is missing, or the backbone does not have what a value asks for; says which dimension and which value.
    """
    data: dict[str, Splits] = {}
    built: set[tuple[str, ...]] = set()
    for title, experiment in ends_of(config):
        where = experiment.data.model_dump_json()
        if where not in data:
            data[where] = load_data(experiment.data, data_root)
        training = experiment.training
        begins = (str(training.initial_weights), *training.reinitialize, *training.freeze)
        network = (where, experiment.backbone.model_dump_json(), experiment.defence.model_dump_json(), *begins)
        if network in built:
            continue
        built.add(network)
        try:
            fresh = build_for(experiment, data[where])
            if training.initial_weights is not None:
                weights[training.initial_weights].for_training(training).begin(fresh)
        except UserError as error:
            raise UserError(f"sweep {config.name}: {title}: {error}") from None
