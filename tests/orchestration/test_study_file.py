"""Reading a study's file without Optuna's storage: the same trials, and what a command that only looks does without."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from models.errors import UserError
from models.files import write_text
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.goals import SweepObjective
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.status import sweep_status
from orchestration.sweeping.study import best_trials, open_study, remember
from orchestration.sweeping.study_file import FileStorage, read_study
from orchestration.training.job import TrialReport

DISTRIBUTIONS = (
    FloatDistribution(0.1, 3, log=True),
    FloatDistribution(0, 1, step=0.25),
    IntDistribution(1, 64, log=True),
    IntDistribution(-4, 4, step=2),
    CategoricalDistribution(["a + b", 3, 0.5, None, True]),
)


def any_study(seed: int, file):
    """A study of trials in every state, with every kind of value that Optuna keeps."""
    rng = random.Random(seed)
    objectives = rng.choice([1, 2, 3])
    directions = [rng.choice(["maximize", "minimize"]) for _ in range(objectives)]
    optuna.create_study(storage=f"sqlite:///{file}", study_name="another").ask({"x": DISTRIBUTIONS[0]})
    study = optuna.create_study(
        storage=f"sqlite:///{file}", study_name="it's", directions=directions, sampler=optuna.samplers.RandomSampler(seed)
    )
    study.set_user_attr("said", {"of": ["all", seed]})
    for index in range(25):
        if rng.random() < 0.1:
            study.enqueue_trial({"0": 1.0}, user_attrs={"why": index})
            continue
        trial = study.ask({str(name): each for name, each in enumerate(DISTRIBUTIONS) if rng.random() < 0.8})
        trial.set_user_attr("values", {"pool": ["x", "ü"], "number": rng.random()})
        for step in range(rng.randrange(3)):
            if objectives == 1:
                trial.report(rng.choice([0.5, float("inf"), -float("inf"), float("nan"), 2]), step)
        if rng.random() < 0.5:
            trial.set_constraint("size <= 3", rng.uniform(-1, 1))
        state = rng.choice([TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, None])
        if state is not None:
            values = [rng.choice([0.0, 1.0, -2.5, float("inf"), rng.random()]) for _ in directions]
            study.tell(trial, values if state == TrialState.COMPLETE else None, state=state)
    return study


def described(trial):
    """Everything that a trial says, as text: a value that is no number equals itself."""
    said = {name.lstrip("_"): value for name, value in vars(trial).items()} | {"constraints": trial.constraints}
    return {name: repr(sorted(each.items(), key=repr) if isinstance(each, dict) else each) for name, each in said.items()}


@pytest.mark.parametrize("seed", range(6))
def test_it_reads_what_optuna_reads(tmp_path, seed):
    study = any_study(seed, tmp_path / "study.db")
    read = read_study(tmp_path / "study.db", "it's")
    assert [described(trial) for trial in read.trials] == [described(trial) for trial in study.get_trials()]
    assert read.user_attrs == study.user_attrs
    storage = FileStorage(tmp_path / "study.db", {})
    for name in ("it's", "another"):
        opened, usual = (optuna.load_study(study_name=name, storage=each) for each in (storage, f"sqlite:///{tmp_path / 'study.db'}"))
        assert [described(trial) for trial in opened.get_trials()] == [described(trial) for trial in usual.get_trials()]
    trial = opened.ask({"0": DISTRIBUTIONS[0]})
    assert opened.get_trials()[-1].number == trial.number, "what comes later is read as well"
    objectives = tuple(
        SweepObjective(metric=f"m{index}", mode="max" if each == optuna.study.StudyDirection.MAXIMIZE else "min")
        for index, each in enumerate(study.directions)
    )
    config = load_sweep("ctrw_bounds_digits").model_copy(update={"objectives": objectives})
    front = best_trials(config, read)
    if len(objectives) > 1:
        assert front == [trial.number for trial in study.best_trials]
    else:
        assert [read.trials[number].value for number in front] == [study.best_trial.value]


def test_a_schema_that_it_does_not_know_is_left_to_optuna(tmp_path, monkeypatch):
    study = any_study(0, tmp_path / "study.db")
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE version_info SET schema_version = 99")
    monkeypatch.setattr("orchestration.sweeping.study_file._read", None)
    read = read_study(tmp_path / "study.db", "it's")
    assert [described(trial) for trial in read.trials] == [described(trial) for trial in study.get_trials()]


@pytest.fixture
def running(home):
    """A sweep whose only trial runs, as a driver of today records it."""
    config = load_sweep("ctrw_bounds_digits", {"num_trials": 2})
    folder = home.sweep(sweep_key(config))
    study = open_study(config, folder)
    write_text(folder / "sweep.json", json.dumps(config.model_dump(mode="json")))
    remember(study, folder, 12, "run abc")
    search = StudySearch(config, study)
    suggestion = search.suggest("a")
    home.run(config.experiment(suggestion["values"]).fingerprint).mkdir(parents=True)
    metrics = {"validation/clean_accuracy": 0.7, "validation/robust_accuracy": 0.4}
    search.on_trial_result("a", TrialReport(3, metrics, "").to_result())
    return folder


def test_the_study_alone_says_how_far_a_trial_is(home, running):
    status = sweep_status(home, running.name)
    (trial,) = status.trials
    assert (trial.state, trial.epoch, trial.clean, trial.robust) == ("interrupted", 3, 0.7, 0.4)
    assert (status.epochs, status.link) == (12, "run abc")


def test_a_look_brings_no_large_library(home, running):
    program = "import sys; from orchestration.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", program, "status", running.name, "--home", str(home.root)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0/2 trials over" in finished.stdout
    assert not {"torch", "mlflow", "ray", "scipy", "sklearn", "matplotlib", "pandas"} & set(finished.stderr.split())


@pytest.mark.parametrize("damage", ["DROP TABLE trial_params", "UPDATE trials SET state = 'LOST'", "DELETE FROM studies", "text"])
def test_a_damaged_study_is_one_sentence(home, running, damage):
    if damage == "text":
        (running / "study.db").write_text("no database\n" * 1000)
    else:
        with sqlite3.connect(running / "study.db") as connection:
            connection.execute(damage)
    with pytest.raises(UserError, match=r"study.db cannot be read, it is damaged or of another version"):
        sweep_status(home, running.name)
