"""The companion of a paper: how much of what its defence is said to add remains under honest protocols, with which confidence.

A gain is a defence's accuracy minus its baseline's under one attack. Printed gains are shown beside ours; the share of the printed gain
that remains is computed at paper scale only. At a reduced scale, ours under the honest protocol is compared with ours under the paper's,
which is like with like. Everything is a function of outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from analysis.reproduction.outcome import ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers import get_paper, papers
from analysis.reproduction.papers.measures import Accuracy, Clean, WorstCase
from analysis.reproduction.papers.model import Column, Gain
from analysis.reproduction.scale import Scale
from analysis.reproduction.view import NOT_RUN, ItemView, view_of
from analysis.statistics import Estimate, MeasuredShares, paired_difference_of_shares

PROTOCOLS = ("T0", "T1", "T2", "T3", "T4", "ARC", "worst")
ALWAYS_SHOWN = ("T0", "T1", "T2", "worst")

PROTOCOL_WORDS = {
    "T0": "paper's protocol (T0)",
    "T1": "unknown draw (T1)",
    "T2": "known draw (T2)",
    "T3": "worst of k draws (T3)",
    "T4": "averaged answer (T4)",
    "ARC": "ARC, held against the baseline's worst attack",
    "worst": "worst attack per image",
}


@dataclass(frozen=True)
class Difference:
    """A defence's accuracy minus its baseline's, in points.

    Attributes:
        value, low, high: with the 95 % interval, where both numbers have one. paired: on the same images, image by image.
        num_samples: the smaller of the two. suspicious: keys of checks that failed in either evaluation.
    """

    value: float
    low: float | None
    high: float | None
    paired: bool
    num_samples: int | None
    suspicious: tuple[str, ...] = ()

    @property
    def separated(self) -> int:
        """1: above 0 with its whole interval, -1: below, 0: neither, or without an interval."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Strand:
    """One attack of a gain: what was printed, and ours by protocol (`T0` to `T4`, `worst`), or why it is missing."""

    label: str
    clean: bool
    printed: float | None
    printed_text: str
    ours: Mapping[str, Difference]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class Account:
    """A gain with all its attacks, the trainings behind it and the verdicts on their evaluations.

    Attributes:
        scale: None if nothing was run. runs: the defence's and the baseline's trainings by key.
    """

    gain: Gain
    defence: str
    baseline: str
    scale: Scale | None
    strands: tuple[Strand, ...]
    runs: Mapping[str, RunOutcome]

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols with a column: the four questions of the companion, and others that were measured."""
        measured = {protocol for strand in self.strands for protocol in strand.ours}
        return tuple(protocol for protocol in PROTOCOLS if protocol in ALWAYS_SHOWN or protocol in measured)

    @property
    def measured(self) -> bool:
        """Whether anything was measured."""
        return any(strand.ours for strand in self.strands)


def accounts(paper_name: str, outcomes: Sequence[ItemOutcome]) -> list[Account]:
    """Return an account per gain of a paper and scale; gains in tables of other papers where those have outcomes."""
    found = []
    for gain in gains_of(paper_name):
        own = [outcome for outcome in outcomes if outcome.item == gain.item]
        if own:
            views = (view_of(outcome) for outcome in own)
            found += [account(view, gain) for view in views if {gain.row, gain.baseline} <= {row.key for row in view.item.rows}]
        elif gain.item.partition(".")[0] == paper_name:
            item = next(item for item in get_paper(paper_name).items if item.name == gain.item)
            found.append(account(ItemView(item, None), gain))
    return found


def gains_of(paper_name: str) -> list[Gain]:
    """Return the gains that a paper claims: in its own tables, then in those of others."""
    elsewhere = [gain for paper in papers().values() for gain in paper.gains if gain.claimed_by == paper_name and paper.name != paper_name]
    return [*get_paper(paper_name).gains, *elsewhere]


def account(view: ItemView, gain: Gain) -> Account:
    """Return what is known about a gain."""
    item = view.item
    defence, baseline = item.row(gain.row), item.row(gain.baseline)
    built = [_strand(view, gain, name, columns) for name, columns in _strands(item.columns).items()]
    cells = [cell for key in (gain.row, gain.baseline) for column in item.columns if (cell := view.cell(key, column.key)) is not None]
    runs = {cell.found.run: cell.run for cell in cells if cell.found is not None and cell.run is not None}
    return Account(gain, _name(defence.group, defence.label), _name(baseline.group, baseline.label), view.scale, tuple(built), runs)


def difference(defence: Reading, baseline: Reading) -> Difference | None:
    """Return defence minus baseline; None if either has no number.

    With accuracies per image of the same images (series `ids` and `correct`, shares in [0,1]) images are paired, and what the draws of
    each model leave open is in the interval. Else it is made from the two intervals as if they were independent, by Newcombe's rule
    (square-and-add), which is wider for the same images.

    Reference: Newcombe, "Interval estimation for the difference between independent proportions", Statistics in Medicine 1998, method 10.
    """
    if defence.value is None or baseline.value is None:
        return None
    value = defence.value - baseline.value
    counts = [reading.num_samples for reading in (defence, baseline) if reading.num_samples is not None]
    suspicious = tuple(dict.fromkeys((*defence.failed_checks, *baseline.failed_checks)))
    smaller = min(counts, default=None)
    estimate = paired_by_image(defence, baseline)
    if estimate is not None:
        return Difference(value, 100 * estimate.low, 100 * estimate.high, True, estimate.num_samples, suspicious)
    if defence.low is None or defence.high is None or baseline.low is None or baseline.high is None:
        return Difference(value, None, None, False, smaller, suspicious)
    low = value - math.hypot(defence.value - defence.low, baseline.high - baseline.value)
    high = value + math.hypot(defence.high - defence.value, baseline.value - baseline.low)
    return Difference(value, low, high, False, smaller, suspicious)


def paired_by_image(defence: Reading, baseline: Reading) -> Estimate | None:
    """Return defence minus baseline (shares in [0,1]) from accuracies per image of the same images; None without these."""
    both = _same_images(defence, baseline)
    return None if both is None else paired_difference_of_shares(*both)


def sentences(found: Account) -> list[str]:
    """Return in words what an account says: per attack what remains of the gain, and what it is worth."""
    if found.scale is None or not found.measured:
        return [f"Nothing was measured: {_why_nothing(found)}."]
    said = [sentence for strand in found.strands if (sentence := _strand_sentence(strand, found.scale))]
    return [*said, *_worth(found)]


def _strand_sentence(strand: Strand, scale: Scale) -> str:
    if strand.clean or scale == "smoke":
        return ""
    paper = strand.ours.get("T0")
    honest = [(name, strand.ours[name]) for name in ("T1", "T2", "ARC", "worst") if name in strand.ours]
    if not honest:
        return ""
    parts = []
    for name, gain in honest:
        share = _share(strand, paper, gain, scale)
        words = f"{PROTOCOL_WORDS[name]} " if len(strand.ours) > 1 else ""
        parts.append(f"{words}{signed(gain)}{share}, {_separation(gain)}")
    before = f"{signed(paper)} under the paper's protocol; " if paper is not None else ""
    return f"{strand.label}: {before}{'; '.join(parts)}."


def _share(strand: Strand, paper: Difference | None, gain: Difference, scale: Scale) -> str:
    """Return the share that remains: of the printed gain at paper scale, else of ours under the paper's protocol; of a loss none."""
    if gain.value <= 0:
        return ""
    if scale == "paper" and strand.printed is not None and strand.printed > 0:
        return f" ({100 * gain.value / strand.printed:.0f} % of the printed {strand.printed:+.1f})"
    if paper is not None and paper.separated == 1:
        return f" ({100 * gain.value / paper.value:.0f} % of ours under the paper's protocol, {scale} scale)"
    return ""


def _worth(found: Account) -> Iterable[str]:
    if found.scale == "smoke":
        yield "Smoke scale: the numbers show that everything runs. They allow no conclusion about the defence."
        return
    if found.scale == "small":
        yield "Small scale: what it is worth there; the printed gain belongs to other networks and must not be set against these numbers."
    if found.scale == "short":
        yield "Short scale: a first impression; the printed gain belongs to full training and must not be set against these numbers."
    differences = [gain for strand in found.strands for gain in strand.ours.values()]
    if any(not gain.paired and gain.low is not None for gain in differences):
        yield "Intervals are made from those of the two numbers as if independent; paired by image they would be narrower."
    if any(gain.paired for gain in differences):
        yield "Intervals are paired by image; what the draws of each model leave open is in them."
    suspicious = sorted({key for gain in differences for key in gain.suspicious}, key=lambda key: (len(key), key))
    if suspicious:
        yield f"Failed checks: {', '.join(suspicious)}. Gains that rest on them must not be believed."
    elif elsewhere := _failed_elsewhere(found):
        yield f"No check failed behind these numbers; in other evaluations of the same trainings: {', '.join(elsewhere)}."
    else:
        yield "No check failed in the evaluations of these trainings."
    yield "One training each: how much another seed changes is not in the intervals, so a difference is not yet a ranking."


def _failed_elsewhere(found: Account) -> list[str]:
    failed = [
        f"{check.key} ({suite})"
        for run in found.runs.values()
        for suite, checks in run.checks.items()
        for check in checks
        if check.verdict == "FAIL"
    ]
    return list(dict.fromkeys(failed))


def signed(gain: Difference) -> str:
    """Return a difference as `+14.2 [+10.1, +18.3] (!)`."""
    interval = f" [{gain.low:+.1f}, {gain.high:+.1f}]" if gain.low is not None and gain.high is not None else ""
    return f"{gain.value:+.1f}{interval}{' (!)' if gain.suspicious else ''}"


def _strand(view: ItemView, gain: Gain, name: str, columns: Sequence[Column]) -> Strand:
    ours: dict[str, Difference] = {}
    missing: dict[str, str] = {}
    printed, printed_text = None, ""
    for column in columns:
        defence, baseline = view.cell(gain.row, column.key), view.cell(gain.baseline, column.key)
        if defence is None or baseline is None:
            continue
        if defence.cell.published is not None and baseline.cell.published is not None:
            printed = defence.cell.published.value - baseline.cell.published.value
            printed_text = f"{defence.printed} against {baseline.printed}"
        if _is_arc(column):
            # A deterministic baseline has no draws to walk through; its worst attack is what is known of it.
            worst = next((view.cell(gain.baseline, each.key) for each in columns if isinstance(each.measure, WorstCase)), None)
            against = baseline if baseline.paper is not None or worst is None else worst
            _take(ours, missing, "ARC", defence.paper, against.paper, defence.reason or against.reason)
            continue
        # A number that is the same under every protocol stands under the paper's.
        protocol = column.measure.protocol or "T0"
        _take(ours, missing, protocol, defence.paper, baseline.paper, defence.reason or baseline.reason)
        counterpart = column.measure.honest
        if defence.has_counterpart and counterpart is not None:
            reason = defence.honest_reason or baseline.honest_reason
            _take(ours, missing, counterpart.protocol, defence.honest, baseline.honest, reason)
    return Strand(name, isinstance(columns[0].measure, Clean), printed, printed_text, ours, missing)


def _take(
    ours: dict[str, Difference], missing: dict[str, str], protocol: str, defence: Reading | None, baseline: Reading | None, reason: str
) -> None:
    found = difference(defence, baseline) if defence is not None and baseline is not None else None
    if found is not None:
        ours[protocol] = found
    else:
        missing[protocol] = reason or NOT_RUN


def _same_images(defence: Reading, baseline: Reading) -> tuple[MeasuredShares, MeasuredShares] | None:
    if "correct" not in defence.series or "correct" not in baseline.series:
        return None
    if list(defence.series.get("ids", [])) != list(baseline.series.get("ids", [])) or not defence.series.get("ids"):
        return None
    return _measured(defence), _measured(baseline)


def _measured(reading: Reading) -> MeasuredShares:
    shares_S = list(reading.series["correct"])
    mean = sum(shares_S) / len(shares_S)
    low, high = (mean if end is None else end / 100 for end in (reading.low, reading.high))
    return MeasuredShares(shares_S, reading.num_draws or 1, low, high)


def _strands(columns: Sequence[Column]) -> dict[str, list[Column]]:
    """Return the columns by attack, by its name: columns that differ in protocol alone are one attack. ARC stands beside the worst."""
    by_attack: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        measure = column.measure
        if isinstance(measure, Accuracy | WorstCase | Clean):
            by_attack.setdefault((column.group, _attack_name(column)), []).append(column)
    several = len({group for group, _ in by_attack}) > 1
    named = {}
    for (group, attack), found in by_attack.items():
        alike = sorted(found, key=_is_arc)
        label = attack.replace("_", " ") if len(alike) > 1 else alike[0].label
        named[_name(group if several else "", label)] = alike
    return named


def _attack_name(column: Column) -> str:
    if isinstance(column.measure, WorstCase) or _is_arc(column):
        return "worst attack"
    return column.measure.row_name if isinstance(column.measure, Accuracy) else column.key


def _is_arc(column: Column) -> bool:
    return isinstance(column.measure, Accuracy) and column.measure.item.attack == "arc"


def _separation(gain: Difference) -> str:
    if gain.suspicious:
        return "not to be believed"
    if gain.low is None:
        return "without an interval"
    return {1: "above 0", -1: "below 0: the baseline is better", 0: "not separable from 0"}[gain.separated]


def _why_nothing(found: Account) -> str:
    if found.scale is None:
        return NOT_RUN
    reasons = list(dict.fromkeys(reason for strand in found.strands for reason in strand.missing.values()))
    return "; ".join(reasons[:3]) or NOT_RUN


def _name(group: str, label: str) -> str:
    return ", ".join(filter(None, (group, label)))
