"""Homes in an object store: what is uploaded and in which order, which side holds, who may write. On fsspec's store of local files."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.errors import EnvironmentProblem, UserError
from orchestration import storage as storages
from orchestration.home import Home
from orchestration.single_process import only_process
from orchestration.storage import Storage, is_url, open_storage, storage_of
from orchestration.store_lock import Held


@pytest.fixture
def store(tmp_path, monkeypatch):
    """URL of an empty store; what commands open in this process is forgotten afterwards."""
    monkeypatch.setattr(storages, "_driven", {})
    monkeypatch.setattr(storages, "_written", {})
    monkeypatch.setattr(storages, "_machine_locks", [])
    monkeypatch.delenv(storages.TRACKING_VARIABLE, raising=False)
    for name in storages.STORAGE_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(storages.COPY_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    yield f"file://{tmp_path / 'store'}"
    for held in storages._machine_locks:
        held.release()
    for descriptor in storages._written.values():
        os.close(descriptor)


def copies(store: str, tmp_path: Path, count: int = 2) -> list[Storage]:
    """Copies of a home on machines that share nothing else."""
    return [Storage(store, tmp_path / f"machine-{index}") for index in range(count)]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_what_one_machine_uploads_another_one_has(store, tmp_path):
    here, there = copies(store, tmp_path)
    names = (
        "runs/a/config.yaml",
        "runs/a/model/model.safetensors",
        "exports/x/README.md",
        "exports/train/README.md",
        "evaluations/c/blocks",
    )
    for name in names:
        write(here.root / name, name)
    for name in ("runs/a/lock", "runs/a/.config.yaml.123.part", "tune/x/params.json", "sweeps/s/train/y", "mlflow.db-journal"):
        write(here.root / name, "stays here")
    here.push(here.root)
    there.pull(there.root)
    found = {path.relative_to(there.root).as_posix(): path.read_text() for path in there.root.rglob("*") if path.is_file()}
    assert found == {name: name for name in names}
    there.remove(there.root / "runs")
    assert {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()} == {"README.md", "blocks"}


def test_of_a_folder_what_makes_it_count_comes_last(store, tmp_path, monkeypatch):
    here, _ = copies(store, tmp_path)
    for name in ("result.json", "config.yaml", "training.pt", "model/config.json", "model/model.safetensors", "model/README.md"):
        write(here.root / "runs/a" / name, "x" * len(name))
    files, sent = here._opened[0], []
    real = files.put_file
    monkeypatch.setattr(files, "put_file", lambda local, remote: (sent.append(Path(remote).name), real(local, remote)))
    here.push(here.root / "runs/a")
    assert sent[-2:] == ["config.json", "result.json"]
    assert len(sent) == 6
    here.push(here.root / "runs/a")
    assert len(sent) == 6, "what is there already is not sent again"
    write(here.root / "runs/a/training.pt", "x" * len("training.pt"))
    here.push(here.root / "runs/a")
    assert sent[6:] == ["training.pt"], "the same size, another content"


def test_weights_wait_until_they_are_used_and_databases_do_not(store, tmp_path):
    here, there = copies(store, tmp_path)
    write(here.root / "runs/a/training.pt", "x" * 100)
    write(here.root / "runs/a/result.json", "{}")
    here.push(here.root)
    here.write(here.root / "mlflow.db", b"y" * 100)
    there.pull(there.root, largest=50)
    assert sorted(path.name for path in there.root.rglob("*") if path.is_file()) == ["mlflow.db", "result.json"]
    there.pull(there.root / "runs/a")
    assert (there.root / "runs/a/training.pt").is_file()


def test_what_another_machine_has_written_since_is_not_overwritten_and_copies_are_files_of_their_own(store, tmp_path):
    here, there = copies(store, tmp_path)
    write(here.root / "runs/a/training.pt", "first")
    write(here.root / "exports/x/config.json", "of another model")
    here.push(here.root)
    there.pull(there.root)
    write(there.root / "runs/a/training.pt", "later")
    there.push(there.root)
    here.push(here.root)  # as a driver does at its end, which has an old state of a trial that moved
    assert (tmp_path / "store" / "runs/a/training.pt").read_text() == "later"
    here.pull(here.root)
    assert (here.root / "runs/a/training.pt").read_text() == "later"
    shutil.copy2(here.root / "runs/a/training.pt", here.root / "exports/x/config.json")  # with its time
    here.push(here.root)
    assert (tmp_path / "store" / "exports/x/config.json").read_text() == "later"


def test_what_was_written_within_the_same_second_is_told_apart_where_a_store_tells_whole_seconds(store, tmp_path, monkeypatch):
    """As S3 and Azure do."""
    here, there = copies(store, tmp_path)

    def with_whole_seconds(files):
        told, found = files.info, files.find

        def coarse(info):
            if info["type"] != "file":
                return info
            return info | {"mtime": 1_700_000_000, "created": 1_700_000_000, "ETag": f'"{Path(info["name"]).read_text()}"'}

        monkeypatch.setattr(files, "info", lambda *a, **k: coarse(told(*a, **k)))
        monkeypatch.setattr(files, "find", lambda *a, **k: {name: coarse(info) for name, info in found(*a, **k).items()})

    with_whole_seconds(here._opened[0])
    names = [f"runs/{index}/state" for index in range(20)]
    for turn in range(3):
        for name in names:
            write(there.root / name, f"{name} {turn}")
        there.push(there.root)
        here.pull(here.root)
        # Of a thousand versions of one second two are taken for one.
        assert sum((here.root / name).read_text() == f"{name} {turn}" for name in names) >= len(names) - 1


@pytest.mark.parametrize("seed", range(5))
def test_the_newer_side_holds_whatever_is_done_on_two_machines(seed, store, tmp_path):
    """One machine works at a time, as drivers do; each fetches when it begins and is killed at times before it uploads."""
    rng = random.Random(seed)
    machines, names = copies(store, tmp_path), [f"runs/{letter}/state" for letter in "abc"]
    uploaded: dict[str, str] = {}
    unsent: dict[int, dict[str, str]] = {0: {}, 1: {}}
    for turn in range(30):
        index = rng.randrange(2)
        machine = machines[index]
        machine.pull(machine.root)
        seen = {name: (machine.root / name).read_text() for name in names if (machine.root / name).is_file()}
        for name, content in seen.items():
            assert content in (uploaded.get(name), unsent[index].get(name))
            if name not in unsent[index]:
                assert content == uploaded[name]
        for name in rng.sample(names, rng.randint(0, 2)):
            write(machine.root / name, f"{turn}")
            unsent[index][name] = f"{turn}"
        if rng.random() < 0.7:
            machine.push(machine.root)
            uploaded |= {name: (machine.root / name).read_text() for name in names if (machine.root / name).is_file()}
            unsent[index] = {}
        for name in list(unsent[1 - index]):  # what the other machine never sent is older than what was sent after it
            if uploaded.get(name) is not None and int(uploaded[name]) > int(unsent[1 - index][name]):
                del unsent[1 - index][name]
        time.sleep(0.005)


def test_a_database_is_copied_whole_while_it_is_written_to_and_replaced_without_its_journal(store, tmp_path):
    here, there = copies(store, tmp_path)
    here.root.mkdir()
    connection = sqlite3.connect(here.root / "mlflow.db", isolation_level=None)
    connection.execute("CREATE TABLE t (x)")
    connection.execute("INSERT INTO t VALUES (1)")
    connection.execute("BEGIN")
    connection.execute("INSERT INTO t VALUES (2)")
    here.push_databases()
    write(there.root / "mlflow.db-journal", "of a killed process")
    there.pull(there.root)
    assert not (there.root / "mlflow.db-journal").exists()
    other = sqlite3.connect(there.root / "mlflow.db")
    assert other.execute("SELECT x FROM t").fetchall() == [(1,)]
    connection.execute("COMMIT")
    here.push_databases()
    there.pull(there.root)
    assert sqlite3.connect(there.root / "mlflow.db").execute("SELECT x FROM t").fetchall() == [(1,), (2,)]


def test_a_database_that_a_living_process_here_writes_to_is_not_replaced(store, tmp_path):
    home = Home.locate(store)
    write(home.root / "mlflow.db", "what the living process writes")
    storage_of(home.root).write(home.root / "mlflow.db", b"what was uploaded before")
    time.sleep(0.01)
    program = f"from orchestration.home import Home; Home.to_read({store!r})"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=100)
    assert (home.root / "mlflow.db").read_text() == "what the living process writes"


def test_a_second_driver_is_refused_and_takes_over_when_the_first_is_gone(store, tmp_path, monkeypatch):
    home = Home.locate(store)
    lock = home.root / "sweeps" / "s" / "lock"
    elsewhere = storages.lock_of(lock)
    elsewhere.place, elsewhere.beat_s = "another machine", 0.2
    assert elsewhere.try_to_take("process 1 on another machine")
    monkeypatch.setattr("orchestration.store_lock._STALE_S", 1.0)
    with pytest.raises(EnvironmentProblem, match="the sweep s is being run by process 1 on another machine"):
        with only_process(lock, "the sweep s", patience_s=0.5):
            pytest.fail("two drivers")
    elsewhere._ended.set()  # killed: it renews no more
    with only_process(lock, "the sweep s", patience_s=0.5):
        own = storages.lock_of(lock)
        assert not own.try_to_take("a third")
        assert "on another machine" not in own.look()[2]
    assert storages.lock_of(lock).look() == ("", "", "")
    # What an earlier process held from the same copy is taken over at once: who has the lock file knows that it is dead.
    dead = storages.lock_of(lock)
    dead._ended.set()
    assert dead.try_to_take("a killed process")
    started = time.monotonic()
    with only_process(lock, "the sweep s"):
        assert time.monotonic() - started < 0.9


def test_one_machine_at_a_time_writes_to_a_home_whose_mlflow_store_is_a_file(store, tmp_path, monkeypatch):
    elsewhere = Storage(store, tmp_path / "elsewhere").held(tmp_path / "elsewhere" / "mlflow.db")
    elsewhere.place, elsewhere.beat_s = "another machine", 0.2
    assert elsewhere.try_to_take("process 1 on another machine")
    with pytest.raises(EnvironmentProblem, match="is written to by process 1 on another machine"):
        Home.locate(store)
    Home.to_read(store)
    monkeypatch.setenv(storages.TRACKING_VARIABLE, "http://127.0.0.1:9")
    Home.locate(store)
    elsewhere.release()


def test_of_many_that_take_a_lock_one_holds_it(store, tmp_path):
    import fsspec

    files, base = fsspec.core.url_to_fs(store)
    contenders = [Held(files, f"{base}/x.held", str(index)) for index in range(5)]
    assert sum(each.try_to_take("me") for each in contenders) == 1
    for each in contenders:
        each.release()
    assert contenders[0].try_to_take("me")
    contenders[0].release()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://bucket/team", "nosuch"),
        ("s3://key:secret@bucket/team", "environment"),
        ("s3://key@bucket/team", "environment"),
    ],
)
def test_a_home_that_cannot_be_one_is_one_error_without_its_secret(store, url, words):
    assert is_url(url)
    with pytest.raises(UserError, match=words) as caught:
        open_storage(url, to_write=True)
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_command_leaves_in_the_store_what_it_made(store, tmp_path, capsys):
    from orchestration.cli import main

    flags = ["--training.epochs", "1", "--data.limit_train", "64", "--data.limit_test", "16", "--data.validation_size", "16",
             "--data.image_size", "8", "--training.attack.steps", "1", "--training.validation.steps", "1"]  # fmt: skip
    assert main(["train", "at_digits", "--home", store, "--json", *flags]) == 0
    fingerprint = json.loads(capsys.readouterr().out)["fingerprint"]
    kept = {path.relative_to(tmp_path / "store").as_posix() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    run = f"runs/{fingerprint}"
    assert {f"{run}/result.json", f"{run}/training.pt", f"{run}/model/model.safetensors", "mlflow.db"} <= kept
    assert not any("lock" in name or name.endswith(".held") for name in kept)


def test_a_machine_that_joins_is_examined_while_another_one_writes_to_the_home(store, tmp_path, capsys):
    from orchestration.cli import main

    elsewhere = Storage(store, tmp_path / "elsewhere").held(tmp_path / "elsewhere" / "mlflow.db")
    elsewhere.place, elsewhere.beat_s = "another machine", 0.2
    assert elsewhere.try_to_take("process 1 on another machine")
    before = sorted((tmp_path / "store").rglob("*"))
    assert main(["doctor", "--home", store, "--json"]) in (0, 1), "what it finds of this machine, not who writes to the home"
    (found,) = [each for each in json.loads(capsys.readouterr().out) if each["name"] == "home folder"]
    assert found["status"] == "ok" and store in found["found"]
    assert sorted((tmp_path / "store").rglob("*")) == before
    elsewhere.release()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").touch()
    main(["doctor", "--home", store, "--json"])
    (found,) = [each for each in json.loads(capsys.readouterr().out) if each["name"] == "home folder"]
    assert found["status"] == "fail" and "cannot use the home" in found["found"]
