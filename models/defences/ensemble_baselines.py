"""The ensembles that RED is compared with: GAL, ADP, DVERGE, TRS. They differ in their objectives; all answer by the mean probability.

References: Kariyappa and Qureshi, "Improving Adversarial Robustness of Ensembles with Diversity Training" (GAL); Pang et al., "Improving
Adversarial Robustness via Promoting Ensemble Diversity" (ADP); Yang et al., "DVERGE"; Yang et al., "TRS".
"""

from __future__ import annotations

from pydantic import Field
from torch import nn

from models.ensemble import Ensemble, EnsembleConfig, InferenceMode, build_members, fit_members
from models.layer_replacement import of_type, replace_modules
from models.registry import BuildRequest, DefenceModel


class AveragedEnsembleConfig(EnsembleConfig):
    """Parameters of an ensemble that averages probabilities."""

    num_members: int = Field(3, ge=1, le=64, description="N, number of members; 3 in their codes, 8 in RED's comparison on CIFAR-10.")
    inference: InferenceMode = Field("mean_prob", description="How members make one answer; the papers average the probabilities.")


class GalConfig(AveragedEnsembleConfig):
    """Parameters of GAL's network."""

    leaky_relu_slope: float | None = Field(
        0.1,
        gt=0,
        lt=1,
        description="Every ReLU becomes a leaky one of this slope (0.1 in DVERGE's code), because input gradients vanish less; none: ReLU "
        "stays.",
    )


def build_averaged(config: AveragedEnsembleConfig, request: BuildRequest) -> nn.Module:
    """Return the ensemble."""
    return Ensemble(build_members(config, request), config.inference)


def build_gal(config: GalConfig, request: BuildRequest) -> nn.Module:
    """Return the ensemble with leaky activations."""
    ensemble = Ensemble(build_members(config, request), config.inference)
    if config.leaky_relu_slope is not None:
        slope = config.leaky_relu_slope
        replace_modules(ensemble, of_type(nn.ReLU), lambda _name, _module: nn.LeakyReLU(slope))
    return ensemble


DEFENCE_MODELS = (
    DefenceModel("gal", "ensemble whose input gradients are spread out (GAL)", GalConfig, build=build_gal, fit=fit_members),
    DefenceModel(
        "adp", "ensemble with diverse non-true probabilities (ADP)", AveragedEnsembleConfig, build=build_averaged, fit=fit_members
    ),
    DefenceModel("dverge", "ensemble of distilled vulnerabilities (DVERGE)", AveragedEnsembleConfig, build=build_averaged, fit=fit_members),
    DefenceModel("trs", "smooth ensemble of dissimilar gradients (TRS)", AveragedEnsembleConfig, build=build_averaged, fit=fit_members),
)
