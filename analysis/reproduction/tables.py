"""Tables of an item for the terminal, as Markdown, as LaTeX with booktabs rules, and as tidy CSV."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from analysis.reporting import tables
from analysis.reporting.latex import escape
from analysis.reproduction.sheet import AGREES, DIFFERS, Entry, Footnotes, Sheet, TextLine
from analysis.reproduction.view import describe_series

_INLINE_COLUMNS, _MANY_COLUMNS, _MANY_LINES = 4, 8, 30
_HEAD_WIDTH = 14


def terminal_rows(sheet: Sheet) -> tuple[list[str], list[list[str]], list[str]]:
    """Return header and rows for the terminal, a line per row and kind of number, and what stands below the table."""
    header, rows, footnotes = _text(sheet, "\n", "\n")
    return header, rows, [*sheet.legend, *(f"{letter}: {text}" for letter, text in footnotes)]


def to_markdown(sheet: Sheet, figure_files: tuple[str, ...] = ()) -> str:
    """Return an item as a Markdown page: title, scale, figures, table, footnotes, how it was measured, contradictions, trainings."""
    item = sheet.view.item
    lines = [f"# {item.name}: {item.title}", ""]
    lines += [f"**{sentence}**" if place == 0 else sentence for place, sentence in enumerate(sheet.legend)]
    lines += ["", *(f"![{item.name}]({name})" for name in figure_files)]
    if item.nothing_to_run:
        lines.append(f"Nothing to run: {item.nothing_to_run}.")
    names, rows, footnotes = _text(sheet, ": ", " ")
    if rows:
        # Heads may repeat; keys of a frame may not.
        keys = [str(place) for place in range(len(names))]
        frame = [dict(zip(keys, row, strict=True)) for row in rows]
        lines += ["", tables.to_markdown(frame, keys, titles=dict(zip(keys, names, strict=True))).rstrip()]
    lines += ["", *(f"- {letter}: {text}" for letter, text in footnotes)]
    lines += _section("How it was measured", sheet.how)
    lines += _section("Contradictions of the paper", sheet.contradictions)
    lines += _section("Trainings", _trainings(sheet))
    return "\n".join(_without_double_blanks(lines)) + "\n"


def to_latex(sheet: Sheet) -> str:
    """Return an item as a LaTeX table (packages: booktabs, amssymb, graphicx).

    With many columns intervals are lines of their own; a table that is still too wide for the page is shrunk to it.
    """
    item, heads, text_lines, footnotes = sheet.view.item, sheet.heads, sheet.text_lines, Footnotes()
    inline = len(heads) <= _INLINE_COLUMNS
    large = len(heads) > _MANY_COLUMNS or len(text_lines) > _MANY_LINES
    size = r"\scriptsize\setlength{\tabcolsep}{2pt}" if large else r"\footnotesize\setlength{\tabcolsep}{3pt}"
    caption = f"{item.title} ({item.name}). {' '.join(sheet.legend)}"
    lines = [f"% {line}" for line in sheet.how]
    lines += [r"\begin{table*}[tp]", rf"\centering{size}", rf"\caption{{{escape(caption)}}}", rf"\label{{{item.name}}}"]
    lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [rf"\begin{{tabular}}{{ll{'r' * len(heads)}}}", r"\toprule", *_latex_heads(sheet)]
    group = ""
    for place, line in enumerate(text_lines):
        if line.first and place:
            lines.append(r"\addlinespace")
        if line.first and line.row.group and line.row.group != group:
            group = line.row.group
            lines.append(rf"\multicolumn{{{2 + len(heads)}}}{{l}}{{\textit{{{escape(group)}}}}} \\")
        intervals = [_latex_interval(entry) for entry in line.entries]
        numbers = [_latex_number(entry, footnotes) for entry in line.entries]
        if inline:
            numbers = [" ".join(filter(None, pair)) for pair in zip(numbers, intervals, strict=True)]
        lines.append(" & ".join([escape(line.label) if line.first else "", escape(line.title), *numbers]) + r" \\")
        if any(intervals) and not inline:
            lines.append(" & ".join(["", "", *intervals]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if footnotes.listed:
        notes = "; ".join(f"$^{{{letter}}}$ {escape(text)}" for letter, text in footnotes.listed)
        lines += [r"", rf"\smallskip\parbox{{\linewidth}}{{\footnotesize {notes}.}}"]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def to_csv(sheet: Sheet) -> str:
    """Return an item as tidy CSV: a line per cell and number (`printed`, `paper`, `honest`), one with the reason where nothing is found."""
    return tables.to_csv(list(tidy(sheet)), _CSV_COLUMNS)


_CSV_COLUMNS = (
    *("item", "scale", "group", "row", "row_label", "column_group", "column", "column_label", "unit", "number", "value", "low", "high"),
    *("plus_minus", "text", "protocol", "how", "num_samples", "num_draws", "failed_checks", "difference", "allowed", "agrees"),
    *("quoted", "extra", "reason", "fingerprint", "recipe", "overrides", "mlflow_run", "notes"),
)


def tidy(sheet: Sheet) -> Iterator[dict[str, Any]]:
    """Return an item as records; `scale` of a printed number is `printed`, so that no one takes it for ours."""
    for entries in sheet.records.values():
        cell = entries["printed"].cell
        row, column, published = cell.cell.row, cell.cell.column, cell.cell.published
        place: dict[str, Any] = dict.fromkeys(_CSV_COLUMNS) | {
            "item": sheet.view.item.name,
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
        if published is not None:
            yield place | {
                "scale": "printed",
                "number": "printed",
                "value": published.value,
                "plus_minus": published.plus_minus,
                "text": published.text,
            }
        if cell.scale is None:
            continue
        for kind, entry in entries.items():
            if kind == "paper" or (kind == "honest" and cell.has_counterpart):
                yield place | {"scale": cell.scale, "number": kind} | _tidy_entry(entry)


def _trainings(sheet: Sheet) -> tuple[str, ...]:
    """Return the trainings that an outcome rests on, in a line each."""
    outcome = sheet.view.outcome
    found = []
    for key, run in outcome.runs.items() if outcome is not None else ():
        flags = "".join(f" --{override}" for override in run.overrides)
        tracked = f", MLflow run {run.mlflow_run}" if run.mlflow_run else ""
        found.append(f"{key}: {run.state}, {sheet.view.scale} scale, fingerprint {run.fingerprint}{tracked}: {run.recipe}{flags}")
    return tuple(found)


def _tidy_entry(entry: Entry) -> dict[str, Any]:
    run, reading, agreement = entry.cell.run, entry.reading, entry.agreement
    found: dict[str, Any] = {"reason": entry.reason}
    if run is not None:
        found |= {
            "fingerprint": run.fingerprint,
            "recipe": run.recipe,
            "overrides": " ".join(run.overrides),
            "mlflow_run": run.mlflow_run,
        }
    if reading is not None:
        found |= {
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
    if agreement is not None:
        found |= {"difference": agreement.difference, "allowed": agreement.allowed, "agrees": agreement.agrees}
    return found


def _text(sheet: Sheet, between_heads: str, before_interval: str) -> tuple[list[str], list[list[str]], tuple[tuple[str, str], ...]]:
    """Return header, rows and footnotes of a table of plain text."""
    footnotes = Footnotes()
    corner = ["", sheet.corner] if sheet.has_groups else [sheet.corner]
    header = [*corner, "number", *(f"{head.group}{between_heads}{head.title}" if head.group else head.title for head in sheet.heads)]
    rows = [
        [*_labels(sheet, line), line.title, *(_plain(entry, before_interval, footnotes) for entry in line.entries)]
        for line in sheet.text_lines
    ]
    return header, rows, footnotes.listed


def _labels(sheet: Sheet, line: TextLine) -> list[str]:
    labels = [line.row.group, line.label] if sheet.has_groups else [line.label]
    return labels if line.first else [""] * len(labels)


def _plain(entry: Entry | None, before_interval: str, footnotes: Footnotes) -> str:
    if entry is None:
        return ""
    behind = [entry.scale_mark, tables.MARK if entry.failed_checks else "", entry.verdict, entry.samples, footnotes.letter(entry.reason)]
    number = " ".join(filter(None, (entry.number, *behind)))
    return f"{number}{before_interval}[{entry.interval}]" if entry.interval else number


def _latex_number(entry: Entry | None, footnotes: Footnotes) -> str:
    if entry is None:
        return ""
    agreement = {AGREES: r"$\checkmark$", DIFFERS: r"$\neq$", "": ""}[entry.verdict]
    number = escape(entry.number) + (f" {tables.MARK}" if entry.failed_checks else "")
    above = footnotes.letter(entry.reason) or " ".join(filter(None, (entry.scale_mark, entry.samples)))
    return number + (rf"\textsuperscript{{{escape(above)}}}" if above else "") + (f" {agreement}" if agreement else "")


def _latex_interval(entry: Entry | None) -> str:
    return rf"{{\scriptsize [{escape(entry.interval)}]}}" if entry is not None and entry.interval else ""


def _latex_heads(sheet: Sheet) -> list[str]:
    heads = sheet.heads
    lines = []
    if any(head.group for head in heads):
        spans = [(name, len(list(members))) for name, members in itertools.groupby(heads, key=lambda head: head.group)]
        lines.append(" & ".join(["", "", *(rf"\multicolumn{{{width}}}{{c}}{{{escape(name)}}}" for name, width in spans)]) + r" \\")
        start, rules = 3, ""
        for name, width in spans:
            rules += rf"\cmidrule(lr){{{start}-{start + width - 1}}}" if name else ""
            start += width
        lines.append(rules)
    names = [escape(sheet.corner), "number", *(_latex_head(head.title) for head in heads)]
    return [*lines, " & ".join(names) + r" \\", r"\midrule"]


def _latex_head(title: str) -> str:
    parts = textwrap.wrap(title, _HEAD_WIDTH)
    stacked = r" \\ ".join(escape(part) for part in parts)
    return escape(title) if len(parts) < 2 else rf"\shortstack[r]{{{stacked}}}"


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {entry}" for entry in entries)] if entries else []


def _without_double_blanks(lines: list[str]) -> list[str]:
    return [line for place, line in enumerate(lines) if line or (place and lines[place - 1])]
