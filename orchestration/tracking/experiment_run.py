"""The MLflow run of one training: opened under its identity, its epochs logged once, closed with how it ended.

Whether it is trained by `rayndom train`, as a trial of a sweep, as a baseline or for a paper's table, its record is made here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestration.experiment import ExperimentConfig
from orchestration.tracking.logged_models import log_data
from orchestration.tracking.tracker import FINGERPRINT_TAG, Tracker
from trainers.data.description import DataDescription

ERROR_TAG = "rayndom.error"
STATE_TAG = "rayndom.state"
FINISHED, STOPPED_EARLY, FAILED, KILLED = "finished", "stopped early by ASHA", "failed", "killed"
_STATUS = {FINISHED: "FINISHED", STOPPED_EARLY: "FINISHED", FAILED: "FAILED", KILLED: "KILLED"}
"""How MLflow marks a run that ended in a state."""


ALWAYS_ITS_OWN = ("seed", "data.name", "backbone.name", "defence.name", "training.objective.name")
"""Parameters that a run below another has even where all have the same, so that a search in MLflow finds it."""
_LOOKED_UP_ONE_BY_ONE = 30


class ExperimentRun:
    """The run of one training; it is opened by its first call.

    Every call leaves the same record when it is made twice, so a `BackgroundWriter` may make them.

    Args:
        tracker: writes.
        kind: `run`, `trial`, `baseline`, `repeat` or `row`.
        experiment: what is trained.
        name: shown name.
        parent: id of the run above it.
        tags: what identifies it beside its fingerprint.
        shared: parameters that the run above it has; those with the same value are left out here.
    """

    def __init__(
        self,
        tracker: Tracker,
        kind: str,
        experiment: ExperimentConfig,
        name: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        self.shared = shared or {}
        self.tracker, self.kind, self.experiment, self.name, self.parent = tracker, kind, experiment, name, parent
        self.identity = dict(tags or {}) | {FINGERPRINT_TAG: experiment.fingerprint}
        self._run_id: str | None = None
        self.data_logged = False
        """Whether this process has logged what is trained on."""

    @property
    def is_open(self) -> bool:
        """Whether this process has opened it."""
        return self._run_id is not None

    def replace_earlier(self) -> None:
        """Leave the earlier run of this training as it is: the next one that is opened is a new one, and names it."""
        self.tracker.replace(self.kind, self.identity, self.parent)

    def open(self) -> str:
        """Return the run's id, created or found, with its parameters and configuration; it is set to running by the first call."""
        if self._run_id is None:
            run_id = self.tracker.run(self.kind, self.identity, self.name, self.parent)
            self.tracker.log_params(run_id, self._own_params())
            self.tracker.log_json(run_id, self.experiment.model_dump(mode="json"), "config.json")
            self._run_id = run_id
        return self._run_id

    def _own_params(self) -> dict[str, Any]:
        params = self.experiment.flatten()
        missing = object()
        return {name: value for name, value in params.items() if name in ALWAYS_ITS_OWN or self.shared.get(name, missing) != value}

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log an epoch's metrics, once."""
        self.tracker.log_epoch(self.open(), epoch, metrics)

    def log_selected(self, metrics: Mapping[str, float]) -> None:
        """Log the metrics of the selected epoch and of the finished model."""
        self.tracker.log_metrics(self.open(), {f"selected/{name}": value for name, value in metrics.items()})

    def log_data(self, data: DataDescription) -> None:
        """Log what is trained on as an input of the run, once."""
        log_data(self.tracker, self.open(), data, "training")
        self.data_logged = True

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        self.tracker.set_tags(self.open(), tags)

    def end(self, state: str = FINISHED, error: str | None = None) -> None:
        """End the run in one of the states above, with the reason where it is an error."""
        self.set_tags({STATE_TAG: state} | ({} if error is None else {ERROR_TAG: error}))
        self.tracker.finish(self.open(), _STATUS[state])

    def complete(self, history: Sequence[Mapping[str, float]], selected: Mapping[str, float] | None = None, state: str = FINISHED) -> None:
        """Log what an earlier start could not (it was killed, or the store was away), and end the run."""
        for epoch, metrics in enumerate(history, start=1):
            self.log_epoch(epoch, metrics)
        if selected:
            self.log_selected(selected)
        self.end(state)


@dataclass(frozen=True)
class ParentRun:
    """The run that others are shown below: of a sweep, or of the reproduction of a table.

    Attributes:
        tracker: writes.
        run_id: its id.
        shared: parameters of this run that those below it leave out where theirs are the same.
    """

    tracker: Tracker
    run_id: str
    shared: Mapping[str, Any] = field(default_factory=dict)

    def child(self, kind: str, experiment: ExperimentConfig, name: str, tags: Mapping[str, str] | None = None) -> ExperimentRun:
        """Return the run of a training below this one."""
        return ExperimentRun(self.tracker, kind, experiment, name, self.run_id, tags, self.shared)

    def closed(self, kind: str, *, finished: bool = False, among: Collection[str] | None = None) -> set[str]:
        """Return the fingerprints of the runs of a kind below this one that are closed.

        Args:
            kind: of the runs.
            finished: closed with success.
            among: look for these fingerprints alone; a few are looked up one by one.
        """
        if among is not None and len(among) <= _LOOKED_UP_ONE_BY_ONE:
            runs = [run for fingerprint in among for run in self.tracker.children(self.run_id, kind, fingerprint)]
        else:
            runs = self.tracker.children(self.run_id, kind)
        ended = [run for run in runs if run.info.status == "FINISHED" or (not finished and run.info.status != "RUNNING")]
        return {run.data.tags.get(FINGERPRINT_TAG, "") for run in ended}
