"""`rayndom analyse TARGET`: what the theory of a defence says of a trained model, measured."""

from __future__ import annotations

import argparse

from models.errors import UserError
from orchestration import console
from orchestration.commands.command import (
    DRAWS,
    SAMPLES,
    SEED,
    Command,
    add_data_root,
    add_format,
    add_wait,
    begin,
    show_frame,
    workplace_of,
)

LIST = "list"
NO_THEORY = "quantities follow from the layers of its defence, which are not known here; `rayndom evaluate` measures its robustness"


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", help="trained recipe, run (16 digits), MLflow run id (32 digits), exported folder, or models:/NAME@ALIAS"
    )
    parser.add_argument(
        "--what",
        nargs="+",
        default=[],
        metavar="NAME",
        help="quantities; `list` shows them, `all` computes all that apply (default: the cheap ones that apply)",
    )
    parser.add_argument("--samples", type=SAMPLES, help="test images (default: each quantity's own number)")
    parser.add_argument("--draws", type=DRAWS, help="draws, or pairs of draws (default: each quantity's own number)")
    parser.add_argument("--seed", type=SEED, default=0, help="root of all seeds (default 0)")
    parser.add_argument("--device", choices=("cpu", "cuda", "xpu", "mps"), default="cpu", help="where to compute (default cpu)")
    add_wait(parser)
    add_format(parser)
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    if LIST in arguments.what:
        return _list(arguments)
    if arguments.target is None:
        raise UserError("analyse needs a model; `rayndom analyse --what list` shows what can be computed")
    from analysis.quantities.report import record_to_markdown, sentence, shown_rows
    from orchestration.evaluating.analysis_run import AnalysisSettings, analyse, track
    from orchestration.trained_models.targets import refuse_external, resolve_target

    chosen = begin(arguments)
    workplace = workplace_of(arguments)
    home = workplace.home
    settings = AnalysisSettings(tuple(arguments.what), arguments.samples, arguments.draws, arguments.seed, arguments.device)
    refuse_external(arguments.target, home, NO_THEORY)
    target = resolve_target(arguments.target, home)
    records, path = analyse(target, settings, workplace, wait=arguments.wait)
    run_id = track(target, records, path, home)
    for record in records:
        if chosen == "markdown":
            console.text(record_to_markdown(record) + "\n")
            continue
        if "error" in record:
            console.warn(f"{record['name']} could not be computed: {record['error']}")
            continue
        rows = shown_rows(record) if chosen == "table" else record["rows"]
        show_frame(f"{record['title']} ({record['name']})", rows, chosen)
        console.say(f"{sentence(record['meaning'])} ({record['reference']})")
        for note in record["notes"]:
            console.say(f"  {note}")
        console.say()
    if chosen == "json":
        named = [record | {"rows": console.named(record.get("rows", []))} for record in records]
        console.result({"records": str(path), "mlflow_run": run_id, "quantities": named})
    console.say(f"records {path}" + (f"; MLflow run {run_id}" if run_id else ""))
    asked = any("error" in record and record["name"] in arguments.what for record in records)
    return 1 if asked else 0


def _list(arguments: argparse.Namespace) -> int:
    from analysis.quantities.report import describe_all, list_rows

    chosen = begin(arguments)
    if chosen == "markdown":
        console.text(describe_all())
        return 0
    model = None
    if arguments.target is not None:
        from orchestration.trained_models.targets import refuse_external, resolve_target

        home = workplace_of(arguments).home
        refuse_external(arguments.target, home, NO_THEORY)
        model = resolve_target(arguments.target, home).load()
    rows = list_rows(model)
    if chosen == "json":
        console.result(console.named(rows))
    else:
        words = [{name: ("yes" if value else "no") if isinstance(value, bool) else value for name, value in row.items()} for row in rows]
        show_frame("quantities", words, chosen)
    return 0


ANALYSE = Command(
    "analyse",
    "compute what the theory of a defence says of a trained model: bounds, probabilities, gradient cosines, transfer, flatness, cost",
    (
        "rayndom analyse 5a632dea00def935",
        "rayndom analyse rayndom_home/exports/ctrw_bounds_digits --what ctrw_lemma1 ctrw_cosines",
        "rayndom analyse RUN_ID --what all --samples 100 --json",
        "rayndom analyse --what list                 everything that can be computed",
    ),
    _add,
    _run,
)
