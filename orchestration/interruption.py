"""Ctrl-C and SIGTERM: the first ends a command in good order, the second at once. In either case no process of it is left."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def in_good_order() -> Iterator[None]:
    """Turn the first of these signals into KeyboardInterrupt, and end this process at the second."""
    if threading.current_thread() is not threading.main_thread():  # only that one may say what signals do
        yield
        return
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            end_at_once(number, frame)
        pressed = True
        _tell("ending; Ctrl-C again ends at once")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def first_taken_by_tune() -> Iterator[None]:
    """Let Tune take the first Ctrl-C, as it does while it runs; it gives the second back to what stood here before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End this process and every one that it started, now. What was finished is on disk, as after `kill -9`."""
    import psutil

    _tell("ended at once; everything finished is kept, and the same command goes on from there")
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(INTERRUPTED)


def _tell(message: str) -> None:
    """Write a line from a signal's handler, in which the console may be held by what was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())
