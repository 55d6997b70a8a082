"""`rayndom rescore TARGET`: score kept points again, on other draws or on another model; no attack runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from orchestration import console
from orchestration.commands.command import DRAWS, Command, add_block_workers, add_data_root, add_wait, workplace_of

if TYPE_CHECKING:
    from analysis.statistics import Estimate
    from orchestration.evaluating.evaluation_run import Job
    from orchestration.home import Workplace


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="model that was evaluated with `--keep-points`: what `rayndom evaluate` takes")
    parser.add_argument("--suite", help="which of its evaluations (default: the only one)")
    parser.add_argument("--draws", type=DRAWS, help="draws that score (default: as many as in the evaluation)")
    parser.add_argument("--model", metavar="TARGET", help="another model: score the points on it, a transfer attack")
    add_block_workers(parser)
    add_wait(parser)
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.evaluating.evaluation_report import finish, show
    from orchestration.evaluating.rescoring import kept_summary, prepare_rescoring
    from orchestration.trained_models.targets import resolve_target

    workplace = workplace_of(arguments)
    target = resolve_target(arguments.target, workplace.home)
    summary = kept_summary(target, arguments.suite, workplace.home)
    name = target.name
    job = prepare_rescoring(name, target, summary, arguments.draws, workplace)
    _score(job, arguments, workplace)
    if arguments.model:
        return _on_another(job, summary["suite"], arguments, workplace)
    console.say("kept points were scored, no attack ran; studies stand as they were measured")
    result = show(job)
    finish(job, result, summary["suite"], workplace)
    return 0


def _score(job: Job, arguments: argparse.Namespace, workplace: Workplace) -> None:
    from orchestration.evaluating.evaluation_run import run_jobs

    run_jobs([job], workers=arguments.workers, gpus_per_worker=arguments.gpus_per_worker, address=workplace.address, wait=arguments.wait)


def _on_another(points: Job, suite: str, arguments: argparse.Namespace, workplace: Workplace) -> int:
    from analysis.reporting.tables import format_estimate
    from orchestration.evaluating.rescoring import prepare_other_model, transferred
    from orchestration.trained_models.targets import resolve_target

    other = resolve_target(arguments.model, workplace.home)
    name = other.name
    name = name if name != points.name else f"{name} (the other)"
    job = prepare_other_model(name, other, points, workplace)
    _score(job, arguments, workplace)
    own, scored = points.result(), job.result()
    rows = transferred(own, scored)
    headings = ["attack", points.name, name, f"{name} minus {points.name}, by image"]
    shown = []
    for row in rows:
        difference = f"{100 * row.difference.value:+.1f} [{100 * row.difference.low:+.1f}, {100 * row.difference.high:+.1f}]"
        shown.append([row.attack, format_estimate(row.own, marked=own.marked), format_estimate(row.other), difference])
    console.table(f"points made on {points.name}, scored on {name} under an unknown draw (T1), 95 % intervals", headings, shown)
    if scored.headline is not None:
        console.say(f"worst of these points per image, on {name}: {format_estimate(scored.headline)}")
    console.say(
        f"for {name} this is a transfer attack: it bounds its robustness from above and says nothing of an attacker who knows it; "
        f"`rayndom evaluate {arguments.model}` attacks it"
    )
    kept = {
        "points_of": points.name,
        "model": name,
        "suite": suite,
        "attack": "transfer",
        "rows": [{"attack": r.attack, "own": _ends(r.own), "other": _ends(r.other), "difference": _ends(r.difference)} for r in rows],
        "own_marked": own.marked,
        "worst": None if scored.headline is None else _ends(scored.headline),
        "records": str(job.records_path),
    }
    console.result(kept)
    console.say(f"records {job.records_path}")
    return 0


def _ends(estimate: Estimate) -> dict[str, Any]:
    shown = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return shown | {"num_samples": estimate.num_samples, "num_draws": estimate.num_draws, "shortage": estimate.shortage or None}


RESCORE = Command(
    "rescore",
    "score the perturbed images of an evaluation again, on other draws or on another model, without an attack",
    (
        "rayndom rescore 5a632dea00def935 --draws 1000",
        "rayndom rescore ctrw_digits --suite standard --model at_digits",
    ),
    _add,
    _run,
)
