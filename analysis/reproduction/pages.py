"""What the pages show, as plain records for the templates: tables with all their numbers, figures, trainings, companions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from analysis.reporting import tables
from analysis.reporting.figures import figure_as_png
from analysis.reproduction import companion
from analysis.reproduction.cells import CellView, ItemView, progress
from analysis.reproduction.figures.style import style
from analysis.reproduction.formats import (
    NOT_RUN,
    SAME,
    SCALE_MARKS,
    describe_series,
    format_interval,
    format_value,
    protocol_of,
    what_is_measured,
    without_honest,
)
from analysis.reproduction.layout import Layout, layout
from analysis.reproduction.outcome import ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers.model import Item
from analysis.reproduction.scale import Scale
from analysis.reproduction.sheet import AGREES, DIFFERS, Footnotes, Kind, check_titles, legend, usual_samples
from analysis.reproduction.tables import contradictions, how_measured


@dataclass(frozen=True)
class HtmlCell:
    """One number of a table: `css` classes, `number`, `mark` of its scale, `below` in small print, `tooltip` with everything."""

    css: str
    number: str = ""
    mark: str = ""
    below: str = ""
    tooltip: str = ""
    footnote: str = ""
    badge: str = ""


@dataclass(frozen=True)
class HtmlLine:
    """One row: `begins`: name of the group that begins here, or empty."""

    begins: str
    label: str
    remark: str
    cells: tuple[HtmlCell, ...]


@dataclass(frozen=True)
class HtmlTable:
    """A table with three rows of heads: groups of columns, columns, and whose number it is (label, tooltip, css class, footnote)."""

    corner: str
    groups: tuple[tuple[str, int], ...]
    heads: tuple[tuple[str, int], ...]
    kinds: tuple[tuple[str, str, str, str], ...]
    lines: tuple[HtmlLine, ...]
    footnotes: tuple[tuple[str, str], ...]

    @property
    def width(self) -> int:
        """Columns beside the labels."""
        return len(self.kinds)


def html_table(view: ItemView) -> HtmlTable:
    """Return the table of an item: under each column the printed number, ours and the honest one, as far as it has them."""
    arranged, footnotes = layout(view) if view.outcome is not None else _printed_part(layout(view)), Footnotes()
    kinds = [_kinds(view, [line.cells[place] for line in arranged.lines]) for place in range(len(arranged.heads))]
    usual = {kind: usual_samples(view, kind) for kind in ("paper", "honest")}
    lines, before = [], ""
    for line in arranged.lines:
        cells = [
            _html_cell(cell, kind, usual.get(kind), footnotes) for cell, present in zip(line.cells, kinds, strict=True) for kind in present
        ]
        lines.append(HtmlLine(line.group if line.group != before else "", line.label, line.remark, tuple(cells)))
        before = line.group
    return HtmlTable(
        arranged.corner,
        _spans([(head.group, len(present)) for head, present in zip(arranged.heads, kinds, strict=True)]),
        tuple((head.title, len(present)) for head, present in zip(arranged.heads, kinds, strict=True)),
        tuple(_kind_head(arranged, place, kind, footnotes) for place, present in enumerate(kinds) for kind in present),
        tuple(lines),
        footnotes.listed,
    )


def _printed_part(whole: Layout) -> Layout:
    """Return the lines and columns in which something is printed: of an item that was not run, the rest is empty."""
    places = [place for place in range(len(whole.heads)) if any(_is_printed(line.cells[place]) for line in whole.lines)]
    lines = [replace(line, cells=tuple(line.cells[place] for place in places)) for line in whole.lines if any(map(_is_printed, line.cells))]
    return Layout(tuple(whole.heads[place] for place in places), tuple(lines), whole.corner)


def _is_printed(cell: CellView | None) -> bool:
    return cell is not None and bool(cell.printed)


def item_page(view: ItemView, drawn: Mapping[str, Figure]) -> dict[str, Any]:
    """Return everything that is shown of an item; `drawn`: its figures."""
    item, done = view.item, progress(view)
    with style():
        figures = [{"name": name, "png": figure_as_png(figure)} for name, figure in drawn.items()]
    return {
        "name": item.name,
        "anchor": anchor(item, view.scale),
        "title": item.title,
        "kind": item.kind,
        "scale": view.scale or "",
        "status": status(view),
        "progress": done,
        "nothing_to_run": item.nothing_to_run,
        "caption": item.figure.caption if item.figure is not None else "",
        "figures": figures,
        "table": html_table(view) if view.outcome is not None or item.published else None,
        "legend": list(legend(view)) if item.rows else [],
        "how": how_measured(view),
        "planned": _planned(item) if view.outcome is None else [],
        "notes": contradictions(view),
        "trainings": _links(view),
    }


def anchor(item: Item, scale: Scale | None) -> str:
    """Return the name of an item's place on a page."""
    return item.name.replace(".", "-") + (f"-{scale}" if scale is not None else "")


def status(view: ItemView) -> str:
    """Return in a few words how far an item is."""
    done = progress(view)
    if view.item.nothing_to_run:
        return "nothing to run"
    if view.outcome is None:
        return NOT_RUN
    parts = [f"{done.measured} of {done.wanted} cells"] if done.wanted else ["no cell can have a number"]
    if done.judged:
        parts.append(f"{done.agreeing} of {done.judged} agree")
    if done.suspicious:
        parts.append(f"{done.suspicious} with a failed check")
    return ", ".join(parts)


def run_pages(outcomes: Sequence[ItemOutcome]) -> list[dict[str, Any]]:
    """Return the trainings of outcomes, each once: what it is, where it is used, its origin, its verdicts and its configuration."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for outcome in outcomes:
        for key, run in outcome.runs.items():
            page = merged.setdefault((outcome.scale, run.fingerprint), _run_page(run, outcome.scale))
            page["used"].append(f"{outcome.item}: {key}")
            page["checks"] |= {suite: list(checks) for suite, checks in run.checks.items()}
            page["conclusion"] |= dict(run.conclusion)
            page["counts"] |= companion.verdict_counts(run)
    return list(merged.values())


def companion_pages(paper_name: str, outcomes: Sequence[ItemOutcome]) -> dict[str, Any]:
    """Return the companion of a paper: an account per gain, those without any measurement in short."""
    found = companion.accounts(paper_name, outcomes)
    measured = [_account_page(each) for each in found if each.measured]
    waiting = []
    for each in found:
        if not each.measured:
            printed = [f"{strand.label} {strand.printed:+.1f}" for strand in each.strands if strand.printed is not None]
            waiting.append({"title": _account_title(each), "printed": ", ".join(printed), "why": companion.sentences(each)[0]})
    return {"measured": measured, "waiting": waiting}


def _account_page(found: companion.Account) -> dict[str, Any]:
    scale: Scale = found.scale or "smoke"
    lines = []
    for strand in found.strands:
        cells = []
        for protocol in found.protocols:
            gain = strand.ours.get(protocol)
            if gain is not None:
                how = "paired by image" if gain.paired else "from the two intervals, as if independent"
                failed = f"; failed checks: {', '.join(gain.suspicious)}" if gain.suspicious else ""
                css = f"ours {scale}" + (" failed" if gain.suspicious else "")
                tooltip = f"{companion.PROTOCOL_WORDS[protocol]}; n = {gain.num_samples}; {scale} scale; interval {how}{failed}"
                interval = f"[{gain.low:+.1f}, {gain.high:+.1f}]" if gain.low is not None and gain.high is not None else ""
                number = f"{gain.value:+.1f}" + (f" {tables.MARK}" if gain.suspicious else "")
                cells.append(HtmlCell(css, number, SCALE_MARKS[scale], interval, tooltip))
            elif strand.clean and protocol != "T0":
                cells.append(HtmlCell("same", SAME, tooltip="clean accuracy is the same under every protocol"))
            else:
                cells.append(HtmlCell("empty", tables.MISSING, tooltip=strand.missing.get(protocol, "not measured in this table")))
        lines.append(
            {
                "label": strand.label,
                "printed": f"{strand.printed:+.2f}" if strand.printed is not None else "",
                "printed_text": strand.printed_text,
                "cells": cells,
            }
        )
    return {
        "title": _account_title(found),
        "scale": scale,
        "protocols": [companion.PROTOCOL_WORDS[protocol] for protocol in found.protocols],
        "lines": lines,
        "sentences": companion.sentences(found),
        "verdicts": [
            {
                "key": key,
                "fingerprint": run.fingerprint,
                "anchor": run_anchor(run.fingerprint, scale),
                "counts": companion.verdict_counts(run),
                "conclusion": dict(run.conclusion),
            }
            for key, run in found.runs.items()
        ],
    }


def _account_title(found: companion.Account) -> str:
    return f"{found.defence} over {found.baseline} ({found.gain.item})"


def _run_page(run: RunOutcome, scale: Scale) -> dict[str, Any]:
    return {
        "name": run.fingerprint,
        "anchor": run_anchor(run.fingerprint, scale),
        "scale": scale,
        "recipe": run.recipe,
        "overrides": list(run.overrides),
        "state": run.state,
        "epochs": run.epochs,
        "seconds": run.seconds,
        "mlflow_run": run.mlflow_run,
        "origin": list(_origin(run)),
        "used": [],
        "checks": {},
        "conclusion": {},
        "counts": {},
        "configuration": {key: str(value) for key, value in run.configuration.items()},
    }


def _origin(run: RunOutcome) -> Iterable[tuple[str, str]]:
    """Return commit, hardware and packages as recorded, flat; what was not recorded is not shown."""
    for key, value in run.environment.items():
        if key == "packages":
            yield key, ", ".join(f"{name} {version}" for name, version in value.items())
        else:
            yield from _flat(key, value)


def _flat(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for place, entry in enumerate(value):
            yield from _flat(f"{name}.{place}", entry)
    elif isinstance(value, list):
        yield from [(name, ", ".join(map(str, value)))] if value else []
    elif value not in (None, ""):
        yield name, str(value)


def _links(view: ItemView) -> list[dict[str, str]]:
    """Return, per training of an item, its key, state, fingerprint and place on the page."""
    if view.outcome is None:
        return []
    return [
        {"key": key, "state": run.state, "fingerprint": run.fingerprint, "anchor": run_anchor(run.fingerprint, view.outcome.scale)}
        for key, run in view.outcome.runs.items()
    ]


def run_anchor(fingerprint: str, scale: Scale) -> str:
    """Return the name of a training's place on a page."""
    return f"run-{fingerprint}-{scale}"


def _planned(item: Item) -> list[str]:
    """Return what would be trained for an item that was not run."""
    found: dict[str, None] = {}
    for row in item.rows:
        name = " ".join(filter(None, (row.group, row.label)))
        for run in (row.run, *row.runs.values()):
            if run is not None:
                found.setdefault(f"{name}: {' '.join((run.recipe, *(f'--{override}' for override in run.overrides)))}")
    return list(found)


def _kinds(view: ItemView, cells: Sequence[CellView | None]) -> tuple[Kind, ...]:
    present = [cell for cell in cells if cell is not None]
    kinds: list[Kind] = ["printed"] if any(cell.printed for cell in present) else []
    if view.outcome is not None and any(not cell.quoted for cell in present):
        kinds.append("paper")
        if any(cell.has_counterpart and not cell.quoted for cell in present):
            kinds.append("honest")
    return tuple(kinds) or ("paper",)


def _kind_head(arranged: Layout, place: int, kind: Kind, footnotes: Footnotes) -> tuple[str, str, str, str]:
    cells = [cell for line in arranged.lines if (cell := line.cells[place]) is not None]
    measures = [cell.cell.column.measure for cell in cells if not cell.quoted]
    if kind == "printed":
        return "printed", "as the paper prints it", kind, ""
    if not measures:
        return "ours", "ours", kind, ""
    if kind == "honest":
        (counterpart, *_) = [each.honest for each in measures if each.honest is not None and each.honest != each]
        name = protocol_of(counterpart)
        return f"honest {name}".strip(), f"ours under the honest protocol: {what_is_measured(counterpart)}", kind, ""
    # The last one: where steps or radii are lines, the first is clean images.
    name, missing = protocol_of(measures[-1]), without_honest(measures[-1])
    label = "ours" if name == "worst" else f"ours {name}".strip()
    return label, f"ours: {what_is_measured(measures[-1])}", kind, footnotes.letter(f"no honest number: {missing}") if missing else ""


def _html_cell(cell: CellView | None, kind: Kind, usual: int | None, footnotes: Footnotes) -> HtmlCell:
    if cell is None:
        return HtmlCell("none")
    notes = f"contradictions: {', '.join(note.key for note in cell.cell.notes)}" if cell.cell.notes else ""
    if kind == "printed":
        return HtmlCell("printed", cell.printed, tooltip=notes)
    if cell.quoted:
        return HtmlCell("none")
    if kind == "honest" and cell.same and cell.paper is not None:
        return HtmlCell("same", SAME, tooltip="the same number under every protocol")
    reading, reason = (cell.paper, cell.reason) if kind == "paper" else (cell.honest, cell.honest_reason)
    if reading is None:
        if kind == "honest" and not cell.has_counterpart and cell.same:
            return HtmlCell("none")
        return HtmlCell("empty", tables.MISSING, tooltip=reason, footnote=footnotes.letter(reason) if reason else "")
    return _number(cell, kind, reading, usual, notes)


def _number(cell: CellView, kind: Kind, reading: Reading, usual: int | None, notes: str) -> HtmlCell:
    scale: Scale = cell.scale or "smoke"
    number = format_value(reading.value, cell.unit, scale) if reading.value is not None else describe_series(reading.series)
    agreement = cell.agreement if kind == "paper" else None
    css = f"ours {kind} {scale}" + (" failed" if reading.failed_checks else "")
    badge = ""
    if agreement is not None:
        css += " agrees" if agreement.agrees else " differs"
        badge = f"{AGREES if agreement.agrees else DIFFERS} {agreement.difference:+.2f}"
    interval = format_interval(reading, cell.unit, scale)
    below = " ".join(
        filter(
            None,
            (
                f"[{interval}]" if interval else "",
                f"n={reading.num_samples}" if reading.num_samples is not None and reading.num_samples != usual else "",
            ),
        )
    )
    titles = check_titles(cell)
    failed = "; ".join(f"{key} {titles.get(key, '')}".strip() for key in reading.failed_checks)
    tooltip = [
        reading.how,
        f"protocol {reading.protocol}" if reading.protocol else "",
        f"95 % interval [{interval}]" if interval else "no interval",
        f"n = {reading.num_samples}" if reading.num_samples is not None else "",
        f"draws = {reading.num_draws}" if reading.num_draws is not None else "",
        f"{scale} scale",
        f"FAILED CHECKS: {failed}" if failed else "",
        f"training {cell.run.fingerprint}" if cell.run is not None else "",
        notes,
    ]
    shown = (number or tables.MISSING) + (f" {tables.MARK}" if reading.failed_checks else "")
    return HtmlCell(css, shown, SCALE_MARKS[scale], below, "\n".join(filter(None, tooltip)), badge=badge)


def _spans(widths: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    if not any(group for group, _ in widths):
        return ()
    spans: list[tuple[str, int]] = []
    for group, width in widths:
        if spans and spans[-1][0] == group:
            spans[-1] = (group, spans[-1][1] + width)
        else:
            spans.append((group, width))
    return tuple(spans)
