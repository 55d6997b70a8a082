"""What the pages show, as plain records for the templates: tables with all their numbers, figures, trainings, companions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from analysis.reporting import tables
from analysis.reporting.figure_style import figure_as_png
from analysis.reproduction import companion
from analysis.reproduction.outcome import ItemOutcome, RunOutcome
from analysis.reproduction.papers.model import Item
from analysis.reproduction.scale import SCALE_MARKS, Scale
from analysis.reproduction.sheet import SAME, Entries, Entry, Footnotes, Sheet, SheetLine, column_kinds
from analysis.reproduction.view import NOT_RUN, ItemView, Kind


@dataclass(frozen=True)
class HtmlCell:
    """One number as a template writes it: `css` classes, `mark` of its scale, `below` in small print, `tooltip` with everything."""

    css: str
    number: str = ""
    mark: str = ""
    below: str = ""
    tooltip: str = ""
    footnote: str = ""
    badge: str = ""


def html_table(sheet: Sheet) -> dict[str, Any]:
    """Return the table of an item: under each column the printed number, ours and the honest one, as far as it has them.

    Its heads have three rows: groups of columns, columns, and whose number it is (label, tooltip, css class, footnote).
    """
    was_run, footnotes = sheet.view.outcome is not None, Footnotes()
    # Of an item that was not run, lines and columns in which nothing is printed are empty.
    shown = sheet.lines if was_run else tuple(line for line in sheet.lines if any(map(_is_printed, line.cells)))
    places = [place for place in range(len(sheet.heads)) if was_run or any(_is_printed(line.cells[place]) for line in shown)]
    kinds = {place: column_kinds((line.cells[place] for line in shown), was_run) for place in places}
    lines, before = [], ""
    for line in shown:
        cells = [_html_cell(line.cells[place].get(kind), footnotes) for place in places for kind in kinds[place]]
        begins = line.group if line.group != before else ""
        lines.append({"begins": begins, "label": line.label, "remark": line.remark, "cells": cells})
        before = line.group
    kind_heads = [_kind_head(shown, place, kind, footnotes) for place in places for kind in kinds[place]]
    heads = [sheet.heads[place] for place in places]
    widths = [len(kinds[place]) for place in places]
    spans = itertools.groupby(zip(heads, widths, strict=True), key=lambda span: span[0].group)
    return {
        "corner": sheet.corner,
        "groups": [(group, sum(width for _, width in span)) for group, span in spans] if any(head.group for head in heads) else [],
        "heads": [(head.title, width) for head, width in zip(heads, widths, strict=True)],
        "kinds": kind_heads,
        "lines": lines,
        "footnotes": footnotes.listed,
        "width": len(kind_heads),
    }


def _is_printed(entries: Entries) -> bool:
    return bool(entries) and bool(entries["printed"].number)


def item_page(sheet: Sheet, drawn: Mapping[str, Figure]) -> dict[str, Any]:
    """Return everything that is shown of an item; `drawn`: its figures."""
    view = sheet.view
    item = view.item
    return {
        "name": item.name,
        "anchor": anchor(item, view.scale),
        "title": item.title,
        "kind": item.kind,
        "scale": view.scale or "",
        "status": status(view),
        "nothing_to_run": item.nothing_to_run,
        "caption": item.figure.caption if item.figure is not None else "",
        "figures": [{"name": name, "png": figure_as_png(figure)} for name, figure in drawn.items()],
        "table": html_table(sheet) if view.outcome is not None or item.published else None,
        "legend": sheet.legend if item.rows else [],
        "how": sheet.how,
        "planned": _planned(item) if view.outcome is None else [],
        "notes": sheet.contradictions,
        "trainings": _links(view),
    }


def anchor(item: Item, scale: Scale | None) -> str:
    """Return the name of an item's place on a page."""
    return item.name.replace(".", "-") + (f"-{scale}" if scale is not None else "")


def status(view: ItemView) -> str:
    """Return in a few words how far an item is."""
    done = view.progress
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
            page["counts"] |= run.verdict_counts
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
                "counts": run.verdict_counts,
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


def _kind_head(lines: Sequence[SheetLine], place: int, kind: Kind, footnotes: Footnotes) -> tuple[str, str, str, str]:
    if kind == "printed":
        return "printed", "as the paper prints it", kind, ""
    measures = [entries["paper"].cell.cell.column.measure for line in lines if "paper" in (entries := line.cells[place])]
    if not measures:
        return "ours", "ours", kind, ""
    if kind == "honest":
        (counterpart, *_) = [each.honest for each in measures if each.honest is not None and each.honest != each]
        return f"honest {counterpart.protocol}".strip(), f"ours under the honest protocol: {counterpart.words}", kind, ""
    # The last one: where steps or radii are lines, the first is clean images.
    measure = measures[-1]
    label = "ours" if measure.protocol == "worst" else f"ours {measure.protocol}".strip()
    missing = f"no honest number: {measure.why_no_honest}" if measure.why_no_honest else ""
    return label, f"ours: {measure.words}", kind, footnotes.letter(missing)


def _html_cell(entry: Entry | None, footnotes: Footnotes) -> HtmlCell:
    if entry is None:
        return HtmlCell("none")
    if entry.kind == "printed":
        return HtmlCell("printed", entry.number, tooltip=_notes(entry))
    if entry.number == SAME:
        return HtmlCell("same", SAME, tooltip="the same number under every protocol")
    if entry.reading is not None:
        below = " ".join(filter(None, (f"[{entry.interval}]" if entry.interval else "", entry.samples)))
        number = entry.number + (f" {tables.MARK}" if entry.failed_checks else "")
        return HtmlCell(_css(entry), number, entry.scale_mark, below, _tooltip(entry), badge=_badge(entry))
    if not entry.reason:
        return HtmlCell("none")
    return HtmlCell("empty", tables.MISSING, tooltip=entry.reason, footnote=footnotes.letter(entry.reason))


def _notes(entry: Entry) -> str:
    notes = entry.cell.cell.notes
    return f"contradictions: {', '.join(note.key for note in notes)}" if notes else ""


def _css(entry: Entry) -> str:
    verdict = "" if entry.agreement is None else "agrees" if entry.agreement.agrees else "differs"
    return " ".join(filter(None, ("ours", entry.kind, entry.scale, "failed" if entry.failed_checks else "", verdict)))


def _badge(entry: Entry) -> str:
    return f"{entry.verdict} {entry.agreement.difference:+.2f}" if entry.agreement is not None else ""


def _tooltip(entry: Entry) -> str:
    reading, run, titles = entry.reading, entry.cell.run, entry.cell.check_titles
    if reading is None:
        return ""
    failed = "; ".join(f"{key} {titles.get(key, '')}".strip() for key in reading.failed_checks)
    said = (
        reading.how,
        f"protocol {reading.protocol}" if reading.protocol else "",
        f"95 % interval [{entry.interval}]" if entry.interval else "no interval",
        f"n = {reading.num_samples}" if reading.num_samples is not None else "",
        f"draws = {reading.num_draws}" if reading.num_draws is not None else "",
        f"{entry.scale} scale",
        f"FAILED CHECKS: {failed}" if failed else "",
        f"training {run.fingerprint}" if run is not None else "",
        _notes(entry),
    )
    return "\n".join(filter(None, said))
