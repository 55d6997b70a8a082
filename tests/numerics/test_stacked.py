"""Stacks of defences: each part is there, draws are independent, and what cannot be stacked says so."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.errors import UserError
from models.layers.random_normalization import RandomNormalization2d
from models.layers.random_weight import RandomFeatureWeight
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import num_configurations, resample

SHAPE = (3, 8, 8)


def stack(*defences, **options):
    return build_model("stacked", backbone="resnet8", num_classes=4, image_shape=SHAPE, defences=list(defences), **options)


def test_a_stack_of_one_is_that_defence():
    x = torch.rand(2, *SHAPE)
    alone = build_model("ctrw", backbone="resnet8", num_classes=4, image_shape=SHAPE, position=1).eval()
    stacked = stack({"name": "ctrw", "position": 1}).eval()
    assert stacked.state_dict().keys() == alone.state_dict().keys()
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in stacked.state_dict().items())
    for model in (alone, stacked):
        resample(model, torch.Generator().manual_seed(1))
    assert torch.equal(stacked(x), alone(x))


def test_every_part_is_in_the_network_and_draws():
    model = stack({"name": "rna"}, {"name": "dcs", "kernel_size": 3}, {"name": "ctrw"})
    kinds = {type(module) for module in model.modules()}
    assert {RandomNormalization2d, StochasticConv2d, RandomFeatureWeight} <= kinds
    assert num_configurations(stack({"name": "rna"}, {"name": "dcs", "kernel_size": 3})) == 2**9 * 36


def test_ensembles_carry_stacks_but_are_not_stacked():
    with pytest.raises(UserError, match="cannot be stacked"):
        stack({"name": "red", "num_members": 2})
    ensemble = build_model("red", backbone="resnet8", num_classes=4, image_shape=SHAPE, num_members=2, member={"name": "stacked"})
    assert ensemble(torch.rand(3, *SHAPE)).shape == (3, 4)


def test_a_wrong_part_is_named():
    with pytest.raises(UserError, match="'rna'"):
        stack({"name": "rnn"})
    with pytest.raises(UserError, match="position"):
        stack({"name": "ctrw", "positions": 1})
