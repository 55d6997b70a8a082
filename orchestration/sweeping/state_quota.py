"""How much disk the states of a sweep's trials that are over, and the weights that they kept on the way, may take: those of 5,000 trials
would fill any."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from orchestration import console, storage
from orchestration.home import Home
from orchestration.run_folder import CHECKPOINTS_FOLDER, RunFolder
from orchestration.single_process import is_held
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.listener import TrialRow
from orchestration.sweeping.study import AnyStudy, all_trials, superseded
from trainers.checkpoint import STATE_FILE
from trainers.selection import SELECTION_METRIC

GIB = 2**30


@dataclass(frozen=True, order=True)
class _Kept:
    """A state that is there, the first to go being the smallest: of finished trials, then of those that came least far, the worst first."""

    needed: bool
    epoch: int
    value: float
    fingerprint: str


class StateQuota:
    """Removes states of trials that are over as soon as they take more than they may.

    Selected weights, results and records stay. A trial that was stopped and should go on without its state begins anew, with the same
    results.

    Args:
        home: of the runs.
        most: bytes that the states may take.
    """

    def __init__(self, home: Home, most: float) -> None:
        self.home, self.most, self.removed = home, most, 0
        self._sizes: dict[_Kept, int] = {}

    @classmethod
    def of(cls, config: SweepConfig, home: Home, study: AnyStudy) -> StateQuota | None:
        """Return the quota of a sweep with what earlier starts left; None: it has none."""
        if config.max_state_gib is None:
            return None
        quota, again = cls(home, config.max_state_gib * GIB), superseded(study)
        for trial in all_trials(study):
            if trial.state.is_finished() and trial.number not in again and "fingerprint" in trial.user_attrs:
                value = max(trial.intermediate_values.values(), default=-math.inf)
                finished = trial.state.name == "COMPLETE"
                quota._note(_Kept(not finished, trial.user_attrs.get("epochs", 0), value, trial.user_attrs["fingerprint"]))
        return quota

    def after(self, row: TrialRow) -> None:
        """Take up a trial that is over, and remove what is too much."""
        value = row.metrics.get(SELECTION_METRIC, -math.inf)
        self._note(_Kept(not row.finished, row.epoch, value, row.experiment.fingerprint))
        self.enforce()

    def enforce(self) -> None:
        """Remove states until the others take no more than they may. What a process holds stays until the next time."""
        taken = sum(self._sizes.values())
        for kept in sorted(self._sizes):
            if taken <= self.most:
                return
            folder = RunFolder(self.home.run(kept.fingerprint))
            if is_held(folder.lock):
                continue
            for path in (folder.path / STATE_FILE, folder.path / CHECKPOINTS_FOLDER):
                storage.forget(path)
            (folder.path / STATE_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder.path / CHECKPOINTS_FOLDER, ignore_errors=True)
            taken -= self._sizes.pop(kept)
            if kept.needed and not self.removed:
                console.warn(
                    f"states of trials that were stopped are removed, since they take more than max_state_gib {self.most / GIB:g}: "
                    "one that should go on begins anew"
                )
            self.removed += kept.needed

    def _note(self, kept: _Kept) -> None:
        """Count a state that is there; of a trial that went on the last one alone."""
        for earlier in [each for each in self._sizes if each.fingerprint == kept.fingerprint]:
            del self._sizes[earlier]
        run = self.home.run(kept.fingerprint)
        size = _size(run / STATE_FILE) + _size(run / CHECKPOINTS_FOLDER)
        if size:
            self._sizes[kept] = size


def _size(path: Path) -> int:
    """Return the bytes of a file or folder here, or in the store where it is not here."""
    if path.exists():
        return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    store = storage.storage_of(path)
    return 0 if store is None else store.stored_bytes(path)
