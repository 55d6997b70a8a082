"""Projected gradient descent against torchattacks, a naive loop and closed forms, and what it must not touch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.randomness import seed_streams
from tests.numerics.pgd_cases import EPSILONS, NORMS, GradientOf, SmallNet, batch, distance, model, naive_pgd, noisy_model, settings  # noqa: F401
from trainers.attacks import check_pixels, cross_entropy, margin, pgd

# ------------------------------------------------------------------------------------------------- references


def test_linf_equals_torchattacks(model, batch):
    x, y = batch
    reference = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False)(x, y)
    torch.testing.assert_close(pgd(model, x, y, random_start=False), reference, rtol=0, atol=1e-12)


def test_linf_equals_torchattacks_from_the_same_random_start(model, batch):
    x, y = batch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        reference = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)(x, y)
    x_adv = pgd(model, x, y, generator=torch.Generator().manual_seed(11))
    torch.testing.assert_close(x_adv, reference, rtol=0, atol=1e-12)


def test_l2_equals_torchattacks(model, batch):
    x, y = batch
    attack = torchattacks.PGDL2(model, eps=0.5, alpha=0.15, steps=10, random_start=False, eps_for_division=0.0)
    x_adv = pgd(model, x, y, random_start=False, **settings("l2"))
    torch.testing.assert_close(x_adv, attack(x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_equals_a_naive_loop_from_a_random_start(model, batch, norm):
    x, y = batch
    start = pgd(model, x, y, steps=0, generator=torch.Generator().manual_seed(3), **settings(norm))
    x_adv = pgd(model, x, y, steps=7, generator=torch.Generator().manual_seed(3), **settings(norm))
    torch.testing.assert_close(x_adv, naive_pgd(model, x, y, start, norm, steps=7), rtol=0, atol=1e-12)


def test_linear_model_linf_reaches_the_corner_along_the_weights():
    weights = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    x_adv = pgd(GradientOf(weights), x, y)
    torch.testing.assert_close(x_adv, x + 8 / 255 * weights.sign(), rtol=0, atol=1e-12)
    x_adv = pgd(GradientOf(weights), x, 1 - y, loss=margin)
    torch.testing.assert_close(x_adv, x - 8 / 255 * weights.sign(), rtol=0, atol=1e-12)


def test_linear_model_l2_ends_epsilon_along_the_weights():
    weights = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    x_adv = pgd(GradientOf(weights), x, y, norm="l2", epsilon=0.3, step_size=0.1, random_start=False)
    expected = x + 0.3 * weights / weights.norm()
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


def test_losses_are_per_example():
    logits, y = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 4.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(margin(logits, y), torch.tensor([0.5 - 2.0, 4.0 - 3.0]))
    expected = -logits.log_softmax(dim=1)[torch.arange(2), y]
    torch.testing.assert_close(cross_entropy(logits, y), expected)


# ------------------------------------------------------------------------------------------------- the ball


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(1, 3, 8, 8), (5, 1, 6, 4), (2, 2, 8, 8)])
@pytest.mark.parametrize("start", [{}, {"random_start": False}, {"gaussian_start": 0.2}, {"keep_best": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stays_in_the_ball_and_the_pixel_range(norm, size, start, dtype):
    net = SmallNet(channels=size[1]).to(dtype).eval()
    x = torch.rand(size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x = x.round(decimals=1)  # some pixels are 0 and 1
    y = torch.arange(size[0]) % 5
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for steps in (0, 1, 4):
        x_adv = pgd(net, x, y, steps=steps, generator=torch.Generator().manual_seed(2), **settings(norm), **start)
        assert x_adv.shape == x.shape
        assert x_adv.dtype == dtype
        assert not x_adv.requires_grad
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert distance(x_adv, x, norm).max() <= EPSILONS[norm] + tolerance


@pytest.mark.parametrize("norm", NORMS)
def test_epsilon_zero_returns_the_images(model, batch, norm):
    x, y = batch
    x_adv = pgd(model, x, y, norm=norm, epsilon=0.0, step_size=0.1, steps=3)
    torch.testing.assert_close(x_adv, x, rtol=0, atol=1e-15)


def test_images_are_not_written_to(model, batch):
    x, y = batch
    before = x.clone()
    x_adv = pgd(model, x.contiguous(memory_format=torch.channels_last), y, steps=2, random_start=False)
    x_adv.zero_()
    pgd(model, x, y, steps=0, random_start=False).zero_()
    assert torch.equal(x, before)


def test_images_come_back_channels_last_and_vectors_work(model, batch):
    assert pgd(model, *batch).is_contiguous(memory_format=torch.channels_last)
    x, y = torch.rand(6, 12), torch.zeros(6, dtype=torch.long)
    for norm in NORMS:
        x_adv = pgd(nn.Linear(12, 3), x, y, **settings(norm))
        assert distance(x_adv, x, norm).max() <= EPSILONS[norm] + 1e-6


def kolmogorov_distance(samples: Tensor) -> float:
    """Largest distance between the empirical distribution of `samples` and the uniform one on [0,1]."""
    count = len(samples)
    levels = torch.arange(count, dtype=torch.float64)
    ordered = samples.sort().values
    return float(torch.maximum(ordered - levels / count, (levels + 1) / count - ordered).max())


def test_l2_start_is_uniform_in_the_ball():
    x, y = torch.full((4000, 3, 2, 2), 0.5, dtype=torch.float64), torch.zeros(4000, dtype=torch.long)
    start = pgd(nn.Identity(), x, y, steps=0, norm="l2", epsilon=0.3)
    volume_below = (distance(start, x, "l2") / 0.3) ** 12
    assert kolmogorov_distance(volume_below) < 1.63 / math.sqrt(4000)  # 1 % level; the seed is fixed
    direction = (start - x).flatten(1)
    direction = direction / direction.norm(dim=1, keepdim=True)
    second_moment = direction.T @ direction / len(direction)
    torch.testing.assert_close(second_moment, torch.eye(12, dtype=torch.float64) / 12, rtol=0, atol=0.01)


def test_linf_start_is_uniform_in_the_ball():
    x, y = torch.full((500, 2, 2, 2), 0.5, dtype=torch.float64), torch.zeros(500, dtype=torch.long)
    start = pgd(nn.Identity(), x, y, steps=0, epsilon=0.1)
    assert kolmogorov_distance(((start - x) / 0.2 + 0.5).flatten()) < 1.63 / math.sqrt(4000)


def test_gaussian_start_has_the_standard_deviation():
    x, y = torch.full((500, 2, 2, 2), 0.5, dtype=torch.float64), torch.zeros(500, dtype=torch.long)
    start = pgd(nn.Identity(), x, y, steps=0, gaussian_start=0.001)
    assert (start - x).std().item() == pytest.approx(0.001, rel=0.05)
    assert (start - x).abs().max() > 0.002  # no uniform distribution reaches beyond sqrt(3) standard deviations


# ------------------------------------------------------------------------------------------------- side effects


class RaisesAtCall(nn.Module):
    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner, self.calls_left = inner, call

    def forward(self, x: Tensor) -> Tensor:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise RuntimeError("out of memory")
        return self.inner(x)


@pytest.mark.parametrize("raises", [False, True])
def test_weights_keep_gradients_and_flags(model, batch, raises):
    x, y = batch
    model.layers[0].bias.requires_grad_(False)
    kept = torch.ones_like(model.layers[0].weight)
    model.layers[0].weight.grad = kept
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: pytest.fail("a weight gradient was computed"))
    if raises:
        with pytest.raises(RuntimeError, match="out of memory"):
            pgd(RaisesAtCall(model, 3), x, y)
    else:
        pgd(model, x, y, num_draws=2, keep_best=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.layers[0].weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])


def test_buffers_and_modes_stay_as_they_are_in_eval(model, batch):
    model.layers[4].train()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    pgd(model, *batch, keep_best=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_global_random_state_is_neither_read_nor_changed(noisy_model, batch, norm):
    def attack() -> Tensor:
        seed_streams(noisy_model, 5)
        return pgd(noisy_model, *batch, steps=3, resample_each_step=True, **settings(norm))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = attack()
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(attack(), first)


@pytest.mark.parametrize("norm", NORMS)
def test_generator_decides_the_start(model, batch, norm):
    def start(seed: int) -> Tensor:
        return pgd(model, *batch, steps=0, generator=torch.Generator().manual_seed(seed), **settings(norm))

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))
    generator = torch.Generator().manual_seed(3)
    first = pgd(model, *batch, steps=0, generator=generator, **settings(norm))
    second = pgd(model, *batch, steps=0, generator=generator, **settings(norm))
    assert torch.equal(first, start(3))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(model, batch, context):
    expected = pgd(model, *batch, keep_best=True)
    with context():
        x_adv = pgd(model, batch[0] * 1, batch[1] * 1, keep_best=True)
        assert not torch.is_grad_enabled()
    assert torch.equal(x_adv, expected)


class NoHostRead(TorchDispatchMode):
    """Fails when a tensor's value is asked for on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a value was read back to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", NORMS)
def test_loop_reads_nothing_back_to_the_host(model, batch, norm):
    with pytest.raises(AssertionError, match="read back"), NoHostRead():
        check_pixels(batch[0])
    with NoHostRead():
        pgd(model, *batch, keep_best=True, restarts=2, num_draws=2, **settings(norm))
