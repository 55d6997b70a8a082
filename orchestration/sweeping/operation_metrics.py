"""How far a sweep is, as metrics of Ray's own Prometheus export: `docs/cluster/grafana_sweeps.json` shows them."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

METRICS = {
    "rayndom_trials_wanted": "Trials that there are to be.",
    "rayndom_trials_over": "Trials that are over, in whatever way.",
    "rayndom_trials_running": "Trials that train now.",
    "rayndom_trials_broken": "Trials that broke for good; diverged ones are results and do not count.",
    "rayndom_epochs": "Epochs that trials of this start have finished.",
    "rayndom_best_robust_accuracy": "Best robust accuracy on validation images so far, in [0,1].",
}
"""Name -> what it is; in Prometheus each begins with `ray_`."""


class OperationMetrics:
    """The metrics of the trials of one start.

    Args:
        sweep: what is shown of it. kind: of its trials, e.g. `trial` or `baseline`.
    """

    def __init__(self, sweep: str, kind: str) -> None:
        self._tags = {"sweep": sweep, "kind": kind}
        self._gauges: dict[str, Gauge] = {}

    def show(self, values: Mapping[str, float]) -> None:
        """Set metrics by name; nothing where no Ray runs that would export them."""
        if not ray.is_initialized():
            return
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=METRICS[name], tag_keys=tuple(self._tags))
            self._gauges[name].set(value, tags=self._tags)
