"""Early stopping with several objectives: what is dominated at a rung ends, a front stays."""

from __future__ import annotations

import numpy as np

from orchestration.sweeping.epoch_standing import Standing
from orchestration.sweeping.goals import StoppingConfig


class Domination:
    """Ends a trial that another one dominates at a rung, unless it is among the best share of all that came there.

    Of two trials the one that violates its constraints less dominates; else the one that is nowhere worse and somewhere better. The best
    share is that of the trials that the fewest others dominate.

    Args:
        stopping: what the sweep says. epochs: of its longest trials.
    """

    def __init__(self, stopping: StoppingConfig, epochs: int) -> None:
        self.factor = stopping.reduction_factor
        self._rungs: list[tuple[float, _Rung]] = []
        """From the last to the first."""
        milestone = float(min(stopping.grace_epochs, epochs))
        while milestone <= epochs:
            self._rungs.insert(0, (milestone, _Rung()))
            milestone *= self.factor

    def stops(self, number: int, epoch: int, value: Standing) -> bool:
        """See `Rule`. A trial is judged once at each rung, by those that came there before it."""
        assert isinstance(value, tuple)
        for milestone, rung in self._rungs:
            if epoch < milestone or number in rung.trials:
                continue
            better = rung.add(number, value)
            return better > 0 and better >= len(rung.trials) / self.factor
        return False

    def remember(self, number: int, *, stopped: bool) -> None:
        """See `Rule`: what was dominated stays so."""

    def take_paused(self) -> None:
        """See `Rule`: as above."""


class _Rung:
    """The trials that came to an epoch, and how many of the others dominate each."""

    def __init__(self) -> None:
        self.trials: set[int] = set()
        self._losses = np.empty((0, 0))
        self._dominated_by = np.empty(0, dtype=int)

    def add(self, number: int, value: tuple[float, ...]) -> int:
        """Add a trial; return how many others are dominated by fewer than it is, 0 where none dominates it."""
        new = np.array(value)
        others = self._losses.reshape(-1, len(new))
        by_others, by_new = _dominates(others, new), _dominates(new, others)
        own = int(by_others.sum())
        self._dominated_by = np.append(self._dominated_by + by_new, own)
        self._losses, self.trials = np.vstack([others, new]), self.trials | {number}
        return int((self._dominated_by < own).sum()) if own else 0


def _dominates(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return whether rows (violation, *losses) dominate; one side is a single row."""
    less_violation = one[..., 0] < other[..., 0]
    as_much = one[..., 0] == other[..., 0]
    nowhere_worse = (one[..., 1:] <= other[..., 1:]).all(axis=-1)
    somewhere_better = (one[..., 1:] < other[..., 1:]).any(axis=-1)
    return less_violation | (as_much & nowhere_worse & somewhere_better)
