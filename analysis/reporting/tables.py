"""Tidy frames (lists of dictionaries) as Markdown, CSV and LaTeX text. Nothing is printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.reporting.latex import escape
from analysis.reporting.mark import MARK
from analysis.statistics import Estimate

Frame = Sequence[Mapping[str, Any]]

MISSING = "–"


def format_percent(value: float, low: float | None = None, high: float | None = None, *, marked: bool = False) -> str:
    """Return a share in [0,1] as `52.3 %` or, with an interval, `52.3 % [51.1, 53.4]`; the mark stands behind it if asked for."""
    text = f"{100 * value:.1f} %"
    if low is not None and high is not None:
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{text} {MARK}" if marked else text


def format_estimate(estimate: Estimate, *, marked: bool = False) -> str:
    """Return an estimate as `52.3 % [51.1, 53.4]`, with `too few draws` or the like behind it where no claim can be made of it.

    One of an evaluation with a failed check is marked whoever shows it.
    """
    text = format_percent(estimate.value, estimate.low, estimate.high, marked=marked or estimate.marked)
    return f"{text} {estimate.lacking}" if estimate.lacking else text


def columns_of(frame: Frame, columns: Sequence[str] | None = None) -> list[str]:
    """Return the columns to show: those asked for, or all in the order of first appearance.

    Raises:
        ValueError: a column that no row has.
    """
    present = list(dict.fromkeys(name for row in frame for name in row))
    if columns is None:
        return present
    unknown = [name for name in columns if frame and name not in present]
    if unknown:
        raise ValueError(f"the frame has no column {unknown[0]!r}; it has {', '.join(present)}")
    return list(columns)


def to_markdown(frame: Frame, columns: Sequence[str] | None = None, *, titles: Mapping[str, str] | None = None) -> str:
    """Return the frame as a Markdown table; numeric columns are aligned to the right."""
    names = columns_of(frame, columns)
    if not names:
        return ""
    cells = [[_cell(row.get(name)).replace("|", r"\|").replace("\n", " ") for name in names] for row in frame]
    heads = [(titles or {}).get(name, name) for name in names]
    widths = [max(len(head), 3, *(len(line[index]) for line in cells)) for index, head in enumerate(heads)]
    right = [_is_numeric(frame, name) for name in names]
    rule = [("-" * (width - 1) + ":") if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)]
    lines = [heads, rule, *cells]
    padded = [
        [cell.rjust(width) if is_right else cell.ljust(width) for cell, width, is_right in zip(line, widths, right, strict=True)]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded) + "\n"


def to_csv(frame: Frame, columns: Sequence[str] | None = None) -> str:
    """Return the frame as CSV with a header line, numbers at full precision, line ends `\\n`."""
    names = columns_of(frame, columns)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if row.get(name) is None else row[name] for name in names] for row in frame])
    return buffer.getvalue()


def to_latex(
    frame: Frame,
    columns: Sequence[str] | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> str:
    """Return the frame as a LaTeX table with booktabs rules; special characters are escaped."""
    names = columns_of(frame, columns)
    alignment = "".join("r" if _is_numeric(frame, name) else "l" for name in names)
    heads = [escape((titles or {}).get(name, name)) for name in names]
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", " & ".join(heads) + r" \\", r"\midrule"]
    lines += [" & ".join(escape(_cell(row.get(name))) for name in names) + r" \\" for row in frame]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if caption is not None or label is not None:
        caption_line = [rf"\caption{{{escape(caption)}}}"] if caption is not None else []
        label_line = [rf"\label{{{label}}}"] if label is not None else []
        lines = [r"\begin{table}", r"\centering", *caption_line, *label_line, *lines, r"\end{table}"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, Estimate):
        return format_estimate(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_numeric(frame: Frame, name: str) -> bool:
    values = [row[name] for row in frame if row.get(name) is not None]
    return bool(values) and all(isinstance(value, int | float | Estimate) and not isinstance(value, bool) for value in values)
