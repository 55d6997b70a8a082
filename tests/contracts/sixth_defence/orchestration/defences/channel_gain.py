"""A toy defence for tests: what its sweeps search, and what its theory says of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from models.configuration import Config
from orchestration.catalogue import Defence, Informed, Prior
from orchestration.search_space import Dimension

SIGMA = "defence.sigma"


class ChannelGainPrior(Config):
    """The toy's theory: a smallest sigma."""

    at_least: float = Field(0.3, gt=0, le=1, description="Smallest sigma that is of use.")


def inform(prior: ChannelGainPrior, parameters: Any, space: Mapping[str, Dimension]) -> Informed:
    """Return the space from the smallest sigma on."""
    del parameters
    return Informed({**space, SIGMA: space[SIGMA].model_copy(update={"low": prior.at_least})}, ({SIGMA: prior.at_least},), ("sigma",))


DEFENCES = (
    Defence(
        name="channel_gain",
        summary="a random gain of each channel",
        objective="halves",
        search_space={SIGMA: Dimension(type="float", low=0.05, high=0.5)},
        prior=Prior(ChannelGainPrior, inform),
    ),
)
