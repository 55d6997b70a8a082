"""What a sweep is doing, seen from another terminal: its study says which trials there are and how far, its run folders who trains.

Of sweeps that an earlier version began, MLflow is asked as well. Otherwise neither it nor PyTorch is loaded: a look takes no seconds.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from models.errors import UserError, first_line, unknown_name
from models.json_text import read_json
from orchestration import console
from orchestration.home import Home
from orchestration.run_folder import RunFolder
from orchestration.single_process import is_held
from orchestration.sweeping.config import SWEEP_FILE, SweepConfig, dimension_cells, dimension_titles
from orchestration.sweeping.goals import format_goal
from orchestration.sweeping.study import (
    EPOCHS,
    LINK,
    METRICS,
    STUDY_ERRORS,
    STUDY_FILE_ERRORS,
    all_trials,
    best_trials,
    is_feasible,
    num_wanted,
    spent,
    study_to_look_at,
    superseded,
)
from trainers.complaints import complaints

if TYPE_CHECKING:
    from orchestration.tracking.tracker import Tracker

MOST_ROWS = 40
"""Trials that a table shows unless all are asked for."""

CLEAN, ROBUST = "validation/clean_accuracy", "validation/robust_accuracy"


@dataclass(frozen=True)
class TrialStatus:
    """One trial.

    Attributes:
        state: `running`, `interrupted` (its process is gone), `waiting`, `finished`, `stopped early`, `failed`, `infeasible`.
        epoch: last epoch that is known, 0: none. dimensions: what was proposed, by field.
        values: of the objectives, metrics: all of them, once finished.
        seconds: since it was proposed, or until it ended.
        signs: that it does not learn, in words: of its selected epoch, of its last one while it runs.
    """

    number: int
    state: str
    epoch: int
    dimensions: Mapping[str, Any]
    clean: float | None
    robust: float | None
    values: tuple[float, ...]
    seconds: float | None
    fingerprint: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    signs: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepStatus:
    """One sweep.

    Attributes:
        key: name of its folder. done, wanted: trials. best: numbers of the best trials so far.
        link: where MLflow shows it, None: no run there yet.
    """

    key: str
    config: SweepConfig
    epochs: int
    done: int
    wanted: int
    best: tuple[int, ...]
    trials: tuple[TrialStatus, ...]
    link: str | None

    def most_telling(self, most: int = MOST_ROWS) -> SweepStatus:
        """Return the status with at most so many trials: those that are not over, the best, and then the last ones."""
        if len(self.trials) <= most:
            return self
        over = {"finished", "stopped early", "failed", "infeasible"}
        ranked = sorted(self.trials, key=lambda each: (each.number not in self.best, each.state in over, -each.number))
        return dataclasses.replace(self, trials=tuple(sorted(ranked[:most], key=lambda each: each.number)))

    @property
    def columns(self) -> list[str]:
        """Heads of the table of trials."""
        goals = [objective.metric for objective in self.config.objectives]
        return ["trial", "state", "epoch", *dimension_titles(self.config), "clean %", "robust %", *goals, "minutes"]

    @property
    def rows(self) -> list[list[Any]]:
        """Cells of the table of trials: the best marked with a star, those with signs that they do not learn with (!)."""
        goals = [objective.metric for objective in self.config.objectives]
        return [
            [
                f"{each.number}{'*' if each.number in self.best else ''}{' (!)' if each.signs else ''}",
                each.state,
                f"{each.epoch}/{self.epochs}",
                *dimension_cells(self.config, each.dimensions),
                *("" if value is None else f"{100 * value:.1f}" for value in (each.clean, each.robust)),
                *([format_goal(goal, value, each.metrics) for goal, value in zip(goals, each.values, strict=False)] or [""] * len(goals)),
                "" if each.seconds is None else f"{each.seconds / 60:.1f}",
            ]
            for each in self.trials
        ]

    @property
    def warnings(self) -> list[str]:
        """A line per sign that a trial does not learn."""
        return [f"trial {each.number}: {sentence}" for each in self.trials for sentence in each.signs]

    @property
    def summary(self) -> str:
        """One line."""
        running = sum(each.state == "running" for each in self.trials)
        return f"{self.key}: {self.done}/{self.wanted} trials over, {running} running" + (f"; MLflow {self.link}" if self.link else "")


def list_sweep_keys(home: Home) -> list[str]:
    """Return the sweeps of a home folder, the one that changed last at the end."""
    folders = [path.parent for path in home.entries(f"sweeps/*/{SWEEP_FILE}")]

    def changed(folder: Path) -> float:
        return max((folder / name).stat().st_mtime for name in (SWEEP_FILE, "study.db") if (folder / name).is_file())

    return [folder.name for folder in sorted(folders, key=changed)]


def find_sweep(home: Home, name: str) -> str:
    """Return the key of a sweep named by its key, or by the name of the sweep: then the one that changed last.

    Raises:
        UserError: there is none.
    """
    keys = list_sweep_keys(home)
    if not keys:
        raise UserError(f"no sweep was started in {home.root}; --home names another folder")
    if name in keys:
        return name
    matching = [key for key in keys if key.rpartition("-")[0] == name]
    if not matching:
        raise unknown_name("sweep in this home folder", name, keys)
    return matching[-1]


def read_sweep(folder: Path) -> SweepConfig:
    """Return the sweep that a folder is of.

    Raises:
        UserError: its file is damaged.
    """
    path = folder / SWEEP_FILE
    try:
        return SweepConfig.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def sweep_status(home: Home, key: str) -> SweepStatus:
    """Read a sweep's state; nothing is written.

    Raises:
        UserError: the study cannot be read.
    """
    folder = home.sweep(key)
    config = read_sweep(folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = study_to_look_at(config, folder)
        epochs, link = study.user_attrs.get(EPOCHS), study.user_attrs.get(LINK)
        again = superseded(study)
        counted = [trial for trial in all_trials(study) if trial.number not in again]
        # Earlier versions kept the metrics of trials that were stopped, or still ran, in MLflow alone.
        everything = any(trial.state == TrialState.PRUNED and METRICS not in trial.user_attrs for trial in counted)
        tracked: dict[str, dict[str, float]] = {}
        if everything or epochs is None or link is None:
            bases = config.base_experiments()
            epochs = max(experiment.training.epochs for experiment in bases)
            tracked, found = _tracked_if_it_can_be_read(home, bases[0].tracking.experiment, key, running=not everything)
            link = link or found
        trials = tuple(_trial(config, home, trial, tracked.get(str(trial.user_attrs.get("fingerprint")), {})) for trial in counted)
        return SweepStatus(key, config, epochs, spent(study), num_wanted(config), tuple(best_trials(config, study)), trials, link)
    except (*STUDY_ERRORS, *STUDY_FILE_ERRORS) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: BaseException) -> UserError:
    return UserError(f"the study {folder / 'study.db'} cannot be read, it is damaged or of another version: {first_line(error)}")


def _tracked_if_it_can_be_read(home: Home, experiment: str, key: str, *, running: bool) -> tuple[dict[str, dict[str, float]], str | None]:
    """Return what `_tracked` does, with a warning nothing where the MLflow store cannot be used: the study says most of it."""
    from orchestration.tracking.store import store_errors
    from orchestration.tracking.tracker import Tracker

    try:
        with store_errors(home.tracking_uri):
            tracker = Tracker.existing(home, experiment)
            return ({}, None) if tracker is None else _tracked(tracker, key, running=running)
    except UserError as error:
        console.warn(f"shown without what MLflow knows: {error}")
        return {}, None


def _tracked(tracker: Tracker, key: str, *, running: bool) -> tuple[dict[str, dict[str, float]], str | None]:
    """Return fingerprint -> last metrics of a sweep's trials (`epoch` among them), or of the running ones, and the link to the sweep."""
    from orchestration.tracking.tracker import FINGERPRINT_TAG, SWEEP_TAG

    parents = tracker.client.search_runs([tracker.experiment_id], f"tags.`{SWEEP_TAG}` = '{key}' and tags.`rayndom.kind` = 'sweep'")
    if not parents:
        return {}, None
    parent = parents[0].info.run_id
    found = {}
    for child in tracker.children(parent, "trial", running=running):
        metrics = dict(child.data.metrics)
        if child.info.status == "RUNNING" and "train/loss" in metrics:
            metrics["epoch"] = max(metric.step for metric in tracker.client.get_metric_history(child.info.run_id, "train/loss"))
        found[child.data.tags.get(FINGERPRINT_TAG, "")] = metrics
    return found, tracker.link(parent)


def _trial(config: SweepConfig, home: Home, trial: FrozenTrial, metrics: dict[str, float]) -> TrialStatus:
    fingerprint = str(trial.user_attrs.get("fingerprint", ""))
    metrics = metrics | trial.user_attrs.get(METRICS, {})
    epoch = trial.user_attrs.get("epochs") or int(metrics.get("epoch", 0)) or max(trial.intermediate_values, default=0)
    is_over = trial.state == TrialState.COMPLETE  # of its selected epoch, whatever MLflow has of the last one
    started, ended = trial.datetime_start, trial.datetime_complete
    seconds = ((ended or datetime.datetime.now()) - started).total_seconds() if started else None
    return TrialStatus(
        number=trial.number,
        state=_state(home, trial, fingerprint),
        epoch=epoch,
        dimensions=trial.user_attrs.get("values", {}),
        clean=_first(metrics, (f"selected/{CLEAN}", CLEAN)),
        robust=_first(metrics, (f"selected/{ROBUST}", ROBUST)),
        values=tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else (),
        seconds=seconds,
        fingerprint=fingerprint,
        metrics=trial.user_attrs.get(METRICS, {}),
        signs=tuple(complaints(trial.user_attrs[METRICS] if is_over and METRICS in trial.user_attrs else metrics).values()),
    )


def _state(home: Home, trial: FrozenTrial, fingerprint: str) -> str:
    if trial.state == TrialState.COMPLETE:
        return "finished" if is_feasible(trial) else "infeasible"
    if trial.state == TrialState.RUNNING:
        folder = RunFolder(home.run(fingerprint))
        if folder.is_finished:
            return "running"  # trained; being measured, or about to be told
        if not folder.path.is_dir():
            return "starting"
        return "running" if is_held(folder.path / "lock") else "interrupted"
    return {TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed", TrialState.WAITING: "waiting"}[trial.state]


def _first(metrics: dict[str, float], names: Iterable[str]) -> float | None:
    return next((metrics[name] for name in names if name in metrics), None)
