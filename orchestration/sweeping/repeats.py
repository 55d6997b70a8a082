"""Repeats over training seeds: the best trials are trained again with other seeds, and the best on the mean wins."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goals import format_goal
from orchestration.sweeping.listed_experiments import Listed, train_listed
from orchestration.tracking.tracker import FINGERPRINT_TAG, Tracker
from orchestration.training.final_measures import MARKED_METRIC, kept_protocol_metrics
from orchestration.training.run_folder import RunFolder


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
    config: SweepConfig,
    experiments: Mapping[int, ExperimentConfig],
    top: Sequence[int],
    home: Home,
    data_root: Path | None,
    tracker: Tracker,
    parent: str,
) -> list[Repeated]:
    """Train the trials `top` with the further seeds of `config.repeats`, log each as a child run, and return their values.

    What is trained already is reused.

    Raises:
        RuntimeError: a run failed.
    """
    assert config.repeats is not None
    measure = config.measure if config.needs_protocols else None
    groups = {number: with_seeds(experiments[number], config.repeats.seeds) for number in top}
    listed = [Listed(f"trial {number} seed {each.seed}", each) for number, group in groups.items() for each in group[1:]]
    train_listed("repeat", listed, home, data_root, tracker, parent, measure)
    repeated = []
    for number, group in groups.items():
        records = []
        for experiment in group:
            folder = RunFolder(home.run(experiment.fingerprint))
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


def log_repeats(tracker: Tracker, parent: str, repeated: Sequence[Repeated], experiments: Mapping[int, ExperimentConfig]) -> None:
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
        tracker.log_metrics(parent, numbers)
        for experiment in with_seeds(experiments[each.number], each.seeds)[1:]:
            run_id = tracker.run("repeat", {FINGERPRINT_TAG: experiment.fingerprint}, f"trial {each.number} seed {experiment.seed}", parent)
            tracker.set_tags(run_id, {"rayndom.repeats": each.number})
            tracker.finish(run_id)
    tracker.log_json(parent, content, "repeats.json")


def _with_deviation(each: Repeated, metric: str) -> str:
    deviation = each.deviation(metric)
    # One marked seed marks the mean.
    shown = format_goal(metric, each.mean(metric), {name: max(values) for name, values in each.values.items()})
    return shown + ("" if deviation is None else f" +- {deviation:.2g}")
