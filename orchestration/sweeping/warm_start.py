"""Points that a sweep tries first because something is known of them: the best of another sweep, and finished runs of the home.

Only points are taken over, never their values: those of another sweep may be of other data or of fewer epochs. A finished run that is a
point of this very space is such a trial already; proposed again it is found in its run folder, measured, and not trained a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import UserError
from orchestration import console
from orchestration.experiment import OPERATIONAL_SECTIONS, ExperimentConfig
from orchestration.home import Home, readable
from orchestration.run_folder import RESULT_FILE, RunFolder
from orchestration.search_space import RECIPE, ordered, scoped, split
from orchestration.sweeping.config import SweepConfig, sweep_key
from orchestration.sweeping.status import find_sweep, read_sweep
from orchestration.sweeping.study import STUDY_ERRORS, STUDY_FILE_ERRORS, all_trials, study_to_look_at, top_trials


def warm_points(config: SweepConfig, home: Home) -> list[dict[str, Any]]:
    """Return the points that a sweep's warm start names, the best first, none twice.

    Raises:
        UserError: there is no such sweep in the home, or nothing of it fits the space.
    """
    asked = config.warm_start
    if asked is None:
        return []
    found = list(_of_sweep(config, home, asked.sweep)) if asked.sweep else []
    if asked.runs:
        found += _of_runs(config, home)
    unique = {repr(sorted(point.items())): point for point in reversed(found)}
    points = list(reversed(unique.values()))
    if not points:
        console.warn(f"sweep {config.name}: no finished run of the home is a point of the space: nothing to start from")
    return points


def _of_sweep(config: SweepConfig, home: Home, name: str) -> Iterator[dict[str, Any]]:
    """Yield the points of the best trials of another sweep, as far as they lie in this space."""
    assert config.warm_start is not None and config.space is not None
    where = f"sweep {config.name}: warm_start.sweep"
    key = find_sweep(home, name)
    if key == sweep_key(config):
        raise UserError(f"{where}: {key} is this sweep itself; it goes on without being asked")
    try:
        source = read_sweep(home.sweep(key))
        study = study_to_look_at(source, home.sweep(key))
    except (*STUDY_ERRORS, *STUDY_FILE_ERRORS) as error:
        raise UserError(f"{where}: the study of {key} cannot be read: {error}") from None
    trials = {trial.number: trial for trial in all_trials(study)}
    count, reason = 0, "it has no trial that trained to its end"
    for number in top_trials(source, study, len(trials)):
        point = {name: value for name, value in trials[number].user_attrs["values"].items() if name in config.space}
        problem = _problem_with(config, point)
        if problem is None:
            yield point
            count += 1
        else:
            reason = f"trial {number}: {problem}"
        if count == config.warm_start.top:
            return
    if not count:
        raise UserError(f"{where}: no point of {key} fits the space: {reason}")


def _problem_with(config: SweepConfig, point: dict[str, Any]) -> str | None:
    """Return why a point cannot be tried first, None if it can; it may leave dimensions open."""
    assert config.space is not None
    if not point:
        return "it shares no dimension"
    for name, value in point.items():
        dimension = config.space[name]
        if not dimension.takes(value):
            return f"{name} does not take {value!r}"
        if dimension.above is not None and (dimension.above not in point or value < point[dimension.above]):
            return f"{name} does not lie above {dimension.above}"
    try:
        config.experiment(point)
    except UserError as error:
        return str(error)
    return None


def _of_runs(config: SweepConfig, home: Home) -> list[dict[str, Any]]:
    """Return the points of finished runs that are trials of this sweep but for their record, the best by the first objective first."""
    assert config.warm_start is not None
    goal = config.objectives[0]
    bases = dict(zip(config.all_recipes, config.base_experiments(), strict=True))

    def read(folder: Path) -> tuple[float, dict[str, Any]] | None:
        run = RunFolder(folder)
        experiment = run.read_config()
        for recipe, base in bases.items():
            point = _point_of(config, recipe, base, experiment)
            if point is None or config.experiment(point).fingerprint != folder.name:
                continue
            result = run.result()
            assert result is not None
            value = result["metrics"].get(goal.metric, float("-inf" if goal.mode == "max" else "inf"))
            return (-value if goal.mode == "max" else value), point
        return None

    folders = (path.parent for path in home.entries(f"runs/*/{RESULT_FILE}"))
    found = [each for each in readable(read, folders) if each is not None]
    return [point for _, point in sorted(found, key=lambda each: each[0])][: config.warm_start.top]


def _point_of(config: SweepConfig, recipe: str, base: ExperimentConfig, experiment: ExperimentConfig) -> dict[str, Any] | None:
    """Return the values of a run in the space; None: it differs from the recipe elsewhere too, or lies outside."""
    assert config.space is not None
    own, usual = experiment.flatten(), base.flatten()
    point: dict[str, Any] = {RECIPE: recipe} if config.recipes else {}
    fields = set()
    for name in ordered(config.space):
        dimension = config.space[name]
        of, field = split(name) if config.recipes else (None, name)
        if name == RECIPE or (of is not None and of != recipe):
            continue
        fields.add(field)
        if any(point.get(other) not in allowed for other, allowed in dimension.when.items() if other != RECIPE):
            continue
        if field not in own or not dimension.takes(own[field]):
            return None
        point[scoped(recipe, field) if of is not None else field] = own[field]
    ignored = (*OPERATIONAL_SECTIONS, "name", "description")
    differs = any(
        own.get(key) != usual.get(key) for key in own.keys() | usual.keys() if key not in fields and key.split(".")[0] not in ignored
    )
    return None if differs else point
