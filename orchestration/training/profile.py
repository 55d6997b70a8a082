"""`rayndom train --profile`: where the time of a training step goes, as a trace, a table and metrics; nothing is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from analysis.reporting.tables import to_markdown
from models.files import write_text
from orchestration.environment import environment_tags
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.tracking.tracker import Tracker
from orchestration.training.preparation import PreparedTraining
from trainers.step_profile import StepProfile, profile_step

PROFILED_TAG = "rayndom.profiled"
"""Fingerprint of the training that a run of kind `profile` is about: it is no training itself."""

COLUMNS = ("part", "ms", "share", "what it is")


@dataclass(frozen=True)
class WrittenProfile:
    """A profile and where it is: `folder` with trace.json, profile.md and profile.json; `run_id` of its MLflow run."""

    step: StepProfile
    folder: Path
    run_id: str


def profile_training(experiment: ExperimentConfig, workplace: Workplace, skipped: int) -> WrittenProfile:
    """Take some steps as one worker of the run would, profile the next one, and keep the profile in the home and in MLflow.

    Raises:
        UserError: the run could not start.
    """
    prepared = PreparedTraining(experiment, workplace.data_root)
    folder = workplace.home.profile(experiment.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    step = profile_step(prepared.loop_of_one_worker(), folder / "trace.json", skipped)
    table = to_markdown([dict(zip(COLUMNS, row, strict=True)) for row in step.rows()])
    write_text(folder / "profile.md", f"# A step of {experiment.name} ({experiment.fingerprint})\n\n{table}\n{step.sentence()}\n")
    write_text(folder / "profile.json", json.dumps(step.metrics(), indent=2))
    tracker = Tracker(workplace.home, experiment.tracking.experiment)
    run_id = tracker.run("profile", {PROFILED_TAG: experiment.fingerprint}, experiment.name or experiment.defence.name)
    tracker.set_tags(run_id, environment_tags())
    tracker.log_params(run_id, experiment.flatten())
    tracker.log_metrics(run_id, step.metrics())
    tracker.log_folder(run_id, folder, "profile")
    tracker.finish(run_id)
    return WrittenProfile(step, folder, run_id)
