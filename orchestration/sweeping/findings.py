"""What a finished search found beyond its winner: the front, what mattered, whether the cheap proxy ranks trials as the final measure.

First computed from the study, then shown, plotted and logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from scipy import stats

from orchestration import console
from orchestration.sweeping.config import SweepConfig, dimension_cells, dimension_titles
from orchestration.sweeping.goal_metrics import goal_interval
from orchestration.sweeping.goals import format_goal
from orchestration.sweeping.plots import METHOD, shown_values, write_plots
from orchestration.sweeping.search import Search
from orchestration.sweeping.study import METRICS, AnyStudy, all_trials, full_trials, is_feasible, proxy_values, superseded, top_trials
from trainers.complaints import complaints

MOST_SHOWN = 40
MIN_TRIALS = 4  # fewer full-budget trials say nothing about importances or ranks


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation between the proxy after some epochs and the final measure.

    Attributes:
        epoch: epochs after which the proxy was taken. num_trials: full-budget trials that have both.
        rho: the correlation in [-1, 1], positive where the proxy prefers what the objective prefers; None if all ranks are equal.
        p_value: two-sided, None with rho.
    """

    epoch: int
    num_trials: int
    rho: float | None
    p_value: float | None


def rungs(config: SweepConfig, epochs: int) -> list[int]:
    """Return the epochs at which ASHA compares trials, and the last epoch."""
    if config.stopping is None:
        return []
    epoch, found = float(min(config.stopping.grace_epochs, epochs)), []
    while epoch < epochs:
        found.append(int(epoch))
        epoch *= config.stopping.reduction_factor
    return sorted({*found, epochs})


def proxy_correlations(config: SweepConfig, trials: Sequence[FrozenTrial], epochs: int) -> list[RankCorrelation]:
    """Return how the metric that early stopping watches ranks full-budget trials at each rung, against the first objective at the end.

    Only trials that reached their end have both, and the proxy itself chose those: the correlation over all trials may differ.
    """
    sign = 1 if config.objectives[0].mode == "max" else -1
    found = []
    for epoch in rungs(config, epochs):
        pairs = []
        for trial in trials:
            values = proxy_values(config, trial)
            if epoch in values:
                pairs.append((values[epoch], sign * trial.values[0]))
        if len(pairs) < MIN_TRIALS:
            continue
        proxies, finals = zip(*pairs, strict=True)
        if len(set(proxies)) == 1 or len(set(finals)) == 1:
            found.append(RankCorrelation(epoch, len(pairs), None, None))
            continue
        outcome = stats.spearmanr(proxies, finals)
        found.append(RankCorrelation(epoch, len(pairs), float(outcome.statistic), float(outcome.pvalue)))
    return found


def importances(config: SweepConfig, trials: Sequence[FrozenTrial]) -> dict[str, dict[str, float]] | None:
    """Return objective -> dimension -> its share in what makes a full-budget trial one of the best tenth (PED-ANOVA, Watanabe et al. 2023).

    Shares add up to one. Unlike fANOVA's, which explain the variance of good and bad values alike, they take 0.1 s for 5,000 trials and not
    hours.

    Dimensions that only some trials have (conditional ones) are left out. None: there are fewer than four full-budget trials, or no
    dimension that all of them have takes different values.
    """
    if len(trials) < MIN_TRIALS:
        return None
    chosen = [shown_values(trial) for trial in trials]
    common = [name for name in config.space or {} if all(name in values for values in chosen)]
    common = [name for name in common if len({values[name] for values in chosen}) > 1]
    if not common:
        return None
    # Optuna does not compare trials whose ranges differ, as those of B above A do: here every trial gets the whole range.
    distributions = {name: (config.space or {})[name].distribution() for name in common}
    table = {}
    for index, objective in enumerate(config.objectives):
        if len({trial.values[index] for trial in trials}) == 1:
            table[objective.metric] = dict.fromkeys(common, 0.0)
            continue
        copied = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
        copied.add_trials(
            [
                optuna.trial.create_trial(
                    params={name: values[name] for name in common}, distributions=distributions, value=trial.values[index]
                )
                for values, trial in zip(chosen, trials, strict=True)
            ]
        )
        scores = optuna.importance.get_param_importances(copied, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
        table[objective.metric] = dict(sorted(scores.items(), key=lambda item: -item[1]))
    return table


def infeasible(config: SweepConfig, trials: Sequence[FrozenTrial]) -> list[tuple[int, str]]:
    """Return (trial, what it violates) of the full-budget trials that violate a constraint."""
    found = []
    for trial in trials:
        if is_feasible(trial):
            continue
        metrics = trial.user_attrs.get(METRICS, {})
        broken = [f"{key} (it has {_value(config, key, metrics)})" for key, violation in trial.constraints.items() if violation > 0]
        found.append((trial.number, ", ".join(broken)))
    return found


def _value(config: SweepConfig, key: str, metrics: dict[str, float]) -> str:
    for constraint in config.constraints:
        if constraint.key == key and constraint.metric in metrics:
            return f"{metrics[constraint.metric]:.4g}"
    return "another value"


def not_learning(trials: Sequence[FrozenTrial]) -> list[tuple[int, str]]:
    """Return (trial, sentence) of every sign in the selected epoch of a full-budget trial that it did not learn."""
    return [(trial.number, text) for trial in trials for text in complaints(trial.user_attrs.get(METRICS, {})).values()]


ENDS = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}


def show_trials(search: Search, winner: int | None) -> None:
    """Print a table of all trials, then the Pareto front and what violates a constraint."""
    config, best, full = search.config, search.best, full_trials(search.study)
    rows = []
    again = superseded(search.study)
    violating = dict(infeasible(config, full))
    known = [trial for trial in all_trials(search.study) if "values" in trial.user_attrs and trial.number not in again]
    shown = _most_telling(config, search.study, known, best)
    for trial in shown:
        cells = dimension_cells(config, trial.user_attrs["values"])
        ended = ENDS.get(trial.state.name, trial.state.name.lower())
        scores = _scores(config, trial) if trial.state.name == "COMPLETE" else ["" for _ in config.objectives]
        front = "front" if len(config.objectives) > 1 else ""
        mark = "winner" if trial.number == winner else front if trial.number in best else ""
        mark = mark or ("violates a constraint" if trial.number in violating else "")
        rows.append([trial.number, ended, trial.user_attrs.get("epochs", ""), *cells, *scores, mark])
    columns = ["trial", "ended", "epochs", *dimension_titles(config), *(objective.metric for objective in config.objectives), ""]
    count = "" if len(shown) == len(known) else f": the best {len(shown)} of {len(known)} (`rayndom status {config.name} --all` shows all)"
    console.table(f"trials{count}", columns, rows)
    if len(config.objectives) > 1:
        _show_front(config, [trial for trial in full if trial.number in best])
    for number, reason in violating.items():
        console.say(f"trial {number} cannot win: not {reason}")
    for number, sentence in not_learning(full):
        console.warn(f"trial {number}: {sentence}")


def _most_telling(config: SweepConfig, study: AnyStudy, trials: Sequence[FrozenTrial], best: Sequence[int]) -> list[FrozenTrial]:
    """Return the trials that a table shows: all of a few; of thousands the front and the best, so many as fit a screen."""
    if len(trials) <= MOST_SHOWN:
        return list(trials)
    chosen = {*best[:MOST_SHOWN], *top_trials(config, study, MOST_SHOWN)}
    return [trial for trial in trials if trial.number in chosen][:MOST_SHOWN]


def _scores(config: SweepConfig, trial: FrozenTrial) -> list[str]:
    metrics = trial.user_attrs.get(METRICS, {})
    return [format_goal(objective.metric, value, metrics) for objective, value in zip(config.objectives, trial.values, strict=True)]


def _show_front(config: SweepConfig, front: Sequence[FrozenTrial]) -> None:
    trials = sorted(front, key=lambda t: -t.values[0])
    rows = [[t.number, *dimension_cells(config, t.user_attrs["values"]), *_scores(config, t)] for t in trials]
    goals = [f"{objective.metric} ({objective.mode})" for objective in config.objectives]
    console.table("Pareto front: no trial is better in one of these without being worse in another", [
        "trial", *dimension_titles(config), *goals
    ], rows)  # fmt: skip


def conclude_search(search: Search, winner: int | None) -> dict[str, Any]:
    """Say what mattered and how far the proxy can be trusted, write the plots, log all to the sweep's run; return it as JSON types."""
    config, best, tracker, run_id = search.config, search.best, search.run.tracker, search.run.run_id
    trials = full_trials(search.study)
    epochs = max(experiment.training.epochs for experiment in config.base_experiments())
    shares = importances(config, trials)
    correlations = proxy_correlations(config, trials, epochs)
    _say_importances(shares)
    _say_correlations(config, correlations)
    files = write_plots(config, search.study, search.folder / "plots", winner, shares)
    for file in files:
        tracker.log_file(run_id, file, "plots")
    if files:
        console.say(f"plots in {search.folder / 'plots'} and in MLflow: {', '.join(file.name for file in files)}")
    tracker.log_metrics(run_id, {f"proxy/rank_correlation/epoch_{each.epoch}": each.rho for each in correlations if each.rho is not None})
    front = [
        {"trial": trial.number, "fingerprint": trial.user_attrs["fingerprint"]}
        | dict(zip((objective.metric for objective in config.objectives), trial.values, strict=True))
        for trial in trials
        if trial.number in best
    ]
    found = {
        "front": front,
        "intervals": {str(trial.number): _intervals(config, trial) for trial in trials if trial.number in best},
        "infeasible": [{"trial": number, "reason": reason} for number, reason in infeasible(config, trials)],
        "not_learning": [{"trial": number, "sign": sentence} for number, sentence in not_learning(trials)],
        "importances": shares,
        "importances_method": METHOD,
        "proxy": [vars(each) for each in correlations],
        "plots": [str(file) for file in files],
    }
    tracker.log_json(run_id, found | {"plots": [file.name for file in files]}, "search.json")
    return found


def _intervals(config: SweepConfig, trial: FrozenTrial) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of those objectives that are accuracies."""
    goals = zip((objective.metric for objective in config.objectives), trial.values, strict=True)
    found = {metric: goal_interval(config, trial.user_attrs["values"], metric, value) for metric, value in goals}
    return {metric: interval for metric, interval in found.items() if interval is not None}


def _say_importances(shares: dict[str, dict[str, float]] | None) -> None:
    if shares is None:
        console.say(f"no importances: they need {MIN_TRIALS} full-budget trials that share a dimension with different values")
        return
    names = list(dict.fromkeys(name for column in shares.values() for name in column))
    console.table(
        f"importance for reaching the best tenth of full-budget trials ({METHOD}; unreliable with few trials)",
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
