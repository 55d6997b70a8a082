"""Several defences of one network at once: RNA's normalizations with CTRW's weights, DCS's convolution with RNA, and so on.

Each defence changes the backbone as it would alone, one after the other; their random sites draw independently. Ensembles are not for
stacking: an ensemble carries a stack as its members' defence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator
from torch import nn

from models.backbones.base import Backbone
from models.configuration import Config
from models.errors import UserError
from models.registry import BuildRequest, DefenceModel, parse_defence_section

Transform = Callable[[Backbone], None]


class StackedConfig(Config):
    """Parameters of a stack of defences."""

    defences: tuple[dict[str, Any], ...] = Field(
        ({"name": "rna"}, {"name": "ctrw"}),
        min_length=1,
        description="The defences in the order in which they change the network, e.g. `[{name: rna}, {name: ctrw, position: 1}]`.",
    )

    @field_validator("defences")
    @classmethod
    def _each_is_a_defence(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        checked = []
        for section in value:
            if not isinstance(section.get("name"), str):
                raise ValueError(f"each defence of a stack needs a name, e.g. {{name: rna}}; got {section!r}")
            entry, parameters = parse_defence_section(section)
            checked.append({"name": entry.name, **parameters.model_dump(mode="json")})
        return tuple(checked)

    @property
    def revision(self) -> int:
        """The sum of those of the defences."""
        return sum(parse_defence_section(section)[1].revision for section in self.defences)


@dataclasses.dataclass(frozen=True)
class _Recorder(BuildRequest):
    """Builds nothing, but remembers how a defence would have changed the backbone."""

    transforms: list[Transform] = dataclasses.field(default_factory=list)
    stand_in: nn.Module = dataclasses.field(default_factory=nn.Identity)

    def network(self, transform: Transform | None = None, member: int = 0) -> nn.Module:
        """Note the change and return a stand-in."""
        del member
        if transform is not None:
            self.transforms.append(transform)
        return self.stand_in


def build_stacked(config: StackedConfig, request: BuildRequest) -> nn.Module:
    """Return the backbone with all defences.

    Raises:
        UserError: one of them is more than a change of one backbone (an ensemble).
    """
    transforms: list[Transform] = []
    for section in config.defences:
        entry, parameters = parse_defence_section(section)
        recorder = _Recorder(**{field.name: getattr(request, field.name) for field in dataclasses.fields(BuildRequest)})
        built = entry.build(parameters, recorder)
        if built is not recorder.stand_in:
            raise UserError(f"{entry.name!r} is more than layers in a network and cannot be stacked; members of an ensemble can be stacks")
        transforms += recorder.transforms

    def change(backbone: Backbone) -> None:
        for transform in transforms:
            transform(backbone)

    return request.network(change)


DEFENCE_MODELS = (DefenceModel("stacked", "several defences in one network", StackedConfig, build_stacked),)
