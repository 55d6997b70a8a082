"""A whole sweep: search, baselines, evaluation of the winner beside them, one table, an exported winner, what to do next."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from models.errors import UserError
from orchestration import console
from orchestration.baselines import train_baselines
from orchestration.evaluation_report import compare, conclusion, keep
from orchestration.evaluation_run import EvaluationSettings, Job, prepare, run_jobs
from orchestration.experiment import ExperimentConfig
from orchestration.export import export_target
from orchestration.home import Home
from orchestration.resources import trial_resources
from orchestration.run_folder import RunFolder
from orchestration.study import superseded
from orchestration.sweep import SweepOutcome, run_sweep
from orchestration.sweep_config import SweepConfig
from orchestration.targets import Target, resolve_target
from orchestration.tracking import Tracker
from trainers.data import load_data


def run_whole_sweep(
    config: SweepConfig, home: Home, data_root: Path | None, *, address: str | None = None, evaluate: bool = True
) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it; return a summary.

    Raises:
        UserError: a mistake, found before any worker starts.
    """
    started = time.monotonic()
    base = config.experiment({})
    load_data(base.data, data_root)  # a missing data set is found here, not in a worker
    baselines = [config.baseline_experiment(recipe) for recipe in config.baselines]
    tracker = Tracker(home, base.tracking.experiment)
    outcome: SweepOutcome | None = None
    try:
        outcome = run_sweep(config, home, data_root, address=address, tracker=tracker)
    finally:
        if outcome is None or not outcome.complete:
            console.say(f"not finished; go on with:  {resume_command()}")
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
        tracker.finish(outcome.parent_run, "FAILED")
        raise RuntimeError("no trial of the sweep reached its end; see the trials' errors above and in MLflow")
    winner = choose_winner(config, outcome)
    experiment = outcome.experiments[winner]
    _show_winner(config, outcome, winner)
    summary |= {"winner": winner, "winner_fingerprint": experiment.fingerprint}
    train_baselines(baselines, home, data_root, tracker, outcome.parent_run)
    jobs: list[Job] = []
    if evaluate:
        jobs = _evaluate(config, experiment, baselines, home, data_root, address, tracker, outcome.parent_run)
        summary["evaluation"] = {job.name: conclusion(job.name, job.result()) for job in jobs}
    target = resolve_target(str(home.run(experiment.fingerprint)), home)
    export = export_target(target, home.root / "exports" / config.name)
    summary["export"] = str(export)
    tracker.log_folder(outcome.parent_run, export, "winner")
    tracker.log_json(outcome.parent_run, summary, "summary.json")
    tracker.log_metrics(
        outcome.parent_run, {f"winner/{name}": value for name, value in target.config["details"]["training"]["metrics"].items()}
    )
    tracker.finish(outcome.parent_run)
    console.say(f"winner exported to {export}")
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


def _show_winner(config: SweepConfig, outcome: SweepOutcome, winner: int) -> None:
    rows = []
    again = superseded(outcome.study)
    for trial in sorted(outcome.study.trials, key=lambda trial: trial.number):
        if "values" not in trial.user_attrs or trial.number in again:
            continue
        values = trial.user_attrs["values"]
        shown = [_short(values.get(name)) for name in config.space or {}]
        ended = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        scores = [f"{value:.4g}" for value in (trial.values or [])] if trial.state.name == "COMPLETE" else ["" for _ in config.objectives]
        mark = "winner" if trial.number == winner else "front" if trial.number in outcome.best else ""
        rows.append([trial.number, ended, trial.user_attrs.get("epochs", ""), *shown, *scores, mark])
    dimensions = [name.rpartition(".")[2] for name in config.space or {}]
    console.table("trials", ["trial", "ended", "epochs", *dimensions, *(objective.metric for objective in config.objectives), ""], rows)


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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


__all__ = ["UserError", "choose_winner", "resume_command", "run_whole_sweep"]
