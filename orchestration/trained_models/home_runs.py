"""The trainings that a home holds: how far each is, and which of them are runs of a recipe itself.

Trials of a sweep, its baselines and the rows of a reproduced table are trained under a recipe's name too, with values that a search or a
paper chose. They are named by their fingerprints; a recipe's name means what `rayndom train` trained.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.weights import CONFIG_FILE, read_config
from orchestration import console
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home, readable
from orchestration.recipes import load_recipe
from orchestration.run_folder import EXPERIMENT_FILE, RESULT_FILE, RunFolder
from orchestration.single_process import is_held
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.details import check_details
from orchestration.trained_models.recipe_differences import differences, in_words
from trainers.checkpoint import STATE_FILE

OWN = "run"
"""Kind of an MLflow run of `rayndom train`."""


@dataclass(frozen=True)
class HomeRun:
    """One training.

    Attributes:
        folder: its run folder. experiment: what is trained.
        state: `finished`, `running`, `diverged`, `interrupted`. epochs: that are finished.
        kinds: how MLflow knows it: `run`, `trial`, `baseline`, `repeat`, `row`; empty: it does not.
    """

    folder: RunFolder
    experiment: ExperimentConfig
    state: str
    epochs: int
    kinds: frozenset[str]

    @property
    def fingerprint(self) -> str:
        """Its fingerprint, which commands take as its name."""
        return self.folder.path.name

    @property
    def is_own(self) -> bool:
        """Whether a recipe's name may mean it."""
        return not self.kinds or OWN in self.kinds

    @property
    def changed(self) -> datetime.datetime:
        """When it was trained: its end, or as far as it has come."""
        written = [self.folder.path / name for name in (RESULT_FILE, STATE_FILE, EXPERIMENT_FILE)]
        return datetime.datetime.fromtimestamp(next(path for path in written if path.is_file()).stat().st_mtime)

    @property
    def evaluation(self) -> Mapping[str, Any] | None:
        """The last evaluation on test images, None if there was none."""
        return read_config(self.folder.model)["details"].get("evaluation") if self.state == "finished" else None


def runs_in(home: Home, recipe: str | None = None) -> Iterator[HomeRun]:
    """Return the trainings of a home, those of one recipe if it is named; what cannot be read is skipped with a warning."""
    trackers: dict[str, Tracker | None] = {}

    def read(path: Path) -> HomeRun | None:
        folder = RunFolder(path)
        experiment = folder.read_config()
        if recipe is not None and experiment.name != recipe:
            return None
        finished = folder.result() is not None
        if finished:
            check_details(read_config(folder.model)["details"], f"{folder.model / CONFIG_FILE}: details")
        epochs = len(folder.history())
        diverged = folder.diverged() is not None
        state = "finished" if finished else "running" if is_held(folder.lock) else "diverged" if diverged else "interrupted"
        return HomeRun(folder, experiment, state, epochs, _kinds(home, experiment, trackers))

    folders = (path for path in home.entries("runs/*") if path.is_dir())
    yield from (run for run in readable(read, folders) if run is not None)


def _kinds(home: Home, experiment: ExperimentConfig, trackers: dict[str, Tracker | None]) -> frozenset[str]:
    name = experiment.tracking.experiment
    if name not in trackers:
        try:
            trackers[name] = Tracker.existing(home, name)
        except UserError as error:
            console.warn(f"which trainings are trials of sweeps is not known: {error}")
            trackers[name] = None
    tracker = trackers[name]
    return frozenset() if tracker is None else tracker.kinds(experiment.fingerprint)


def run_of_recipe(name: str, home: Home) -> str:
    """Return the fingerprint of a recipe's finished run: the one with the recipe's own values, else the only one.

    Args:
        name: of a recipe, or a YAML file.

    Raises:
        UserError: there is none, or several.
    """
    own = load_recipe(name).experiment
    if RunFolder(home.run(own.fingerprint)).result() is not None:
        return own.fingerprint
    found = [run for run in runs_in(home, own.name) if run.state == "finished"]
    meant = [run for run in found if run.is_own]
    if len(meant) == 1:
        console.say(f"{own.name}: run {meant[0].fingerprint}, with {in_words(differences(meant[0].experiment, own))}")
        return meant[0].fingerprint
    listed = "\n".join(
        f"  {run.fingerprint}  {in_words(differences(run.experiment, own))}" + ("" if run.is_own else f"  ({', '.join(sorted(run.kinds))})")
        for run in meant or found
    )
    if meant:
        raise UserError(f"recipe {own.name} has {len(meant)} finished runs, none with its own values; name one:\n{listed}")
    if found:
        raise UserError(
            f"recipe {own.name} was not trained by itself, only for sweeps and tables; `rayndom train {name}` trains it, or name one:\n"
            f"{listed}"
        )
    raise UserError(f"recipe {own.name} has no finished run in {home.root / 'runs'}; `rayndom train {name}` trains it")
