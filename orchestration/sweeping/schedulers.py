"""Which trials of a sweep are stopped early: rules by name, all of them over several starts of the sweep.

A rule decides after an epoch from what the trials before had at that epoch. It must remember the trials of earlier starts, must not judge
again the epochs that an earlier start let a trial pass, and must not stop a trial that has reached its end: `EarlyStopping` sees to that
for every rule. Successive halving only pauses what it stops: a trial that turns out to be among the best of its rung, because worse ones
came there later, goes on from its state before a new one begins.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.epoch_standing import standing, standings
from orchestration.sweeping.free_places import FreePlaces
from orchestration.sweeping.goals import StoppingConfig
from orchestration.sweeping.pareto_stopping import Domination
from orchestration.sweeping.study import FIRST, PASSED, all_trials, superseded
from orchestration.sweeping.trial_attributes import chain

FEWEST_FOR_A_MEDIAN = 5


class Rule(Protocol):
    """Decides on trials by their number."""

    def stops(self, number: int, epoch: int, value: Any) -> bool:
        """Take how a trial stands after an epoch (`epoch_standing`), and return whether the trial ends here."""

    def remember(self, number: int, *, stopped: bool) -> None:
        """Take over how a trial of an earlier start, whose values were taken, ended."""

    def take_paused(self) -> int | None:
        """Return a trial that was stopped and should go on, and count it among those that do; None: there is none."""


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

    def remember(self, number: int, *, stopped: bool) -> None:
        """See `Rule`."""
        self.brackets[self.bracket_of(number)].remember(number, stopped=stopped)

    def take_paused(self) -> int | None:
        """See `Rule`: the one that came furthest."""
        found = [(best, bracket) for bracket in self.brackets if (best := bracket.best_paused()) is not None]
        if not found:
            return None
        (_, _, number), bracket = max(found, key=lambda each: each[0][:2])
        del bracket.paused[number]
        return number


class Bracket:
    """One bracket of successive halving, as Ray's `AsyncHyperBandScheduler` decides, with a search in sorted values instead of a sort.

    Args:
        first: epoch of the first rung; the others are at its products with powers of `factor`. epochs: of the longest trials.
        factor: of the trials at a rung, one in this many goes on.
    """

    def __init__(self, first: int, epochs: int, factor: float) -> None:
        self.factor = factor
        self.rungs: list[tuple[float, dict[int, float], list[float]]] = []
        """From the last to the first: its epoch, the trials that came there with their values, the values in order."""
        milestone = float(first)
        while milestone <= epochs:
            self.rungs.insert(0, (milestone, {}, []))
            milestone *= factor
        self.paused: dict[int, float] = {}
        """Trials that were stopped and did not go on since -> at which rung."""

    def stops(self, number: int, epoch: int, value: float) -> bool:
        """See `Rule`. A trial is judged once at each rung, by those that came there before it."""
        for milestone, trials, values in self.rungs:
            if epoch < milestone or number in trials:
                continue
            stops = bool(values) and value < quantile(values, 1 - 1 / self.factor)
            trials[number] = value
            bisect.insort(values, value)
            if stops:
                self.paused[number] = milestone
            return stops
        return False

    def remember(self, number: int, *, stopped: bool) -> None:
        """See `Rule`."""
        self.paused.pop(number, None)
        reached = next((milestone for milestone, trials, _ in self.rungs if number in trials), None)
        if stopped and reached is not None:
            self.paused[number] = reached

    def best_paused(self) -> tuple[float, float, int] | None:
        """Return (rung, value, trial) of the best one that waits at the last rung where one is in the best share; None: none is.

        Of the trials at a rung the best share, rounded down, may go on; what is as good as the first one outside may not.
        """
        for milestone, trials, values in self.rungs:
            going_on = int(len(values) / self.factor)
            if not going_on or going_on == len(values):
                continue
            bound = values[-going_on - 1]
            waiting = [(trials[number], -number) for number, rung in self.paused.items() if rung == milestone and trials[number] > bound]
            if waiting:
                value, number = max(waiting)
                return milestone, value, -number
        return None


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

    def remember(self, number: int, *, stopped: bool) -> None:
        """See `Rule`."""

    def take_paused(self) -> None:
        """See `Rule`: what is below the median of the past stays there."""


def rule_of(stopping: StoppingConfig, epochs: int) -> Rule:
    """Return the rule that a sweep asks for."""
    if stopping.scheduler == "median":
        return Median(stopping)
    if stopping.scheduler == "pareto":
        return Domination(stopping, epochs)
    return Halving(stopping, epochs, _num_brackets(stopping, epochs) if stopping.scheduler == "hyperband" else 1)


def _num_brackets(stopping: StoppingConfig, epochs: int) -> int:
    """Return how many first rungs there are before the end; the last bracket has none and stops no trial."""
    grace, count = float(stopping.grace_epochs), 1
    while grace < epochs:
        grace *= stopping.reduction_factor
        count += 1
    return count


class EarlyStopping(FreePlaces):
    """Tune's scheduler with a rule that remembers.

    Args:
        config: the sweep, with early stopping.
        epochs: of its longest trials; one that reaches its end finishes by itself and writes its model.
        study: of the sweep, with the trials of earlier starts.
    """

    def __init__(self, config: SweepConfig, epochs: int, study: optuna.Study) -> None:
        super().__init__()
        assert config.stopping is not None
        self.config, self.epochs = config, epochs
        self.rule = rule_of(config.stopping, epochs)
        self._latest: dict[int, int] = {}
        """First trial of a training -> the one that trained it last: rules know trainings by their first trial."""
        again, trials = superseded(study), all_trials(study)
        for earlier in trials:
            if earlier.number in again:
                continue
            first = chain(trials, earlier.number)[-1]
            self._latest[first] = earlier.number
            for epoch, value in standings(config, earlier).items():
                if epoch < epochs:
                    self.rule.stops(first, epoch, value)
        for first, number in self._latest.items():  # what is replayed in another order was not judged in the same way
            self.rule.remember(first, stopped=trials[number].state == TrialState.PRUNED)

    def take_paused(self) -> int | None:
        """Return the number of a trial that was stopped and should go on; None: there is none."""
        first = self.rule.take_paused()
        return None if first is None else self._latest[first]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Return whether the trial goes on."""
        if "number" not in trial.config:  # no trial of the search, but trained beside them
            return TrialScheduler.CONTINUE
        epoch = result.get("epoch", 0)
        value = standing(self.config, result) if epoch else None
        # What has trained to its end counts, whatever the others did.
        if value is None or epoch >= self.epochs:
            return TrialScheduler.CONTINUE
        first = trial.config.get(FIRST, trial.config["number"])
        self._latest[first] = trial.config["number"]
        stops = self.rule.stops(first, epoch, value)
        if stops and epoch <= trial.config.get(PASSED, 0):  # one that goes on after an interruption comes to where it was
            self.rule.remember(first, stopped=False)
            stops = False
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE
