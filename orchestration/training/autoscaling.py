"""Asking a cluster's autoscaler for room, so that nodes come before trials wait for them, and go when no further trial begins."""

from __future__ import annotations

import math

from ray.autoscaler.sdk import request_resources

from orchestration.training.resources import TrialResources


class AskedRoom:
    """Asks for room for a number of trials at a time; a cluster that does not grow hears it and does nothing.

    Each sweep's wish replaces that of others on the cluster: trials that wait make it grow all the same, a node after the other.

    Args:
        need: of one trial.
        trials: how many at a time.
    """

    def __init__(self, need: TrialResources, trials: int) -> None:
        self.trials, self._asked = trials, True
        request_resources(bundles=bundles(need, trials))

    def give_back(self) -> None:
        """Ask for nothing more: what trains keeps its nodes, others may go."""
        if self._asked:
            self._asked = False
            request_resources(bundles=[])


def bundles(need: TrialResources, trials: int) -> list[dict[str, float]]:
    """Return what is to be on one node each: a worker's share, or a GPU with all the workers that share it."""
    cpus, gpus, workers = need.cpus / need.workers, need.gpus / need.workers, need.workers * trials
    if not 0 < gpus < 1:
        return [{"CPU": cpus} | ({"GPU": gpus} if gpus else {})] * workers
    share = math.floor((1 + 1e-9) / gpus)
    return [{"CPU": cpus * share, "GPU": 1.0}] * math.ceil(workers / share)
