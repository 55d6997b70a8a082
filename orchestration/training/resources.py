"""What trials need against what there is: decided before anything starts, with a message that says what would fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.errors import UserError
from orchestration.experiment import ResourcesConfig
from trainers.config import TrainingConfig

# A trial with several workers has a driver beside them that only waits. It takes a little memory instead of a core: Tune refuses a
# bundle of nothing, and a hundredth of a core would keep two workers from fitting two cores.
DRIVER_BUNDLE = {"memory": 10 * 2**20}


@dataclass(frozen=True)
class TrialResources:
    """What one trial takes."""

    cpus: float
    gpus: float
    workers: int


def trial_resources(resources: ResourcesConfig) -> TrialResources:
    """Return what one trial takes at least; a worker without `cpus_per_worker` takes one core in a sweep."""
    return _resources_of(resources, resources.fewest_workers)


def _resources_of(resources: ResourcesConfig, workers: int) -> TrialResources:
    return TrialResources(workers * (resources.cpus_per_worker or 1.0), workers * resources.gpus_per_worker, workers)


def trials_at_once(
    resources: ResourcesConfig, available: Mapping[str, float], wanted: int | None, nodes: Sequence[Mapping[str, float]]
) -> int:
    """Return how many trials run at a time: with all their workers where the number of workers may change, but at least one.

    Args, raises: as `concurrency`.
    """
    least = concurrency(trial_resources(resources), available, wanted, nodes)
    return max(1, min(least, trials_that_fit(_resources_of(resources, resources.most_workers), nodes)))


def workers_that_share(workers: int, training: TrainingConfig) -> int:
    """Return how many of the workers can share a batch evenly: the others of a group stand by."""
    return next(count for count in range(workers, 0, -1) if training.batch_size % (count * training.accumulation) == 0)


def trials_that_fit(need: TrialResources, nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many trials fit the `CPU` and `GPU` of the given nodes: a worker needs its share on one node, a part of a GPU on one."""
    cpus, gpus = need.cpus / need.workers, need.gpus / need.workers
    workers = 0
    for node in nodes:
        fitting = math.floor((node.get("CPU", 0.0) + 1e-9) / cpus)
        if gpus >= 1:
            fitting = min(fitting, math.floor((node.get("GPU", 0.0) + 1e-9) / gpus))
        elif gpus:
            fitting = min(fitting, math.floor(node.get("GPU", 0.0) + 1e-9) * math.floor((1 + 1e-9) / gpus))
        workers += fitting
    return workers // need.workers


def with_workers_that_fit(
    resources: ResourcesConfig, trainings: Sequence[TrainingConfig], nodes: Sequence[Mapping[str, float]]
) -> ResourcesConfig | None:
    """Return the resources with as many workers as fit the nodes, at most those asked for: a cluster may have shrunk. None: not one fits.

    Args:
        trainings: each of whose batches the workers share evenly.
    """
    if trials_that_fit(trial_resources(resources), nodes):
        return resources
    for workers in range(resources.fewest_workers - 1, 0, -1):
        fewer = resources.model_copy(update={"workers": workers})
        even = all(workers_that_share(workers, training) == workers for training in trainings)
        if even and trials_that_fit(trial_resources(fewer), nodes):
            return fewer
    return None


def concurrency(
    need: TrialResources, available: Mapping[str, float], wanted: int | None = None, nodes: Sequence[Mapping[str, float]] | None = None
) -> int:
    """Return how many trials can run at a time.

    Args:
        need: of one trial.
        available: `CPU` and `GPU` of the cluster.
        wanted: upper limit.
        nodes: `CPU` and `GPU` of each node; None: all on one.

    Raises:
        UserError: not even one fits; says what would.
    """
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    fitting = math.floor((cpus + 1e-9) / need.cpus)
    if need.gpus:
        fitting = min(fitting, math.floor((gpus + 1e-9) / need.gpus))
    if fitting < 1:
        per_worker_cpus = need.cpus / need.workers
        advice = []
        if need.gpus > gpus:
            advice.append(
                f"--resources.gpus_per_worker {gpus / need.workers:g}" if gpus else "--resources.gpus_per_worker 0 (train on CPUs)"
            )
        if need.cpus > cpus:
            advice.append(f"--resources.workers {max(1, math.floor(cpus / per_worker_cpus))}")
        raise UserError(
            f"one trial needs {need.cpus:g} CPUs and {need.gpus:g} GPUs ({need.workers} workers), but there are {cpus:g} CPUs and "
            f"{gpus:g} GPUs. What would fit: {', '.join(advice)}."
        )
    if nodes is not None:
        fitting = trials_that_fit(need, nodes)
        if fitting < 1:
            largest = ", ".join(f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}s" for name in ("CPU", "GPU"))
            raise UserError(
                f"a worker needs {need.cpus / need.workers:g} CPUs and {need.gpus / need.workers:g} GPUs on one node, and the nodes, of "
                f"which the largest have {largest}, have no room for {need.workers} of them. What would fit: a smaller "
                "--resources.cpus_per_worker or --resources.gpus_per_worker, or fewer --resources.workers."
            )
    return min(fitting, wanted) if wanted else fitting
