"""Fixtures: a migrated MLflow store to copy (its first use takes seconds), a home folder, one Ray for all tests that need one."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.orchestration.json_names import problems

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # or other tests on the same cores would starve the workers


@pytest.fixture(autouse=True)
def plain_output(monkeypatch):
    """Each test begins with lines for people on the output; a command that was run with `--json` would leave them on the error stream.

    Whatever a command would print as JSON, asked for or not, has names for keys and numbers for numbers.
    """
    from orchestration import console

    console.use_json(False)
    printed = console.result

    def checked(value):
        assert problems(value) == []
        printed(value)

    monkeypatch.setattr(console, "result", checked)


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory):
    """Path of an SQLite file with MLflow's schema."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path, migrated_store, monkeypatch):
    """A home folder with a ready store."""
    from orchestration.home import Home

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    located = Home.locate(tmp_path / "home")
    shutil.copy(migrated_store, located.root / "mlflow.db")
    return located


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with two CPUs."""
    from orchestration.training import cluster

    cluster.connect(num_cpus=2)
    import ray

    yield
    ray.shutdown()
