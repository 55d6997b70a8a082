"""Computing quantities of a model, and writing them down: as records of plain values, as Markdown, and the list of all there are."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from analysis.quantities.quantity import NotComputable, Quantity, Subject, quantities, quantity
from analysis.reporting.tables import to_markdown
from models.errors import UserError

ALL = "all"
_BARS = " ▁▂▃▄▅▆▇█"

Record = dict[str, Any]


def choose(model: nn.Module, names: Sequence[str] = ()) -> list[Quantity]:
    """Return the quantities to compute: those named, all that apply (`all`), or without a name the cheap ones that apply.

    Raises:
        UserError: an unknown name, or a quantity that needs what the model does not have.
    """
    if not names:
        return [entry for entry in quantities().values() if entry.cheap and entry.applies(model)]
    if ALL in names:
        return [entry for entry in quantities().values() if entry.applies(model)]
    chosen = [quantity(name) for name in dict.fromkeys(names)]
    for entry in chosen:
        if not entry.applies(model):
            spec = getattr(model, "spec", None)
            whose = f"defence {spec.defence!r}" if spec is not None else type(model).__name__
            fitting = ", ".join(other.name for other in quantities().values() if other.applies(model))
            raise UserError(f"{entry.name} needs {entry.requirement.text}; this model ({whose}) does not fit. For it: {fitting}.")
    return chosen


def compute(entry: Quantity, subject: Subject) -> Record:
    """Return what was found as JSON types: what it is, `rows`, `notes`, `metrics`, the settings and the seconds it took.

    What makes it impossible on these images (e.g. none that all members classify rightly) is the record's `error`.

    Raises:
        UserError: the images are missing.
    """
    started = time.perf_counter()
    record: Record = {
        "name": entry.name,
        "title": entry.title,
        "meaning": entry.meaning,
        "reference": entry.reference,
        "settings": {
            "num_samples": subject.num_samples,
            "num_draws": subject.num_draws,
            "seed": subject.seed,
            "threat_model": str(subject.threat_model),
        },
    }
    try:
        found = entry.compute(subject)
    except NotComputable as error:
        return record | {"error": str(error), "rows": [], "notes": [], "metrics": {}, "seconds": time.perf_counter() - started}
    return record | {
        "rows": [{name: _plain(value) for name, value in row.items()} for row in found.rows],
        "notes": list(found.notes),
        "metrics": {name: float(value) for name, value in found.metrics.items() if math.isfinite(value)},
        "seconds": time.perf_counter() - started,
    }


def metrics_of(records: Sequence[Record]) -> dict[str, float]:
    """Return the numbers worth following under names of their own: `analysis/<quantity>/<name>`."""
    return {f"analysis/{record['name']}/{name}": value for record in records for name, value in record["metrics"].items()}


def shown_rows(record: Record) -> list[dict[str, Any]]:
    """Return the rows for people: histograms as bars, truth values as words, a single wide row turned on its side."""
    rows = [{name: _shown(value) for name, value in row.items()} for row in record["rows"]]
    if len(rows) == 1 and len(rows[0]) > 3:
        return [{"what": name, "value": value} for name, value in rows[0].items()]
    return rows


def record_to_markdown(record: Record) -> str:
    """Return a record as a section of Markdown."""
    parts = [f"### {record['title']} (`{record['name']}`)\n", f"{sentence(record['meaning'])} ({record['reference']})\n"]
    if "error" in record:
        parts.append(f"Not computed: {record['error']}\n")
    else:
        parts.append(to_markdown(shown_rows(record)))
    parts += [f"{note}\n" for note in record["notes"]]
    return "\n".join(parts)


def sentence(text: str) -> str:
    """Return a line as a sentence: a capital first, a full stop last. A symbol keeps its letter: `n` is not `N`."""
    first = text.split(maxsplit=1)[0]
    is_symbol = (len(first.rstrip(":,")) == 1 and first[0] != "a") or "_" in first
    return f"{text}." if is_symbol else f"{text[0].upper()}{text[1:]}."


def list_rows(model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Return what there is: name, title, needs, and whether it is computed by default; for a model, whether it applies."""
    return [
        {"quantity": entry.name, "what it is": entry.title, "needs": entry.requirement.text, "by default": entry.cheap}
        | ({} if model is None else {"applies": entry.applies(model)})
        for entry in quantities().values()
    ]


def describe_all() -> str:
    """Return the page on all quantities, `docs/quantities.md`."""
    head = (
        "# Quantities\n\n"
        "What `rayndom analyse TARGET --what NAME ...` computes from a trained model. Without `--what` it computes those marked *default* "
        "that apply to the model, with `--what all` all that apply. `--samples`, `--draws` and `--seed` replace what a quantity takes by "
        "itself. Results are kept in `analyses/` of the home folder and in the model's MLflow run.\n\n"
        "This page is written by `rayndom analyse --what list --format markdown` from the entries in `analysis/quantities/`. One more "
        "quantity is one more entry there.\n"
    )
    sections = []
    for needs in dict.fromkeys(entry.requirement.text for entry in quantities().values()):
        sections.append(f"## For {needs}\n")
        for entry in quantities().values():
            if entry.requirement.text == needs:
                default = ", default" if entry.cheap else ""
                sections.append(f"* `{entry.name}`{default}: {entry.title}; {entry.meaning}. *{entry.reference}*")
        sections.append("")
    return head + "\n" + "\n".join(sections).rstrip() + "\n"


def sparkline(counts: Sequence[int]) -> str:
    """Return a histogram as a line of bars, the highest full; a bin that is not empty is never blank."""
    highest = max(counts, default=0)
    if highest == 0:
        return _BARS[0] * len(counts)
    return "".join(_BARS[math.ceil(count / highest * (len(_BARS) - 1))] for count in counts)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"|{sparkline(value)}|"
    return value
