"""Which weights of a training are kept: of an epoch the better of the latest and the averaged ones, of all epochs the best on held-out
images or the last; and when patience has run out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from trainers.averaging import WeightAverage
from trainers.distributed import to_cpu
from trainers.validation import ValidationConfig

SELECTION_METRIC = "validation/robust_accuracy"
AVERAGE_CHOSEN = "average/chosen"
"""1 where the averaged weights are the better copy of an epoch, and `validation/...` their metrics; 0: the latest weights."""


def score(measured: Mapping[str, float]) -> tuple[float, float]:
    """Return what epochs and copies are compared by: robust accuracy, then clean accuracy."""
    return measured[SELECTION_METRIC], measured["validation/clean_accuracy"]


class Selection:
    """The best epoch so far.

    Args:
        config: what is selected, and the patience.

    Attributes:
        best: score, epoch, metrics and weights; None: no epoch was validated yet.
        validations_since_best: how many were not the best, since.
    """

    def __init__(self, config: ValidationConfig) -> None:
        self.config = config
        self.best: dict[str, Any] | None = None
        self.validations_since_best = 0

    def consider(self, epoch: int, measured: Mapping[str, float], metrics: Mapping[str, float], weights: Callable[[], Any]) -> None:
        """Keep an epoch where it is the best so far.

        Args:
            epoch: from 1. measured: by its validation. metrics: all of it. weights: returns those that it is kept with.
        """
        reached = score(measured)
        is_best = self.best is None or self.config.select == "last" or reached > tuple(self.best["score"])
        if is_best:
            self.best = {"score": list(reached), "epoch": epoch, "metrics": dict(metrics), "weights": weights()}
        self.validations_since_best = 0 if is_best else self.validations_since_best + 1

    @property
    def is_out_of_patience(self) -> bool:
        """Whether as many validations as patience allows were not the best."""
        return self.config.patience is not None and self.validations_since_best >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the resumable state."""
        return {"best": self.best, "validations_since_best": self.validations_since_best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.best, self.validations_since_best = state["best"], state["validations_since_best"]

    def better_copy(
        self,
        latest: dict[str, float],
        average: WeightAverage,
        model: nn.Module,
        validate: Callable[[], dict[str, float]],
    ) -> tuple[dict[str, float], dict[str, Tensor] | None]:
        """Validate the averaged weights beside the latest ones; return the metrics of the better copy, with the accuracies of both, and the
        weights if it is the average. Where the last checkpoint is kept whatever it is worth, that is the average.

        Args:
            latest: metrics of the latest weights. Until the average begins, it is these.
            validate: called with the average in the model.
        """
        averaged, weights, chosen = latest, None, False
        if average.updates:
            with average.in_the_model(model):
                averaged = validate()
                chosen = self.config.select == "last" or score(averaged) >= score(latest)
                weights = to_cpu(model.state_dict()) if chosen else None
        both = {"average": averaged, "latest": latest}
        accuracies = {
            f"validation/{copy}/{name}": measured[f"validation/{name}"]
            for copy, measured in both.items()
            for name in ("clean_accuracy", "robust_accuracy")
        }
        return {**(averaged if chosen else latest), **accuracies, AVERAGE_CHOSEN: float(chosen)}, weights
