"""One process at a time: what two commands must not do at once is held by a lock file, which says who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from models.errors import EnvironmentProblem, UserError
from orchestration import console
from orchestration.storage import fetch, lock_of

_SAID_AFTER_S = 3
ENDING_S = 2
"""A process that was just killed may still be ending."""
ADVICE = "`--wait` waits for it and then reuses what it found."


@contextlib.contextmanager
def only_process(lock: Path, what: str, *, advice: str = "", patience_s: float | None = 0) -> Iterator[None]:
    """Hold a lock file for this process. The lock dies with its process, however that ends.

    Args:
        lock: file of the lock; made if it is not there, with its folder.
        what: what is done under it, for the message, e.g. `the sweep NAME`.
        advice: ends the message of the error.
        patience_s: seconds to wait for another process; None: until it has ended.

    Raises:
        EnvironmentProblem: another process still holds it after `patience_s` seconds; the message names that process.
    """
    make_folder(lock.parent)
    if os.path.lexists(lock) and not lock.is_file():
        raise UserError(f"{str(lock)[:300]} should be the file of a lock, it is a folder, a pipe, a device or a broken link: remove it")
    with lock.open("a+") as file:
        _take(file.fileno(), what, advice, patience_s, lambda: holder_of(lock))
        file.seek(0)
        file.truncate()
        own = f"process {os.getpid()} on {socket.gethostname()} ({_command()})"
        file.write(own)
        file.flush()
        held = lock_of(lock)
        if held is None:
            yield
            return
        holder = held.take(own, patience_s, lambda other: console.say(f"waiting for {other}, which runs {what} or was killed"))
        if holder is not None:
            raise EnvironmentProblem(f"{what} is being run by {holder}. {advice}".rstrip())
        fetch(lock.parent, databases=True)  # what an earlier holder left
        try:
            yield
        finally:
            held.release()


@contextlib.contextmanager
def only_writer(folder: Path, what: str, *, patience_s: float | None = 60) -> Iterator[None]:
    """Hold a folder that is not of a home, without leaving a file in it: for what takes seconds.

    Where a file system has no locks for folders (some network folders) it is not held.

    Args:
        folder: made if it is not there. what: what is done there, for the message. patience_s: as of `only_process`.

    Raises:
        EnvironmentProblem: another process still holds it after `patience_s` seconds.
    """
    make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            _take(descriptor, what, "", patience_s, lambda: "another process")
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, what: str, advice: str, patience_s: float | None, holder: Callable[[], str]) -> None:
    """Lock an open file or folder, see `only_process`."""
    began, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - began
            if patience_s is not None and waited >= patience_s:
                raise EnvironmentProblem(f"{what} is being run by {holder()}. {advice}".rstrip()) from None
            if waited > _SAID_AFTER_S and not said:
                console.say(f"waiting for {holder()}, which runs {what}")
                said = True
            time.sleep(0.1)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there.

    Raises:
        UserError: something else has its name, or that of one above it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
            raise
        above = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
        raise UserError(f"{str(above)[:300]} is no folder, so {str(folder)[:300]} cannot be made: remove it") from None


def holder_of(lock: Path) -> str:
    """Return who holds a lock, as the process wrote it there."""
    return lock.read_text(errors="replace").strip() or "another process"


def is_held(lock: Path) -> bool:
    """Return whether a living process holds a lock."""
    if not lock.is_file():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False


def _command() -> str:
    """Return what this process was started for, shortened."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return console.without_passwords(shlex.join(words))[:200]
