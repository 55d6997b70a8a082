"""What is known of each defence beyond its network: paper, search space, what deviates. Found by scanning `orchestration/defences/`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from models.errors import unknown_name
from models.files import scan
from orchestration.search_space import Dimension


@dataclass(frozen=True)
class Paper:
    """Where a defence comes from."""

    title: str
    authors: str
    venue: str


@dataclass(frozen=True)
class Defence:
    """A defence as users meet it.

    Attributes:
        name: as in `models.registry`.
        summary: one line.
        objective: name of the objective it is trained with unless a recipe says otherwise.
        paper: None for methods without one of their own.
        search_space: dotted field of the experiment -> dimension; what a sweep searches unless it says otherwise.
        deviations: where the code knowingly differs from the paper.
    """

    name: str
    summary: str
    objective: str = "adversarial"
    paper: Paper | None = None
    search_space: Mapping[str, Dimension] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()


@functools.cache
def catalogue() -> dict[str, Defence]:
    """Return all records by name."""
    return scan("orchestration.defences", "DEFENCES")


def defence(name: str) -> Defence:
    """Return the record of a defence; an unknown name is a `UserError`."""
    if name not in catalogue():
        raise unknown_name("defence", name, catalogue())
    return catalogue()[name]
