"""A sweep that is about to run: what follows from its settings, worked out once, so that those who run it take what they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestration.experiment import ExperimentConfig, ResourcesConfig, TrackingConfig
from orchestration.home import Home
from orchestration.sweeping.config import SweepConfig
from orchestration.sweeping.fixed_weights import with_fixed_weights
from orchestration.sweeping.listed_experiments import Listed
from orchestration.trained_models.initial_weights import InitialWeights


@dataclass(frozen=True)
class SweepPlan:
    """A sweep and what its settings come to.

    Attributes:
        config: its settings; names of initial weights mean what they meant when it began.
        folder: of the sweep, which its key names.
        bases: the experiment of each recipe, with nothing chosen yet. baselines: those that are trained beside the winner.
        weights: that its trainings begin with, by the name that an experiment has for them.
    """

    config: SweepConfig
    folder: Path
    bases: tuple[ExperimentConfig, ...]
    baselines: tuple[ExperimentConfig, ...]
    weights: Mapping[str, InitialWeights]

    @property
    def key(self) -> str:
        """Name of its folder and of its record in MLflow."""
        return self.folder.name

    @property
    def resources(self) -> ResourcesConfig:
        """What a trial may use: of all recipes the same."""
        return self.bases[0].resources

    @property
    def tracking(self) -> TrackingConfig:
        """Where it is recorded."""
        return self.bases[0].tracking

    @property
    def epochs(self) -> int:
        """Epochs of its longest trials."""
        return max(base.training.epochs for base in self.bases)

    def listed_baselines(self) -> list[Listed]:
        """Return the baselines as a list of experiments to train."""
        return [Listed(each.name, each, self.initial(each)) for each in self.baselines]

    def initial(self, experiment: ExperimentConfig) -> InitialWeights | None:
        """Return the weights that one of its trainings begins with; None: fresh ones."""
        given = self.weights.get(experiment.training.initial_weights or "")
        return None if given is None else given.for_training(experiment.training)


def plan_sweep(config: SweepConfig, folder: Path, home: Home) -> SweepPlan:
    """Return the plan of a sweep; whoever holds its `folder` may call it, for its names of weights are read from there or looked up.

    Raises:
        UserError: see `with_fixed_weights`.
    """
    config, weights = with_fixed_weights(config, folder, home)
    baselines = tuple(config.baseline_experiment(recipe) for recipe in config.baselines)
    return SweepPlan(config, folder, tuple(config.base_experiments()), baselines, weights)
