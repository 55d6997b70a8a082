"""Every published number of the data stands in the paper's text, in the paper's order; no number of a table is left out.

The texts are not part of the repository: they are looked for in the folder of `RAYNDOM_DEVELOPMENT_DATA`, or in `shared` beside it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from analysis.reproduction.papers import get_item, get_paper, list_items

ROOT = Path(__file__).parents[2]
TEXTS = Path(os.environ.get("RAYNDOM_DEVELOPMENT_DATA", ROOT.parent / "shared")) / "papers"
FILES = {"ctrw": "000_*.txt", "red": "001_*.txt", "rna": "002_*.txt", "dcs": "003_*.txt", "rat": "004_*.txt"}

# Where in the text a table stands: from the first pattern to the second.
TABLES = {
    "ctrw.table1": (r"^Table 1:", r"^Table 2:"),
    "ctrw.table2": (r"^Table 2:", r"^with intermediate"),
    "ctrw.table3": (r"^Table 3:", r"^Table 4:"),
    "ctrw.table4": (r"^Table 4:", r"^Table 5:"),
    "ctrw.table5": (r"^Table 5:", r"^and  ?\$"),
    "ctrw.table6": (r"^Dataset\tConstrain", r"^Table 6:"),
    "ctrw.table7": (r"^Value of", r"^Table 7:"),
    "rna.table1": (r"^Table 1:", r"^Table 2:"),
    "rna.table2": (r"^Table 2:", r"^## 5\.2"),
    "rna.table3": (r"^Table 3:", r"^Table 4:"),
    "rna.table4": (r"^Table 4:", r"^\*\*Comparison"),
    "rna.table5": (r"^Random Space\t", r"^CIFAR-10\. As shown"),
    "dcs.table1": (r"Table 1\. The results", r"^Figure 3\."),
    "dcs.table2": (r"^Table 2\.", r"^Table 3\."),
    "dcs.table3": (r"^Table 3\.", r"^by controlling"),
    "dcs.table4": (r"^k\tNatural Acc", r"^Table 4\."),
    "dcs.table5": (r"^Table 5\.", r"^ X\^s on the network"),
    "dcs.table6": (r"^Table 6\.", r"^Table 7\."),
    "dcs.table7": (r"^Table 7\.", r"^results are shown"),
    "dcs.table8": (r"^Table 8\.", r"^B\.6"),
    "dcs.table9": (r"^Table\t9\.", r"\Z"),
    "red.table1": (r"Table 1: Robust", r"^dimensions\. For some"),
    "red.table2": (r"we selected the model number N as 8", r"^4\.2 MAIN"),
    "red.table3": (r"^ing\. The b", r"^Table 3:"),
    "rat.table1": (r"^Table 1\.", r"^Table 2\."),
    "rat.table2": (r"^Table 2\.", r"^## 5\.1"),
    "rat.table3": (r"^Table 3\.", r"^Table 4\."),
    "rat.table4": (r"^Table 4\.", r"^Table 5\."),
    "rat.table5": (r"^Table 5\.", r"^Table 6\."),
    "rat.table6": (r"^Table 6\.", r"^Auto Attack"),
}
# Numbers of figures and claims, which stand in sentences.
SENTENCES = {
    "ctrw.fig3b": (r"\*\*Effectiveness of Bound", r"\*\*Comparison with Other"),
    "rna.fig1d": (r"We empirically demonstrate that transferability", r"#### 3\.1"),
    "rna.fig5a": (r"\*\*Stronger PGD", r"^Figure 5:"),
    "rna.fig5b": (r"\*\*Stronger PGD", r"^Figure 5:"),
    "rna.fig5c": (r"\*\*Adversarial Transferability in Random Space", r"### 5\.3"),
    "rat.swa": (r"\*\*Comparison with SWA", r"^More empirical"),
    "red.parameters": (r"^ABSTRACT", r"1 INTRODUCTION"),
}
# Rows that the extraction of the text tore apart (their numbers are in order, others stand between them), and the line it garbled.
TORN = {("red.table2", "ps_red"): r"^DC DED"}

NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")


def text_of(paper: str) -> str:
    found = sorted(TEXTS.glob(FILES[paper]))
    if not found:
        pytest.skip(f"the text of {paper} is not at hand")
    return found[0].read_text(encoding="utf-8")


def region(name: str) -> str:
    start, end = (TABLES | SENTENCES)[name]
    text = text_of(name.partition(".")[0])
    opening = re.search(start, text, re.MULTILINE)
    assert opening, f"{name}: the text has no {start!r}"
    closing = re.compile(end, re.MULTILINE).search(text, opening.end())
    assert closing, f"{name}: the text has no {end!r} behind it"
    # Exponents and subscripts are not numbers of the table: PGD^{20}, 1_{st}.
    return re.sub(r"<sup>.*?</sup>|\^\{?\d+\}?|\d_\{?(?:st|nd|th)\}?", " ", text[opening.start() : closing.start()])


def numbers_of_rows(name: str) -> dict[str, list[str]]:
    """Return the published numbers of each row, left to right, rows in the order in which the data has them."""
    item, rows = get_item(name), {}
    order = {column.key: place for place, column in enumerate(item.columns)}
    for row in dict.fromkeys(row for row, _ in item.published):
        cells = sorted((order[column], value) for (key, column), value in item.published.items() if key == row)
        rows[row] = [number for _, value in cells for number in NUMBER.findall(value.text.replace("±", " "))]
    return rows


def find_run(numbers: list[str], wanted: list[str], start: int) -> int | None:
    """Return where `wanted` ends, if it stands in one piece in `numbers` at or behind `start`."""
    for place in range(start, len(numbers) - len(wanted) + 1):
        if numbers[place : place + len(wanted)] == wanted:
            return place + len(wanted)
    return None


def find_in_order(numbers: list[str], wanted: list[str], start: int) -> int | None:
    """Return where the last of `wanted` ends, if all stand in this order at or behind `start`."""
    for number in wanted:
        if number not in numbers[start:]:
            return None
        start = numbers.index(number, start) + 1
    return start


def test_every_item_with_published_numbers_is_checked():
    published = {name for name in list_items() if get_item(name).published}
    assert published == set(TABLES) | set(SENTENCES)


@pytest.mark.parametrize("name", TABLES)
def test_published_rows_stand_in_the_text_in_order(name):
    numbers, place = NUMBER.findall(region(name)), 0
    for row, wanted in numbers_of_rows(name).items():
        if (name, row) in TORN:
            assert find_in_order(numbers, wanted, 0), f"{name} {row}: {wanted} not in the text"
            continue
        end = find_run(numbers, wanted, place)
        assert end is not None, f"{name} {row}: {wanted} is not in the text behind the row before"
        place = end


@pytest.mark.parametrize("name", TABLES)
def test_no_number_of_a_table_is_left_out(name):
    item = get_item(name)
    known = {number for wanted in numbers_of_rows(name).values() for number in wanted}
    labels = {number for row in item.rows for number in NUMBER.findall(row.label)}
    garbled = [pattern for (torn, _), pattern in TORN.items() if torn == name]
    lines = [line for line in region(name).splitlines() if not any(re.match(pattern, line) for pattern in garbled)]
    lines = [line for line in lines if "\t" in line] or lines
    printed = {number for line in lines for number in re.findall(r"(?<![\d.])-?\d+\.\d+", line)}
    assert printed <= known | labels


@pytest.mark.parametrize("name", SENTENCES)
def test_published_numbers_of_figures_stand_in_their_sentences(name):
    numbers = NUMBER.findall(region(name))
    for wanted in numbers_of_rows(name).values():
        assert set(wanted) <= set(numbers)


@pytest.mark.parametrize("paper", FILES)
def test_every_table_and_figure_that_the_text_names_is_there(paper):
    text = re.split(r"^(?:#+ )?(?:\*\*)?references\b", text_of(paper), flags=re.MULTILINE | re.IGNORECASE)[0]
    names = [item.name.partition(".")[2] for item in get_paper(paper).items]
    for kind, pattern in (("table", r"(?:Table|Tab)\.?\s+(\d+)"), ("fig", r"(?:Figure|Fig)\.?\s+(\d+)")):
        mentioned = set(re.findall(pattern, text))
        assert mentioned
        for number in (number for number in mentioned if int(number) < 20):  # above: numbers of lines
            assert any(re.fullmatch(rf"{kind}{number}[a-z]?", name) for name in names), f"{paper} names {kind} {number}"
