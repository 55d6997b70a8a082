"""What its sweeps search, and its paper."""

from __future__ import annotations

from orchestration.catalogue import Defence
from orchestration.search_space import Dimension

DEFENCES = (
    Defence(
        name="random_resizing",
        summary="Random resizing and padding of the image (Xie et al. 2018)",
        search_space={"defence.growth": Dimension(type="float", low=1.1, high=1.6)},
    ),
)
