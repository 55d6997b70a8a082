"""TRADES: direction of the divergence, gradients, the inner attack, running statistics (T38)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.randomness import resample
from models.registry import build_model
from tests.numerics.taylor_cases import batch, context, gradients, nearby, objective, tiny_network
from trainers.trades_terms import divergence, divergence_from_clean


def test_loss_is_cross_entropy_plus_beta_times_kl_from_clean_to_adversarial() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    x_adv = nearby(x)
    terms = objective("trades", beta=3.0).outer_loss(model, x, x_adv, y, context())
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(terms["divergence"], kl, rtol=1e-10, atol=0)
    torch.testing.assert_close(terms["loss"], functional.cross_entropy(model(x), y) + 3 * kl, rtol=1e-12, atol=0)
    # The gradient flows through both sides: that of the loss with either side held fixed is another one.
    whole = torch.autograd.grad(terms["loss"], model.backbone.conv1.weight)[0]
    by_hand = torch.autograd.grad(functional.cross_entropy(model(x), y) + 3 * kl, model.backbone.conv1.weight)[0]
    torch.testing.assert_close(whole, by_hand, rtol=1e-9, atol=1e-12)


def test_divergences_by_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    p, log_q = a.softmax(1), b.log_softmax(1)
    torch.testing.assert_close(divergence("ce", a, b), -(p * log_q).sum(1))
    torch.testing.assert_close(divergence("kl", a, b), divergence("ce", a, b) + (p * p.log()).sum(1))
    torch.testing.assert_close(divergence("mse", a, b), ((a - b) ** 2).sum(1))
    assert torch.equal(divergence("kl", a, a), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_examples_stay_in_the_ball_and_raise_the_divergence(norm: str) -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    run = context(steps=5, norm=norm)
    x_adv = objective("trades").attack(model, x, y, run)
    delta = (x_adv - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert length.max() <= run.threat_model.epsilon * (1 + 1e-9)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    model.eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    noise = (
        noise.sign() * run.threat_model.epsilon
        if norm == "linf"
        else noise * (run.threat_model.epsilon / noise.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    )
    at_attack, at_noise = (divergence("kl", model(x), model(images)).mean() for images in (x_adv, (x + noise).clamp(0, 1)))
    assert at_attack > 2 * at_noise


def test_clean_probabilities_are_computed_once_in_the_attack_s_mode() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    modes = []
    model.register_forward_hook(lambda module, _inputs, _output: modes.append((module.training, torch.is_grad_enabled())))
    objective("trades").attack(model, x, y, context(steps=3))
    assert sorted(modes) == [(False, False), (False, True), (False, True), (False, True)]
    assert model.training


@pytest.mark.parametrize("defence", ["ctrw", "rna", "dcs"])
def test_clean_and_attacked_logits_are_of_one_draw(defence: str) -> None:
    model = build_model(defence, backbone="resnet8", num_classes=4, image_shape=(3, 8, 8)).eval()
    x, y = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    loss = divergence_from_clean(model, x)
    logits = []
    for _ in range(4):
        resample(model)
        with torch.no_grad():
            logits.append(model(x))
            assert torch.equal(loss(logits[-1], y), torch.zeros(4)), "the same images under the same draw do not diverge"
    assert (logits[0] - logits[1]).abs().max() > 1e-5, "two draws that agree would prove nothing"


@pytest.mark.parametrize(("redraw", "clean_passes"), [("each_attack_step", 3), ("attack_then_step", 1), ("each_batch", 1)])
def test_the_attack_looks_at_the_clean_images_once_per_draw(redraw: str, clean_passes: int) -> None:
    model = build_model("ctrw", backbone="resnet8", num_classes=4, image_shape=(3, 8, 8)).train()
    x, y = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    without_gradient = []
    model.register_forward_hook(lambda *_: without_gradient.append(not torch.is_grad_enabled()))
    run = context(steps=3)
    run.redraw = redraw
    objective("trades").attack(model, x, y, run)
    assert sum(without_gradient) == clean_passes


def test_the_attack_s_target_has_no_gradient() -> None:
    model = tiny_network(nn.ReLU).eval()
    x, y = batch()
    loss = divergence_from_clean(model, x)
    logits = torch.randn(len(x), 4, dtype=torch.float64, requires_grad=True)
    loss(logits, y).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - model(x).detach().softmax(1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_running_statistics_take_in_the_clean_and_then_the_adversarial_batch() -> None:
    model = tiny_network(nn.ReLU)
    expected = copy.deepcopy(model)
    x, y = batch()
    x_adv = objective("trades").attack(model, x, y, context())
    objective("trades").training_step(model, x, y, context())
    expected(x)
    expected(x_adv)
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_training_step_leaves_gradients_and_detached_scalars() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    scalars = objective("trades").training_step(model, x, y, context())
    assert set(scalars) == {"loss", "cross_entropy", "divergence", "clean_accuracy", "robust_accuracy"}
    assert not any(value.requires_grad for value in scalars.values())
    assert set(gradients(model)) == {name for name, _ in model.named_parameters()}
