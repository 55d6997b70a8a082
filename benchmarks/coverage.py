"""How often the intervals of `analysis.statistics` hold the truth, and how wide they are beside others.

    python -m benchmarks.coverage [--records FILE] [--repetitions 2000] [--first 400] [--seed 0] [--workers 2] [--parts grid,exact,...]

Outcomes are simulated with a known accuracy: logit p = a + u + v with u of the image (sd 1 or 4) and v of the draw, shared by all images
(sd 0, 0.3, 1, 2); right with probability p, or right where logit p > 0. Parts:

* grid: 30, 100, 1000 images x 5, 20, 100 draws x accuracies x spreads, `accuracy_interval` and the candidates of `interval_candidates`.
* between: accuracies of 10, 15, 20 and 30 %, draws spread by 1 and 2: what covers on the grid may not cover between its accuracies.
* exact: spaces of 3 and 10 configurations, all scored, equally likely or not; the target is the mean over images for these.
* paired: difference of two models on the same images (correlation 0.8 of their u), each with draws of its own.
* worst: the worst of k draws. batches: T0, one draw per block of images, scored once.
* until: `rayndom evaluate --until`: images and draws are added until the interval is narrow or 2,000 images are used up; with the levels of
  the rule, and with each look at 95 %.

Accuracies above 0.5 mirror those below (the interval of the complement is the complement), so they are not simulated twice.

Every cell is simulated `--first` times, and up to `--repetitions` unless the first ones put its coverage above the goal of 94 % beyond
doubt (one-sided 99.9 % Clopper-Pearson bound): all cells that come near the goal are read exactly. Finished cells are lines of FILE; the
same command goes on where a killed one was, and measures again what other intervals left there. Exit code 1 if a cell with 2,000
repetitions covers less than 93 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.coverage_simulation import GOAL, OURS, Cell, Found, cells, run_cell, version
from benchmarks.coverage_tables import by_cell, summary

Task = tuple[Cell, int, int, int]


def _known(records: Path | None, settings: dict[str, Any]) -> dict[Cell, list[Found]]:
    """Return the finished cells of a file of records that were simulated with these settings."""
    if records is None or not records.exists():
        return {}
    content = records.read_text()
    if content and not content.endswith("\n"):  # a line that was cut off by a kill must not swallow the next one
        records.write_text(content + "\n")
    lines = [json.loads(text) for text in content.splitlines() if text.endswith("}")]
    found = {}
    for line in lines:
        if line["settings"] == settings:
            cell = Cell(**line["cell"])
            found[cell] = [Found(cell, **values) for values in line["found"]]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Simulate what is missing in the records and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=Path, help="file of JSON lines, one per cell, to continue")
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument(
        "--first", type=int, default=400, help="repetitions after which a cell may end, if it is above the goal beyond doubt"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", default="grid,between,exact,paired,worst,batches,until")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no cell after so long")
    parser.add_argument("--markdown", type=Path, help="the tables of the summary")
    chosen = parser.parse_args(arguments)
    settings = {"version": version(), "repetitions": chosen.repetitions, "first": chosen.first, "seed": chosen.seed}
    wanted = cells(chosen.parts.split(","))
    known = _known(chosen.records, settings)
    results = {cell: known[cell] for cell in wanted if cell in known}
    tasks = [(cell, chosen.first, chosen.repetitions, chosen.seed) for cell in wanted if cell not in results]
    # In an order that is no order: what a run that was cut short leaves is a sample of everything.
    tasks.sort(key=lambda task: zlib.crc32(repr(task[0]).encode()))
    started = time.perf_counter()
    for cell, found in _simulated(tasks, chosen.workers):
        results[cell] = found
        if chosen.records is not None:
            values = [{name: value for name, value in asdict(each).items() if name != "cell"} for each in found]
            with chosen.records.open("a") as file:
                file.write(json.dumps({"settings": settings, "cell": asdict(cell), "found": values}) + "\n")
        if len(results) % 25 == 0:
            print(f"{len(results)} of {len(wanted)} cells, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - started > 60 * chosen.minutes:
            break
    everything = [each for cell in wanted if cell in results for each in results[cell]]
    return _report(everything, chosen.seed, chosen.markdown)


def _simulated(tasks: list[Task], workers: int) -> Iterable[tuple[Cell, list[Found]]]:
    if workers == 1:
        yield from map(run_cell, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(run_cell, tasks)


def _report(found: list[Found], seed: int, markdown: Path | None) -> int:
    text = summary(found, seed)
    print(text)
    grid = [each for each in found if each.cell.part == "grid"]
    if grid:
        print(by_cell(grid, [each for each in found if each.cell.part == "between"]))
    low = [each for each in found if each.interval == OURS and each.coverage < GOAL]
    for each in sorted(low, key=lambda one: one.coverage):
        print(f"{100 * each.coverage:.1f} % (high {each.too_high:.3f}, low {each.too_low:.3f}, width {each.width:.3f}): {each.cell}")
    if markdown is not None:
        markdown.write_text(text)
    return int(any(each.repetitions >= 2000 for each in low))


if __name__ == "__main__":
    sys.exit(main())
