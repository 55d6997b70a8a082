"""The study of a sweep, driven by hand without a cluster: what is counted, what is run again, what nobody leaves running."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from pydantic import ValidationError
from ray.tune.search import Searcher

from models.errors import UserError
from orchestration.experiment import ResourcesConfig
from orchestration.home import Home
from orchestration.search_space import Dimension, suggest
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.goals import StoppingConfig
from orchestration.sweeping.grid import grid_points
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.plan import plan_sweep
from orchestration.sweeping.proposals import Deadline, StudySearch
from orchestration.sweeping.schedulers import EarlyStopping
from orchestration.sweeping.search import Search
from orchestration.sweeping.study import num_wanted, open_study, spent, superseded
from orchestration.training.cluster import PATIENCE_S, ClusterLost, ClusterWatch
from orchestration.training.resources import TrialResources, concurrency, trials_at_once, with_workers_that_fit, workers_that_share
from trainers.config import TrainingConfig


@pytest.fixture
def config():
    return load_sweep("ctrw_bounds_digits", {"num_trials": 4})


def states(study):
    return [trial.state for trial in study.trials]


def test_a_sweep_has_its_number_of_trials_and_then_ends(config, tmp_path):
    study = open_study(config, tmp_path)
    assert study.metric_names == ["validation/robust_accuracy"], "as Optuna's dashboard shows them"
    search = StudySearch(config, study)
    for index in range(4):
        suggestion = search.suggest(f"t{index}")
        assert suggestion["values"]["defence.upper_bound"] >= suggestion["values"]["defence.lower_bound"]
        search.on_trial_result(f"t{index}", {"epoch": 1, "validation/robust_accuracy": 0.1})
        search.on_trial_complete(f"t{index}", {"epoch": 2, "finished": True, "validation/robust_accuracy": 0.5})
    assert search.suggest("t4") == Searcher.FINISHED
    assert spent(study) == 4
    # Asked for more, the same sweep goes on: its key does not depend on the budget.
    more = load_sweep("ctrw_bounds_digits", {"num_trials": 5})
    assert sweep_key(more) == sweep_key(config)
    again = StudySearch(more, open_study(more, tmp_path))
    assert isinstance(again.suggest("x"), dict)
    assert again.suggest("y") == Searcher.FINISHED


def test_when_its_hours_are_over_no_trial_starts_and_those_that_run_are_waited_for(config, tmp_path):
    study = open_study(config, tmp_path)
    plan, deadline = plan_sweep(config, tmp_path, Home(tmp_path)), Deadline.after(1e-9)
    assert deadline.passed and not Deadline.after(1).passed and not Deadline.after(None).passed
    search = StudySearch(config, study)
    search.suggest("a")
    later = StudySearch(config, study, deadline=deadline)
    assert later.suggest("b") == Searcher.FINISHED
    assert not Search(plan, study, None, deadline).complete, "one runs"
    search.on_trial_complete("a", {"epoch": 2, "finished": True, "validation/robust_accuracy": 0.5})
    assert Search(plan, study, None, deadline).complete
    assert not Search(plan, study, None).complete, "the next start goes on"
    assert sweep_key(load_sweep("ctrw_bounds_digits", {"num_trials": 4, "max_hours": 2})) == sweep_key(config)


def test_trials_that_a_killed_process_left_are_run_again_with_their_parameters(config, tmp_path):
    search = StudySearch(config, open_study(config, tmp_path))
    finished = search.suggest("a")
    search.on_trial_complete("a", {"epoch": 2, "finished": True, "validation/robust_accuracy": 0.5})
    running = search.suggest("b")
    search.on_trial_result("b", {"epoch": 1, "validation/robust_accuracy": 0.2})
    # kill -9 here; a new process:
    study = open_study(config, tmp_path)
    assert TrialState.RUNNING not in states(study)
    assert spent(study) == 1
    resumed = StudySearch(config, study).suggest("c")
    assert resumed["values"] == running["values"]
    assert resumed["values"] != finished["values"]


def test_a_later_start_does_not_propose_the_first_points_again(config, tmp_path):
    first = StudySearch(config, open_study(config, tmp_path)).suggest("a")["values"]
    search = StudySearch(config, open_study(config, tmp_path))
    assert search.suggest("b")["values"] == first, "it was interrupted, so it is run again"
    assert search.suggest("c")["values"] != first


def test_ends_are_told_truly(config, tmp_path):
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    for name in "abcd":
        search.suggest(name)
    search.on_trial_result("a", {"epoch": 1, "validation/robust_accuracy": 0.3})
    search.on_trial_complete("a", {"epoch": 1, "finished": False, "validation/robust_accuracy": 0.3})
    search.on_trial_complete("b", {"epoch": 2, "finished": True, "validation/robust_accuracy": math.nan})
    search.on_trial_complete("c", None, error=True)
    search.on_trial_complete("d", {"epoch": 2, "finished": True, "validation/robust_accuracy": 0.6})
    assert states(study) == [TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    assert study.best_trial.number == 3
    assert study.trials[0].intermediate_values == {1: 0.3}
    # What broke is tried again by the next start; what is not finite is not.
    again = open_study(config, tmp_path)
    assert spent(again) == 3
    assert states(again)[-1] == TrialState.WAITING


def test_several_objectives_make_a_front(tmp_path):
    config = load_sweep(
        "ctrw_bounds_digits",
        {"num_trials": 3, "objectives": [{"metric": "validation/robust_accuracy"}, {"metric": "validation/clean_accuracy"}]},
    )
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    for name, robust, clean in (("a", 0.5, 0.9), ("b", 0.6, 0.8), ("c", 0.4, 0.7)):
        search.suggest(name)
        search.on_trial_result(name, {"epoch": 1, "validation/robust_accuracy": robust})
        search.on_trial_complete(
            name, {"epoch": 2, "finished": True, "validation/robust_accuracy": robust, "validation/clean_accuracy": clean}
        )
    assert sorted(trial.number for trial in study.best_trials) == [0, 1]


def test_conditional_and_bounded_dimensions():
    space = {
        "kind": Dimension(type="choice", choices=("a", "b")),
        "only_a": Dimension(type="int", low=1, high=3, when={"kind": ("a",)}),
        "low": Dimension(type="float", low=1, high=100, log=True),
        "high": Dimension(type="float", low=1, high=100, log=True, above="low"),
        "lists": Dimension(type="choice", choices=(("x", "y"), ("z",))),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        chosen = suggest(space, study.ask())
        assert ("only_a" in chosen) == (chosen["kind"] == "a")
        assert chosen["low"] <= chosen["high"]
        assert chosen["lists"] in (["x", "y"], ["z"])


def test_grids_visit_every_point_once():
    space = {
        "kind": Dimension(type="choice", choices=("a", "b")),
        "only_a": Dimension(type="int", low=1, high=3, when={"kind": ("a",)}),
        "step": Dimension(type="float", low=0.0, high=0.2, step=0.1),
    }
    points = grid_points(space)
    assert len(points) == (3 + 1) * 3
    with pytest.raises(UserError, match="continuum"):
        grid_points({"x": Dimension(type="float", low=0, high=1)})


def test_a_grid_sweep_is_queued_once_and_bounded(tmp_path):
    config = load_sweep("rna_pools_digits")
    assert num_wanted(config) == 10
    study = open_study(config, tmp_path)
    assert len(study.trials) == 10
    assert len(open_study(config, tmp_path).trials) == 10
    search = StudySearch(config, open_study(config, tmp_path))
    seen = []
    for index in range(10):
        seen.append(search.suggest(f"t{index}")["values"])
    assert all(isinstance(values["defence.pool"], list) for values in seen)
    assert len({str(values) for values in seen}) == 10


def test_no_point_of_a_grid_lies_below_its_bound_and_none_lacks_a_value():
    """Every combination is built and judged one by one."""
    space = {
        "low": Dimension(type="int", low=1, high=4),
        "high": Dimension(type="float", low=0, high=4, step=2, above="low"),
        "other": Dimension(type="choice", choices=("a", "b"), when={"low": (4,)}),
    }
    expected = []
    for low, high, other in itertools.product((1, 2, 3, 4), (0.0, 2.0, 4.0), ("a", "b")):
        point = {"low": low, "high": high} | ({"other": other} if low == 4 else {})
        if high >= low and point not in expected:
            expected.append(point)
    assert sorted(grid_points(space), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("kind", "step", "bound", "allowed"), [("int", 2, 2, {3, 5}), ("float", 0.5, 1.7, {2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0})]
)
def test_a_bound_between_two_steps_leaves_the_steps_where_they_are(kind, step, bound, allowed):
    space = {
        "low": Dimension(type="float", low=0, high=3),
        "high": Dimension(type=kind, low=1, high=5, step=step, above="low"),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(60):
        study.enqueue_trial({"low": bound})
        seen.add(suggest(space, study.ask())["high"])
    assert seen == allowed


class Killed(BaseException):
    """Stands in for kill -9."""


WRITES = ("create_new_trial", "set_trial_param", "set_trial_state_values", "set_trial_user_attr", "set_trial_intermediate_value")


def random_grid(rng, folder):
    """A grid over real fields: two numbers of which one bounds the other, and one that is searched only sometimes."""
    highest = rng.randint(2, 4)
    lower = {"type": "int", "low": 1, "high": rng.randint(2, highest)}
    upper = {"type": "int", "low": rng.randint(1, 2), "high": highest + 1, "above": "training.epochs"}
    if (upper["high"] - upper["low"]) % 2 == 0 and rng.random() < 0.5:
        upper["step"] = 2
    space = {"training.epochs": lower, "training.attack.steps": upper}
    if rng.random() < 0.5:
        space["defence.constraint"] = {"type": "choice", "choices": ["project", "shift"], "when": {"training.epochs": [lower["high"]]}}
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"recipe": "ctrw_digits", "sampler": "grid", "space": space, "stopping": None}))
    return load_sweep(str(file))


@pytest.mark.parametrize("seed", range(4))
def test_a_grid_that_is_killed_anywhere_trains_each_of_its_points_once_and_no_other(seed, tmp_path, monkeypatch):
    """Every write of the study may be the last one of a start; between the kills a few trials end, break or are left running."""
    rng = random.Random(seed)
    config = random_grid(rng, tmp_path)
    points = grid_points(config.space)
    left = [math.inf]
    for name in WRITES:
        real = getattr(optuna.storages.RDBStorage, name)

        def write(*arguments, _real=real, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return _real(*arguments, **named)

        monkeypatch.setattr(optuna.storages.RDBStorage, name, write)
    for _ in range(200):
        left[0] = rng.randint(1, 40)
        try:
            search = StudySearch(config, open_study(config, tmp_path))
            for index in itertools.count():
                suggestion = search.suggest(f"t{index}")
                if suggestion == Searcher.FINISHED:
                    break
                assert suggestion["values"] in points
                if rng.random() < 0.2:
                    search.on_trial_complete(f"t{index}", None, error=True)
                elif rng.random() < 0.9:
                    search.on_trial_complete(f"t{index}", {"epoch": 1, "finished": True, "validation/robust_accuracy": 0.5})
        except Killed:
            continue
        left[0] = math.inf
        study = open_study(config, tmp_path)
        if spent(study) == len(points) and all(
            trial.state != TrialState.FAIL or trial.number in superseded(study) for trial in study.trials
        ):
            break
    trained = [trial.user_attrs["values"] for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert sorted(trained, key=str) == sorted(points, key=str)
    assert StudySearch(config, study).suggest("more") == Searcher.FINISHED


def test_a_grid_is_asked_for_no_more_than_its_points():
    assert num_wanted(load_sweep("rna_pools_digits", {"num_trials": 50})) == 10
    assert num_wanted(load_sweep("rna_pools_digits", {"num_trials": 3})) == 3


def asha(config, epochs, study=None):
    """ASHA that keeps one of two at epochs 2, 4, 8 ..."""
    config = config.model_copy(update={"stopping": StoppingConfig(grace_epochs=2, reduction_factor=2)})
    return EarlyStopping(config, epochs, study or optuna.create_study())


def test_asha_remembers_trials_of_earlier_starts(config, tmp_path):
    study = open_study(config, tmp_path)
    search = StudySearch(config, study)
    for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        search.suggest(name)
        for epoch in (1, 2):
            search.on_trial_result(name, {"epoch": epoch, "validation/robust_accuracy": value})
        search.on_trial_complete(name, {"epoch": 2, "finished": True, "validation/robust_accuracy": value})
    scheduler = asha(config, 9, open_study(config, tmp_path))
    trial = SimpleNamespace(trial_id="new", config={"number": 3})
    scheduler.on_trial_add(None, trial)
    result = {"epoch": 2, "validation/robust_accuracy": 0.1}
    assert scheduler.on_trial_result(None, trial, result) == "STOP"


def test_the_epoch_that_a_trial_was_stopped_after_counts_in_later_starts(config, tmp_path):
    """Of which Tune tells the searcher at the end of the trial alone."""
    metric = "validation/robust_accuracy"
    search = StudySearch(config, open_study(config, tmp_path))
    for name, value in (("a", 0.9), ("b", 0.2)):
        search.suggest(name)
        search.on_trial_result(name, {"epoch": 1, metric: value / 2})
        search.on_trial_complete(name, {"epoch": 2, metric: value})
        search.on_trial_complete(name, {"epoch": 2, metric: value})
    study = open_study(config, tmp_path)
    assert [trial.intermediate_values for trial in study.trials] == [{1: 0.45, 2: 0.9}, {1: 0.1, 2: 0.2}]
    decisions = [
        asha(config, 9, study).on_trial_result(None, SimpleNamespace(config={"number": 2}), {"epoch": 2, metric: value})
        for value in (0.5, 0.6)
    ]
    assert decisions == ["STOP", "CONTINUE"], "the better half of 0.9 and 0.2"


def test_a_resumed_trial_is_not_stopped_before_it_is_where_it_was(config, tmp_path):
    metric = "validation/robust_accuracy"
    search = StudySearch(config, open_study(config, tmp_path))
    search.suggest("a")
    for epoch in (1, 2, 3):
        search.on_trial_result("a", {"epoch": epoch, metric: 0.1})
    # kill -9; meanwhile nothing changed, but the next start knows better trials by the time it replays this one
    resumed = StudySearch(config, open_study(config, tmp_path)).suggest("b")
    assert resumed["passed"] == 3
    scheduler = asha(config, 12)
    for index in range(3):
        better = SimpleNamespace(trial_id=f"better{index}", config={"number": 10 + index})
        scheduler.on_trial_add(None, better)
        for epoch in (2, 4):
            scheduler.on_trial_result(None, better, {"epoch": epoch, metric: 0.8 + 0.01 * index})
    trial = SimpleNamespace(trial_id="b", config=resumed)
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"epoch": 2, metric: 0.1}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial, {"epoch": 4, metric: 0.1}) == "STOP"


def test_asha_stops_no_trial_at_its_last_epoch(config):
    metric = "validation/robust_accuracy"
    scheduler = asha(config, 8)
    actions = {}
    for index in range(6):
        trial = SimpleNamespace(trial_id=f"t{index}", config={"number": index})
        scheduler.on_trial_add(None, trial)
        for epoch in (2, 4, 8):
            actions[index, epoch] = scheduler.on_trial_result(None, trial, {"epoch": epoch, metric: 0.9 - 0.1 * index})
    assert "STOP" in {actions[5, epoch] for epoch in (2, 4)}, "the last one is the worst"
    assert {actions[index, 8] for index in range(6)} == {"CONTINUE"}


@pytest.mark.parametrize(
    ("need", "available", "expected"),
    [
        (TrialResources(1, 0, 1), {"CPU": 2}, 2),
        (TrialResources(2, 0, 2), {"CPU": 5}, 2),
        (TrialResources(1, 0.5, 1), {"CPU": 8, "GPU": 1}, 2),
    ],
)
def test_concurrency_counts_everything_a_trial_takes(need, available, expected):
    assert concurrency(need, available) == expected


def test_workers_are_counted_node_by_node():
    small = [{"CPU": 4}, {"CPU": 4}]
    assert concurrency(TrialResources(3, 0, 1), {"CPU": 8}, nodes=small) == 2
    assert concurrency(TrialResources(6, 0, 2), {"CPU": 8}, nodes=small) == 1, "its two workers on two nodes"
    with pytest.raises(UserError, match=r"on one node.*largest have 4 CPUs"):
        concurrency(TrialResources(8, 0, 1), {"CPU": 8}, nodes=small)
    gpus = [{"CPU": 8, "GPU": 2}]
    assert concurrency(TrialResources(1, 0.4, 1), {"CPU": 8, "GPU": 2}, nodes=gpus) == 4, "two on each GPU, none across two"


@pytest.mark.parametrize(
    ("wanted", "batch_size", "cpus", "expected"),
    [(4, 64, (4,), 4), (4, 64, (2, 1), 2), (4, 60, (2, 1), 3), (4, 64, (1,), 1), (2, 64, (0,), None), (2, 64, (), None)],
)
def test_what_is_trained_after_the_search_takes_the_workers_that_are_left(wanted, batch_size, cpus, expected):
    trainings = [TrainingConfig(batch_size=batch_size), TrainingConfig(batch_size=2 * batch_size)]
    resources = with_workers_that_fit(ResourcesConfig(workers=wanted), trainings, [{"CPU": float(count)} for count in cpus])
    assert (resources.workers if resources else None) == expected


@pytest.mark.parametrize(
    ("workers", "cpus", "expected"), [([1, 4], (4, 4), 2), ([1, 4], (2, 1), 1), ([2, 4], (2, 1), 1), (2, (4, 1), 2), ([2, 2], (4, 1), 2)]
)
def test_trials_whose_workers_come_and_go_are_as_many_as_have_room_with_all_of_them(workers, cpus, expected):
    nodes = [{"CPU": float(count)} for count in cpus]
    assert trials_at_once(ResourcesConfig(workers=workers), {"CPU": float(sum(cpus))}, None, nodes) == expected


def test_a_trial_needs_the_fewest_of_its_workers():
    with pytest.raises(UserError, match=r"needs 3 CPUs.*resources.workers 2"):
        trials_at_once(ResourcesConfig(workers=[3, 4]), {"CPU": 2.0}, None, [{"CPU": 2.0}])
    with pytest.raises(ValidationError, match="fewest"):
        ResourcesConfig(workers=[4, 2])
    for wrong in (0, -1, 2.5, True, None, "x", [], [1, 2, 3], [1, "x"], math.inf, math.nan, {}):
        with pytest.raises(ValidationError, match=r"1 validation error.*\n.*\n.*whole number from 1 to 4096"):
            ResourcesConfig(workers=wrong)
    assert [workers_that_share(count, TrainingConfig(batch_size=32)) for count in (1, 2, 3, 4, 7)] == [1, 2, 2, 4, 4]
    assert [workers_that_share(count, TrainingConfig(batch_size=32, accumulation=16)) for count in (1, 2, 3, 4)] == [1, 2, 2, 2]


def test_room_is_waited_for():
    nodes = [[], [], [{"CPU": 1}]]
    watch = ClusterWatch(TrialResources(1, 0, 1), local=False, nodes=lambda: nodes.pop(0) if len(nodes) > 1 else nodes[0])
    watch.wait()
    assert len(nodes) == 1


def test_a_cluster_that_lost_its_nodes_is_waited_for_only_if_they_can_come_back(capsys):
    now, nodes = [0.0], [{"CPU": 2}]
    need = TrialResources(2, 0, 2)
    watch = ClusterWatch(need, local=False, nodes=lambda: list(nodes), clock=lambda: now[0])
    for now[0] in (3.0, 6.0):
        watch.look()
    nodes.clear()
    for now[0] in (12.0, 18.0, 800.0):
        watch.look()
    assert capsys.readouterr().err.count("too little for one trial") == 1
    nodes.append({"CPU": 2})
    now[0] = 806.0
    watch.look()
    assert "room for trials again" in capsys.readouterr().out
    nodes.clear()
    now[0] = 812.0
    watch.look()
    now[0] = 812.0 + PATIENCE_S + 1
    with pytest.raises(ClusterLost):
        watch.look()
    own = ClusterWatch(need, local=True, nodes=lambda: [], clock=lambda: now[0])
    now[0] += 6
    with pytest.raises(ClusterLost, match="on this machine has broken down"):
        own.look()


def test_what_does_not_fit_is_said_before_anything_starts():
    with pytest.raises(UserError, match=r"needs 4 CPUs.*resources.workers 2"):
        concurrency(TrialResources(4, 0, 4), {"CPU": 2})
    with pytest.raises(UserError, match=r"gpus_per_worker 0 \(train on CPUs\)"):
        concurrency(TrialResources(1, 1, 1), {"CPU": 2})


def test_what_the_storage_raised_is_found_behind_what_tune_made_of_it():
    import traceback

    import optuna
    from ray.tune.error import TuneError

    from orchestration.sweeping.study import study_error

    def as_tune_does() -> None:
        try:
            raise optuna.exceptions.StorageInternalError("locked")
        except Exception:
            raise TuneError(traceback.format_exc())  # noqa: B904

    with pytest.raises(TuneError) as wrapped:
        as_tune_does()
    assert isinstance(study_error(wrapped.value), optuna.exceptions.StorageInternalError)
    assert study_error(TuneError("something else")) is None
