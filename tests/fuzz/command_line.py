"""Running the command line in this process, as the fuzz does thousands of times: exit code, what was said, how long it took."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from orchestration import console
from orchestration.cli import main
from orchestration.interruption import INTERRUPTED

PATIENCE_S = 10 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))
"""Longer than this no command may think about input that is wrong: ten seconds, where nobody else computes."""

SEED = int(os.environ.get("RAYNDOM_FUZZ_SEED", "0"))
"""Another seed makes other cases: `RAYNDOM_FUZZ_SEED=7 make test ARGS=tests/fuzz`."""


class Hang(BaseException):
    """A command took longer than `PATIENCE_S`; no `except Exception` on the way stops it."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code (-1: it hung or raised), output, error stream, seconds."""

    code: int
    output: str
    error: str
    seconds: float

    @property
    def said(self) -> str:
        """Everything that was printed."""
        return f"{self.output}\n{self.error}"


@contextlib.contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Raise `Hang` in this thread after so many seconds of wall time."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rayndom(words: Sequence[str], patience_s: float = PATIENCE_S) -> Outcome:
    """Run a command and return what it did; nothing that it raises comes out of here.

    Raises:
        KeyboardInterrupt: a signal came from outside, as from `timeout`; the command took it for its own and ended with 130.
    """
    output, error = io.StringIO(), io.StringIO()
    console.use_json(False)
    started = time.monotonic()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            with no_longer_than(patience_s):
                code = main(list(words))
        except Hang:
            code = -1
            error.write(f"no answer within {patience_s} s")
        except BaseException as raised:
            code = -1
            error.write(f"{type(raised).__name__} came out of main: {raised}")
    if code == INTERRUPTED:
        raise KeyboardInterrupt(f"while {' '.join(words)[:200]!r} ran")
    return Outcome(code, output.getvalue(), error.getvalue(), time.monotonic() - started)


def complaint(outcome: Outcome, names: Sequence[str], *, refused: bool | None, allowed: Sequence[int] = (0, 2)) -> str | None:
    """Return what is wrong with how a command took its input, None if nothing is.

    Args:
        names: a refusal must contain one of them: the field or the file that is wrong.
        refused: whether it must be refused; None: it may be accepted.
        allowed: exit codes.
    """
    if outcome.code not in allowed:
        return f"exit code {outcome.code}"
    if outcome.code == 0:
        return "accepted" if refused else None
    if "Traceback" in outcome.error or not outcome.error.startswith(("error: ", "warning: ")):
        return "no message"
    if len(outcome.error) > 6000:
        return f"a message of {len(outcome.error)} characters"
    squeezed = "".join(outcome.error.split())
    if not any("".join(name.split()) in squeezed for name in names):
        return f"the message names none of {', '.join(names)}"
    return None
