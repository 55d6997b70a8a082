"""What reproductions and sweeps keep, and locks, damaged: whoever asks for it is told which file it is, the others go on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from models.errors import UserError
from models.files import write_text
from orchestration.home import Home
from orchestration.reproducing.ledger import outcome_folder
from orchestration.reproducing.reading_jobs import KeptReadings
from orchestration.run_folder import RunFolder
from orchestration.single_process import holder_of, is_held, only_process, only_writer
from orchestration.training import final_measures
from orchestration.training.measure import MeasureConfig
from tests.fuzz.broken_homes import damage, file_ways, folder_ways
from tests.fuzz.command_line import SEED, complaint, no_longer_than, rayndom
from tests.orchestration.finished_runs import METRICS, finish
from tests.reproduction.synthetic import synthetic_outcome

FEW, MANY = 8, 400
ITEMS = ("ctrw.table4", "ctrw.fig3b", "dcs.table4")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A home in which items were reproduced."""
    home = Home.locate(tmp_path_factory.mktemp("reproduced") / "home")
    for name in ITEMS:
        write_text(outcome_folder(home, name, "smoke") / "outcome.json", synthetic_outcome(name).to_json())
        assert rayndom(["reproduce", name, "--render", "--home", str(home.root)], 60).code == 0
    return home.root


def try_outcomes(reproduced: Path, folder: Path, seed: int, number: int) -> None:
    rng = random.Random(seed)
    problems = []
    for index in range(number):
        home = Path(shutil.copytree(reproduced, folder / str(index)))
        victim, other = rng.sample(ITEMS[:2], 2) if rng.random() < 0.5 else rng.sample(ITEMS, 2)
        place = home / "reproductions" / victim / "smoke"
        done = damage(home, [place / "outcome.json"] * 4 + [place], rng)
        command = rng.choice(["--render", "--dry-run"])
        for item, refused in ((victim, None), (other, False)):
            outcome = rayndom(["reproduce", item, command, "--home", str(home)])
            problem = complaint(outcome, ["outcome.json", victim], refused=refused, allowed=(0, 2, 3) if item == victim else (0,))
            if problem:
                problems.append(f"{problem}: {item} {command} with {done.place} {done.kind}: {outcome.error[:300]}")
        shutil.rmtree(home, ignore_errors=True)
    assert not problems, f"{len(problems)} of {2 * number} with seed {seed}:\n" + "\n".join(problems)


def test_damaged_outcomes(reproduced, tmp_path):
    try_outcomes(reproduced, tmp_path, SEED + 40, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_outcomes(reproduced, tmp_path):
    try_outcomes(reproduced, tmp_path, SEED + 41, MANY)


def test_an_outcome_of_another_item(reproduced, tmp_path):
    home = Path(shutil.copytree(reproduced, tmp_path / "home"))
    first, second = (home / "reproductions" / name / "smoke" / "outcome.json" for name in ITEMS[:2])
    shutil.copy(first, second)
    outcome = rayndom(["reproduce", ITEMS[1], "--render", "--home", str(home)])
    assert complaint(outcome, [str(second)], refused=True) is None, outcome.said


class Kept:
    """A file that only a command on Ray reads, and the function that it reads it with."""

    def __init__(self, path: Path, read: Callable[[], Any]) -> None:
        self.path, self.read = path, read


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Readings of a reproduction, measures of a sweep, why a training diverged, what a run ended with: of one home."""
    home = Home.locate(tmp_path / "home")
    run = RunFolder(home.run(finish(home).fingerprint))
    measure = MeasureConfig(suite="quick")
    protocols = final_measures._path(run, measure)
    write_text(protocols, '{"validation/robust_accuracy/T1": 0.5}')
    run.write_diverged("the loss is nan")
    readings, reading = KeptReadings(home), tmp_path / "readings" / "0.json"
    monkeypatch.setattr(readings, "path", lambda job: reading)
    write_text(reading, '{"title": "t", "measure": {}, "found": {"numbers": {"value": 0.5}, "series": {"x": [1, 2]}, "how": "so"}}')
    return [
        Kept(reading, lambda: readings.get(cast(Any, SimpleNamespace()))),
        Kept(protocols, lambda: final_measures.kept_protocol_metrics(run, measure)),
        Kept(run.path / "diverged.json", run.diverged),
        Kept(run.path / "result.json", run.result),
        Kept(run.path / "config.yaml", run.read_config),
    ]


def test_damaged_results(kept, tmp_path):
    rng = random.Random(SEED + 42)
    problems = []
    for each in kept:
        sound = tmp_path / "sound"
        shutil.copy(each.path, sound)
        assert each.read()
        for _ in range(30):
            done = damage(tmp_path, [each.path], rng)
            try:
                with no_longer_than(10):
                    each.read()
            except UserError as error:
                if each.path.name not in str(error):
                    problems.append(f"{done}: {error}")
            except BaseException as error:
                problems.append(f"{done}: {type(error).__name__}: {error}")
            shutil.rmtree(each.path) if each.path.is_dir() and not each.path.is_symlink() else each.path.unlink(missing_ok=True)
            shutil.copy(sound, each.path)
    assert not problems, "\n".join(problems)


def test_what_a_run_reported_is_numbers(kept, tmp_path):
    (run,) = (RunFolder(each.path.parent) for each in kept if each.path.name == "result.json")
    assert run.result()["metrics"] == METRICS


def test_damaged_locks(tmp_path):
    """What lies where a lock or its folder should be: the lock is taken, or one sentence names the place."""
    rng, problems = random.Random(SEED + 43), []
    for index in range(40):
        lock = tmp_path / str(index) / "folder" / "lock"
        write_text(lock, "process 1 on nowhere")
        broken = rng.choice([lock, lock.parent])
        kind, way = rng.choice(folder_ways(broken, rng) if broken.is_dir() else file_ways(broken, rng))
        way()
        for hold in (lambda lock=lock: only_process(lock, "the work"), lambda lock=lock: only_writer(lock.parent, "the work")):
            try:
                with no_longer_than(10), hold():
                    pass
            except UserError as error:
                if str(broken) not in str(error):
                    problems.append(f"{kind}: {error}")
        if lock.is_file():
            holder_of(lock)
        assert not is_held(lock)
    assert not problems, "\n".join(problems)
