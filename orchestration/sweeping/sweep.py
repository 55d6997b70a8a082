"""A whole sweep: search, repeats over seeds, baselines, evaluation of the winner beside them, one table, an exported winner.

The winner is chosen on validation images and reported on test images.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.reporting.conclusion import conclusion
from models.errors import EnvironmentProblem, UserError
from models.files import write_text
from orchestration import console
from orchestration.evaluating.evaluation_report import compare, keep
from orchestration.evaluating.evaluation_run import EvaluationSettings, Job, prepare, run_jobs
from orchestration.experiment import ExperimentConfig
from orchestration.exporting.export import export_target
from orchestration.home import Home, Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping.checks import extreme_points
from orchestration.sweeping.config import SweepConfig, sweep_key
from orchestration.sweeping.findings import conclude_search, infeasible, show_trials, top_trials
from orchestration.sweeping.goals import RepeatsConfig, format_goal
from orchestration.sweeping.listed_experiments import Listed, train_listed
from orchestration.sweeping.search import Search, run_search
from orchestration.sweeping.study import ENDING_S, all_trials, full_trials, only_driver
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import Target, resolve_target
from orchestration.training.final_measures import MARKED_METRIC, kept_protocol_metrics
from orchestration.training.preparation import build_for
from orchestration.training.resources import trial_resources
from trainers.data import Splits, load_data


def run_sweep(config: SweepConfig, workplace: Workplace, *, evaluate: bool = True, wait: bool = False) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it; return a summary.

    Args:
        config: the sweep. workplace: where.
        evaluate: also evaluate the winner and the baselines.
        wait: for another process that runs it, instead of refusing.

    Raises:
        UserError: a mistake, found before any worker starts.
    """
    check_networks(config, workplace.data_root)
    baselines = [config.baseline_experiment(recipe) for recipe in config.baselines]
    with only_driver(workplace.home.sweep(sweep_key(config)), config.name, patience_s=None if wait else ENDING_S):
        tracker = Tracker(workplace.home, config.experiment({}).tracking.experiment)
        console.say(f"if it is interrupted, however that happens, it goes on with:  {resume_command()}")
        try:
            return _run_to_its_end(run_search(config, workplace, tracker), baselines, workplace, evaluate)
        except BaseException as error:
            # Not where the same command would end in the same way; what Ctrl-C leaves is said by whoever answers it.
            same = isinstance(error, UserError | NoWinner) and not isinstance(error, EnvironmentProblem)
            if not same and not isinstance(error, KeyboardInterrupt):
                console.say(f"not finished; go on with:  {resume_command()}")
            raise


def _run_to_its_end(search: Search, baselines: list[ExperimentConfig], workplace: Workplace, evaluate: bool) -> dict[str, Any]:
    """Do what follows the search."""
    started = time.monotonic()
    config, tracker, run_id = search.config, search.run.tracker, search.run.run_id
    summary: dict[str, Any] = {
        "sweep": config.name,
        "complete": True,
        "trials": len(all_trials(search.study)),
        "stopped_early": search.stopped_early,
        "best": search.best,
        "mlflow_run": run_id,
        "study": str(search.folder / "study.db"),
    }
    if not search.complete:
        tracker.finish(run_id, "KILLED")
        raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end in good order, and returns
    if not search.best:
        reason = _no_winner(search)
        tracker.finish(run_id, "FAILED")
        raise NoWinner(reason)
    winner = choose_winner(search) if config.repeats is None else _repeat(search, config.repeats, workplace)
    experiment = search.experiment(winner)
    show_trials(search, winner)
    found = conclude_search(search, winner)
    summary |= found
    selected_on = experiment.training.validation.select_on
    summary |= {"winner": winner, "winner_fingerprint": experiment.fingerprint, "selected_on": selected_on}
    tracker.set_tags(run_id, {"rayndom.winner": winner, "rayndom.selected_on": selected_on})
    if selected_on == "test":
        console.warn("training.validation.select_on is test: the winner was chosen on test images, so its test accuracy is too good")
    else:
        console.say(f"trial {winner} wins on validation images; what follows is on test images")
    train_listed("baseline", [Listed(each.name, each) for each in baselines], workplace, search.run)
    if evaluate:
        jobs = _evaluate(config, experiment, baselines, workplace, search.run)
        summary["evaluation"] = {job.name: conclusion(job.name, job.result()) for job in jobs}
    target = resolve_target(str(workplace.home.run(experiment.fingerprint)), workplace.home)
    export = export_target(target, workplace.home.root / "exports" / config.name, replace=True)
    summary["export"] = str(export)
    tracker.log_folder(run_id, export, "winner")
    _keep_search(export / "search", found)
    tracker.log_json(run_id, _movable(summary, workplace.home), "summary.json")
    tracker.log_metrics(run_id, {f"winner/{name}": value for name, value in target.config["details"]["training"]["metrics"].items()})
    tracker.finish(run_id)
    console.say(f"winner exported to {export}")
    console.say(f"MLflow {tracker.link(run_id)}")
    console.say(f"done in {console.duration(time.monotonic() - started)}")
    return summary


def _movable(summary: dict[str, Any], home: Home) -> dict[str, Any]:
    """Return a summary with the files of the home as they are named in it: a home may be moved."""
    paths = {key: str(Path(summary[key]).relative_to(home.root)) for key in ("study", "export")}
    return summary | paths | {"plots": [str(Path(plot).relative_to(home.root)) for plot in summary["plots"]]}


def choose_winner(search: Search) -> int:
    """Return the trial to export: the best one; on a Pareto front, the best by the first objective."""
    sign = 1 if search.config.objectives[0].mode == "max" else -1
    trials = all_trials(search.study)
    return max(search.best, key=lambda number: sign * trials[number].values[0])


def resume_command() -> str:
    """Return the command that goes on: the one that was given."""
    arguments = sys.argv[1:]
    return shlex.join(["rayndom", *arguments]) if arguments else "the same call"


def _no_winner(search: Search) -> str:
    """Return why there is no winner, after showing and keeping what the search found."""
    if not infeasible(search.config, full_trials(search.study)):
        return "no trial of the sweep reached its end; see the trials' errors above and in MLflow"
    show_trials(search, None)
    conclude_search(search, None)
    keys = ", ".join(each.key for each in search.config.constraints)
    return f"no trial satisfies the constraints {keys}; relax them or widen the space"


class NoWinner(RuntimeError):
    """No trial can win: going on would not change that."""


def _keep_search(folder: Path, found: dict[str, Any]) -> None:
    """Leave what the search found beside the exported winner: front, importances, rank of the proxy, plots."""
    folder.mkdir(exist_ok=True)
    for plot in map(Path, found["plots"]):
        shutil.copyfile(plot, folder / plot.name)
    write_text(folder / "search.json", json.dumps(found | {"plots": [Path(plot).name for plot in found["plots"]]}, indent=2))


def _repeat(search: Search, repeats: RepeatsConfig, workplace: Workplace) -> int:
    """Train the best trials with further seeds and return the winner by the mean."""
    config = search.config
    top = {number: search.experiment(number) for number in top_trials(config, search.study, repeats.top)}
    repeated = run_repeats(config, repeats, top, workplace, search.run)
    winner = choose_by_mean(config, repeated)
    show_repeats(config, repeated, winner)
    log_repeats(search.run, repeated, top)
    if winner is None:
        search.run.tracker.finish(search.run.run_id, "FAILED")
        raise NoWinner("none of the repeated trials satisfies the constraints on the mean over seeds; repeat more of them")
    return winner


def _evaluate(
    config: SweepConfig, winner: ExperimentConfig, baselines: list[ExperimentConfig], workplace: Workplace, run: ParentRun
) -> list[Job]:
    settings = EvaluationSettings(suite=config.suite, num_samples=config.num_test_examples)
    jobs = []
    for experiment in [*baselines, winner]:
        target = Target(RunFolder(workplace.home.run(experiment.fingerprint)).model, experiment)
        name = f"{experiment.name} (winner)" if experiment is winner else experiment.name
        jobs.append(prepare(name, target, settings, workplace))
    need = trial_resources(winner.resources)
    run_jobs(jobs, workers=1000, gpus_per_worker=need.gpus / need.workers, address=workplace.address)
    for job in jobs:
        run_id = run.tracker.find_run(job.target.experiment.fingerprint, below=run.run_id) if job.target.experiment else None
        keep(job, job.result(), run.tracker, run_id, config.suite)
    compare(jobs)
    for job in jobs:
        console.say(conclusion(job.name, job.result()))
    return jobs


@dataclass(frozen=True)
class Repeated:
    """One of the best trials over its training seeds.

    Attributes:
        number: of the trial. seeds: its own first.
        values: metric -> one value per seed.
    """

    number: int
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]

    def mean(self, metric: str) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.values[metric])

    def deviation(self, metric: str) -> float | None:
        """Return the sample standard deviation over seeds, None with one seed."""
        return statistics.stdev(self.values[metric]) if len(self.seeds) > 1 else None

    def is_feasible(self, config: SweepConfig) -> bool:
        """Return whether the means satisfy all constraints."""
        return all(constraint.violation(self.mean(constraint.metric)) <= 0 for constraint in config.constraints)


def with_seeds(experiment: ExperimentConfig, seeds: Sequence[int]) -> list[ExperimentConfig]:
    """Return the experiment with its own seed, then with each of the others."""
    return [experiment, *(experiment.model_copy(update={"seed": seed}) for seed in seeds if seed != experiment.seed)]


def run_repeats(
    config: SweepConfig, repeats: RepeatsConfig, top: Mapping[int, ExperimentConfig], workplace: Workplace, parent: ParentRun
) -> list[Repeated]:
    """Train trials with further seeds, log each training as a child run, and return their values. What is trained already is reused.

    Args:
        top: number of a trial -> its experiment.

    Raises:
        RuntimeError: a run failed.
    """
    measure = config.measure if config.needs_protocols else None
    groups = {number: with_seeds(experiment, repeats.seeds) for number, experiment in top.items()}
    listed = [Listed(f"trial {number} seed {each.seed}", each) for number, group in groups.items() for each in group[1:]]
    train_listed("repeat", listed, workplace, parent, measure)
    repeated = []
    for number, group in groups.items():
        records = []
        for experiment in group:
            folder = RunFolder(workplace.home.run(experiment.fingerprint))
            record = folder.result()
            assert record is not None
            records.append(record["metrics"] | ((kept_protocol_metrics(folder, measure) or {}) if measure else {}))
        metrics = list(dict.fromkeys(config.final_metrics))
        metrics += [MARKED_METRIC] if all(MARKED_METRIC in record for record in records) else []
        repeated.append(
            Repeated(
                number,
                tuple(experiment.seed for experiment in group),
                {metric: tuple(record[metric] for record in records) for metric in metrics},
            )
        )
    return repeated


def choose_by_mean(config: SweepConfig, repeated: Sequence[Repeated]) -> int | None:
    """Return the trial with the best mean of the first objective among those whose means satisfy the constraints; None: none does."""
    objective = config.objectives[0]
    sign = 1 if objective.mode == "max" else -1
    feasible = [each for each in repeated if each.is_feasible(config)]
    return max(feasible, key=lambda each: sign * each.mean(objective.metric)).number if feasible else None


def show_repeats(config: SweepConfig, repeated: Sequence[Repeated], winner: int | None) -> None:
    """Print mean and standard deviation of every repeated trial."""
    metrics = list(dict.fromkeys(config.final_metrics))
    rows = [
        [
            each.number,
            ", ".join(map(str, each.seeds)),
            *(_with_deviation(each, metric) for metric in metrics),
            "winner" if each.number == winner else "" if each.is_feasible(config) else "violates a constraint",
        ]
        for each in repeated
    ]
    console.table("best trials over training seeds, mean +- standard deviation", ["trial", "seeds", *metrics, ""], rows)


def log_repeats(parent: ParentRun, repeated: Sequence[Repeated], experiments: Mapping[int, ExperimentConfig]) -> None:
    """Log means and deviations to the sweep's run, and which trial a repeat belongs to, to the repeats' runs."""
    content = []
    for each in repeated:
        content.append({"trial": each.number, "seeds": each.seeds, "values": each.values})
        numbers = {}
        for metric in each.values:
            numbers[f"repeats/trial_{each.number}/{metric}/mean"] = each.mean(metric)
            deviation = each.deviation(metric)
            if deviation is not None:
                numbers[f"repeats/trial_{each.number}/{metric}/standard_deviation"] = deviation
        parent.tracker.log_metrics(parent.run_id, numbers)
        for experiment in with_seeds(experiments[each.number], each.seeds)[1:]:
            run = parent.child("repeat", experiment, f"trial {each.number} seed {experiment.seed}")
            run.set_tags({"rayndom.repeats": each.number})
            run.end()
    parent.tracker.log_json(parent.run_id, content, "repeats.json")


def _with_deviation(each: Repeated, metric: str) -> str:
    deviation = each.deviation(metric)
    # One marked seed marks the mean.
    shown = format_goal(metric, each.mean(metric), {name: max(values) for name, values in each.values.items()})
    return shown + ("" if deviation is None else f" +- {deviation:.2g}")


def check_networks(config: SweepConfig, data_root: Path | None) -> None:
    """Read the data sets of a sweep and build the network of every end of its search space, each different one once.

    Raises:
        UserError: a data set is missing, or the backbone does not have what a value asks for; says which dimension and which value.
    """
    data: dict[str, Splits] = {}
    built: set[tuple[str, ...]] = set()
    starts = [(f"recipe {base.name}", base) for base in config.base_experiments()]
    ends = [(title, config.experiment(values)) for title, values in extreme_points(config)]
    for title, experiment in [*starts, *ends]:
        where = experiment.data.model_dump_json()
        if where not in data:
            data[where] = load_data(experiment.data, data_root)
        network = (where, experiment.backbone.model_dump_json(), experiment.defence.model_dump_json())
        if network in built:
            continue
        built.add(network)
        try:
            build_for(experiment, data[where])
        except UserError as error:
            raise UserError(f"sweep {config.name}: {title}: {error}") from None
