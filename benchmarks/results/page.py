"""The generated parts of docs/results.md: per table what is measured, accuracies, gains over AT, cost, convergence, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from analysis.reporting.mark import MARK
from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers import get_item
from benchmarks.results.gains import BASELINE, Gain, gains
from benchmarks.results.picture import SEED
from benchmarks.results.records import FILES, SCALE, Record, number

BEGIN, END = "<!-- begin: {} (python -m benchmarks.results page) -->\n", "<!-- end: {} -->\n"
SUITE = "standard"
ACCURACIES = {
    "clean": "clean",
    "paper": "T0: paper",
    "unknown": "T1: unknown draw",
    "known": "T2: known draw",
    "arc": "ARC",
    "worst": "worst attack (T1)",
}
"""Columns of the tables, with the words above them."""
GAINS = ("clean", "paper", "unknown", "known", "worst")


def filled(page: str, tables: Mapping[str, Sequence[Record]]) -> str:
    """Return the page with its generated parts renewed.

    Raises:
        ValueError: the page lacks the marks of a part.
    """
    for item in FILES:
        begin, end = BEGIN.format(item), END.format(item)
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page must have the marks of {item} once: {begin.strip()} {end.strip()}")
        before, _, rest = page.partition(begin)
        page = before + begin + part(item, tables[item]) + end + rest.partition(end)[2]
    return page


def part(item: str, records: Sequence[Record]) -> str:
    """Return the generated part of a table."""
    first = [record for record in records if record.seed == SEED]
    rows = get_item(item).at(SCALE).rows
    missing = [row.key for row in rows if row.key not in {record.row for record in first}]
    said = [f"{len(first)} of {len(rows)} rows are measured with seed {SEED}."]
    if missing:
        said.append(f"Missing: `rayndom reproduce {item} --scale {SCALE} --rows {','.join(missing)}`.")
    parts = [" ".join(said)]
    if first:
        parts += [
            "Accuracy in percent with 95 % intervals:",
            _accuracies(item, first),
            *_gains(item, first),
            "Cost; *epoch*: median seconds of training, *x AT*: ratio to adversarial training, on cores that were shared with other work:",
            _costs(item, first),
            "Training: loss and robust accuracy on validation images, epoch by epoch:",
            _curves(item, first),
        ]
    if others := [record for record in records if record.seed != SEED]:
        parts += ["Other seeds:", _accuracies(item, others, seeds=True)]
    return "\n\n".join(parts) + "\n"


def share(reading: Reading | None) -> str:
    """Return an accuracy as `82.4 [79.1, 85.2]`, marked where a check failed; a dash where there is none."""
    if reading is None or reading.value is None:
        return "–"
    interval = f" [{reading.low:.1f}, {reading.high:.1f}]" if reading.low is not None and reading.high is not None else ""
    return f"{reading.value:.1f}{interval}{f' {MARK}' if reading.failed_checks else ''}"


def points(gain: Gain | None) -> str:
    """Return a gain as `+1.2 [-0.4, +2.9]`, in points."""
    if gain is None:
        return "–"
    found = gain.difference
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def _accuracies(item: str, records: Sequence[Record], seeds: bool = False) -> str:
    heads = ["", *(["seed"] if seeds else []), *ACCURACIES.values(), "checks"]
    lines = (
        [
            _label(item, record),
            *([str(record.seed)] if seeds else []),
            *(share(number(record, column)) for column in ACCURACIES),
            _checks(record),
        ]
        for record in records
    )
    return _table(heads, lines)


def _checks(record: Record) -> str:
    found = record.outcome.runs[record.row].checks.get(SUITE, ())
    passed = sum(check.verdict == "PASS" for check in found)
    said = [f"{passed} passed"]
    for verdict, word in (("WARN", "warned"), ("FAIL", "failed")):
        if keys := [check.key for check in found if check.verdict == verdict]:
            said.append(f"{', '.join(keys)} {word}")
    return "; ".join(said)


def _gains(item: str, records: Sequence[Record]) -> list[str]:
    """Return the gains with what stands above them; nothing where no row has one yet."""
    found = {column: gains(records, column) for column in GAINS}
    lines = []
    for record in records:
        worst = found["worst"].get(record.row)
        if worst is not None:
            cells = [points(found[column].get(record.row)) for column in GAINS]
            lines.append([_label(item, record), *cells, f"{worst.adjusted:.2g}", worst.answer])
    heads = ["", *(ACCURACIES[column] for column in GAINS), "p", "answer"]
    above = "Gain over adversarial training in points, paired image by image; *p* (of the worst attack) is Holm's over the rows:"
    return [above, _table(heads, lines)] if lines else []


def _costs(item: str, records: Sequence[Record]) -> str:
    baseline = next((record for record in records if record.row == BASELINE), None)
    lines = []
    for record in records:
        run = record.outcome.runs[record.row]
        cells = []
        for column, digits in (("epoch", 1), ("latency", 4)):
            own, other = (number(each, column) if each is not None else None for each in (record, baseline))
            value = own.value if own is not None else None
            ratio = f"{value / other.value:.2f}" if value is not None and other is not None and other.value else "–"
            cells += ["–" if value is None else f"{value:.{digits}f} s", ratio]
        parameters = number(record, "parameters")
        code = run.environment.get("code", {})
        commit = f"`{str(code.get('commit'))[:8]}`{'+' if code.get('dirty') else ''}"
        seconds = sum(run.evaluation_seconds.values())
        cpu = run.environment.get("hardware", {}).get("cpu", "")
        counted = "–" if parameters is None or parameters.value is None else f"{parameters.value:,.0f}"
        lines.append(
            [_label(item, record), *cells, counted, f"{run.seconds or 0:.0f} s", f"{seconds:.0f} s", commit, f"`{run.fingerprint}`", cpu]
        )
    heads = ["", "epoch", "x AT", "latency", "x AT", "parameters", "training", "evaluation", "commit", "fingerprint", "processor"]
    return _table(heads, lines)


def _curves(item: str, records: Sequence[Record]) -> str:
    def joined(values: Sequence[float | None], factor: float, digits: int) -> str:
        return " ".join("–" if value is None else f"{factor * value:.{digits}f}" for value in values)

    lines = (
        [
            _label(item, record),
            joined(record.curve["train/loss"], 1, 2),
            joined(record.curve["validation/robust_accuracy"], 100, 0),
        ]
        for record in records
    )
    return _table(["", "loss", "robust on validation, %"], lines)


def _label(item: str, record: Record) -> str:
    return f"{get_item(item).row(record.row).label} (`{record.row}`)"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))
