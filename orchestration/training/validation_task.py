"""Validation of a trial's epochs as tasks of their own, on workers of the cluster that are free, while the trial trains on."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from torch import Tensor

from orchestration.training.job import TrainingJob
from orchestration.training.preparation import PreparedTraining
from orchestration.training.resources import trial_resources
from trainers.fit import TrainingLoop
from trainers.reporting import SilentReporter

logger = logging.getLogger(__name__)
START_PATIENCE_S = 5.0
"""A task that has not begun when the next epoch is trained has lost its place to a trial."""


class FreeWorkers:
    """Validates where the cluster has room for one more worker like this one; see `trainers.validation_beside`.

    Args:
        job: what is trained.
    """

    def __init__(self, job: TrainingJob) -> None:
        need = trial_resources(job.experiment.resources)
        self.need = {"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {})
        self.content = json.dumps(job.to_json(), sort_keys=True)
        # Not in the trial's own place, where Tune would have it.
        where = ray.remote(scheduling_strategy="DEFAULT", max_retries=0, num_returns="streaming", num_cpus=need.cpus, num_gpus=need.gpus)
        self.task: Any = where(_validate)

    def begin(self, weights: Mapping[str, Tensor]) -> _Task | None:
        """See `trainers.validation_beside.Beside`."""
        free = ray.available_resources()
        if any(free.get(name, 0.0) < amount for name, amount in self.need.items()):
            return None
        return _Task(self.task.remote(self.content, dict(weights)))


class _Task:
    """Its first value says that it has begun, the second one is what it has measured."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def result(self) -> dict[str, float] | None:
        """See `trainers.validation_beside.PendingValidation`."""
        begun, _ = ray.wait([self.values], timeout=START_PATIENCE_S)
        try:
            if begun:
                ray.get(next(self.values))
                return ray.get(next(self.values))
            ray.cancel(self.values, force=True)
        except ray.exceptions.RayError as error:
            logger.info("a validation beside the training broke, and is done in its place: %s", error)
        return None


def _validate(content: str, weights: Mapping[str, Tensor]) -> Iterator[Any]:
    yield None
    loop = _loop(content)
    loop.model.load_state_dict(weights)
    yield loop.validate(loop.held_out)


@functools.lru_cache(maxsize=1)
def _loop(content: str) -> TrainingLoop:
    """Return the training that a job is of, before its first step; a worker keeps the last one."""
    job = TrainingJob.from_json(json.loads(content)).with_own_cores()
    return PreparedTraining(job.experiment, job.data_root).loop(SilentReporter())
