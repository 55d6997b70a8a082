"""The data of the papers: complete, consistent, and made of measurements that exist."""

from __future__ import annotations

import inspect
import math

import pytest

from analysis.quantities.quantity import quantity
from analysis.reproduction.papers import get_item, get_paper, list_items, list_papers, papers
from analysis.reproduction.papers.measures import Accuracy, Clean, Theory, TransferAccuracy, WorstCase, suite_row
from analysis.reproduction.papers.model import Column, Item, Note, Published, Row, Run, grid
from models.errors import UserError

ITEMS = [get_item(name) for name in list_items()]
MEASURES = [(item.name, column.key, column.measure) for item in ITEMS for column in item.columns]


def test_the_five_papers_and_the_comparison_are_there():
    assert list_papers() == ["common", "ctrw", "dcs", "rat", "red", "rna"]
    assert {item.name.partition(".")[0] for item in ITEMS} == set(list_papers())
    assert get_paper("dcs").venue == "ICML 2025"
    assert all(paper.title and paper.authors and paper.protocol for paper in papers().values())


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'ctrw\.table1'"):
        get_item("ctrw.tabel1")
    with pytest.raises(UserError, match="'dcs'"):
        get_paper("dsc")
    with pytest.raises(UserError, match="'wrn34/ctrw'"):
        get_item("ctrw.table1").row("wrn34/ctwr")


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_every_cell_is_run_quoted_or_said_to_have_nothing_to_run(item):
    if item.nothing_to_run:
        assert not item.rows and item.figure.kind == "illustration"
        return
    assert item.rows and item.columns
    for cell in item.cells():
        if cell.run is None:
            assert cell.row.quoted and cell.published is not None
        else:
            assert not cell.row.quoted
        assert not (cell.row.extra and cell.published)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_figures_carry_their_axes(item):
    if item.figure is None or item.figure.kind in ("illustration", "bars"):
        return
    if item.figure.kind == "heatmap":
        by_points = all(row.x is not None and row.y is not None for row in item.rows)
        assert by_points or [row.key for row in item.rows] == [column.key for column in item.columns]
    elif item.figure.kind in ("line", "band"):
        points = item.rows if item.figure.curves == "columns" else item.columns
        assert all(point.x is not None for point in points)
    assert item.figure.x_label or item.figure.kind == "distribution"


@pytest.mark.parametrize(("item", "column", "measure"), MEASURES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_measurement_exists(item, column, measure):
    if isinstance(measure, TransferAccuracy):
        rows = get_item(item).rows
        assert all(get_item(item).other_row(row, measure) for row in rows if not row.extra)
        measure = measure.attack
    if isinstance(measure, Accuracy):
        assert measure.item.name == measure.row_name
        assert (
            measure.honest is None or measure.honest == measure or isinstance(measure.honest, WorstCase) or measure.honest.protocol == "T1"
        )
    elif isinstance(measure, Theory):
        entry = quantity(measure.name)
        allowed = list(inspect.signature(entry.compute).parameters)[1:]
        assert set(measure.parameters) <= set(allowed), f"{measure.name} has no {set(measure.parameters) - set(allowed)}"
        assert not entry.of_two or measure.other
        if measure.other:
            get_item(item).row(measure.other)


def test_the_honest_counterpart_of_each_kind_of_attack():
    pgd = Accuracy("paper_ctrw", "pgd_20")
    assert pgd.honest == Accuracy("paper_ctrw", "pgd_20", protocol="T1", num_draws=20)
    assert pgd.honest.honest == pgd.honest
    assert Accuracy("paper_ctrw", "autoattack_of_torchattacks").honest == WorstCase("standard")
    assert Accuracy("paper_ctrw", "deepfool").honest is None, "an attack without a radius has no honest reading"
    assert Accuracy("paper_dcs", "eot_pgd_20x10").honest.num_draws == 1, "it averages by itself"
    assert Clean().honest == Clean()
    with pytest.raises(UserError, match="pgd_20"):
        suite_row("paper_ctrw", "pgd20")


def test_a_swept_attack_keeps_the_rest_of_its_suite():
    item = Accuracy("paper_rna", "pgd_20", {"steps": 70}, epsilon="4/255").item
    assert (item.attack, item.parameters["steps"], item.parameters["step_size"], item.epsilon) == ("pgd", 70, "2/255", 4 / 255)
    assert item.name == "pgd_20 steps=70 epsilon=4/255"


def test_published_numbers_are_read_as_printed():
    assert Published.parse("72.10±2.49") == Published(72.10, 2.49, "72.10±2.49")
    assert Published.parse("-0.0557").value == -0.0557
    assert Published.parse("57.91**") == Published(57.91, None, "57.91**")
    assert Published.parse("-") is None
    with pytest.raises(ValueError, match="not a published number"):
        Published.parse("about 90")


COLUMNS = (Column("a", "A", Clean()), Column("b", "B", Clean()))


def test_mistakes_in_the_data_are_found_when_it_is_written():
    rows = (Row("r", "R", run=Run("at_digits")),)
    with pytest.raises(ValueError, match="1 entries for 2 columns"):
        grid(COLUMNS, "r 1.0")
    with pytest.raises(ValueError, match="does not exist"):
        Item("p.t", "t", rows, COLUMNS, grid(COLUMNS, "q 1.0 2.0"))
    with pytest.raises(ValueError, match="unique"):
        Item("p.t", "t", rows * 2, COLUMNS)
    with pytest.raises(ValueError, match="neither run nor quoted"):
        Item("p.t", "t", (Row("r", "R"),), COLUMNS)
    with pytest.raises(ValueError, match="which does not exist"):
        Item("p.t", "t", rows, COLUMNS, notes=(Note("X", rows=("q",)),))


def test_cells_that_contradict_themselves_are_not_judged():
    table = get_item("dcs.table4")
    judged = {row.key: table.cell(row, table.column("robust")).judged for row in table.rows}
    assert judged == {"k9": True, "k7": True, "k5": True, "k3": False}
    times = get_item("rat.table6")
    assert not any(cell.judged for cell in times.cells()), "seconds depend on the machine"


def test_notes_are_used_and_say_something():
    for paper in papers().values():
        assert all(len(text) > 20 for text in paper.ambiguities.values())
        for key, text in paper.ambiguities.items():
            assert ("measured" in text.removesuffix("Not measured.")) != text.endswith("Not measured."), (
                f"{paper.name} {key} says what its resolution rests on"
            )
    keys = {"ctrw": 17, "rna": 16, "dcs": 24, "red": 14, "rat": 15}
    for name, count in keys.items():
        prefix = {"ctrw": "C", "rna": "R", "dcs": "D", "red": "A", "rat": "B"}[name]
        assert {f"{prefix}{number}" for number in range(1, count + 1)} <= set(get_paper(name).ambiguities)


def test_differences_from_the_official_codes_are_said_where_they_act():
    from orchestration.catalogue import defence

    for name in ("rna", "dcs"):
        assert any("train_without_update" in deviation for deviation in defence(name).deviations)
    assert "vit" in {note.key for note in get_item("dcs.table7").notes}
    assert "position" in {note.key for note in get_item("ctrw.fig3d").notes}


def test_the_overlaps_that_the_dcs_code_was_seen_to_draw_are_those_of_independent_masks():
    seen = (0.849, 0.147, 0.003)  # of two evaluation masks of n = 2 taps of 25
    independent = [math.comb(2, shared) * math.comb(23, 2 - shared) / math.comb(25, 2) for shared in range(3)]
    assert seen == pytest.approx(independent, abs=0.01)
    text = get_paper("dcs").ambiguities["D20"]
    assert all(f"{share:.3f}" in text for share in (*seen, *independent))
