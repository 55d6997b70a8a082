"""MLflow's system metrics: how busy the machine is that the command runs on, beside what it trains. Off unless asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from orchestration.tracking.tracker import Tracker

INTERVAL_S = 10


@contextlib.contextmanager
def system_metrics(tracker: Tracker, run_id: str, *, wanted: bool) -> Iterator[None]:
    """Log processor, memory, disk, network and GPU of this machine to a run as `system/...` while the block runs, if `wanted`."""
    if not wanted:
        yield
        return
    monitor = SystemMetricsMonitor(run_id, sampling_interval=INTERVAL_S, resume_logging=True, tracking_uri=tracker.uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
