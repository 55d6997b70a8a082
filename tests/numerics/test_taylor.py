"""The objective `rat_taylor`, its control `rat_direct`, and the noise on weights (T25, T26, T29, T32, T33)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from models.errors import UserError
from models.layers.explicit_batch_norm import ExplicitBatchNorm2d
from tests.numerics.taylor_cases import batch, context, gradients, nearby, objective, tiny_network
from trainers.taylor.terms import taylor_terms
from trainers.trades_terms import divergence
from trainers.weight_noise import WeightNoiseConfig, noisy_parameters, perturbed, sample_weight_noise


@pytest.mark.parametrize("kind", ["kl", "ce", "mse"])
@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_of_the_whole_loss_matches_differences(order: int, kind: str) -> None:
    model = tiny_network(nn.Softplus)
    x, y = batch()
    x_adv = nearby(x)
    subject = objective("rat_taylor", order=order, divergence=kind, sigma=0.3, eta=0.7, num_noise_samples=2)

    def loss() -> torch.Tensor:
        return subject.outer_loss(model, x, x_adv, y, context())["loss"]  # a new context: the same u

    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in model.named_parameters()}
    gradient = torch.autograd.grad(loss(), list(model.parameters()))
    slope = sum((g * d).sum() for g, d in zip(gradient, direction.values(), strict=True)).item()
    h = 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            with perturbed(model, {name: sign * h * d for name, d in direction.items()}):
                values.append(loss().item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_terms_have_the_weights_of_the_paper() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    terms = objective("rat_taylor", sigma=0.2, eta=0.4, beta=2.0).outer_loss(model, x, nearby(x), y, context())
    parts = terms["cross_entropy"] + 2 * terms["divergence"] + 0.4 * terms["taylor_first"] + 0.2 * terms["taylor_second"]
    torch.testing.assert_close(terms["loss"], parts, rtol=1e-12, atol=0)
    assert terms["taylor_first"] > 0
    assert terms["taylor_second"] > 0


def test_without_taylor_terms_it_is_trades_bit_for_bit() -> None:
    x, y = batch()
    results = []
    for name, parameters in (
        ("trades", {}),
        ("rat_taylor", {"eta": 0, "attack_noise": False}),
        ("rat_taylor", {"order": 0, "attack_noise": False}),
    ):
        model = tiny_network(nn.ReLU)
        subject = objective(name, **parameters)
        subject.prepare(model)
        scalars = subject.training_step(model, x, y, context())
        results.append((scalars["loss"], gradients(model), dict(model.named_buffers())))
    (loss, gradient, buffers), *others = results
    for other_loss, other_gradient, other_buffers in others:
        assert torch.equal(other_loss, loss)
        assert all(torch.equal(other_gradient[name], value) for name, value in gradient.items())
        assert all(torch.equal(other_buffers[name], value) for name, value in buffers.items())


@pytest.mark.parametrize("derivatives", ["exact", "nested_jvp", "antithetic"])
def test_equal_images_and_zero_noise_give_zero_terms(derivatives: str) -> None:
    x, y = batch()
    for parameters, x_adv in (({"sigma": 0.3}, x), ({"sigma": 0.0}, nearby(x))):
        model = tiny_network(nn.ReLU)
        subject = objective("rat_taylor", derivatives=derivatives, **parameters)
        subject.prepare(model)
        terms = subject.outer_loss(model, x, x_adv, y, context())
        assert terms["taylor_first"].item() == 0
        assert terms["taylor_second"].item() == pytest.approx(0, abs=0 if derivatives != "antithetic" else 1e-25)


def test_expected_first_order_term_is_the_frobenius_distance_of_the_jacobians() -> None:
    model = tiny_network(nn.Softplus, width=2).eval()
    x, _ = batch(2)
    x_adv = nearby(x)
    names = noisy_parameters(model, "conv")
    start = tuple(model.get_parameter(name).detach() for name in names)

    def difference(*weights: torch.Tensor) -> torch.Tensor:
        moved = dict(zip(names, weights, strict=True))
        return functional_call(model, moved, (x,)) - functional_call(model, moved, (x_adv,))

    jacobians = torch.autograd.functional.jacobian(difference, start)
    sigma = 0.1
    expected = sigma**2 * sum(jacobian.square().sum() for jacobian in jacobians).item() / len(x)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(300):
        u = sample_weight_noise(model, generator, sigma=sigma)
        clean, adversarial = (taylor_terms(model, images, u, order=1).first_BK for images in (x, x_adv))
        samples.append(divergence("mse", clean, adversarial).mean().item())
    samples = torch.tensor(samples)
    assert abs(samples.mean().item() - expected) < 3 * samples.std().item() / math.sqrt(len(samples))


RUNS = [
    *(("rat_taylor", {"derivatives": way, "num_noise_samples": n}) for way in ("exact", "nested_jvp", "antithetic") for n in (1, 2)),
    ("rat_surrogate", {}),
    ("label_smoothing", {}),
]


@pytest.mark.parametrize(("name", "parameters"), RUNS)
def test_running_statistics_move_through_the_two_unperturbed_passes_only(name: str, parameters: dict[str, object]) -> None:
    model = tiny_network(nn.ReLU)
    expected = copy.deepcopy(model)
    x, y = batch()
    subject = objective(name, **parameters)
    subject.prepare(model)
    x_adv = subject.attack(model, x, y, context())
    for (key, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b), f"{key}: the attack moved it"
    subject.training_step(model, x, y, context())
    expected(x)
    expected(x_adv)
    for (key, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["rat_taylor", "rat_surrogate", "rat_direct", "label_smoothing"])
def test_each_objective_runs_in_both_norms(name: str, norm: str) -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    subject = objective(name)
    subject.prepare(model)
    scalars = subject.training_step(model, x, y, context(norm=norm))
    assert all(torch.isfinite(value) for value in scalars.values())
    assert set(gradients(model)) == {key for key, _ in model.named_parameters()}


def test_the_attack_sees_noisy_weights_and_leaves_them_as_they_were() -> None:
    model = tiny_network(nn.ReLU)
    before = copy.deepcopy(model.state_dict())
    seen = []
    model.register_forward_hook(lambda module, _inputs, _output: seen.append(module.backbone.conv1.weight.detach().clone()))
    x, y = batch()
    run = context()
    objective("rat_taylor", sigma=0.1).attack(model, x, y, run)
    u = sample_weight_noise(model, context().streams.noise, sigma=0.1)["backbone.conv1.weight"]
    assert all(torch.equal(weight, before["backbone.conv1.weight"] + u) for weight in seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_noise_is_fresh_reproducible_and_leaves_the_global_generator_alone() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    subject = objective("rat_taylor", sigma=0.3)
    run = context()
    global_state = torch.random.get_rng_state()
    first, second = (subject.outer_loss(model, x, nearby(x), y, run)["taylor_first"].item() for _ in range(2))
    again = subject.outer_loss(model, x, nearby(x), y, context())["taylor_first"].item()
    assert first != second
    assert first == pytest.approx(again, rel=1e-12)
    assert torch.equal(torch.random.get_rng_state(), global_state)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3)
        self.shortcut = nn.Conv2d(40, 40, 1)
        self.norm = nn.BatchNorm2d(40)
        self.head = nn.Linear(40, 50)


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("conv", {"stem.weight", "shortcut.weight"}),
        ("conv_fc", {"stem.weight", "shortcut.weight", "head.weight"}),
        ("all", {name for name, _ in Wide().named_parameters()}),
    ],
)
def test_noise_is_in_scope_only_and_has_the_standard_deviation(scope: str, names: set[str]) -> None:
    u = sample_weight_noise(Wide(), torch.Generator().manual_seed(0), sigma=0.03, noise_scope=scope)
    assert set(u) == names
    for name in ("stem.weight", "shortcut.weight"):
        assert u[name].std().item() == pytest.approx(0.03, rel=0.05)


def test_relative_noise_follows_the_size_of_the_weights() -> None:
    model = Wide()
    with torch.no_grad():
        model.stem.weight[:20] *= 10
    per_tensor, per_filter = (
        sample_weight_noise(model, torch.Generator().manual_seed(0), sigma=0.1, sigma_mode=kind)["stem.weight"]
        for kind in ("relative", "relative_per_filter")
    )
    rms = model.stem.weight.square().mean().sqrt().item()
    assert per_tensor.std().item() == pytest.approx(0.1 * rms, rel=0.1)
    assert per_filter[:20].std().item() == pytest.approx(0.1 * model.stem.weight[:20].square().mean().sqrt().item(), rel=0.15)
    assert per_filter[20:].std().item() == pytest.approx(0.1 * model.stem.weight[20:].square().mean().sqrt().item(), rel=0.15)


def test_perturbed_restores_exactly_also_after_an_exception() -> None:
    model = tiny_network(nn.ReLU).float()
    before = copy.deepcopy(model.state_dict())
    u = sample_weight_noise(model, torch.Generator().manual_seed(0), sigma=0.123)
    with perturbed(model, u):
        assert torch.equal(model.backbone.conv1.weight, before["backbone.conv1.weight"] + u["backbone.conv1.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def fails() -> None:
        with perturbed(model, u):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_user_mistakes() -> None:
    with pytest.raises(ValidationError):
        objective("rat_taylor", order=3)
    with pytest.raises(ValidationError):
        objective("rat_taylor", sigma=-1)
    with pytest.raises(ValidationError):
        objective("rat_taylor", derivatives="double_backward")
    with pytest.raises(UserError, match="selects no weight"):
        objective("rat_taylor").prepare(nn.Linear(3, 2))
    with pytest.raises(UserError, match="synchronized"):
        objective("rat_taylor").prepare(nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)))


def test_only_nested_jvp_converts_batch_normalization() -> None:
    for derivatives, kind in (("exact", nn.BatchNorm2d), ("antithetic", nn.BatchNorm2d), ("nested_jvp", ExplicitBatchNorm2d)):
        model = tiny_network(nn.ReLU)
        objective("rat_taylor", derivatives=derivatives).prepare(model)
        assert type(model.backbone.bn1) is kind


def test_direct_is_equation_5() -> None:
    model = tiny_network(nn.ReLU)
    reference = copy.deepcopy(model)
    x, y = batch()
    x_adv = nearby(x)
    terms = objective("rat_direct", sigma=0.2, beta=3.0).outer_loss(model, x, x_adv, y, context())
    u = sample_weight_noise(reference, context().streams.noise, sigma=0.2)
    cross_entropy = functional.cross_entropy(reference(x), y)
    with perturbed(reference, u):
        kl = divergence("kl", reference(x), reference(x_adv)).mean()
    torch.testing.assert_close(terms["loss"], cross_entropy + 3 * kl, rtol=1e-12, atol=0)


def test_direct_at_noisy_weights_is_equation_2_and_counts_each_batch_once() -> None:
    x, y = batch()
    x_adv = nearby(x)
    for where in ("weights", "noisy_weights"):
        model = tiny_network(nn.ReLU)
        before = model.backbone.bn1.num_batches_tracked.item()
        terms = objective("rat_direct", sigma=0.2, beta=3.0, cross_entropy_at=where, num_noise_samples=2).outer_loss(
            model, x, x_adv, y, context()
        )
        assert model.backbone.bn1.num_batches_tracked.item() - before == 2
        torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + 3 * terms["divergence"])
    noise = context().streams.noise
    expected = []
    for _ in range(2):
        with perturbed(model, sample_weight_noise(model, noise, sigma=0.2)):
            expected.append(functional.cross_entropy(model(x), y).item())
    assert terms["cross_entropy"].item() == pytest.approx(sum(expected) / 2, rel=1e-10)


def test_direct_and_taylor_agree_for_small_noise() -> None:
    """Squared logits, averaged over u and -u: noise adds D of the first-order terms and the value times the second, up to O(sigma^4)."""
    model = tiny_network(nn.Softplus)
    x, _ = batch()
    x_adv = nearby(x)
    u = WeightNoiseConfig(sigma=1e-3).sample(model, torch.Generator().manual_seed(0))
    noisy = 0.0
    for sign in (1, -1):
        with perturbed(model, {name: sign * value for name, value in u.items()}):
            noisy += divergence("mse", model(x), model(x_adv)).mean().item() / 2
    clean, adversarial = (taylor_terms(model, images, u, order=2) for images in (x, x_adv))
    gap, bend = clean.value_BK - adversarial.value_BK, clean.second_BK - adversarial.second_BK
    added = divergence("mse", clean.first_BK, adversarial.first_BK) + (gap * bend).sum(1)
    assert noisy - gap.square().sum(1).mean().item() == pytest.approx(added.mean().item(), rel=1e-3)
