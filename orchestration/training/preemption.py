"""Notice that a machine is about to be taken away, as clouds give for spot machines and Ray passes on as a node that drains.

Between the notice and the end, seconds to minutes later, the state is written after each step. Ray counts what it takes away as no failure.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train

from orchestration.training.ray_internals import draining_nodes

LOOK_EVERY_S = 2.0
TIMED_STEPS = 3
"""Steps after which workers agree how many of them make up `LOOK_EVERY_S`."""


class TrialNotice:
    """Whether the node of a trial that trains in its own process is about to go: asked after each step, looked up now and then.

    Args:
        draining: returns the ids of the nodes that are about to go. clock: returns seconds.
    """

    def __init__(self, draining: Callable[[], set[str]] = draining_nodes, clock: Callable[[], float] = time.monotonic) -> None:
        self.draining, self.clock = draining, clock
        self.node = ray.get_runtime_context().get_node_id()
        self.looked = clock()
        self.given = False

    def __call__(self) -> bool:
        """Return whether notice was given."""
        if not self.given and self.clock() - self.looked >= LOOK_EVERY_S:
            self.given = self.node in self.draining()
            self.looked = self.clock()
        return self.given


def group_preemption() -> Any:
    """Return Ray Train's notice that a node of this worker's group goes, None if there is none; a barrier of all workers.

    Ray has it from 2.60 on; before, a node that goes costs the epoch.
    """
    return getattr(ray.train, "get_preemption_info", lambda: None)()


class GroupNotice:
    """Whether a node of a Ray Train group is about to go: asked by every worker after each step.

    To ask Ray is a barrier of all workers, so that it is done after every so many steps, on which the workers agree once.

    Args:
        ask: returns Ray's notice, None if there is none. agree: gives rank 0's value to all. clock: returns seconds.
    """

    def __init__(self, ask: Callable[[], Any], agree: Callable[[int], int], clock: Callable[[], float] = time.monotonic) -> None:
        self.ask, self.agree, self.clock = ask, agree, clock
        self.steps, self.started = 0, 0.0
        self.every: int | None = None
        self.given = False

    def __call__(self) -> bool:
        """Return whether notice was given; the same on all workers."""
        if self.steps == 0:
            self.started = self.clock()
        self.steps += 1
        if self.steps == TIMED_STEPS:
            seconds = (self.clock() - self.started) / (TIMED_STEPS - 1)
            self.every = self.agree(max(1, math.ceil(LOOK_EVERY_S / max(seconds, 1e-6))))
        if not self.given and self.every is not None and self.steps % self.every == 0:
            self.given = self.ask() is not None
        return self.given


def preemptions_without_limit() -> dict[str, Any]:
    """Return the argument of Ray Train's `FailureConfig` for machines that are taken away: no limit, where Ray counts them apart."""
    known = {field.name for field in dataclasses.fields(ray.train.FailureConfig)}
    return {"max_preemption_failures": -1} if "max_preemption_failures" in known else {}
