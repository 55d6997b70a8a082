"""Reading the file of a study for those who look at it: the same trials as Optuna's own storage gives, in a tenth of its time.

Optuna's storage builds an object for every row and, before that, looks whether the tables need to be made or migrated. Who only looks waits
for that; who runs a sweep needs it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import sqlite3
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

SCHEMA = 12
"""Of the tables that are read here: Optuna's since 2.x. Optuna itself reads others."""

_NOT_FINITE = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}
_LOCKED_S = 30


class FileStorage(optuna.storages.RDBStorage):
    """Optuna's storage, which reads all trials at once as `read_study` does: at the start of a sweep, of which it is most at thousands.

    Args:
        file: of the study. engine_kwargs: see `RDBStorage`.
    """

    def __init__(self, file: Path, engine_kwargs: dict[str, Any]) -> None:
        super().__init__(f"sqlite:///{file}", engine_kwargs=engine_kwargs)
        self._file = file

    def _get_trials(
        self, study_id: int, states: Container[TrialState] | None, included_trial_ids: set[int], trial_id_greater_than: int
    ) -> list[FrozenTrial]:
        # Optuna's cache asks for everything at first, and from then on for what is new.
        if states is None and trial_id_greater_than == -1:
            try:
                record = read_known_schema(self._file, self.get_study_name_from_id(study_id))
            except sqlite3.Error as error:
                raise optuna.exceptions.StorageInternalError(f"{self._file} cannot be read") from error
            if record is not None:
                return record.trials
        return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)


@dataclass(frozen=True)
class StudyRecord:
    """A study as it stood when it was read.

    Attributes:
        user_attrs: of the study. trials: by number.
    """

    user_attrs: dict[str, Any]
    trials: list[FrozenTrial]

    def get_trials(self, deepcopy: bool = False) -> list[FrozenTrial]:
        """Return the trials, as an Optuna study does; they are not to be changed."""
        assert not deepcopy
        return self.trials


def read_study(file: Path, name: str) -> StudyRecord:
    """Read a study; nothing is written.

    Raises:
        sqlite3.Error: it is no such database, damaged, or locked by another program.
        KeyError, ValueError: it has no study of this name, or what stands in it is not what should.
    """
    record = read_known_schema(file, name)
    if record is not None:
        return record
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{file}")
    return StudyRecord(study.user_attrs, study.get_trials(deepcopy=False))


def read_known_schema(file: Path, name: str) -> StudyRecord | None:
    """Return what `read_study` does, None where the tables are those of another version."""
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=_LOCKED_S)) as connection:
        connection.execute("BEGIN")  # all tables as they are at one moment
        (schema,) = connection.execute("SELECT schema_version FROM version_info").fetchone()
        return _read(connection, name) if schema == SCHEMA else None


def _read(connection: sqlite3.Connection, name: str) -> StudyRecord:
    found = connection.execute("SELECT study_id FROM studies WHERE study_name = ?", (name,)).fetchone()
    if found is None:
        raise KeyError(f"no study {name!r}")
    (study,) = found
    said = connection.execute("SELECT key, value_json FROM study_user_attributes WHERE study_id = ?", (study,))
    user_attrs = {key: json.loads(value) for key, value in said}
    trials = {}
    columns = "trial_id, number, state, datetime_start, datetime_complete"
    for trial, number, state, start, end in connection.execute(
        f"SELECT {columns} FROM trials WHERE study_id = ? ORDER BY number", (study,)
    ):
        trials[trial] = FrozenTrial(
            number=number,
            state=TrialState[state],
            value=None,
            values=None,
            datetime_start=_time(start),
            datetime_complete=_time(end),
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=trial,
        )

    def rows(table: str, columns: str, order: str) -> Iterator[tuple[Any, ...]]:
        query = f"SELECT trial_id, {columns} FROM {table} JOIN trials USING (trial_id) WHERE study_id = ? ORDER BY {order}"
        yield from connection.execute(query, (study,))

    for trial, key, value, text in rows("trial_params", "param_name, param_value, distribution_json", "param_id"):
        distribution = _distribution(text)
        trials[trial].params[key] = distribution.to_external_repr(value)
        trials[trial].distributions[key] = distribution
    values: dict[int, list[float]] = {}
    for trial, value, kind in rows("trial_values", "value, value_type", "objective"):
        values.setdefault(trial, []).append(_number(value, kind))
    for trial, found in values.items():
        trials[trial].values = found
    for trial, key, value in rows("trial_user_attributes", "key, value_json", "trial_user_attribute_id"):
        trials[trial].user_attrs[key] = json.loads(value)
    for trial, key, value in rows("trial_system_attributes", "key, value_json", "trial_system_attribute_id"):
        trials[trial].system_attrs[key] = json.loads(value)
    for trial, step, value, kind in rows("trial_intermediate_values", "step, intermediate_value, intermediate_value_type", "step"):
        trials[trial].intermediate_values[step] = _number(value, kind)
    return StudyRecord(user_attrs, list(trials.values()))


@functools.lru_cache(maxsize=10_000)
def _distribution(text: str) -> BaseDistribution:
    """Return a distribution; most trials of a sweep share theirs."""
    return json_to_distribution(text)


def _number(value: float | None, kind: str) -> float:
    return _NOT_FINITE[kind] if value is None else float(value)


def _time(text: str | None) -> datetime.datetime | None:
    return None if text is None else datetime.datetime.fromisoformat(text)
