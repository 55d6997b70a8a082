"""What a run folder holds, told to the run's record in MLflow: what was trained on, and the model that came of it."""

from __future__ import annotations

from models.errors import UserError
from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.run_folder import RunFolder
from orchestration.tracking.experiment_run import ALWAYS_ITS_OWN, ExperimentRun
from orchestration.tracking.logged_models import ModelRecord, log_model
from orchestration.tracking.tracker import Tracker


def track_data(run: ExperimentRun) -> None:
    """Log what the run is trained on, as soon as its folder says so; a folder of an earlier version does not."""
    if run.data_logged:
        return
    try:
        data = _folder(run.tracker, run.experiment).data()
    except UserError as error:  # a record of what was trained on is no reason not to train
        console.warn(str(error))
        return
    if data is not None:
        run.log_data(data)


def track_model(tracker: Tracker, run_id: str, experiment: ExperimentConfig) -> str | None:
    """Log the model of a finished training as what its run put out, once; return its id in MLflow, None: it is not finished."""
    folder = _folder(tracker, experiment)
    record = folder.result()
    if record is None:
        return None
    params = experiment.flatten()
    shown = (*ALWAYS_ITS_OWN, "threat_model.norm", "threat_model.epsilon")
    return log_model(
        tracker,
        run_id,
        ModelRecord(
            folder.model,
            experiment.name or experiment.defence.name,
            record["selected_epoch"],
            {f"selected/{name}": value for name, value in record["metrics"].items() if name.startswith("validation/")},
            {name: value for name, value in params.items() if name in shown or name.startswith("defence.")},
        ),
    )


def _folder(tracker: Tracker, experiment: ExperimentConfig) -> RunFolder:
    return RunFolder(tracker.home.run(experiment.fingerprint))
