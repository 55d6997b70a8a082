"""Figures of an evaluation: accuracy over radius, steps and draws, spread over attacks, and example images. PNG and PDF, no display.

Every function takes what it draws and returns a Figure; `figure_style.save_figure` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.evaluation.images import decode_png
from analysis.evaluation.measurements import Measurement, measurements
from analysis.reporting.figure_style import COLORS, PALE, SUSPICIOUS, new_figure, style
from analysis.result import EvaluationResult
from analysis.statistics import Estimate
from models.threat_model import parse_pixel_fraction

_SIZE = (4.6, 3.2)

Point = tuple[float, Estimate]


def epsilon_curve(result: EvaluationResult) -> list[Point]:
    """Return (radius, accuracy) of the study of the radius, with the clean accuracy at 0; empty if it was not run."""
    points = [(each.header["study"]["level"], each.estimate) for each in _studies(result, "epsilon")]
    if points and result.clean is not None:
        points.append((0.0, result.clean))
    return sorted(points, key=lambda point: point[0])


def convergence_curve(result: EvaluationResult, name: str) -> list[tuple[int, float]]:
    """Return (level, accuracy) of the doublings of `steps` or `draws`; a block that had converged counts with its last accuracy."""
    blocks = [(record["block"]["study"], len(record["samples"]["ids"])) for each in _studies(result, name) for record in each.records]
    levels = sorted({level for facts, _ in blocks for level in facts["levels"]})
    curve = []
    for level in levels:
        reached = [
            (next(a for s, a in zip(reversed(facts["levels"]), reversed(facts["accuracies"]), strict=True) if s <= level), size)
            for facts, size in blocks
            if facts["levels"][0] <= level
        ]
        curve.append((level, sum(a * size for a, size in reached) / sum(size for _, size in reached)))
    return curve


def loss_curve(result: EvaluationResult) -> list[float]:
    """Return the best mean loss of surviving images along the attack, of the first block; empty if the study was not run."""
    found = _studies(result, "progress")
    return list(found[0].records[0]["block"]["study"]["loss"]) if found else []


@style()
def plot_epsilon(result: EvaluationResult, title: str = "") -> Figure | None:
    """Draw accuracy over the radius with 95 % intervals; None without that study."""
    points = epsilon_curve(result)
    if not points:
        return None
    figure, axes = _axes(title)
    levels = [255 * level for level, _ in points] if result.header["threat_model"]["norm"] == "linf" else [level for level, _ in points]
    _band(axes, levels, [estimate for _, estimate in points])
    radius = parse_pixel_fraction(result.header["threat_model"]["epsilon"])
    linf = result.header["threat_model"]["norm"] == "linf"
    axes.axvline(255 * radius if linf else radius, color=PALE, linestyle=":", linewidth=1)
    axes.set_xscale("symlog", linthresh=max(min((level for level in levels if level > 0), default=1.0), 1e-6))
    _label(axes, "radius (linf, of 255)" if linf else "radius (l2)", "accuracy in %", result.marked)
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    return figure


@style()
def plot_convergence(result: EvaluationResult, name: str, title: str = "") -> Figure | None:
    """Draw accuracy over doublings of `steps` or `draws`; None without that study."""
    curve = convergence_curve(result, name)
    if not curve:
        return None
    figure, axes = _axes(title)
    axes.plot([level for level, _ in curve], [100 * accuracy for _, accuracy in curve], marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks([level for level, _ in curve], [str(level) for level, _ in curve])
    lowest, highest = 100 * min(accuracy for _, accuracy in curve), 100 * max(accuracy for _, accuracy in curve)
    axes.set_ylim(max(lowest - 5, -2), min(highest + 5, 102))  # so that a change of a point does not look like a cliff
    _label(axes, "steps of the attack" if name == "steps" else "draws averaged per gradient", "accuracy in %", result.marked)
    return figure


@style()
def plot_loss(result: EvaluationResult, title: str = "") -> Figure | None:
    """Draw the loss of surviving images along the attack; None without that study."""
    curve = loss_curve(result)
    if not curve:
        return None
    figure, axes = _axes(title)
    axes.plot(range(len(curve)), curve)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _label(axes, "points looked at", "best mean loss", result.marked)
    return figure


@style()
def plot_attacks(result: EvaluationResult, title: str = "") -> Figure:
    """Draw the accuracy of every attack and protocol with 95 % intervals; hollow: outside the threat model."""
    rows = list(reversed(result.rows))
    figure = new_figure(_SIZE[0] + 1.6, 0.9 + 0.24 * len(rows))
    axes = figure.subplots()
    for height, row in enumerate(rows):
        estimate = row.estimate
        whiskers = [[100 * max(estimate.value - estimate.low, 0)], [100 * max(estimate.high - estimate.value, 0)]]
        filled = "full" if row.in_threat_model else "none"
        axes.errorbar([100 * estimate.value], [height], xerr=whiskers, marker="o", markersize=4, fillstyle=filled, color=COLORS[0])
    if result.headline is not None:
        axes.axvline(100 * result.headline.value, color=COLORS[1], linewidth=1, label="worst attack per sample (T1)")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1))  # above: rows fill the axes
    axes.set_yticks(range(len(rows)), [f"{row.attack}, {row.protocol}" for row in rows])
    axes.set_title(title)
    _label(axes, "accuracy in %", "", result.marked)
    axes.set_xlim(-2, 102)
    return figure


@style()
def plot_examples(result: EvaluationResult, attack: str | None = None, title: str = "") -> Figure | None:
    """Draw the first images, their perturbed versions and the perturbations, stretched to the radius; None without images.

    Args:
        attack: name of the row; None: the T1 attack that is the worst for most samples.
    """
    clean = _images(result, None)
    if attack is None and result.headline_attacks:
        attack = max(result.headline_attacks, key=lambda name: result.headline_attacks[name])
    perturbed = _images(result, attack) if attack is not None else []
    if not clean or not perturbed:
        return None
    count = min(len(clean), len(perturbed))
    figure = new_figure(1.1 * count + 0.9, 3.6)
    grid = figure.subplots(3, count, squeeze=False)
    for column in range(count):
        change = perturbed[column].astype(float) - clean[column].astype(float)
        stretched = 0.5 + 0.5 * change / max(np.abs(change).max(), 1.0)
        for line, (name, picture) in enumerate(
            (("image", clean[column] / 255), (str(attack), perturbed[column] / 255), ("change, stretched", stretched))
        ):
            axes = grid[line][column]
            axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(name)
    figure.suptitle(title)
    return figure


def figures_of(result: EvaluationResult) -> dict[str, Figure]:
    """Return all figures that the result has data for, by name."""
    drawn = {
        "attacks": plot_attacks(result),
        "epsilon": plot_epsilon(result),
        "steps": plot_convergence(result, "steps"),
        "draws": plot_convergence(result, "draws"),
        "loss": plot_loss(result),
        "examples": plot_examples(result),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _studies(result: EvaluationResult, name: str) -> list[Measurement]:
    wanted = [record for record in result.records if record["header"]["kind"] == "study" and record["header"]["study"]["name"] == name]
    return measurements(wanted)


def _images(result: EvaluationResult, attack: str | None) -> list[np.ndarray]:
    for record in result.records:
        item = record["header"]["item"]
        name = item["name"] if item else None
        if record["header"]["kind"] in ("clean", "attack") and name == attack and record["block"].get("examples"):
            return [decode_png(text) for text in record["block"]["examples"]]
    return []


def _axes(title: str) -> tuple[Figure, Any]:
    figure = new_figure(*_SIZE)
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _band(axes: Any, levels: Sequence[float], estimates: Sequence[Estimate]) -> None:
    axes.plot(levels, [100 * estimate.value for estimate in estimates], marker="o", markersize=4)
    low, high = ([100 * getattr(estimate, side) for estimate in estimates] for side in ("low", "high"))
    axes.fill_between(levels, low, high, alpha=0.2, linewidth=0)


def _label(axes: Any, x: str, y: str, marked: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if marked:
        axes.text(
            0.5,
            0.5,
            "evaluation invalid",
            transform=axes.transAxes,
            ha="center",
            va="center",
            rotation=25,
            color=SUSPICIOUS,
            alpha=0.4,
            fontsize=16,
        )


__all__ = [
    "convergence_curve",
    "epsilon_curve",
    "figures_of",
    "loss_curve",
    "plot_attacks",
    "plot_convergence",
    "plot_epsilon",
    "plot_examples",
    "plot_loss",
]
