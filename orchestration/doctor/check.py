"""One finding of the doctor."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        name: what was looked at.
        status: `ok`; `warn`: it works, but not everything or not well; `fail`: Rayndom cannot work like this.
        found: what is there.
        mend: what to do; empty when there is nothing to do.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    mend: str = ""


def connection_error(host: str, port: int) -> str | None:
    """Return why nothing answers at a TCP port, None if something does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error) or "no answer"
    return None
