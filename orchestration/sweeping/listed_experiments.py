"""Training a given list of experiments (baselines, repeats over seeds): as many at a time as fit, on the Ray that the sweep runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from orchestration import console
from orchestration.experiment import ExperimentConfig, ResourcesConfig
from orchestration.home import Home, Workplace
from orchestration.interruption import first_taken_by_tune
from orchestration.run_folder import RunFolder
from orchestration.storage import SMALL_BYTES, fetch
from orchestration.sweeping.listener import TrialListener, TrialRow, WhenHopeless
from orchestration.sweeping.trial_runs import known_history
from orchestration.tracking.background_writer import BackgroundWriter
from orchestration.tracking.experiment_run import FAILED, ParentRun
from orchestration.trained_models.initial_weights import InitialWeights
from orchestration.training import cluster
from orchestration.training.final_measures import kept_protocol_metrics
from orchestration.training.job import TrainingJob, new_start
from orchestration.training.measure import MeasureConfig
from orchestration.training.ray_internals import outlive_nodes
from orchestration.training.resources import trial_resources, trials_at_once, with_workers_that_fit
from orchestration.training.shared_storage import probed
from orchestration.training.tracked_outcome import track_data
from orchestration.training.training_run import check_initial_weights
from orchestration.training.trial import run_trial, tune_resources


@dataclass(frozen=True)
class Listed:
    """An experiment of the list.

    Attributes:
        title: what it is called in lines and in MLflow. experiment: what is trained.
        initial: the weights that it begins with, where they were looked up before.
    """

    title: str
    experiment: ExperimentConfig
    initial: InitialWeights | None = None


def train_listed(
    kind: str, listed: Sequence[Listed], workplace: Workplace, parent: ParentRun, measure: MeasureConfig | None = None
) -> None:
    """Train every experiment that has no finished run yet; each gets its own MLflow run below `parent`.

    Args:
        kind: `baseline` or `repeat`.
        measure: attack the finished models under named protocols, on validation images; None: do not.

    Raises:
        RuntimeError: one of them failed.
    """
    failures = train_all(kind, listed, workplace, parent, measure)
    if failures:
        raise RuntimeError(f"a {kind} failed: {next(iter(failures.values()))}")


def train_all(
    kind: str,
    listed: Sequence[Listed],
    workplace: Workplace,
    parent: ParentRun,
    measure: MeasureConfig | None = None,
    on_end: Callable[[ExperimentConfig], None] = lambda experiment: None,
) -> dict[str, str]:
    """Train like `train_listed`, but go on when one fails; return fingerprint -> why it failed.

    Args:
        on_end: called when an experiment has finished or failed for good.

    Raises:
        KeyboardInterrupt: the user stopped it. NoSpace, ClusterLost: the disk is full, or Ray is gone; everything finished is kept.
    """
    home = workplace.home
    pending = [each for each in listed if not _is_done(RunFolder(home.run(each.experiment.fingerprint)), measure)]
    _complete_runs(kind, [each for each in listed if each not in pending], home, parent, measure)
    if not pending:
        return {}
    console.say(f"training the {kind}s {', '.join(each.title for each in pending)}")
    by_fingerprint = {each.experiment.fingerprint: each for each in pending}
    over: set[str] = set()

    def row_of(settings: dict[str, Any]) -> TrialRow:
        each = by_fingerprint[settings["fingerprint"]]
        return TrialRow(each.title, (), parent.child(kind, each.experiment, each.title))

    def ended(row: TrialRow) -> None:
        if row.finished or row.state == FAILED:
            over.add(row.experiment.fingerprint)
            on_end(row.experiment)

    writer = BackgroundWriter(parent.tracker.uri)
    listener = TrialListener(kind, f"{kind}s", (), row_of, writer, None, wanted=len(pending), on_end=ended)
    # Tune reserves the same for every trial of a start.
    groups: dict[ResourcesConfig, list[Listed]] = {}
    for each in pending:
        groups.setdefault(each.experiment.resources, []).append(each)
    with writer, listener.board:
        for group in groups.values():
            _train_alike(kind, group, workplace, measure, listener)
            if any(each.experiment.fingerprint not in over for each in group):
                raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end in good order, and returns
    return listener.failures


def _train_alike(kind: str, listed: Sequence[Listed], workplace: Workplace, measure: MeasureConfig | None, listener: TrialListener) -> None:
    wanted = listed[0].experiment.resources
    cluster.connect(workplace.address, dashboard=wanted.most_workers > 1)
    if wanted.is_elastic:
        outlive_nodes()
    local = cluster.is_local(workplace.address)
    with probed(workplace.home.root) as storage:
        if not local:  # nodes may have gone since the search
            cluster.ClusterWatch(trial_resources(wanted.model_copy(update={"workers": 1})), local=local, storage=storage).wait()
        nodes = cluster.alive_nodes()
        resources = with_workers_that_fit(wanted, [each.experiment.training for each in listed], nodes) or wanted
        if resources != wanted:
            console.warn(
                f"the cluster has room for {resources.workers} of {wanted.fewest_workers} workers: the {kind}s are trained with those"
            )
        need = trial_resources(resources)
        at_once = trials_at_once(resources, cluster.connect(workplace.address), None, nodes)
        listener.watch = cluster.ClusterWatch(need, local=local, storage=storage)
        fitted = [dataclasses.replace(each, experiment=each.experiment.model_copy(update={"resources": resources})) for each in listed]
        _run_on_tune(kind, fitted, workplace, measure, listener, at_once)


def _run_on_tune(
    kind: str,
    listed: Sequence[Listed],
    workplace: Workplace,
    measure: MeasureConfig | None,
    listener: TrialListener,
    at_once: int,
) -> None:
    start = new_start()
    jobs = {
        each.experiment.fingerprint: TrainingJob.at(workplace, each.experiment, start=start, measure=measure, initial=each.initial)
        for each in listed
    }
    for job in jobs.values():
        check_initial_weights(job)

    def trial(settings: dict[str, Any]) -> None:
        run_trial(jobs[settings["fingerprint"]])

    tuner = tune.Tuner(
        tune.with_resources(trial, tune_resources(listed[0].experiment.resources)),
        param_space={"fingerprint": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{kind}s-{start}",
            storage_path=str(workplace.home.root / "tune"),
            callbacks=[listener],
            stop=WhenHopeless(listener),
            failure_config=tune.FailureConfig(max_failures=2),
            verbose=0,
        ),
    )
    with first_taken_by_tune():
        tuner.fit()
    fetch(workplace.home.root / "runs", largest=SMALL_BYTES)
    listener.check_disk(workplace.home)


def _is_done(folder: RunFolder, measure: MeasureConfig | None) -> bool:
    return folder.result() is not None and (measure is None or kept_protocol_metrics(folder, measure) is not None)


def _complete_runs(kind: str, done: Sequence[Listed], home: Home, parent: ParentRun, measure: MeasureConfig | None) -> None:
    """Give finished experiments their closed run below `parent` where they have none: trained for another sweep, or by a start that was
    killed before its last writes."""
    closed = parent.closed(kind, finished=True)
    for each in done:
        folder = RunFolder(home.run(each.experiment.fingerprint))
        record = folder.result()
        if each.experiment.fingerprint not in closed and record is not None:
            measured = (kept_protocol_metrics(folder, measure) or {}) if measure else {}
            run = parent.child(kind, each.experiment, each.title)
            track_data(run)
            run.complete(known_history(folder), record["metrics"] | measured)
