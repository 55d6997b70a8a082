"""Projected gradient descent against torchattacks, a naive loop and closed forms, and what it must not touch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import UserError
from models.randomness import RandomModule, frozen, resample, seed_streams
from trainers.attacks import check_pixels, cross_entropy, input_gradient, margin, pgd
from trainers.precision import Precision

EPSILONS = {"linf": 8 / 255, "l2": 0.5}
STEP_SIZES = {"linf": 2 / 255, "l2": 0.15}
NORMS = tuple(EPSILONS)


class SmallNet(nn.Module):
    """Smooth, so that rounding decides no sign; with batch norm, so that there are buffers to leave alone."""

    def __init__(self, channels: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Softplus(beta=5),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Noise(RandomModule):
    """Adds its draw, one number per pixel position, to the image and counts the draws it has taken."""

    def __init__(self, std: float = 0.3) -> None:
        super().__init__()
        self.std = std
        self.num_taken = 0
        self.seen: list[Tensor] = []
        self.register_draw("noise", torch.zeros(1, 1, 8, 8, dtype=torch.float64))
        self.take_first_draw()

    @property
    def num_configurations(self) -> float:
        return math.inf

    def draw(self, generator: torch.Generator) -> None:
        self.num_taken += 1
        self.set_draw("noise", self.std * torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.noise.clone())
        return x + self.noise


class Shift(nn.Module):
    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class GradientOf(nn.Module):
    """Logits (0, <x, weights>), whose cross-entropy gradient for label 0 is a positive multiple of `weights`."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        score_B = (x * self.weights).flatten(1).sum(dim=1)
        return torch.stack([torch.zeros_like(score_B), score_B], dim=1)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0, 1, 2, 3])


@pytest.fixture
def model() -> nn.Module:
    return SmallNet().double().eval()


@pytest.fixture
def noisy_model() -> nn.Module:
    noisy = nn.Sequential(Noise(), SmallNet()).double().eval()
    seed_streams(noisy, 7)
    return noisy


def settings(norm: str) -> dict:
    return {"norm": norm, "epsilon": EPSILONS[norm], "step_size": STEP_SIZES[norm]}


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    order = math.inf if norm == "linf" else 2
    return torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)


def naive_pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, norm: str, steps: int) -> Tensor:
    """One image at a time, by the definition."""
    epsilon, step_size = EPSILONS[norm], STEP_SIZES[norm]
    results = []
    for index in range(len(x)):
        clean, point = x[index], start[index]
        for _ in range(steps):
            point = point.detach().requires_grad_()
            loss = functional.cross_entropy(model(point.unsqueeze(0)), y[index : index + 1])
            (gradient,) = torch.autograd.grad(loss, point)
            with torch.no_grad():
                if norm == "linf":
                    point = point + step_size * torch.sign(gradient)
                    point = torch.minimum(torch.maximum(point, clean - epsilon), clean + epsilon)
                else:
                    point = point + step_size * gradient / gradient.norm()
                    length = (point - clean).norm()
                    if length > epsilon:
                        point = clean + (point - clean) * epsilon / length
                point = point.clamp(0, 1)
        results.append(point.detach())
    return torch.stack(results)


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
