"""Errors that are the user's to mend: one clear message, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_NAMES = 40


class UserError(ValueError):
    """A mistake in what the user asked for. The command line prints the message alone and exits with code 2."""


class EnvironmentProblem(UserError):
    """What was asked for is right, but the machine does not allow it now: a place that may not be written, a server that is away, a lock
    that another process holds. The command line exits with code 3."""


class EnvironmentFailure(RuntimeError):
    """The machine failed a command while it ran: a full disk, a store that stayed away, a cluster that is gone. What was finished is kept.
    The command line exits with code 3."""


def blames_environment(text: str) -> bool:
    """Return whether a database says in a text, as libraries pass it on, that the machine does not let it work."""
    signs = ("disk is full", "readonly database", "database is locked", "unable to open database file", "disk I/O error")
    return any(sign in text for sign in signs)


def first_line(error: BaseException | str) -> str:
    """Return the first line of what a library says, at most 300 characters: what follows are statements, addresses and stacks. Of an error
    of a database library it is what the database said; of one that says nothing its kind."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    if lines:
        return lines[0][:300]
    return "no reason given" if isinstance(error, str) else type(error).__name__


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` allowed names that resemble `name`, best first."""
    pool = list(allowed)
    close = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    return close or [candidate for candidate in pool if name.lower() in candidate.lower()][:count]


LISTED = "`rayndom list` says how they are listed"


def unknown_name(kind: str, name: str, allowed: Iterable[str], unread: Iterable[str] = (), *, listed: str = LISTED) -> UserError:
    """Build the error for a name that does not exist: what it is, what is allowed, which names are nearest.

    Of a long list only near names are shown: a page of names hides the one that was meant.

    Args:
        unread: a sentence for each place that may hold the name and could not be read. listed: where a long list of them is found.
    """
    pool = sorted(allowed)
    close = nearest(name[:200], pool)
    name = f"{name[:100]}..." if len(name) > 100 else name
    hint = f" Did you mean {' or '.join(repr(candidate) for candidate in close)}?" if close else ""
    reasons = "".join(f" {sentence[:300]}." for sentence in unread)
    if len(pool) > MOST_NAMES:
        return UserError(f"unknown {kind} {name!r}.{hint} There are {len(pool)}; {listed}.{reasons}")
    return UserError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(pool) if pool else 'none'}.{reasons}")
