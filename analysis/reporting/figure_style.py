"""How every figure looks: one style for screen and print, colours that colour-blind readers tell apart, and how figures become files.

Figures are made without pyplot, so that nothing global is left behind: settings hold inside `style()` only. Libraries that draw through
pyplot do so inside `borrowed_pyplot()`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import matplotlib as mpl
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.files import whole_file

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 6.9
"""Inches of one column and of a page."""

# Okabe and Ito, without yellow, which does not show on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
PALE = "#AAAAAA"
"""Of what is shown and does not count."""
PRINTED = "#555555"
SUSPICIOUS = "#B00020"

Format = Literal["png", "pdf", "svg"]

_FILE_DOTS, _PAGE_DOTS = 160, 130
"""Per inch, of files and of images inside pages."""

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "rayndom",
}


@contextmanager
def style() -> Iterator[None]:
    """Settings of figures, in force inside only, or in the function that it decorates; what makes a figure needs them."""
    with mpl.rc_context(_SETTINGS):
        yield


@contextmanager
def borrowed_pyplot() -> Iterator[None]:
    """Let a library draw through pyplot: settings that it changes are as before afterwards, and the figures that it opened are closed.

    What is made of a figure is made inside.
    """
    from matplotlib import pyplot

    with mpl.rc_context(_SETTINGS):
        pyplot.switch_backend("agg")  # no window, whatever this process draws on otherwise
        before = set(pyplot.get_fignums())
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - before:
                pyplot.close(number)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path, formats: Sequence[Format] = ("png", "pdf")) -> list[Path]:
    """Write a figure once per format and return the files; folders are created, equal figures give equal files.

    Args:
        path: without ending.
    """
    written = []
    for kind in formats:
        target = Path(path).with_name(f"{Path(path).name}.{kind}")
        with whole_file(target) as file:
            _write(figure, file, kind, _FILE_DOTS)
        written.append(target)
    return written


def figure_as_png(figure: Figure) -> str:
    """Return a figure as PNG in base64, for self-contained pages."""
    buffer = io.BytesIO()
    _write(figure, buffer, "png", _PAGE_DOTS)
    return base64.b64encode(buffer.getvalue()).decode()


def _write(figure: Figure, file: BinaryIO, kind: Format, dots: int) -> None:
    undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}[kind]
    with style():
        figure.savefig(file, format=kind, dpi=dots, metadata=undated)


def color_of(place: int) -> str:
    """Return the colour of a curve; after the last one they begin again, with another line."""
    return COLORS[place % len(COLORS)]


def line_of(place: int) -> Any:
    """Return the line style of a curve."""
    return LINES[(place + place // len(COLORS)) % len(LINES)]


def marker_of(place: int) -> str:
    """Return the marker of a curve."""
    return MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
