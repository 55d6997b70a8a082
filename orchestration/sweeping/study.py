"""The Optuna study of a sweep: the one record of which trials were proposed and how they ended. Survives any kill.

On a start, trials that an earlier process left running are closed and their parameters proposed again first; their training goes on
from its run folder. A trial is told `COMPLETE` with the metrics of its selected epoch, `PRUNED` when ASHA stopped it (Optuna's
samplers learn from its intermediate values without mixing short budgets with full ones), `FAIL` when it broke or its objective is not
finite. Nothing stays `RUNNING`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy.exc import OperationalError

from models.errors import UserError
from orchestration.search_space import Dimension, SearchSpace, is_active, label, ordered, suggest
from orchestration.sweeping.config import SweepConfig

RESUMES = "resumes"  # of a trial that runs another one again: that one's number
RETRY = "retry"
PASSED = "passed"  # of a suggestion: epochs that an earlier start trained and let go on
PROXY = "proxy"  # epoch -> the metric that early stopping watches
METRICS = "metrics"  # of the finished trial


STUDY_ERRORS = (OperationalError, optuna.exceptions.StorageInternalError)
LOCK_PATIENCE_S = 30


class StudyAway(RuntimeError):
    """The study cannot be read or written: its file is locked by another program, damaged, or there is no room for it.

    Args:
        folder: of the sweep. error: what the storage raised.
    """

    def __init__(self, folder: Path, error: BaseException) -> None:
        cause = str(getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error.__cause__ or error)
        hint = (
            f"Another program has held it for {LOCK_PATIENCE_S} s; close it"
            if "locked" in cause
            else "Make room"
            if "full" in cause
            else "Mend it"
        )
        super().__init__(f"the study {folder / 'study.db'} cannot be used: {cause}. {hint} and start the same command again.")


def study_error(error: BaseException | None) -> BaseException | None:
    """Return what the study's storage raised behind an error, None if it was something else: Tune wraps what its searcher raises."""
    while error is not None and not isinstance(error, STUDY_ERRORS):
        error = error.__cause__ or error.__context__
    return error


def storage_url(folder: Path) -> str:
    """Return the URL of a sweep's study; optuna-dashboard opens it."""
    return f"sqlite:///{folder / 'study.db'}"


def open_study(config: SweepConfig, folder: Path) -> optuna.Study:
    """Create or reopen the study, propose unfinished trials again, and queue the points of a grid.

    Raises:
        UserError: the study file is locked by another program or damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    directions = ["maximize" if objective.mode == "max" else "minimize" for objective in config.objectives]
    try:
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(storage_url(folder), engine_kwargs={"connect_args": {"timeout": LOCK_PATIENCE_S}}),
            study_name=config.name,
            directions=directions,
            sampler=_sampler(config, config.seed),
            load_if_exists=True,
        )
        fresh = not study.trials
        if not fresh:  # with the seed of the first start it would propose that start's first points again
            study.sampler = _sampler(config, config.seed + len(study.trials))
        if fresh:
            for point in planned_points(config):
                study.enqueue_trial({name: label(value) for name, value in point.items()})
        again = superseded(study)
        for trial in study.trials:
            if trial.state == TrialState.RUNNING:
                # Marked first: a kill between these lines must not leave a trial that nobody runs again.
                study._storage.set_trial_user_attr(trial._trial_id, RETRY, True)
                study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state != TrialState.FAIL or not trial.user_attrs.get(RETRY) or trial.number in again:
                continue
            study.enqueue_trial(trial.params, user_attrs={RESUMES: trial.number})
    except STUDY_ERRORS as error:
        raise UserError(str(StudyAway(folder, error))) from None
    return study


def spent(study: optuna.Study) -> int:
    """Return how many of the sweep's trials are over: interrupted ones are not, they are run again."""
    over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    again = superseded(study)
    return sum(trial.state in over and trial.number not in again for trial in study.trials)


def superseded(study: optuna.Study) -> set[int]:
    """Return the numbers of trials that were interrupted or broke, and that later trials run again."""
    return {trial.user_attrs[RESUMES] for trial in study.trials if RESUMES in trial.user_attrs}


def target(config: SweepConfig) -> int:
    """Return the number of trials of the sweep."""
    if config.num_trials is not None:
        return config.num_trials
    return len(planned_points(config))


def planned_points(config: SweepConfig) -> list[dict[str, Any]]:
    """Return the points that are tried first: those of the sweep, or for a grid without any the whole grid."""
    if config.sampler == "grid" and not config.points:
        return grid_points(config.space or {})
    return [dict(point) for point in config.points]


def grid_points(space: SearchSpace) -> list[dict[str, Any]]:
    """Return every point of a grid: choices, whole numbers, or floats with a step; conditions respected, no point twice.

    Raises:
        UserError: a dimension is a continuum.
    """
    order = ordered(space)
    axes = [_axis(name, space[name]) for name in order]
    points: list[dict[str, Any]] = []
    for combination in itertools.product(*axes):
        point: dict[str, Any] = {}
        for name, value in zip(order, combination, strict=True):
            bound = space[name].above
            if is_active(space[name], point) and (bound is None or bound not in point or value >= point[bound]):
                point[name] = value
        if point not in points:
            points.append(point)
    return points


class StudySearch(OptunaSearch):
    """Ray Tune's Optuna searcher on a persistent study, with a fixed number of trials over all starts.

    Args:
        config: the sweep.
        study: from `open_study`.
    """

    def __init__(self, config: SweepConfig, study: optuna.Study) -> None:
        metrics = [objective.metric for objective in config.objectives]
        modes = [objective.mode for objective in config.objectives]
        single = len(metrics) == 1
        super().__init__(metric=metrics[0] if single else metrics, mode=modes[0] if single else modes)
        self.config = config
        self._ot_study = study
        self._metrics = metrics
        self._target = target(config)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return `values`, `number` and `passed` of a new trial, or that the sweep has all its trials."""
        if trial_id not in self._ot_trials:
            if spent(self._ot_study) + len(self._running()) >= self._target:
                return Searcher.FINISHED
            self._ot_trials[trial_id] = self._ot_study.ask()
        trial = self._ot_trials[trial_id]
        values = suggest(self.config.space or {}, trial)
        trial.set_user_attr("values", {name: value for name, value in values.items()})
        trial.set_user_attr("fingerprint", self.config.experiment(values).fingerprint)
        return {"values": values, "number": trial.number, PASSED: self._passed(trial)}

    def _passed(self, trial: optuna.Trial) -> int:
        """Return the last epoch after which an interrupted start let this trial go on."""
        earlier = trial.user_attrs.get(RESUMES)
        return 0 if earlier is None else max(proxy_values(self.config, self._ot_study.trials[earlier]), default=0)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report an epoch's value, for single-objective sweeps; keep what early stopping compares."""
        if trial_id in self._completed_trials or result.get("finished"):
            return
        self._keep_proxy(trial_id, result)
        if len(self._metrics) > 1:
            return
        value = result.get(self._metrics[0])
        if value is not None and math.isfinite(value):
            self._ot_trials[trial_id].report(value, result["epoch"])

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Close the Optuna trial."""
        if trial_id in self._completed_trials or trial_id not in self._ot_trials:
            return
        self._completed_trials.add(trial_id)
        trial = self._ot_trials[trial_id]
        values = [(result or {}).get(metric) for metric in self._metrics]
        finite = all(value is not None and math.isfinite(value) for value in values)
        bounded = {constraint: (result or {}).get(constraint.metric) for constraint in self.config.constraints}
        finite = finite and all(value is not None and math.isfinite(value) for value in bounded.values())
        if error:
            trial.set_user_attr(RETRY, True)
            self._ot_study.tell(trial, state=TrialState.FAIL)
        elif (result or {}).get("finished") and finite:
            trial.set_user_attr("epochs", result["epoch"])
            trial.set_user_attr(METRICS, {name: value for name, value in result.items() if "/" in name and isinstance(value, int | float)})
            for constraint, value in bounded.items():
                trial.set_constraint(constraint.key, constraint.violation(value))
            self._ot_study.tell(trial, values)
        elif (result or {}).get("finished"):
            judged = dict(zip(self._metrics, values, strict=True)) | {each.key: value for each, value in bounded.items()}
            trial.set_user_attr("reason", f"not finite: {judged}")
            self._ot_study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("epochs", (result or {}).get("epoch", 0))
            self._ot_study.tell(trial, state=TrialState.PRUNED)

    def _keep_proxy(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the values that early stopping compares where Optuna's intermediate values are others."""
        stopping = self.config.stopping
        if stopping is None or self._metrics == [stopping.metric]:
            return
        value = result.get(stopping.metric)
        if value is not None and math.isfinite(value):
            trial = self._ot_trials[trial_id]
            trial.set_user_attr(PROXY, trial.user_attrs.get(PROXY, {}) | {str(result["epoch"]): value})

    def _running(self) -> set[str]:
        return set(self._ot_trials) - self._completed_trials


def proxy_values(config: SweepConfig, trial: optuna.trial.FrozenTrial) -> dict[int, float]:
    """Return epoch -> the value of the metric that early stopping watches."""
    if config.stopping is not None and [objective.metric for objective in config.objectives] == [config.stopping.metric]:
        return dict(sorted(trial.intermediate_values.items()))
    return {int(epoch): value for epoch, value in trial.user_attrs.get(PROXY, {}).items()}


def is_feasible(trial: optuna.trial.FrozenTrial) -> bool:
    """Return whether a finished trial satisfies all constraints."""
    return all(violation <= 0 for violation in trial.constraints.values())


def _sampler(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(4, (config.num_trials or 0) // 4)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _axis(name: str, dimension: Dimension) -> list[Any]:
    if dimension.type == "choice":
        return dimension.ends()
    if dimension.type == "int" and not dimension.log:
        low, high = dimension.ends()
        return list(range(low, high + 1, int(dimension.step or 1)))
    if dimension.step is None:
        raise UserError(f"dimension {name} is a continuum: a grid needs `choices`, or low, high and `step`")
    count = math.floor((dimension.high - dimension.low) / dimension.step + 1e-9)
    return [dimension.low + index * dimension.step for index in range(count + 1)]
