"""What is shown and kept of a finished search: trials, front, constraints, importances, rank of the proxy, plots."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial

from orchestration import console
from orchestration.sweeping.analysis import MIN_TRIALS, RankCorrelation, full_trials, importances, infeasible, proxy_correlations
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goals import format_goal
from orchestration.sweeping.listener import dimension_cells, dimension_titles
from orchestration.sweeping.plots import write_plots
from orchestration.sweeping.study import METRICS, superseded
from orchestration.sweeping.sweep import SweepOutcome
from orchestration.tracking.tracker import Tracker

ENDS = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}


def show_trials(config: SweepConfig, outcome: SweepOutcome, winner: int | None) -> None:
    """Print a table of all trials, then the Pareto front and what violates a constraint."""
    rows = []
    again = superseded(outcome.study)
    violating = dict(infeasible(config, outcome.study))
    for trial in sorted(outcome.study.trials, key=lambda trial: trial.number):
        if "values" not in trial.user_attrs or trial.number in again:
            continue
        shown = dimension_cells(config, trial.user_attrs["values"])
        ended = ENDS.get(trial.state.name, trial.state.name.lower())
        scores = _scores(config, trial) if trial.state.name == "COMPLETE" else ["" for _ in config.objectives]
        front = "front" if len(config.objectives) > 1 else ""
        mark = "winner" if trial.number == winner else front if trial.number in outcome.best else ""
        mark = mark or ("violates a constraint" if trial.number in violating else "")
        rows.append([trial.number, ended, trial.user_attrs.get("epochs", ""), *shown, *scores, mark])
    columns = ["trial", "ended", "epochs", *dimension_titles(config), *(objective.metric for objective in config.objectives), ""]
    console.table("trials", columns, rows)
    if len(config.objectives) > 1:
        _show_front(config, outcome)
    for number, reason in violating.items():
        console.say(f"trial {number} cannot win: not {reason}")


def _scores(config: SweepConfig, trial: FrozenTrial) -> list[str]:
    metrics = trial.user_attrs.get(METRICS, {})
    return [format_goal(objective.metric, value, metrics) for objective, value in zip(config.objectives, trial.values, strict=True)]


def _show_front(config: SweepConfig, outcome: SweepOutcome) -> None:
    trials = sorted((t for t in full_trials(outcome.study) if t.number in outcome.best), key=lambda t: -t.values[0])
    rows = [[t.number, *dimension_cells(config, t.user_attrs["values"]), *_scores(config, t)] for t in trials]
    goals = [f"{objective.metric} ({objective.mode})" for objective in config.objectives]
    console.table("Pareto front: no trial is better in one of these without being worse in another", [
        "trial", *dimension_titles(config), *goals
    ], rows)  # fmt: skip


def conclude_search(config: SweepConfig, outcome: SweepOutcome, winner: int | None, tracker: Tracker) -> dict[str, Any]:
    """Say what mattered and how far the proxy can be trusted, write the plots, log all to the sweep's run; return it as JSON types."""
    epochs = max(experiment.training.epochs for experiment in config.base_experiments())
    shares = importances(config, outcome.study)
    correlations = proxy_correlations(config, outcome.study, epochs)
    _say_importances(config, shares)
    _say_correlations(config, correlations)
    files = write_plots(config, outcome.study, outcome.folder / "plots", winner, shares)
    for file in files:
        tracker.log_file(outcome.parent_run, file, "plots")
    if files:
        console.say(f"plots in {outcome.folder / 'plots'} and in MLflow: {', '.join(file.name for file in files)}")
    tracker.log_metrics(
        outcome.parent_run, {f"proxy/rank_correlation/epoch_{each.epoch}": each.rho for each in correlations if each.rho is not None}
    )
    front = [
        {"trial": trial.number, "fingerprint": trial.user_attrs["fingerprint"]}
        | dict(zip((objective.metric for objective in config.objectives), trial.values, strict=True))
        for trial in full_trials(outcome.study)
        if trial.number in outcome.best
    ]
    found = {
        "front": front,
        "infeasible": [{"trial": number, "reason": reason} for number, reason in infeasible(config, outcome.study)],
        "importances": shares,
        "proxy": [vars(each) for each in correlations],
        "plots": [str(file) for file in files],
    }
    tracker.log_json(outcome.parent_run, found, "search.json")
    return found


def _say_importances(config: SweepConfig, shares: dict[str, dict[str, float]] | None) -> None:
    if shares is None:
        console.say(f"no importances: they need {MIN_TRIALS} full-budget trials that share a dimension with different values")
        return
    names = list(dict.fromkeys(name for column in shares.values() for name in column))
    console.table(
        "importance: share of each objective's variance over full-budget trials (fANOVA; unreliable with few trials)",
        ["dimension", *shares],
        [[name, *(f"{100 * column[name]:.0f} %" for column in shares.values())] for name in names],
    )


def _say_correlations(config: SweepConfig, correlations: list[RankCorrelation]) -> None:
    if config.stopping is None:
        return
    if not correlations:
        console.say(f"the proxy's rank correlation needs {MIN_TRIALS} full-budget trials; there are fewer")
        return
    console.table(
        f"Spearman's rank correlation of {config.stopping.metric} (what stops trials) with {config.objectives[0].metric} at the end, "
        "over trials that reached it",
        ["epoch", "trials", "correlation", "p"],
        [
            [each.epoch, each.num_trials, *("all equal" if value is None else f"{value:+.2g}" for value in (each.rho, each.p_value))]
            for each in correlations
        ],
    )
