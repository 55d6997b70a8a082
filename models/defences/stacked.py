"""Several defences of one network at once: RNA's normalizations with CTRW's weights, DCS's convolution with RNA, and so on.

Each defence changes the backbone as it would alone, one after the other; their random sites draw independently. Ensembles are not for
stacking: an ensemble carries a stack as its members' defence.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from models.backbones.base import Backbone, ImageShape
from models.configuration import Config
from models.errors import UserError
from models.registry import DefenceModel, fitted_section, parse_defence_section, section_stored_earlier

NAME = "stacked"


class StackedConfig(Config):
    """Parameters of a stack of defences."""

    defences: tuple[dict[str, Any], ...] = Field(
        ({"name": "rna"}, {"name": "ctrw"}),
        min_length=1,
        max_length=8,
        description="The defences in the order in which they change the network, e.g. `[{name: rna}, {name: ctrw, position: 1}]`.",
    )

    @field_validator("defences")
    @classmethod
    def _each_is_a_defence(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        checked = []
        for section in value:
            if not isinstance(section.get("name"), str):
                raise ValueError(f"each defence of a stack needs a name, e.g. {{name: rna}}; got {section!r}")
            if section["name"] == NAME:
                raise ValueError("a stack holds no stack: name its defences one after the other")
            entry, parameters = parse_defence_section(section)
            if entry.change is None:
                raise ValueError(f"{entry.name!r} is more than layers in a network and cannot be stacked")
            checked.append({"name": entry.name, **parameters.model_dump(mode="json")})
        return tuple(checked)

    @classmethod
    def stored_earlier(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters with those of each defence treated alike."""
        return parameters | {"defences": [section_stored_earlier(section) for section in parameters.get("defences", ())]}

    @property
    def revision(self) -> int:
        """The sum of those of the defences."""
        return sum(parse_defence_section(section)[1].revision for section in self.defences)


def change_by_all(backbone: Backbone, config: StackedConfig, image_shape: ImageShape) -> None:
    """Let every defence of the stack change `backbone`, in place, one after the other."""
    for section in config.defences:
        entry, parameters = parse_defence_section(section)
        if entry.change is None:
            raise UserError(f"{entry.name!r} is more than layers in a network and cannot be stacked; members of an ensemble can be stacks")
        entry.change(backbone, parameters, image_shape)


def fit(config: StackedConfig, backbone: Backbone) -> StackedConfig:
    """Return the stack with each defence fitted to the backbone."""
    return config.changed(defences=tuple(fitted_section(section, backbone) for section in config.defences))


DEFENCE_MODELS = (DefenceModel(NAME, "several defences in one network", StackedConfig, change_by_all, fit=fit),)
