"""The best trials of a search, trained with further seeds: the winner is the best by the mean, not by the luck of one seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goals import RepeatsConfig, format_goal
from orchestration.sweeping.listed_experiments import Listed, train_listed
from orchestration.sweeping.plan import SweepPlan
from orchestration.sweeping.search import Search
from orchestration.sweeping.study import top_trials
from orchestration.tracking.experiment_run import ParentRun
from orchestration.training.final_measures import kept_protocol_metrics
from orchestration.training.measure import MARKED_METRIC


def repeat_best(search: Search, repeats: RepeatsConfig, workplace: Workplace) -> int | None:
    """Train the best trials with further seeds, show and log them; return the winner by the mean.

    None: no mean satisfies the constraints.
    """
    config = search.config
    top = {number: search.experiment(number) for number in top_trials(config, search.study, repeats.top)}
    repeated = run_repeats(search.plan, repeats, top, workplace, search.run)
    winner = choose_by_mean(config, repeated)
    show_repeats(config, repeated, winner)
    log_repeats(search.run, repeated, top)
    return winner


@dataclass(frozen=True)
class Repeated:
    """One of the best trials over its training seeds.

    Attributes:
        number: of the trial. seeds: its own first.
        values: metric -> one value per seed.
    """

    number: int
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]

    def mean(self, metric: str) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.values[metric])

    def deviation(self, metric: str) -> float | None:
        """Return the sample standard deviation over seeds, None with one seed."""
        return statistics.stdev(self.values[metric]) if len(self.seeds) > 1 else None

    def is_feasible(self, config: SweepConfig) -> bool:
        """Return whether the means satisfy all constraints."""
        return all(constraint.violation(self.mean(constraint.metric)) <= 0 for constraint in config.constraints)


def with_seeds(experiment: ExperimentConfig, seeds: Sequence[int]) -> list[ExperimentConfig]:
    """Return the experiment with its own seed, then with each of the others."""
    return [experiment, *(experiment.model_copy(update={"seed": seed}) for seed in seeds if seed != experiment.seed)]


def run_repeats(
    plan: SweepPlan, repeats: RepeatsConfig, top: Mapping[int, ExperimentConfig], workplace: Workplace, parent: ParentRun
) -> list[Repeated]:
    """Train trials with further seeds, log each training as a child run, and return their values. What is trained already is reused.

    Args:
        top: number of a trial -> its experiment.

    Raises:
        RuntimeError: a run failed.
    """
    config = plan.config
    measure = config.measure if config.needs_protocols else None
    groups = {number: with_seeds(experiment, repeats.seeds) for number, experiment in top.items()}
    listed = [
        Listed(f"trial {number} seed {each.seed}", each, plan.initial(each)) for number, group in groups.items() for each in group[1:]
    ]
    train_listed("repeat", listed, workplace, parent, measure)
    repeated = []
    for number, group in groups.items():
        records = []
        for experiment in group:
            folder = RunFolder(workplace.home.run(experiment.fingerprint))
            record = folder.result()
            assert record is not None
            records.append(record["metrics"] | ((kept_protocol_metrics(folder, measure) or {}) if measure else {}))
        metrics = list(dict.fromkeys(config.final_metrics))
        metrics += [MARKED_METRIC] if all(MARKED_METRIC in record for record in records) else []
        repeated.append(
            Repeated(
                number,
                tuple(experiment.seed for experiment in group),
                {metric: tuple(record[metric] for record in records) for metric in metrics},
            )
        )
    return repeated


def choose_by_mean(config: SweepConfig, repeated: Sequence[Repeated]) -> int | None:
    """Return the trial with the best mean of the first objective among those whose means satisfy the constraints; None: none does."""
    objective = config.objectives[0]
    sign = 1 if objective.mode == "max" else -1
    feasible = [each for each in repeated if each.is_feasible(config)]
    return max(feasible, key=lambda each: sign * each.mean(objective.metric)).number if feasible else None


def show_repeats(config: SweepConfig, repeated: Sequence[Repeated], winner: int | None) -> None:
    """Print mean and standard deviation of every repeated trial."""
    metrics = list(dict.fromkeys(config.final_metrics))
    rows = [
        [
            each.number,
            ", ".join(map(str, each.seeds)),
            *(_with_deviation(each, metric) for metric in metrics),
            "winner" if each.number == winner else "" if each.is_feasible(config) else "violates a constraint",
        ]
        for each in repeated
    ]
    console.table("best trials over training seeds, mean +- standard deviation", ["trial", "seeds", *metrics, ""], rows)


def log_repeats(parent: ParentRun, repeated: Sequence[Repeated], experiments: Mapping[int, ExperimentConfig]) -> None:
    """Log means and deviations to the sweep's run, and which trial a repeat belongs to, to the repeats' runs."""
    content = []
    for each in repeated:
        content.append({"trial": each.number, "seeds": each.seeds, "values": each.values})
        numbers = {}
        for metric in each.values:
            numbers[f"repeats/trial_{each.number}/{metric}/mean"] = each.mean(metric)
            deviation = each.deviation(metric)
            if deviation is not None:
                numbers[f"repeats/trial_{each.number}/{metric}/standard_deviation"] = deviation
        parent.tracker.log_metrics(parent.run_id, numbers)
        for experiment in with_seeds(experiments[each.number], each.seeds)[1:]:
            run = parent.child("repeat", experiment, f"trial {each.number} seed {experiment.seed}")
            run.set_tags({"rayndom.repeats": each.number})
            run.end()
    parent.tracker.log_json(parent.run_id, content, "repeats.json")


def _with_deviation(each: Repeated, metric: str) -> str:
    deviation = each.deviation(metric)
    # One marked seed marks the mean.
    shown = format_goal(metric, each.mean(metric), {name: max(values) for name, values in each.values.items()})
    return shown + ("" if deviation is None else f" +- {deviation:.2g}")
