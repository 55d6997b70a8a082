"""How numbers and scales are written, the same in every format: a reduced-scale number is never written without its mark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers.measures import Accuracy, Clean, Measure, Theory, Timing, TransferAccuracy, WorstCase
from analysis.reproduction.scale import BUDGETS, EPOCHS, Scale

SCALE_MARKS: Mapping[Scale, str] = {"smoke": "smoke", "short": "short", "paper": ""}
"""Stands behind every number of a reduced scale."""

SCALE_SENTENCES: Mapping[Scale, str] = {
    "smoke": f"Smoke scale: digits at 16x16, ResNet-8, at most {EPOCHS['smoke']} epochs and {BUDGETS['smoke'].num_samples} test images. "
    "These numbers say that everything runs and nothing about the defence; they must not be compared with the printed ones.",
    "short": f"Short scale: the paper's data and network on one cycle of at most {EPOCHS['short']} epochs, at most "
    f"{BUDGETS['short'].num_samples} test images. A first impression, not a reproduction; agreement with printed numbers is not judged.",
    "paper": "Paper scale: trained and evaluated as printed.",
}

NOT_RUN = "not run at this scale"
SAME = "="
"""Stands where the honest number is the paper's: the protocol makes no difference to what is measured."""

_SERIES_WORDS = ("values", "grid", "grids")


def format_value(value: float, unit: str, scale: Scale) -> str:
    """Return a number without unit and mark: one decimal for percent (two at paper scale, as papers print), else four digits."""
    if not math.isfinite(value):
        return str(value)
    if unit == "%":
        return f"{value:.{2 if scale == 'paper' else 1}f}"
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def format_interval(reading: Reading, unit: str, scale: Scale) -> str:
    """Return the interval as `52.3, 74.9`, empty if there is none."""
    if reading.low is None or reading.high is None:
        return ""
    return f"{format_value(reading.low, unit, scale)}, {format_value(reading.high, unit, scale)}"


def describe_series(series: Mapping[str, Any]) -> str:
    """Return in a few words what a figure draws, e.g. `median 0.12 of 512`; empty if there is nothing to draw."""
    if "values" in series:
        values = finite(series["values"])
        return f"median {np.median(values):.3g} of {len(values)}" if len(values) else "no finite value"
    grids = series.get("grids", [series["grid"]] if "grid" in series else [])
    if not grids:
        return ""
    values = finite(grids)
    return f"{values.min():.3g} to {values.max():.3g}" if len(values) else "no finite value"


def finite(values: Any) -> np.ndarray:
    """Return the finite ones of nested lists of numbers, flat."""
    flat = np.asarray(values, dtype=float).reshape(-1)
    return flat[np.isfinite(flat)]


def protocol_of(measure: Measure) -> str:
    """Return the protocol of a measure: `T0` to `T4`, `worst` for the worst attack per image, else empty."""
    if isinstance(measure, Accuracy):
        return measure.protocol
    if isinstance(measure, WorstCase):
        return "worst"
    return measure.attack.protocol if isinstance(measure, TransferAccuracy) else ""


def without_honest(measure: Measure) -> str:
    """Return why a measure has no honest counterpart; empty if it has one, or is one."""
    if measure.honest is not None:
        return ""
    if isinstance(measure, TransferAccuracy):
        return "the attacker does not have the network that answers, so draws are not the question"
    return "an attack without a radius stops at the boundary of the draw it sees: no honest reading exists"


def what_is_measured(measure: Measure) -> str:
    """Return a measure in words, as far as it stands fast before anything was run."""
    if isinstance(measure, Clean):
        return "clean images"
    if isinstance(measure, WorstCase):
        return f"worst attack per image of suite {measure.suite}"
    if isinstance(measure, Timing):
        return measure.quantity.replace("_", " ")
    if isinstance(measure, Theory):
        return measure.function.replace("_", " ").replace(".", ": ")
    return measure.row_name.replace("_", " ")


def most_common(values: Iterable[Any]) -> Any:
    """Return the most frequent value, the first of them if several are; None if there is none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def has_series(reading: Reading | None) -> bool:
    """Return whether a reading has something to draw beside its number."""
    return reading is not None and any(word in reading.series for word in _SERIES_WORDS)
