"""A plain, deterministic network: what baselines train, each with its own objective."""

from __future__ import annotations

from torch import nn

from models.configuration import Config
from models.registry import BuildRequest, DefenceModel


class PlainConfig(Config):
    """A plain network has no parameters of its own."""


def build_plain(config: PlainConfig, request: BuildRequest) -> nn.Module:
    """Return the backbone with its normalization, nothing random."""
    return request.network()


def plain_defence(name: str, description: str) -> DefenceModel:
    """Return the entry of a defence whose network is plain: only its training makes it what it is."""
    return DefenceModel(name, description, PlainConfig, build_plain)
