"""`train` and `load`: a training from Python, and a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
from torch import nn

from models.weights import load_pretrained
from orchestration.experiment import ExperimentConfig
from orchestration.home import Home, Workplace
from orchestration.recipes import load_recipe
from orchestration.run_folder import RunFolder
from orchestration.trained_models.recipe_differences import named_by_changes
from orchestration.trained_models.targets import resolve_target
from rayndom.notebook import as_flags, as_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        experiment: what was trained. folder: its run folder. mlflow_run: id of its run in MLflow; None: it was not asked for.
    """

    experiment: ExperimentConfig
    folder: RunFolder
    mlflow_run: str | None = None

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name it in every command."""
        return self.experiment.fingerprint

    @property
    def metrics(self) -> dict[str, float]:
        """Of the selected epoch and of the finished model."""
        return self._result()["metrics"]

    @property
    def selected_epoch(self) -> int:
        """The epoch whose weights were kept."""
        return self._result()["selected_epoch"]

    @property
    def history(self) -> pandas.DataFrame:
        """Metrics of every epoch, a row each."""
        frame = pandas.DataFrame(self._result()["history"])
        frame.insert(0, "epoch", range(1, len(frame) + 1))
        return frame

    def model(self, *, resample_on_forward: bool = True, seed: int = 0) -> nn.Module:
        """Return the trained network as `models.weights.load_pretrained` does: a randomized one takes a new draw at each call."""
        return load_pretrained(self.folder.model, resample_on_forward=resample_on_forward, seed=seed)

    def figure(self) -> Figure:
        """Return accuracy and loss over the epochs."""
        from analysis.reporting.figure_style import PAGE_WIDTH, new_figure

        figure = new_figure(PAGE_WIDTH, 2.8)
        left, right = figure.subplots(1, 2)
        history = self.history
        left.plot(history["epoch"], history["train/loss"])
        left.set(xlabel="epoch", ylabel="training loss")
        for name, label in (("validation/clean_accuracy", "clean"), ("validation/robust_accuracy", "robust, cheap attack")):
            right.plot(history["epoch"], 100 * history[name], label=label)
        right.set(xlabel="epoch", ylabel="accuracy on validation images (%)")
        right.legend()
        return figure

    def _result(self) -> dict[str, Any]:
        result = self.folder.result()
        assert result is not None, "a Run is finished"
        return result

    def _repr_html_(self) -> str:
        metrics = self.metrics
        facts: dict[str, Any] = {"fingerprint": self.fingerprint, "selected epoch": self.selected_epoch}
        facts |= {name: metrics[name] for name in ("validation/clean_accuracy", "validation/robust_accuracy") if name in metrics}
        return as_html(named_by_changes(self.experiment), facts | {"folder": self.folder.path})


def train(
    recipe: str,
    fields: Mapping[str, Any] | None = None,
    *,
    home: str | Path | None = None,
    data_root: str | Path | None = None,
    address: str | None = None,
    restart: bool = False,
    retrain: bool = False,
    wait: bool = False,
) -> Run:
    """Train a recipe, go on with it, or reuse it, as `rayndom train` does.

    Args:
        recipe: its name, or a YAML file. fields: dotted field -> value, e.g. `{"training.epochs": 5}`.
        home: folder of runs (default: RAYNDOM_HOME, else ./rayndom_home). data_root: folder of the data sets.
        address: of a Ray cluster, for runs with several workers.
        restart: forget an earlier run of the same configuration. retrain: the same, if its code has changed. wait: for another process.

    Raises:
        UserError: a mistake, found before anything starts.
    """
    from orchestration.training.single_run import run_single

    experiment = load_recipe(recipe, as_flags(fields or {})).experiment
    result, run_id = run_single(experiment, Workplace.locate(home, data_root, address), restart=restart, retrain=retrain, wait=wait)
    return Run(experiment, result.folder, run_id)


def load(target: str | Path | Run, *, home: str | Path | None = None, resample_on_forward: bool = True, seed: int = 0) -> nn.Module:
    """Return a trained network in eval mode.

    Args:
        target: what `rayndom evaluate` takes: a trained recipe's name, a run, an exported folder, an MLflow run, `models:/NAME@ALIAS`, or a
            model that was evaluated here. home: where runs lie.
        resample_on_forward: a randomized network takes a new draw at each call; False: the caller takes draws.
        seed: of the streams of draws.

    Raises:
        UserError: there is none.
    """
    if isinstance(target, Run):
        return target.model(resample_on_forward=resample_on_forward, seed=seed)
    found = resolve_target(str(target), Home.to_read(home))
    if found.external is not None:
        return found.load()
    return load_pretrained(found.folder, resample_on_forward=resample_on_forward, seed=seed)
