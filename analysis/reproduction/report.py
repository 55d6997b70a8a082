"""What a reproduction leaves behind: a folder per item, and one self-contained page per paper.

write_item(outcome, folder)           table.md, table.tex, table.csv, item.html, figures/
write_paper("ctrw", outcomes, path)   every table and figure, the companion, contradictions, trainings with verdicts and origin
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from analysis.evaluation.protocols import PROTOCOL_TITLES
from analysis.reporting.figure_style import save_figure
from analysis.reporting.report import TEMPLATE_FOLDER
from analysis.reproduction.figures import draw
from analysis.reproduction.outcome import ItemOutcome
from analysis.reproduction.pages import companion_pages, item_page, run_pages
from analysis.reproduction.papers import get_paper
from analysis.reproduction.scale import SCALE_SENTENCES, SCALES
from analysis.reproduction.sheet import Sheet
from analysis.reproduction.tables import to_csv, to_latex, to_markdown
from analysis.reproduction.view import ItemView, view_of
from models.files import write_text


def write_item(outcome: ItemOutcome, folder: str | Path) -> dict[str, Path]:
    """Write `table.md`, `table.tex`, `table.csv`, `item.html` and, for figures, `figures/`; return them by kind.

    Equal outcomes give equal files. An illustration has no table, so that only its pages are written.

    Raises:
        UserError: there is no such item, or the outcome is of another version of it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sheet = Sheet(view_of(outcome))
    drawn = draw(sheet.view)
    for name, figure in drawn.items():
        save_figure(figure, folder / "figures" / name)
    files = tuple(f"figures/{name}.png" for name in drawn)
    texts = {"markdown": ("table.md", to_markdown(sheet, files)), "html": ("item.html", _render_item(sheet, drawn))}
    if sheet.view.item.rows:
        texts |= {"latex": ("table.tex", to_latex(sheet)), "csv": ("table.csv", to_csv(sheet))}
    written = {kind: write_text(folder / name, text) for kind, (name, text) in texts.items()}
    if drawn:
        written["figures"] = folder / "figures"
    return written


def write_paper(paper_name: str, outcomes: Sequence[ItemOutcome], path: str | Path) -> Path:
    """Write the page of a paper; return where.

    Args:
        paper_name: short name, e.g. `ctrw`.
        outcomes: of its tables and figures, at one scale or several, and of tables of other papers in which its defence stands (`common`),
            which only the companion reads. What has no outcome is shown with what the paper prints.

    Raises:
        UserError: there is no such paper, or an outcome is of another version.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, render_paper(paper_name, outcomes))


def render_paper(paper_name: str, outcomes: Sequence[ItemOutcome]) -> str:
    """Return the page of a paper."""
    paper = get_paper(paper_name)
    by_item: dict[str, list[ItemOutcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: SCALES.index(outcome.scale), reverse=True):
        by_item.setdefault(outcome.item, []).append(outcome)
    views: list[ItemView] = []
    for item in paper.items:
        views += [ItemView(item, outcome) for outcome in by_item.get(item.name, [None])]
    used = {key: [item.name for item in paper.items if any(note.key == key for note in item.notes)] for key in paper.ambiguities}
    return _render(
        "reproduced_paper.html",
        paper=paper,
        pages=[item_page(Sheet(view), draw(view)) for view in views],
        companion=companion_pages(paper_name, outcomes),
        ambiguities=[{"key": key, "text": text, "items": used[key]} for key, text in paper.ambiguities.items()],
        runs=run_pages(outcomes),
        **_common(views),
    )


def _render_item(sheet: Sheet, drawn: Mapping[str, Figure]) -> str:
    runs = run_pages([sheet.view.outcome]) if sheet.view.outcome is not None else []
    return _render("reproduced_item.html", page=item_page(sheet, drawn), runs=runs, **_common([sheet.view]))


def _common(views: Sequence[ItemView]) -> dict[str, Any]:
    present = [scale for scale in reversed(SCALES) if any(view.scale == scale for view in views)]
    return {"scales": [{"name": scale, "sentence": SCALE_SENTENCES[scale]} for scale in present], "protocols": PROTOCOL_TITLES}


def _render(template: str, **context: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
