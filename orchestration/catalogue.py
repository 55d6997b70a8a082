"""What is known of each defence beyond its network: paper, search space, what deviates. Found by scanning `orchestration/defences/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.configuration import Config
from models.errors import unknown_name
from models.plugins import once_for_plugins
from models.registry_files import broken_files, scan
from orchestration.search_space import Dimension


@dataclass(frozen=True)
class Paper:
    """Where a defence comes from."""

    title: str
    authors: str
    venue: str


@dataclass(frozen=True)
class Informed:
    """A search space that theory has bounded, points to try first, and what it says."""

    space: Mapping[str, Dimension]
    points: tuple[Mapping[str, Any], ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prior:
    """What a paper's theory says of a search before anything is trained.

    Attributes:
        settings: what a sweep's file may say of it, under `prior.<name of the defence>`.
        inform: (settings, parameters of the defence, space) -> the space after theory was asked. A `UserError` where it leaves nothing
            of the space; a space that it says nothing of comes back as it is.
    """

    settings: type[Config]
    inform: Callable[[Any, Any, Mapping[str, Dimension]], Informed]


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
        prior: what theory says of a search; None: nothing.
    """

    name: str
    summary: str
    objective: str = "adversarial"
    paper: Paper | None = None
    search_space: Mapping[str, Dimension] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    prior: Prior | None = None


@once_for_plugins
def catalogue() -> dict[str, Defence]:
    """Return all records by name."""
    return scan("orchestration.defences", "DEFENCES", Defence)


def defence(name: str) -> Defence:
    """Return the record of a defence; an unknown name is a `UserError`."""
    if name not in catalogue():
        raise unknown_name("defence", name, catalogue(), broken_files("orchestration.defences"))
    return catalogue()[name]
