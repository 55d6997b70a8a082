"""How often the intervals of `analysis.statistics` hold the truth, and how wide they are beside others.

    python -m benchmarks.coverage [--repetitions 2000] [--seed 0] [--workers 2] [--parts grid,exact,...] [--json FILE] [--markdown FILE]

Outcomes are simulated with a known accuracy: logit p = a + u + v with u of the image (sd 1 or 4) and v of the draw, shared by all images
(sd 0, 0.3, 1, 2); right with probability p, or right where logit p > 0. Parts:

* grid: 30, 100, 1000 images x 5, 20, 100 draws x accuracies x spreads, `accuracy_interval` and the candidates of `interval_candidates`.
* exact: spaces of 3 and 10 configurations, all scored, equally likely or not; the target is the mean over images for these.
* paired: difference of two models on the same images (correlation 0.8 of their u), each with draws of its own.
* worst: the worst of k draws. batches: T0, one draw per block of images, scored once.
* until: `rayndom evaluate --until`: images and draws are added until the interval is narrow or 2,000 images are used up; with the levels of
  the rule, and with each look at 95 %.

Accuracies above 0.5 mirror those below (the interval of the complement is the complement), so they are not simulated twice. Exit code 1
if a cell with 2,000 repetitions covers less than 93 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from analysis.statistics import accuracy_interval, paired_difference, worst_of_k_accuracy
from analysis.statistics.stopping import MOST_DOUBLINGS, planned_looks
from benchmarks.interval_candidates import CANDIDATES, Counts, percentile_bootstrap
from benchmarks.stopping_coverage import BLOCK, most_draws, stop

OURS = "rayndom"
UNCORRECTED = "each look at 95 %"
BOOTSTRAP = "percentile bootstrap, two-way"
GOAL = 0.93
_BOOTSTRAPPED = 20  # every how many experiments the bootstrap, which takes longest, is computed
_NODES = np.linspace(-8.5, 8.5, 1401)
_WEIGHTS = np.exp(-(_NODES**2) / 2) / np.exp(-(_NODES**2) / 2).sum()

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """One setting of the simulation. `extra`: k of the worst of k, the number of blocks, or the width in points where the rule stops."""

    part: str
    num_images: int
    num_draws: int
    accuracy: float
    draw_deviation: float
    image_deviation: float
    thresholded: bool
    extra: int = 0


@dataclass
class Found:
    """Coverage, misses above and below, mean width of one interval in one cell; `short`: how often it said that something is too few."""

    cell: Cell
    interval: str
    repetitions: int
    coverage: float
    too_high: float
    too_low: float
    width: float
    short: float = 0.0


class World:
    """Images and draws of one cell."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        total = float(np.hypot(cell.image_deviation, cell.draw_deviation))
        self.intercept = _intercept(cell.accuracy, total, cell.thresholded)

    def images(self, rng: np.random.Generator) -> FloatArray:
        """Return the logits of the images (S,)."""
        return self.intercept + self.cell.image_deviation * rng.standard_normal(self.cell.num_images)

    def draws(self, rng: np.random.Generator, count: int | None = None) -> FloatArray:
        """Return the effects of draws (R,)."""
        return self.cell.draw_deviation * rng.standard_normal(self.cell.num_draws if count is None else count)

    def outcomes(self, rng: np.random.Generator, image_S: FloatArray, draw_R: FloatArray) -> NDArray[np.bool_]:
        """Return correctness (S, R)."""
        if self.cell.thresholded:
            return image_S[:, None] + draw_R > 0
        odds_SR = np.exp(image_S)[:, None] * np.exp(draw_R)
        return rng.random(odds_SR.shape, dtype=np.float32) * (1 + odds_SR) < odds_SR

    def for_draw(self, draw_R: FloatArray) -> FloatArray:
        """Return each draw's accuracy over the population of images (R,)."""
        return _mean_over(self.intercept + draw_R, self.cell.image_deviation, self.cell.thresholded)

    def worst_of(self, k: int) -> float:
        """Return the probability that k draws are right on an image, over the population of images."""
        image_Q = self.intercept + self.cell.image_deviation * _NODES
        return float((_WEIGHTS * _mean_over(image_Q, self.cell.draw_deviation, self.cell.thresholded) ** k).sum())


def _mean_over(logits: FloatArray, deviation: float, thresholded: bool) -> FloatArray:
    if thresholded:
        return special.ndtr(logits / deviation) if deviation else (logits > 0).astype(float)
    return special.expit(logits[:, None] + deviation * _NODES) @ _WEIGHTS


def _intercept(accuracy: float, deviation: float, thresholded: bool) -> float:
    if thresholded:
        return float(special.ndtri(accuracy) * deviation)
    return float(optimize.brentq(lambda a: _mean_over(np.array([a]), deviation, False)[0] - accuracy, -80, 80, xtol=1e-10))


def run_cell(task: tuple[Cell, int, int]) -> list[Found]:
    """Simulate one cell: `(cell, repetitions, seed)`."""
    cell, repetitions, seed = task
    rng = np.random.default_rng([seed, *os.fsencode(repr(cell))])
    return {"grid": _grid, "exact": _exact, "paired": _paired, "worst": _worst, "batches": _batches, "until": _until}[cell.part](
        cell, repetitions, rng
    )


def _grid(cell: Cell, repetitions: int, rng: np.random.Generator) -> list[Found]:
    world = World(cell)
    image_NS, draw_NR = np.empty((repetitions, cell.num_images)), np.empty((repetitions, cell.num_draws))
    ours, bootstrapped = [], []
    for index in range(repetitions):
        correct = world.outcomes(rng, world.images(rng), world.draws(rng))
        image_NS[index], draw_NR[index] = correct.sum(1), correct.sum(0)
        estimate = accuracy_interval(correct)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
        if index % _BOOTSTRAPPED == 0:
            bootstrapped.append(percentile_bootstrap(correct, rng))
    counts, truth = Counts(image_NS, draw_NR), np.full(repetitions, cell.accuracy)
    found = [_found(cell, OURS, ours, truth), _found(cell, BOOTSTRAP, bootstrapped, truth[: len(bootstrapped)])]
    return found + [_found(cell, name, np.stack(ends(counts), axis=1), truth) for name, ends in CANDIDATES.items()]


def _exact(cell: Cell, repetitions: int, rng: np.random.Generator) -> list[Found]:
    world, ours, truth = World(cell), [], []
    for index in range(repetitions):
        draw_R = world.draws(rng)
        weights = rng.dirichlet(np.ones(cell.num_draws)) if index % 2 else np.full(cell.num_draws, 1 / cell.num_draws)
        estimate = accuracy_interval(world.outcomes(rng, world.images(rng), draw_R), cell.num_draws, weights_R=weights)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
        truth.append(float(world.for_draw(draw_R) @ weights))
    return [_found(cell, OURS, ours, np.array(truth))]


def _paired(cell: Cell, repetitions: int, rng: np.random.Generator) -> list[Found]:
    world, ours = World(cell), []
    other = World(replace(cell, accuracy=min(1.5 * cell.accuracy, 0.6)))
    for _ in range(repetitions):
        image_S, common = rng.standard_normal((2, cell.num_images))
        second_S = other.intercept + cell.image_deviation * (0.8 * image_S + 0.6 * common)
        first = world.outcomes(rng, world.intercept + cell.image_deviation * image_S, world.draws(rng))
        estimate = paired_difference(first, other.outcomes(rng, second_S, other.draws(rng)))
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
    return [_found(cell, OURS, ours, np.full(repetitions, cell.accuracy - other.cell.accuracy))]


def _worst(cell: Cell, repetitions: int, rng: np.random.Generator) -> list[Found]:
    world, ours = World(cell), []
    for _ in range(repetitions):
        estimate = worst_of_k_accuracy(world.outcomes(rng, world.images(rng), world.draws(rng)), cell.extra)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
    return [_found(cell, OURS, ours, np.full(repetitions, world.worst_of(cell.extra)))]


def _batches(cell: Cell, repetitions: int, rng: np.random.Generator) -> list[Found]:
    world, ours = World(cell), []
    batches_S = np.arange(cell.num_images) * cell.extra // cell.num_images
    for _ in range(repetitions):
        correct = world.outcomes(rng, world.images(rng), world.draws(rng, cell.extra))[np.arange(cell.num_images), batches_S]
        estimate = accuracy_interval(correct, batches_S=batches_S)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
    return [_found(cell, OURS, ours, np.full(repetitions, cell.accuracy))]


def _until(cell: Cell, repetitions: int, rng: np.random.Generator) -> list[Found]:
    world, width = World(cell), cell.extra / 100
    looks = planned_looks(cell.num_images, BLOCK, width, doublings=MOST_DOUBLINGS)
    ends: dict[str, list[tuple[float, float, bool]]] = {OURS: [], UNCORRECTED: []}
    for _ in range(repetitions):
        correct = world.outcomes(rng, world.images(rng), world.draws(rng, most_draws(cell.num_draws)))
        for name, found in ends.items():
            stopped = stop(correct, cell.num_draws, looks, width, corrected=name == OURS)
            found.append((stopped.low, stopped.high, not stopped.reached))
    truth = np.full(repetitions, cell.accuracy)
    return [_found(cell, name, found, truth) for name, found in ends.items()]


def _found(cell: Cell, name: str, ends: Any, truth: FloatArray) -> Found:
    table = np.array(ends, dtype=float)
    low, high = table[:, 0], table[:, 1]
    above, below = low > truth + 1e-12, high < truth - 1e-12
    short = float(table[:, 2].mean()) if table.shape[1] > 2 else 0.0
    return Found(
        cell,
        name,
        len(truth),
        float(1 - (above | below).mean()),
        float(above.mean()),
        float(below.mean()),
        float((high - low).mean()),
        short,
    )


def cells(parts: Iterable[str]) -> list[Cell]:
    """Return the cells of the parts asked for, the slow ones first."""
    sizes, draws, accuracies, spreads = (1000, 100, 30), (100, 20, 5), (0.005, 0.02, 0.05, 0.5), (0.0, 0.3, 1.0, 2.0)
    outcome = list(itertools.product((1.0, 4.0), (False, True)))
    found: list[Cell] = []
    for part in parts:
        if part == "grid":
            settings = [(s, r, a, v, 0) for s, r, a, v in itertools.product(sizes, draws, accuracies, spreads)]
        elif part == "exact":
            settings = [(s, r, a, v, 0) for s, r, a, v in itertools.product(sizes, (3, 10), accuracies, spreads)]
        elif part == "paired":
            settings = [(s, r, a, v, 0) for s, r, a, v in itertools.product(sizes, draws[1:], accuracies, spreads)]
        elif part == "worst":
            tries = ((100, 5), (20, 5), (5, 2))
            settings = [(s, r, a, v, k) for s, (r, k), a, v in itertools.product(sizes, tries, accuracies[1:], spreads)]
        elif part == "batches":
            settings = [(s, 1, a, v, b) for s, b, a, v in itertools.product((1000, 256), (1, 4, 10), accuracies[1:], spreads)]
        elif part == "until":
            settings = [(2000, r, a, v, w) for r, a, v, w in itertools.product((20, 5), accuracies[1:], spreads[:3], (4, 10))]
        else:
            raise SystemExit(f"unknown part {part!r}; there are grid, exact, paired, worst, batches, until")
        found += [Cell(part, s, r, a, v, u, t, extra) for (s, r, a, v, extra), (u, t) in itertools.product(settings, outcome)]
    return found


def summary(found: list[Found], repetitions: int, seed: int) -> str:
    """Return the tables of coverage in Markdown."""
    lines = [f"Simulated with {repetitions} repetitions per cell, seed {seed}. Coverage in %, width in points.", ""]
    grid = [each for each in found if each.cell.part == "grid"]
    if grid:
        lines += [*_by_size(grid), "", *_by_interval(grid)]
    others = [each for each in found if each.cell.part != "grid"]
    if others:
        lines += ["", *_by_part(others)]
    return "\n".join(lines) + "\n"


def _by_size(grid: list[Found]) -> list[str]:
    heads = [
        "images",
        "draws",
        "lowest by sd 0 / 0.3 / 1 / 2",
        "mean",
        "mean width",
        "too few said",
        "narrowest other that covers everywhere",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for size in sorted({(each.cell.num_images, each.cell.num_draws) for each in grid}):
        here = [each for each in grid if (each.cell.num_images, each.cell.num_draws) == size]
        mine = [each for each in here if each.interval == OURS]
        lowest = [min(e.coverage for e in mine if e.cell.draw_deviation == v) for v in sorted({e.cell.draw_deviation for e in mine})]
        mean = [100 * _mean(getattr(e, name) for e in mine) for name in ("coverage", "width", "short")]
        shown = " / ".join(f"{100 * value:.1f}" for value in lowest)
        lines.append(f"| {size[0]} | {size[1]} | {shown} | {mean[0]:.1f} | {mean[1]:.1f} | {mean[2]:.0f} % | {_narrowest(here)} |")
    return lines


def _narrowest(here: list[Found]) -> str:
    """Return the narrowest of the other intervals that cover in all cells, with our width as a multiple of its own."""
    width = {name: _mean(e.width for e in here if e.interval == name) for name in dict.fromkeys(e.interval for e in here)}
    covers = [name for name in CANDIDATES if min(e.coverage for e in here if e.interval == name) >= GOAL]
    if not covers:
        return "none"
    best = min(covers, key=lambda name: width[name])
    return f"{best}: ours is {width[OURS] / width[best]:.2f} times as wide"


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


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", default="grid,exact,paired,worst,batches,until")
    parser.add_argument("--json", type=Path, help="every cell and interval")
    parser.add_argument("--markdown", type=Path, help="the tables")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    tasks = [(cell, chosen.repetitions, chosen.seed) for cell in cells(chosen.parts.split(","))]
    found: list[Found] = []
    with multiprocessing.get_context("spawn").Pool(chosen.workers) as pool:
        for number, of_cell in enumerate(pool.imap_unordered(run_cell, tasks, chunksize=2), 1):
            found += of_cell
            if number % 25 == 0 or number == len(tasks):
                print(f"{number} of {len(tasks)} cells, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    text = summary(found, chosen.repetitions, chosen.seed)
    print(text)
    low = [each for each in found if each.interval == OURS and each.coverage < GOAL]
    for each in sorted(low, key=lambda one: one.coverage):
        print(f"{100 * each.coverage:.1f} % (high {each.too_high:.3f}, low {each.too_low:.3f}, width {each.width:.3f}): {each.cell}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([asdict(each) for each in found], indent=0))
    if chosen.markdown is not None:
        chosen.markdown.write_text(text)
    return int(any(each.repetitions >= 2000 for each in low))


if __name__ == "__main__":
    sys.exit(main())
