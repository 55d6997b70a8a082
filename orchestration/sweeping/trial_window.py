"""TPE on the trials that matter for the next one, so that a proposal takes as long at 5,000 trials as at 1,000.

TPE compares the density of its best trials, 25 at most, with that of all others, and reads, sorts and fits all of them for each proposal.
Of the others the old ones hardly count: Optuna weighs them down in proportion to their age.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from orchestration.sweeping.trial_attributes import resumed

LATEST = 1000
"""Trials that are looked at whatever they are worth."""
BEST = 100
"""Of the others, the best ones by each objective: four times as many as TPE takes for good."""


class WindowedTPE(optuna.samplers.TPESampler):
    """Optuna's TPE on the latest trials, the best ones and those that run; up to `LATEST` trials it is Optuna's own.

    A trial that was paused and went on counts once, by where it came to.
    """

    _of: tuple[int, optuna.Study] | None = None
    """Number of the trial that is proposed, and the window for it."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return super().infer_relative_search_space(self._window(study, trial), trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """See `BaseSampler`."""
        return super().sample_relative(self._window(study, trial), trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """See `BaseSampler`."""
        return super().sample_independent(self._window(study, trial), trial, param_name, param_distribution)

    def _window(self, study: optuna.Study, trial: FrozenTrial) -> optuna.Study:
        if self._of is None or self._of[0] != trial.number:
            trials = study.get_trials(deepcopy=False)
            again = resumed(trials)
            seen = trials if len(trials) <= LATEST else window(trials, study.directions)
            seen = [each for each in seen if each.number not in again] if again else seen
            self._of = (trial.number, study if seen is trials else _Part(study, seen))
        return self._of[1]


def window(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """Return the trials that a proposal looks at, by number: the `LATEST`, those that run, the `BEST`, of several objectives the front.

    What satisfies its constraints is better than what does not.
    """
    old = trials[:-LATEST]
    kept = {trial.number for trial in old if trial.state == TrialState.RUNNING}
    finished = [trial for trial in old if trial.state == TrialState.COMPLETE]
    if finished:
        signs = [1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in directions]
        losses = np.array([trial.values for trial in finished], dtype=float) * signs
        violations = np.array([sum(max(each, 0.0) for each in trial.constraints.values()) for trial in finished])
        best = {int(index) for column in losses.T for index in np.lexsort((column, violations))[:BEST]}
        if len(directions) > 1:
            best |= _front(losses, np.flatnonzero(violations == 0))
        kept |= {finished[index].number for index in best}
    return [*(trials[number] for number in sorted(kept)), *trials[-LATEST:]]


def _front(losses: np.ndarray, among: np.ndarray) -> set[int]:
    """Return the rows of losses (trials, objectives) that no other one dominates. What has the smallest sum of those left never is."""
    left, found = among[np.argsort(losses[among].sum(axis=1), kind="stable")], set()
    while len(left):
        first, left = left[0], left[1:]
        found.add(int(first))
        left = left[(losses[left] < losses[first]).any(axis=1)]
    return found


class _Part(optuna.Study):
    """A study of which only some trials are seen.

    It replaces a method that Optuna's samplers read through and that has no public name (Optuna 5.0). Another Optuna would read all trials:
    the proposals of a sweep without a window, later.
    """

    def __init__(self, study: optuna.Study, trials: list[FrozenTrial]) -> None:
        self.__dict__.update(study.__dict__)
        self._seen = trials

    def _get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False) -> list[FrozenTrial]:
        return [trial for trial in self._seen if states is None or trial.state in states]
