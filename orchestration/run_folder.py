"""The folder of one training run, named by its fingerprint: configuration, resumable state, result, exported model.

The same fingerprint means the same folder: a run that was interrupted goes on, a finished one is reused, two processes never train
it at once. PyTorch is loaded where weights or schemas are read: who looks which runs there are does without.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from models.errors import EnvironmentProblem, UserError
from models.files import write_text
from models.json_text import read_json
from models.yaml_text import read_yaml
from orchestration.single_process import ADVICE, ENDING_S, holder_of, is_held, only_process
from trainers.reporting import are_metrics

if TYPE_CHECKING:
    from orchestration.experiment import ExperimentConfig
    from trainers.data.description import DataDescription

RESULT_FILE = "result.json"
EXPERIMENT_FILE = "config.yaml"
MODEL_FOLDER = "model"
DIVERGED_FILE = "diverged.json"
INITIAL_WEIGHTS_FILE = "initial_weights.json"
DATA_FILE = "data.json"
CODE_FILE = "code.json"
CHECKPOINTS_FOLDER = "checkpoints"
_CHECKPOINT = re.compile(r"epoch_(\d+)")


def _problem_with(result: Mapping[str, Any]) -> str | None:
    """Return what keeps an object from being the result of a finished run, None if nothing does."""
    metrics, history = result.get("metrics"), result.get("history")
    epochs, selected = result.get("num_epochs"), result.get("selected_epoch")
    for name, each in [("metrics", metrics), *(("history", row) for row in (history if isinstance(history, list) else [None]))]:
        if not are_metrics(each):
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

    def checkpoint(self, epoch: int) -> Path:
        """Return where the model of an epoch lies, from 1, where `checkpoints.every` asks for it."""
        return self.path / CHECKPOINTS_FOLDER / f"epoch_{epoch:04}"

    def checkpoints(self) -> dict[int, Path]:
        """Return epoch -> model of those that were kept beside the selected one."""
        folder = self.path / CHECKPOINTS_FOLDER
        named = ((_CHECKPOINT.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    @property
    def has_state(self) -> bool:
        """Whether there is something to resume."""
        from trainers.checkpoint import STATE_FILE

        return (self.path / STATE_FILE).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether there is a result; `result` says whether it can be read."""
        return (self.path / RESULT_FILE).is_file()

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, None for others.

        Raises:
            UserError: it is damaged, or the exported model is gone, damaged or another run's.
        """
        result = self._read_result()
        if result is not None:
            self._check_model(result)
        return result

    def _read_result(self) -> dict[str, Any] | None:
        path = self.path / RESULT_FILE
        if not os.path.lexists(path):
            return None
        result = read_json(path)
        problem = _problem_with(result)
        if problem is not None:
            raise UserError(f"{path} is damaged: {problem}; delete the folder to train again")
        return result

    def _check_model(self, result: Mapping[str, Any]) -> None:
        """Raise a UserError unless the exported model is there, and is that of this run and of this result."""
        from models.weights import CONFIG_FILE, read_config

        details = read_config(self.model)["details"]
        made_by, training = details.get("fingerprint"), details.get("training")
        if made_by != self.path.name:
            raise UserError(f"{self.model} holds the model of another run, {made_by!r:.100}; delete {self.path} to train again")
        if not isinstance(training, dict):
            raise UserError(f"{self.model / CONFIG_FILE} is damaged: details.training should be an object")
        for name, value in training.items():
            if repr(result.get(name)) != repr(value):  # by `repr`: a metric that is no number equals itself
                raise UserError(
                    f"{self.path / RESULT_FILE} and {self.model / CONFIG_FILE} are of different trainings: {name} differs; "
                    f"delete {self.path} to train again"
                )

    def history(self) -> list[dict[str, float]]:
        """Return the metrics of each epoch that is finished, empty if there is none.

        Raises:
            UserError: a file is damaged.
        """
        from trainers.checkpoint import read_state

        finished = self._read_result()
        if finished is not None:
            return finished["history"]
        return read_state(self.path)["history"] if self.has_state else []

    def write_result(self, result: dict[str, Any]) -> None:
        """Mark the run as finished, atomically."""
        write_text(self.path / RESULT_FILE, json.dumps(result, indent=2))

    def diverged(self) -> str | None:
        """Return why an earlier training of this run diverged, None if none did: the same training would diverge again."""
        path = self.path / DIVERGED_FILE
        return str(read_json(path).get("reason", "the training diverged")) if os.path.lexists(path) else None

    def write_diverged(self, reason: str) -> None:
        """Keep that the training diverged, which is a result."""
        write_text(self.path / DIVERGED_FILE, json.dumps({"reason": reason}))

    def initial_weights(self) -> dict[str, Any] | None:
        """Return the report on the weights that the run began with, None where they were fresh or it has not begun.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / INITIAL_WEIGHTS_FILE
        if not path.is_file():
            return None
        report = read_json(path)
        if not all(isinstance(report.get(key), str) for key in ("source", "sha256", "sentence")):
            raise UserError(f"{path} is damaged: source, sha256 and sentence should be texts; delete the folder to train again")
        return report

    def write_initial_weights(self, report: dict[str, Any]) -> None:
        """Keep what became of the weights that the run begins with."""
        write_text(self.path / INITIAL_WEIGHTS_FILE, json.dumps(report, indent=2))

    def write_config(self, experiment: ExperimentConfig) -> None:
        """Keep the whole configuration beside the state."""
        write_text(self.path / EXPERIMENT_FILE, yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))

    def read_config(self) -> ExperimentConfig:
        """Return the run's configuration."""
        from orchestration.experiment import read_experiment

        path = self.path / EXPERIMENT_FILE
        if not path.is_file():
            raise UserError(f"{self.path} is not a run folder: it has no {EXPERIMENT_FILE}")
        return read_experiment(read_yaml(path), str(path))

    def write_data(self, data: DataDescription) -> None:
        """Keep what the run is trained on."""
        write_text(self.path / DATA_FILE, data.model_dump_json(indent=2))

    def data(self) -> DataDescription | None:
        """Return what the run is trained on; None: it was trained by an earlier version, or has not begun.

        Raises:
            UserError: the file is damaged.
        """
        from trainers.data.description import DataDescription

        path = self.path / DATA_FILE
        if not path.is_file():
            return None
        try:
            return DataDescription.model_validate(read_json(path))
        except ValidationError as error:
            raise UserError(f"{path} is damaged: {error.errors()[0]['msg']}; delete it, it is only a record") from None

    def write_code(self, files: Mapping[str, str]) -> None:
        """Keep the code that the method rests on, from `method_code`, unless an earlier start has: its epochs were trained by that."""
        if not (self.path / CODE_FILE).is_file():
            write_text(self.path / CODE_FILE, json.dumps({"files": files}, indent=2))

    def code(self) -> dict[str, str]:
        """Return the code that the run's method rests on; empty: it was trained by an earlier version, or has not begun.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / CODE_FILE
        files = read_json(path).get("files") if path.is_file() else {}
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise UserError(f"{path} is damaged: `files` should be digests by module; delete it, it is only a record")
        return files

    def clear(self) -> None:
        """Forget everything but the locks."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if entry.name not in ("lock", "command.lock"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def lock(self) -> Path:
        """The lock of whoever trains the run: a process, a trial of a sweep, rank 0 of a group."""
        return self.path / "lock"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; another process that trains it is waited for. The lock dies with its process."""
        with only_process(self.lock, f"the training {self.path.name}", patience_s=None):
            yield

    @contextlib.contextmanager
    def commanded(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Hold the run for one `rayndom train`: its MLflow run and its folder have one writer.

        Args:
            name: of the experiment, for messages.
            wait: for another process that trains it, instead of refusing.

        Raises:
            EnvironmentProblem: another process trains it, and `wait` is off.
        """
        what, advice = f"the training {name} ({self.path.name})", ADVICE
        with only_process(self.path / "command.lock", what, advice=advice, patience_s=None if wait else ENDING_S):
            if not wait and is_held(self.lock):
                raise EnvironmentProblem(f"{what} is being run by {holder_of(self.lock)}. {advice}")
            yield
