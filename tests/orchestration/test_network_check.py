"""Values that the schema allows and a backbone does not have are found before a sweep starts."""

from __future__ import annotations

import pytest

from models.errors import UserError
from orchestration.sweeping.loading import load_sweep
from orchestration.sweeping.network_check import check_networks


@pytest.mark.parametrize("sweep", ["ctrw_digits", "dcs_digits", "rna_digits", "red_digits"])
def test_own_search_spaces_fit_the_small_network(sweep):
    check_networks(load_sweep(sweep), None, {})


def test_a_position_that_the_backbone_does_not_have_is_named_with_its_dimension():
    config = load_sweep("ctrw_digits", {"space.defence.position": {"type": "int", "low": 0, "high": 9}})
    with pytest.raises(UserError, match=r"dimension defence\.position at 9: position 9 does not exist"):
        check_networks(config, None, {})


def test_given_points_of_a_grid_are_all_that_is_built():
    points = [{"defence.position": 1}, {"defence.position": 9}]
    space = {"space.defence.position": {"type": "int", "low": 0, "high": 9}}
    with pytest.raises(UserError, match="position 9"):
        check_networks(load_sweep("ctrw_digits", {**space, "sampler": "grid", "points": points}), None, {})
    check_networks(load_sweep("ctrw_digits", {**space, "sampler": "grid", "points": points[:1]}), None, {})
