"""Deterministic networks: what the baselines train, each with its own objective."""

from __future__ import annotations

from torch import nn

from models.configuration import Config
from models.registry import BuildRequest, DefenceModel


class PlainConfig(Config):
    """A plain network has no parameters of its own."""


def build_plain(config: PlainConfig, request: BuildRequest) -> nn.Module:
    """Return the backbone with its normalization, nothing random."""
    return request.network()


DEFENCE_MODELS = (
    DefenceModel("natural", "natural training: no defence, the lower reference", PlainConfig, build_plain),
    DefenceModel("at", "adversarial training with PGD (Madry et al., 2018)", PlainConfig, build_plain),
)
