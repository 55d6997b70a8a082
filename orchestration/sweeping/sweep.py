"""A whole sweep: search, repeats over seeds, baselines, evaluation of the winner beside them, one table, an exported winner.

The winner is chosen on validation images and reported on test images.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from analysis.reporting.conclusion import conclusion
from models.errors import EnvironmentProblem, UserError
from models.files import write_text
from orchestration import console
from orchestration.evaluating.evaluation_report import compare, keep
from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare, run_jobs
from orchestration.experiment import ExperimentConfig
from orchestration.exporting.export import export_target
from orchestration.home import Home, Workplace
from orchestration.run_folder import RunFolder
from orchestration.storage import fetch
from orchestration.sweeping.config import SweepConfig, sweep_key
from orchestration.sweeping.evaluations_ahead import EvaluationsAhead
from orchestration.sweeping.findings import conclude_search, infeasible, show_trials
from orchestration.sweeping.listed_experiments import train_listed
from orchestration.sweeping.network_check import check_networks
from orchestration.sweeping.plan import plan_sweep
from orchestration.sweeping.repeats import repeat_best
from orchestration.sweeping.search import Search, run_search
from orchestration.sweeping.study import ENDING_S, all_trials, full_trials, only_driver, storage_url
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.logged_models import log_data, put_out
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import Target
from orchestration.training.resources import trial_resources
from orchestration.training.tracked_outcome import track_model


def run_sweep(config: SweepConfig, workplace: Workplace, *, evaluate: bool = True, wait: bool = False) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it; return a summary.

    Args:
        config: the sweep. workplace: where.
        evaluate: also evaluate the winner and the baselines.
        wait: for another process that runs it, instead of refusing.

    Raises:
        UserError: a mistake, found before any worker starts.
    """
    folder = workplace.home.sweep(sweep_key(config))
    with only_driver(folder, config.name, patience_s=None if wait else ENDING_S):
        plan = plan_sweep(config, folder, workplace.home)
        check_networks(plan.config, workplace.data_root, plan.weights)
        tracker = Tracker(workplace.home, plan.tracking.experiment)
        console.say(f"if it is interrupted, however that happens, it goes on with:  {resume_command()}")
        try:
            settings = EvaluationSettings(suite=config.suite, num_samples=config.num_test_examples)
            with EvaluationsAhead(plan.baselines, settings if evaluate else None, workplace) as ahead:
                ending = _Ending(run_search(plan, workplace, tracker, ahead), workplace, settings, ahead)
                return ending.reach(evaluate=evaluate)
        except BaseException as error:
            # Not where the same command would end in the same way; what Ctrl-C leaves is said by whoever answers it.
            same = isinstance(error, UserError | NoWinner) and not isinstance(error, EnvironmentProblem)
            if not same and not isinstance(error, KeyboardInterrupt):
                console.say(f"not finished; go on with:  {resume_command()}")
            raise


@dataclass(frozen=True)
class _Ending:
    """What follows the search of a sweep: repeats, baselines, the winner's evaluation and export.

    Attributes:
        search: however far it is. workplace: where.
        settings: of the evaluation. ahead: what evaluates baselines already.
    """

    search: Search
    workplace: Workplace
    settings: EvaluationSettings
    ahead: EvaluationsAhead

    @property
    def baselines(self) -> Sequence[ExperimentConfig]:
        """What is trained and evaluated beside the winner."""
        return self.search.plan.baselines

    @property
    def config(self) -> SweepConfig:
        """The sweep."""
        return self.search.config

    @property
    def run(self) -> ParentRun:
        """Its run in MLflow."""
        return self.search.run

    def reach(self, *, evaluate: bool) -> dict[str, Any]:
        """Do all of it, and return the summary of the sweep.

        Raises:
            NoWinner: no trial can win. KeyboardInterrupt: the search was interrupted.
        """
        started = time.monotonic()
        search, tracker, run_id, home = self.search, self.run.tracker, self.run.run_id, self.workplace.home
        if not search.complete:
            tracker.finish(run_id, "KILLED")
            raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end in good order, and returns
        winner = self._choose()
        experiment = search.experiment(winner)
        show_trials(search, winner)
        found = conclude_search(search, winner)
        selected_on = experiment.training.validation.select_on
        tracker.set_tags(run_id, {"rayndom.winner": winner, "rayndom.selected_on": selected_on})
        if selected_on == "test":
            console.warn("training.validation.select_on is test: the winner was chosen on test images, so its test accuracy is too good")
        else:
            console.say(f"trial {winner} wins on validation images; what follows is on test images")
        train_listed("baseline", search.plan.listed_baselines(), self.workplace, self.run)
        self._track_models(experiment)
        trained = self._folder(experiment).result()
        if trained is None:
            raise UserError(f"the winner's run {self._folder(experiment).path} is gone; give the sweep another name, and it searches anew")
        evaluations = self._evaluate(experiment) if evaluate else None
        export = export_target(self._target(experiment), home.root / "exports" / self.config.name, replace=True)
        tracker.log_folder(run_id, export, "winner")
        _keep_search(export / "search", found)
        summary = {
            "sweep": self.config.name,
            "complete": True,
            "trials": len(all_trials(search.study)),
            "stopped_early": search.stopped_early,
            "best": search.best,
            "mlflow_run": run_id,
            "study": console.without_passwords(storage_url(search.folder)).removeprefix("sqlite:///"),
            **found,
            "winner": winner,
            "winner_fingerprint": experiment.fingerprint,
            "selected_on": selected_on,
            **({} if evaluations is None else {"evaluation": evaluations}),
            "export": str(export),
        }
        tracker.log_json(run_id, _movable(summary, home), "summary.json")
        tracker.log_metrics(run_id, {f"winner/{name}": value for name, value in trained["metrics"].items()})
        self._track_winner(experiment)
        tracker.finish(run_id)
        console.say(f"winner exported to {export}")
        console.say(f"MLflow {tracker.link(run_id)}")
        console.say(f"done in {console.duration(time.monotonic() - started)}")
        return summary

    def _choose(self) -> int:
        """Return the winner: the best trial, or with repeats the best by the mean over seeds."""
        winner, reason = None, ""
        if not self.search.best:
            reason = self._why_none()
        elif self.config.repeats is None:
            winner = choose_winner(self.search)
        else:
            winner = repeat_best(self.search, self.config.repeats, self.workplace)
            reason = "none of the repeated trials satisfies the constraints on the mean over seeds; repeat more of them"
        if winner is None:
            self.run.tracker.finish(self.run.run_id, "FAILED")
            raise NoWinner(reason)
        return winner

    def _why_none(self) -> str:
        """Return why no trial can win, after showing and keeping what the search found."""
        if not infeasible(self.config, full_trials(self.search.study)):
            return "no trial of the sweep reached its end; see the trials' errors above and in MLflow"
        show_trials(self.search, None)
        conclude_search(self.search, None)
        keys = ", ".join(each.key for each in self.config.constraints)
        return f"no trial satisfies the constraints {keys}; relax them or widen the space"

    def _evaluate(self, winner: ExperimentConfig) -> dict[str, str]:
        """Evaluate the baselines and the winner on test images, show and keep it; return the conclusion for each."""
        need = trial_resources(winner.resources)
        run = partial(run_jobs, workers=1000, gpus_per_worker=need.gpus / need.workers, address=self.workplace.address)
        chosen = prepare(f"{winner.name} (winner)", self._target(winner), self.settings, self.workplace)
        if self.ahead.are_running:
            run([chosen])
            self.ahead.wait()
        jobs = [prepare(each.name, self._target(each), self.settings, self.workplace) for each in self.baselines]
        jobs.append(chosen)
        run(jobs)
        tracker = self.run.tracker
        for job in jobs:
            run_id = tracker.find_run(job.target.experiment.fingerprint, below=self.run.run_id) if job.target.experiment else None
            keep(job, job.result(), tracker, run_id, self.config.suite)
        compare(jobs)
        conclusions = {job.name: conclusion(job.name, job.result()) for job in jobs}
        for sentence in conclusions.values():
            console.say(sentence)
        return conclusions

    def _track_models(self, winner: ExperimentConfig) -> None:
        """Log the models of the winner and the baselines to their runs in MLflow, of all finished trials where that was asked for; the
        winner is shown as what the sweep's run put out, too."""
        tracker, chosen = self.run.tracker, [*self.baselines, winner]
        if self.config.log_models == "all":
            others = (self.search.experiment(trial.number) for trial in full_trials(self.search.study))
            chosen += [each for each in others if each.fingerprint != winner.fingerprint]
        for experiment in chosen:
            fetch(self._folder(experiment).path)
            run_id = tracker.find_run(experiment.fingerprint, below=self.run.run_id)
            model_id = None if run_id is None else track_model(tracker, run_id, experiment)
            if model_id is not None and experiment is winner:
                put_out(tracker, self.run.run_id, model_id)

    def _track_winner(self, winner: ExperimentConfig) -> None:
        """Show the winner's test metrics, what it was trained on and its values at the sweep's own run, in the columns of its trials."""
        tracker, run_id = self.run.tracker, self.run.run_id
        trained = tracker.find_run(winner.fingerprint, below=run_id)
        if trained is not None:
            found = tracker.client.get_run(trained).data.metrics
            tracker.log_metrics(run_id, {name: value for name, value in found.items() if name.startswith("test/")})
        data = self._folder(winner).data()
        if data is not None:
            log_data(tracker, run_id, data, "training")
        missing, shared = object(), self.run.shared
        varied = {f"rayndom.winner.{name}": value for name, value in winner.flatten().items() if shared.get(name, missing) != value}
        tracker.set_tags(run_id, varied)

    def _folder(self, experiment: ExperimentConfig) -> RunFolder:
        return RunFolder(self.workplace.home.run(experiment.fingerprint))

    def _target(self, experiment: ExperimentConfig) -> Target:
        """Return the model of a finished training of this sweep."""
        return Target(self._folder(experiment).model, experiment)


class NoWinner(RuntimeError):
    """No trial can win: going on would not change that."""


def choose_winner(search: Search) -> int:
    """Return the trial to export: the best one; on a Pareto front, the best by the first objective."""
    sign = 1 if search.config.objectives[0].mode == "max" else -1
    trials = all_trials(search.study)
    return max(search.best, key=lambda number: sign * trials[number].values[0])


def resume_command() -> str:
    """Return the command that goes on: the one that was given."""
    arguments = sys.argv[1:]
    return console.without_passwords(shlex.join(["rayndom", *arguments])) if arguments else "the same call"


def _movable(summary: dict[str, Any], home: Home) -> dict[str, Any]:
    """Return a summary with the files of the home as they are named in it: a home may be moved."""
    paths = {key: str(Path(summary[key]).relative_to(home.root)) for key in ("study", "export") if "://" not in summary[key]}
    return summary | paths | {"plots": [str(Path(plot).relative_to(home.root)) for plot in summary["plots"]]}


def _keep_search(folder: Path, found: dict[str, Any]) -> None:
    """Leave what the search found beside the exported winner: front, importances, rank of the proxy, plots."""
    folder.mkdir(exist_ok=True)
    for plot in map(Path, found["plots"]):
        shutil.copyfile(plot, folder / plot.name)
    write_text(folder / "search.json", json.dumps(found | {"plots": [Path(plot).name for plot in found["plots"]]}, indent=2))
