"""Every choice that a defence or an objective offers says what its default rests on: a source, a measurement, or that there is none.

Found in the registries: a new defence's choices are held to it too. Ambiguities of papers are in `tests/papers/test_paper_items.py`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator

import pytest
from pydantic.fields import FieldInfo

from models.configuration import Config
from models.registry import defence_model, list_defences
from trainers.objective import objective_entry, objectives

GROUND = re.compile(
    r"paper|official code|public (?:TRADES )?(?:code|script)|repository|Eq\. \d|Algorithm \d|Table \d|\b[Mm]easured|The same numbers"
)


def choices(config: type[Config]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields whose values are a few names or numbers, or yes and no."""
    for name, field in config.model_fields.items():
        if field.annotation is bool or len(offered(field.annotation)) > 1:
            yield name, field


def offered(annotation: object) -> tuple[object, ...]:
    """Return the values of a `Literal`, of those of a union together."""
    parts = typing.get_args(annotation)
    return parts if typing.get_origin(annotation) is typing.Literal else tuple(value for part in parts for value in offered(part))


OWNERS = [(f"defence {name}", defence_model(name).config) for name in list_defences()]
OWNERS += [(f"objective {name}", objective_entry(name).config) for name in objectives()]
CHOICES = [pytest.param(field, id=f"{owner} {name}") for owner, config in OWNERS for name, field in choices(config)]


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_says_what_its_default_rests_on(field):
    assert GROUND.search(field.description or ""), (
        "name the paper, the equation or the code that the default is from, what was measured, or write `not measured`: "
        f"{field.description!r}"
    )


def test_choices_are_found():
    names = {parameter.id for parameter in CHOICES}
    assert {
        "objective red grad_scale",
        "objective red lip_power",
        "defence dcs sampling",
        "objective ensemble_adversarial example",
    } <= names
