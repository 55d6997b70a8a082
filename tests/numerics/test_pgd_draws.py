"""Projected gradient descent: draws, best iterate, odd gradients, precision, mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import UserError
from models.randomness import frozen, resample, seed_streams
from tests.numerics.pgd_cases import EPSILONS, NORMS, GradientOf, Shift, SmallNet, batch, distance, model, noisy_model, settings  # noqa: F401
from trainers.attacks import check_pixels, cross_entropy, input_gradient, pgd
from trainers.hardware import Precision

# ------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("norm", NORMS)
def test_held_draw_is_attacked_and_never_redrawn(noisy_model, batch, norm):
    site = noisy_model[0]
    held, taken = site.noise.clone(), site.num_taken
    site.seen.clear()
    x_adv = pgd(noisy_model, *batch, steps=4, **settings(norm))
    assert site.num_taken == taken
    assert len(site.seen) == 4
    assert all(torch.equal(seen, held) for seen in site.seen)
    fixed = nn.Sequential(Shift(held), noisy_model[1])
    assert torch.equal(x_adv, pgd(fixed, *batch, steps=4, **settings(norm)))


@pytest.mark.parametrize(("arguments", "num_draws"), [({"resample_each_step": True}, 5), ({"num_draws": 3}, 15)])
def test_fresh_draws_are_counted_and_distinct(noisy_model, batch, arguments, num_draws):
    site = noisy_model[0]
    held, taken = site.noise.clone(), site.num_taken
    site.seen.clear()
    pgd(noisy_model, *batch, steps=5, **arguments)
    assert site.num_taken - taken == num_draws
    assert len({tuple(seen.flatten().tolist()) for seen in [held, *site.seen]}) == num_draws + 1


def test_averaged_gradient_is_the_mean_of_single_draw_gradients(noisy_model, batch):
    x, y = batch
    seed_streams(noisy_model, 3)
    gradient, loss_B = input_gradient(noisy_model, x, y, num_draws=4)
    seed_streams(noisy_model, 3)
    singles = []
    for _ in range(4):
        resample(noisy_model)
        singles.append(input_gradient(noisy_model, x, y))
    torch.testing.assert_close(gradient, torch.stack([single[0] for single in singles]).mean(0), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss_B, torch.stack([single[1] for single in singles]).mean(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_eot_attack_follows_the_averaged_gradient(noisy_model, batch, norm):
    x, y = batch
    seed_streams(noisy_model, 3)
    gradient, _ = input_gradient(noisy_model, x, y, num_draws=4)
    seed_streams(noisy_model, 3)
    x_adv = pgd(noisy_model, x, y, steps=1, num_draws=4, random_start=False, norm=norm, epsilon=1.0, step_size=0.01)
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    direction = gradient.sign() if norm == "linf" else gradient / length
    torch.testing.assert_close(x_adv, (x + 0.01 * direction).clamp(0, 1), rtol=0, atol=1e-12)


def test_no_fresh_draw_inside_frozen(noisy_model, batch):
    expected = pgd(noisy_model, *batch, steps=3)
    with frozen(noisy_model):
        torch.testing.assert_close(pgd(noisy_model, *batch, steps=3, num_draws=2), expected, rtol=0, atol=1e-12)
        assert torch.equal(pgd(noisy_model, *batch, steps=3, resample_each_step=True), expected)


def test_gradients_that_are_views_are_averaged(batch):
    class Brightness(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(dim=(1, 2, 3)).unsqueeze(1).expand(-1, 2)

    x, y = batch
    gradient, _ = input_gradient(Brightness(), x, y, num_draws=3, loss=lambda logits, labels: logits[:, 0])
    torch.testing.assert_close(gradient, torch.ones_like(x))
    for norm in NORMS:
        pgd(Brightness(), x, y, num_draws=3, loss=lambda logits, labels: logits[:, 0], **settings(norm))


# ------------------------------------------------------------------------------------------------- best iterate


@pytest.mark.parametrize("norm", NORMS)
def test_keep_best_is_never_worse_than_last(model, batch, norm):
    x, y = batch
    large_steps = {**settings(norm), "step_size": 3 * EPSILONS[norm]}
    gains = []
    for seed in range(4):
        arguments = {**large_steps, "steps": 6}
        last = pgd(model, x, y, generator=torch.Generator().manual_seed(seed), **arguments)
        best = pgd(model, x, y, generator=torch.Generator().manual_seed(seed), keep_best=True, **arguments)
        gains.append(cross_entropy(model(best), y) - cross_entropy(model(last), y))
    gain = torch.stack(gains)
    assert gain.min() >= 0
    assert gain.max() > 0  # steps as large as these overshoot


def test_keep_best_returns_the_best_iterate_even_if_it_is_the_start():
    """Steps overshoot the peak of this loss, so a start near it stays the best."""
    x = torch.full((6, 1, 2, 2), 0.5, dtype=torch.float64)
    y, weights = torch.zeros(6, dtype=torch.long), torch.ones(1, 2, 2, dtype=torch.float64)
    net = GradientOf(weights)

    def closeness(logits: Tensor, labels: Tensor) -> Tensor:
        return -(logits[:, 1] - 2.01).square()

    def attack(steps: int, **more: bool) -> Tensor:
        return pgd(net, x, y, epsilon=0.05, step_size=0.03, steps=steps, loss=closeness, **more)

    iterates = torch.stack([attack(steps) for steps in range(4)])
    losses = torch.stack([closeness(net(iterate), y) for iterate in iterates])
    best = losses.argmax(dim=0)
    assert (best == 0).any()
    assert (best > 0).any()
    assert torch.equal(attack(3, keep_best=True), iterates[best, torch.arange(6)])


def test_restarts_keep_the_better_result(model, batch):
    x, y = batch
    generator = torch.Generator().manual_seed(0)
    singles = [cross_entropy(model(pgd(model, x, y, steps=1, generator=generator)), y) for _ in range(3)]
    together = pgd(model, x, y, steps=1, restarts=3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cross_entropy(model(together), y), torch.stack(singles).amax(0), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- odd gradients


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_zero_and_nan_gradients_move_nothing(batch, norm, value):
    x, y = batch
    x_adv = pgd(GradientOf(torch.full_like(x, value)), x, 0 * y, keep_best=True, random_start=False, **settings(norm))
    torch.testing.assert_close(x_adv, x, rtol=0, atol=1e-15)
    x_adv = pgd(GradientOf(torch.full_like(x, value)), x, 0 * y, random_start=False, **settings(norm))
    torch.testing.assert_close(x_adv, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_stays_with_its_example(batch, norm):
    x, y = batch
    weights = torch.ones_like(x)
    weights[1, 0, 0, 0] = math.nan

    def gradient_is_weights(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[:, 1]

    x_adv = pgd(GradientOf(weights), 0.5 * x, y, loss=gradient_is_weights, random_start=False, **settings(norm))
    assert torch.isfinite(x_adv).all()
    moved = distance(x_adv, 0.5 * x, norm)
    assert moved[[0, 2, 3]].min() > 0.9 * EPSILONS[norm]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_l2_steps_do_not_depend_on_the_scale_of_the_gradient(scale):
    x, y = torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    weights = scale * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = {"norm": "l2", "epsilon": 0.3, "step_size": 0.1, "random_start": False}
    x_adv = pgd(GradientOf(weights), x, y, loss=lambda logits, labels: logits[:, 1], **arguments)
    torch.testing.assert_close(distance(x_adv, x, "l2"), torch.full((2,), 0.3), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------- precision


def test_bf16_forward_keeps_images_and_losses_in_float32(batch):
    seen: set[torch.dtype] = set()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.add(logits.dtype)
        return cross_entropy(logits, labels)

    net, (x, y) = SmallNet().eval(), batch
    x_adv = pgd(net, x.float(), y, loss=loss, precision=Precision("bf16", "cpu"))
    assert seen == {torch.float32}
    assert x_adv.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_attack_reaches_the_loss_of_float32():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
        net.append(nn.Linear(144, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(60):
        rows = slice(64 * (step % 20), 64 * (step % 20) + 64)
        optimizer.zero_grad()
        functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    held_x, held_y = x[1400:], y[1400:]

    def reached(precision: Precision) -> float:
        x_adv = pgd(net, held_x, held_y, epsilon=0.1, step_size=0.025, precision=precision)
        with torch.no_grad():
            return cross_entropy(net(x_adv), held_y).mean().item()

    with torch.no_grad():
        clean = cross_entropy(net(held_x), held_y).mean().item()
    full, low = reached(Precision("fp32", "cpu")), reached(Precision("bf16", "cpu"))
    assert full > 2 * clean
    assert low >= 0.99 * full


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "linff"}, "unknown norm 'linff'. Did you mean 'linf'"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"epsilon": 8}, "did you mean 8/255"),
        ({"step_size": -1.0}, "step_size is -1.0"),
        ({"gaussian_start": -1.0}, "gaussian_start is -1.0"),
        ({"steps": -1}, "steps is -1"),
        ({"num_draws": 0}, "num_draws is 0"),
        ({"restarts": 0}, "restarts is 0"),
        ({"restarts": 2, "random_start": False}, "repeats the first"),
        ({"loss": functional.cross_entropy}, "one value per example"),
    ],
)
def test_wrong_arguments_are_named(model, batch, arguments, message):
    with pytest.raises(UserError, match=message):
        pgd(model, *batch, **arguments)


def test_wrong_tensors_are_named(model, batch):
    x, y = batch
    with pytest.raises(UserError, match="4 images come with labels"):
        pgd(model, x, y[:3])
    with pytest.raises(UserError, match="floating-point pixels"):
        pgd(model, (255 * x).to(torch.uint8), y)
    with pytest.raises(UserError, match="fresh draws need an"):
        pgd(lambda images: model(images), x, y, num_draws=2)


def test_check_pixels():
    check_pixels(torch.tensor([0.0, 0.5, 1.0]))
    check_pixels(torch.empty(0, 3, 8, 8))
    for wrong in (255.0, -0.01, math.nan):
        with pytest.raises(UserError, match="pixels must be in"):
            check_pixels(torch.tensor([0.5, wrong]))
