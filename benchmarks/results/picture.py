"""The picture: of each defence its accuracy under its paper's protocol (T0), under honest ones (T1, worst attack) and with a known draw."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from analysis.reporting.figure_style import COLORS, PALE, new_figure, style
from analysis.reproduction.papers import get_item
from benchmarks.results.gains import BASELINE
from benchmarks.results.records import Record, number

TITLES = {"common.table2": "Fashion-MNIST, linf 0.1", "common.table1": "CIFAR-10 (JPEG), linf 8/255"}
MARKS = (
    ("paper", "T0: the paper's protocol", COLORS[1], "o"),
    ("unknown", "T1: the draw is unknown (EOT)", COLORS[0], "s"),
    ("known", "T2: the draw is known", COLORS[2], "^"),
    ("worst", "worst attack per image (T1)", COLORS[6], "D"),
)
"""Column, words, colour and marker of each mark."""
SEED = 0


def drawn(tables: Mapping[str, Sequence[Record]]) -> str:
    """Return the picture as SVG: a panel per table that has records, with the numbers' digest as its description."""
    with style():
        panels = {item: [record for record in records if record.seed == SEED] for item, records in tables.items()}
        panels = {item: records for item, records in panels.items() if records}
        tallest = max(map(len, panels.values()), default=1)
        figure = new_figure(3.9 * max(len(panels), 1), 1.2 + 0.34 * tallest)
        places: Any = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
        for axes, (item, records) in zip(places, panels.items(), strict=False):
            _panel(axes, item, records)
        handles, words = places[0].get_legend_handles_labels()
        figure.legend(handles, words, loc="outside lower center", ncols=2)
        buffer = io.StringIO()
        with_style: dict[str, Any] = {"Date": None, "Creator": None, "Description": digest(tables)}
        figure.savefig(buffer, format="svg", metadata=with_style)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def digest(tables: Mapping[str, Sequence[Record]]) -> str:
    """Return a hash of all numbers that the picture shows."""
    shown = [
        (item, record.row, column, reading and (round(reading.value or 0, 3), reading.low, reading.high))
        for item, records in tables.items()
        for record in records
        if record.seed == SEED
        for column, *_ in MARKS
        for reading in [number(record, column)]
    ]
    return "numbers " + hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def _panel(axes: Axes, item: str, records: Sequence[Record]) -> None:
    labels = {row.key: row.label for row in get_item(item).rows}
    for height, record in enumerate(reversed(records)):
        for place, (column, words, color, marker) in enumerate(MARKS):
            reading = number(record, column)
            if reading is None or reading.value is None:
                continue
            at = height + 0.24 - 0.16 * place
            low, high = (reading.value if end is None else end for end in (reading.low, reading.high))
            axes.errorbar(
                *(reading.value, at),
                xerr=[[reading.value - low], [high - reading.value]],
                fmt=marker,
                color=PALE if reading.failed_checks else color,
                label=words if height == 0 else None,
                elinewidth=0.9,
                markersize=3.6,
            )
        if record.row == BASELINE and (worst := number(record, "worst")) is not None and worst.low is not None and worst.high is not None:
            axes.axvspan(worst.low, worst.high, color=COLORS[5], alpha=0.18, linewidth=0)
    axes.set_yticks(range(len(records)), [labels[record.row] for record in reversed(records)])
    axes.set_ylim(-0.6, len(records) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("accuracy under attack, %")
    axes.set_title(TITLES[item])
