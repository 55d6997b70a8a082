"""Baselines that are evaluated on places that are free while the last trials of a search still train.

Their place in the table is certain whatever the search finds. The search itself is not touched: who wins is found as without this.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

from models.errors import UserError
from orchestration import console
from orchestration.evaluating.evaluation_run import EvaluationSettings, prepare, run_beside
from orchestration.experiment import ExperimentConfig
from orchestration.home import Workplace
from orchestration.run_folder import RunFolder
from orchestration.storage import fetch
from orchestration.trained_models.targets import Target
from orchestration.training.resources import trial_resources

logger = logging.getLogger(__name__)


class EvaluationsAhead:
    """Evaluates baselines as they are trained, and leaves records as if an earlier start had made them.

    So whoever evaluates the baselines afterwards finds what there is, and does the rest: what fails here fails there again, and is said
    there.

    Args:
        baselines: of the sweep. settings: of their evaluation; None: they are not evaluated. workplace: where.
    """

    def __init__(self, baselines: Sequence[ExperimentConfig], settings: EvaluationSettings | None, workplace: Workplace) -> None:
        self.baselines, self.settings, self.workplace = baselines, settings, workplace
        self._told = False
        self._trained: queue.Queue[ExperimentConfig | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune keeps a copy for its own way of restoring, which is never taken, and a thread cannot be copied."""
        return {}

    def places_are_free(self) -> None:
        """Evaluate the baselines that an earlier start has trained; called whenever a place is free that no trial takes."""
        if self._told:
            return
        self._told = True
        for each in self.baselines:
            try:
                finished = self._folder(each).result() is not None
            except (UserError, OSError) as error:  # said at its place, which is not amid the search
                logger.info("the baseline %s ahead of the end of the search: %s", each.name, error)
                continue
            if finished:
                self.trained(each)

    def trained(self, baseline: ExperimentConfig) -> None:
        """Evaluate a baseline, beside whatever else is done."""
        if self.settings is None:
            return
        self._trained.put(baseline)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self.settings,), name="evaluations ahead", daemon=True)
            self._thread.start()

    @property
    def are_running(self) -> bool:
        """Whether blocks of baselines may still be run here."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return once all that was begun is done; nothing is begun any more."""
        if self._thread is not None:
            self._trained.put(None)
            self._thread.join()

    def __enter__(self) -> EvaluationsAhead:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()

    def _work(self, settings: EvaluationSettings) -> None:
        while (baseline := self._trained.get()) is not None:
            try:
                self._evaluate(baseline, settings)
            except Exception as error:  # whatever it is, it comes again where it is said
                logger.info("the baseline %s ahead of the end of the search: %s", baseline.name, error)

    def _evaluate(self, baseline: ExperimentConfig, settings: EvaluationSettings) -> None:
        fetch(self._folder(baseline).path)
        job = prepare(baseline.name, Target(self._folder(baseline).model, baseline), settings, self.workplace)
        need = trial_resources(baseline.resources)
        run_beside([job], gpus_per_worker=need.gpus / need.workers, address=self.workplace.address)
        console.say(f"evaluated beside the last trials: {baseline.name}")

    def _folder(self, experiment: ExperimentConfig) -> RunFolder:
        return RunFolder(self.workplace.home.run(experiment.fingerprint))
