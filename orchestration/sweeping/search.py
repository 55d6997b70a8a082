"""The search of a sweep: Optuna proposes, Tune runs trials, a scheduler stops, MLflow records; the same command goes on after any kill."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from models.files import write_text
from orchestration import console
from orchestration.environment import environment_tags
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.interruption import first_taken_by_tune
from orchestration.search_space import suggest
from orchestration.storage import SMALL_BYTES, fetch
from orchestration.sweeping.config import (
    MOST_AT_ONCE,
    SWEEP_FILE,
    SweepConfig,
    describe_values,
    dimension_cells,
    dimension_titles,
    sweep_key,
)
from orchestration.sweeping.epoch_standing import STANDING, is_kept, standing
from orchestration.sweeping.listener import TrialListener, TrialRow, TrialsBroke, WhenHopeless
from orchestration.sweeping.samplers import SAMPLERS
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.state_quota import StateQuota
from orchestration.sweeping.study import (
    FIRST,
    METRICS,
    PASSED,
    PROXY,
    RETRY,
    STUDY_ERRORS,
    StudyAway,
    all_trials,
    best_robust_accuracy,
    best_trials,
    fixed_parameters,
    num_wanted,
    open_study,
    proxy_values,
    reach_study,
    remember,
    spent,
    storage_url,
    study_error,
    superseded,
)
from orchestration.sweeping.trial_attributes import RESUMES, chain
from orchestration.sweeping.trial_runs import complete_trial_runs, shared_parameters, trial_run
from orchestration.sweeping.warm_start import warm_points
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.system_metrics import system_metrics
from orchestration.tracking.tracker import SWEEP_TAG, Tracker
from orchestration.training import cluster
from orchestration.training.autoscaling import AskedRoom
from orchestration.training.job import TrainingJob, TrialReport, new_start
from orchestration.training.ray_internals import outlive_nodes
from orchestration.training.resources import trial_resources, trials_at_once
from orchestration.training.shared_storage import SharedStorage, probed
from orchestration.training.trial import run_trial, tune_resources


@dataclass(frozen=True)
class Deadline:
    """When a start of a sweep begins no further trial.

    Attributes:
        ends: by the monotonic clock.
    """

    ends: float = math.inf

    @classmethod
    def after(cls, hours: float | None) -> Deadline:
        """Return the end of so many hours from now on; None: never."""
        return NEVER if hours is None else cls(time.monotonic() + 3600 * hours)

    @property
    def passed(self) -> bool:
        """Whether the hours are over."""
        return time.monotonic() >= self.ends


NEVER = Deadline()


@dataclass(frozen=True)
class Search:
    """The search of a sweep, however far it is.

    Attributes:
        config: of the sweep.
        study: Optuna's, with all trials.
        run: the sweep's MLflow run.
        folder: of the sweep.
        deadline: of this start.
    """

    config: SweepConfig
    study: optuna.Study
    run: ParentRun
    folder: Path
    deadline: Deadline = NEVER

    @property
    def complete(self) -> bool:
        """Whether all trials are over, or all that began before the hours of this start were."""
        if spent(self.study) >= num_wanted(self.config):
            return True
        return self.deadline.passed and not any(trial.state == TrialState.RUNNING for trial in all_trials(self.study))

    @property
    def best(self) -> list[int]:
        """Numbers of the best trials: one, or the Pareto front."""
        return best_trials(self.config, self.study)

    def experiment(self, number: int) -> ExperimentConfig:
        """Return what a trial trains."""
        return self.config.experiment(all_trials(self.study)[number].user_attrs["values"])

    @property
    def stopped_early(self) -> int:
        """How many trials were stopped early."""
        again = superseded(self.study)
        return sum(trial.state == TrialState.PRUNED and trial.number not in again for trial in all_trials(self.study))


class StudySearch(Searcher):
    """Ray Tune's searcher on a persistent Optuna study, with a fixed number of trials over all starts.

    Args:
        config: the sweep.
        study: from `open_study`.
        interrupted: returns whether this start is being ended: a trial that then stops before its end stays open, and the next start goes
            on with it.
        deadline: after which nothing more is proposed.
        stopping: knows which trials that were stopped should go on.
        asked: room of the cluster, given back when no further trial begins.
    """

    def __init__(
        self,
        config: SweepConfig,
        study: optuna.Study,
        interrupted: Callable[[], bool] = lambda: False,
        deadline: Deadline = NEVER,
        stopping: EarlyStopping | None = None,
        asked: AskedRoom | None = None,
    ) -> None:
        super().__init__()  # what is improved is the study's business
        self.interrupted, self.deadline, self.stopping, self.asked = interrupted, deadline, stopping, asked
        self.config, self.study = config, study
        self.metrics = [objective.metric for objective in config.objectives]
        self.missing = num_wanted(config) - spent(study)
        """Trials that this start still has to bring to their end."""
        self.trials: dict[str, optuna.Trial] = {}
        """Of this start, by Tune's names."""
        self.begun, self.promoted = 0, set[int]()
        """How many of them count as new ones, and the numbers of those that go on with one that was stopped."""
        self.over: set[str] = set()
        self._reported: dict[str, int] = {}
        """The last epoch of each that the study has: one that broke and is tried again repeats some."""

    def save(self, checkpoint_path: str) -> None:
        """Leave an empty file: Tune wants one for its own way of restoring, which a sweep never takes. The study is on disk."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, see `save`."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Ray types it without its own FINISHED
        """Return `values`, `number`, `first` and `passed` of a trial, nothing as long as one that was stopped may still go on, or that the
        sweep has all its trials."""
        if trial_id not in self.trials:
            if self.deadline.passed:
                return self._no_more()
            trial = self._go_on() or (self.study.ask() if self.begun < self.missing else None)
            if trial is None:
                # What still trains may show that one that was stopped is among the best.
                wait = self.stopping is not None and len(self.over) < len(self.trials)
                return None if wait else self._no_more()
            self.trials[trial_id] = trial
            self.begun += trial.number not in self.promoted
        trial = self.trials[trial_id]
        values = suggest(self.config.space or {}, trial, shares=SAMPLERS[self.config.sampler].shares)
        trial.set_user_attr("values", dict(values))
        trial.set_user_attr("fingerprint", self.config.experiment(values).fingerprint)
        trials = all_trials(self.study)
        first, *_ = earlier = chain(trials, trial.number)[:0:-1] or [trial.number]
        passed = max((epoch for number in earlier for epoch in proxy_values(self.config, trials[number])), default=0)
        return {"values": values, "number": trial.number, FIRST: first, PASSED: passed}

    def _no_more(self) -> str:
        if self.asked is not None:
            self.asked.give_back()
        return Searcher.FINISHED

    def _go_on(self) -> optuna.Trial | None:
        """Return a trial that goes on with one that was stopped and should not have been; None: there is none."""
        trials = all_trials(self.study)
        if self.stopping is None or any(trial.state == TrialState.WAITING for trial in trials):  # which would be asked for before it
            return None
        number = self.stopping.take_paused()
        if number is None:
            return None
        trial = trials[number]
        self.study.enqueue_trial(fixed_parameters(trial) | trial.params, user_attrs={RESUMES: number})
        again = self.study.ask()
        self.promoted.add(again.number)
        return again

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report an epoch's value, for single-objective sweeps; keep what early stopping compares, and what is shown of a trial."""
        if trial_id in self.over or result.get("finished") or result.get("epoch", 0) <= self._reported.get(trial_id, 0):
            return
        self._reported[trial_id] = result["epoch"]
        self._keep_proxy(trial_id, result)
        trial, report = self.trials[trial_id], TrialReport.from_result(result)
        if report.metrics:
            trial.set_user_attr(METRICS, dict(report.metrics))
        value = result.get(self.metrics[0]) if len(self.metrics) == 1 else None
        if value is not None and math.isfinite(value):
            trial.report(value, report.epoch)
        elif report.epoch:  # no reported value says how far it is
            trial.set_user_attr("epochs", report.epoch)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Close the Optuna trial."""
        if trial_id in self.over or trial_id not in self.trials:
            return
        if not error and self.interrupted() and not (result or {}).get("finished") and not (result or {}).get("failed"):
            return
        result = result or {}
        if not error and not result.get("failed"):
            self.on_trial_result(trial_id, result)  # Tune leaves out the epoch that a trial was stopped after
        self.over.add(trial_id)
        trial = self.trials[trial_id]
        if "epoch" in result:
            trial.set_user_attr(METRICS, dict(TrialReport.from_result(result).metrics))
        nothing = float("nan")
        values = [result.get(metric, nothing) for metric in self.metrics]
        bounded = {constraint: result.get(constraint.metric, nothing) for constraint in self.config.constraints}
        finite = all(math.isfinite(value) for value in (*values, *bounded.values()))
        if not error and result.get("failed"):
            trial.set_user_attr("reason", result["failed"])
            self.study.tell(trial, state=TrialState.FAIL)
        elif error:
            trial.set_user_attr(RETRY, True)
            self.study.tell(trial, state=TrialState.FAIL)
        elif result.get("finished") and finite:
            report = TrialReport.from_result(result)
            trial.set_user_attr("epochs", report.epoch)
            for constraint, value in bounded.items():
                trial.set_constraint(constraint.key, constraint.violation(value))
            self.study.tell(trial, values)
        elif result.get("finished"):
            judged = dict(zip(self.metrics, values, strict=True)) | {each.key: value for each, value in bounded.items()}
            trial.set_user_attr("reason", f"not finite: {judged}")
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("epochs", result.get("epoch", 0))
            self.study.tell(trial, state=TrialState.PRUNED)

    def _keep_proxy(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the values that early stopping watches and compares where Optuna's intermediate values are others."""
        stopping, trial = self.config.stopping, self.trials[trial_id]
        if stopping is None:
            return
        kept = {}
        if self.metrics != [stopping.metric]:
            kept[PROXY] = result.get(stopping.metric)
        if is_kept(self.config, result):
            kept[STANDING] = standing(self.config, result)
        for name, value in kept.items():
            if value is not None and (name == STANDING or math.isfinite(value)):
                trial.set_user_attr(name, trial.user_attrs.get(name, {}) | {str(result["epoch"]): value})


def run_search(config: SweepConfig, workplace: Workplace, tracker: Tracker) -> Search:
    """Run the search of a sweep, or go on with it.

    Raises:
        UserError: the resources do not suffice for one trial, the study is locked, or a name is wrong.
        TrialsBroke: more trials broke than may; the cause is named.
        StudyAway, StoreAway, NoSpace, ClusterLost: the study, the MLflow store, the disk or Ray failed on the way; everything finished is
            kept.
        KeyboardInterrupt: Ctrl-C; everything finished is kept.
    """
    key = sweep_key(config)
    folder = workplace.home.sweep(key)
    deadline = Deadline.after(config.max_hours)
    known = [] if (folder / SWEEP_FILE).exists() else warm_points(config, workplace.home)
    resources = config.experiment({}).resources
    reach_study(folder)
    console.say(f"joining Ray at {workplace.address}" if workplace.address else "starting Ray")
    available = cluster.connect(workplace.address, dashboard=resources.most_workers > 1)
    if resources.is_elastic:
        outlive_nodes()
    asked = _ask_for_room(config, workplace)
    if asked is None:
        at_once = trials_at_once(resources, available, config.max_concurrent_trials, cluster.alive_nodes())
    else:
        at_once = asked.trials
    study = open_study(config, folder, known)
    run_id = tracker.run("sweep", {SWEEP_TAG: key}, name=config.name)
    tracker.set_tags(run_id, {"rayndom.recipe": ", ".join(config.all_recipes)} | environment_tags())
    tracker.log_json(run_id, config.model_dump(mode="json"), SWEEP_FILE)
    write_text(folder / SWEEP_FILE, json.dumps(config.model_dump(mode="json"), indent=2))
    shared = shared_parameters(config)
    tracker.log_params(run_id, shared)
    search = Search(config, study, ParentRun(tracker, run_id, shared), folder, deadline)
    done, wanted = spent(study), num_wanted(config)
    over = f", {done} already over" if done else ""
    console.say(f"sweep {config.name}: {wanted} trials of {', '.join(config.all_recipes)}, {at_once} at a time{over}")
    if known:
        console.say(f"warm start: {len(known)} points that something is known of come first")
    for remark in config.remarks:
        console.say(remark)
    remember(study, folder, max(experiment.training.epochs for experiment in config.base_experiments()), tracker.link(run_id))
    console.say(f"study {console.without_passwords(storage_url(folder)).removeprefix('sqlite:///')}; MLflow {tracker.link(run_id)}")
    late = complete_trial_runs(config, folder, study, workplace.home, search.run)
    if late:
        console.say(f"logged what an earlier start could not: trials {', '.join(map(str, late))}")
    if done < wanted:
        watched = system_metrics(tracker, run_id, wanted=config.experiment({}).tracking.system_metrics)
        with probed(workplace.home.root) as storage, watched:
            _tune(search, workplace, at_once, storage, asked)
        fetch(workplace.home.root / "runs", largest=SMALL_BYTES)
        if search.complete and spent(study) < wanted:
            console.say(
                f"max_hours {config.max_hours:g} are over with {spent(study)} of {wanted} trials; the same command goes on with the rest"
            )
    return search


def _ask_for_room(config: SweepConfig, workplace: Workplace) -> AskedRoom | None:
    """Ask the cluster's autoscaler for what the sweep says, and wait until the first trial fits; None: nothing is asked.

    Raises:
        ClusterLost: no room came.
    """
    if config.autoscale_to is None:
        return None
    if cluster.is_local(workplace.address):
        console.say("autoscale_to is for clusters: a Ray of this machine's own does not grow")
        return None
    need = trial_resources(config.experiment({}).resources)
    trials = min(config.autoscale_to, config.max_concurrent_trials or MOST_AT_ONCE)
    console.say(f"asking the cluster for room for {trials} trials at a time")
    asked = AskedRoom(need, trials)
    try:
        cluster.ClusterWatch(need, local=False).wait()
    except BaseException:
        asked.give_back()
        raise
    return asked


def _tune(search: Search, workplace: Workplace, at_once: int, storage: SharedStorage, asked: AskedRoom | None) -> None:
    """Run the trials that are missing, `at_once` at a time."""
    config, study, folder, start = search.config, search.study, search.folder, new_start()
    bases = config.base_experiments()
    need = trial_resources(bases[0].resources)
    measure = config.measure if config.needs_protocols else None

    def trial(suggestion: dict[str, Any]) -> None:
        experiment = config.experiment(suggestion["values"])
        name = f"{start}-{suggestion['number']}"
        run_trial(TrainingJob.at(workplace, experiment, start=name, train_storage=folder / "train", measure=measure))

    def row_of(suggestion: dict[str, Any]) -> TrialRow:
        number, values = suggestion["number"], suggestion["values"]
        run = trial_run(search.run, folder, number, config, values)
        goes_on = number in searcher.promoted
        remark = f", goes on with what trial {suggestion[FIRST]} came to" if goes_on else ""
        return TrialRow(f"trial {number}", dimension_cells(config, values), run, f"{remark}, {describe_values(values)}", goes_on=goes_on)

    writer = BackgroundWriter(search.run.tracker.uri)
    quota = StateQuota.of(config, workplace.home, study)

    def on_end(row: TrialRow) -> None:
        if quota is not None:
            writer.later(quota.after, row)  # behind what MLflow is still to be told of it

    listener = TrialListener(
        "trial",
        f"sweep {config.name}",
        dimension_titles(config),
        row_of,
        writer,
        cluster.ClusterWatch(need, local=cluster.is_local(workplace.address), storage=storage),
        wanted=num_wanted(config),
        done=spent(study),
        on_end=on_end,
        most_broken=config.max_failed_share * num_wanted(config),
        best=best_robust_accuracy(study),
    )
    stopping = None
    if config.stopping is not None:
        stopping = EarlyStopping(config, max(experiment.training.epochs for experiment in bases), study)
    searcher = StudySearch(config, study, lambda: listener.hopeless, search.deadline, stopping, asked)
    tuner = tune.Tuner(
        tune.with_resources(trial, tune_resources(bases[0])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=stopping or FIFOScheduler(),
            num_samples=100 * num_wanted(config) + 1000,  # the searcher says when the sweep has all its trials
            max_concurrent_trials=at_once,
            reuse_actors=bases[0].resources.most_workers == 1,
        ),
        run_config=tune.RunConfig(
            name=f"start-{start}",
            storage_path=str(folder / "tune"),
            callbacks=[listener],
            stop=WhenHopeless(listener),
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(),
            verbose=0,
        ),
    )
    with writer, listener.board:
        try:
            with first_taken_by_tune():
                tuner.fit()
        except (*STUDY_ERRORS, TuneError) as error:
            behind = study_error(error)
            if behind is None:
                raise
            raise StudyAway(folder, behind) from error
        finally:
            if asked is not None:
                asked.give_back()
        listener.check_disk(workplace.home)
        try:
            listener.check_broken()
        except TrialsBroke:
            search.run.tracker.finish(search.run.run_id, "FAILED")
            raise
