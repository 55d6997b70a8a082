"""What Ray Tune asks for points: a searcher on a persistent Optuna study, with a fixed number of trials over all starts, and when a start
begins no more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from orchestration.search_space import suggest
from orchestration.sweeping.config import (
    SweepConfig,
)
from orchestration.sweeping.epoch_standing import STANDING, is_kept, standing
from orchestration.sweeping.free_places import FreePlaces
from orchestration.sweeping.samplers import SAMPLERS
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.study import (
    FIRST,
    METRICS,
    PASSED,
    PROXY,
    RETRY,
    all_trials,
    fixed_parameters,
    num_wanted,
    proxy_values,
    spent,
)
from orchestration.sweeping.trial_attributes import RESUMES, chain
from orchestration.training.autoscaling import AskedRoom
from orchestration.training.job import TrialReport


@dataclass(frozen=True)
class Deadline:
    """When a start of a sweep begins no further trial.

    Attributes:
        ends: by the monotonic clock.
    """

    ends: float = math.inf

    @classmethod
    def after(cls, hours: float | None) -> Deadline:
        """Return the end of so many hours from now on; None: never."""
        return NEVER if hours is None else cls(time.monotonic() + 3600 * hours)

    @property
    def passed(self) -> bool:
        """Whether the hours are over."""
        return time.monotonic() >= self.ends


NEVER = Deadline()


class StudySearch(Searcher):
    """Ray Tune's searcher on a persistent Optuna study, with a fixed number of trials over all starts.

    Args:
        config: the sweep.
        study: from `open_study`.
        interrupted: returns whether this start is being ended: a trial that then stops before its end stays open, and the next start goes
            on with it.
        deadline: after which nothing more is proposed.
        stopping: knows which trials that were stopped should go on.
        asked: room of the cluster, given back when no further trial begins.
        idle: called whenever a place is free and no trial begins.
        places: told of places that no trial takes. has_to_wait: returns whether no trial beside a
            running one shall begin now, for others' sake.
    """

    def __init__(
        self,
        config: SweepConfig,
        study: optuna.Study,
        interrupted: Callable[[], bool] = lambda: False,
        deadline: Deadline = NEVER,
        stopping: EarlyStopping | None = None,
        asked: AskedRoom | None = None,
        idle: Callable[[], None] = lambda: None,
        places: FreePlaces | None = None,
        has_to_wait: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()  # what is improved is the study's business
        self.idle, self.places, self.has_to_wait = idle, places, has_to_wait
        self.interrupted, self.deadline, self.stopping, self.asked = interrupted, deadline, stopping, asked
        self.config, self.study = config, study
        self.metrics = [objective.metric for objective in config.objectives]
        self.missing = num_wanted(config) - spent(study)
        """Trials that this start still has to bring to their end."""
        self.trials: dict[str, optuna.Trial] = {}
        """Of this start, by Tune's names."""
        self.begun, self.promoted = 0, set[int]()
        """How many of them count as new ones, and the numbers of those that go on with one that was stopped."""
        self.over: set[str] = set()
        self._reported: dict[str, int] = {}
        """The last epoch of each that the study has: one that broke and is tried again repeats some."""

    def save(self, checkpoint_path: str) -> None:
        """Leave an empty file: Tune wants one for its own way of restoring, which a sweep never takes. The study is on disk."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, see `save`."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray types it without its own FINISHED
        """Return `values`, `number`, `first` and `passed` of a trial, nothing as long as one that was stopped may still go on, or that the
        sweep has all its trials."""
        if trial_id not in self.trials:
            if self.deadline.passed:
                return self._no_more()
            # One trial goes on for others' sake too: without any, Tune would wait here and hold the places.
            if self.begun < self.missing and len(self.over) < len(self.trials) and self.has_to_wait():
                self._leave_place()
                return None
            trial = self._go_on() or (self.study.ask() if self.begun < self.missing else None)
            if trial is None:
                # What still trains may show that one that was stopped is among the best.
                if self.stopping is not None and len(self.over) < len(self.trials):
                    self.idle()
                    self._leave_place()
                    return None
                return self._no_more()
            self.take_place()
            self.trials[trial_id] = trial
            self.begun += trial.number not in self.promoted
        trial = self.trials[trial_id]
        values = suggest(self.config.space or {}, trial, shares=SAMPLERS[self.config.sampler].shares)
        trial.set_user_attr("values", dict(values))
        trial.set_user_attr("fingerprint", self.config.experiment(values).fingerprint)
        trials = all_trials(self.study)
        first, *_ = earlier = chain(trials, trial.number)[:0:-1] or [trial.number]
        passed = max((epoch for number in earlier for epoch in proxy_values(self.config, trials[number])), default=0)
        return {"values": values, "number": trial.number, FIRST: first, PASSED: passed}

    def take_place(self) -> None:
        """Note that a place that was offered is taken, by a trial or by what is trained beside them."""
        if self.places is not None:
            self.places.place_is_free(False)

    def _leave_place(self) -> None:
        if self.places is not None:
            self.places.place_is_free(True)

    def _no_more(self) -> str:
        if len(self.over) < len(self.trials):
            self.idle()
        if self.asked is not None:
            self.asked.give_back()
        return Searcher.FINISHED

    def _go_on(self) -> optuna.Trial | None:
        """Return a trial that goes on with one that was stopped and should not have been; None: there is none."""
        trials = all_trials(self.study)
        if self.stopping is None or any(trial.state == TrialState.WAITING for trial in trials):  # which would be asked for before it
            return None
        number = self.stopping.take_paused()
        if number is None:
            return None
        trial = trials[number]
        self.study.enqueue_trial(fixed_parameters(trial) | trial.params, user_attrs={RESUMES: number})
        again = self.study.ask()
        self.promoted.add(again.number)
        return again

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report an epoch's value, for single-objective sweeps; keep what early stopping compares, and what is shown of a trial."""
        if trial_id in self.over or result.get("finished") or result.get("epoch", 0) <= self._reported.get(trial_id, 0):
            return
        self._reported[trial_id] = result["epoch"]
        self._keep_proxy(trial_id, result)
        trial, report = self.trials[trial_id], TrialReport.from_result(result)
        if report.metrics:
            trial.set_user_attr(METRICS, dict(report.metrics))
        value = result.get(self.metrics[0]) if len(self.metrics) == 1 else None
        if value is not None and math.isfinite(value):
            trial.report(value, report.epoch)
        elif report.epoch:  # no reported value says how far it is
            trial.set_user_attr("epochs", report.epoch)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Close the Optuna trial."""
        if trial_id in self.over or trial_id not in self.trials:
            return
        if not error and self.interrupted() and not (result or {}).get("finished") and not (result or {}).get("failed"):
            return
        result = result or {}
        if not error and not result.get("failed"):
            self.on_trial_result(trial_id, result)  # Tune leaves out the epoch that a trial was stopped after
        self.over.add(trial_id)
        trial = self.trials[trial_id]
        if "epoch" in result:
            trial.set_user_attr(METRICS, dict(TrialReport.from_result(result).metrics))
        nothing = float("nan")
        values = [result.get(metric, nothing) for metric in self.metrics]
        bounded = {constraint: result.get(constraint.metric, nothing) for constraint in self.config.constraints}
        finite = all(math.isfinite(value) for value in (*values, *bounded.values()))
        if not error and result.get("failed"):
            trial.set_user_attr("reason", result["failed"])
            self.study.tell(trial, state=TrialState.FAIL)
        elif error:
            trial.set_user_attr(RETRY, True)
            self.study.tell(trial, state=TrialState.FAIL)
        elif result.get("finished") and finite:
            report = TrialReport.from_result(result)
            trial.set_user_attr("epochs", report.epoch)
            for constraint, value in bounded.items():
                trial.set_constraint(constraint.key, constraint.violation(value))
            self.study.tell(trial, values)
        elif result.get("finished"):
            judged = dict(zip(self.metrics, values, strict=True)) | {each.key: value for each, value in bounded.items()}
            trial.set_user_attr("reason", f"not finite: {judged}")
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("epochs", result.get("epoch", 0))
            self.study.tell(trial, state=TrialState.PRUNED)

    def _keep_proxy(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the values that early stopping watches and compares where Optuna's intermediate values are others."""
        stopping, trial = self.config.stopping, self.trials[trial_id]
        if stopping is None:
            return
        kept = {}
        if self.metrics != [stopping.metric]:
            kept[PROXY] = result.get(stopping.metric)
        if is_kept(self.config, result):
            kept[STANDING] = standing(self.config, result)
        for name, value in kept.items():
            if value is not None and (name == STANDING or math.isfinite(value)):
                trial.set_user_attr(name, trial.user_attrs.get(name, {}) | {str(result["epoch"]): value})
