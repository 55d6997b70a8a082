"""What every defence promises as a trainable, resumable, storable thing: over the whole catalogue, also what is to come."""

from __future__ import annotations

import pytest

from models.backbones import build_backbone
from models.ensemble import EnsembleConfig, num_members_of
from models.registry import build_model, defence_model, list_defences, parse_defence_section
from orchestration.catalogue import catalogue
from rayndom.testing.cases import SMALLER
from rayndom.testing.defence import DefenceContract

NAMES = sorted(catalogue())


@pytest.mark.parametrize("name", NAMES)
class TestDefence(DefenceContract):
    """The suite that plug-ins inherit, too."""


def test_the_catalogue_knows_every_defence_that_can_be_built():
    assert NAMES == list_defences()


TOO_FAR = [
    ({"name": "ctrw", "position": 9}, {"position": 4}),
    ({"name": "dcs", "positions": [3, 17]}, {"positions": (3, 7)}),
    ({"name": "dcn", "positions": [9, 17]}, {"positions": (7,)}),
    ({"name": "rna", "pool": ["bn", "in", "gn_size_64"]}, {"pool": ("bn", "in")}),
]
"""Parameters that the smallest network cannot have, and the nearest that it can."""


@pytest.mark.parametrize(("section", "expected"), TOO_FAR, ids=[section["name"] for section, _ in TOO_FAR])
def test_parameters_are_fitted_to_a_smaller_network_alone_in_a_stack_and_in_members(section, expected):
    backbone = build_backbone("resnet8", num_classes=4, image_shape=(3, 16, 16))

    def fitted(section):
        entry, parameters = parse_defence_section(section)
        assert entry.fit is not None
        again = entry.fit(parameters, backbone)
        assert entry.fit(again, backbone) == again
        build_model(entry.name, backbone="resnet8", num_classes=4, image_shape=(3, 16, 16), **again.model_dump())
        return again

    alone = fitted(section)
    assert {name: getattr(alone, name) for name in expected} == expected
    whole = {"name": section["name"], **alone.model_dump(mode="json")}
    assert fitted({"name": "stacked", "defences": [section]}).defences == (whole,)
    for name in list_defences():
        if issubclass(defence_model(name).config, EnsembleConfig) and name != "ps_red":  # its units need a larger network
            assert fitted({"name": name, "num_members": 2, "member": section}).member == whole


@pytest.mark.parametrize("name", list_defences())
def test_the_networks_that_parameters_ask_for_are_those_that_are_built(name):
    parameters = SMALLER.get(name, {})
    backbone = "resnet18" if name == "ps_red" else "resnet8"
    model = build_model(name, backbone=backbone, num_classes=4, image_shape=(3, 8, 8), **parameters)
    heads = sum(module.__class__.__name__ == "Classifier" for module in model.modules())
    assert num_members_of(parse_defence_section({"name": name, **parameters})[1]) == heads
