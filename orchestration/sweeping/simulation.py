"""What a sweep would take on a cluster before money is spent: its trials played in simulated time.

Trials start as places become free, train epoch after epoch, are stopped by the sweep's own rule, lose their epoch with their node, and
go on. Times come from measured trials. What trials will be worth is not known: their curves are assumed to keep their order from the
first epoch on, so that the rule ends the share of trials that it is made to end; several objectives are assumed to know nothing of each
other.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import UserError
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.goals import StoppingConfig
from orchestration.sweeping.schedulers import rule_of
from orchestration.sweeping.study import AnyStudy, all_trials, superseded
from orchestration.training.resources import concurrency, trial_resources

MANY_CORES = 10**9

REPEATS = 20
"""Simulated searches, for the range of what may happen."""


@dataclass(frozen=True)
class TrialTimes:
    """How long trials take, in seconds.

    Attributes:
        start: from when a trial is proposed to its first epoch, and what follows its last one.
        epoch: one epoch with validation. ratios: of single trials to that; at least one.
        source: where that was measured.
    """

    start: float
    epoch: float
    ratios: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Plan:
    """What is simulated.

    Attributes:
        trials: in all. at_once: at a time. epochs: of a trial that is not stopped. stopping: the rule, None: none.
        times: of trials. losses_per_hour: how often a place is taken away, on average. replacement: seconds until it is there again.
        objectives: how many there are, for rules that compare trials by all of them.
    """

    trials: int
    at_once: int
    epochs: int
    stopping: StoppingConfig | None
    times: TrialTimes
    losses_per_hour: float = 0.0
    replacement: float = 0.0
    objectives: int = 1


@dataclass(frozen=True)
class Outcome:
    """One simulated search.

    Attributes:
        seconds: from the first proposal to the end of the last trial. busy: seconds that places were held, over all places.
        epochs: trained, those that were lost among them. full: trials that reached their end. losses: of places.
        begun: how often a trial began, or went on after it had been paused.
        over: (seconds, trials that are over) whenever a tenth of them is.
    """

    seconds: float
    busy: float
    epochs: int
    full: int
    losses: int
    begun: int
    over: tuple[tuple[float, int], ...]


def measured_times(study: AnyStudy, source: str) -> TrialTimes | None:
    """Return the times of a sweep's trials that are over; None: fewer than two say how long they took.

    Of trials of different lengths a line through time and epochs tells the start from the epochs; of equal ones all time is that of epochs.
    """
    again, pairs = superseded(study), []
    for trial in all_trials(study):
        epochs = trial.user_attrs.get("epochs")
        if trial.number in again or not epochs or trial.datetime_start is None or trial.datetime_complete is None:
            continue
        pairs.append((int(epochs), (trial.datetime_complete - trial.datetime_start).total_seconds()))
    if len(pairs) < 2:
        return None
    epochs, seconds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    start = 0.0
    if len(set(epochs)) > 1:
        slope, start = statistics.linear_regression(epochs, seconds)
        start = min(max(start, 0.0), min(seconds)) if slope > 0 else 0.0
    each = [max(second - start, 0.0) / epoch for epoch, second in pairs]
    epoch = sum(max(second - start, 0.0) for second in seconds) / sum(epochs)
    if epoch <= 0:
        return None
    return TrialTimes(start, epoch, tuple(one / epoch for one in each), source)


def places(config: SweepConfig, gpus: int, cpus: int | None) -> int:
    """Return how many trials run at a time on so many GPUs and CPUs (None: enough of them).

    Raises:
        UserError: not one does, or trials use no GPU.
    """
    need = trial_resources(config.experiment({}).resources)
    if not need.gpus and cpus is None:
        raise UserError(
            f"sweep {config.name}: its trials use no GPU; say --settings.resources.gpus_per_worker 1, or how many cores with --cpus"
        )
    return concurrency(need, {"GPU": gpus, "CPU": MANY_CORES if cpus is None else cpus}, config.max_concurrent_trials)


def compared_objectives(config: SweepConfig) -> int:
    """Return how many objectives early stopping compares trials by."""
    return len(config.objectives) if config.stopping is not None and config.stopping.scheduler == "pareto" else 1


def simulate(plan: Plan, seed: int = 0) -> Outcome:
    """Play one search."""
    chance = random.Random(seed)
    rule = rule_of(plan.stopping, plan.epochs) if plan.stopping is not None else None
    worth = [tuple(chance.random() for _ in range(plan.objectives)) for _ in range(plan.trials)]
    speed = [chance.choice(plan.times.ratios) for _ in range(plan.trials)]
    rate = plan.losses_per_hour / 3600
    waiting, idle = iter(range(plan.trials)), plan.at_once
    events: list[tuple[float, int, int]] = []
    """(when an epoch of a trial ends, trial, epoch)"""
    held: dict[int, float] = {}
    over: dict[int, float] = {}
    reached: dict[int, int] = {}
    """Trial -> its last epoch."""
    trained = full = losses = begun = 0
    busy = 0.0

    def epoch_ends(begins: float, number: int) -> float:
        """Return when an epoch that begins now is done, through as many losses of its place as there are."""
        nonlocal trained, losses, busy
        needs = plan.times.epoch * speed[number]
        while True:
            trained += 1
            lost = chance.expovariate(rate) if rate else math.inf
            if lost >= needs:
                return begins + needs
            losses += 1
            busy -= plan.replacement  # nothing is paid for a place that is away
            begins += lost + plan.replacement + plan.times.start

    def begin(now: float) -> bool:
        """Let a trial go on that was paused and is among the best of its rung, else begin one; return whether there was one."""
        nonlocal begun
        paused = rule.take_paused() if rule is not None else None
        number = next(waiting, None) if paused is None else paused
        if number is not None:
            begun += 1
            held[number] = now
            over.pop(number, None)
            heapq.heappush(events, (epoch_ends(now + plan.times.start, number), number, reached.get(number, 0) + 1))
        return number is not None

    while idle and begin(0.0):
        idle -= 1
    while events:
        now, number, epoch = heapq.heappop(events)
        values = [goal * (1 - math.exp(-3 * epoch / plan.epochs)) for goal in worth[number]]
        value = values[0] if plan.objectives == 1 else (0.0, *(-each for each in values))
        reached[number] = epoch
        stops = rule is not None and epoch < plan.epochs and rule.stops(number, epoch, value)
        if epoch < plan.epochs and not stops:
            heapq.heappush(events, (epoch_ends(now, number), number, epoch + 1))
            continue
        full += epoch == plan.epochs
        busy += now - held.pop(number)
        over[number] = now
        idle += 1
        while idle and begin(now):
            idle -= 1
    tenths = sorted({max(1, round(plan.trials * tenth / 10)) for tenth in range(1, 11)})
    ends = sorted(over.values())
    return Outcome(ends[-1], busy, trained, full, losses, begun, tuple((ends[count - 1], count) for count in tenths))


def middle_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the smallest and largest but the extreme twentieths."""
    ordered = sorted(values)
    cut = len(ordered) // 20
    return statistics.median(ordered), ordered[cut], ordered[-1 - cut]
