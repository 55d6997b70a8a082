"""Places of a sweep that no trial takes: given up after a while, so that other work on the cluster gets them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from orchestration.training.ray_internals import end_idle_processes

KEPT_S = 5.0
"""A trial's process stays so long for the next trial: to start one anew takes about as long."""


class FreePlaces(FIFOScheduler):
    """Tune's scheduler of a sweep: trials run in the order in which they were proposed.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self._since: float | None = None

    def place_is_free(self, free: bool) -> None:
        """Note whether a place was offered and not taken."""
        if not free:
            self._since = None
        elif self._since is None:
            self._since = self.clock()

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Called at each step of Tune's loop."""
        if self._since is not None and self.clock() - self._since >= KEPT_S:
            end_idle_processes(tune_controller)
        return super().choose_trial_to_run(tune_controller)
