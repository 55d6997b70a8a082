"""Several sweeps on one cluster: one with a lower priority runs one trial at a time while one with a higher priority has trials that wait
for room.

What trains goes on to its end. Sweeps of the same priority share the cluster as Ray does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0
EXPIRES_S = 20.0
"""A sweep that has said nothing for so long is not there any more."""
NAME, NAMESPACE = "rayndom-precedence", "rayndom"


class Arbiter:
    """Knows which sweeps of a cluster wait for room; `clock`: returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._told: dict[str, tuple[int, bool, float]] = {}

    def tell(self, sweep: str, priority: int, waits: bool) -> bool:
        """Note whether a sweep has trials that wait for room; return whether another one of a higher priority has."""
        now = self.clock()
        self._told[sweep] = (priority, waits, now)
        self._told = {name: told for name, told in self._told.items() if now - told[2] < EXPIRES_S}
        return any(other > priority and waiting for other, waiting, _ in self._told.values())


class Precedence(tune.Callback):
    """Whether a sweep has to wait for another one.

    Args:
        sweep: its name, of which the cluster has one.
        priority: of it; more comes first.
        tell: asks the cluster's arbiter; None: there is no other sweep, and it never waits.
        clock: returns seconds.
    """

    def __init__(
        self,
        sweep: str,
        priority: int,
        tell: Callable[[str, int, bool], bool] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sweep, self.priority, self.tell, self.clock = sweep, priority, tell, clock
        self._waits = self._has_to_wait = False
        self._looked = -LOOK_EVERY_S

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy for its own way of restoring, which is never taken."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tell the others whether trials wait; those with several workers do so after Tune has started them."""
        self._waits = any_waits(trials)
        self.has_to_wait()

    def has_to_wait(self) -> bool:
        """Return whether no trial shall begin now."""
        now = self.clock()
        if self.tell is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._has_to_wait = self.tell(self.sweep, self.priority, self._waits)
        return self._has_to_wait


def any_waits(trials: Sequence[Trial]) -> bool:
    """Return whether one of Tune's trials has no room yet."""
    return any(trial.status == Trial.PENDING or (trial.status == Trial.RUNNING and not trial.last_result) for trial in trials)


def tell_arbiter(sweep: str, priority: int, waits: bool) -> bool:
    """Ask the arbiter of the cluster, which the first sweep leaves there; one that does not answer makes nobody wait."""
    try:
        options = {"name": NAME, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached", "num_cpus": 0}
        arbiter: Any = ray.remote(Arbiter).options(**options).remote()
        return ray.get(arbiter.tell.remote(sweep, priority, waits), timeout=LOOK_EVERY_S)
    except (ray.exceptions.RayError, ValueError) as error:
        logger.info("no answer from what orders sweeps by priority: %s", error)
        return False
