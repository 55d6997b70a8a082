"""What a study keeps of a trial beside its values, by name, and how trials that are one and the same training hang together."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial

RESUMES = "resumes"
"""Of a trial that goes on with another one's training: that one's number. It broke, was interrupted, or was paused."""


def resumed(trials: Sequence[FrozenTrial]) -> set[int]:
    """Return the numbers of trials with whose training later ones go on."""
    return {trial.user_attrs[RESUMES] for trial in trials if RESUMES in trial.user_attrs}


def chain(trials: Sequence[FrozenTrial], number: int) -> list[int]:
    """Return the numbers of the trials that are one training, from a trial back to the first."""
    numbers = [number]
    while (earlier := trials[numbers[-1]].user_attrs.get(RESUMES)) is not None:
        numbers.append(earlier)
    return numbers
