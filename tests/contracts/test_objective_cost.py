"""What every objective says of its cost is what its training step computes, counted as operations of convolutions and products."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.backbones.resnet import BasicBlock, ResNet
from models.classifier import Classifier, InputNormalization
from models.ensemble import Ensemble
from models.layer_replacement import of_type, replace_modules
from tests.contracts import test_objective as contract
from trainers.step import InnerAttackConfig

# DVERGE distils from a layer that is drawn for each epoch: half of the network on average, all or nearly nothing in one epoch.
UNEVEN = ("dverge", "dverge-distilling", "dverge-adversarial")


class Operations(TorchDispatchMode):
    """Counts floating-point operations of convolutions and matrix products, backward passes included."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def deep_network(seed: int, normalized: bool) -> nn.Module:
    """Return a network whose first layer, of which no step needs everything, costs little."""
    backbone = ResNet(BasicBlock, (5,), (12,), contract.NUM_CLASSES, contract.IMAGE_SHAPE, stem="cifar")
    replace_modules(backbone, of_type(nn.BatchNorm2d), lambda _name, _module: nn.Identity())
    return Classifier(InputNormalization((0.5,) * 3, (0.25,) * 3), backbone)


def counted_passes(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return what the objective says, and the operations of a step over those of a forward pass of one network on the same images."""
    monkeypatch.setattr(contract, "network", deep_network)
    objective, model = contract.build(name)
    x_BCHW, y_B = contract.own_rows()
    context = dataclasses.replace(contract.new_context(model), attack=InnerAttackConfig(steps=steps, step_size=0.05))
    members = list(model.members) if isinstance(model, Ensemble) else [model]
    with torch.no_grad(), Operations() as forward:
        members[0](x_BCHW)
    with Operations() as step:
        objective.training_step(model, x_BCHW, y_B, context)
    return objective.passes(steps, len(members), context.epoch) / objective.replays, step.total / forward.total


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", [name for name in contract.CASES if name not in UNEVEN])
def test_a_step_costs_what_its_objective_says(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said, counted = counted_passes(name, steps, monkeypatch)
    assert counted == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("name", UNEVEN)
def test_a_step_that_distils_costs_no_more_than_distillation_through_whole_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, counted = counted_passes(name, 3, monkeypatch)
    half = 3 * 10
    assert said - 1.05 * half < counted < said + 1.05 * half
