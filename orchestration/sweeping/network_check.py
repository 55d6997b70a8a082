"""Whether the networks of a sweep can be built and its data is there: found out before any worker starts.

The schema knows which values a field takes, not which of them a backbone has (a position, a number of groups): only building tells.
"""

from __future__ import annotations

from pathlib import Path

from models.errors import UserError
from orchestration.sweeping.config import SweepConfig, extreme_points
from orchestration.training.training_run import build_for
from trainers.data import Splits, load_data


def check_networks(config: SweepConfig, data_root: Path | None) -> None:
    """Read the data sets of a sweep and build the network of every end of its search space, each different one once.

    Raises:
        UserError: a data set is missing, or the backbone does not have what a value asks for; says which dimension and which value.
    """
    data: dict[str, Splits] = {}
    built: set[tuple[str, ...]] = set()
    starts = [(f"recipe {base.name}", base) for base in config.base_experiments()]
    ends = [(title, config.experiment(values)) for title, values in extreme_points(config)]
    for title, experiment in [*starts, *ends]:
        where = experiment.data.model_dump_json()
        if where not in data:
            data[where] = load_data(experiment.data, data_root)
        network = (where, experiment.backbone.model_dump_json(), experiment.defence.model_dump_json())
        if network in built:
            continue
        built.add(network)
        try:
            build_for(experiment, data[where])
        except UserError as error:
            raise UserError(f"sweep {config.name}: {title}: {error}") from None
