"""One training as a record: what whoever starts it hands to the process that does it, and what that process tells after every epoch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home, Workplace
from orchestration.run_folder import RunFolder
from orchestration.trained_models.initial_weights import InitialWeights, initial_weights
from orchestration.training.measure import MeasureConfig


def new_start() -> str:
    """Return a name for a start of trainings that no earlier one has."""
    return f"{time.time_ns():x}"


@dataclass(frozen=True)
class TrainingJob:
    """One training.

    Attributes:
        experiment: what is trained.
        folder: its run folder; on several nodes a shared one.
        data_root: folder of the data sets; None: the default.
        train_storage: folder of Ray Train's own files.
        start: name of this start. Ray Train goes on from its own records when a name is taken; ours are in the run folder.
        measure: how the finished model is attacked under named protocols; None: it is not.
        initial: the weights that it begins with; None: fresh ones, or it has begun and they are not there any more.
    """

    experiment: ExperimentConfig
    folder: RunFolder
    data_root: Path | None
    train_storage: Path
    start: str
    measure: MeasureConfig | None = None
    initial: InitialWeights | None = None

    @classmethod
    def at(
        cls,
        workplace: Workplace,
        experiment: ExperimentConfig,
        *,
        start: str | None = None,
        train_storage: Path | None = None,
        measure: MeasureConfig | None = None,
        initial: InitialWeights | None = None,
        anew: bool = False,
    ) -> TrainingJob:
        """Return the training of `experiment` in its run folder of a home; `train_storage`: None: the home's own.

        Args:
            initial: the weights that it names, where they were looked up before; None: they are now.
            anew: what an earlier start left in the run folder is going to be forgotten.

        Raises:
            UserError: `training.initial_weights` are not there, or not those that the run has begun with.
        """
        folder = RunFolder(workplace.home.run(experiment.fingerprint))
        return cls(
            experiment,
            folder,
            workplace.data_root,
            train_storage or workplace.home.root / "train",
            start or new_start(),
            measure,
            _initial(experiment, folder, workplace.home, initial, anew),
        )

    def with_own_cores(self) -> TrainingJob:
        """Return the job with as many threads per worker as Ray gives it cores: one unless the recipe says more."""
        resources = self.experiment.resources.with_own_cores()
        return dataclasses.replace(self, experiment=self.experiment.model_copy(update={"resources": resources}))

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON types: Ray Train hands its workers a dictionary."""
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "folder": str(self.folder.path),
            "data_root": str(self.data_root) if self.data_root else None,
            "train_storage": str(self.train_storage),
            "start": self.start,
            "measure": self.measure.model_dump(mode="json") if self.measure else None,
            "initial": self.initial.to_json() if self.initial else None,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainingJob:
        """Return the job that `to_json` wrote."""
        return cls(
            ExperimentConfig(**content["experiment"]),
            RunFolder(Path(content["folder"])),
            Path(content["data_root"]) if content["data_root"] else None,
            Path(content["train_storage"]),
            content["start"],
            MeasureConfig(**content["measure"]) if content["measure"] else None,
            InitialWeights.from_json(content["initial"]) if content["initial"] else None,
        )


def _initial(
    experiment: ExperimentConfig, folder: RunFolder, home: Home, known: InitialWeights | None, anew: bool
) -> InitialWeights | None:
    begun = folder.initial_weights() if not anew and (folder.has_state or folder.is_finished) else None
    try:
        found = known or initial_weights(experiment.training, home)
    except UserError:
        if begun is None:
            raise
        return None  # the run has its own weights by now
    if found is not None and begun is not None and begun["sha256"] != found.sha256:
        raise UserError(
            f"training.initial_weights: {found.name} is not what the run {folder.path.name} has begun with: its SHA-256 was "
            f"{begun['sha256'][:16]}... and is {found.sha256[:16]}...; `rayndom train --restart` begins anew with what is there now"
        )
    return found


_METRIC_NAMES = "metric_names"
_EARLIER = "earlier"


def bundled(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several results, as `TrialReport.to_result` makes them, as one: each report of a Ray Train group takes a while."""
    *earlier, last = results
    return {**last, _EARLIER: list(earlier)}


def unbundled(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results that `bundled` put into one, in their order; of another result that alone."""
    last = dict(result)
    return [*last.pop(_EARLIER, ()), last]


@dataclass(frozen=True)
class TrialReport:
    """What a training that Ray started tells its driver: after every epoch, and once more at its end.

    Attributes:
        epoch: finished epochs; 0: data, network and device are there.
        metrics: of the last epoch; at the end those of the selected epoch and of the finished model.
        fingerprint: of the experiment. finished: whether this is the end. failed: why it cannot go on, where trying again has no use.
        workers: that train now.
    """

    epoch: int
    metrics: Mapping[str, float]
    fingerprint: str
    finished: bool = False
    failed: str | None = None
    workers: int = 1

    def to_result(self) -> dict[str, Any]:
        """Return the report as Tune and Ray Train take it: flat, because schedulers look metrics up by name, and with the metrics' names,
        because Tune adds entries of its own."""
        facts = {"epoch": self.epoch, "fingerprint": self.fingerprint, "finished": self.finished, "failed": self.failed}
        return dict(self.metrics) | facts | {"workers": self.workers, _METRIC_NAMES: list(self.metrics)}

    @classmethod
    def from_result(cls, result: Mapping[str, Any]) -> TrialReport:
        """Return the report that `to_result` made of a result."""
        metrics = {name: float(result[name]) for name in result.get(_METRIC_NAMES, ())}
        ended = bool(result.get("finished")), result.get("failed")
        return cls(result["epoch"], metrics, result.get("fingerprint", ""), *ended, result.get("workers", 1))
