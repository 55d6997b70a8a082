"""`rayndom doctor` finds what is wrong, says how to mend it, changes nothing and shows no secret."""

from __future__ import annotations

import contextlib
import importlib
import socket
import sqlite3
import threading
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from orchestration.commands.doctor import run_checks
from orchestration.doctor import installation, machine, services
from orchestration.doctor.check import Check
from trainers.data.sets import DATASETS

SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the developer's own environment decides a finding."""
    for name in (
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_TMPDIR",
        "MLFLOW_TRACKING_URI",
        "RAYNDOM_DATA",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """A port of this machine on which something answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    """A port of this machine on which nothing answers."""
    with listening() as port:
        return port


def test_all_checks_run_on_a_home_that_does_not_exist_and_do_not_make_it(tmp_path: Path) -> None:
    home = tmp_path / "absent" / "home"
    checks = run_checks(home, tmp_path / "no_data")
    assert all(isinstance(check, Check) and check.found for check in checks)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"Python", "packages", "torchattacks", "GPU", "memory", "Ray cluster", "MLflow store"} <= set(names)
    assert all(check.mend for check in checks if check.status == "fail")
    assert not home.exists()


# Installation


def test_python_that_is_too_old_fails() -> None:
    check = installation.check_python((3, 10))
    assert check.status == "fail"
    assert "3.11" in check.mend


def test_installed_packages_meet_the_lower_bounds() -> None:
    checks = installation.check_packages(installation.requirements())
    assert [check.status for check in checks] == ["ok"]


def test_each_package_that_is_missing_or_too_old_is_named() -> None:
    checks = installation.check_packages([Requirement("torch>=999"), Requirement("no-such-package>=1"), Requirement("numpy")])
    assert [(check.name, check.status) for check in checks] == [
        ("package torch", "fail"),
        ("package no-such-package", "fail"),
    ]
    assert ">=999" in checks[0].found
    assert all("make setup" in check.mend for check in checks)


def test_an_old_mlflow_is_explained_by_the_pin_of_torchattacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "installed_version", lambda name: "2.22.0")
    (check,) = installation.check_packages([Requirement("mlflow>=3.5")])
    assert "torchattacks" in check.mend


def test_packages_that_differ_from_the_lock_are_named(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        f"numpy=={installation.installed_version('numpy')}\n    # via torch\n"
        "torch==0.0.1\n"
        "no-such-package==1.0 ; sys_platform == 'no-such-system'\n"
    )
    check = installation.check_lock(lock)
    assert check.status == "warn"
    assert check.found == "1 of 2 differ: torch"
    assert installation.check_lock(tmp_path / "absent").status == "ok"


def test_torchattacks_imports_beside_a_requests_that_mlflow_accepts() -> None:
    assert installation.check_torchattacks().status == "ok"


def test_the_requests_that_torchattacks_pins_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "installed_version", lambda name: "2.25.1")
    check = installation.check_torchattacks()
    assert check.status == "fail"
    assert "requests 2.25.1" in check.found


def test_a_torchattacks_that_does_not_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("no module named pkg_resources")

    monkeypatch.setattr(importlib, "import_module", broken)
    check = installation.check_torchattacks()
    assert check.status == "fail"
    assert "pkg_resources" in check.found


def test_missing_dashboard_packages_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_ray_extras().status == "ok"
    found = installation.installed_version
    monkeypatch.setattr(installation, "installed_version", lambda name: None if name == "opencensus" else found(name))
    check = installation.check_ray_extras()
    assert check.status == "fail"
    assert "opencensus" in check.found


def test_a_folder_that_hides_our_packages_from_workers_is_named(tmp_path: Path) -> None:
    assert installation.check_import_locations(tmp_path).status == "ok"
    assert installation.check_import_locations(installation.PACKAGE_ROOT).status == "ok"
    (tmp_path / "models").mkdir()
    check = installation.check_import_locations(tmp_path)
    assert check.status == "warn"
    assert str(tmp_path / "models") in check.found


def test_another_package_of_the_same_name_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "models"
    other.mkdir()
    (other / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("models", other / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    check = installation.check_import_locations(tmp_path)
    assert check.status == "fail"
    assert str(other) in check.found


# Machine


def test_no_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "absent")
    assert machine.check_gpus().status == "ok"


def test_a_driver_that_pytorch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    driver.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "_DRIVER", driver)
    check = machine.check_gpus()
    assert check.status == "fail"
    assert "driver" in check.mend
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in machine.check_gpus().found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in machine.check_gpus().mend


def test_gpus_are_listed_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {"name": "Example GPU", "memory_gib": 24.0, "compute_capability": "9.0"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "gpus", lambda: [device, device])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((20 - 19 * index) * 2**30, 24 * 2**30))
    check = machine.check_gpus()
    assert check.status == "warn"
    assert check.found.startswith("2: Example GPU (20 of 24 GiB free), Example GPU (1 of 24 GiB free)")


def test_a_gpu_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "gpus", broken)
    check = machine.check_gpus()
    assert (check.status, check.found) == (
        "fail",
        "cannot be used: CUDA error: uncorrectable ECC error encountered",
    )


Usage = namedtuple("Usage", "total used free")
GIB = 2**30


@pytest.mark.parametrize(
    ("usage", "status"),
    [
        (Usage(100 * GIB, 50 * GIB, 50 * GIB), "ok"),
        (Usage(100 * GIB, 95 * GIB, 5 * GIB), "warn"),
        (Usage(100 * GIB, 99.5 * GIB, 0.5 * GIB), "fail"),
        (Usage(1000 * GIB, 970 * GIB, 30 * GIB), "warn"),
    ],
)
def test_disk_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, usage: Usage, status: str) -> None:
    monkeypatch.setattr(machine.psutil, "disk_usage", lambda folder: usage)
    check = machine.check_disk("disk", tmp_path / "not" / "yet", "make room")
    assert check.status == status
    assert bool(check.mend) == (status != "ok")


def test_small_shared_memory_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.psutil, "disk_usage", lambda folder: Usage(2**26, 0, 2**26))
    assert machine.check_shared_memory(tmp_path).status == "warn"
    assert machine.check_shared_memory(tmp_path / "absent").status == "ok"


def test_a_home_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert machine.check_home(tmp_path / "file" / "home").status == "fail"
    assert machine.check_home(tmp_path / "home").status == "ok"


def test_a_home_on_a_network_disk_warns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Partition = namedtuple("Partition", "mountpoint fstype")
    mounts = [Partition("/", "ext4"), Partition(str(tmp_path), "nfs4"), Partition(str(tmp_path / "other"), "ext4")]
    monkeypatch.setattr(machine.psutil, "disk_partitions", lambda all: mounts)
    check = machine.check_home(tmp_path / "home")
    assert check.status == "warn"
    assert "nfs4" in check.found
    assert "MLFLOW_TRACKING_URI" in check.mend


# Ray


def test_without_an_address_ray_starts_here() -> None:
    assert services.check_ray_address("").status == "ok"
    assert services.check_ray_address("auto").status == "ok"


def test_a_cluster_that_answers_and_one_that_does_not() -> None:
    with listening() as port:
        assert services.check_ray_address(f"127.0.0.1:{port}").status == "ok"
        client = services.check_ray_address(f"ray://127.0.0.1:{port}")
        assert client.status == "warn"
        assert "ray job submit" in client.mend
    check = services.check_ray_address(f"127.0.0.1:{closed_port()}")
    assert check.status == "fail"
    assert "nothing answers" in check.found


@pytest.mark.parametrize("address", ["127.0.0.1:many", "ray://:10001", "ftp://host"])
def test_an_address_that_is_none_fails(address: str) -> None:
    assert "is no address" in services.check_ray_address(address).found


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6380", ("", "10.0.0.1", 6380)),
        ("head", ("", "head", 6379)),
        ("ray://head", ("ray", "head", 10001)),
        ("http://head", ("http", "head", 8265)),
    ],
)
def test_ports_that_an_address_leaves_out(address: str, expected: tuple) -> None:
    assert services.split_address(address) == expected


def test_tokens_are_found_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert services.check_ray_token("").status == "ok"
    assert services.check_ray_token("head:6379").status == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert services.check_ray_token("head:6379").status == "fail"
    default = tmp_path / "user" / ".ray" / "auth_token"
    default.parent.mkdir(parents=True)
    default.write_text(SECRET)
    found = [services.check_ray_token("head:6379")]
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    found.append(services.check_ray_token("head:6379"))
    assert [check.status for check in found] == ["ok", "ok"]
    assert all(SECRET not in check.found + check.mend for check in found)


def test_a_token_path_without_a_token_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert services.check_ray_token("").status == "fail"
    (tmp_path / "absent").write_text(SECRET)
    assert services.check_ray_token("").status == "ok"


def test_authentication_switched_off_is_only_fine_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert services.check_ray_token("").status == "ok"
    assert services.check_ray_token("head:6379").status == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "open")
    assert services.check_ray_token("").status == "fail"


# MLflow


def store(folder: Path, revision: str) -> str:
    """The URI of an SQLite file that says it has this MLflow schema."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        database.commit()
    return f"sqlite:///{folder / 'mlflow.db'}"


def test_the_schema_revisions_of_the_installed_mlflow_are_one_chain() -> None:
    revisions = services.mlflow_revisions()
    assert len(revisions) > 50
    assert services.newest_revision(revisions) in revisions


@pytest.mark.slow
def test_the_newest_revision_is_the_one_that_mlflow_expects() -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert services.newest_revision(services.mlflow_revisions()) == _get_latest_schema_revision()


def test_a_store_of_this_mlflow_is_fine_and_left_as_it_is(tmp_path: Path) -> None:
    assert services.check_mlflow_store(f"sqlite:///{tmp_path / 'absent.db'}").status == "ok"
    uri = store(tmp_path, services.newest_revision(services.mlflow_revisions()))
    before = (tmp_path / "mlflow.db").read_bytes()
    assert services.check_mlflow_store(uri).status == "ok"
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_of_an_older_mlflow_is_to_be_upgraded(tmp_path: Path) -> None:
    revisions = services.mlflow_revisions()
    check = services.check_mlflow_store(store(tmp_path, revisions[services.newest_revision(revisions)]))
    assert check.status == "fail"
    assert "mlflow db upgrade" in check.mend


def test_a_store_of_a_newer_mlflow_is_to_be_left_alone(tmp_path: Path) -> None:
    check = services.check_mlflow_store(store(tmp_path, "ffffffffffff"))
    assert check.status == "fail"
    assert "newer MLflow" in check.found


def test_a_damaged_store_fails(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    check = services.check_mlflow_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert check.status == "fail"
    assert "damaged" in check.found


def test_a_store_that_another_program_writes_to_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "BUSY_S", 0.05)
    uri = store(tmp_path, "anything")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        check = services.check_mlflow_store(uri)
        writer.rollback()
    assert check.status == "warn"
    assert "busy" in check.found


def test_databases_on_a_network_disk_are_left_to_their_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "filesystem_kind", lambda folder: "nfs4")
    (tmp_path / "sweeps" / "first").mkdir(parents=True)
    for file in (tmp_path / "mlflow.db", tmp_path / "sweeps" / "first" / "study.db"):
        file.write_bytes(b"never opened")
    assert services.check_mlflow_store(f"sqlite:///{tmp_path / 'mlflow.db'}").status == "ok"
    assert services.check_studies(tmp_path / "sweeps").status == "ok"


def test_a_relative_store_fails_because_workers_start_elsewhere() -> None:
    check = services.check_mlflow_store("sqlite:///mlflow.db")
    assert check.status == "fail"
    assert "sqlite:////" in check.mend


@pytest.mark.parametrize("uri", ["./mlruns", "file:///srv/mlruns"])
def test_a_folder_store_fails(uri: str) -> None:
    assert services.check_mlflow_store(uri).status == "fail"


@contextlib.contextmanager
def answering(code: int) -> Iterator[int]:
    """A web server that answers every request with this code."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/health" else 500)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("code", "status"), [(200, "ok"), (401, "warn"), (404, "fail"), (503, "fail")])
def test_a_server_is_asked_for_its_health(code: int, status: str) -> None:
    with answering(code) as port:
        check = services.check_mlflow_store(f"http://someone:{SECRET}@127.0.0.1:{port}")
    assert check.status == status
    assert f"127.0.0.1:{port}" in check.found
    assert SECRET not in check.found + check.mend


def test_a_server_that_is_away_fails() -> None:
    check = services.check_mlflow_store(f"http://127.0.0.1:{closed_port()}")
    assert check.status == "fail"
    assert "does not answer" in check.found


def test_a_database_needs_its_driver_and_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"postgresql://someone:{SECRET}@127.0.0.1:{closed_port()}/mlflow"
    monkeypatch.setattr(services.importlib.util, "find_spec", lambda name: None)
    assert "EXTRAS=server" in services.check_mlflow_store(uri).mend
    monkeypatch.setattr(services.importlib.util, "find_spec", lambda name: object())
    check = services.check_mlflow_store(uri)
    assert check.status == "fail"
    assert SECRET not in check.found + check.mend


# Optuna


def test_studies_are_counted_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    import optuna

    assert services.check_studies(tmp_path).status == "ok"
    (tmp_path / "first").mkdir()
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'first' / 'study.db'}")
    study.ask()
    check = services.check_studies(tmp_path)
    assert check.status == "ok"
    assert check.found.startswith("1 can be read and written; 1 trials run")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "study.db").write_bytes(b"not a database" * 100)
    check = services.check_studies(tmp_path)
    assert check.status == "fail"
    assert str(tmp_path / "second" / "study.db") in check.found


# Data sets


def test_data_sets_are_found_or_said_where_they_were_looked_for(tmp_path: Path) -> None:
    absent = machine.check_dataset(DATASETS["cifar10"], tmp_path)
    assert absent.status == "warn"
    assert str(tmp_path / "cifar-10-batches-py") in absent.found
    assert str(tmp_path) in absent.mend
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in DATASETS["cifar10"].files:
        (folder / name).touch()
    assert machine.check_dataset(DATASETS["cifar10"], tmp_path) == Check("data set cifar10", "ok", str(folder))
    assert machine.check_dataset(DATASETS["digits"], tmp_path).status == "ok"
