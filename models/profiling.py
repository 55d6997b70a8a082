"""Parts of a training step that name themselves, so that a profile can say where its time goes. Outside of a profile they do nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from torch.profiler import record_function


class PartTimes:
    """Seconds of each part on the thread that made this, what runs in a part inside another one counted there alone.

    Args:
        synchronize: waits until the device has done what it was asked: its kernels run later than their calls.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._synchronize, self._thread = synchronize, threading.get_ident()
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Within, time is that of the part `name`; another thread's is not counted, this one waits for it or goes on meanwhile."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


_times: PartTimes | None = None


@contextlib.contextmanager
def profiled(times: PartTimes) -> Iterator[None]:
    """Within, parts are measured into `times`, and named in a trace that PyTorch's profiler takes."""
    global _times
    before, _times = _times, times
    try:
        yield
    finally:
        _times = before


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Name what runs within, or in the function that this decorates."""
    if _times is None:
        yield
        return
    with _times.measured(name), record_function(name):
        yield
