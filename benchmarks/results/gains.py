"""What a row gains over adversarial training: paired image by image, p-values adjusted by Holm over the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.reproduction.companion import paired_by_image
from analysis.reproduction.outcome import Reading
from analysis.statistics import Estimate, holm, mcnemar_exact, two_sided_p_value
from benchmarks.results.records import Record, number

BASELINE = "at"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Gain:
    """Of one row over adversarial training of the same seed, under one column.

    Attributes:
        difference: in [-1,1], with its 95 % interval. p_value: two-sided, of this comparison alone. adjusted: by Holm.
        suspicious: a check of one of the two numbers failed.
    """

    difference: Estimate
    p_value: float
    adjusted: float
    suspicious: bool

    @property
    def answer(self) -> str:
        """What may be said of the two networks."""
        if self.suspicious:
            return "not to be believed: a check failed"
        if self.adjusted > SIGNIFICANT or self.difference.low <= 0 <= self.difference.high:
            return "not separable"
        return "above AT" if self.difference.value > 0 else "below AT"


def gains(records: Sequence[Record], column: str) -> dict[str, Gain]:
    """Return the gains of all rows but the baseline, by row; `records`: of one table and one seed. Without the baseline there are none."""
    baseline = next((number(record, column) for record in records if record.row == BASELINE), None)
    drafts: dict[str, tuple[Estimate, float, bool]] = {}
    for record in records:
        own = number(record, column)
        difference = None if record.row == BASELINE or own is None or baseline is None else paired_by_image(own, baseline)
        if difference is not None and own is not None and baseline is not None:
            drafts[record.row] = difference, _p_value(own, baseline, difference), bool(own.failed_checks or baseline.failed_checks)
    adjusted = _holm({row: p_value for row, (_, p_value, _) in drafts.items()})
    return {row: Gain(difference, p_value, adjusted[row], failed) for row, (difference, p_value, failed) in drafts.items()}


def _p_value(own: Reading, baseline: Reading, difference: Estimate) -> float:
    """Return McNemar's p-value where each image is right or wrong for both, else that of the interval."""
    one, two = (list(reading.series["correct"]) for reading in (own, baseline))
    if {*one, *two} <= {0.0, 1.0} and (own.num_draws or 1) == (baseline.num_draws or 1) == 1:
        return float(mcnemar_exact([share > 0.5 for share in one], [share > 0.5 for share in two]))
    return two_sided_p_value(difference)


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(p_values, map(float, holm(list(p_values.values()))), strict=True)) if p_values else {}
