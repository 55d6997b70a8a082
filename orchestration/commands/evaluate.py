"""`rayndom evaluate TARGET`: how robust is it, under which protocol, and may the number be believed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from orchestration import console
from orchestration.commands.command import Command, add_data_root, add_wait, workplace_of

if TYPE_CHECKING:
    from models.threat_model import ThreatModel
    from orchestration.experiment import ExperimentConfig


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="trained recipe, run (16 digits), MLflow run id (32 digits), exported folder, or models:/NAME@ALIAS")
    parser.add_argument("--suite", default="quick", help="quick, paper, standard, full, or a YAML file (default quick)")
    parser.add_argument("--surrogate", metavar="TARGET", help="another model: also attack with points made on it, e.g. an AT baseline")
    parser.add_argument("--samples", type=int, help="test images (default: the suite's)")
    parser.add_argument("--draws", type=int, help="draws that score (default: the suite's)")
    parser.add_argument("--epsilon", help="radius, e.g. 8/255 (default: the one the model was trained for)")
    parser.add_argument("--norm", help="linf or l2 (default: the one the model was trained for)")
    parser.add_argument("--seed", type=int, default=0, help="root of all seeds (default 0)")
    parser.add_argument("--workers", type=int, help="Ray workers; 1: this process (default: one per core or GPU where it pays)")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="share of a GPU for each worker (default 0)")
    parser.add_argument("--address", help="Ray cluster (default: RAY_ADDRESS, else local)")
    add_wait(parser)
    add_data_root(parser)


def _run(arguments: argparse.Namespace) -> int:
    from analysis.evaluation.suites import load_suite, with_surrogate
    from analysis.fingerprints import weights_hash
    from models.weights import load_pretrained
    from orchestration.evaluating.evaluation_report import keep, show, suite_name
    from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare, run_jobs
    from orchestration.exporting.origin import training_run_of
    from orchestration.exporting.targets import resolve_target
    from orchestration.tracking.tracker import Tracker

    workplace = workplace_of(arguments)
    home = workplace.home
    target = resolve_target(arguments.target, home)
    suite, name_of_suite = arguments.suite, suite_name(arguments.suite)
    if arguments.surrogate:
        other = resolve_target(arguments.surrogate, home).folder.absolute()
        weights = weights_hash(load_pretrained(other, resample_on_forward=False))
        suite = with_surrogate(load_suite(suite, target.config["model"]["defence"]), other, weights)
        name_of_suite = suite.name
    settings = EvaluationSettings(
        suite=suite,
        threat_model=_threat_model(arguments, target.experiment),
        num_samples=arguments.samples,
        num_draws=arguments.draws,
        seed=arguments.seed,
    )
    name = target.config["model"]["defence"] + (f" {target.experiment.name}" if target.experiment else "")
    job = prepare(target.experiment.name if target.experiment else name, target, settings, workplace)
    run_jobs([job], workers=arguments.workers, gpus_per_worker=arguments.gpus_per_worker, address=workplace.address, wait=arguments.wait)
    result = show(job)
    tracker, run_id = None, None
    if target.experiment is not None:
        tracker = Tracker(home, target.experiment.tracking.experiment)
        run_id = training_run_of(target, tracker, home)
    summary = keep(job, result, tracker, run_id, name_of_suite)
    from analysis.reporting.report import write_report

    pages = job.records_path.with_name(f"report-{name_of_suite}")
    write_report(job.name, result, pages)
    if tracker is not None and run_id is not None:
        tracker.log_folder(run_id, pages, f"evaluation/{name_of_suite}")
    console.result(summary)
    console.say(f"records {job.records_path}")
    console.say(f"report {pages / 'report.html'}")
    return 0


def _threat_model(arguments: argparse.Namespace, experiment: ExperimentConfig | None) -> ThreatModel | None:
    from pydantic import ValidationError

    from models.errors import UserError
    from models.threat_model import ThreatModel

    if arguments.epsilon is None and arguments.norm is None:
        return None
    trained = experiment.threat_model if experiment else ThreatModel()
    try:
        return ThreatModel.model_validate({"norm": arguments.norm or trained.norm, "epsilon": arguments.epsilon or trained.epsilon})
    except ValidationError as error:
        raise UserError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from None


EVALUATE = Command(
    "evaluate",
    "attack a trained model under named protocols and check whether the numbers can be believed",
    (
        "rayndom evaluate rayndom_home/exports/ctrw_bounds_digits --suite quick",
        "rayndom evaluate 5a632dea00def935 --suite standard --workers 2",
        "rayndom evaluate RUN_ID --suite paper --samples 200 --epsilon 8/255",
        "rayndom evaluate RUN_ID --suite full --surrogate AT_RUN_ID --workers 8",
    ),
    _add,
    _run,
)
