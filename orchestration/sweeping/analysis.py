"""What a finished study says beyond its winner: the front, what mattered, whether the cheap proxy ranks trials as the final measure."""

from __future__ import annotations

from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.study import METRICS, is_feasible, proxy_values, superseded

MIN_TRIALS = 4  # fewer full-budget trials say nothing about importances or ranks


def full_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that trained to their end, feasible or not."""
    again = superseded(study)
    return [trial for trial in study.trials if trial.state == TrialState.COMPLETE and trial.number not in again]


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


def proxy_correlations(config: SweepConfig, study: optuna.Study, epochs: int) -> list[RankCorrelation]:
    """Return how the metric that early stopping watches ranks trials at each rung, against the first objective at the end.

    Only trials that reached their end have both, and the proxy itself chose those: the correlation over all trials may differ.
    """
    sign = 1 if config.objectives[0].mode == "max" else -1
    found = []
    for epoch in rungs(config, epochs):
        pairs = []
        for trial in full_trials(study):
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


def importances(config: SweepConfig, study: optuna.Study) -> dict[str, dict[str, float]] | None:
    """Return objective -> dimension -> share of the objective's variance over full-budget trials that it explains (fANOVA).

    Dimensions that only some trials have (conditional ones) are left out. None: there are fewer than four full-budget trials, or no
    dimension that all of them have takes different values.
    """
    trials = full_trials(study)
    if len(trials) < MIN_TRIALS:
        return None
    common = [name for name in config.space or {} if all(name in trial.params for trial in trials)]
    common = [name for name in common if len({trial.params[name] for trial in trials}) > 1]
    if not common:
        return None
    # Optuna does not compare trials whose ranges differ, as those of B above A do: here every trial gets the whole range.
    distributions = {name: (config.space or {})[name].distribution() for name in common}
    copies = [
        optuna.trial.create_trial(
            params={name: trial.params[name] for name in common},
            distributions=distributions,
            values=trial.values,
            state=TrialState.COMPLETE,
        )
        for trial in trials
    ]
    copied = optuna.create_study(directions=study.directions)
    copied.add_trials(copies)
    table = {}
    for index, objective in enumerate(config.objectives):
        if len({trial.values[index] for trial in trials}) == 1:
            table[objective.metric] = dict.fromkeys(common, 0.0)
            continue
        scores = optuna.importance.get_param_importances(
            copied,
            evaluator=optuna.importance.FanovaImportanceEvaluator(seed=config.seed),
            target=lambda trial, index=index: trial.values[index],
        )
        table[objective.metric] = dict(sorted(scores.items(), key=lambda item: -item[1]))
    return table


def infeasible(config: SweepConfig, study: optuna.Study) -> list[tuple[int, str]]:
    """Return (trial, what it violates) of the full-budget trials that violate a constraint."""
    found = []
    for trial in full_trials(study):
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


def top_trials(config: SweepConfig, study: optuna.Study, count: int) -> list[int]:
    """Return the numbers of the best feasible full-budget trials: the front first, each part by the first objective."""
    sign = 1 if config.objectives[0].mode == "max" else -1
    feasible = [trial for trial in full_trials(study) if is_feasible(trial)]
    front = {trial.number for trial in study.best_trials} if len(config.objectives) > 1 and feasible else set()
    ranked = sorted(feasible, key=lambda trial: (trial.number not in front, -sign * trial.values[0], trial.number))
    # A sampler may propose a point twice; its repeats would be the same runs.
    unique = {trial.user_attrs.get("fingerprint", str(trial.number)): trial.number for trial in reversed(ranked)}
    return [trial.number for trial in ranked if trial.number in unique.values()][:count]
