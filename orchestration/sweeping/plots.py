"""Plots of a sweep, as PNG files in its folder: history, parallel coordinates, Pareto front, importances, rank of the proxy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from analysis.reporting.figure_style import COLORS, PAGE_WIDTH, PALE, new_figure, save_figure, style
from orchestration.search_space import RECIPE, label, split
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.study import all_trials, full_trials, is_feasible, proxy_values, superseded

_FULL, _STOPPED, _INFEASIBLE, _WINNER = COLORS[0], PALE, COLORS[1], COLORS[2]


@style()
def write_plots(
    config: SweepConfig,
    study: optuna.Study,
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
    figures: dict[str, Figure] = {}
    trials = full_trials(study)
    if trials:
        figures["history"] = _history(config, study, trials, winner)
        figures["parallel_coordinates"] = _parallel_coordinates(config, trials, winner)
        if len(config.objectives) > 1:
            figures["pareto_front"] = _front(config, study, trials, winner)
    if importance:
        figures["importances"] = _importances(importance)
    return [file for name, figure in figures.items() for file in save_figure(figure, folder / name, ("png",))]


def _figure(rows: int = 1, width: float = PAGE_WIDTH, height: float = 3.6) -> tuple[Figure, list[Any]]:
    figure = new_figure(width, height * rows)
    return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def _color(trial: FrozenTrial, winner: int | None) -> str:
    if trial.number == winner:
        return _WINNER
    return _FULL if is_feasible(trial) else _INFEASIBLE


def _history(config: SweepConfig, study: optuna.Study, trials: Sequence[FrozenTrial], winner: int | None) -> Figure:
    """Value of each objective by trial, the best so far, and trials that were stopped by the last value that they were stopped for."""
    figure, axes = _figure(len(config.objectives))
    again = superseded(study)
    for index, (objective, axis) in enumerate(zip(config.objectives, axes, strict=True)):
        axis.scatter(
            [trial.number for trial in trials],
            [trial.values[index] for trial in trials],
            c=[_color(trial, winner) for trial in trials],
            zorder=3,
        )
        feasible = [trial for trial in trials if is_feasible(trial)]
        if feasible:
            best = np.maximum.accumulate if objective.mode == "max" else np.minimum.accumulate
            axis.step([t.number for t in feasible], best([t.values[index] for t in feasible]), where="post", color=_FULL, linewidth=1)
        if config.stopping is not None and config.stopping.metric == objective.metric:
            for trial in all_trials(study):
                values = proxy_values(config, trial)
                if trial.state == TrialState.PRUNED and trial.number not in again and values:
                    axis.scatter([trial.number], [values[max(values)]], marker="x", color=_STOPPED)
        axis.set_ylabel(objective.metric)
    axes[0].set_title(f"{config.name}: blue full budget, green the winner, orange violates a constraint, grey cross stopped early")
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("trial")
    return figure


def _parallel_coordinates(config: SweepConfig, trials: Sequence[FrozenTrial], winner: int | None) -> Figure:
    """One line per full-budget trial through its values; the color is the first objective."""
    names = [name for name in config.space or {} if any(name in trial.params for trial in trials)]
    columns = [*names, *(objective.metric for objective in config.objectives)]
    figure, (axis,) = _figure(width=max(6.0, 1.7 * len(columns)))
    heights = [_heights(config, name, trials) for name in names]
    for index in range(len(config.objectives)):
        heights.append(_scaled([trial.values[index] for trial in trials]))
    shades = _scaled([trial.values[0] for trial in trials])
    for row, trial in enumerate(trials):
        chosen = [column[row] for column in heights]
        axis.plot(
            range(len(columns)),
            chosen,
            color=_WINNER if trial.number == winner else colormaps["viridis"](shades[row]),
            linewidth=2.5 if trial.number == winner else 1.0,
            alpha=0.9,
            marker="o",
            markersize=3,
        )
    axis.set_xticks(range(len(columns)), [_title(config, name) for name in columns], rotation=25, ha="right")
    axis.set_yticks([0, 1], ["lowest", "highest"])
    for position, name in enumerate(columns):
        low, high = _range(config, name, trials)
        axis.text(position, -0.09, low, ha="center", va="top", fontsize=6)
        axis.text(position, 1.03, high, ha="center", va="bottom", fontsize=6)
    axis.tick_params(axis="x", pad=16)
    axis.set_ylim(-0.04, 1.04)
    axis.grid(False, axis="y")
    axis.set_title(f"{config.name}: full-budget trials; green: the winner; a gap: the trial has no such dimension", pad=16)
    return figure


def _heights(config: SweepConfig, name: str, trials: Sequence[FrozenTrial]) -> list[float]:
    """Return each trial's place in [0,1] on a dimension's axis; not a number where it has no such dimension."""
    dimension = (config.space or {})[name]
    if dimension.type == "choice":
        labels = [label(choice) for choice in dimension.choices]
        last = max(1, len(labels) - 1)
        return [labels.index(trial.params[name]) / last if name in trial.params else float("nan") for trial in trials]
    values = [float(trial.params.get(name, "nan")) for trial in trials]
    return _scaled([float(np.log(value)) for value in values] if dimension.log else values)


def _scaled(values: Sequence[float]) -> list[float]:
    known = [value for value in values if not np.isnan(value)]
    low, high = min(known), max(known)
    return [0.5 if high == low else (value - low) / (high - low) for value in values]


def _range(config: SweepConfig, name: str, trials: Sequence[FrozenTrial]) -> tuple[str, str]:
    """Return the texts at the lower and upper end of an axis."""
    dimension = (config.space or {}).get(name)
    if dimension is not None and dimension.type == "choice":
        labels = [str(label(choice)) for choice in dimension.choices]
        return labels[0][:18], labels[-1][:18]
    if dimension is None:
        index = [objective.metric for objective in config.objectives].index(name)
        values = [trial.values[index] for trial in trials]
    else:
        values = [trial.params[name] for trial in trials if name in trial.params]
    return f"{min(values):.4g}", f"{max(values):.4g}"


def _title(config: SweepConfig, name: str) -> str:
    if name not in (config.space or {}) or name == RECIPE:
        return name
    recipe, field = split(name) if config.recipes else (None, name)
    return (f"{recipe}\n" if recipe else "") + field.rpartition(".")[2]


def _front(config: SweepConfig, study: optuna.Study, trials: Sequence[FrozenTrial], winner: int | None) -> Figure:
    """Each further objective against the first; the front's trials are numbered."""
    figure, axes = _figure(len(config.objectives) - 1, width=5.5, height=4.2)
    best = {trial.number for trial in study.best_trials if is_feasible(trial)} if any(map(is_feasible, trials)) else set()
    for index, axis in enumerate(axes, start=1):
        axis.scatter([t.values[0] for t in trials], [t.values[index] for t in trials], c=[_color(t, winner) for t in trials], alpha=0.6)
        front = sorted((trial for trial in trials if trial.number in best), key=lambda trial: trial.values[0])
        axis.plot([t.values[0] for t in front], [t.values[index] for t in front], color=_FULL, linewidth=1, marker="o", mfc="none", ms=9)
        for trial in front:
            axis.annotate(str(trial.number), (trial.values[0], trial.values[index]), textcoords="offset points", xytext=(7, 5))
        axis.set_xlabel(f"{config.objectives[0].metric} ({config.objectives[0].mode})")
        axis.set_ylabel(f"{config.objectives[index].metric} ({config.objectives[index].mode})")
    axes[0].set_title(f"{config.name}: ringed trials are the Pareto front")
    return figure


def _importances(importance: Mapping[str, Mapping[str, float]]) -> Figure:
    names = list(next(iter(importance.values())))
    figure, (axis,) = _figure(height=1.2 + 0.35 * len(names) * len(importance))
    height = 0.8 / len(importance)
    for index, (metric, shares) in enumerate(importance.items()):
        axis.barh([row + index * height for row in range(len(names))], [shares[name] for name in names], height=height, label=metric)
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], [name.rpartition(".")[2] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("share in reaching the best tenth of full-budget trials (PED-ANOVA)")
    axis.legend()
    return figure
