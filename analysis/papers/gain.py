"""What papers claim: which row of a table is their defence, and which its baseline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gain:
    """What a defence is said to add: a row minus the row of its baseline.

    Attributes:
        item: name of the table. row, baseline: keys of its rows. claimed_by: short name of the paper whose defence the row is, where the
            table is of another paper.
    """

    item: str
    row: str
    baseline: str
    claimed_by: str = ""
