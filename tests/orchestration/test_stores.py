"""A team's stores, real ones on loopback: an MLflow server on PostgreSQL, artifacts in an S3-like store. Nothing secret is kept."""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from ray.tune.search import Searcher

from models.errors import UserError
from models.weights import load_pretrained
from orchestration.cli import main
from orchestration.home import Home
from orchestration.sweeping.grid import grid_points
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import STUDY_VARIABLE, open_study, spent
from orchestration.tracking.tracker import ARTIFACTS_VARIABLE, Tracker
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.services import Service, TrackingServer, answers, free_port
from tests.orchestration.sweep_process import SweepProcess, assert_whole_record, runs_of
from tests.orchestration.test_sweep_on_ray import write_sweep

DATABASE_PASSWORD = "correct-horse-battery"
S3_SECRET = "wJalr-not-a-real-secret-key"
USER_PASSWORD = "hunter-two-and-three"
SECRETS = (DATABASE_PASSWORD, S3_SECRET, USER_PASSWORD)
BUCKET = "rayndom"


def postgres_program(name: str) -> str | None:
    """Return the path of a program of PostgreSQL; Debian keeps it out of PATH."""
    return shutil.which(name) or next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


def missing() -> list[str]:
    """Return what these tests need and this machine lacks."""
    lacks = [f"Python package {name}" for name in ("psycopg", "boto3", "moto") if importlib.util.find_spec(name) is None]
    lacks += [f"PostgreSQL's {name}" for name in ("initdb", "postgres") if postgres_program(name) is None]
    if os.getuid() == 0 and not any(entry.pw_name == "postgres" for entry in pwd.getpwall()):
        lacks.append("a user `postgres` (PostgreSQL does not run as root)")
    return lacks


pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        bool(missing()), reason=f"not here: {', '.join(missing())}; `make setup EXTRAS=server,services`, Debian's postgresql"
    ),
]


@pytest.fixture(scope="module")
def database():
    """URI of an empty PostgreSQL database with a password."""
    import psycopg

    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="rayndom-postgres-", dir="/tmp"))  # a private folder of pytest is closed to another user
    password = folder / "password"
    password.write_text(DATABASE_PASSWORD)
    if user:
        for path in (folder, password):
            shutil.chown(path, user)
    data, port = folder / "data", free_port()
    initialize = [
        postgres_program("initdb"),
        "-D",
        str(data),
        "-U",
        "rayndom",
        "--auth=scram-sha-256",
        f"--pwfile={password}",
        "-E",
        "UTF8",
    ]
    subprocess.run(initialize, check=True, capture_output=True, user=user)

    def connect(name: str):
        return psycopg.connect(host="127.0.0.1", port=port, user="rayndom", password=DATABASE_PASSWORD, dbname=name, connect_timeout=2)

    def is_up() -> bool:
        try:
            connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    command = [postgres_program("postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    try:
        with Service(command, Path(tempfile.mkstemp(suffix=".log")[1]), is_up, user=user):
            connection = connect("postgres")
            connection.autocommit = True
            for name in ("mlflow", "direct", "studies"):
                connection.cursor().execute(f"CREATE DATABASE {name}")
            connection.close()
            yield f"postgresql://rayndom:{DATABASE_PASSWORD}@127.0.0.1:{port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """Variables that lead to an S3-like store with an empty bucket."""
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ACCESS_KEY_ID": "rayndom",
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": address,
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with Service(command, tmp_path_factory.mktemp("s3") / "log", lambda: answers(address)):
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="rayndom", aws_secret_access_key=S3_SECRET, region_name="us-east-1"
        )
        client.create_bucket(Bucket=BUCKET)
        yield variables, client


def objects(client) -> dict[str, bytes]:
    """Return every object of the bucket."""
    listed = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {item["Key"]: client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read() for item in listed}


def test_a_sweep_on_a_teams_server_leaves_its_whole_record_there_and_no_secret(database, s3, tmp_path, monkeypatch, capsys):
    variables, bucket = s3
    home = Home.locate(tmp_path / "home")
    path = write_sweep(tmp_path, trials=2, epochs=2)
    stores = ["--backend-store-uri", f"{database}/mlflow", "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    with TrackingServer(tmp_path / "server", stores, variables) as server:
        uri = server.uri.replace("//", f"//someone:{USER_PASSWORD}@")
        # A user's own variables: they lead to the server, and hold keys that are nobody else's business.
        with SweepProcess(path, home, tmp_path / "log", ("--no-evaluation",), variables | {"MLFLOW_TRACKING_URI": uri}) as sweep:
            assert sweep.wait(900) == 0, sweep.text
        assert server.uri in sweep.text, "the link to the sweep is printed"
        assert not (home.root / "mlflow.db").exists()
        assert not (home.root / "mlflow_artifacts").exists()
        figures = assert_whole_record(home, "tiny", 2, server.uri)
        assert figures["children"] == 2

        # The winner is fetched from another home, as by a colleague on another computer.
        (parent,) = runs_of(home, "sweep", server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        other = Home.locate(tmp_path / "other")
        target = resolve_target(parent.info.run_id, other)
        assert other.root in target.folder.parents
        assert load_pretrained(target.folder).__class__ is load_pretrained(home.root / "exports" / "tiny").__class__
        assert (target.folder / "model.safetensors").read_bytes() == (home.root / "exports" / "tiny" / "model.safetensors").read_bytes()
        capsys.readouterr()
        flags = ["--samples", "8", "--draws", "2", "--home", str(other.root), "--json"]
        assert main(["evaluate", parent.info.run_id, *flags]) == 0
        assert json.loads(capsys.readouterr().out)

        stored = objects(bucket)
        assert any(key.endswith("winner/model.safetensors") for key in stored)
        runs = [*runs_of(home, "sweep", server.uri), *runs_of(home, "trial", server.uri)]
        written = [json.dumps([run.data.params, run.data.tags, run.data.metrics]) for run in runs]
        written += [content.decode(errors="replace") for content in stored.values()]
        written += [sweep.text, *(file.read_text(errors="replace") for file in home.root.rglob("*.json"))]
        for secret in SECRETS:
            assert not any(secret in text for text in written)


def test_a_database_without_a_server_and_artifacts_straight_to_s3(database, s3, tmp_path, monkeypatch):
    variables, bucket = s3
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{database}/direct")
    monkeypatch.setenv(ARTIFACTS_VARIABLE, f"s3://{BUCKET}/direct")
    home = Home.locate(tmp_path / "home")
    tracker = Tracker(home, "team")
    run_id = tracker.run("run", {"rayndom.fingerprint": "abc"}, "one")
    for _ in range(2):
        for epoch in (1, 2):
            Tracker(home, "team").log_epoch(run_id, epoch, {"train/loss": 1 / 3})
    tracker.log_metrics(run_id, {"selected/x": 1 / 3})
    tracker.log_metrics(run_id, {"selected/x": 1 / 3})
    history = MlflowClient(f"{database}/direct").get_metric_history
    assert [metric.step for metric in history(run_id, "train/loss")] == [1, 2]
    assert len(history(run_id, "selected/x")) == 1
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1234")
    tracker.log_folder(run_id, folder, "model")
    stored = {Path(item.path).name for item in tracker.client.list_artifacts(run_id, "model")}
    assert stored == {entry.name for entry in folder.iterdir()}
    assert any(key.startswith("direct/") and key.endswith("model/weights") for key in objects(bucket))
    assert DATABASE_PASSWORD not in tracker.link(run_id)


def test_a_study_in_postgresql_is_gone_on_with_by_another_process_and_its_password_is_not_said(database, tmp_path, monkeypatch):
    monkeypatch.setenv(STUDY_VARIABLE, f"{database}/studies")
    config = load_sweep("rna_pools_digits")
    folders = [tmp_path / machine / "sweeps" / "pools-1" for machine in ("one", "another")]
    search = StudySearch(config, open_study(config, folders[0]))
    first = [search.suggest(f"t{index}")["values"] for index in range(4)]
    for index in range(2):
        search.on_trial_complete(f"t{index}", {"epoch": 1, "finished": True, "validation/robust_accuracy": 0.5})
    # Killed here; another machine has the database and nothing else.
    study = open_study(config, folders[1])
    assert spent(study) == 2
    again = StudySearch(config, study)
    rest = [again.suggest(f"t{index}")["values"] for index in range(8)]
    assert again.suggest("more") == Searcher.FINISHED
    assert sorted(map(str, [*first[:2], *rest])) == sorted(map(str, grid_points(config.space)))
    assert not list(tmp_path.rglob("study.db"))
    monkeypatch.setenv(STUDY_VARIABLE, f"{database}/nothing")
    with pytest.raises(UserError) as caught:
        open_study(config, folders[1])
    assert DATABASE_PASSWORD not in str(caught.value)
