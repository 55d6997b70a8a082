"""Tables of a reproduction: what each format shows, and that a reduced scale cannot be mistaken for a full one."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest

from analysis.reporting.latex import escape
from analysis.reproduction.outcome import CellOutcome, ItemOutcome, Reading
from analysis.reproduction.papers import get_item, papers
from analysis.reproduction.sheet import Sheet
from analysis.reproduction.tables import terminal_rows, to_csv, to_latex, to_markdown
from analysis.reproduction.view import ItemView, format_value, view_of
from models.errors import UserError
from tests.reproduction.synthetic import synthetic_outcome

ITEMS = [item for paper in papers().values() for item in paper.items if item.rows]


def sheet(outcome: ItemOutcome) -> Sheet:
    """Return the table of an outcome."""
    return Sheet(view_of(outcome))


def terminal(outcome: ItemOutcome) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for the terminal."""
    header, rows, _ = terminal_rows(sheet(outcome))
    return header, rows


def footnotes(outcome: ItemOutcome) -> list[str]:
    """Return what stands below the table in the terminal."""
    return terminal_rows(sheet(outcome))[2]


def with_cell(outcome: ItemOutcome, row: str, column: str, **changes) -> ItemOutcome:
    """Return an outcome with one cell changed."""
    cells = tuple(dataclasses.replace(cell, **changes) if (cell.row, cell.column) == (row, column) else cell for cell in outcome.cells)
    return dataclasses.replace(outcome, cells=cells)


def records(outcome: ItemOutcome) -> list[dict[str, str]]:
    """Return the CSV as dictionaries."""
    return list(csv.DictReader(io.StringIO(to_csv(sheet(outcome)))))


@pytest.mark.parametrize(
    ("value", "unit", "scale", "text"),
    [
        (69.478, "%", "smoke", "69.5"),
        (69.478, "%", "paper", "69.48"),
        (0.45581, "", "smoke", "0.4558"),
        (4558.0, "", "paper", "4,558"),
        (11173962.0, "", "paper", "11,173,962"),
        (float("nan"), "%", "smoke", "nan"),
    ],
)
def test_numbers_have_the_decimals_of_their_unit_and_scale(value, unit, scale, text):
    assert format_value(value, unit, scale) == text


def test_a_row_shows_printed_ours_and_honest_below_one_another():
    outcome = with_cell(
        synthetic_outcome("ctrw.table4"),
        "in",
        "pgd20",
        paper=Reading(64.06, 52.31, 74.87, "PGD-20", "T0", 64, 2),
        honest=Reading(31.25, 20.0, 44.0, "EOT-PGD", "T1", 32, 5),
    )
    header, rows = terminal(outcome)
    assert header == ["", "number", "Natural", "PGD20"]
    assert [row[1] for row in rows[:3]] == ["printed", "ours, smoke scale", "honest, smoke scale"]
    assert [row[3] for row in rows[:3]] == ["69.27", "64.1 smoke\n[52.3, 74.9]", "31.2 smoke\n[20.0, 44.0]"]
    assert [row[2] for row in rows[:3]][2] == "=", "clean accuracy is the same under every protocol"
    assert [row[0] for row in rows[:4]] == ["in-channels", "", "", "out-channels"]
    assert all(len(row) == len(header) for row in rows)
    assert any("n = 64 for ours, 32 for honest" in sentence for sentence in footnotes(outcome))


@pytest.mark.parametrize("scale", ["smoke", "short"])
@pytest.mark.parametrize("name", ["ctrw.table1", "rna.fig5a", "ctrw.table6", "red.parameters", "common.table2"])
def test_every_number_of_a_reduced_scale_carries_its_mark(name, scale):
    outcome = synthetic_outcome(name, scale)
    _, rows = terminal(outcome)
    ours = [cell for row in rows if any(f", {scale} scale" in part for part in row) for cell in row[2:]]
    numbers = [cell for cell in ours if cell and cell[0].isdigit()]
    assert len(numbers) > 3
    assert all(f" {scale}" in cell for cell in numbers)
    markdown, latex = to_markdown(sheet(outcome)), to_latex(sheet(outcome))
    assert f"**{scale.title()} scale" in markdown
    assert markdown.count(f" {scale}") > len(numbers)
    assert f"{scale.title()} scale" in latex.split(r"\begin{tabular}")[0], "the caption says it"
    assert latex.count(rf"\textsuperscript{{{scale}}}") >= len(numbers)
    assert {record["scale"] for record in records(outcome)} <= {scale, "printed"}


def test_a_full_scale_carries_no_mark_of_a_reduced_one():
    outcome = synthetic_outcome("ctrw.table1", "paper")
    for text in (to_markdown(sheet(outcome)), to_latex(sheet(outcome)), str(terminal(outcome))):
        assert "smoke" not in text
        assert "short" not in text


def test_agreement_is_judged_at_paper_scale_only_and_for_judged_cells():
    near, far = Reading(69.9, 69.0, 70.8, num_samples=10000), Reading(80.0, 79.0, 81.0, num_samples=10000)
    for scale, marks in (("paper", ("✓", "≠")), ("short", ("", ""))):
        outcome = synthetic_outcome("ctrw.table4", scale)
        outcome = with_cell(with_cell(outcome, "in", "pgd20", paper=near), "out", "pgd20", paper=far)
        _, rows = terminal(outcome)
        found = [row[3] for row in rows if row[1].startswith("ours")][:2]
        for cell, mark in zip(found, marks, strict=True):
            assert ("✓" if "✓" in cell else "≠" if "≠" in cell else "") == mark
    contradicting = synthetic_outcome("dcs.table4", "paper")
    cell = view_of(contradicting).cell("k3", "natural")
    assert cell is not None and cell.printed and cell.agreement is None, "the cell contradicts itself"


def test_a_printed_deviation_widens_the_tolerance():
    outcome = with_cell(synthetic_outcome("dcs.table1", "paper"), "cifar10/resnet18/dcs", "pgd20", paper=Reading(75.5, 74.0, 77.0))
    cell = view_of(outcome).cell("cifar10/resnet18/dcs", "pgd20")
    assert cell is not None and cell.agreement is not None
    assert cell.agreement.allowed == pytest.approx(1.0 + 2.49)
    assert cell.agreement.agrees


def test_numbers_of_failed_checks_are_marked_everywhere_and_never_judged():
    suspicious = Reading(69.3, 68.0, 70.0, "PGD-20", "T0", 10000, 1, failed_checks=("C7", "C9"))
    outcome = with_cell(synthetic_outcome("ctrw.table4", "paper"), "in", "pgd20", paper=suspicious)
    _, rows = terminal(outcome)
    assert rows[1][3].startswith("69.30 (!)")
    assert "✓" not in rows[1][3]
    for text in (to_markdown(sheet(outcome)), to_latex(sheet(outcome)), "\n".join(footnotes(outcome))):
        assert "C7 (converged steps and EOT) failed: in-channels, PGD20" in text
    assert r"69.30 (!)" in to_latex(sheet(outcome))
    line = next(r for r in records(outcome) if (r["row"], r["column"], r["number"]) == ("in", "pgd20", "paper"))
    assert (line["failed_checks"], line["agrees"]) == ("C7 C9", "")


def test_empty_cells_say_why():
    outcome = with_cell(
        synthetic_outcome("ctrw.table1"), "resnet18/ctrw", "aa", paper=None, honest=None, reason="training failed: out of memory"
    )
    _, rows = terminal(outcome)
    letter = next(note.partition(":")[0] for note in footnotes(outcome) if "out of memory" in note)
    assert any(cell == f"– {letter}" for row in rows for cell in row)
    assert "training failed: out of memory" in to_markdown(sheet(outcome))
    assert rf"--\textsuperscript{{{letter}}}" in to_latex(sheet(outcome))
    assert any(r["reason"] == "training failed: out of memory" and r["value"] == "" for r in records(outcome))
    assert any("without a radius" in note for note in footnotes(outcome)), "why CW has no honest number"


def test_quoted_rows_are_marked_and_have_no_numbers_of_ours():
    outcome = synthetic_outcome("ctrw.table3")
    _, rows = terminal(outcome)
    quoted = [row for row in rows if "quoted from [14]" in row[0]]
    assert [row[1] for row in quoted] == ["printed"]
    assert quoted[0][2:] == ["63.34", "67.88", "", "54.61"]
    assert "quoted from [14]" in to_markdown(sheet(outcome))
    assert "quoted from [14]" in to_latex(sheet(outcome))
    assert {r["number"] for r in records(outcome) if r["quoted"]} == {"printed"}
    extra = terminal(synthetic_outcome("rat.table1"))[1]
    assert any("TRADES, 0th (not in the paper)" in cell for row in extra for cell in row)


def test_csv_has_a_line_per_cell_and_number():
    outcome = synthetic_outcome("ctrw.table1", seed=3)
    found = records(outcome)
    item = get_item("ctrw.table1")
    assert sum(r["number"] == "printed" for r in found) == len(item.published) == 56
    assert sum(r["number"] == "paper" for r in found) == 56
    assert sum(r["number"] == "honest" for r in found) == 8 * 4, "PGD, FGSM, AA, MIFGSM"
    line = next(r for r in found if (r["row"], r["column"], r["number"]) == ("resnet18/ctrw", "pgd20", "honest"))
    reading = outcome.cell("resnet18/ctrw", "pgd20").honest
    assert float(line["value"]) == reading.value
    assert (float(line["low"]), float(line["high"])) == (reading.low, reading.high)
    assert (line["num_samples"], line["num_draws"], line["protocol"], line["scale"]) == ("32", "50", "T1", "smoke")
    assert line["fingerprint"] == outcome.runs["resnet18/ctrw"].fingerprint
    assert line["notes"] == "C2 C16 C11"


def test_latex_escapes_and_symbols():
    assert escape("50 % of a_b & {c} #1 $x ~ ^ \\ 2≤3 ±") == (
        r"50 \% of a\_b \& \{c\} \#1 \$x \textasciitilde{} \textasciicircum{} \textbackslash{} 2$\leq$3 $\pm$"
    )
    latex = to_latex(sheet(synthetic_outcome("dcs.table5", "paper")))
    assert r"include X\textasciicircum{}u" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    assert r"\cmidrule(lr){3-5}" in to_latex(sheet(synthetic_outcome("rat.table3")))


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_every_item_renders_with_and_without_an_outcome(item):
    outcome = synthetic_outcome(item.name, "smoke", missing=0.2, failed=0.2)
    header, rows = terminal(outcome)
    assert rows and all(len(row) == len(header) for row in rows)
    for view in (view_of(outcome), ItemView(item, None)):
        markdown, latex = to_markdown(Sheet(view)), to_latex(Sheet(view))
        table = [line for line in markdown.splitlines() if line.startswith("|")]
        assert len({line.count("|") - line.count(r"\|") for line in table}) <= 1, "as many cells in each line"
        assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
        for published in item.published.values():
            assert published.text in markdown
    assert "not run at this scale" in to_markdown(Sheet(ItemView(item, None))).lower()


def test_wide_figures_have_their_curves_as_columns():
    header, rows = terminal(synthetic_outcome("rna.fig5a"))
    assert header[:3] == ["PGD steps", "number", "BN"]
    assert rows[0][0] == "10"
    header, rows = terminal(synthetic_outcome("rna.fig5c"))
    assert header == ["", "path difference", "number", "mean", "minimum", "maximum"]
    assert rows[0][:2] == ["GN+BGN", "0"]


def test_an_outcome_of_another_version_is_a_clear_error():
    outcome = synthetic_outcome("ctrw.table4")
    strange = dataclasses.replace(outcome, cells=(*outcome.cells, CellOutcome("gone", "pgd20")))
    with pytest.raises(UserError, match="another version"):
        terminal(strange)


def test_rendering_is_deterministic():
    first, second = (synthetic_outcome("ctrw.table1", seed=7, failed=0.2) for _ in range(2))
    assert to_latex(sheet(first)) == to_latex(sheet(ItemOutcome.from_json(second.to_json())))
    assert to_csv(sheet(first)) == to_csv(sheet(second))
