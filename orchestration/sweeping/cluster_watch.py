"""Noticing that a cluster has lost what its trials need: Tune itself would wait for ever for nodes that do not come back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from orchestration import console
from orchestration.training.cluster import alive_nodes
from orchestration.training.resources import TrialResources, trials_that_fit

LOOK_EVERY_S = 5.0
PATIENCE_S = 900.0  # a new spot machine and its packages take ten minutes


class ClusterLost(RuntimeError):
    """The cluster no longer has what one trial needs."""


class ClusterWatch:
    """Looks now and then whether one trial still fits; says so once when not, and gives up after a while.

    Args:
        need: of one trial.
        local: the cluster is this machine's own Ray: what is gone does not come back, so it is given up at once.
        nodes: returns the resources of each node that is alive.
        clock: returns seconds.
    """

    def __init__(
        self,
        need: TrialResources,
        *,
        local: bool,
        nodes: Callable[[], Sequence[Mapping[str, float]]] = alive_nodes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.need, self.local, self.nodes, self.clock = need, local, nodes, clock
        self.looked = clock()
        self.short_since: float | None = None

    def look(self) -> None:
        """Look, if it is time.

        Raises:
            ClusterLost: not even one trial fits, and waiting has no use or took too long.
        """
        now = self.clock()
        if now - self.looked < LOOK_EVERY_S:
            return
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
