"""The result of an evaluation, computed from its records alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from analysis import statistics
from analysis.checks.evidence import Evidence
from analysis.checks.verdicts import Status, Verdict, run_checks
from analysis.evaluation.block_task import PLAN_FIELDS, BlockTask
from analysis.evaluation.measurements import Measurement, common_rows, measurements
from analysis.evaluation.protocols import ProtocolName
from analysis.evaluation.records import Record, check_same_evaluation
from analysis.statistics import Estimate
from analysis.statistics.stopping import Looks

_ALL_PROTOCOLS: frozenset[ProtocolName] = frozenset(get_args(ProtocolName))
_ONE_PASS = "T0 = T1 = T2"
"""How files and tables name the one pass of a deterministic model, which is its number under every protocol."""


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        attack: name of the attack in the suite, or `clean`. entry: its name in the registry.
        protocol: T0 to T4 as a label; `T0 = T1 = T2` for deterministic models. protocols: all that it is the number of.
        estimate: expected accuracy with interval. draw_deviation, draw_lowest, draw_highest: spread over draws.
        caption: attack, radius, draws and samples in words. finished: all blocks are there.
        num_forward, num_backward: passes per sample. in_threat_model: it counts for the worst case.
        conditional: accuracy on the samples that most draws classify correctly unattacked, or None.
        majority: how often more than half of n draws (those of T4) are right, or None for a deterministic model.
    """

    attack: str
    entry: str | None
    protocol: str
    protocols: frozenset[ProtocolName]
    estimate: Estimate
    caption: str
    finished: bool
    in_threat_model: bool
    draw_deviation: float | None = None
    draw_lowest: float | None = None
    draw_highest: float | None = None
    num_forward: float = 0.0
    num_backward: float = 0.0
    seconds: float = 0.0
    conditional: float | None = None
    majority: float | None = None


@dataclass(frozen=True)
class WorstAttack:
    """The worst attack of each sample under T1.

    Attributes:
        ids: rows of the samples (S,). data: hash of images and labels per block. chosen: name of the worst attack of each sample.
        correct_SR: its correctness on the evaluation draws. exact: the draws are the whole space of draws.
    """

    ids: NDArray[np.int64]
    data: tuple[str, ...]
    chosen: tuple[str, ...]
    correct_SR: NDArray[np.float64]
    exact: bool


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        rows: one per attack and protocol, clean images first.
        headline: expected accuracy under the worst attack of each sample, unknown draw (T1); None if no bounded attack ran under T1.
        headline_attacks: for how many samples each attack was the worst.
        clean: expected accuracy on clean images. paper: lowest accuracy of a single attack under T0, or None.
        verdicts: the checks. marked: one failed, so no number may be shown without its mark. finished: all planned blocks are there.
        header: whose numbers these are. records: everything, per sample.
        looks: how often the interval may be looked at, where images are added until it is narrow: the intervals then hold at all looks
            at once with 95 %.
        worst: what the headline is the mean of, per sample, for comparisons.
    """

    rows: tuple[Row, ...]
    headline: Estimate | None
    headline_attacks: dict[str, int]
    clean: Estimate | None
    paper: Estimate | None
    verdicts: tuple[Verdict, ...]
    header: dict[str, Any]
    finished: bool
    records: tuple[Record, ...] = field(repr=False, default=())
    looks: Looks | None = None
    worst: WorstAttack | None = field(repr=False, default=None, compare=False)

    @property
    def marked(self) -> bool:
        """Whether a check failed."""
        return any(verdict.status is Status.FAIL for verdict in self.verdicts)

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The failed checks."""
        return tuple(verdict for verdict in self.verdicts if verdict.status is Status.FAIL)

    def lowest(self, protocol: ProtocolName) -> Row | None:
        """Return the row of the single attack that leaves least under a protocol; None: no bounded attack ran under it.

        An attack that a suite runs on a part of the images has another sample: its accuracy is no bound on that of all.
        """
        rows = [row for row in self.rows if row.attack != "clean" and row.in_threat_model and protocol in row.protocols]
        most = max((row.estimate.num_samples for row in rows), default=0)
        return min((row for row in rows if row.estimate.num_samples == most), key=lambda row: row.estimate.value, default=None)

    @property
    def below_headline(self) -> tuple[Row, ...]:
        """The single attacks whose number under T1 is below the headline, lowest first: see `reporting.conclusion.headline_note`."""
        if self.headline is None:
            return ()
        value = self.headline.value - 1e-12
        rows = [row for row in self.rows if row.attack != "clean" and "T1" in row.protocols and row.in_threat_model and row.finished]
        return tuple(sorted((row for row in rows if row.estimate.value < value), key=lambda row: row.estimate.value))

    @property
    def warned(self) -> tuple[Verdict, ...]:
        """The checks that warn."""
        return tuple(verdict for verdict in self.verdicts if verdict.status is Status.WARN)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a reader should know of how images, labels and suite were read: pixels that were clipped, attacks that were left out."""
        return tuple(self.header.get("remarks", ()))  # records of earlier versions do not know them

    @property
    def not_run(self) -> tuple[Verdict, ...]:
        """The checks that did not run although they would say something about this model."""
        return tuple(verdict for verdict in self.verdicts if verdict.status is Status.SKIPPED and verdict.applies)

    @property
    def checks_run(self) -> str:
        """How many checks ran, e.g. `14 of 21`."""
        return f"{sum(verdict.status is not Status.SKIPPED for verdict in self.verdicts)} of {len(self.verdicts)}"

    @property
    def basis(self) -> str:
        """What the numbers license, in a few words: a claim needs all checks that apply."""
        if not self.finished:
            return "not finished"
        if self.marked:
            return f"invalid: {', '.join(verdict.id for verdict in self.failed)} failed"
        ran = f"{self.checks_run} checks ran"
        return f"first look: {ran}" if self.not_run else f"all checks that apply: {ran}"

    def frame(self) -> list[dict[str, Any]]:
        """Return the rows as a tidy frame of plain values."""
        return [
            {
                "attack": row.attack,
                "entry": row.entry,
                "protocol": row.protocol,
                "accuracy": row.estimate.value,
                "low": row.estimate.low,
                "high": row.estimate.high,
                "standard_error": row.estimate.standard_error,
                "num_samples": row.estimate.num_samples,
                "num_draws": row.estimate.num_draws,
                "exact": row.estimate.exact,
                "interval": row.estimate.method,
                "shortage": row.estimate.shortage or None,
                "needed_draws": row.estimate.needed_draws,
                "needed_samples": row.estimate.needed_samples,
                "draw_deviation": row.draw_deviation,
                "draw_lowest": row.draw_lowest,
                "draw_highest": row.draw_highest,
                "conditional_accuracy": row.conditional,
                "majority_accuracy": row.majority,
                "num_forward": row.num_forward,
                "num_backward": row.num_backward,
                "seconds": row.seconds,
                "in_threat_model": row.in_threat_model,
                "finished": row.finished,
                "marked": self.marked,
                "basis": self.basis,
                "caption": row.caption,
            }
            for row in self.rows
        ]


def collect(records: Iterable[Record], plan: Sequence[BlockTask] | None = None, looks: Looks | None = None) -> EvaluationResult:
    """Compute the result of finished blocks, in whatever order they come.

    Args:
        records: of one evaluation; with a plan, any that contain it, e.g. a whole file.
        plan: the blocks that the evaluation consists of; None: what the records say of the attacks they know.
        looks: where the interval may be looked at, if images are added until it is narrow; None: it is looked at once.

    Raises:
        ValueError: no records (of the plan), or records of different evaluations.
    """
    if plan is not None:
        by_key = {record["key"]: record for record in records}
        # A record may have been made for another plan, e.g. with fewer samples: its place is that of this plan.
        records = [_in_plan(by_key[task.key], task) for task in plan if task.key in by_key]
    records = tuple(sorted(records, key=lambda record: record["header"]["position"]))
    check_same_evaluation(records)
    level = looks.level_of_each if looks is not None else 0.95
    measured = measurements(records, level)
    finished = all(each.finished for each in measured) if plan is None else len(records) == len(plan)
    shown = [each for each in measured if each.kind in ("clean", "attack")]
    unattacked = next((each for each in shown if each.kind == "clean" and each.protocol == "T1"), None)
    rows = [_row(each, unattacked) for each in shown]
    for each in shown:
        row = _worst_draw_row(each)
        if row is not None:
            rows.append(row)
    headline, worst = _headline(shown, level)
    paper = [row.estimate for row in rows if "T0" in row.protocols and row.in_threat_model and row.attack != "clean"]
    header = {
        name: value
        for name, value in records[0]["header"].items()
        if name not in ("kind", "item", "study", "protocol", "stands_for", "block", "num_blocks", "position", "data", "radius", "bounded")
    }
    evidence = Evidence(measured)
    verdicts = tuple(run_checks(evidence))
    marked = any(verdict.status is Status.FAIL for verdict in verdicts)
    lowest_paper = min(paper, key=lambda estimate: estimate.value, default=None)
    return EvaluationResult(
        rows=tuple(replace(row, estimate=row.estimate.with_mark(marked)) for row in rows),
        headline=headline and headline.with_mark(marked),
        headline_attacks=_counts(worst, shown),
        clean=unattacked.estimate.with_mark(marked) if unattacked is not None else None,
        paper=lowest_paper and lowest_paper.with_mark(marked),
        verdicts=verdicts,
        header=header,
        finished=finished,
        records=records,
        looks=looks,
        worst=worst,
    )


def _in_plan(record: Record, task: BlockTask) -> Record:
    places = {name: value for name, value in task.model_dump(mode="json").items() if name in PLAN_FIELDS - {"cost", "succeeds"}}
    return {**record, "header": {**record["header"], **places}}


def _row(measured: Measurement, clean: Measurement | None = None) -> Row:
    matrix = measured.matrix()
    columns = matrix.mean(0) if matrix.shape[1] > 1 else None
    count = len(measured.ids)
    passes = [
        sum(record["block"][name] * len(record["samples"]["ids"]) for record in measured.records) / count
        for name in ("num_forward", "num_backward")
    ]
    is_clean = measured.kind == "clean"
    return Row(
        attack=measured.name,
        entry=measured.attack,
        protocol=measured.protocol if measured.randomized else _ONE_PASS,
        protocols=frozenset({measured.protocol}) if measured.randomized else _ALL_PROTOCOLS,
        estimate=measured.estimate,
        caption=measured.caption,
        finished=measured.finished,
        in_threat_model=measured.in_threat_model,
        draw_deviation=float(columns.std(ddof=1)) if columns is not None else None,
        draw_lowest=float(columns.min()) if columns is not None else None,
        draw_highest=float(columns.max()) if columns is not None else None,
        num_forward=0.0 if is_clean else passes[0],
        num_backward=0.0 if is_clean else passes[1],
        seconds=sum(record["measured"]["seconds"] for record in measured.records),
        conditional=None if is_clean or clean is None else _conditional(measured, clean),
        majority=_majority(measured),
    )


def _conditional(measured: Measurement, clean: Measurement) -> float | None:
    """Return the accuracy on the samples that most draws classify correctly unattacked."""
    rows, clean_rows = common_rows(measured, clean)
    right = clean.matrix()[clean_rows].mean(1) > 0.5
    return float(measured.matrix()[rows][right].mean()) if right.any() else None


def _majority(measured: Measurement) -> float | None:
    if not measured.randomized or measured.protocol != "T1":
        return None
    matrix = measured.matrix()
    votes = measured.header["scoring"]["num_averaged_draws"]
    votes = votes if measured.exact else min(votes, matrix.shape[1])
    return float(statistics.majority_of_n(matrix.sum(1), matrix.shape[1], votes, exact=measured.exact).mean())


def _worst_draw_row(measured: Measurement) -> Row | None:
    """Return the row of T3 for an attack that asks for it, and for clean images: alone the attacked number means nothing."""
    if not measured.randomized or measured.protocol != "T1":
        return None
    if measured.kind == "attack" and "T3" not in measured.header["item"]["protocols"]:
        return None
    matrix = measured.matrix()
    k = measured.header["scoring"]["num_retries"]
    if not measured.exact:
        k = min(k, matrix.shape[1])  # the caption says which k
    plain = _row(measured)
    return Row(
        attack=plain.attack,
        entry=plain.entry,
        protocol="T3",
        protocols=frozenset({"T3"}),
        estimate=statistics.worst_of_k_accuracy(matrix, k, exact=measured.exact, level=measured.level),
        caption=f"{plain.caption}, worst of k={k} draws",
        finished=plain.finished,
        in_threat_model=plain.in_threat_model,
    )


def _headline(shown: list[Measurement], level: float) -> tuple[Estimate | None, WorstAttack | None]:
    """Return the accuracy under the worst attack of each sample, over the samples that every complete T1 attack has seen."""
    usable = [each for each in shown if each.kind == "attack" and each.protocol == "T1" and each.in_threat_model]
    if not usable:
        return None, None
    # An attack that saw fewer samples (Square on 200) lowers those samples and leaves the others alone.
    widest = max(usable, key=lambda each: len(each.ids))
    same_draws = [each for each in usable if each.matrix().shape[1] == widest.matrix().shape[1]]
    size = len(widest.ids)
    selection, evaluation = [], []
    for each in same_draws:
        rows, wide_rows = common_rows(each, widest)
        picked, scored = np.ones((size, each.matrix("selection").shape[1])), np.ones((size, each.matrix().shape[1]), dtype=bool)
        picked[wide_rows], scored[wide_rows] = each.matrix("selection")[rows], each.matrix()[rows]
        if len(rows) < size:
            # Never chosen where it was not run: worse than any measured accuracy.
            missing = np.setdiff1d(np.arange(size), wide_rows)
            picked[missing] = 2.0
        selection.append(picked)
        evaluation.append(scored)
    estimate, chosen_S = statistics.worst_attack_accuracy(selection, evaluation, exact=widest.exact, level=level)
    columns = np.asarray(evaluation)[chosen_S, np.arange(size)].astype(np.float64)
    names = tuple(same_draws[index].name for index in chosen_S)
    data = tuple(record["header"]["data"] for record in widest.records)
    return estimate, WorstAttack(widest.ids, data, names, columns, widest.exact)


def _counts(worst: WorstAttack | None, shown: list[Measurement]) -> dict[str, int]:
    """Return for how many samples each attack was the worst; attacks that never were are listed with 0."""
    if worst is None:
        return {}
    names = [each.name for each in shown if each.kind == "attack" and each.protocol == "T1" and each.in_threat_model]
    return {name: worst.chosen.count(name) for name in names}


def is_number_of(label: str, protocol: ProtocolName) -> bool:
    """Return whether a row whose label a file has kept is the number under a protocol."""
    return label in (protocol, _ONE_PASS)
