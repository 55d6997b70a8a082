"""Whether every node of a cluster sees the driver's folder: what a worker writes elsewhere is lost when its trial ends."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from models.errors import UserError
from orchestration.storage import storage_of

logger = logging.getLogger(__name__)
PATIENCE_S = 120.0
"""A node starts its first worker in seconds; one that is busy with images or packages may take longer."""


def other_nodes() -> dict[str, str]:
    """Return id -> address of the nodes that are alive, but for the driver's own."""
    own = ray.get_runtime_context().get_node_id()
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != own}


class SharedStorage:
    """Looks on each node whether a file of the driver's is there.

    Args:
        file: that the driver has.
        nodes: returns id -> address of the nodes to ask.
        ask: starts reading a file on a node, and returns Ray's reference to the digest of what is there, None where there is nothing.
    """

    def __init__(
        self,
        file: Path,
        nodes: Callable[[], Mapping[str, str]] = other_nodes,
        ask: Callable[[Path, str], Any] | None = None,
    ) -> None:
        self.file, self.nodes, self.ask = file, nodes, ask or _ask
        self._asked: dict[str, tuple[str, Any]] = {}
        self._passed: set[str] = set()

    def check(self) -> None:
        """Ask every node and wait for the answers.

        Raises:
            UserError: a node has another disk.
        """
        self.look()
        if self._asked:
            ray.wait([answer for _, answer in self._asked.values()], num_returns=len(self._asked), timeout=PATIENCE_S)
            self.look()

    def look(self) -> None:
        """Ask the nodes that are new, and judge the answers that are there.

        Raises:
            UserError: a node has another disk.
        """
        for node, address in self.nodes().items():
            if node not in self._passed and node not in self._asked:
                self._asked[node] = (address, self.ask(self.file, node))
        blind = []
        for node, (address, answer) in list(self._asked.items()):
            if not ray.wait([answer], timeout=0)[0]:
                continue
            del self._asked[node]
            try:
                found = ray.get(answer)
            except ray.exceptions.RayError:
                continue  # the node is gone; a new one has another id
            if found == _digest(self.file):
                self._passed.add(node)
            else:
                blind.append(address)
        if blind:
            nodes = f"{'node' if len(blind) == 1 else 'nodes'} {', '.join(sorted(blind))}"
            storage = storage_of(self.file)
            if storage is not None:
                raise UserError(
                    f"the home {storage.url} cannot be read on {nodes} of the cluster: each node needs the packages that open it and its "
                    "credentials, in its environment or its machine's role."
                )
            raise UserError(
                f"the folder {self.file.parent} is not the same on {nodes} of the cluster: what is trained there would be lost. --home "
                "names a folder that all nodes share (NFS or another network disk)."
            )


@contextlib.contextmanager
def probed(folder: Path) -> Iterator[SharedStorage]:
    """Check that every node sees `folder`, with a file that lies there meanwhile; what is yielded looks at nodes that join.

    Raises:
        UserError: a node has another disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".seen-by-every-node-{uuid.uuid4().hex}"
    store = storage_of(file)
    content = uuid.uuid4().hex.encode()
    store.write(file, content) if store else file.write_bytes(content)
    try:
        storage = SharedStorage(file)
        storage.check()
        yield storage
    finally:
        store.remove_object(file) if store else file.unlink(missing_ok=True)


def _ask(file: Path, node: str) -> Any:
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(_digest).options(scheduling_strategy=here).remote(file)


def _digest(file: Path) -> str | None:
    store = storage_of(file)
    try:
        return hashlib.sha256(store.read(file) if store else file.read_bytes()).hexdigest()
    except Exception as error:  # of a store: whatever its library raises where it is not installed, or not let in
        logger.info("%s cannot be read here: %s", file, error)
        return None
