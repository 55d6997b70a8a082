"""Which MLflow run trained a model: records and registered versions are tied to the run that they are of."""

from __future__ import annotations

from models.weights import WEIGHTS_FILE
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.contents import same_weights
from orchestration.trained_models.targets import Target


def training_run_of(target: Target, tracker: Tracker, home: Home) -> str | None:
    """Return the id of the MLflow run that trained a model, None if this store has none.

    A run of the same configuration that was started anew has other weights: it is not the run of a model that was exported before.
    """
    if target.run_id is not None:
        return target.run_id
    if target.experiment is None:
        return None
    own = RunFolder(home.run(target.experiment.fingerprint)).model
    if (own / WEIGHTS_FILE).is_file() and not same_weights(own, target.folder):
        return None
    return tracker.find_run(target.experiment.fingerprint)
