"""Figures of an item, one module per family; `draw` chooses by the kind that the item names."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from analysis.reporting.figure_style import style
from analysis.reproduction.figures import bars, curves, distributions, heatmaps, landscapes
from analysis.reproduction.figures.scale_mark import watermark
from analysis.reproduction.view import ItemView, has_series

_DRAWERS: dict[str, dict[str, Callable[[ItemView], Figure]]] = {
    "line": {"": curves.draw_lines},
    "band": {"": curves.draw_bands},
    "heatmap": {"": heatmaps.draw_heatmaps},
    "histogram": {"": distributions.draw_histograms},
    "distribution": {"": distributions.draw_boxes},
    "landscape": {"surface": landscapes.draw_surfaces, "contour": landscapes.draw_contours},
    "bars": {"": bars.draw_bars},
    "illustration": {},
}


def draw(view: ItemView) -> dict[str, Figure]:
    """Return the figures of an item by file name; none for tables, for illustrations, and where there is nothing to draw.

    What the paper prints is drawn even where nothing was measured.
    """
    item = view.item
    if item.figure is None or not _has_something(view):
        return {}
    drawn = {}
    with style():
        for part, drawer in _DRAWERS[item.figure.kind].items():
            figure = drawer(view)
            watermark(figure, view)
            drawn["_".join(filter(None, (item.short_name, part)))] = figure
    return drawn


def _has_something(view: ItemView) -> bool:
    assert view.item.figure is not None
    if view.item.figure.kind in ("histogram", "distribution", "landscape"):
        return any(has_series(cell.paper) for cell in view.cells())
    return any(cell.readings or cell.printed for cell in view.cells())


__all__ = ["draw"]
