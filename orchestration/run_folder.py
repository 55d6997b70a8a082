"""The folder of one training run, named by its fingerprint: configuration, resumable state, result, exported model.

The same fingerprint means the same folder: a run that was interrupted goes on, a finished one is reused, two processes never train
it at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from models.errors import UserError
from models.files import write_text
from models.json_text import read_json
from models.yaml_text import read_yaml
from orchestration.experiment import ExperimentConfig, read_experiment
from trainers.checkpoint import STATE_FILE, read_state

RESULT_FILE = "result.json"
EXPERIMENT_FILE = "config.yaml"
MODEL_FOLDER = "model"


def _problem_with(result: Mapping[str, Any]) -> str | None:
    """Return what keeps an object from being the result of a finished run, None if nothing does."""
    metrics, history = result.get("metrics"), result.get("history")
    epochs, selected = result.get("num_epochs"), result.get("selected_epoch")
    for name, each in [("metrics", metrics), *(("history", row) for row in (history if isinstance(history, list) else [None]))]:
        if not isinstance(each, dict) or any(isinstance(value, bool) or not isinstance(value, int | float) for value in each.values()):
            return f"{name!r} should hold numbers by name"
    if type(epochs) is not int or type(selected) is not int or not 1 <= selected <= epochs:
        return f"'selected_epoch' is {selected!r:.50} and 'num_epochs' {epochs!r:.50}"
    assert isinstance(history, list)
    return None if len(history) == epochs else f"'num_epochs' is {epochs}, but 'history' holds {len(history)} epochs"


@dataclass(frozen=True)
class RunFolder:
    """Paths and state of one run."""

    path: Path

    @property
    def model(self) -> Path:
        """The exported model; there once the run is finished."""
        return self.path / MODEL_FOLDER

    @property
    def has_state(self) -> bool:
        """Whether there is something to resume."""
        return (self.path / STATE_FILE).is_file()

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, None for others."""
        path = self.path / RESULT_FILE
        if not path.exists():
            return None
        result = read_json(path)
        problem = _problem_with(result)
        if problem is not None:
            raise UserError(f"{path} is damaged: {problem}; delete the folder to train again")
        return result

    def history(self) -> list[dict[str, float]]:
        """Return the metrics of each epoch that is finished, empty if there is none.

        Raises:
            UserError: a file is damaged.
        """
        finished = self.result()
        if finished is not None:
            return finished["history"]
        return read_state(self.path)["history"] if self.has_state else []

    def write_result(self, result: dict[str, Any]) -> None:
        """Mark the run as finished, atomically."""
        write_text(self.path / RESULT_FILE, json.dumps(result, indent=2))

    def write_config(self, experiment: ExperimentConfig) -> None:
        """Keep the whole configuration beside the state."""
        write_text(self.path / EXPERIMENT_FILE, yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))

    def read_config(self) -> ExperimentConfig:
        """Return the run's configuration."""
        path = self.path / EXPERIMENT_FILE
        if not path.is_file():
            raise UserError(f"{self.path} is not a run folder: it has no {EXPERIMENT_FILE}")
        return read_experiment(read_yaml(path), str(path))

    def clear(self) -> None:
        """Forget everything but the lock."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; another process that trains it is waited for. The lock dies with its process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
