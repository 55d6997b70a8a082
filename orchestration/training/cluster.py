"""Starting or joining Ray, once per process, and noticing that a cluster has lost what its trials need."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray

from models.errors import EnvironmentFailure, UserError
from models.plugins import VARIABLE, plugins, sent_plugins
from models.waiting_threads import SPIN_COUNT
from orchestration import console
from orchestration.storage import STORAGE_VARIABLES
from orchestration.training.cluster_token import check_address, check_token
from orchestration.training.ray_internals import gcs_address
from orchestration.training.resources import TrialResources, trials_that_fit
from orchestration.training.shared_storage import SharedStorage

logger = logging.getLogger(__name__)


def connect(address: str | None = None, *, dashboard: bool = False, num_cpus: int | None = None) -> dict[str, float]:
    """Join the Ray cluster at `address` (or RAY_ADDRESS), or start a local one, and return its resources.

    Args:
        address: e.g. `auto` or `ray://host:10001`; None: RAY_ADDRESS, else a local Ray in this machine's processes.
        dashboard: start the dashboard with a local Ray. Trials with several workers need it: Ray's cleaner asks it which
            placement groups of stopped or killed trials to free.
        num_cpus: CPUs that a local Ray may use; None: all.

    Raises:
        UserError: the cluster cannot be reached, or wants another token.
    """
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        if not address:
            _start(options | {"include_dashboard": dashboard, "num_cpus": num_cpus} | _runtime_with_plugins({}))
            return ray.cluster_resources()
        check_address(address)
        check_token(address)
        try:
            address = gcs_address(address)
            variables = _variables_of_workers() | _address_for_workers(address)
            ray.init(address=address, **_runtime_with_plugins({"env_vars": variables}, elsewhere=True), **options)
        except Exception as error:  # each way in which Ray fails to reach a cluster has an error of its own
            raise UserError(f"no Ray cluster at {address[:300]} (--address, RAY_ADDRESS): {str(error)[:1000]}") from None
    return ray.cluster_resources()


def _runtime_with_plugins(runtime: dict[str, Any], *, elsewhere: bool = False) -> dict[str, Any]:
    """Return the option of Ray that gives workers this environment and the plug-ins of this process.

    A plug-in that is a folder or a file is importable in a worker before the worker receives anything of it.

    Args:
        runtime: Ray's description of the environment.
        elsewhere: the workers may not see this machine's folders: they are sent to them.
    """
    places = sent_plugins()
    if places:
        runtime = runtime | {"worker_process_setup_hook": "models.plugins.prepare_worker"}
        if elsewhere and VARIABLE not in _variables_of_the_job():  # a submitted job has them in its own folder
            variables = {**runtime.get("env_vars", {}), VARIABLE: os.pathsep.join(plugin.module for plugin in plugins())}
            runtime |= {"py_modules": [str(place) for place in places.values()], "env_vars": variables}
    return {"runtime_env": runtime} if runtime else {}


def _variables_of_workers() -> dict[str, str]:
    """Return what the workers of a cluster need of this process's environment; a local Ray's inherit it.

    Ray refuses a variable that the environment of a submitted job already sets.
    """
    of_the_job = _variables_of_the_job()
    return {name: os.environ[name] for name in (SPIN_COUNT, *STORAGE_VARIABLES) if name in os.environ and name not in of_the_job}


def _address_for_workers(address: str) -> dict[str, str]:
    """Return the variable that tells workers which Ray is theirs.

    Ray Train's cleaner asks Ray, without naming it, whether a group's controller still lives. On a machine with several Rays the newest one
    answers, which knows nothing of it: the workers of a group that is well would be ended.
    """
    return {} if "://" in address or "RAY_ADDRESS" in _variables_of_the_job() else {"RAY_ADDRESS": address}


def _variables_of_the_job() -> dict[str, str]:
    """Return the variables that the submitted job sets which this process is the driver of; none: it is no job's."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return (submitted.get("runtime_env") or {}).get("env_vars") or {}


def _start(options: dict[str, Any]) -> None:
    """Start a local Ray. It gives itself half a minute, which a busy machine may not have: then it is tried again.

    Its processes are told its address. Some of them ask Ray for its state without naming it (the cleaner that frees a dead trial's workers
    does), which fails for ever on a machine that has another Ray too.
    """
    _check_room_for_sockets()
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


LONGEST_SOCKET = 107
"""Bytes of the path of a socket that Linux takes."""


def _check_room_for_sockets() -> None:
    """Raise a UserError where Ray's sockets would have longer paths than the system takes."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    below = f"/ray/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    longest = LONGEST_SOCKET - len(below)
    if variable is not None and len(os.fsencode(os.environ[variable])) > longest:
        folder = os.environ[variable]
        raise UserError(
            f"{variable} is {folder}, of {len(folder)} characters: with more than {longest} the paths of Ray's sockets in it are too long "
            "for the system. Set RAY_TMPDIR to a shorter folder, e.g. /tmp."
        )


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


LOOK_EVERY_S = 5.0
PATIENCE_S = 900.0  # a new spot machine and its packages take ten minutes


class ClusterLost(EnvironmentFailure):
    """The cluster no longer has what one trial needs."""


class ClusterWatch:
    """Looks now and then whether one trial still fits; says so once when not, and gives up after a while.

    Args:
        need: of one trial.
        local: the cluster is this machine's own Ray: what is gone does not come back, so it is given up at once.
        storage: looks whether nodes that join see the home folder.
        nodes: returns the resources of each node that is alive.
        clock: returns seconds.
    """

    def __init__(
        self,
        need: TrialResources,
        *,
        local: bool,
        storage: SharedStorage | None = None,
        nodes: Callable[[], Sequence[Mapping[str, float]]] = alive_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.need, self.local, self.storage, self.nodes, self.clock = need, local, storage, nodes, clock
        self.looked = clock()
        self.short_since: float | None = None

    def look(self) -> None:
        """Look, if it is time.

        Raises:
            ClusterLost: not even one trial fits, and waiting has no use or took too long.
            UserError: a node that joined has another disk.
        """
        now = self.clock()
        if now - self.looked < LOOK_EVERY_S:
            return
        if self.storage is not None:
            self.storage.look()
        nodes = self.nodes()
        self.looked = self.clock()
        if trials_that_fit(self.need, nodes):
            if self.short_since is not None:
                console.say("the cluster has room for trials again")
            self.short_since = None
            return
        left = " and ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s" for name in ("CPU", "GPU"))
        if self.local:
            raise ClusterLost(f"Ray on this machine has broken down: of its nodes {left} are left. All finished epochs are kept")
        if self.short_since is None:
            self.short_since = now
            console.warn(f"the cluster has {left} left, too little for one trial; waiting up to {console.duration(PATIENCE_S)} for nodes")
        elif now - self.short_since > PATIENCE_S:
            raise ClusterLost(
                f"for {console.duration(PATIENCE_S)} the cluster had {left}, too little for one trial. Finished epochs are kept"
            )

    def wait(self) -> None:
        """Return once one trial fits. Raises what `look` raises."""
        while not trials_that_fit(self.need, self.nodes()):
            self.look()
            time.sleep(1)
