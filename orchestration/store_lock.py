"""Locks in an object store: who holds one renews it, so that others can tell a living holder from one that was killed."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

_logger = logging.getLogger(__name__)

HELD = ".held"
"""How the names of locks end."""
_BEAT_S = 5.0
_STALE_S = 30.0
_SAID_AFTER_S = 3.0


class Held:
    """A lock in an object store: an object that is made where there is none, and renewed while it is held.

    One whose holder was killed is not renewed any more; it may be taken over after half a minute.

    Args:
        files: of fsspec. name: of the object.
        place: of the copy. Who holds the lock file of the copy may take over what an earlier process held from there: that one is dead.
    """

    def __init__(self, files: Any, name: str, place: str) -> None:
        self.files, self.name, self.place = files, name, place
        self.beat_s, self.stale_s = _BEAT_S, _STALE_S
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._beats = 0

    def take(self, own: str, patience_s: float | None, on_wait: Callable[[str], None] = lambda holder: None) -> str | None:
        """Take the lock; return who holds it where that one is alive after `patience_s` seconds (None: wait), None once it is taken.

        Args:
            own: who takes it, for others. on_wait: told once whom it waits for.
        """
        began, said, first, since = time.monotonic(), False, "", 0.0
        while not self.try_to_take(own):
            seen, place, holder = self.look()
            now = time.monotonic()
            alive = bool(first) and seen != first
            if seen != first:
                first, since = seen, now
            if seen and (place == self.place or now - since > self.stale_s):
                self.break_stale(seen)
                continue
            if alive and patience_s is not None and now - began >= patience_s:
                return holder
            if now - began > _SAID_AFTER_S and not said:
                on_wait(holder)
                said = True
            time.sleep(0.5)
        return None

    def try_to_take(self, holder: str) -> bool:
        """Take the lock; return whether it was free."""
        try:
            self.files.pipe_file(self.name, self._content(holder), mode="create")
        except FileExistsError:
            return False
        threading.Thread(target=self._renew, args=(holder,), daemon=True).start()
        return True

    def _content(self, holder: str) -> bytes:
        return f"{self._token}\n{self._beats}\n{self.place}\n{holder}".encode()

    def _renew(self, holder: str) -> None:
        while not self._ended.wait(self.beat_s):
            self._beats += 1
            try:
                self.files.pipe_file(self.name, self._content(holder))
            except Exception as error:  # a store that is away for a moment says so in words of its own; the next beat comes soon
                _logger.info("the lock %s was not renewed: %s", self.name, error)

    def look(self) -> tuple[str, str, str]:
        """Return (what changes while it is held, the holder's place, who holds it); all empty where nobody does."""
        self.files.invalidate_cache()
        try:
            content = self.files.cat_file(self.name).decode(errors="replace")
        except FileNotFoundError:
            return "", "", ""
        # Of an object that somebody else put there all lines may be missing: it stays as it is, and is taken over like a dead holder's.
        token, beat, place, holder = [*content.split("\n", 3), "", "", ""][:4]
        return f"{token} {beat}", place, holder or "an unknown process"

    def break_stale(self, seen: str) -> None:
        """Remove the lock of a holder that is gone, unless it is another one by now than the one that was seen."""
        if self.look()[0] == seen:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self.name)

    def release(self) -> None:
        """Give the lock back."""
        self._ended.set()
        if self.look()[0].startswith(self._token):
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self.name)
