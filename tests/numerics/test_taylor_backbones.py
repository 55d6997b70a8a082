"""One step of every objective of the Taylor family on every network of the paper's tables, in both norms."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from tests.numerics.taylor_cases import context, objective
from trainers.hardware import channels_last, to_channels_last_
from trainers.weight_perturbation import perturbed_parameters

AWP = {"weight_perturbation": {"gamma": 0.005, "warmup_epochs": 0}}

OBJECTIVES = {
    "at": ("adversarial", {}),
    "at_awp": ("adversarial", AWP),
    "trades": ("trades", {}),
    "trades_awp": ("trades", AWP),
    "taylor_zeroth": ("rat_taylor", {"order": 0}),
    "taylor_first": ("rat_taylor", {"order": 1, "eta": 0.3}),
    "taylor_second": ("rat_taylor", {"order": 2, "eta": 0.2}),
    "taylor_second_ce_relative": ("rat_taylor", {"divergence": "ce", "sigma": 0.05, "sigma_mode": "relative", "num_noise_samples": 2}),
    "taylor_first_mse_all": ("rat_taylor", {"order": 1, "divergence": "mse", "noise_scope": "all", "sigma_mode": "relative_per_filter"}),
    "taylor_awp": ("rat_taylor", AWP),
    "taylor_antithetic": ("rat_taylor", {"derivatives": "antithetic"}),
    "surrogate": ("rat_surrogate", {}),
    "surrogate_without_slip": ("rat_surrogate", {"second_slip": False}),
    "surrogate_awp": ("rat_surrogate", {"attack_noise": False, **AWP}),
    "direct": ("rat_direct", {}),
    "label_smoothing": ("label_smoothing", {}),
}

BACKBONES = [
    "resnet8",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("resnet20", "resnet18", "preact_resnet18", "wrn16_4", "wrn34_10", "vgg16", "mobilenet_v2")
    ),
]


@functools.cache
def network(backbone: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = to_channels_last_(build_model("rat", backbone=backbone, num_classes=10, image_shape=(3, 16, 16))).train()
    return model, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_step(backbone: str, name: str, norm: str) -> None:
    model, state = network(backbone)
    model.load_state_dict(state)
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x, y = channels_last(torch.rand(2, 3, 16, 16, generator=generator)), torch.tensor([3, 7])
    entry, parameters = OBJECTIVES[name]
    subject = objective(entry, **parameters)
    subject.prepare(model)
    run = context(steps=1, norm=norm)
    seen: list[Tensor] = []
    attack = subject.attack

    def watched(*arguments: object) -> Tensor:
        seen.append(attack(*arguments))
        return seen[-1]

    subject.attack = watched
    scalars = subject.training_step(model, x, y, run)
    assert all(torch.isfinite(value) for value in scalars.values())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), f"{key} has no gradient"
    subject.after_optimizer_step(model, run)
    moves = set(perturbed_parameters(model)) if "awp" in name else set()
    for key, parameter in model.named_parameters():
        if key in moves:  # w + delta - delta
            torch.testing.assert_close(parameter, state[key], rtol=1e-6, atol=1e-7, msg=key)
        else:
            assert torch.equal(parameter, state[key]), f"{key} moved without an optimizer"
    passes = 1 if entry == "adversarial" else 2
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert int(value - state[key]) == passes, f"{key}: the statistics took in {int(value - state[key])} batches"
    (x_adv,) = seen
    moved = (x_adv - x).flatten(1)
    length = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert (length > 0).all() and (length <= run.threat_model.epsilon + 1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
