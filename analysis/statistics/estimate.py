"""A number with its interval."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value, low, high: shares in [0,1] (differences in [-1,1]).
        standard_error: of the value, from the components of variance; descriptive, the interval is not made of it.
        num_samples, num_draws: what it was measured on. exact: the draws are the whole space of draws, so they add no chance.
        method: how the interval was made, in words.
        marked: it comes from an evaluation with a failed check and must not be shown without its mark.
        shortage: `too few draws (about 40 would do)` or the like where the interval is too wide to say anything or one source of chance
            was hardly observed; no claim may be made of the number then. Empty: none.
        needed_draws, needed_samples: how many would do, where there is a shortage of them, else None.
    """

    value: float
    low: float
    high: float
    standard_error: float
    num_samples: int
    num_draws: int
    exact: bool
    method: str
    marked: bool = False
    shortage: str = ""
    needed_draws: int | None = None
    needed_samples: int | None = None

    def with_mark(self, marked: bool) -> Estimate:
        """Return the estimate, marked or not."""
        return replace(self, marked=marked)

    @property
    def lacking(self) -> str:
        """What there is too little of, in two or three words; empty: nothing."""
        wanted = [name for name, needed in (("draws", self.needed_draws), ("images", self.needed_samples)) if needed is not None]
        return f"too few {' and '.join(wanted)}" if wanted else ""

    @property
    def width(self) -> float:
        """Length of the interval."""
        return self.high - self.low
