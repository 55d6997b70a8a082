"""Pages of a reproduction: self-contained, complete, with scale, verdicts, origin and contradictions."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from analysis.reproduction.outcome import ItemOutcome
from analysis.reproduction.papers import get_paper, list_papers
from analysis.reproduction.report import render_paper, write_item, write_paper
from models.errors import UserError
from tests.reproduction.synthetic import synthetic_outcome

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Structure(HTMLParser):
    """Checks that elements close, collects ids, links, texts of cells by class, and addresses of resources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[tuple[set[str], str]] = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        self.addresses += [given[name] for name in ("src", "srcset", "data", "action") if name in given]
        self.addresses += [given["href"]] if tag == "link" else []
        if tag == "td":
            self.cells.append((set((given.get("class") or "").split()), ""))

    def handle_data(self, data):
        if self.open and "td" in self.open:
            classes, text = self.cells[-1]
            self.cells[-1] = (classes, text + data)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"


def structure(page: str) -> Structure:
    """Return the structure of a page, whose elements must all be closed."""
    parser = Structure()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def page() -> str:
    """The page of a paper with items at three scales and others that were not run."""
    outcomes = [
        synthetic_outcome("ctrw.table1", "smoke", missing=0.1, failed=0.1),
        synthetic_outcome("ctrw.table4", "paper"),
        synthetic_outcome("ctrw.fig3b", "short"),
        synthetic_outcome("common.table2", "smoke"),
    ]
    return render_paper("ctrw", outcomes)


def test_a_page_needs_nothing_from_elsewhere(page):
    found = structure(page)
    assert found.addresses
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert not re.search(r"url\(|@import|<script|https?://", page)


def test_links_lead_somewhere_and_places_are_unique(page):
    found = structure(page)
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= set(found.ids)


def test_every_item_of_the_paper_is_there_with_its_published_values(page):
    for item in get_paper("ctrw").items:
        assert item.name in page
        for published in item.published.values():
            assert published.text in page
    assert page.count("Nothing to run: it draws an idea") == 2
    assert "Not run at this scale: printed values only." in page
    for key, text in get_paper("ctrw").ambiguities.items():
        assert f"<td>{key}</td>" in page
        assert text.split("'")[0].split("<")[0].split(">")[0][:60].strip() in page


def test_every_number_of_ours_shows_its_scale(page):
    ours = [(classes, text) for classes, text in structure(page).cells if "ours" in classes]
    assert len(ours) > 60
    for classes, text in ours:
        (scale,) = (
            classes & {"smoke", "short", "paper"}
            if "honest" in classes
            else (classes - {"ours", "paper"})
            & {
                "smoke",
                "short",
            }
            or {"paper"}
        )
        assert (scale in text) == (scale != "paper"), (classes, text)
    for scale in ("Smoke", "Short", "Paper"):
        assert f"<p>{scale} scale" in page


def test_failed_checks_verdicts_configuration_and_origin_are_shown(page):
    assert "(!)" in page
    assert "FAILED CHECKS: C7 converged steps and EOT" in page
    assert "doubling the steps to 200 changes accuracy by -4.2 points" in page
    assert "0123456789abcdef0123456789abcdef01234567" in page
    assert "Imaginary CPU" in page
    assert "torch 2.12.1, torchvision 0.27.0" in page
    assert "<dt>defence.name</dt><dd>ctrw</dd>" in page
    run = synthetic_outcome("ctrw.table1").runs["resnet18/fixed"]
    assert run.fingerprint in page and run.mlflow_run in page
    assert "--defence.lower_bound=1000" in page
    assert "an attack without a radius" in page, "why cells are empty"


@pytest.mark.parametrize("name", list_papers())
def test_a_page_without_outcomes_shows_what_is_printed(name):
    found = render_paper(name, [])
    structure(found)
    assert "Nothing has been run yet" in found
    assert not re.search(r"smoke</sup>|short</sup>", found)
    assert all(item.name in found for item in get_paper(name).items)


def test_an_item_leaves_its_files(tmp_path):
    written = write_item(synthetic_outcome("ctrw.fig3c"), tmp_path / "item")
    assert {path.name for path in written.values()} == {"table.md", "table.tex", "table.csv", "item.html", "figures"}
    assert {path.name for path in written["figures"].iterdir()} == {"fig3c.png", "fig3c.pdf"}
    assert "](figures/fig3c.png)" in written["markdown"].read_text()
    found = structure(written["html"].read_text())
    assert {link[1:] for link in found.links} <= set(found.ids)
    first = {kind: path.read_bytes() for kind, path in written.items() if path.is_file()}
    write_item(ItemOutcome.from_json(synthetic_outcome("ctrw.fig3c").to_json()), tmp_path / "item")
    assert {kind: path.read_bytes() for kind, path in written.items() if path.is_file()} == first
    assert not list(tmp_path.rglob("*.part"))


def test_tables_have_no_figures_and_illustrations_no_table(tmp_path):
    assert "figures" not in write_item(synthetic_outcome("ctrw.table7"), tmp_path / "table")
    written = write_item(ItemOutcome("ctrw.fig1", "smoke", ()), tmp_path / "illustration")
    assert set(written) == {"markdown", "html"}
    assert "it draws an idea" in written["markdown"].read_text()


def test_an_item_whose_numbers_cannot_exist_says_so():
    outcome = synthetic_outcome("ctrw.fig3a")
    cells = tuple(dataclasses.replace(cell, paper=None, reason="the network has no sigma", expected=False) for cell in outcome.cells)
    page = render_paper("ctrw", [dataclasses.replace(outcome, cells=cells)])
    assert "no cell can have a number" in page
    assert "the network has no sigma" in page


def test_texts_are_escaped(tmp_path):
    outcome = synthetic_outcome("ctrw.table7")
    cells = (dataclasses.replace(outcome.cells[0], paper=None, honest=None, reason="failed: <b>&"), *outcome.cells[1:])
    path = write_paper("ctrw", [dataclasses.replace(outcome, cells=cells)], tmp_path / "reports" / "ctrw.html")
    assert "failed: &lt;b&gt;&amp;" in path.read_text()
    structure(path.read_text())


def test_unknown_papers_are_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="ctrw"):
        write_paper("crtw", [], tmp_path / "page.html")
