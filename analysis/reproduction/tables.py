"""Tables of an item for the terminal, as Markdown, as LaTeX with booktabs rules, and as tidy CSV."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from analysis.reporting import tables
from analysis.reporting.latex import escape
from analysis.reproduction.cells import CellView, ItemView, view_of
from analysis.reproduction.formats import describe_series
from analysis.reproduction.outcome import ItemOutcome, Reading
from analysis.reproduction.papers import get_paper
from analysis.reproduction.sheet import Entry, Sheet, SheetLine, sheet_of

_MOST_WAYS = 4
_MOST_NAMES = 8
_INLINE_COLUMNS, _MANY_COLUMNS, _MANY_LINES = 4, 8, 30
_HEAD_WIDTH = 14


def terminal_rows(outcome: ItemOutcome) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for the terminal: a line per row and kind of number; an interval stands below its number."""
    sheet = sheet_of(view_of(outcome))
    header = [*_corner(sheet), "number", *(_head(head.group, head.title, "\n") for head in sheet.layout.heads)]
    return header, [[*_labels(sheet, line), line.title, *(_plain(entry, "\n") for entry in line.entries)] for line in sheet.lines]


def footnotes(outcome: ItemOutcome) -> list[str]:
    """Return what stands below the table in the terminal: the scale, why cells are empty, what must not be believed."""
    sheet = sheet_of(view_of(outcome))
    return [*sheet.legend, *(f"{letter}: {text}" for letter, text in sheet.footnotes)]


def to_markdown(view: ItemView, figure_files: tuple[str, ...] = ()) -> str:
    """Return an item as a Markdown page: title, scale, figures, table, footnotes, how it was measured, contradictions, trainings."""
    sheet = sheet_of(view)
    item = view.item
    lines = [f"# {item.name}: {item.title}", ""]
    lines += [f"**{sentence}**" if place == 0 else sentence for place, sentence in enumerate(sheet.legend)]
    lines += ["", *(f"![{item.name}]({name})" for name in figure_files)]
    if item.nothing_to_run:
        lines.append(f"Nothing to run: {item.nothing_to_run}.")
    if sheet.lines:
        names = [*_corner(sheet), "number", *(_head(head.group, head.title, ": ") for head in sheet.layout.heads)]
        # Heads may repeat; keys of a frame may not.
        keys = [str(place) for place in range(len(names))]
        frame = [
            dict(zip(keys, [*_labels(sheet, line), line.title, *(_plain(entry, " ") for entry in line.entries)], strict=True))
            for line in sheet.lines
        ]
        lines += ["", tables.to_markdown(frame, keys, titles=dict(zip(keys, names, strict=True))).rstrip()]
    lines += ["", *(f"- {letter}: {text}" for letter, text in sheet.footnotes)]
    lines += _section("How it was measured", how_measured(view))
    lines += _section("Contradictions of the paper", contradictions(view))
    lines += _section("Trainings", trainings(view))
    return "\n".join(_without_double_blanks(lines)) + "\n"


def to_latex(view: ItemView) -> str:
    """Return an item as a LaTeX table (packages: booktabs, amssymb, graphicx).

    With many columns intervals are lines of their own; a table that is still too wide for the page is shrunk to it.
    """
    sheet = sheet_of(view)
    item, heads = view.item, sheet.layout.heads
    inline = len(heads) <= _INLINE_COLUMNS
    large = len(heads) > _MANY_COLUMNS or len(sheet.lines) > _MANY_LINES
    size = r"\scriptsize\setlength{\tabcolsep}{2pt}" if large else r"\footnotesize\setlength{\tabcolsep}{3pt}"
    caption = f"{item.title} ({item.name}). {' '.join(sheet.legend)}"
    lines = [f"% {line}" for line in how_measured(view)]
    lines += [r"\begin{table*}[tp]", rf"\centering{size}", rf"\caption{{{escape(caption)}}}", rf"\label{{{item.name}}}"]
    lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [rf"\begin{{tabular}}{{ll{'r' * len(heads)}}}", r"\toprule", *_latex_heads(sheet)]
    group = ""
    for place, line in enumerate(sheet.lines):
        if line.first and place:
            lines.append(r"\addlinespace")
        if line.first and line.group and line.group != group:
            group = line.group
            lines.append(rf"\multicolumn{{{2 + len(heads)}}}{{l}}{{\textit{{{escape(group)}}}}} \\")
        intervals = [rf"{{\scriptsize [{escape(entry.interval)}]}}" if entry.interval else "" for entry in line.entries]
        numbers = [_latex_number(entry) for entry in line.entries]
        if inline:
            numbers = [" ".join(filter(None, pair)) for pair in zip(numbers, intervals, strict=True)]
        lines.append(" & ".join([escape(_label(line)) if line.first else "", escape(line.title), *numbers]) + r" \\")
        if any(intervals) and not inline:
            lines.append(" & ".join(["", "", *intervals]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if sheet.footnotes:
        notes = "; ".join(f"$^{{{letter}}}$ {escape(text)}" for letter, text in sheet.footnotes)
        lines += [r"", rf"\smallskip\parbox{{\linewidth}}{{\footnotesize {notes}.}}"]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def to_csv(view: ItemView) -> str:
    """Return an item as tidy CSV: a line per cell and number (`printed`, `paper`, `honest`), one with the reason where nothing is found."""
    return tables.to_csv(list(tidy(view)), _CSV_COLUMNS)


_CSV_COLUMNS = (
    *("item", "scale", "group", "row", "row_label", "column_group", "column", "column_label", "unit", "number", "value", "low", "high"),
    *("plus_minus", "text", "protocol", "how", "num_samples", "num_draws", "failed_checks", "difference", "allowed", "agrees"),
    *("quoted", "extra", "reason", "fingerprint", "recipe", "overrides", "mlflow_run", "notes"),
)


def tidy(view: ItemView) -> Iterator[dict[str, Any]]:
    """Return an item as records; `scale` of a printed number is `printed`, so that no one takes it for ours."""
    for cell in view.cells():
        row, column, run = cell.cell.row, cell.cell.column, cell.run
        place: dict[str, Any] = dict.fromkeys(_CSV_COLUMNS) | {
            "item": view.item.name,
            "group": row.group,
            "row": row.key,
            "row_label": row.label,
            "column_group": column.group,
            "column": column.key,
            "column_label": column.label,
            "unit": column.unit,
            "quoted": row.quoted,
            "extra": row.extra,
            "notes": " ".join(note.key for note in cell.cell.notes),
        }
        published = cell.cell.published
        if published is not None:
            yield place | {
                "scale": "printed",
                "number": "printed",
                "value": published.value,
                "plus_minus": published.plus_minus,
                "text": published.text,
            }
        if cell.quoted or cell.scale is None:
            continue
        ours = place | {"scale": cell.scale}
        if run is not None:
            ours |= {
                "fingerprint": run.fingerprint,
                "recipe": run.recipe,
                "overrides": " ".join(run.overrides),
                "mlflow_run": run.mlflow_run,
            }
        yield ours | {"number": "paper", **_tidy_reading(cell, cell.paper), "reason": cell.reason, **_tidy_agreement(cell)}
        if cell.has_counterpart:
            yield ours | {"number": "honest", **_tidy_reading(cell, cell.honest), "reason": cell.honest_reason}


def how_measured(view: ItemView) -> list[str]:
    """Return in which ways the columns were measured, the most frequent way first; columns that share all their ways share a line."""
    columns_by_ways: dict[tuple[str, ...], list[str]] = {}
    for kind, whose in (("paper", "ours"), ("honest", "honest")):
        for column in view.item.columns:
            cells = [cell for row in view.item.rows if (cell := view.cell(row.key, column.key)) is not None]
            ways = [reading.how for cell in cells if (reading := getattr(cell, kind)) is not None and reading.how]
            distinct = tuple(sorted(dict.fromkeys(ways), key=lambda way: -ways.count(way)))
            if distinct:
                columns_by_ways.setdefault((whose, *distinct), []).append(" ".join(filter(None, (column.group, column.label))))
    found = []
    for (whose, *ways), columns in columns_by_ways.items():
        more = f"; and {len(ways) - _MOST_WAYS} more, in table.csv" if len(ways) > _MOST_WAYS else ""
        names = ", ".join(columns) if len(columns) <= _MOST_NAMES else f"{columns[0]} to {columns[-1]} ({len(columns)} columns)"
        found.append(f"{names}, {whose}: {'; '.join(ways[:_MOST_WAYS])}{more}")
    return found


def contradictions(view: ItemView) -> list[str]:
    """Return the notes on an item: key, which rows and columns, what it is, and whether agreement is not asked for."""
    ambiguities = get_paper(view.item.name.partition(".")[0]).ambiguities
    found = []
    for note in view.item.notes:
        rows = ", ".join(" ".join(filter(None, (view.item.row(key).group, view.item.row(key).label))) for key in note.rows)
        columns = ", ".join(view.item.column(key).label for key in note.columns)
        where = "; ".join(filter(None, (rows, columns)))
        exempt = " Not judged." if note.exempt else ""
        found.append(f"{note.key}{f' ({where})' if where else ''}: {ambiguities[note.key]}{exempt}")
    return found


def trainings(view: ItemView) -> list[str]:
    """Return the trainings that an outcome rests on, in a line each."""
    if view.outcome is None:
        return []
    found = []
    for key, run in view.outcome.runs.items():
        flags = "".join(f" --{override}" for override in run.overrides)
        tracked = f", MLflow run {run.mlflow_run}" if run.mlflow_run else ""
        found.append(f"{key}: {run.state}, {view.outcome.scale} scale, fingerprint {run.fingerprint}{tracked}: {run.recipe}{flags}")
    return found


def _tidy_reading(cell: CellView, reading: Reading | None) -> dict[str, Any]:
    if reading is None:
        return {}
    return {
        "value": reading.value,
        "text": describe_series(reading.series) if reading.value is None else None,
        "low": reading.low,
        "high": reading.high,
        "protocol": reading.protocol,
        "how": reading.how,
        "num_samples": reading.num_samples,
        "num_draws": reading.num_draws,
        "failed_checks": " ".join(reading.failed_checks),
    }


def _tidy_agreement(cell: CellView) -> dict[str, Any]:
    agreement = cell.agreement
    if agreement is None:
        return {}
    return {"difference": agreement.difference, "allowed": agreement.allowed, "agrees": agreement.agrees}


def _corner(sheet: Sheet) -> list[str]:
    return ["", sheet.layout.corner] if sheet.layout.has_groups else [sheet.layout.corner]


def _labels(sheet: Sheet, line: SheetLine) -> list[str]:
    labels = [line.group, _label(line)] if sheet.layout.has_groups else [_label(line)]
    return labels if line.first else [""] * len(labels)


def _label(line: SheetLine) -> str:
    return f"{line.label} ({line.remark})" if line.remark else line.label


def _head(group: str, title: str, between: str) -> str:
    return f"{group}{between}{title}" if group else title


def _plain(entry: Entry, between: str) -> str:
    behind = [entry.scale_mark, tables.MARK if entry.suspicious else "", entry.agreement, entry.samples]
    number = " ".join(filter(None, (entry.number, *behind)))
    if entry.footnote:
        number += f" {entry.footnote}"
    return f"{number}{between}[{entry.interval}]" if entry.interval else number


def _latex_number(entry: Entry) -> str:
    agreement = {"✓": r"$\checkmark$", "≠": r"$\neq$", "": ""}[entry.agreement]
    number = escape(entry.number) + (f" {tables.MARK}" if entry.suspicious else "")
    above = entry.footnote or " ".join(filter(None, (entry.scale_mark, entry.samples)))
    return number + (rf"\textsuperscript{{{escape(above)}}}" if above else "") + (f" {agreement}" if agreement else "")


def _latex_heads(sheet: Sheet) -> list[str]:
    heads = sheet.layout.heads
    lines = []
    if any(head.group for head in heads):
        spans = [(name, len(list(members))) for name, members in itertools.groupby(heads, key=lambda head: head.group)]
        lines.append(" & ".join(["", "", *(rf"\multicolumn{{{width}}}{{c}}{{{escape(name)}}}" for name, width in spans)]) + r" \\")
        start, rules = 3, ""
        for name, width in spans:
            rules += rf"\cmidrule(lr){{{start}-{start + width - 1}}}" if name else ""
            start += width
        lines.append(rules)
    names = [escape(sheet.layout.corner), "number", *(_latex_head(head.title) for head in heads)]
    return [*lines, " & ".join(names) + r" \\", r"\midrule"]


def _latex_head(title: str) -> str:
    parts = textwrap.wrap(title, _HEAD_WIDTH)
    stacked = r" \\ ".join(escape(part) for part in parts)
    return escape(title) if len(parts) < 2 else rf"\shortstack[r]{{{stacked}}}"


def _section(title: str, entries: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {entry}" for entry in entries)] if entries else []


def _without_double_blanks(lines: list[str]) -> list[str]:
    return [line for place, line in enumerate(lines) if line or (place and lines[place - 1])]


__all__ = ["contradictions", "footnotes", "how_measured", "terminal_rows", "tidy", "to_csv", "to_latex", "to_markdown", "trainings"]
