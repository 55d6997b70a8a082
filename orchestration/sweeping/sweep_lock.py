"""One driver per sweep: a second start of the same sweep would take the first one's running trials for interrupted ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from models.errors import UserError

ENDING_S = 15  # a driver that was just stopped may still be ending


@contextlib.contextmanager
def only_driver(folder: Path, name: str, *, patience_s: float = ENDING_S) -> Iterator[None]:
    """Hold a sweep's folder for this process. The lock dies with its process, however that ends.

    Raises:
        UserError: another process still runs this sweep after `patience_s` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"the sweep {name} is being run by {file.read() or 'another process'}. `rayndom watch {name}` follows it; end "
                        "that process first, or give the second sweep another name or another --home."
                    ) from None
                time.sleep(0.2)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
