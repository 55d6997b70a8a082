"""A whole sweep: search, repeats over seeds, baselines, evaluation of the winner beside them, one table, an exported winner.

The winner is chosen on validation images and reported on test images.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from analysis.reporting.conclusion import conclusion
from models.errors import UserError
from orchestration import console
from orchestration.evaluating.evaluation_report import compare, keep
from orchestration.evaluating.evaluation_run import EvaluationSettings, Job, prepare, run_jobs
from orchestration.experiment import ExperimentConfig
from orchestration.exporting.export import export_target
from orchestration.exporting.targets import Target, resolve_target
from orchestration.home import Home
from orchestration.sweeping.analysis import infeasible, top_trials
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.listed_experiments import train_baselines
from orchestration.sweeping.network_check import check_networks
from orchestration.sweeping.repeats import choose_by_mean, log_repeats, run_repeats, show_repeats
from orchestration.sweeping.summary import conclude_search, show_trials
from orchestration.sweeping.sweep import SweepOutcome, run_sweep, sweep_key
from orchestration.sweeping.sweep_lock import only_driver
from orchestration.tracking.tracker import Tracker
from orchestration.training.resources import trial_resources
from orchestration.training.run_folder import RunFolder, replace_text


def run_whole_sweep(
    config: SweepConfig, home: Home, data_root: Path | None, *, address: str | None = None, evaluate: bool = True
) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it; return a summary.

    Raises:
        UserError: a mistake, found before any worker starts.
    """
    base = config.experiment({})
    check_networks(config, data_root)
    baselines = [config.baseline_experiment(recipe) for recipe in config.baselines]
    with only_driver(home.sweep(sweep_key(config)), config.name):
        tracker = Tracker(home, base.tracking.experiment)
        console.say(f"if it is interrupted, however that happens, it goes on with:  {resume_command()}")
        summary: dict[str, Any] = {"complete": False}
        try:
            summary = _run_to_its_end(config, baselines, home, data_root, address, tracker, evaluate)
        except (UserError, NoWinner):
            summary = {"complete": True}  # the same command would end in the same way
            raise
        finally:
            if not summary["complete"]:
                console.say(f"not finished; go on with:  {resume_command()}")
        return summary


def _run_to_its_end(
    config: SweepConfig,
    baselines: list[ExperimentConfig],
    home: Home,
    data_root: Path | None,
    address: str | None,
    tracker: Tracker,
    evaluate: bool,
) -> dict[str, Any]:
    started = time.monotonic()
    outcome = run_sweep(config, home, data_root, address=address, tracker=tracker)
    summary: dict[str, Any] = {
        "sweep": config.name,
        "complete": outcome.complete,
        "trials": len(outcome.study.trials),
        "stopped_early": outcome.stopped_early,
        "best": outcome.best,
        "mlflow_run": outcome.parent_run,
        "study": str(outcome.folder / "study.db"),
    }
    if not outcome.complete:
        tracker.finish(outcome.parent_run, "KILLED")
        return summary
    if not outcome.best:
        reason = _no_winner(config, outcome, tracker)
        tracker.finish(outcome.parent_run, "FAILED")
        raise NoWinner(reason)
    winner = choose_winner(config, outcome)
    if config.repeats is not None:
        winner = _repeat(config, outcome, home, data_root, tracker)
    experiment = outcome.experiments[winner]
    show_trials(config, outcome, winner)
    found = conclude_search(config, outcome, winner, tracker)
    summary |= found
    selected_on = experiment.training.validation.select_on
    summary |= {"winner": winner, "winner_fingerprint": experiment.fingerprint, "selected_on": selected_on}
    tracker.set_tags(outcome.parent_run, {"rayndom.winner": winner, "rayndom.selected_on": selected_on})
    if selected_on == "test":
        console.warn("training.validation.select_on is test: the winner was chosen on test images, so its test accuracy is too good")
    else:
        console.say(f"trial {winner} wins on validation images; what follows is on test images")
    train_baselines(baselines, home, data_root, tracker, outcome.parent_run)
    jobs: list[Job] = []
    if evaluate:
        jobs = _evaluate(config, experiment, baselines, home, data_root, address, tracker, outcome.parent_run)
        summary["evaluation"] = {job.name: conclusion(job.name, job.result()) for job in jobs}
    target = resolve_target(str(home.run(experiment.fingerprint)), home)
    export = export_target(target, home.root / "exports" / config.name)
    summary["export"] = str(export)
    tracker.log_folder(outcome.parent_run, export, "winner")
    _keep_search(export / "search", found)
    tracker.log_json(outcome.parent_run, summary, "summary.json")
    tracker.log_metrics(
        outcome.parent_run, {f"winner/{name}": value for name, value in target.config["details"]["training"]["metrics"].items()}
    )
    tracker.finish(outcome.parent_run)
    console.say(f"winner exported to {export}")
    console.say(f"MLflow {tracker.link(outcome.parent_run)}")
    console.say(f"done in {console.duration(time.monotonic() - started)}")
    return summary


def choose_winner(config: SweepConfig, outcome: SweepOutcome) -> int:
    """Return the trial to export: the best one; on a Pareto front, the best by the first objective."""
    sign = 1 if config.objectives[0].mode == "max" else -1
    trials = {trial.number: trial for trial in outcome.study.trials}
    return max(outcome.best, key=lambda number: sign * trials[number].values[0])


def resume_command() -> str:
    """Return the command that goes on: the one that was given."""
    arguments = sys.argv[1:]
    return shlex.join(["rayndom", *arguments]) if arguments else "the same call"


def _no_winner(config: SweepConfig, outcome: SweepOutcome, tracker: Tracker) -> str:
    """Return why there is no winner, after showing and keeping what the search found."""
    violating = infeasible(config, outcome.study)
    if not violating:
        return "no trial of the sweep reached its end; see the trials' errors above and in MLflow"
    show_trials(config, outcome, None)
    conclude_search(config, outcome, None, tracker)
    return f"no trial satisfies the constraints {', '.join(each.key for each in config.constraints)}; relax them or widen the space"


class NoWinner(RuntimeError):
    """No trial can win: going on would not change that."""


def _keep_search(folder: Path, found: dict[str, Any]) -> None:
    """Leave what the search found beside the exported winner: front, importances, rank of the proxy, plots."""
    folder.mkdir(exist_ok=True)
    for plot in map(Path, found["plots"]):
        shutil.copyfile(plot, folder / plot.name)
    replace_text(folder / "search.json", json.dumps(found | {"plots": [Path(plot).name for plot in found["plots"]]}, indent=2))


def _repeat(config: SweepConfig, outcome: SweepOutcome, home: Home, data_root: Path | None, tracker: Tracker) -> int:
    """Train the best trials with further seeds and return the winner by the mean."""
    assert config.repeats is not None
    top = top_trials(config, outcome.study, config.repeats.top)
    repeated = run_repeats(config, outcome.experiments, top, home, data_root, tracker, outcome.parent_run)
    winner = choose_by_mean(config, repeated)
    show_repeats(config, repeated, winner)
    log_repeats(tracker, outcome.parent_run, repeated, outcome.experiments)
    if winner is None:
        tracker.finish(outcome.parent_run, "FAILED")
        raise NoWinner("none of the repeated trials satisfies the constraints on the mean over seeds; repeat more of them")
    return winner


def _evaluate(
    config: SweepConfig,
    winner: ExperimentConfig,
    baselines: list[ExperimentConfig],
    home: Home,
    data_root: Path | None,
    address: str | None,
    tracker: Tracker,
    parent: str,
) -> list[Job]:
    settings = EvaluationSettings(suite=config.suite, num_samples=config.num_test_examples)
    jobs = []
    for experiment in [*baselines, winner]:
        folder = RunFolder(home.run(experiment.fingerprint))
        target = Target(folder.model, experiment)
        name = f"{experiment.name} (winner)" if experiment is winner else experiment.name
        jobs.append(prepare(name, target, settings, home, data_root))
    need = trial_resources(winner.resources)
    run_jobs(jobs, workers=1000, gpus_per_worker=need.gpus / need.workers, address=address)
    for job in jobs:
        run_id = tracker.find_run(job.target.experiment.fingerprint) if job.target.experiment else None
        keep(job, job.result(), tracker, run_id, config.suite)
    compare(jobs)
    for job in jobs:
        console.say(conclusion(job.name, job.result()))
    return jobs


__all__ = ["UserError", "choose_winner", "resume_command", "run_whole_sweep"]
