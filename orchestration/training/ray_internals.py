"""What Ray has no public way to, as of Ray 2.60: each function says what it reaches into, and nothing else of Rayndom does so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
import ray.train
from ray._private.services import canonicalize_bootstrap_address


def gcs_address(address: str) -> str:
    """Return HOST:PORT of the cluster that `ray.init(address=...)` would join, e.g. of `auto`; other kinds of addresses as they are.

    Raises:
        Exception: it is no address; of several kinds.
    """
    return address if "://" in address else canonicalize_bootstrap_address(address) or address


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that Ray is about to lose: a public way to ask exists inside a Ray Train group alone."""
    return set(ray._private.state.state.get_draining_nodes())


def outlive_nodes() -> None:
    """Let groups whose number of workers changes survive the loss of any node but this process's.

    What counts the room for them is an actor that Ray binds to the node where it is asked for first, and that never comes back when that
    node is lost. So it is asked for here, which Ray otherwise does by itself, later and elsewhere.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

    get_or_create_autoscaling_coordinator()


def end_idle_processes(tune_controller: Any) -> None:
    """End the process that Tune keeps for the next trial of a search, and with which it keeps a place.

    Args:
        tune_controller: as a scheduler gets it.
    """
    tune_controller._tune_controller._cleanup_cached_actors(force_all=True)


def raised_by_workers(error: ray.train.TrainingFailedError) -> Iterator[Exception]:
    """Yield what the workers of a failed group raised: Ray hands it on in an envelope that shows only its text, and is yielded itself where
    a later Ray has another."""
    for failure in getattr(error, "worker_failures", {}).values():
        yield getattr(failure, "_base_exc", failure)
