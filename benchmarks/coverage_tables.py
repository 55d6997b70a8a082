"""The tables of `benchmarks.coverage`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.coverage_simulation import GOAL, OURS, Cell, Found
from benchmarks.interval_candidates import CANDIDATES

LARGEST_RATIO = 1.3
"""How much wider than the narrowest candidate that covers an interval may be."""


def summary(found: list[Found], seed: int) -> str:
    """Return the tables of coverage in Markdown."""
    mine = [each for each in found if each.interval == OURS]
    repetitions = sorted({each.repetitions for each in mine})
    shown = " or ".join(f"{sum(each.repetitions == number for each in mine)} cells {number} times" for number in repetitions)
    lines = [f"Simulated, seed {seed}: {shown}. Coverage in %, width in points.", ""]
    grid = [each for each in found if each.cell.part == "grid"]
    between = [each for each in found if each.cell.part == "between"]
    if grid:
        lines += [*_by_size(grid, between), "", *_by_interval(grid)]
    others = [each for each in found if each.cell.part != "grid" and (each.interval == OURS or each.cell.part == "until")]
    if others:
        lines += ["", *_by_part(others)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Rival:
    """One cell's interval beside the narrowest candidate that covers: in this cell, which only who knows the truth can choose, and in all
    cells of as many images and draws, those between the grid's accuracies too, which anyone can. `None`: there is none."""

    mine: Found
    here: Found | None
    everywhere: Found | None

    def ratio(self, of: str) -> float | None:
        """Return our width as a multiple of the rival's."""
        rival: Found | None = getattr(self, of)
        return self.mine.width / rival.width if rival is not None else None


def rivals(grid: list[Found], between: list[Found]) -> list[Rival]:
    """Return each cell of the grid with its rivals."""
    by_cell: dict[Cell, dict[str, Found]] = {}
    for each in (*grid, *between):
        by_cell.setdefault(each.cell, {})[each.interval] = each
    found = []
    for cell, of in by_cell.items():
        if cell.part != "grid":
            continue
        alike = [other for other in by_cell if (other.num_images, other.num_draws) == (cell.num_images, cell.num_draws)]
        covering = [name for name in CANDIDATES if of[name].coverage >= GOAL]
        everywhere = [name for name in covering if all(by_cell[other][name].coverage >= GOAL for other in alike)]
        narrowest = [min((of[name] for name in names), key=lambda one: one.width, default=None) for names in (covering, everywhere)]
        found.append(Rival(of[OURS], *narrowest))
    return found


def by_cell(grid: list[Found], between: list[Found]) -> str:
    """Return the table of all cells of the grid in Markdown."""
    heads = ["images", "draws", "accuracy", "sd draws", "sd images", "outcomes", "repetitions", "coverage", "width"]
    heads += ["narrowest that covers here", "ratio", "narrowest that covers everywhere", "ratio"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for each in rivals(grid, between):
        cell = each.mine.cell
        row: list[Any] = [cell.num_images, cell.num_draws, f"{100 * cell.accuracy:g} %", cell.draw_deviation, cell.image_deviation]
        row += ["thresholded" if cell.thresholded else "random", each.mine.repetitions, f"{100 * each.mine.coverage:.1f}"]
        row.append(f"{100 * each.mine.width:.1f}")
        for rival, of in ((each.here, "here"), (each.everywhere, "everywhere")):
            row += [f"{rival.interval}, {100 * rival.width:.1f}", f"{each.ratio(of):.2f}"] if rival is not None else ["none", ""]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines) + "\n"


def _by_size(grid: list[Found], between: list[Found]) -> list[str]:
    heads = ["images", "draws", "lowest by sd 0 / 0.3 / 1 / 2", "mean", "mean width", "too few said"]
    heads += ["narrowest other that covers everywhere", "width as a multiple of its: median, largest, cells above 1.3"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    pairs = rivals(grid, between)
    for size in sorted({(each.cell.num_images, each.cell.num_draws) for each in grid}):
        here = [each for each in pairs if (each.mine.cell.num_images, each.mine.cell.num_draws) == size]
        mine = [each.mine for each in here]
        lowest = [min(e.coverage for e in mine if e.cell.draw_deviation == v) for v in sorted({e.cell.draw_deviation for e in mine})]
        mean = [100 * _mean(getattr(e, name) for e in mine) for name in ("coverage", "width", "short")]
        names = dict.fromkeys(each.everywhere.interval for each in here if each.everywhere is not None)
        ratios = [ratio for each in here if (ratio := each.ratio("everywhere")) is not None]
        shown = [" / ".join(f"{100 * value:.1f}" for value in lowest), f"{mean[0]:.1f}", f"{mean[1]:.1f}", f"{mean[2]:.0f} %"]
        shown.append(", ".join(names) or "none")
        above = sum(ratio > LARGEST_RATIO for ratio in ratios)
        shown.append(f"{np.median(ratios):.2f}, {max(ratios):.2f}, {above} of {len(ratios)}" if ratios else "")
        lines.append(f"| {size[0]} | {size[1]} | {' | '.join(shown)} |")
    return lines


def _by_interval(grid: list[Found]) -> list[str]:
    heads = ["interval", "lowest", "cells below 93 %", "mean width", "width as a multiple of ours, where it covers"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    ours = {each.cell: each.width for each in grid if each.interval == OURS}
    for name in dict.fromkeys(each.interval for each in grid):
        these = [each for each in grid if each.interval == name]
        multiples = [float(np.log(max(each.width, 1e-9) / ours[each.cell])) for each in these if each.coverage >= GOAL]
        low = sum(each.coverage < GOAL for each in these)
        multiple = f"{np.exp(_mean(multiples)):.2f}" if multiples else ""
        width = 100 * _mean(each.width for each in these)
        lines.append(f"| {name} | {100 * min(e.coverage for e in these):.1f} | {low} of {len(these)} | {width:.1f} | {multiple} |")
    return lines


def _by_part(others: list[Found]) -> list[str]:
    heads = ["part", "cells", "lowest", "cells below 93 %", "mean", "mean width", "too few said"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    titles = [_title(each) for each in others]
    for title in dict.fromkeys(titles):
        these = [each for each, its in zip(others, titles, strict=True) if its == title]
        mean = [100 * _mean(getattr(e, name) for e in these) for name in ("coverage", "width", "short")]
        low = sum(each.coverage < GOAL for each in these)
        lowest = 100 * min(each.coverage for each in these)
        lines.append(f"| {title} | {len(these)} | {lowest:.1f} | {low} | {mean[0]:.1f} | {mean[1]:.1f} | {mean[2]:.0f} % |")
    return lines


def _title(found: Found) -> str:
    if found.cell.part == "until":
        return f"until {found.cell.extra} points" + (f", {found.interval}" if found.interval != OURS else "")
    return f"{found.cell.part}, {found.cell.extra} draws in all" if found.cell.part == "batches" else found.cell.part


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
