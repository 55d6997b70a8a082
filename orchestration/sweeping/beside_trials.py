"""Baselines that train beside the last trials of a search, on workers for which it has no further trial.

They change nothing of the search: it has proposed all its trials when the first of them begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.sweeping.listed_experiments import Listed
from orchestration.sweeping.proposals import StudySearch
from orchestration.sweeping.study import all_trials
from orchestration.training.job import TrainingJob
from orchestration.training.passes import training_passes
from orchestration.training.training_run import check_initial_weights

BASELINE = "baseline"
"""Key of what is proposed for a baseline: its fingerprint."""


class BesideTrials(Searcher):
    """Ray Tune's searcher that proposes a search's trials and, once there are none, baselines.

    Args:
        trials: the search.
        baselines: those that need the same resources as the trials; what is finished already is left out.
        workplace: where they are trained. start: of Tune.

    Raises:
        UserError: what is kept of a baseline is damaged, or it begins with weights that are not there.
    """

    def __init__(self, trials: StudySearch, baselines: Sequence[Listed], workplace: Workplace, start: str) -> None:
        super().__init__()
        self.trials = trials
        unfinished = (each for each in baselines if RunFolder(workplace.home.run(each.experiment.fingerprint)).result() is None)
        self.listed = {each.experiment.fingerprint: each for each in unfinished}
        self.jobs = {
            name: TrainingJob.at(workplace, each.experiment, start=start, initial=each.initial) for name, each in self.listed.items()
        }
        for job in self.jobs.values():
            check_initial_weights(job)
        self._waiting = sorted(self.listed, key=lambda name: training_passes(self.listed[name].experiment), reverse=True)
        """Fingerprints, the longest training first: it ends last."""
        self._begun: dict[str, str] = {}
        """Fingerprints of those that began, by Tune's names."""

    def save(self, checkpoint_path: str) -> None:
        """See `StudySearch.save`."""
        self.trials.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, see `save`."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # as in `StudySearch`
        """Return what the search proposes, or where that is no trial a baseline."""
        if trial_id not in self._begun:
            proposed = self.trials.suggest(trial_id)
            # Where the search waits for another sweep's sake, nothing begins.
            fingerprint = None if isinstance(proposed, dict) or self.trials.has_to_wait() else self._next()
            if fingerprint is None:
                return proposed
            self._begun[trial_id] = fingerprint
            self.trials.take_place()
        return {BASELINE: self._begun[trial_id]}

    def _next(self) -> str | None:
        """Return the next baseline that is no trial as well; None: there is none."""
        of_trials = {trial.user_attrs.get("fingerprint") for trial in all_trials(self.trials.study)}
        while self._waiting:
            fingerprint = self._waiting.pop(0)
            if fingerprint not in of_trials:
                return fingerprint
        return None

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Tell the search what its trials report."""
        if trial_id not in self._begun:
            self.trials.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell the search which of its trials are over."""
        if trial_id not in self._begun:
            self.trials.on_trial_complete(trial_id, result, error)
