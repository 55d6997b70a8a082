"""The Optuna study of a sweep: the one record of which trials were proposed and how they ended. Survives any kill.

On a start, trials that an earlier process left running are closed and their parameters proposed again first; their training goes on
from its run folder. A trial is told `COMPLETE` with the metrics of its selected epoch, `PRUNED` when early stopping did (Optuna's
samplers learn from its intermediate values without mixing short budgets with full ones), `FAIL` when it broke or its objective is not
finite. Nothing stays `RUNNING`.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from models.errors import EnvironmentFailure, UserError, first_line
from orchestration import console
from orchestration.single_process import only_process
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.grid import grid_points
from orchestration.sweeping.samplers import proposed, sampler_of
from orchestration.sweeping.study_file import FileStorage, StudyRecord, read_study
from orchestration.sweeping.trial_attributes import RESUMES, resumed

RETRY = "retry"
PASSED = "passed"  # of a suggestion: epochs that were trained before and that early stopping let it pass
FIRST = "first"  # of a suggestion: number of the trial that its training began as
PROXY = "proxy"  # epoch -> the metric that early stopping watches
METRICS = "metrics"  # of a finished trial, of others the last ones
EPOCHS, LINK = "epochs", "mlflow"  # of the study: epochs of its longest trials, where MLflow shows it


AnyStudy = optuna.Study | StudyRecord
"""A study that a sweep works with, or one that was read to be looked at."""

STUDY_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
STUDY_FILE_ERRORS = (sqlite3.Error, KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What reading a damaged study raises: what stands in its tables may be of any type."""

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
    check_study_address()
    try:
        if kind == "journal":
            return optuna.storages.JournalStorage(JournalFileBackend(place))
        if kind == "grpc":
            address = urlsplit(url)
            return optuna.storages.GrpcStorageProxy(host=address.hostname or "", port=address.port or 13000)
        # A database elsewhere may have closed a connection that nothing was asked over for long.
        if not os.environ.get(STUDY_VARIABLE):
            return FileStorage(folder / "study.db", engine_kwargs={"connect_args": {"timeout": LOCK_PATIENCE_S}})
        options = {"connect_args": {"timeout": LOCK_PATIENCE_S}} if kind == "sqlite" else {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, ValueError):
        raise _no_address(shown) from None
    except ImportError as error:
        raise _lacks(shown, error) from None


def check_study_address() -> None:
    """Check what RAYNDOM_STUDY names, where it is set; nothing is asked there.

    Raises:
        UserError: it is no address of a study, or a package for it is missing.
    """
    url = os.environ.get(STUDY_VARIABLE, "")
    kind, _, place = url.partition(":")
    shown = console.without_passwords(url)[:300]
    try:
        if kind == "grpc":
            _ = urlsplit(url).port
        elif kind == "journal":
            if not Path(place).parent.is_dir():
                raise UserError(f"{STUDY_VARIABLE} is {shown}: there is no folder for its journal")
        elif url:
            make_url(url).get_dialect().import_dbapi()
    except UserError:
        raise
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise _no_address(shown) from None
    except ImportError as error:
        raise _lacks(shown, error) from None


def reach_study(folder: Path) -> None:
    """Make sure that the database of a sweep's study answers, where it is not a file of the sweep's own.

    Raises:
        UserError: it does not, or RAYNDOM_STUDY is no address of one.
    """
    if os.environ.get(STUDY_VARIABLE):
        try:
            study_storage(folder)
        except STUDY_ERRORS as error:
            raise UserError(str(StudyAway(folder, error))) from None


def _no_address(shown: str) -> UserError:
    return UserError(f"{STUDY_VARIABLE} is {shown!r}: no address of a study, as postgresql://HOST/DATABASE, grpc://HOST:PORT, journal:FILE")


def _lacks(shown: str, error: ImportError) -> UserError:
    return UserError(f"the study {shown} needs the package {error.name}: `make setup EXTRAS=server` installs it")


def study_to_look_at(config: SweepConfig, folder: Path) -> AnyStudy:
    """Return the study of a sweep as it stands, for those who only look; nothing is written.

    Raises:
        UserError: it is in another database, which nobody named, or it cannot be read.
    """
    if STUDY_VARIABLE in os.environ:
        try:
            return optuna.load_study(study_name=study_name(config, folder), storage=study_storage(folder))
        except UserError:
            raise
        except Exception as error:  # of what is no study Optuna, Alembic and SQLAlchemy raise many kinds
            raise UserError(f"the study of {folder.name} cannot be read: {console.without_passwords(first_line(error))}") from None
    if not (folder / "study.db").is_file():
        raise UserError(f"the study of {folder.name} is in another database; {STUDY_VARIABLE} or --study names it")
    return read_study(folder / "study.db", config.name)


def open_study(config: SweepConfig, folder: Path, known: Sequence[Mapping[str, Any]] = ()) -> optuna.Study:
    """Create or reopen the study, propose unfinished trials again, and queue the points of a new one.

    Args:
        config: the sweep. folder: its own.
        known: points of a warm start, tried behind the sweep's own ones, as many as there are trials.

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
            sampler=sampler_of(config, 0),
            load_if_exists=True,
        )
        goals = [objective.metric for objective in config.objectives]
        if study.metric_names != goals:
            with warnings.catch_warnings():  # that it is experimental
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(goals)  # what its dashboard and its plots call them
        fresh = not all_trials(study)
        if not fresh:
            study.sampler = sampler_of(config, len(all_trials(study)))
        queued = [fixed_parameters(trial) for trial in all_trials(study) if RESUMES not in trial.user_attrs]
        # Those of an earlier start that it was killed before it could queue; those of a warm start are of a new study alone.
        for point in [*planned_points(config), *(known if fresh else ())][: num_wanted(config) if fresh else None]:
            fixed = proposed(config, point)
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
            study.enqueue_trial(fixed_parameters(trial) | trial.params, user_attrs={RESUMES: trial.number})
    except STUDY_ERRORS as error:
        raise UserError(str(StudyAway(folder, error))) from None
    return study


def fixed_parameters(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that a trial was queued with."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def remember(study: optuna.Study, folder: Path, epochs: int, link: str) -> None:
    """Keep in the study what those who look at it want to know beside its trials, so that they need neither MLflow nor experiments.

    Raises:
        StudyAway: it cannot be written.
    """
    try:
        for name, value in ((EPOCHS, epochs), (LINK, link)):
            if study.user_attrs.get(name) != value:
                study.set_user_attr(name, value)
    except STUDY_ERRORS as error:
        raise StudyAway(folder, error) from None


def _mark(storage: optuna.storages.BaseStorage, study: str, number: int, attribute: str) -> None:
    """Set an attribute of a trial that is not this process's own: a study changes only those."""
    trial = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study), number)
    storage.set_trial_user_attr(trial, attribute, True)


def all_trials(study: AnyStudy) -> list[FrozenTrial]:
    """Return the trials of a study by number, not to be changed: `study.trials` copies each of them deeply, at every look."""
    return study.get_trials(deepcopy=False)


def spent(study: AnyStudy) -> int:
    """Return how many of the sweep's trials are over: interrupted ones are not, they are run again."""
    over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    again = superseded(study)
    return sum(trial.state in over and trial.number not in again for trial in all_trials(study))


def superseded(study: AnyStudy) -> set[int]:
    """Return the numbers of trials that were interrupted, broke or were paused, and with which later trials go on."""
    return resumed(all_trials(study))


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


def best_robust_accuracy(study: AnyStudy) -> float | None:
    """Return the best robust accuracy on validation images that any trial of earlier starts came to; None: none came to one."""
    from trainers.selection import SELECTION_METRIC  # brings PyTorch, which those who only look do without

    ends = [trial.user_attrs.get(METRICS, {}) for trial in all_trials(study)]
    return max((metrics[SELECTION_METRIC] for metrics in ends if math.isfinite(metrics.get(SELECTION_METRIC, math.nan))), default=None)


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a finished trial satisfies all constraints."""
    return all(violation <= 0 for violation in trial.constraints.values())


def full_trials(study: AnyStudy) -> list[FrozenTrial]:
    """Return the trials that trained to their end, feasible or not."""
    again = superseded(study)
    return [trial for trial in all_trials(study) if trial.state == TrialState.COMPLETE and trial.number not in again]


def best_trials(config: SweepConfig, study: AnyStudy) -> list[int]:
    """Return the numbers of the best full-budget trials: one, or the Pareto front.

    Trials that were stopped early or violate a constraint do not count.
    """
    feasible = [trial for trial in full_trials(study) if is_feasible(trial)]
    if not feasible:
        return []
    losses = losses_of(config, feasible)
    if len(config.objectives) == 1:
        return [feasible[int(losses[:, 0].argmin())].number]
    return [trial.number for trial, own in zip(feasible, losses, strict=True) if not _dominated(own, losses)]


def top_trials(config: SweepConfig, study: AnyStudy, count: int) -> list[int]:
    """Return the numbers of the best feasible full-budget trials: the front first, each part by the first objective."""
    sign = 1 if config.objectives[0].mode == "max" else -1
    feasible = [trial for trial in full_trials(study) if is_feasible(trial)]
    front = set(best_trials(config, study)) if len(config.objectives) > 1 else set()
    ranked = sorted(feasible, key=lambda trial: (trial.number not in front, -sign * trial.values[0], trial.number))
    # A sampler may propose a point twice; its repeats would be the same runs.
    unique = {trial.user_attrs.get("fingerprint", str(trial.number)): trial.number for trial in reversed(ranked)}
    return [trial.number for trial in ranked if trial.number in unique.values()][:count]


def losses_of(config: SweepConfig, trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Return the values of full-budget trials (trials, objectives), signs turned so that less is better."""
    signs = [1.0 if objective.mode == "min" else -1.0 for objective in config.objectives]
    return np.array([trial.values for trial in trials], dtype=float) * signs


def _dominated(own: np.ndarray, others: np.ndarray) -> bool:
    """Return whether another trial is nowhere worse and somewhere better."""
    return bool(((others <= own).all(axis=1) & (others < own).any(axis=1)).any())


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
