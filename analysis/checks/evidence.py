"""What a check is, and what it reads: the measurements of one evaluation, by what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.attacks.registry import AttackEntry, attack_entry
from analysis.evaluation.measurements import Measurement, common_rows
from analysis.statistics import paired_difference

_NEXT_TO_NOTHING = 0.01
_CHANCE = 0.01
_A_POINT = 0.01


class Status(StrEnum):
    """Outcome of a check."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


class Meaning(StrEnum):
    """What a failed check says of the numbers."""

    TOO_HIGH = "the numbers are too high"
    ELSE = "the numbers are about something else than this model under this attack"


@dataclass(frozen=True)
class Verdict:
    """Outcome of one check: what it is, what was seen, what to do about it.

    `attacks`: names of the attacks whose numbers it is about; none: the whole evaluation. `applies`: False where a skipped check has
    nothing to say about this kind of model, so that nothing is missing without it. `meaning`: what its failure says of the numbers.
    """

    id: str
    title: str
    status: Status
    explanation: str
    advice: str = ""
    attacks: tuple[str, ...] = ()
    applies: bool = True
    meaning: Meaning = Meaning.TOO_HIGH


@dataclass(frozen=True)
class Finding:
    """What a check's function returns; the advice is shown unless the check passed. `attacks`, `applies`: see `Verdict`."""

    status: Status
    explanation: str
    attacks: tuple[str, ...] = ()
    applies: bool = True


@dataclass(frozen=True)
class Check:
    """A check: `run(evidence) -> Finding`. `meaning`: what a failure says of the numbers."""

    id: str
    title: str
    advice: str
    run: Callable[[Evidence], Finding]
    meaning: Meaning = Meaning.TOO_HIGH


class Evidence:
    """The measurements of one evaluation, by what they are."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.all = list(measurements)
        self.attacks = [each for each in measurements if each.kind == "attack"]
        self.epsilon_zero = [each for each in measurements if each.kind == "epsilon_zero"]
        self.clean = next((each for each in measurements if each.kind == "clean" and each.protocol == "T1"), None)
        self.randomized = self.all[0].randomized if self.all else False

    @property
    def examination(self) -> dict[str, Any]:
        """What was measured on the model itself; empty if that block is missing."""
        return self.clean.records[0]["block"]["examination"] if self.clean is not None else {}

    @cached_property
    def accuracy_left(self) -> float:
        """Share of images and draws that all attacks together leave right under T1, image by image; 1 if there is no such attack."""
        lowest: dict[int, float] = {}
        for each in self.attacks:
            if each.protocol == "T1" and each.in_threat_model:
                for row, share in zip(each.ids.tolist(), shares(each).tolist(), strict=True):
                    lowest[row] = min(share, lowest.get(row, 1.0))
        return sum(lowest.values()) / len(lowest) if lowest else 1.0

    @property
    def nothing_left(self) -> bool:
        """Whether the attacks leave next to nothing: then no attack can be too weak, and no number too high."""
        return self.accuracy_left <= _NEXT_TO_NOTHING

    def masking(self, problem: str, attacks: tuple[str, ...] = ()) -> Finding:
        """Return the finding of a check that saw a sign of a weak attack: a failure only where a number can be too high for it.

        `attacks`: names of those whose numbers it is about; none: the whole evaluation.
        """
        if self.nothing_left:
            seen = f"{problem}; but the attacks leave only {self.accuracy_left:.1%}, so no number is too high for it"
            return Finding(Status.WARN, seen, attacks)
        return Finding(Status.FAIL, problem, attacks)

    def skippable_share(self, measurement: Measurement) -> float:
        """Return the share of samples that err on every selection draw unattacked: an attack may leave them alone.

        Where single known draws are attacked, images on which such a draw errs are not counted as unchanged in the first place.
        """
        frozen = measurement.header["scoring"]["attacked_draw"] == "frozen"
        if self.clean is None or measurement.protocol == "T2" or (measurement.protocol == "T0" and frozen):
            return 0.0
        _, rows = common_rows(measurement, self.clean)
        return float((~self.clean.matrix("selection")[rows].any(1)).mean()) if rows.size else 0.0

    def pairs(self, protocol: str, other: str) -> list[tuple[Measurement, Measurement]]:
        """Return pairs of the same attack under two protocols."""
        second = {each.name: each for each in self.attacks if each.protocol == other}
        return [(each, second[each.name]) for each in self.attacks if each.protocol == protocol and each.name in second]

    def studies(self, name: str) -> list[Measurement]:
        """Return the measurements of a study, in the order of the plan."""
        return [each for each in self.all if each.kind == "study" and each.header["study"]["name"] == name]

    def facts(self, name: str) -> list[dict[str, Any]]:
        """Return what the blocks of a study noted."""
        return [record["block"]["study"] for each in self.studies(name) for record in each.records]

    def under(self, protocol: str, wanted: Callable[[AttackEntry], bool]) -> list[Measurement]:
        """Return the attacks within the threat model under a protocol whose registry entry is wanted."""
        return [
            each for each in self.attacks if each.protocol == protocol and each.in_threat_model and wanted(attack_entry(each.attack or ""))
        ]


def difference(first: Measurement, second: Measurement) -> tuple[float, float]:
    """Return the difference of accuracies on the common samples and its standard error."""
    rows, other_rows = common_rows(first, second)
    if rows.size == 0:
        return 0.0, float("inf")
    one, two = first.matrix()[rows], second.matrix()[other_rows]
    same_draws = first.protocol == second.protocol and first.protocol in ("T1", "T4") and one.shape[1] == two.shape[1]
    estimate = paired_difference(one, two, common_draws=same_draws, exact=(first.exact, second.exact))
    return estimate.value, estimate.standard_error


def shares(measurement: Measurement) -> NDArray[np.float64]:
    """Return, per sample, the share of evaluation draws that are right (S,)."""
    return measurement.matrix().mean(1)


def clearly_more(count: int, total: int, limit: float) -> bool:
    """Return whether a share is above a limit by more than chance: the lower end of a one-sided 99 % Clopper-Pearson interval is."""
    return count > 0 and float(stats.beta.ppf(_CHANCE, count, total - count + 1)) > limit


def exceeds(excess: float, error: float) -> bool:
    """Return whether a difference of accuracies is more than a point and more than chance: three standard errors."""
    return excess > max(_A_POINT, 3 * error) + 1e-12


def skipped(reason: str) -> Finding:
    """Return the finding of a check that would say something about this model, but has nothing to look at."""
    return Finding(Status.SKIPPED, reason)


def does_not_apply(reason: str) -> Finding:
    """Return the finding of a check that has nothing to say about this kind of model: nothing is missing without it."""
    return Finding(Status.SKIPPED, reason, applies=False)
