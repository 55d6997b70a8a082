"""Starting or joining Ray, once per process."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

# Read by Ray at import: a driver started by `uv run` would otherwise ship and rebuild the environment for every worker.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
# An objective may be known only at the end of a trial, or after epochs that validate.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

import ray

from models.errors import UserError

logger = logging.getLogger(__name__)


def connect(address: str | None = None, *, dashboard: bool = False, num_cpus: int | None = None) -> dict[str, float]:
    """Join the Ray cluster at `address` (or RAY_ADDRESS), or start a local one, and return its resources.

    Args:
        address: e.g. `auto` or `ray://host:10001`; None: RAY_ADDRESS, else a local Ray in this machine's processes.
        dashboard: start the dashboard with a local Ray. Trials with several workers need it: Ray's cleaner asks it which
            placement groups of stopped or killed trials to free.
        num_cpus: CPUs that a local Ray may use; None: all.

    Raises:
        UserError: the cluster cannot be reached.
    """
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if not address:
            _start(options | {"include_dashboard": dashboard, "num_cpus": num_cpus})
            return ray.cluster_resources()
        try:
            ray.init(address=address, **options)
        except (ConnectionError, TimeoutError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address}: {error}") from None
    return ray.cluster_resources()


def _start(options: dict[str, Any]) -> None:
    """Start a local Ray. It gives itself half a minute, which a busy machine may not have: then it is tried again.

    Its processes are told its address. Some of them ask Ray for its state without naming it (the cleaner that frees a dead trial's workers
    does), which fails for ever on a machine that has another Ray too.
    """
    for tries_left in (2, 1, 0):
        port = _free_port()
        try:
            with _environment(RAY_GCS_SERVER_PORT=str(port), RAY_ADDRESS=f"{ray.util.get_node_ip_address()}:{port}"):
                ray.init(address="local", **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or not tries_left:
                raise
            logger.warning("Ray did not start in time; is this machine busy? Trying again")
            ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def alive_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def is_local(address: str | None) -> bool:
    """Return whether `connect(address)` starts a Ray of this process's own."""
    return not (address or os.environ.get("RAY_ADDRESS"))
