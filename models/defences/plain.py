"""Deterministic networks: what the baselines train, each with its own objective."""

from __future__ import annotations

from models.plain_network import plain_defence

DEFENCE_MODELS = (
    plain_defence("natural", "natural training: no defence, the lower reference"),
    plain_defence("at", "adversarial training with PGD (Madry et al., 2018)"),
)
