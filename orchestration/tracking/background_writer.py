"""One thread that writes to the tracker, so that trials do not wait for the store: Tune lets a trial go on only after its callbacks.

A store that is away (a server that restarts, a disk that is full, a locked file) does not stop training: the thread tries again until it
is back, and everything is written in its order. What is tried again may have been written the first time, if only the answer was lost;
so everything given to it must leave the same record when it is done twice, as all calls of `Tracker` do.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from orchestration import console
from orchestration.tracking.store import display_uri
from orchestration.tracking.tracker import StoreAway, is_away


class BackgroundWriter:
    """Does what it is given one after the other, in order. There is one thread, so the store still has one writer.

    Args:
        uri: of the store, for messages.
        retry_s: seconds between two tries while the store is away.
        patience_s: how long `close` waits for a store that is away.
    """

    def __init__(self, uri: str, *, retry_s: float = 3, patience_s: float = 60) -> None:
        self.uri, self.retry_s, self.patience_s = display_uri(uri), retry_s, patience_s
        self._waiting: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._given_up = False
        self._away: BaseException | None = None
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def later(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Do it when everything before is done; return at once. An error that is not the store's absence is raised by `close`."""
        with self._changed:
            self._waiting.append((function, arguments))
            self._changed.notify_all()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Write what waits. After an error only briefly, and without one of its own: what is raised already says why the work ended."""
        if error is None:
            self.close()
            return
        with contextlib.suppress(StoreAway):
            self.close(patience_s=5)

    def close(self, *, patience_s: float | None = None) -> None:
        """Wait until everything is done, and for a store that is away at most `patience_s` seconds.

        Raises:
            StoreAway: the store stayed away; the same command logs the rest when it is back.
            Exception: the first that a call of `later` raised.
        """
        patience = self.patience_s if patience_s is None else patience_s
        began = time.monotonic()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._thread.is_alive():
                # A slow store that answers is waited for; one that is away only so long.
                if self._away is not None and time.monotonic() - began > patience:
                    self._given_up = True
                    self._changed.notify_all()
                    break
                self._changed.wait(timeout=0.2)
            waiting = len(self._waiting)
        if self._failed:
            raise self._failed[0]
        if self._given_up and waiting:
            raise StoreAway(
                f"the MLflow store {self.uri} stayed away ({_cause(self._away)}); {waiting} entries wait. Nothing is lost: what was "
                "trained is kept, and the same command again logs the rest"
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting or self._given_up:
                    self._changed.notify_all()
                    return
                function, arguments = self._waiting[0]
            try:
                function(*arguments)
            except BaseException as error:
                if is_away(error):
                    self._wait_for_store(error)
                    continue
                self._failed.append(error)
            if self._away is not None:
                self._away = None
                console.say(f"the MLflow store {self.uri} is back; what waited is logged")
            with self._changed:
                self._waiting.popleft()

    def _wait_for_store(self, error: BaseException) -> None:
        if self._away is None:
            console.warn(f"the MLflow store {self.uri} is away ({_cause(error)}); training goes on, and what cannot be logged waits")
        self._away = error
        with self._changed:
            self._changed.wait_for(lambda: self._given_up, timeout=self.retry_s)


def _cause(error: BaseException | None) -> str:
    text = str(error).strip()
    for cause in ("Connection refused", "timed out", "Name or service not known", "database is locked", "database or disk is full"):
        if cause in text:
            return cause  # without the address and the tries around it
    return text.splitlines()[0][:200] if text else type(error).__name__
