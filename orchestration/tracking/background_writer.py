"""One thread that writes to the tracker, so that trials do not wait for the store: Tune lets a trial go on only after its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundWriter:
    """Does what it is given one after the other, in order. There is one thread, so the store still has one writer."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._failed: list[BaseException] = []

    def later(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Do it when everything before is done; return at once. An error is raised by `close`."""
        self._thread.submit(function, *arguments).add_done_callback(self._note)

    def now(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do it when everything before is done, and return what it returns."""
        return self._thread.submit(function, *arguments).result()

    def close(self) -> None:
        """Wait until everything is done.

        Raises:
            Exception: the first that a call of `later` raised.
        """
        self._thread.shutdown(wait=True)
        if self._failed:
            raise self._failed[0]

    def _note(self, done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            self._failed.append(error)
