"""Figures of a reproduction: every kind draws, shows what is printed, and carries its scale."""

from __future__ import annotations

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest

from analysis.reporting.figure_style import save_figure
from analysis.reproduction.figures import draw
from analysis.reproduction.outcome import Reading
from analysis.reproduction.papers import get_item, papers
from analysis.reproduction.view import ItemView, view_of
from tests.reproduction.synthetic import synthetic_outcome

FIGURES = [item for paper in papers().values() for item in paper.items if item.kind == "figure" and item.rows]
ONE_OF_EACH = ["ctrw.fig3b", "rna.fig5c", "rna.fig1d", "dcs.fig6a", "rna.fig3", "ctrw.fig3a", "rat.fig2", "red.fig1", "dcs.fig4a"]


def texts(figure) -> list[str]:
    """Return all texts of a figure."""
    return [text.get_text() for text in figure.findobj(mpl.text.Text)]


def drawn(name, scale="smoke", **options):
    """Return the figures of an item with random values."""
    return draw(view_of(synthetic_outcome(name, scale, **options)))


def test_all_kinds_are_among_those_looked_at():
    kinds = {get_item(name).figure.kind for name in ONE_OF_EACH}
    assert kinds == {item.figure.kind for item in FIGURES} == {"line", "band", "heatmap", "histogram", "distribution", "landscape", "bars"}


@pytest.mark.parametrize("item", FIGURES, ids=lambda item: item.name)
def test_every_figure_of_the_papers_is_drawn_with_its_scale(item):
    figures = drawn(item.name, missing=0.15, failed=0.15)
    assert figures
    for name, figure in figures.items():
        assert name.startswith(item.name.partition(".")[2])
        found = texts(figure)
        assert any(text.startswith("smoke scale") and "n = " in text for text in found)
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert found.count("smoke scale") >= len(panels) > 0, "across each panel, so that no crop passes for full scale"


@pytest.mark.parametrize("name", ["ctrw.fig3d", "rna.fig2a"])
def test_figures_are_written_reproducibly_as_png_and_pdf(name, tmp_path):
    for copy in ("a", "b"):
        for part, figure in drawn(name).items():
            save_figure(figure, tmp_path / copy / part)
    first, second = (sorted((tmp_path / copy).iterdir()) for copy in ("a", "b"))
    assert {path.suffix for path in first} == {".png", ".pdf"}
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_full_scale_figure_has_no_mark():
    (figure,) = drawn("ctrw.fig3b", "paper").values()
    assert not any("scale" in text for text in texts(figure))


def test_both_protocols_stand_side_by_side_and_printed_values_are_hollow():
    (figure,) = drawn("rna.fig5a").values()
    ours, honest = figure.axes
    assert (ours.get_title("left"), honest.get_title("left")) == ("paper's protocol", "honest protocol")
    assert ours.get_xlabel() == "PGD steps"
    assert "accuracy in %" in ours.get_ylabel()
    outcome = synthetic_outcome("rna.fig5a")
    curve = next(line for line in ours.lines if np.isclose(line.get_ydata()[0], outcome.cell("rna", "steps_10").paper.value))
    assert list(curve.get_xdata()) == list(range(10, 101, 10))
    hollow = [line for line in ours.lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_ydata()) for line in hollow] == [[60.70, 59.94]]
    assert not [line for line in honest.lines if line.get_markerfacecolor() == "none"]


def test_without_honest_numbers_there_is_one_panel():
    (figure,) = drawn("rna.fig5a", honest=False).values()
    assert len(figure.axes) == 1


def test_missing_points_leave_gaps_and_failed_checks_a_cross():
    outcome = synthetic_outcome("ctrw.fig3c")
    cells = list(outcome.cells)
    cells[3] = dataclasses.replace(cells[3], paper=None, honest=None, reason="not run")
    cells[5] = dataclasses.replace(cells[5], paper=Reading(50.0, 40.0, 60.0, num_samples=64, failed_checks=("C7",)))
    (figure,) = draw(view_of(dataclasses.replace(outcome, cells=tuple(cells)))).values()
    curve, cross = figure.axes[0].lines
    assert np.isnan(curve.get_ydata()[3])
    assert (list(cross.get_xdata()), list(cross.get_ydata()), cross.get_marker()) == ([50], [50.0], "x")
    assert "a check failed" in texts(figure)


def test_heatmaps_show_ours_and_the_printed_number():
    outcome = synthetic_outcome("rna.fig1d")
    (figure,) = draw(view_of(outcome)).values()
    value = outcome.cell("bn", "ln").paper.value
    assert f"{value:.1f}\n(71.29)" in texts(figure)
    (plane,) = drawn("dcs.fig6a", honest=False).values()
    image = plane.axes[0].images[0].get_array()
    assert image.shape == (5, 6)
    assert image.mask.sum() == 2, "k = 3 has no more than 4 taps"


def test_landscapes_put_the_gradient_on_the_horizontal_axis():
    x, y = [-0.1, 0.0, 0.1], [-0.2, 0.0, 0.2]
    grid = [[10 * b + a for b in range(3)] for a in range(3)]  # grid[i][j] at y[i], x[j]
    outcome = synthetic_outcome("rna.fig2a")
    (cell,) = outcome.cells
    cell = dataclasses.replace(cell, paper=Reading(None, series={"grid": grid, "x": x, "y": y}, num_samples=1))
    figures = draw(view_of(dataclasses.replace(outcome, cells=(cell,))))
    assert set(figures) == {"fig2a_surface", "fig2a_contour"}
    surface = figures["fig2a_surface"].axes[0]
    (width, height) = (np.ptp(limits()) for limits in (surface.get_xlim3d, surface.get_ylim3d))
    assert height == pytest.approx(2 * width)
    assert width == pytest.approx(51, rel=0.2), "in 255ths"
    assert "sign of the gradient" in figures["fig2a_contour"].axes[0].get_xlabel()


def test_a_figure_without_an_outcome_shows_what_is_printed():
    (figure,) = draw(ItemView(get_item("rna.fig5a"), None)).values()
    assert any("printed values" in text for text in texts(figure))
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[60.70, 59.94]]
    assert draw(ItemView(get_item("ctrw.fig3c"), None)) == {}, "nothing printed, nothing measured"
    assert draw(ItemView(get_item("ctrw.fig1"), None)) == {}, "an illustration"
    assert draw(ItemView(get_item("ctrw.table1"), None)) == {}, "a table"


def test_drawing_leaves_global_settings_alone():
    before = dict(mpl.rcParams)
    drawn("ctrw.fig3a")
    assert dict(mpl.rcParams) == before
