"""The mark of reduced scales: written across a figure, so that it never passes for one at full scale."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from mpl_toolkits.mplot3d import Axes3D

from analysis.reporting.figure_style import PRINTED
from analysis.reproduction.scale import Scale
from analysis.reproduction.view import NOT_RUN, ItemView

SCALE_COLORS: dict[Scale, str] = {"smoke": "#B00020", "small": "#6A3D9A", "short": "#8A5A00", "paper": "#00664F"}

_IN_FRONT = 10_000  # surfaces get their order from their distance to the eye


def scale_text(view: ItemView) -> str:
    """Return what is written across a figure of a reduced scale; empty at paper scale, and where nothing was run."""
    if view.scale in (None, "paper"):
        return ""
    counts = sorted({reading.num_samples for cell in view.cells() for reading in cell.readings if reading.num_samples is not None})
    samples = f", n = {counts[0]}" if len(counts) == 1 else f", n = {counts[0]} to {counts[-1]}" if counts else ""
    return f"{view.scale} scale{samples}"


def watermark(figure: Figure, view: ItemView) -> None:
    """Write a reduced scale across every pair of axes and above the figure, so that no crop of it passes for a full-scale one."""
    text = scale_text(view)
    if not text:
        if view.scale is None:
            figure.suptitle(f"printed values; {NOT_RUN}", fontsize=7, color=PRINTED, ha="right", x=0.99)
        return
    color = SCALE_COLORS[view.scale or "smoke"]
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            continue
        place = axes.text2D if isinstance(axes, Axes3D) else axes.text
        place(
            *(0.5, 0.5, f"{view.scale} scale"),
            transform=axes.transAxes,
            ha="center",
            va="center",
            rotation=28,
            color=color,
            alpha=0.22,
            fontsize=16,
            fontweight="bold",
            zorder=_IN_FRONT if isinstance(axes, Axes3D) else 5,
            path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.35)],  # dark maps would swallow it
        )
    figure.suptitle(text, fontsize=7, color=color, fontweight="bold", ha="right", x=0.99)
