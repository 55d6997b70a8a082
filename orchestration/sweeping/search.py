"""The search of a sweep: Optuna proposes, Tune runs trials, a scheduler stops, MLflow records; the same command goes on after any kill."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune
from ray.tune.error import TuneError

from models.files import write_text
from orchestration import console
from orchestration.environment import environment_tags
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.interruption import first_taken_by_tune
from orchestration.storage import SMALL_BYTES, fetch
from orchestration.sweeping.beside_trials import BASELINE, BesideTrials
from orchestration.sweeping.config import (
    MOST_AT_ONCE,
    SWEEP_FILE,
    SweepConfig,
    describe_values,
    dimension_cells,
    dimension_titles,
)
from orchestration.sweeping.evaluations_ahead import EvaluationsAhead
from orchestration.sweeping.free_places import FreePlaces
from orchestration.sweeping.listener import TrialListener, TrialRow, TrialsBroke, WhenHopeless
from orchestration.sweeping.plan import SweepPlan
from orchestration.sweeping.precedence import Precedence, tell_arbiter
from orchestration.sweeping.proposals import NEVER, Deadline, StudySearch
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.state_quota import StateQuota
from orchestration.sweeping.study import (
    FIRST,
    STUDY_ERRORS,
    StudyAway,
    all_trials,
    best_robust_accuracy,
    best_trials,
    num_wanted,
    open_study,
    reach_study,
    remember,
    spent,
    storage_url,
    study_error,
    superseded,
)
from orchestration.sweeping.trial_runs import complete_trial_runs, shared_parameters, trial_run
from orchestration.sweeping.warm_start import warm_points
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.experiment_run import ParentRun
from orchestration.tracking.system_metrics import system_metrics
from orchestration.tracking.tracker import SWEEP_TAG, Tracker
from orchestration.training import cluster
from orchestration.training.autoscaling import AskedRoom
from orchestration.training.job import TrainingJob, new_start
from orchestration.training.ray_internals import outlive_nodes
from orchestration.training.resources import trial_resources, trials_at_once
from orchestration.training.shared_storage import SharedStorage, probed
from orchestration.training.trial import run_trial, tune_resources


@dataclass(frozen=True)
class Search:
    """The search of a sweep, however far it is.

    Attributes:
        plan: of the sweep.
        study: Optuna's, with all trials.
        run: the sweep's MLflow run.
        deadline: of this start.
    """

    plan: SweepPlan
    study: optuna.Study
    run: ParentRun
    deadline: Deadline = NEVER

    @property
    def config(self) -> SweepConfig:
        """The sweep."""
        return self.plan.config

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return self.plan.folder

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


def run_search(plan: SweepPlan, workplace: Workplace, tracker: Tracker, ahead: EvaluationsAhead | None = None) -> Search:
    """Run the search of a sweep, or go on with it.

    Args:
        plan: of the sweep. workplace: where. tracker: of its record.
        ahead: evaluates baselines while trials train; None: they are evaluated afterwards.

    Raises:
        UserError: the resources do not suffice for one trial, the study is locked, or a name is wrong.
        TrialsBroke: more trials broke than may; the cause is named.
        StudyAway, StoreAway, NoSpace, ClusterLost: the study, the MLflow store, the disk or Ray failed on the way; everything finished is
            kept.
        KeyboardInterrupt: Ctrl-C; everything finished is kept.
    """
    config, folder, resources = plan.config, plan.folder, plan.resources
    deadline = Deadline.after(config.max_hours)
    known = [] if (folder / SWEEP_FILE).exists() else warm_points(config, workplace.home)
    reach_study(folder)
    console.say(f"joining Ray at {workplace.address}" if workplace.address else "starting Ray")
    available = cluster.connect(workplace.address, dashboard=resources.most_workers > 1)
    if resources.is_elastic:
        outlive_nodes()
    asked = _ask_for_room(plan, workplace)
    if asked is None:
        at_once = trials_at_once(resources, available, config.max_concurrent_trials, cluster.alive_nodes())
    else:
        at_once = asked.trials
    study = open_study(config, folder, known)
    run_id = tracker.run("sweep", {SWEEP_TAG: plan.key}, name=config.name)
    tracker.set_tags(run_id, {"rayndom.recipe": ", ".join(config.all_recipes)} | environment_tags())
    tracker.log_json(run_id, config.model_dump(mode="json"), SWEEP_FILE)
    write_text(folder / SWEEP_FILE, json.dumps(config.model_dump(mode="json"), indent=2))
    shared = shared_parameters(plan.bases)
    tracker.log_params(run_id, shared)
    search = Search(plan, study, ParentRun(tracker, run_id, shared), deadline)
    done, wanted = spent(study), num_wanted(config)
    over = f", {done} already over" if done else ""
    console.say(f"sweep {config.name}: {wanted} trials of {', '.join(config.all_recipes)}, {at_once} at a time{over}")
    if known:
        console.say(f"warm start: {len(known)} points that something is known of come first")
    for remark in config.remarks:
        console.say(remark)
    remember(study, folder, plan.epochs, tracker.link(run_id))
    console.say(f"study {console.without_passwords(storage_url(folder)).removeprefix('sqlite:///')}; MLflow {tracker.link(run_id)}")
    late = complete_trial_runs(config, folder, study, workplace.home, search.run)
    if late:
        console.say(f"logged what an earlier start could not: trials {', '.join(map(str, late))}")
    if done < wanted:
        watched = system_metrics(tracker, run_id, wanted=plan.tracking.system_metrics)
        with probed(workplace.home.root) as storage, watched:
            _tune(search, workplace, at_once, storage, asked, ahead)
        fetch(workplace.home.root / "runs", largest=SMALL_BYTES)
        if search.complete and spent(study) < wanted:
            console.say(
                f"max_hours {config.max_hours:g} are over with {spent(study)} of {wanted} trials; the same command goes on with the rest"
            )
    return search


def _ask_for_room(plan: SweepPlan, workplace: Workplace) -> AskedRoom | None:
    """Ask the cluster's autoscaler for what the sweep says, and wait until the first trial fits; None: nothing is asked.

    Raises:
        ClusterLost: no room came.
    """
    config, need = plan.config, trial_resources(plan.resources)
    if config.autoscale_to is None:
        return None
    if cluster.is_local(workplace.address):
        console.say("autoscale_to is for clusters: a Ray of this machine's own does not grow")
        return None
    trials = min(config.autoscale_to, config.max_concurrent_trials or MOST_AT_ONCE)
    console.say(f"asking the cluster for room for {trials} trials at a time")
    with contextlib.ExitStack() as unless_it_comes:
        asked = AskedRoom(need, trials)
        unless_it_comes.callback(asked.give_back)
        cluster.ClusterWatch(need, local=False).wait()
        unless_it_comes.pop_all()
    return asked


def _tune(
    search: Search,
    workplace: Workplace,
    at_once: int,
    storage: SharedStorage,
    asked: AskedRoom | None,
    ahead: EvaluationsAhead | None,
) -> None:
    """Run the trials that are missing, `at_once` at a time."""
    plan, config, study, folder, start = search.plan, search.config, search.study, search.folder, new_start()
    need = trial_resources(plan.resources)
    measure = config.measure if config.needs_protocols else None

    def trial(suggestion: dict[str, Any]) -> None:
        if BASELINE in suggestion:
            run_trial(jobs_beside[suggestion[BASELINE]])
            return
        experiment = config.experiment(suggestion["values"])
        name = f"{start}-{suggestion['number']}"
        initial = plan.initial(experiment)
        run_trial(TrainingJob.at(workplace, experiment, start=name, train_storage=folder / "train", measure=measure, initial=initial))

    def row_of(suggestion: dict[str, Any]) -> TrialRow:
        if BASELINE in suggestion:
            each = proposals.listed[suggestion[BASELINE]]
            run, cells = search.run.child("baseline", each.experiment, each.title), [""] * len(dimension_titles(config))
            return TrialRow(each.title, cells, run, " on a worker that no trial needs any more", beside=True)
        number, values = suggestion["number"], suggestion["values"]
        run = trial_run(search.run, folder, number, config, values)
        goes_on = number in searcher.promoted
        remark = f", goes on with what trial {suggestion[FIRST]} came to" if goes_on else ""
        return TrialRow(f"trial {number}", dimension_cells(config, values), run, f"{remark}, {describe_values(values)}", goes_on=goes_on)

    writer = BackgroundWriter(search.run.tracker.uri)
    quota = StateQuota.of(config, workplace.home, study)

    def on_end(row: TrialRow) -> None:
        if row.beside and row.finished and ahead is not None:
            ahead.trained(row.experiment)
        if quota is not None and not row.beside:
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
        stopping = EarlyStopping(config, plan.epochs, study)
    tell = None if cluster.is_local(workplace.address) else tell_arbiter
    precedence = Precedence(f"{plan.key} {start}", config.priority, tell)  # the same sweep may run in another home
    places = stopping or FreePlaces()
    idle = (lambda: None) if ahead is None else ahead.places_are_free
    searcher = StudySearch(config, study, lambda: listener.hopeless, search.deadline, stopping, asked, idle, places, precedence.has_to_wait)
    alike = [each for each in plan.listed_baselines() if each.experiment.resources == plan.resources]
    proposals = BesideTrials(searcher, alike, workplace, start)
    jobs_beside = proposals.jobs
    tuner = tune.Tuner(
        tune.with_resources(trial, tune_resources(plan.resources)),
        tune_config=tune.TuneConfig(
            search_alg=proposals,
            scheduler=places,
            num_samples=100 * num_wanted(config) + 1000,  # the searcher says when the sweep has all its trials
            max_concurrent_trials=at_once,
            reuse_actors=plan.resources.most_workers == 1,
        ),
        run_config=tune.RunConfig(
            name=f"start-{start}",
            storage_path=str(folder / "tune"),
            callbacks=[listener, precedence],
            stop=WhenHopeless(listener),
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(),
            verbose=0,
        ),
    )
    with writer, listener.board:
        _fit(tuner, folder, asked)
        listener.check_disk(workplace.home)
        if any(row.beside and row.state.startswith(("running", "interrupted")) for row in listener.rows.values()):
            raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end in good order, and returns
        try:
            listener.check_broken()
        except TrialsBroke:
            search.run.tracker.finish(search.run.run_id, "FAILED")
            raise


def _fit(tuner: tune.Tuner, folder: Path, asked: AskedRoom | None) -> None:
    """Let Tune run until nothing more is proposed, and give back the room that was asked for.

    Raises:
        StudyAway: the study of this folder failed behind what Tune says.
    """
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
