"""Errors that are the user's to mend: one clear message, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for. The command line prints the message alone and exits with code 2."""


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` allowed names that resemble `name`, best first."""
    pool = list(allowed)
    close = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    return close or [candidate for candidate in pool if name.lower() in candidate.lower()][:count]


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that does not exist: what it is, what is allowed, which names are nearest."""
    pool = sorted(allowed)
    close = nearest(name, pool)
    hint = f" Did you mean {' or '.join(repr(candidate) for candidate in close)}?" if close else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(pool) if pool else 'none'}.")
