"""Parameters of each defence and its loss, what its sweeps search, where the code deviates: as the pages of `docs/defences` show it.

`python -m tests.architecture.documented_parameters` renews them there, between the two marks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.configuration import Config
from models.files import write_text
from models.registry import defence_model
from orchestration.catalogue import defence
from orchestration.search_space import Dimension
from tests.architecture.source import ROOT
from trainers.objective import objective_entry

FOLDER = ROOT / "docs" / "defences"
BEGIN, END = "<!-- parameters: begin (python -m tests.architecture.documented_parameters) -->\n", "<!-- parameters: end -->\n"

PAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ctrw": (("ctrw",), ()),
    "rna": (("rna", "single_normalization"), ()),
    "dcs": (("dcs", "dcn"), ()),
    "red": (("red", "ps_red"), ("red",)),
    "rat": (("rat", "rat_surrogate", "label_smoothing", "direct_weight_noise"), ("rat_taylor", "rat_surrogate")),
}
"""Page -> defences and objectives that it is about."""


def documented_parameters(page: str) -> str:
    """Return the generated part of a page in Markdown."""
    defences, objectives = PAGES[page]
    parts: list[str] = []
    for name in defences:
        parts += _table(f"Parameters of `{name}` (`defence.…`)", defence_model(name).config)
    for name in objectives:
        parts += _table(f"Parameters of the loss `{name}` (`training.objective.…`)", objective_entry(name).config)
    for name in defences:
        record = defence(name)
        if record.search_space:
            parts += ["", f"## What a sweep of `{name}` searches", "", "| field | values |", "|---|---|"]
            parts += [f"| `{field}` | {_values(dimension)} |" for field, dimension in record.search_space.items()]
        if record.deviations:
            parts += ["", f"## Where the code of `{name}` knowingly differs from the paper", ""]
            parts += [f"- {deviation}" for deviation in record.deviations]
    return "\n".join(parts).strip() + "\n"


def _table(title: str, config: type[Config]) -> list[str]:
    rows = [
        f"| `{name}` | {_cell(field.get_default(call_default_factory=True))} | {_escaped(field.description or '')} |"
        for name, field in config.model_fields.items()
        if name != "name"
    ]
    return ["", f"## {title}", "", "| field | default | meaning |", "|---|---|---|", *rows] if rows else []


def _cell(value: Any) -> str:
    return "none" if value is None else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, Config):
        return ", ".join(f"{name}: {_plain(each)}" for name, each in value.model_dump().items())
    if isinstance(value, tuple | list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(dimension: Dimension) -> str:
    if dimension.type == "choice":
        said = "; ".join(f"`{_plain(choice)}`" for choice in dimension.choices)
    else:
        said = f"{dimension.low:g} to {dimension.high:g}" + (", logarithmic" if dimension.log else "")
    if dimension.above:
        said += f"; above `{dimension.above}`"
    for field, values in dimension.when.items():
        said += f"; where `{field}` is {_alternatives(values)}"
    return said


def _alternatives(values: Iterable[Any]) -> str:
    return " or ".join(f"`{_plain(value)}`" for value in values)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def parts(page: str) -> tuple[str, str, str]:
    """Return what stands before, between and behind the marks."""
    before, _, rest = page.partition(BEGIN)
    between, _, behind = rest.partition(END)
    return before, between, behind


def page_path(page: str) -> Path:
    """Return the file of a page."""
    return FOLDER / f"{page}.md"


if __name__ == "__main__":
    for each in PAGES:
        before, _, behind = parts(page_path(each).read_text(encoding="utf-8"))
        write_text(page_path(each), f"{before}{BEGIN}{documented_parameters(each)}{END}{behind}")
