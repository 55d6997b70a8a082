"""Randomized adversarial training via Taylor expansion and its relatives: plain networks, each trained by an objective of its own.

Reference: Jin, Yi, Wu, Mu, Huang, "Randomized Adversarial Training via Taylor Expansion", CVPR 2023. The noise on the weights
exists during training only; the trained network is deterministic.
"""

from __future__ import annotations

from models.plain_network import plain_defence

DEFENCE_MODELS = (
    plain_defence("trades", "TRADES (Zhang et al., 2019)"),
    plain_defence("awp", "adversarial weight perturbation (Wu et al., 2020), on AT or TRADES"),
    plain_defence("rat", "randomized adversarial training via Taylor expansion, by the paper's equations"),
    plain_defence("rat_surrogate", "what the public code of `rat` trains: gradient-gap soft labels on TRADES or AWP"),
    plain_defence("label_smoothing", "control of `rat_surrogate`: plain label smoothing on TRADES"),
    plain_defence("direct_weight_noise", "control of `rat`: one sample of weight noise per step, no Taylor expansion"),
)
