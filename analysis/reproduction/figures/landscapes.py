"""Loss landscapes in input space: as surfaces and as contours, all networks of an item on one scale of colour and height."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D

from analysis.reporting import figure_style as style
from analysis.reproduction.outcome import Reading
from analysis.reproduction.view import ItemView, finite

_MAP = "viridis"
_ACROSS = 3
_PIXELS = 255
_TITLE_WRAP = 34
_HEIGHT = "height: loss; distances of 255"


@dataclass(frozen=True)
class Landscape:
    """Loss surfaces of one row. `surfaces[i][a, b]`: loss at `y[a]`, `x[b]`, of the surface `names[i]`; `reason`: why there is none."""

    title: str
    x: np.ndarray
    y: np.ndarray
    surfaces: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    reason: str = ""


def draw_surfaces(view: ItemView) -> Figure:
    """Draw each row's losses as a surface; several members of an ensemble lie over one another in their colours."""
    found, ends = _landscapes(view)
    figure, panels = _figure(len(found), {"projection": "3d"})
    for axes, landscape in zip(panels, found, strict=True):
        _surface(axes, landscape, Normalize(*ends), view)
    _members(figure, found, _HEIGHT)
    return figure


def draw_contours(view: ItemView) -> Figure:
    """Draw each row's losses as filled contours with the image in the middle; members of an ensemble as contour lines."""
    found, ends = _landscapes(view)
    figure, panels = _figure(len(found), {})
    norm = Normalize(*ends)
    levels = MaxNLocator(12).tick_values(*ends)
    filled = None
    for place, (axes, landscape) in enumerate(zip(panels, found, strict=True)):
        axes.set_title(landscape.title, loc="left")
        axes.set_aspect("equal")
        if place + _ACROSS >= len(panels):
            axes.set_xlabel(f"{_short(view, 'x')}, of 255")
        if place % _ACROSS == 0:
            axes.set_ylabel(f"{_short(view, 'y')}, of 255")
        axes.grid(False)
        if landscape.reason:
            _empty(axes, landscape.reason)
            continue
        x, y = np.meshgrid(landscape.x, landscape.y)
        if len(landscape.surfaces) == 1:
            filled = axes.contourf(x, y, landscape.surfaces[0], levels=levels, cmap=_MAP, norm=norm)
            axes.contour(x, y, landscape.surfaces[0], levels=levels, colors="white", linewidths=0.35, alpha=0.7)
        else:
            for index, surface in enumerate(landscape.surfaces):
                lines = axes.contour(
                    x, y, surface, levels=levels, colors=style.color_of(index), linestyles=style.line_of(index), linewidths=0.9
                )
                axes.clabel(lines, lines.levels[::4], fontsize=5.5, fmt="%.2g")
        axes.plot([0], [0], marker="+", color="black", markersize=7, markeredgewidth=1.2)
    if filled is not None:
        bar = figure.colorbar(filled, ax=panels, shrink=0.85, pad=0.02)
        bar.set_label("loss")
        bar.outline.set_linewidth(0.5)
    _members(figure, found)
    return figure


def _landscapes(view: ItemView) -> tuple[list[Landscape], tuple[float, float]]:
    found = []
    for row in view.item.rows:
        cell = view.cell(row.key, view.item.columns[0].key)
        reading = cell.paper if cell is not None else None
        title = textwrap.fill(f"{row.label} (not in the paper)" if row.extra else row.label, _TITLE_WRAP)
        if reading is None or not ({"grid", "grids"} & set(reading.series)):
            found.append(Landscape(title, np.array([]), np.array([]), (), (), cell.reason if cell is not None else ""))
            continue
        found.append(_landscape(title, reading))
    values = finite([value for each in found for surface in each.surfaces for value in surface.reshape(-1)])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return found, (low, high if high > low else low + 1.0)


def _landscape(title: str, reading: Reading) -> Landscape:
    series = reading.series
    grids = series["grids"] if "grids" in series else [series["grid"]]
    names = tuple(series.get("labels", [f"member {index + 1}" for index in range(len(grids))]))
    x, y = (_PIXELS * np.asarray(series[axis], dtype=float) for axis in ("x", "y"))
    title = f"{title} (!)" if reading.failed_checks else title
    return Landscape(title, x, y, tuple(np.asarray(grid, dtype=float) for grid in grids), names)


def _figure(count: int, subplot: dict[str, Any]) -> tuple[Figure, list[Any]]:
    assert Axes3D.name == "3d"  # its import registers the projection
    across = min(count, _ACROSS)
    down = -(-count // across)
    # A single landscape is as wide as a column, with room for the height scale beside it.
    figure = style.new_figure(min(style.PAGE_WIDTH, 3.3 * across), (2.6 if across < _ACROSS else 2.3) * down + 0.3)
    panels = figure.subplots(down, across, squeeze=False, subplot_kw=subplot)
    for axes in panels.ravel()[count:]:
        axes.remove()
    return figure, list(panels.ravel()[:count])


def _surface(axes: Any, landscape: Landscape, norm: Normalize, view: ItemView) -> None:
    axes.set_title(landscape.title, loc="left", pad=-2)
    if landscape.reason:
        _empty(axes, landscape.reason)
        axes.set_axis_off()
        return
    x, y = np.meshgrid(landscape.x, landscape.y)
    for index, surface in enumerate(landscape.surfaces):
        if len(landscape.surfaces) == 1:
            axes.plot_surface(x, y, surface, cmap=_MAP, norm=norm, linewidth=0.15, edgecolor="#00000030", rcount=50, ccount=50)
        else:
            axes.plot_surface(x, y, surface, color=style.color_of(index), alpha=0.55, linewidth=0.15, edgecolor="#00000025")
    axes.set_zlim(norm.vmin, norm.vmax)
    axes.view_init(elev=26, azim=-58)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.88)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.tick_params(pad=-2, labelsize=5.5)
    axes.set_xlabel(_short(view, "x"), labelpad=-5, fontsize=6.5)
    axes.set_ylabel(_short(view, "y"), labelpad=-5, fontsize=6.5)
    # Matplotlib leaves no room for the label of a height axis: the figure says what the height is.


def _members(figure: Figure, found: list[Landscape], remark: str = "") -> None:
    names = max((landscape.names for landscape in found if len(landscape.surfaces) > 1), key=len, default=())
    handles = [
        Line2D([], [], color=style.color_of(index), linestyle=style.line_of(index), linewidth=1.6, label=name)
        for index, name in enumerate(names)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), title=remark or None, title_fontsize=7)
    elif remark:
        figure.supxlabel(remark, fontsize=7, color=style.PRINTED)


def _empty(axes: Any, reason: str) -> None:
    place = axes.text2D if hasattr(axes, "text2D") else axes.text
    place(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", fontsize=6.5, color=style.PRINTED, wrap=True)


def _short(view: ItemView, axis: str) -> str:
    return _label(view, axis).removeprefix("along ").removeprefix("the ").partition(" (")[0]


def _label(view: ItemView, axis: str) -> str:
    figure = view.item.figure
    assert figure is not None
    return figure.x_label if axis == "x" else figure.y_label
