"""`rayndom reproduce ITEM ...`: regenerate the papers' tables and figures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration import console
from orchestration.commands.command import GPUS, SEED, Command, add_data_root, add_wait, workplace_of

if TYPE_CHECKING:
    from analysis.reproduction.outcome import ItemOutcome
    from orchestration.home import Home, Workplace
    from orchestration.reproducing.plan import ItemPlan

LIST = "list"


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items",
        nargs="*",
        metavar="ITEM",
        help="table or figure (ctrw.table1), pattern ('ctrw.table*'), paper (ctrw) or all; without one, all are listed",
    )
    parser.add_argument(
        "--scale",
        default="smoke",
        help="smoke: everything small, on a CPU in minutes, to see that it runs; small: ResNet-8 on a part of Fashion-MNIST or of JPEG "
        "pictures of CIFAR-10, minutes of a core per row; short: the real networks and data, 30 epochs; paper: as printed (default smoke)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of all trainings (default 0); outcomes of other seeds are kept beside it")
    parser.add_argument("--rows", default="", metavar="KEY,KEY", help="only these rows; patterns as 'cifar10/*' fit")
    parser.add_argument("--columns", default="", metavar="KEY,KEY", help="only these columns")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained and evaluated, and what it would cost")
    parser.add_argument("--render", action="store_true", help="run nothing: write tables, figures and pages of what has been found so far")
    parser.add_argument("--list", action="store_true", help="list all tables and figures")
    parser.add_argument("--gpus-per-worker", type=GPUS, help="share of a GPU for each worker, instead of the recipes'; 0: train on CPUs")
    parser.add_argument("--address", help="Ray cluster (default: RAY_ADDRESS, else a local Ray)")
    add_wait(parser)
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.list or not arguments.items or arguments.items == [LIST]:
        return _list()
    from analysis.reproduction.scale import parse_scale
    from orchestration.reproducing.plan import check_something_to_do, choose_keys, find_items, plan_item

    scale = parse_scale(arguments.scale)
    items = [item.at(scale) for item in find_items(arguments.items)]
    rows = choose_keys("row", items, _keys(arguments.rows))
    columns = choose_keys("column", items, _keys(arguments.columns))
    plans = [plan_item(item, scale, rows, columns, arguments.gpus_per_worker, arguments.seed) for item in items]
    check_something_to_do(plans)
    workplace = workplace_of(arguments)
    if arguments.dry_run:
        return _dry_run(plans, workplace)
    if arguments.render:
        return _render_stored(plans, workplace.home)
    return _reproduce(plans, workplace, wait=arguments.wait)


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def _list() -> int:
    from orchestration.reproducing.summary import catalogue

    rows = catalogue()
    console.result(rows)
    console.table("tables and figures; trainings at each scale", list(rows[0]), [list(row.values()) for row in rows])
    console.say("rayndom reproduce ITEM reproduces one at scale smoke; --scale short and --scale paper need the papers' data and GPUs")
    return 0


def _show_plan(plans: Sequence[ItemPlan], home: Home) -> dict[str, Any]:
    from orchestration.reproducing.cost import Cost, total
    from orchestration.reproducing.summary import describe

    report = describe(plans, home)
    shown = ("item", "cells", "trainings", "already_trained", "evaluations", "already_evaluated", "readings")
    costs = [Cost(row["forward_passes"], row["gpu_hours"], row["core_hours"]) for row in report["items"]]
    console.table(
        f"plan at scale {report['scale']}",
        [*(name.replace("_", " ") for name in shown), "estimated cost of what is missing"],
        [[*(row[name] for name in shown), row["nothing_to_run"] or str(cost)] for row, cost in zip(report["items"], costs, strict=True)],
    )
    console.say(f"in all {total(costs)}. {report['estimate']}")
    return report


def _dry_run(plans: Sequence[ItemPlan], workplace: Workplace) -> int:
    from orchestration.reproducing.summary import missing_datasets, training_rows

    report = _show_plan(plans, workplace.home)
    for planned in plans:
        if planned.trainings:
            rows = training_rows(planned, workplace.home)
            console.table(f"trainings of {planned.item.name}", ["row", "recipe", "changes of the row", "fingerprint", "state"], rows)
    missing = missing_datasets(plans, workplace.data_root)
    if missing:
        console.say(f"not here: the files of {', '.join(missing)}; `rayndom doctor` says how to obtain them")
    trainings = {
        planned.item.name: {each.key: {"recipe": each.run.recipe, "fingerprint": each.fingerprint} for each in planned.trainings.values()}
        for planned in plans
    }
    console.result(report | {"trainings": trainings, "missing_datasets": missing})
    return 0


def _reproduce(plans: Sequence[ItemPlan], workplace: Workplace, *, wait: bool) -> int:
    from orchestration.reproducing.execution import check_before_start, reproduce_item, track_folder
    from orchestration.reproducing.ledger import outcome_folder
    from orchestration.single_process import ADVICE, ENDING_S, only_process

    started = time.monotonic()
    _show_plan(plans, workplace.home)
    check_before_start(plans, workplace)
    results: dict[str, Any] = {}
    problems: dict[str, list[str]] = {}
    for planned in plans:
        name = planned.item.name
        console.say(f"{name}: {planned.item.title}")
        folder = outcome_folder(workplace.home, name, planned.edition)
        with only_process(folder / "lock", f"the reproduction of {name}", advice=ADVICE, patience_s=None if wait else ENDING_S):
            outcome, failed, run_id = reproduce_item(planned, workplace)
            files = _render(outcome, folder)
            track_folder(planned, workplace.home, run_id)
        problems |= {name: failed} if failed else {}
        results[name] = {
            "outcome": str(folder / "outcome.json"),
            "mlflow_run": run_id,
            "complete": outcome.complete,
            "failed": failed,
            "files": {kind: str(path) for kind, path in files.items()},
        }
    reports = _write_papers(plans, workplace.home)
    console.result({"items": results, "reports": {paper: str(path) for paper, path in reports.items()}})
    for paper, path in reports.items():
        console.say(f"{paper}: {path}")
    for name, failed in problems.items():
        for problem in failed:
            console.warn(f"{name}: {problem}")
    console.say(f"done in {console.duration(time.monotonic() - started)}")
    return 1 if problems else 0


def _render_stored(plans: Sequence[ItemPlan], home: Home) -> int:
    from models.errors import UserError
    from orchestration.reproducing.ledger import outcome_folder, read_outcome

    edition = plans[0].edition
    stored = {planned.item.name: read_outcome(home, planned.item.name, edition) for planned in plans}
    if not any(stored.values()):
        raise UserError(f"nothing of {', '.join(stored)} has been reproduced at scale {edition.replace('-', ' ')} in {home.root}")
    for name, outcome in stored.items():
        if outcome is not None:
            _render(outcome, outcome_folder(home, name, edition))
    reports = _write_papers(plans, home)
    console.result({"reports": {paper: str(path) for paper, path in reports.items()}})
    for paper, path in reports.items():
        console.say(f"{paper}: {path}")
    return 0


def _render(outcome: ItemOutcome, folder: Path) -> Mapping[str, Path]:
    """Write tables and figures of an item, and show its table."""
    from analysis.reproduction.report import write_item
    from analysis.reproduction.sheet import Sheet
    from analysis.reproduction.tables import terminal_rows
    from analysis.reproduction.view import view_of

    files = write_item(outcome, folder)
    if outcome.cells:
        header, rows, below = terminal_rows(Sheet(view_of(outcome)))
        console.table(f"{outcome.item} at scale {outcome.scale}", header, rows)
        for note in below:
            console.say(note)
    return files


def _write_papers(plans: Sequence[ItemPlan], home: Home) -> dict[str, Path]:
    """Write a page per paper over all of its items that were reproduced at this scale and with this seed, now or earlier."""
    from analysis.reproduction.companion import gains_of
    from analysis.reproduction.papers import get_paper
    from analysis.reproduction.report import write_paper
    from orchestration.home import readable
    from orchestration.reproducing.ledger import read_outcome

    edition = plans[0].edition

    def stored(name: str) -> tuple[str, ItemOutcome | None]:
        return name, read_outcome(home, name, edition)

    reports = {}
    for paper in dict.fromkeys(planned.item.paper for planned in plans):
        # What remains of a claimed gain may be measured in the table of all defences.
        names = dict.fromkeys((*(item.name for item in get_paper(paper).items), *(gain.item for gain in gains_of(paper))))
        asked = {planned.item.name: read_outcome(home, planned.item.name, edition) for planned in plans}
        others = dict(readable(stored, [name for name in names if name not in asked]))
        outcomes = [(asked | others).get(name) for name in names]
        path = home.root / "reproductions" / f"{paper}-{edition}.html"
        reports[paper] = write_paper(paper, [outcome for outcome in outcomes if outcome is not None], path)
    return reports


REPRODUCE = Command(
    "reproduce",
    "regenerate the papers' tables and figures: train, attack, compare with the printed numbers; the same command goes on",
    (
        "rayndom reproduce                             what there is",
        "rayndom reproduce ctrw.table4                 one table, small, on a CPU",
        "rayndom reproduce ctrw.table1 --scale paper --dry-run",
        "rayndom reproduce rna --scale short --rows 'resnet18/*' --columns natural,pgd20",
    ),
    _add,
    _run,
)
