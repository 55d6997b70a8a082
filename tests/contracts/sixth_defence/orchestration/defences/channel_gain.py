"""A toy defence for tests: what its sweeps search."""

from __future__ import annotations

from orchestration.catalogue import Defence
from orchestration.search_space import Dimension

DEFENCES = (
    Defence(
        name="channel_gain",
        summary="a random gain of each channel",
        objective="halves",
        search_space={"defence.sigma": Dimension(type="float", low=0.05, high=0.5)},
    ),
)
