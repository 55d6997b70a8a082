"""Outcomes with random values, so that every table and figure of the papers can be rendered without training anything."""

from __future__ import annotations

import zlib

import numpy as np

from analysis.reproduction.outcome import CellOutcome, CheckOutcome, ItemOutcome, Reading, RunOutcome
from analysis.reproduction.papers import get_item
from analysis.reproduction.papers.measures import Timing
from analysis.reproduction.papers.model import Cell, Item
from analysis.reproduction.scale import Scale

ENVIRONMENT = {
    "code": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "packages": {"torch": "2.12.1", "torchvision": "0.27.0"},
    "python": "CPython 3.12.0",
    "hardware": {"cpu": "Imaginary CPU", "cores": 2, "memory_gib": 23.4, "gpus": []},
}
SAMPLES = {"smoke": 64, "small": 500, "short": 1000, "paper": 10000}


def synthetic_outcome(
    name: str, scale: Scale = "smoke", seed: int = 0, *, honest: bool = True, missing: float = 0.0, failed: float = 0.0
) -> ItemOutcome:
    """Return an outcome of an item in which everything was measured.

    Args:
        missing: share of cells without a number, failed: of readings with a failed check.
        honest: whether the honest counterparts were measured too.
    """
    item = get_item(name).at(scale)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    runs: dict[str, RunOutcome] = {}
    cells = []
    for cell in item.cells():
        if cell.run is None:
            cells.append(CellOutcome(cell.row.key, cell.column.key))
            continue
        key = f"{cell.row.key}|{cell.column.group}" if cell.column.group in cell.row.runs else cell.row.key
        if key not in runs:
            runs[key] = _run(cell, key, seed)
        if rng.random() < missing:
            cells.append(CellOutcome(cell.row.key, cell.column.key, run=key, reason="training failed: the loss is not finite (epoch 2)"))
            continue
        paper = _reading(item, cell, scale, rng, failed)
        other = None
        measure = cell.column.measure
        if honest and measure.honest not in (None, measure) and paper.value is not None:
            other = _lower(paper, scale, rng)
        cells.append(CellOutcome(cell.row.key, cell.column.key, paper, other, key))
    return ItemOutcome(name, scale, tuple(cells), runs)


def _run(cell: Cell, key: str, seed: int) -> RunOutcome:
    assert cell.run is not None
    run = cell.run
    checks = (
        CheckOutcome("C1", "randomness alive", "PASS", "new draws change the logits of 100% of samples"),
        CheckOutcome(
            "C7", "converged steps and EOT", "FAIL", "doubling the steps to 200 changes accuracy by -4.2 points", "double the steps again"
        ),
        CheckOutcome("C9", "white box vs black box", "WARN", "0.4 % of samples broken by Square alone", "look at the gradients"),
        CheckOutcome("C13", "gradient resolved", "SKIPPED", "the study was not run"),
    )
    fingerprint = f"{zlib.crc32(f'{run.recipe} {run.overrides} {seed}'.encode()):08x}" * 2
    return RunOutcome(
        fingerprint,
        run.recipe,
        run.overrides,
        cell.row.key,
        key.partition("|")[2],
        "finished",
        3,
        41.5,
        f"mlflow{fingerprint[:10]}",
        ENVIRONMENT,
        {"paper": checks},
        {"paper": f"{run.recipe}: evaluation invalid."},
        {"defence.name": run.recipe.partition("_")[0], "training.epochs": 3, "seed": seed},
    )


def _reading(item: Item, cell: Cell, scale: Scale, rng: np.random.Generator, failed: float) -> Reading:
    count = SAMPLES[scale]
    checks = ("C7",) if rng.random() < failed else ()
    kind = item.figure.kind if item.figure is not None else ""
    place = cell.row.x if cell.row.x is not None else cell.column.x
    if kind in ("histogram", "distribution", "landscape"):
        return Reading(
            None, how=f"{kind}, n={count}", num_samples=count, num_draws=10, series=_series(item, cell, rng), failed_checks=checks
        )
    if isinstance(cell.column.measure, Timing) or cell.column.unit != "%":
        value = cell.published.value * rng.uniform(0.5, 1.5) if cell.published is not None else float(rng.uniform(0.1, 0.9))
        return Reading(value, how="as measured", num_samples=count, failed_checks=checks)
    if cell.published is not None:
        centre = cell.published.value + rng.normal(0, 1.0 if scale == "paper" else 8.0)
    else:
        centre = 80 - 45 * np.tanh((place or 0) / 15) + {"minimum": -8, "maximum": 8}.get(cell.column.group, 0) + rng.normal(0, 2)
    return _accuracy(float(np.clip(centre, 0.5, 99.5)), count, "T0", f"{cell.column.label}, 8/255, T0, R=2, n={count}", 2, checks)


def _accuracy(value: float, count: int, protocol: str, how: str, draws: int, checks: tuple[str, ...]) -> Reading:
    half = 196 * np.sqrt(value / 100 * (1 - value / 100) / count)
    return Reading(value, max(value - half, 0.0), min(value + half, 100.0), how, protocol, count, draws, failed_checks=checks)


def _lower(paper: Reading, scale: Scale, rng: np.random.Generator) -> Reading:
    value = float(np.clip(paper.value - rng.uniform(4, 25), 0.5, 99.5))
    count = SAMPLES[scale] // 2
    return _accuracy(value, count, "T1", f"EOT x 20, 8/255, T1, R=50, n={count}", 50, paper.failed_checks)


def _series(item: Item, cell: Cell, rng: np.random.Generator) -> dict:
    assert item.figure is not None
    if item.figure.kind == "histogram":
        if cell.row.key == cell.column.key:
            return {"values": [1.0] * 200}
        return {"values": np.clip(rng.normal(rng.uniform(-0.1, 0.7), 0.15, 200), -1, 1).tolist()}
    if item.figure.kind == "distribution":
        constrained = cell.row.group == "CTRW"
        return {"values": rng.lognormal(-2 if constrained else -5, 0.2 if constrained else 0.6, 400).tolist()}
    axis = np.linspace(-8 / 255, 8 / 255, 15)
    x, y = np.meshgrid(axis, axis)
    surfaces = [
        1 + 30 * rng.uniform(0.5, 1.5) * x + 900 * rng.uniform(0, 2) * y**2 + 0.15 * np.sin(rng.uniform(80, 250) * (x + y))
        for _ in range(2)
    ]
    places = {"x": axis.tolist(), "y": axis.tolist()}
    if item.name.startswith("red."):
        return {"grids": [surface.tolist() for surface in surfaces], "labels": ["member 1", "member 2"], **places}
    return {"grid": surfaces[0].tolist(), **places}
