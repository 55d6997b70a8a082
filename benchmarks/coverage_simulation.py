"""Simulated evaluations whose accuracy is known, and what intervals say of them: the cells of `benchmarks.coverage`.

Shapes: S images, R draws, N experiments, Q nodes of a quadrature.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from analysis.statistics import accuracy_interval, paired_difference, worst_of_k_accuracy
from analysis.statistics.stopping import MOST_DOUBLINGS, planned_looks
from benchmarks.interval_candidates import CANDIDATES, Counts, percentile_bootstrap
from benchmarks.stopping_coverage import BLOCK, most_draws, stop

OURS = "rayndom"
UNCORRECTED = "each look at 95 %"
BOOTSTRAP = "percentile bootstrap, two-way"
GOAL = 0.93
"""Coverage from which a cell holds: 94 %, as 2,000 repetitions measure it."""

_AIM = 0.94
_SURE = 0.999  # level of the bound that lets a cell end after its first repetitions
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


@dataclass
class Runs:
    """Repetitions of one cell: ends of intervals by name (low, high, whether too few was said), and the truth of each repetition."""

    ends: dict[str, NDArray[Any]]
    truth: FloatArray


def run_cell(task: tuple[Cell, int, int, int]) -> tuple[Cell, list[Found]]:
    """Simulate one cell: `(cell, first, repetitions, seed)`."""
    cell, first, repetitions, seed = task
    rng = np.random.default_rng([seed, *os.fsencode(repr(cell))])
    simulate = {"grid": _grid, "between": _grid, "exact": _exact, "paired": _paired, "worst": _worst, "batches": _batches, "until": _until}[
        cell.part
    ]
    parts = [simulate(cell, min(first, repetitions), rng)]
    if first < repetitions and not _beyond_doubt(_found(cell, OURS, parts)):
        parts.append(simulate(cell, repetitions - first, rng))
    return cell, [_found(cell, name, parts) for name in parts[0].ends]


def _beyond_doubt(found: Found) -> bool:
    """Return whether a cell covers more than the goal whatever further repetitions would show."""
    held = round(found.coverage * found.repetitions)
    return float(stats.beta.ppf(1 - _SURE, held, found.repetitions - held + 1)) > _AIM


def _grid(cell: Cell, repetitions: int, rng: np.random.Generator) -> Runs:
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
    counts = Counts(image_NS, draw_NR)
    ends: dict[str, Any] = {OURS: ours, BOOTSTRAP: bootstrapped}
    ends |= {name: np.stack(candidate(counts), axis=1) for name, candidate in CANDIDATES.items()}
    return Runs({name: np.array(each, dtype=float) for name, each in ends.items()}, np.full(repetitions, cell.accuracy))


def _exact(cell: Cell, repetitions: int, rng: np.random.Generator) -> Runs:
    world, ours, truth = World(cell), [], []
    for index in range(repetitions):
        draw_R = world.draws(rng)
        weights = rng.dirichlet(np.ones(cell.num_draws)) if index % 2 else np.full(cell.num_draws, 1 / cell.num_draws)
        estimate = accuracy_interval(world.outcomes(rng, world.images(rng), draw_R), cell.num_draws, weights_R=weights)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
        truth.append(float(world.for_draw(draw_R) @ weights))
    return _of_ours(ours, np.array(truth))


def _paired(cell: Cell, repetitions: int, rng: np.random.Generator) -> Runs:
    world, ours = World(cell), []
    other = World(replace(cell, accuracy=min(1.5 * cell.accuracy, 0.6)))
    for _ in range(repetitions):
        image_S, common = rng.standard_normal((2, cell.num_images))
        second_S = other.intercept + cell.image_deviation * (0.8 * image_S + 0.6 * common)
        first = world.outcomes(rng, world.intercept + cell.image_deviation * image_S, world.draws(rng))
        estimate = paired_difference(first, other.outcomes(rng, second_S, other.draws(rng)))
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
    return _of_ours(ours, np.full(repetitions, cell.accuracy - other.cell.accuracy))


def _worst(cell: Cell, repetitions: int, rng: np.random.Generator) -> Runs:
    world, ours = World(cell), []
    for _ in range(repetitions):
        estimate = worst_of_k_accuracy(world.outcomes(rng, world.images(rng), world.draws(rng)), cell.extra)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
    return _of_ours(ours, np.full(repetitions, world.worst_of(cell.extra)))


def _batches(cell: Cell, repetitions: int, rng: np.random.Generator) -> Runs:
    world, ours = World(cell), []
    batches_S = np.arange(cell.num_images) * cell.extra // cell.num_images
    for _ in range(repetitions):
        correct = world.outcomes(rng, world.images(rng), world.draws(rng, cell.extra))[np.arange(cell.num_images), batches_S]
        estimate = accuracy_interval(correct, batches_S=batches_S)
        ours.append((estimate.low, estimate.high, bool(estimate.shortage)))
    return _of_ours(ours, np.full(repetitions, cell.accuracy))


def _until(cell: Cell, repetitions: int, rng: np.random.Generator) -> Runs:
    world, width = World(cell), cell.extra / 100
    looks = planned_looks(cell.num_images, BLOCK, width, doublings=MOST_DOUBLINGS)
    ends: dict[str, list[tuple[float, float, bool]]] = {OURS: [], UNCORRECTED: []}
    for _ in range(repetitions):
        correct = world.outcomes(rng, world.images(rng), world.draws(rng, most_draws(cell.num_draws)))
        for name, found in ends.items():
            stopped = stop(correct, cell.num_draws, looks, width, corrected=name == OURS)
            found.append((stopped.low, stopped.high, not stopped.reached))
    return Runs({name: np.array(each, dtype=float) for name, each in ends.items()}, np.full(repetitions, cell.accuracy))


def _of_ours(ends: list[tuple[float, float, bool]], truth: FloatArray) -> Runs:
    return Runs({OURS: np.array(ends, dtype=float)}, truth)


def _found(cell: Cell, name: str, parts: list[Runs]) -> Found:
    table = np.concatenate([part.ends[name] for part in parts])
    # The bootstrap looks at every so many experiments; where it does, the truth is the same for all.
    truth = np.concatenate([part.truth[: len(part.ends[name])] for part in parts])
    low, high = table[:, 0], table[:, 1]
    above, below = low > truth + 1e-12, high < truth - 1e-12
    short = float(table[:, 2].mean()) if table.shape[1] > 2 else 0.0
    coverage, width = float(1 - (above | below).mean()), float((high - low).mean())
    return Found(cell, name, len(truth), coverage, float(above.mean()), float(below.mean()), width, short)


def cells(parts: Iterable[str]) -> list[Cell]:
    """Return the cells of the parts asked for, the slow ones first."""
    sizes, draws, accuracies, spreads = (1000, 100, 30), (100, 20, 5), (0.005, 0.02, 0.05, 0.5), (0.0, 0.3, 1.0, 2.0)
    outcome = list(itertools.product((1.0, 4.0), (False, True)))
    found: list[Cell] = []
    for part in parts:
        if part == "grid":
            settings = [(s, r, a, v, 0) for s, r, a, v in itertools.product(sizes, draws, accuracies, spreads)]
        elif part == "between":
            settings = [(s, r, a, v, 0) for s, r, a, v in itertools.product(sizes, draws, (0.1, 0.15, 0.2, 0.3), spreads[2:])]
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
            raise SystemExit(f"unknown part {part!r}; there are grid, between, exact, paired, worst, batches, until")
        found += [Cell(part, s, r, a, v, u, t, extra) for (s, r, a, v, extra), (u, t) in itertools.product(settings, outcome)]
    return found


def version() -> str:
    """Return a hash of what the simulation and the intervals compute on a few experiments of each part."""
    probes = [cell for cell in cells(("grid", "exact", "paired", "worst", "batches")) if cell.num_images <= 256][::37]
    found = [run_cell((cell, 2, 2, 0))[1] for cell in probes]
    numbers = [f"{value:.7f}" for each in found for one in each for value in (one.too_high, one.too_low, one.width, one.short)]
    return hashlib.sha256(" ".join(numbers).encode()).hexdigest()[:16]
