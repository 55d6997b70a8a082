"""Plots of a sweep in its folder: Optuna's own where it has them, each point a link to the run that it stands for.

As PNG for looking and, where points are runs, as SVG: a browser that opens it follows a point to the run's folder in the home.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as optuna_plots

from analysis.reporting.figure_style import COLORS, PAGE_WIDTH, PALE, borrowed_pyplot, new_figure, save_figure, style
from orchestration.search_space import label
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goal_metrics import goal_interval
from orchestration.sweeping.study import AnyStudy, all_trials, best_trials, full_trials, is_feasible, proxy_values, superseded

_FULL, _STOPPED, _INFEASIBLE, _WINNER = COLORS[0], PALE, COLORS[1], COLORS[2]

MOST_DRAWN = 1000
"""Trials in plots of the space: of more the best ones. A line or a link for each of thousands would show nothing and take minutes."""

METHOD = "PED-ANOVA"
"""How importances are found, as every table and plot of them says."""


def write_plots(
    config: SweepConfig,
    study: AnyStudy,
    folder: Path,
    winner: int | None = None,
    importance: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write every plot that the study has something for, and return the files.

    Args:
        folder: created if missing.
        winner: trial to point out.
        importance: from `findings.importances`.
    """
    trials = full_trials(study)
    written: list[Path] = []
    with style():
        if trials:
            written += save_figure(_history(config, study, trials, winner), folder / "history", ("png", "svg"))
            if len(config.objectives) > 1:
                written += save_figure(_front(config, study, trials, winner), folder / "pareto_front", ("png", "svg"))
        if importance:
            written += save_figure(_importances(importance), folder / "importances", ("png",))
    return written + (_of_space(config, trials, folder, importance) if trials else [])


def link_to(trial: FrozenTrial) -> str:
    """Return where a plot's file finds the run of a trial: plots and runs lie in the same home, which may be moved."""
    return f"../../../runs/{trial.user_attrs.get('fingerprint', '')}"


def _link(points: PathCollection, trials: Sequence[FrozenTrial]) -> None:
    """Make each point a link to its trial's run."""
    points.set_urls([link_to(trial) for trial in trials])


def _figure(rows: int = 1, width: float = PAGE_WIDTH, height: float = 3.6) -> tuple[Figure, list[Any]]:
    figure = new_figure(width, height * rows)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _color(trial: FrozenTrial, winner: int | None) -> str:
    if trial.number == winner:
        return _WINNER
    return _FULL if is_feasible(trial) else _INFEASIBLE


def _history(config: SweepConfig, study: AnyStudy, trials: Sequence[FrozenTrial], winner: int | None) -> Figure:
    """Value of each objective by trial, the best so far, and trials that were stopped by the last value that they were stopped for.

    Optuna's own history has neither stopped trials nor a winner.
    """
    figure, axes = _figure(len(config.objectives))
    again = superseded(study)
    stopped = [trial for trial in all_trials(study) if trial.state == TrialState.PRUNED and trial.number not in again]
    for index, (objective, axis) in enumerate(zip(config.objectives, axes, strict=True)):
        points = axis.scatter(
            [trial.number for trial in trials],
            [trial.values[index] for trial in trials],
            c=[_color(trial, winner) for trial in trials],
            zorder=3,
        )
        _link(points, trials)
        feasible = [trial for trial in trials if is_feasible(trial)]
        if feasible:
            best = np.maximum.accumulate if objective.mode == "max" else np.minimum.accumulate
            axis.step([t.number for t in feasible], best([t.values[index] for t in feasible]), where="post", color=_FULL, linewidth=1)
        if config.stopping is not None and config.stopping.metric == objective.metric:
            last = [(trial, values[max(values)]) for trial in stopped if (values := proxy_values(config, trial))]
            if last:
                crosses = axis.scatter([trial.number for trial, _ in last], [value for _, value in last], marker="x", color=_STOPPED)
                _link(crosses, [trial for trial, _ in last])
        axis.set_ylabel(objective.metric)
    axes[0].set_title(f"{config.name}: blue full budget, green the winner, orange violates a constraint, grey cross stopped early")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("trial")
    return figure


def _front(config: SweepConfig, study: AnyStudy, trials: Sequence[FrozenTrial], winner: int | None) -> Figure:
    """Each further objective against the first; the front's trials are ringed and numbered, with the intervals of their accuracies."""
    figure, axes = _figure(len(config.objectives) - 1, width=5.5, height=4.2)
    best = set(best_trials(config, study))
    front = sorted((trial for trial in trials if trial.number in best), key=lambda trial: trial.values[0])
    for index, axis in enumerate(axes, start=1):
        x, y = ([trial.values[each] for trial in trials] for each in (0, index))
        _link(axis.scatter(x, y, c=[_color(trial, winner) for trial in trials], alpha=0.6), trials)
        on_front = [[trial.values[each] for trial in front] for each in (0, index)]
        axis.plot(*on_front, color=_FULL, linewidth=1, marker="o", mfc="none", ms=9)
        bars = [_bars(config, front, each) for each in (0, index)]
        axis.errorbar(*on_front, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=_FULL, elinewidth=0.8, alpha=0.7)
        for trial in front:
            axis.annotate(str(trial.number), (trial.values[0], trial.values[index]), textcoords="offset points", xytext=(7, 5))
        axis.set_xlabel(f"{config.objectives[0].metric} ({config.objectives[0].mode})")
        axis.set_ylabel(f"{config.objectives[index].metric} ({config.objectives[index].mode})")
    axes[0].set_title(f"{config.name}: ringed trials are the Pareto front; bars: 95 % of an accuracy on so many validation images")
    return figure


def _bars(config: SweepConfig, front: Sequence[FrozenTrial], index: int) -> np.ndarray | None:
    """Return (2, trials): how far the intervals of an objective reach below and above; None: it is no accuracy."""
    metric = config.objectives[index].metric
    found = [goal_interval(config, trial.user_attrs.get("values", {}), metric, trial.values[index]) for trial in front]
    known = [each for each in found if each is not None]
    if len(known) < len(front) or not front:
        return None
    return np.array([[trial.values[index] - low, high - trial.values[index]] for trial, (low, high) in zip(front, known, strict=True)]).T


def _importances(importance: Mapping[str, Mapping[str, float]]) -> Figure:
    names = list(next(iter(importance.values())))
    figure, (axis,) = _figure(height=1.2 + 0.35 * len(names) * len(importance))
    height = 0.8 / len(importance)
    for index, (metric, shares) in enumerate(importance.items()):
        axis.barh([row + index * height for row in range(len(names))], [shares[name] for name in names], height=height, label=metric)
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], [name.rpartition(".")[2] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel(f"share in reaching the best tenth of full-budget trials ({METHOD})")
    axis.legend()
    return figure


def _of_space(
    config: SweepConfig, trials: Sequence[FrozenTrial], folder: Path, importance: Mapping[str, Mapping[str, float]] | None
) -> list[Path]:
    """Write Optuna's plots of where the first objective is good: slices, parallel coordinates, the contour of two dimensions."""
    goal = config.objectives[0]
    if len(trials) > MOST_DRAWN:
        sign = 1 if goal.mode == "max" else -1
        trials = sorted(sorted(trials, key=lambda trial: -sign * trial.values[0])[:MOST_DRAWN], key=lambda trial: trial.number)
    shown = as_shown(config, trials)
    known = shown.get_trials(deepcopy=False)
    titles = short_names(config)
    names = [title for title in titles.values() if any(title in trial.params for trial in known)]
    varied = [name for name in names if len({trial.params.get(name) for trial in known}) > 1]
    written: list[Path] = []
    with borrowed_pyplot(), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if names:
            axes: Any = optuna_plots.plot_parallel_coordinate(shown, params=names, target_name=goal.metric)
            written += _save(axes, f"{config.name}: {goal.metric} ({goal.mode})", folder / "parallel_coordinates", 1.7 * (len(names) + 2))
            axes = optuna_plots.plot_slice(shown, params=names, target_name=goal.metric)
            for axis in np.atleast_1d(axes):
                _link_by_number(axis, trials)
            written += _save(axes, f"{config.name}: {goal.metric} ({goal.mode})", folder / "slice", 2.2 * len(names) + 1, ("png", "svg"))
        shares = {titles[name]: share for name, share in (importance or {}).get(goal.metric, {}).items()}
        pair = sorted(varied, key=lambda name: -shares.get(name, -1.0))[:2]
        if len(pair) == 2 and len(trials) > 2:
            axes = optuna_plots.plot_contour(shown, params=pair, target_name=goal.metric)
            written += _save(axes, f"{config.name}: the two dimensions that matter most", folder / "contour", 6.0)
    return written


def as_shown(config: SweepConfig, trials: Sequence[FrozenTrial]) -> optuna.Study:
    """Return a study of full-budget trials with the values that they trained with, and the first objective, for Optuna's plots.

    A sampler may know a dimension by another name or range than it has: see `search_space.suggest`.
    """
    shown = optuna.create_study(direction="maximize" if config.objectives[0].mode == "max" else "minimize")
    titles = short_names(config)
    distributions = {name: dimension.distribution() for name, dimension in (config.space or {}).items()}
    for trial in trials:
        values = shown_values(trial)
        shown.add_trial(
            optuna.trial.create_trial(
                params={titles[name]: value for name, value in values.items()},
                distributions={titles[name]: distributions[name] for name in values},
                value=trial.values[0],
                constraints=dict(trial.constraints) or None,
            )
        )
    return shown


def short_names(config: SweepConfig) -> dict[str, str]:
    """Return dimension -> what it is called beside an axis: its last word where no other has it."""
    last = {name: name.rpartition(".")[2] for name in config.space or {}}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def shown_values(trial: FrozenTrial) -> dict[str, Any]:
    """Return dimension -> the value that a trial trained with, choices as Optuna names them."""
    return {name: label(value) for name, value in trial.user_attrs["values"].items()}


def _link_by_number(axis: Axes, trials: Sequence[FrozenTrial]) -> None:
    """Link the points of one of Optuna's slices: it colours feasible ones by their place in the study, others are known by their value."""
    for points in axis.collections:
        if not isinstance(points, PathCollection):
            continue
        numbers = points.get_array()
        if numbers is not None:
            shown = [trials[int(number)] for number in numbers]
            points.set_array(np.array([trial.number for trial in shown]))
            points.autoscale()
        else:
            left = [trial for trial in trials if not is_feasible(trial)]
            shown = [left.pop(_first_with(float(value), left)) for value in np.asarray(points.get_offsets())[:, 1]]
        _link(points, shown)


def _first_with(value: float, trials: Sequence[FrozenTrial]) -> int:
    """Return the place of the first trial with a value of the first objective."""
    return next(index for index, trial in enumerate(trials) if trial.values[0] == value)


def _save(axes: Any, title: str, path: Path, width: float, formats: Sequence[Any] = ("png",)) -> list[Path]:
    figure: Any = np.atleast_1d(axes).flat[0].figure
    np.atleast_1d(axes).flat[0].set_title("")
    figure.suptitle(title)
    figure.set_size_inches(max(6.0, width), 4.2)
    return save_figure(figure, path, formats)
