"""Where the time of a training step goes: its parts, the arithmetic that it does, and how much of the hardware's peak that is."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.profiling import PartTimes, profiled, timed
from trainers.fit import TrainingLoop
from trainers.hardware import Precision

PARTS = {
    "data": "images of the batch, decoded and brought to the device",
    "augmentation": "crops and flips",
    "draws": "new values of what is random in the network",
    "attack": "the inner attack, its draws apart",
    "step": "forward, backward and optimizer",
    "all-reduce": "averages over the workers, waiting for them included",
}
"""The parts of a step, in the order in which they are shown, in words."""

_PRODUCT_ROWS = {"cpu": 1024}  # of the matrices whose product shows the peak; elsewhere:
_PRODUCT_ROWS_ELSEWHERE = 8192
_PRODUCTS = 5


@dataclass(frozen=True)
class StepProfile:
    """One step of one worker.

    Attributes:
        seconds: of the whole step, data included. parts: seconds of each of `PARTS`, which add up to it.
        idle: seconds of it in which nothing was computed for it: on a CPU its thread waited (for data, for other workers, for a processor
            that others use), elsewhere no kernel ran on the device.
        operations: floating-point operations of convolutions and matrix products, an addition and a multiplication being two.
        peak: operations per second of a large matrix product, in the run's arithmetic, on this device, with the run's threads.
    """

    seconds: float
    parts: dict[str, float]
    idle: float
    operations: int
    peak: float

    @property
    def share_of_peak(self) -> float:
        """Operations over time, over the peak."""
        return self.operations / self.seconds / self.peak

    def metrics(self) -> dict[str, float]:
        """Return the numbers under their names in MLflow."""
        return {
            "system/step/seconds": self.seconds,
            **{f"system/step/{name.replace('-', '_')}_seconds": seconds for name, seconds in self.parts.items()},
            "system/step/idle_seconds": self.idle,
            "system/step/operations": float(self.operations),
            "system/step/peak_operations_per_second": self.peak,
            "system/step/share_of_peak": self.share_of_peak,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return what a person reads: part, milliseconds, share of the step, what it is."""
        shown = [(name, seconds, PARTS[name]) for name, seconds in self.parts.items()]
        shown += [("whole step", self.seconds, "all of the above"), ("idle", self.idle, "of the whole step: nothing was computed for it")]
        return [(name, f"{1000 * seconds:.2f}", f"{100 * seconds / self.seconds:.1f} %", words) for name, seconds, words in shown]

    def sentence(self) -> str:
        """Return the arithmetic in one sentence."""
        return (
            f"{self.operations / 1e9:.3g} GFLOP in {1000 * self.seconds:.1f} ms are {100 * self.share_of_peak:.1f} % of the "
            f"{self.peak / 1e9:.4g} GFLOP/s of a large matrix product here"
        )


def profile_step(loop: TrainingLoop, trace: Path, skipped: int) -> StepProfile:
    """Take `skipped` steps of a training, measure the next one, and write its Chrome trace (chrome://tracing, ui.perfetto.dev).

    The steps are those of the middle of the run: terms that join later are counted. Parts are measured without the profiler, whose own
    work would be counted; the trace is of the step after, the operations are counted in one more.

    Args:
        loop: before its first step; its weights change as in training.
        trace: JSON file; its folder is there.
        skipped: at least 1: a first step pays for lazy initialization.
    """
    steps = _steps(loop)
    for _ in itertools.islice(steps, skipped):
        pass
    synchronize = _synchronization(loop.device)
    times = PartTimes(synchronize)
    with profiled(times):
        began, computed = time.perf_counter(), time.thread_time()
        next(steps)
        synchronize()
        seconds, computed = time.perf_counter() - began, time.thread_time() - computed
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the tracer writes into the terminal that it has started
    activities = [ProfilerActivity.CPU, *([] if loop.device.type == "cpu" else [_activity_of(loop.device)])]
    with profile(activities=activities) as traced, profiled(PartTimes(synchronize)):
        next(steps)
        synchronize()
    traced.export_chrome_trace(str(trace))
    if loop.device.type != "cpu":
        computed = sum(event.self_device_time_total for event in traced.key_averages()) / 1e6
    with _CountOperations() as counter:
        next(steps)
    parts = dict.fromkeys(PARTS, 0.0) | times.seconds
    # Between the parts lies the step itself.
    parts["step"] += seconds - sum(parts.values())
    peak = measured_peak(loop.device, loop.context.precision)
    return StepProfile(seconds, parts, max(0.0, seconds - computed), counter.operations, peak)


def _steps(loop: TrainingLoop) -> Iterator[None]:
    """Take steps of the epoch in the middle of the run, again and again: each with its data."""
    while True:
        batches = iter(loop.batches(loop.config.epochs // 2))
        for index in range(loop.steps_per_epoch):
            with timed("data"):
                x_BCHW, y_B = next(batches)
            with timed("step"):
                loop.train_batch(index, x_BCHW, y_B)
            yield


class _CountOperations(TorchDispatchMode):
    """Counts the operations of convolutions and matrix products, by PyTorch's formulas. Its `FlopCounterMode` does too, but hangs hooks
    into modules, with which gradients of inputs inside an attack cannot be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        return out


def _synchronization(device: torch.device) -> Callable[[], None]:
    return (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))


def _activity_of(device: torch.device) -> ProfilerActivity:
    return {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}.get(device.type, ProfilerActivity.PrivateUse1)


def measured_peak(device: torch.device, precision: Precision) -> float:
    """Return the operations per second of a large matrix product: the best of a few."""
    rows = _PRODUCT_ROWS.get(device.type, _PRODUCT_ROWS_ELSEWHERE)
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    first, second = (torch.ones((rows, rows), dtype=dtype, device=device) for _ in range(2))
    synchronize, seconds = _synchronization(device), []
    for _ in range(_PRODUCTS):
        synchronize()
        began = time.perf_counter()
        torch.mm(first, second)
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * rows**3 / min(seconds)
