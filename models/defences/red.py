"""RED: an ensemble whose answers come from a randomly chosen member. Its regularizers are in the objective of the same name.

Reference: RED, "Efficiently Boosting Ensemble Robustness via Random Sampling Inference", section 3.1.
"""

from __future__ import annotations

from torch import nn

from models.ensemble import Ensemble, EnsembleConfig, build_members, fit_members
from models.registry import BuildRequest, DefenceModel


class RedConfig(EnsembleConfig):
    """Parameters of RED's network. The paper has N = 8 on CIFAR-10 and N = 3 on TinyImageNet."""


def build_red(config: RedConfig, request: BuildRequest) -> nn.Module:
    """Return the ensemble."""
    return Ensemble(build_members(config, request), config.inference)


DEFENCE_MODELS = (DefenceModel("red", "random ensemble: one of N diverse members answers", RedConfig, build=build_red, fit=fit_members),)
