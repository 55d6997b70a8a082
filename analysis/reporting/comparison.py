"""Comparing evaluations: which of two models is more robust, or "not separable", which is an answer.

Samples are paired. Two deterministic models are compared by McNemar's test as well. All pairs of one table are one family of tests
(Holm). About two methods, rather than two checkpoints, something is said only from three training seeds each.

Shapes: S samples, R draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.reporting.mark import MARK
from analysis.reporting.tables import format_percent
from analysis.result import EvaluationResult, WorstAttack
from analysis.statistics import Estimate, holm, mcnemar_exact, paired_difference, two_sided_p_value
from models.errors import UserError

Answer = Literal["first is better", "second is better", "first seems better", "second seems better", "not separable", "not comparable"]

MIN_TRAINING_SEEDS = 3
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies with its 95 % interval, -1 to 1; as text in percent, with the mark where it has one."""

    value: float
    low: float
    high: float
    marked: bool = False

    def __str__(self) -> str:
        return format_percent(self.value, self.low, self.high, marked=self.marked)


@dataclass(frozen=True)
class Comparison:
    """One pair.

    Attributes:
        first, second: names. difference: accuracy of the first minus that of the second, on the same samples, with its 95 % interval.
        p_value: two-sided. adjusted_p_value: Holm, over all pairs of the call. method: how they were computed.
        mcnemar_p_value: for two deterministic checkpoints, else None.
        num_seeds: training seeds of the two. seed_deviation: the larger standard deviation over training seeds, or None.
        answer: what may be said. reason: why, in a sentence. marked: a check of one of the evaluations failed.
        first_look: checks that would say something did not run, so that a difference is no more than what it seems.
    """

    first: str
    second: str
    difference: Estimate | None
    p_value: float | None
    adjusted_p_value: float | None
    mcnemar_p_value: float | None
    num_seeds: tuple[int, int]
    seed_deviation: float | None
    answer: Answer
    reason: str
    marked: bool = False
    first_look: str = ""

    def row(self) -> dict[str, Any]:
        """Return the pair as plain values, for tables."""
        found = self.difference
        return {
            "first": self.first,
            "second": self.second,
            "difference": None if found is None else Difference(found.value, found.low, found.high, self.marked),
            "p (Holm)": self.adjusted_p_value,
            "answer": self.answer,
            "reason": self.reason,
        }


def compare(results: Mapping[str, EvaluationResult | Sequence[EvaluationResult]]) -> list[Comparison]:
    """Compare the headlines (worst attack per sample, unknown draw) of all pairs.

    Args:
        results: by name, one evaluation, or those of several training seeds of one method. All must be of the same suite, seed, threat
            model and images; samples that not all have are left out.

    Raises:
        UserError: fewer than two names, or evaluations that differ in more than the model.
    """
    if len(results) < 2:
        raise UserError("a comparison needs at least two evaluations")
    groups = {name: [value] if isinstance(value, EvaluationResult) else list(value) for name, value in results.items()}
    empty = [name for name, group in groups.items() if not group]
    if empty:
        raise UserError(f"{empty[0]!r} has no evaluation")
    _check_comparable(groups)
    drafts = [_compare_pair(first, groups[first], second, groups[second]) for first, second in itertools.combinations(groups, 2)]
    tested = [index for index, draft in enumerate(drafts) if draft.p_value is not None]
    adjusted = dict(zip(tested, holm([drafts[index].p_value or 0.0 for index in tested]), strict=True)) if tested else {}
    return [_answered(draft, adjusted.get(index)) for index, draft in enumerate(drafts)]


def _check_comparable(groups: Mapping[str, Sequence[EvaluationResult]]) -> None:
    reference: EvaluationResult | None = None
    for name, group in groups.items():
        for result in group:
            reference = reference or result
            for what in ("suite", "seed", "threat_model", "scoring"):
                if result.header[what] != reference.header[what]:
                    raise UserError(
                        f"evaluations can be compared only under equal conditions: {what} of {name!r} is {result.header[what]}, "
                        f"of the first {reference.header[what]}"
                    )


def _compare_pair(first: str, firsts: list[EvaluationResult], second: str, seconds: list[EvaluationResult]) -> Comparison:
    everything = [*firsts, *seconds]
    marked = any(result.marked for result in everything)
    nothing: dict[str, Any] = {"p_value": None, "adjusted_p_value": None, "mcnemar_p_value": None, "difference": None}
    facts: dict[str, Any] = {"first": first, "second": second, "num_seeds": (len(firsts), len(seconds)), "marked": marked}
    facts["first_look"] = next((result.basis for result in everything if result.not_run), "")
    if any(result.worst is None for result in everything):
        return Comparison(
            **facts, **nothing, seed_deviation=None, answer="not comparable", reason="no bounded attack ran against an unknown draw"
        )
    if any(not result.finished for result in everything):
        return Comparison(**facts, **nothing, seed_deviation=None, answer="not comparable", reason="an evaluation is not finished")
    ids = _common_ids([result.worst for result in everything if result.worst is not None])
    one, two = (_over_seeds(group, ids) for group in (firsts, seconds))
    exact = (_exact(firsts), _exact(seconds))
    deterministic = one.shape[1] == two.shape[1] == 1 and all(exact)
    difference = paired_difference(one, two, exact=exact)
    deviation = max((_deviation(group, ids) for group in (firsts, seconds) if len(group) > 1), default=None)
    mcnemar = mcnemar_exact(one[:, 0] > 0.5, two[:, 0] > 0.5) if deterministic and len(everything) == 2 else None
    p_value = mcnemar if mcnemar is not None else two_sided_p_value(difference)
    return Comparison(
        **facts,
        difference=difference,
        p_value=p_value,
        adjusted_p_value=None,
        mcnemar_p_value=mcnemar,
        seed_deviation=deviation,
        answer="not separable",
        reason="",
    )


def _answered(draft: Comparison, adjusted: float | None) -> Comparison:
    if draft.difference is None or adjusted is None:
        return draft
    gap, low, high = draft.difference.value, draft.difference.low, draft.difference.high
    answer: Answer = "not separable"
    enough = min(draft.num_seeds) >= MIN_TRAINING_SEEDS
    if draft.marked:
        answer, reason = "not comparable", f"a check of one of the evaluations failed {MARK}"
    elif low <= 0 <= high:
        reason = "the 95 % interval of the difference holds 0" + (f": {draft.difference.shortage}" if draft.difference.shortage else "")
    elif draft.difference.needed_draws is not None:
        reason = draft.difference.shortage
    elif adjusted > _SIGNIFICANT:
        reason = f"p = {adjusted:.2g} after Holm's correction"
    elif draft.seed_deviation is not None and draft.seed_deviation >= abs(gap):
        reason = f"training seeds differ by {100 * draft.seed_deviation:.1f} points, the two by {100 * abs(gap):.1f}"
    else:
        answer = "first is better" if gap > 0 else "second is better"
        reason = "the interval excludes 0 and training seeds differ by less than the gap"
        if not enough:
            reason = f"for these checkpoints; of the methods nothing is known with fewer than {MIN_TRAINING_SEEDS} training seeds each"
        if draft.first_look:
            answer = "first seems better" if gap > 0 else "second seems better"
            reason = f"{draft.first_look}, no basis for a claim; {reason}"
    return Comparison(**{**draft.__dict__, "adjusted_p_value": float(adjusted), "answer": answer, "reason": reason})


def _common_ids(worst: list[WorstAttack]) -> NDArray[np.int64]:
    ids = worst[0].ids
    for other in worst[1:]:
        if other.ids.size == ids.size and (other.ids == worst[0].ids).all() and other.data != worst[0].data:
            raise UserError("the evaluations are of different images")
        ids = np.intersect1d(ids, other.ids)
    if not ids.size:
        raise UserError("the evaluations have no image in common")
    return np.sort(ids)


def _matrix(result: EvaluationResult, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    assert result.worst is not None
    order = np.argsort(result.worst.ids)
    return result.worst.correct_SR[order[np.searchsorted(result.worst.ids, ids, sorter=order)]]


def _over_seeds(group: list[EvaluationResult], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (S, R): the mean over training seeds, draw by draw; draws of two trained models have nothing in common but their number."""
    matrices = [_matrix(result, ids) for result in group]
    width = min(matrix.shape[1] for matrix in matrices)
    if any(matrix.shape[1] != width for matrix in matrices):
        if _exact(group):
            return np.stack([matrix.mean(1) for matrix in matrices]).mean(0)[:, None]
        matrices = [matrix[:, :width] for matrix in matrices]
    return np.stack(matrices).mean(0)


def _exact(group: Sequence[EvaluationResult]) -> bool:
    return all(result.worst is not None and result.worst.exact for result in group)


def _deviation(group: list[EvaluationResult], ids: NDArray[np.int64]) -> float:
    return float(np.std([_matrix(result, ids).mean() for result in group], ddof=1))
