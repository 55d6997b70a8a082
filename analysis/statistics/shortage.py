"""When an interval says nothing: too few draws or images, and how many would do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

USEFUL_WIDTH = 0.2
"""Of an interval wider than 20 points no claim is made."""

FEWEST_DRAWS = 5
"""With fewer draws their spread is hardly observed, whatever the interval's width."""


@dataclass(frozen=True)
class Shortage:
    """What there is too little of: numbers that would do, None for what is not lacking."""

    needed_draws: int | None
    needed_samples: int | None

    def fields(self) -> dict[str, Any]:
        """Return the fields of an `Estimate`."""
        lacking = []
        if self.needed_draws is not None:
            lacking.append(f"too few draws (about {self.needed_draws} would do)")
        if self.needed_samples is not None:
            lacking.append(f"too few images (about {self.needed_samples} would do)")
        return {"shortage": ", ".join(lacking), "needed_draws": self.needed_draws, "needed_samples": self.needed_samples}


def says_nothing(width: float, num_draws: int) -> bool:
    """Return whether an interval is too wide for a claim, or the draws that it rests on (0: all were scored) are too few."""
    return width > USEFUL_WIDTH or 0 < num_draws < FEWEST_DRAWS


def find_shortage(width: float, image_width: float, draw_width: float, *, num_samples: int, num_draws: int) -> Shortage | None:
    """Return what is too few for an interval of a useful width, or None.

    Args:
        width: of the interval (0 to 1, for differences to 2). image_width, draw_width: that images and draws alone leave.
        num_samples: images. num_draws: draws that add chance; 0: every configuration was scored.
    """
    if not says_nothing(width, num_draws):
        return None
    unseen = 0 < num_draws < FEWEST_DRAWS
    # Widths add as squares: each source may use what the other leaves, at least half of the square; a tenth is spared.
    for_draws, for_images = (0.9 * math.sqrt(max(USEFUL_WIDTH**2 - other**2, USEFUL_WIDTH**2 / 2)) for other in (image_width, draw_width))
    draws = samples = None
    if unseen or (num_draws and draw_width > for_draws):
        draws = max(FEWEST_DRAWS, num_draws + 1, _round(num_draws * (draw_width / for_draws) ** 2))
    if width > USEFUL_WIDTH and (image_width > for_images or draws is None):
        samples = max(_round(num_samples * (image_width / for_images) ** 2), num_samples + 1)
    return Shortage(draws, samples)


def _round(number: float) -> int:
    """Return the number rounded up to two digits."""
    unit = 10 ** max(math.floor(math.log10(max(number, 1))) - 1, 0)
    return math.ceil(number / unit) * unit
