"""Runs that look finished, made in milliseconds: a folder with a model and, where asked, its record in MLflow."""

from __future__ import annotations

from models import build_model
from models.weights import save_pretrained
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.tracking.experiment_run import ExperimentRun
from orchestration.tracking.tracker import Tracker

METRICS = {"validation/clean_accuracy": 0.9, "validation/robust_accuracy": 0.5, "train/loss": 1.0, "time/examples_per_second": 100.0}


def finish(home: Home, recipe: str = "at_digits", *flags: str, kind: str | None = None, weights_seed: int = 0) -> ExperimentConfig:
    """Leave a finished run of a recipe in a home and return its experiment.

    Args:
        kind: of its MLflow run, as `run` or `trial`; None: MLflow does not know it.
    """
    experiment = load_recipe(recipe, flags).experiment
    folder = RunFolder(home.run(experiment.fingerprint))
    folder.write_config(experiment)
    training = {"metrics": METRICS, "selected_epoch": 1, "num_epochs": 1}
    details = {"experiment": experiment.model_dump(mode="json"), "fingerprint": experiment.fingerprint, "training": training}
    details["class_names"] = [str(digit) for digit in range(10)]
    model = build_model(
        experiment.defence.name,
        backbone="resnet8",
        num_classes=10,
        image_shape=(1, 8, 8),
        seed=weights_seed,
        **experiment.defence.parameters.model_dump(),
    )
    save_pretrained(model, folder.model, card="a card\n", details=details)
    folder.write_result({**training, "stopped_early": False, "history": [METRICS]})
    if kind is not None:
        run = ExperimentRun(Tracker(home, experiment.tracking.experiment), kind, experiment, experiment.name)
        run.complete([METRICS])
    return experiment
