"""The Optuna study of a sweep: the one record of which trials were proposed and how they ended. Survives any kill.

On a start, trials that an earlier process left running are closed and their parameters proposed again first; their training goes on
from its run folder. A trial is told `COMPLETE` with the metrics of its selected epoch, `PRUNED` when ASHA stopped it (Optuna's
samplers learn from its intermediate values without mixing short budgets with full ones), `FAIL` when it broke or its objective is not
finite. Nothing stays `RUNNING`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from models.errors import EnvironmentFailure, UserError
from orchestration import console
from orchestration.search_space import label
from orchestration.single_process import only_process
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.grid import grid_points
from trainers.fit import SELECTION_METRIC

RESUMES = "resumes"  # of a trial that runs another one again: that one's number
RETRY = "retry"
PASSED = "passed"  # of a suggestion: epochs that an earlier start trained and let go on
PROXY = "proxy"  # epoch -> the metric that early stopping watches
METRICS = "metrics"  # of a finished trial, or the last ones of a trial that ended before


STUDY_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
LOCK_PATIENCE_S = 30


class StudyAway(EnvironmentFailure):
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
        place = console.without_passwords(storage_url(folder)).removeprefix("sqlite:///")
        super().__init__(f"the study {place} cannot be used: {console.without_passwords(cause)}. {hint} and start the same command again.")


def study_error(error: BaseException | None) -> BaseException | None:
    """Return what the study's storage raised behind an error, None if it was something else: Tune wraps what its searcher raises."""
    while error is not None and not isinstance(error, STUDY_ERRORS):
        error = error.__cause__ or error.__context__
    return error


STUDY_VARIABLE = "RAYNDOM_STUDY"


def storage_url(folder: Path) -> str:
    """Return the URL of a sweep's study: RAYNDOM_STUDY, where several drivers and dashboards look, else a file of the sweep's own."""
    return os.environ.get(STUDY_VARIABLE) or f"sqlite:///{folder / 'study.db'}"


def study_name(config: SweepConfig, folder: Path) -> str:
    """Return the name of a sweep's study: in a database of several sweeps the name of its folder, which no other one has."""
    return folder.name if os.environ.get(STUDY_VARIABLE) else config.name


def study_storage(folder: Path) -> optuna.storages.BaseStorage:
    """Return the storage of a sweep's study.

    Databases as `postgresql://...`; `grpc://HOST:PORT`, Optuna's proxy in front of one; `journal:FILE`, Optuna's journal.

    Raises:
        UserError: the address is none of these, or a package for it is missing.
    """
    url = storage_url(folder)
    shown = console.without_passwords(url)
    kind, _, place = url.partition(":")
    try:
        if kind == "journal":
            return optuna.storages.JournalStorage(JournalFileBackend(place))
        if kind == "grpc":
            address = urlsplit(url)
            return optuna.storages.GrpcStorageProxy(host=address.hostname or "", port=address.port or 13000)
        # A database elsewhere may have closed a connection that nothing was asked over for long.
        options = {"connect_args": {"timeout": LOCK_PATIENCE_S}} if kind == "sqlite" else {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise UserError(f"{STUDY_VARIABLE} is {shown}: no address of a study, as postgresql://HOST/DATABASE, grpc://HOST:PORT") from None
    except ImportError as error:
        raise UserError(f"the study {shown} needs the package {error.name}: `make setup EXTRAS=server` installs it") from None


def open_study(config: SweepConfig, folder: Path) -> optuna.Study:
    """Create or reopen the study, propose unfinished trials again, and queue the points of a grid.

    Raises:
        UserError: the study file is locked by another program or damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    ways = optuna.study.StudyDirection
    directions = [ways.MAXIMIZE if objective.mode == "max" else ways.MINIMIZE for objective in config.objectives]
    if STUDY_VARIABLE not in os.environ:
        (folder / "study.db").touch()  # SQLite would give it a mode of its own, whatever the umask says
    try:
        storage, name = study_storage(folder), study_name(config, folder)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=directions,
            sampler=_sampler(config, config.seed),
            load_if_exists=True,
        )
        fresh = not all_trials(study)
        if not fresh:  # with the seed of the first start it would propose that start's first points again
            study.sampler = _sampler(config, config.seed + len(all_trials(study)))
        queued = [_fixed(trial) for trial in all_trials(study) if RESUMES not in trial.user_attrs]
        for point in planned_points(config):  # of an earlier start: those that it was killed before it could queue
            fixed = {name: label(value) for name, value in point.items()}
            if fixed not in queued:
                study.enqueue_trial(fixed)
        again = superseded(study)
        for trial in list(all_trials(study)):
            if trial.state == TrialState.RUNNING:
                # Marked first: a kill between these lines must not leave a trial that nobody runs again.
                _mark(storage, name, trial.number, RETRY)
                study.tell(trial.number, state=TrialState.FAIL)
            elif trial.state != TrialState.FAIL or not trial.user_attrs.get(RETRY) or trial.number in again:
                continue
            # A trial that was killed while it was proposed has parameters that it was to take and did not come to.
            study.enqueue_trial(_fixed(trial) | trial.params, user_attrs={RESUMES: trial.number})
    except STUDY_ERRORS as error:
        raise UserError(str(StudyAway(folder, error))) from None
    return study


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that a trial was queued with."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def _mark(storage: optuna.storages.BaseStorage, study: str, number: int, attribute: str) -> None:
    """Set an attribute of a trial that is not this process's own: a study changes only those."""
    trial = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study), number)
    storage.set_trial_user_attr(trial, attribute, True)


def all_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials of a study by number, not to be changed: `study.trials` copies each of them deeply, at every look."""
    return study.get_trials(deepcopy=False)


def spent(study: optuna.Study) -> int:
    """Return how many of the sweep's trials are over: interrupted ones are not, they are run again."""
    over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    again = superseded(study)
    return sum(trial.state in over and trial.number not in again for trial in all_trials(study))


def superseded(study: optuna.Study) -> set[int]:
    """Return the numbers of trials that were interrupted or broke, and that later trials run again."""
    return {trial.user_attrs[RESUMES] for trial in all_trials(study) if RESUMES in trial.user_attrs}


def num_wanted(config: SweepConfig) -> int:
    """Return how many trials the sweep is to have; a grid has no more than its points."""
    if config.sampler == "grid":
        points = len(planned_points(config))
        return points if config.num_trials is None else min(points, config.num_trials)
    assert config.num_trials is not None
    return config.num_trials


def planned_points(config: SweepConfig) -> list[dict[str, Any]]:
    """Return the points that are tried first: those of the sweep, or for a grid without any the whole grid."""
    if config.sampler == "grid" and not config.points:
        return grid_points(config.space or {})
    return [dict(point) for point in config.points]


def proxy_values(config: SweepConfig, trial: FrozenTrial) -> dict[int, float]:
    """Return epoch -> the value of the metric that early stopping watches."""
    if config.stopping is not None and [objective.metric for objective in config.objectives] == [config.stopping.metric]:
        return dict(sorted(trial.intermediate_values.items()))
    return {int(epoch): value for epoch, value in trial.user_attrs.get(PROXY, {}).items()}


def best_robust_accuracy(study: optuna.Study) -> float | None:
    """Return the best robust accuracy on validation images that any trial of earlier starts came to; None: none came to one."""
    ends = [trial.user_attrs.get(METRICS, {}) for trial in all_trials(study)]
    return max((metrics[SELECTION_METRIC] for metrics in ends if math.isfinite(metrics.get(SELECTION_METRIC, math.nan))), default=None)


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a finished trial satisfies all constraints."""
    return all(violation <= 0 for violation in trial.constraints.values())


def full_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that trained to their end, feasible or not."""
    again = superseded(study)
    return [trial for trial in all_trials(study) if trial.state == TrialState.COMPLETE and trial.number not in again]


def best_trials(config: SweepConfig, study: optuna.Study) -> list[int]:
    """Return the numbers of the best full-budget trials: one, or the Pareto front.

    Trials that were stopped early or violate a constraint do not count.
    """
    if not any(trial.state == TrialState.COMPLETE and is_feasible(trial) for trial in all_trials(study)):
        return []
    if len(config.objectives) == 1:
        return [study.best_trial.number]
    return [trial.number for trial in study.best_trials]


def _sampler(config: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    if config.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(4, (config.num_trials or 0) // 4)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


ENDING_S = 15  # a driver that was just stopped may still be ending


@contextlib.contextmanager
def only_driver(folder: Path, name: str, *, patience_s: float | None = ENDING_S) -> Iterator[None]:
    """Hold a sweep's folder for this process, see `only_process`.

    Raises:
        UserError: another process still runs this sweep after `patience_s` seconds.
    """
    advice = f"`rayndom watch {name}` follows it; end that process first, or give the second sweep another name or another --home."
    with only_process(folder / "lock", f"the sweep {name}", advice=advice, patience_s=patience_s):
        yield
