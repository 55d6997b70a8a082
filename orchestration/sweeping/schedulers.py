"""Which trials of a sweep are stopped early: rules by name, all of them over several starts of the sweep.

A rule decides after an epoch from what the trials before had at that epoch. It must remember the trials of earlier starts, must not judge
again the epochs that an earlier start let a trial pass, and must not stop a trial that has reached its end: `EarlyStopping` sees to that
for every rule.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goals import StoppingConfig
from orchestration.sweeping.study import PASSED, all_trials, proxy_values, superseded

FEWEST_FOR_A_MEDIAN = 5


class Rule(Protocol):
    """Decides on trials by their number."""

    def stops(self, number: int, epoch: int, value: float) -> bool:
        """Take a trial's value after an epoch, and return whether the trial ends here."""


class Halving:
    """Successive halving without waiting: at each rung the best share of all trials that came there goes on (ASHA).

    With several brackets, each with a first rung of its own, it is the asynchronous form of HyperBand: in the last bracket no trial is
    stopped early, so that what learns slowly has a chance. Which bracket a trial belongs to follows from its number, so that a later start,
    and who repeats the sweep, puts it into the same one.

    Args:
        stopping: what the sweep says. epochs: of its longest trials. brackets: how many.

    Reference: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020; Li et al., Hyperband, 2018.
    """

    def __init__(self, stopping: StoppingConfig, epochs: int, brackets: int) -> None:
        grace, factor = min(stopping.grace_epochs, epochs), stopping.reduction_factor
        self.brackets = [Bracket(min(math.ceil(grace * factor**first), epochs), epochs, factor) for first in range(brackets)]
        # As many more trials in a bracket as its trials are stopped earlier: all brackets then train about as many epochs.
        weights = [factor ** (brackets - 1 - first) * brackets / (brackets - first) for first in range(brackets)]
        total = sum(weights)
        self._until = [sum(weights[: index + 1]) / total for index in range(brackets)]

    def bracket_of(self, number: int) -> int:
        """Return the bracket of a trial: any run of trials is spread over them evenly."""
        place = (number * (math.sqrt(5) - 1) / 2) % 1
        return min(bisect.bisect_right(self._until, place), len(self.brackets) - 1)

    def stops(self, number: int, epoch: int, value: float) -> bool:
        """See `Rule`."""
        return self.brackets[self.bracket_of(number)].stops(number, epoch, value)


class Bracket:
    """One bracket of successive halving, as Ray's `AsyncHyperBandScheduler` decides, with a search in sorted values instead of a sort.

    Args:
        first: epoch of the first rung; the others are at its products with powers of `factor`. epochs: of the longest trials.
        factor: of the trials at a rung, one in this many goes on.
    """

    def __init__(self, first: int, epochs: int, factor: float) -> None:
        self.share = 1 - 1 / factor
        self.rungs: list[tuple[float, set[int], list[float]]] = []
        """From the last to the first: its epoch, the trials that came there, their values in order."""
        milestone = float(first)
        while milestone <= epochs:
            self.rungs.insert(0, (milestone, set(), []))
            milestone *= factor

    def stops(self, number: int, epoch: int, value: float) -> bool:
        """See `Rule`. A trial is judged once at each rung, by those that came there before it."""
        for milestone, trials, values in self.rungs:
            if epoch < milestone or number in trials:
                continue
            stops = bool(values) and value < quantile(values, self.share)
            trials.add(number)
            bisect.insort(values, value)
            return stops
        return False


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of sorted values, between two of them on the line through both, as NumPy does."""
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


class Median:
    """Stops a trial whose best value so far is below the median of the others' running means at the same epoch.

    Ray's own rule looks at all values of all trials after every epoch, which among thousands of trials takes longer than the epoch.

    Args:
        stopping: what the sweep says; its reduction factor is not used.

    Reference: Golovin et al., Google Vizier, 2017, section 3.2.2.
    """

    def __init__(self, stopping: StoppingConfig) -> None:
        self.grace = stopping.grace_epochs
        self._means: dict[int, list[float]] = {}
        """Epoch -> running means of the trials that came there, in order."""
        self._of: dict[int, tuple[int, float, float]] = {}
        """Trial -> number and sum of its values from the end of the grace on, and its best one."""
        self._judged: dict[int, int] = {}
        """Trial -> its last epoch: one that broke and is tried again repeats some."""

    def stops(self, number: int, epoch: int, value: float) -> bool:
        """See `Rule`."""
        if epoch <= self._judged.get(number, 0):
            return False
        self._judged[number] = epoch
        count, total, best = self._of.get(number, (0, 0.0, -math.inf))
        best = max(best, value)
        if epoch < self.grace:
            self._of[number] = (count, total, best)
            return False
        count, total = count + 1, total + value
        self._of[number] = (count, total, best)
        others = self._means.setdefault(epoch, [])
        median = quantile(others, 0.5) if len(others) >= FEWEST_FOR_A_MEDIAN else -math.inf
        bisect.insort(others, total / count)
        return best < median


def rule_of(stopping: StoppingConfig, epochs: int) -> Rule:
    """Return the rule that a sweep asks for."""
    if stopping.scheduler == "median":
        return Median(stopping)
    return Halving(stopping, epochs, _num_brackets(stopping, epochs) if stopping.scheduler == "hyperband" else 1)


def _num_brackets(stopping: StoppingConfig, epochs: int) -> int:
    """Return how many first rungs there are before the end; the last bracket has none and stops no trial."""
    grace, count = float(stopping.grace_epochs), 1
    while grace < epochs:
        grace *= stopping.reduction_factor
        count += 1
    return count


class EarlyStopping(FIFOScheduler):
    """Tune's scheduler with a rule that remembers.

    Args:
        config: the sweep, with early stopping.
        epochs: of its longest trials; one that reaches its end finishes by itself and writes its model.
        study: of the sweep, with the trials of earlier starts.
    """

    def __init__(self, config: SweepConfig, epochs: int, study: optuna.Study) -> None:
        super().__init__()
        assert config.stopping is not None
        self.watched, self.epochs = config.stopping.metric, epochs
        self.rule = rule_of(config.stopping, epochs)
        again = superseded(study)
        for earlier in all_trials(study):
            if earlier.number in again:
                continue
            for epoch, value in proxy_values(config, earlier).items():
                if epoch < epochs:
                    self.rule.stops(earlier.number, epoch, value)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return whether the trial goes on."""
        epoch, value = result.get("epoch", 0), result.get(self.watched)
        # What has trained to its end counts, whatever the others did.
        if not epoch or value is None or not math.isfinite(value) or epoch >= self.epochs:
            return TrialScheduler.CONTINUE
        stops = self.rule.stops(trial.config["number"], epoch, value)
        # One that goes on after an interruption comes to where it was.
        return TrialScheduler.STOP if stops and epoch > trial.config.get(PASSED, 0) else TrialScheduler.CONTINUE
