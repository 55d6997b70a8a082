"""Plain, deterministic networks: a backbone with its normalization, trained by the baselines each with an objective of its own.

`rat` and its relatives belong here: their noise on the weights exists during training only; the trained network is deterministic.
Reference: Jin, Yi, Wu, Mu, Huang, "Randomized Adversarial Training via Taylor Expansion", CVPR 2023.
"""

from __future__ import annotations

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.registry import DefenceModel


class PlainConfig(Config):
    """A plain network has no parameters of its own."""


def leave_as_it_is(backbone: Backbone, config: PlainConfig, image_shape: ImageShape) -> None:
    """Replace nothing."""


DESCRIPTIONS = {
    "natural": "natural training: no defence, the lower reference",
    "at": "adversarial training with PGD (Madry et al., 2018)",
    "trades": "TRADES (Zhang et al., 2019)",
    "awp": "adversarial weight perturbation (Wu et al., 2020), on AT or TRADES",
    "rat": "randomized adversarial training via Taylor expansion, by the paper's equations",
    "rat_surrogate": "what the public code of `rat` trains: gradient-gap soft labels on TRADES or AWP",
    "label_smoothing": "control of `rat_surrogate`: plain label smoothing on TRADES",
    "direct_weight_noise": "control of `rat`: one sample of weight noise per step, no Taylor expansion",
}

DEFENCE_MODELS = tuple(DefenceModel(name, description, PlainConfig, leave_as_it_is) for name, description in DESCRIPTIONS.items())
