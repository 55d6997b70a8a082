"""Points that a sweep tries first: the best of another sweep, and finished runs of the home, which are not trained again."""

from __future__ import annotations

import json

import pytest
from optuna.trial import TrialState

from models.errors import UserError
from models.files import write_text
from orchestration.sweeping.config import sweep_key
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import open_study
from orchestration.sweeping.warm_start import warm_points
from tests.orchestration.finished_runs import finish

ROBUST, LOWER, UPPER = "validation/robust_accuracy", "defence.lower_bound", "defence.upper_bound"
SPACE = {
    LOWER: {"type": "float", "low": 200, "high": 2000, "log": True},
    UPPER: {"type": "float", "low": 800, "high": 4000, "log": True, "above": LOWER},
}


def a_sweep(folder, name, **fields):
    """A sweep of its own name over CTRW's bounds."""
    tree = {"recipe": "ctrw_digits", "settings": {"defence.constraint": "project"}, "num_trials": 8, "space": SPACE} | fields
    (folder / f"{name}.yaml").write_text(json.dumps(tree))
    return load_sweep(str(folder / f"{name}.yaml"))


@pytest.fixture
def source(home, tmp_path):
    """A sweep with five trials: four reached their end, the last was stopped."""
    config = a_sweep(tmp_path, "source", settings={"defence.constraint": "project", "training.epochs": 2})
    folder = home.sweep(sweep_key(config))
    search = StudySearch(config, open_study(config, folder))
    write_text(folder / "sweep.json", json.dumps(config.model_dump(mode="json")))
    points = [search.suggest(str(number))["values"] for number in range(5)]
    for number, value in enumerate((0.3, 0.6, 0.5, 0.4)):
        search.on_trial_complete(str(number), {"epoch": 2, "finished": True, ROBUST: value})
    search.on_trial_complete("4", {"epoch": 1, ROBUST: 0.9})
    return points


def test_the_best_points_of_another_sweep_come_first(home, tmp_path, source):
    config = a_sweep(tmp_path, "next", warm_start={"sweep": "source", "top": 3}, points=[{LOWER: 500}])
    points = warm_points(config, home)
    assert points == [source[1], source[2], source[3]]
    search = StudySearch(config, open_study(config, tmp_path / "study", points))
    proposed = [search.suggest(str(number))["values"] for number in range(4)]
    assert proposed[0][LOWER] == 500 and proposed[1:] == points
    assert [trial.state for trial in open_study(config, tmp_path / "study", points).trials].count(TrialState.WAITING) == 4, "queued once"


@pytest.mark.parametrize("sampler", ["gp", "cmaes", "random"])
def test_they_come_first_whatever_proposes_the_others(home, tmp_path, source, sampler):
    config = a_sweep(tmp_path, "next", warm_start={"sweep": "source", "top": 2}, sampler=sampler)
    search = StudySearch(config, open_study(config, tmp_path / "study", warm_points(config, home)))
    for number, point in enumerate((source[1], source[2])):
        assert search.suggest(str(number))["values"] == pytest.approx(point)


def test_points_outside_the_space_are_left_out(home, tmp_path, source):
    best = sorted(point[LOWER] for point in source[:4])
    narrow = SPACE | {LOWER: {"type": "float", "low": 200, "high": best[1] * 1.001, "log": True}}
    points = warm_points(a_sweep(tmp_path, "next", space=narrow, warm_start={"sweep": "source"}), home)
    assert sorted(point[LOWER] for point in points) == best[:2]
    other = {"training.epochs": {"type": "int", "low": 1, "high": 3}}
    with pytest.raises(UserError, match=r"no point of source-\w+ fits the space: trial \d: it shares no dimension"):
        warm_points(a_sweep(tmp_path, "next", settings={}, space=other, warm_start={"sweep": "source"}), home)


def test_mistakes_are_one_sentence(home, tmp_path, source):
    with pytest.raises(UserError, match=r"sweep in this home folder.*sorce.*source"):
        warm_points(a_sweep(tmp_path, "next", warm_start={"sweep": "sorce"}), home)
    with pytest.raises(UserError, match="warm_start needs `sweep`"):
        a_sweep(tmp_path, "next", warm_start={"top": 3})
    with pytest.raises(UserError, match="a grid visits its own points"):
        a_sweep(tmp_path, "next", sampler="grid", points=[{LOWER: 500, UPPER: 900}], warm_start={"runs": True})


def test_finished_runs_that_are_points_of_the_space_are_found(home, tmp_path, capsys):
    config = a_sweep(tmp_path, "next", warm_start={"runs": True})
    assert warm_points(config, home) == []
    assert "nothing to start from" in capsys.readouterr().err
    fitting = {}
    for lower, upper in ((300.0, 900.0), (1000.0, 3000.0)):
        experiment = finish(home, "ctrw_digits", f"--{LOWER}", str(lower), f"--{UPPER}", str(upper), "--defence.constraint", "project")
        fitting[experiment.fingerprint] = {LOWER: lower, UPPER: upper}
    finish(home, "ctrw_digits", f"--{LOWER}", "300", f"--{UPPER}", "900")  # without the sweep's setting
    finish(home, "ctrw_digits", f"--{LOWER}", "100", f"--{UPPER}", "900", "--defence.constraint", "project")  # outside
    finish(home, "ctrw_digits", f"--{LOWER}", "300", f"--{UPPER}", "900", "--defence.constraint", "project", "--seed", "3")
    finish(home, "at_digits")
    points = warm_points(config, home)
    assert sorted(map(str, points)) == sorted(map(str, fitting.values()))
    search = StudySearch(config, open_study(config, tmp_path / "study", points))
    proposed = [search.suggest(str(number))["values"] for number in range(2)]
    assert {config.experiment(values).fingerprint for values in proposed} == set(fitting), (
        "their run folders are theirs: nothing is trained"
    )
