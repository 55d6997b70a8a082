"""Stacks of defences: what their sweeps search."""

from __future__ import annotations

from orchestration.catalogue import Defence
from orchestration.search_space import Dimension

DEFENCES = (
    Defence(
        name="stacked",
        summary="several random layers in one network, e.g. RNA and CTRW",
        search_space={"training.optimizer.learning_rate": Dimension(type="float", low=0.01, high=0.3, log=True)},
    ),
)
