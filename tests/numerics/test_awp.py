"""Adversarial weight perturbation around AT-like and TRADES-like steps (T39)."""

from __future__ import annotations

import copy
import socket
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional

from models.modes import mode
from tests.numerics.taylor_cases import batch, context, gradients, objective, tiny_network
from trainers.objective import Objective
from trainers.step import StepContext
from trainers.weight_perturbation import (
    PerturbableConfig,
    PerturbableObjective,
    perturbed_parameters,
    weight_perturbation,
)

AWP = {"gamma": 0.02, "warmup_epochs": 1}
OBJECTIVES = ["trades", "rat_taylor", "rat_surrogate", "rat_direct", "label_smoothing"]


class AdversarialTraining(PerturbableObjective):
    """AT, the way `adversarial` can use AWP."""

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, run: StepContext) -> Tensor:
        return run.adversarial_examples(model, x, y)

    def outer_loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, run: StepContext) -> Mapping[str, Tensor]:
        return {"loss": functional.cross_entropy(model(x_adv), y)}

    def outer_passes(self) -> float:
        return 3.0


def with_awp(name: str) -> Objective:
    if name == "at":
        return AdversarialTraining(PerturbableConfig(name="adversarial", weight_perturbation=AWP))
    return objective(name, weight_perturbation=AWP)


def test_length_of_the_perturbation_and_what_it_leaves_alone() -> None:
    model = tiny_network(nn.ReLU, bias=True)
    x, y = batch()
    deltas = weight_perturbation(model, functional.cross_entropy(model(x), y), 0.01)
    assert set(deltas) == {"backbone.conv1.weight", "backbone.conv2.weight", "backbone.classifier.weight"}
    for name, delta in deltas.items():
        assert delta.norm().item() == pytest.approx(0.01 * model.get_parameter(name).norm().item(), rel=1e-12)


def test_weights_without_gradient_do_not_move() -> None:
    model = tiny_network(nn.ReLU)
    model.backbone.conv1.weight.requires_grad_(False)
    x, y = batch()
    assert "backbone.conv1.weight" not in perturbed_parameters(model)
    deltas = weight_perturbation(model, 0 * functional.cross_entropy(model(x), y), 0.01)
    assert all(torch.equal(delta, torch.zeros_like(delta)) for delta in deltas.values())


@pytest.mark.parametrize("learning_rate", [0.01, 0.1])
def test_equals_a_proxy_model_with_an_optimizer_of_its_own(learning_rate: float) -> None:
    """The proxy of the published code ascends by one SGD step; its learning rate cancels."""
    model = tiny_network(nn.ReLU)
    x, y = batch()
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=learning_rate)
    (-functional.cross_entropy(proxy(x), y)).backward()
    optimizer.step()
    deltas = weight_perturbation(model, functional.cross_entropy(model(x), y), 0.01)
    for name, delta in deltas.items():
        weight = model.get_parameter(name).detach()
        moved = proxy.get_parameter(name).detach() - weight
        torch.testing.assert_close(delta, 0.01 * weight.norm() / moved.norm() * moved, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["at", *OBJECTIVES])
def test_weights_are_restored_after_the_optimizer_step(name: str) -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    before = {key: value.clone() for key, value in model.named_parameters()}
    step = with_awp(name)
    step.prepare(model)
    run = context(epoch=1)
    step.training_step(model, x, y, run)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == set(perturbed_parameters(model))
    step.after_optimizer_step(model, run)
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, before[key], rtol=4e-16, atol=1e-17, msg=key)
    step.after_optimizer_step(model, run)  # nothing left to undo


@pytest.mark.parametrize("name", ["at", "trades"])
def test_gradients_are_those_at_the_perturbed_weights(name: str) -> None:
    model = tiny_network(nn.ReLU)
    by_hand = copy.deepcopy(model)
    x, y = batch()
    step = with_awp(name)
    step.training_step(model, x, y, context(epoch=1))
    run = context(epoch=1)
    x_adv = step.attack(by_hand, x, y, run)
    with mode(by_hand, "train_without_update"):
        deltas = weight_perturbation(by_hand, step.outer_loss(by_hand, x, x_adv, y, run)["loss"], AWP["gamma"])
    with torch.no_grad():
        for key, delta in deltas.items():
            by_hand.get_parameter(key).add_(delta)
    step.outer_loss(by_hand, x, x_adv, y, run)["loss"].backward()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, by_hand.get_parameter(key).grad, rtol=1e-12, atol=1e-15, msg=key)
    for (key, a), b in zip(model.named_buffers(), by_hand.buffers(), strict=True):
        assert torch.equal(a, b), f"{key}: the ascent left a trace in the running statistics"


def test_the_perturbation_raises_the_loss() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    plain = objective("trades").training_step(copy.deepcopy(model), x, y, context(epoch=1))
    perturbed = with_awp("trades").training_step(model, x, y, context(epoch=1))
    assert perturbed["loss"] > plain["loss"]


def test_warm_up_is_the_plain_objective() -> None:
    model = tiny_network(nn.ReLU)
    plain = copy.deepcopy(model)
    x, y = batch()
    with_awp("trades").training_step(model, x, y, context(epoch=0))
    objective("trades").training_step(plain, x, y, context(epoch=0))
    for key, value in gradients(model).items():
        assert torch.equal(value, plain.get_parameter(key).grad), key


def test_a_failing_step_restores_the_weights() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    before = {key: value.clone() for key, value in model.named_parameters()}
    step = with_awp("at")
    calls = []

    def fails_at_perturbed_weights(*_arguments: object) -> Mapping[str, Tensor]:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return AdversarialTraining.outer_loss(step, *_arguments)

    step.outer_loss = fails_at_perturbed_weights
    with pytest.raises(RuntimeError, match="out of memory"):
        step.training_step(model, x, y, context(epoch=1))
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, before[key], rtol=4e-16, atol=1e-17)


def perturbation_of(rows: slice) -> dict[str, Tensor]:
    model = tiny_network(nn.ReLU).eval()
    x, y = batch(8)
    return weight_perturbation(model, functional.cross_entropy(model(x[rows]), y[rows]), 0.01)


def worker(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results[rank] = perturbation_of(slice(4 * rank, 4 * rank + 4))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_stand_at_the_weights_of_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(worker, args=(port, shared), nprocs=2)
        results = dict(shared)
    expected = perturbation_of(slice(None))
    for key, delta in expected.items():
        assert torch.equal(results[0][key], results[1][key])
        torch.testing.assert_close(results[0][key], delta, rtol=1e-10, atol=1e-14)
