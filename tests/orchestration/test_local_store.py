"""The SQLite store of a home: killed in every state of its making, made by several at once, moved, of an earlier version."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.errors import UserError
from orchestration.home import Home
from orchestration.tracking import local_store
from orchestration.tracking.tracker import Tracker

ROOT = Path(__file__).resolve().parents[2]
OPEN = """
import sys
from orchestration.home import Home
from orchestration.tracking.tracker import Tracker
tracker = Tracker(Home.locate(sys.argv[1]), "rayndom")
tracker.run("run", {"rayndom.fingerprint": sys.argv[2]}, "one")
"""


def opened(root, fingerprint="a"):
    """Start a process that opens the store of a home and a run in it."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(root), fingerprint],
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def made_of(migrated_store, monkeypatch):
    """Make new stores quickly: a copy stands in for MLflow's seconds of making tables."""
    from mlflow.tracking import MlflowClient

    class Client(MlflowClient):
        def __init__(self, tracking_uri):
            target = Path(tracking_uri.removeprefix("sqlite:///"))
            if target.name.endswith(".part"):
                shutil.copy(migrated_store, target)
            super().__init__(tracking_uri=tracking_uri)

    monkeypatch.setattr("mlflow.tracking.MlflowClient", Client)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def states_of(migrated_store):
    """Return what a kill can leave of `mlflow.db`: name -> function that leaves it at a path."""
    with contextlib.closing(sqlite3.connect(migrated_store)) as database:
        tables = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")]

    def some_tables(count, version):
        def leave(path):
            with contextlib.closing(sqlite3.connect(path)) as made, made:
                for sql in tables[:count]:
                    if "alembic_version" not in sql:
                        made.execute(sql)
                if version is not None:
                    made.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
                    if version:
                        made.execute("INSERT INTO alembic_version VALUES (?)", (version,))

        return leave

    def without_experiment(path):
        shutil.copy(migrated_store, path)
        with contextlib.closing(sqlite3.connect(path)) as made, made:
            made.execute("DELETE FROM experiments")

    generator = random.Random(0)
    counts = sorted({1, len(tables), *generator.sample(range(2, len(tables)), 4)})
    states = {"nothing": lambda path: None, "empty": lambda path: path.write_bytes(b""), "no experiment": without_experiment}
    for count in counts:
        for version in (None, "", "451aebb31d03", "bd07f7e963c5"):
            states[f"{count} tables, version {version!r}"] = some_tables(count, version)
    return states


def test_a_store_that_a_kill_left_in_any_state_is_opened(migrated_store, made_of, tmp_path):
    for name, leave in states_of(migrated_store).items():
        home = Home.locate(tmp_path / name)
        leave(home.root / "mlflow.db")
        (home.root / ".mlflow.db.part").write_bytes(b"half")
        (home.root / ".mlflow.db.part-journal").write_bytes(b"half")
        tracker = Tracker(home, "rayndom")
        run = tracker.run("run", {"rayndom.fingerprint": "a"}, "one")
        assert Tracker(home, "rayndom").find_run("a") == run, name
        if name != "no experiment":  # else the store was whole, and nobody had to make it
            assert sorted(path.name for path in home.root.iterdir()) == ["mlflow.db", "mlflow.db.lock"], name


def test_a_maker_that_is_alive_is_waited_for_and_named(home, made_of, tmp_path, monkeypatch):
    monkeypatch.setattr(local_store, "PATIENCE_S", 0.3)
    (home.root / "mlflow.db").unlink()
    with (home.root / "mlflow.db.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 17 on here")
        file.flush()
        with pytest.raises(UserError, match="process 17 on here"):
            Tracker(home, "rayndom")
    Tracker(home, "rayndom")


def test_what_is_no_store_is_named_and_left_as_it_was(home):
    for content in (b"text, not a database", b"SQLite format 3\0" + b"\xff" * 5000):
        (home.root / "mlflow.db").write_bytes(content)
        with pytest.raises(UserError, match=r"mlflow\.db"):
            Tracker(home, "rayndom")
        assert (home.root / "mlflow.db").read_bytes() == content


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_a_home_that_was_moved_has_its_artifacts_and_writes_to_its_new_place(home, tmp_path, capsys, copied):
    tracker = Tracker(home, "rayndom")
    run = tracker.run("run", {"rayndom.fingerprint": "a"}, "one")
    stored = tracker.client.get_run(run).info.artifact_uri
    first = Path(stored.removeprefix("file://")) / "first.json"  # by hand: MLflow would remember the place for the life of this process
    first.parent.mkdir(parents=True)
    first.write_text("{}")
    tracker.client.create_registered_model("m")
    tracker.client.create_model_version("m", f"{stored}/first.json", run_id=run)
    place = tmp_path / "other place" / "home"
    (shutil.copytree if copied else shutil.move)(home.root, place)
    before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file() and path.parent != home.root}
    capsys.readouterr()
    moved = Tracker(Home.locate(place), "rayndom")
    assert f"moved here from {home.root}" in capsys.readouterr().out
    moved.log_json(run, {"a": 2}, "second.json")
    assert {item.path for item in moved.client.list_artifacts(run)} == {"first.json", "second.json"}
    assert str(place).replace(" ", "%20") in moved.client.get_model_version("m", "1").source
    assert {path: path.read_bytes() for path in before} == before
    assert not list(home.root.rglob("second.json"))
    Tracker(Home.locate(place), "rayndom")
    assert "moved" not in capsys.readouterr().out, "said once"


def test_a_folder_of_artifacts_that_the_user_chose_stays(home, tmp_path, monkeypatch, capsys):
    chosen = tmp_path / "team" / "mlflow_artifacts"
    chosen.mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", chosen.as_uri())
    run = Tracker(home, "rayndom").run("run", {"rayndom.fingerprint": "a"}, "one")
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    Tracker(home, "rayndom").log_json(run, {}, "a.json")
    assert list(chosen.rglob("a.json"))
    assert "moved" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_store_of_an_earlier_mlflow_is_migrated_with_its_runs(tmp_path, monkeypatch):
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.locate(tmp_path / "home")
    engine = sqlalchemy.create_engine(home.tracking_uri)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config = _get_alembic_config(home.tracking_uri)
        config.attributes["connection"] = connection
        command.upgrade(config, "451aebb31d03")
    engine.dispose()
    with contextlib.closing(sqlite3.connect(home.root / "mlflow.db")) as database, database:
        database.execute("INSERT INTO experiments VALUES (0, 'Default', '/nowhere', 'active')")
        database.execute(
            "INSERT INTO runs (run_uuid, name, experiment_id, status, user_id, start_time, lifecycle_stage) "
            "VALUES ('a', 'b', 0, 'FINISHED', 'u', 1, 'active')"
        )
    tracker = Tracker(home, "rayndom")
    assert [run.info.run_id for run in tracker.client.search_runs(["0"])] == ["a"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_processes_that_open_a_new_home_at_once_share_one_store(tmp_path):
    processes = [opened(tmp_path / "home", f"run{index}") for index in range(10)]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 10, errors
    tracker = Tracker(Home.locate(tmp_path / "home"), "rayndom")
    assert len({tracker.find_run(f"run{index}") for index in range(10)}) == 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_process_killed_at_any_moment_of_its_start_leaves_a_home_that_opens(tmp_path):
    root = tmp_path / "home"
    began = time.monotonic()
    assert opened(tmp_path / "whole").wait(600) == 0
    needed = time.monotonic() - began
    generator = random.Random(0)
    for _ in range(8):
        shutil.rmtree(root, ignore_errors=True)
        for _ in range(2):
            process = opened(root)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0.3, 1.0) * needed)
            process.send_signal(signal.SIGKILL)
            process.wait()
        process = opened(root)
        assert process.wait(600) == 0, process.stderr.read()
