"""Derivatives of the logits along a direction in weight space, against independent references (T22 to T24, T27, T28, T30, T31)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import build_model
from models.errors import UserError
from models.layers.explicit_batch_norm import make_batch_norm_explicit
from models.modes import mode
from tests.numerics.taylor_cases import NUM_CLASSES, batch, flat, gaussian_direction, relative_error, tiny_network
from trainers.taylor.terms import TaylorTerms, taylor_terms

FIRST_STENCIL = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
SECOND_STENCIL = {0: -205 / 72, 1: 8 / 5, 2: -1 / 5, 3: 8 / 315, 4: -1 / 560}


def convolutions(name: str) -> bool:
    return "conv" in name and name.endswith("weight")


def everything(name: str) -> bool:
    return True


def cotangents(size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, NUM_CLASSES, dtype=torch.float64, generator=generator) for _ in range(3)]


def parts(terms: TaylorTerms) -> list[Tensor]:
    return [part for part in (terms.value_BK, terms.first_BK, terms.second_BK) if part is not None]


def weight_gradients(terms: TaylorTerms, model: nn.Module) -> list[Tensor]:
    """Return the gradient of each part, contracted with a fixed cotangent, with respect to all weights, as vectors."""
    parameters = list(model.parameters())
    results = []
    for part, cotangent in zip(parts(terms), cotangents(len(terms.value_BK)), strict=False):
        # The term without effect gives every part a graph: a second derivative may be constant in the weights.
        inner = (part * cotangent.to(part.device)).sum() + 0 * parameters[0].sum()
        gradients = torch.autograd.grad(inner, parameters, retain_graph=True, allow_unused=True)
        results.append(flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]))
    return results


def by_differences(model: nn.Module, x: Tensor, u: dict[str, Tensor], h: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return derivatives along u and their weight gradients, by eighth-order central differences of plain forward and backward passes."""
    parameters = dict(model.named_parameters())
    sides = cotangents(len(x))

    def at(t: float) -> tuple[Tensor, list[Tensor]]:
        moved = {name: (p + t * u[name] if name in u else p).detach().requires_grad_() for name, p in parameters.items()}
        with mode(model, "train_without_update" if model.training else "eval"):
            logits = functional_call(model, moved, (x,))
        gradients = [flat(torch.autograd.grad((logits * side).sum(), list(moved.values()), retain_graph=True)) for side in sides]
        return logits.detach(), gradients

    points = {k: at(k * h) for k in range(-4, 5)}

    def first(pick: Callable[[tuple[Tensor, list[Tensor]]], Tensor]) -> Tensor:
        return sum(c * (pick(points[k]) - pick(points[-k])) for k, c in FIRST_STENCIL.items()) / h

    def second(pick: Callable[[tuple[Tensor, list[Tensor]]], Tensor]) -> Tensor:
        total = SECOND_STENCIL[0] * pick(points[0])
        return (total + sum(c * (pick(points[k]) + pick(points[-k])) for k, c in SECOND_STENCIL.items() if k)) / h**2

    values = [points[0][0], first(lambda p: p[0]), second(lambda p: p[0])]
    return values, [points[0][1][0], first(lambda p: p[1][1]), second(lambda p: p[1][2])]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scope", [convolutions, everything])
@pytest.mark.parametrize("train", [True, False])
def test_exact_matches_high_order_differences_on_a_smooth_network(train: bool, scope: Callable[[str], bool], order: int) -> None:
    model = tiny_network(nn.Softplus, bias=True).train(train)
    x, _ = batch()
    u = gaussian_direction(model, 0.05, only=scope)
    terms = taylor_terms(model, x, u, order=order, update_statistics=False)
    values, gradients = parts(terms), weight_gradients(terms, model)
    candidates = [by_differences(model, x, u, h) for h in (0.08, 0.06, 0.04, 0.03, 0.02)]
    for index in range(order + 1):
        assert min(relative_error(values[index], candidate[0][index]) for candidate in candidates) < 1e-10
        assert min(relative_error(gradients[index], candidate[1][index]) for candidate in candidates) < 1e-10


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("derivatives", ["exact", "nested_jvp"])
@pytest.mark.parametrize("scope", [convolutions, everything])
@pytest.mark.parametrize("train", [True, False])
def test_relu_network_matches_nested_autograd(train: bool, scope: Callable[[str], bool], derivatives: str, order: int) -> None:
    model = tiny_network(nn.ReLU, bias=True).train(train)
    reference = copy.deepcopy(model)
    make_batch_norm_explicit(reference)
    subject = model if derivatives == "exact" else reference
    x, _ = batch()
    u = gaussian_direction(model, 0.3, only=scope)
    expected = taylor_terms(reference, x, u, order=order, derivatives="double_backward", update_statistics=False)
    terms = taylor_terms(subject, x, u, order=order, derivatives=derivatives, update_statistics=False)
    for a, b in zip(parts(terms), parts(expected), strict=True):
        assert relative_error(a, b) < 1e-10
    for a, b in zip(weight_gradients(terms, subject), weight_gradients(expected, reference), strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("order", [1, 2])
def test_float32_stays_near_the_float64_reference(order: int) -> None:
    model = tiny_network(nn.ReLU)
    x, _ = batch()
    u = gaussian_direction(model, 0.3, only=convolutions)
    expected = taylor_terms(model, x, u, order=order, update_statistics=False)
    expected_gradients = weight_gradients(expected, model)
    single = copy.deepcopy(model).float()
    terms = taylor_terms(single, x.float(), {name: value.float() for name, value in u.items()}, order=order, update_statistics=False)
    for a, b in zip(parts(terms), parts(expected), strict=True):
        assert relative_error(a, b) < 1e-4
    for a, b in zip(weight_gradients(terms, single), expected_gradients, strict=True):
        assert relative_error(a, b) < 1e-4


BACKBONES = ["resnet8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("preact_resnet18", "vgg16", "mobilenet_v2", "wrn16_4"))]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_exact_knows_the_paper_s_architectures(backbone: str, order: int) -> None:
    size = 8 if backbone == "resnet8" else 16
    model = build_model("rat", backbone=backbone, num_classes=NUM_CLASSES, image_shape=(3, size, size)).double().train()
    reference = copy.deepcopy(model)
    make_batch_norm_explicit(reference)
    x = torch.rand(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = gaussian_direction(model, 0.01, only=lambda name: model.get_parameter(name).ndim == 4)
    expected = taylor_terms(reference, x, u, order=order, derivatives="nested_jvp", update_statistics=False)
    terms = taylor_terms(model, x, u, order=order, update_statistics=False)
    for a, b in zip(parts(terms), parts(expected), strict=True):
        assert relative_error(a, b) < 1e-9  # the depth of the network amplifies rounding: 1e-12 in small ones
    ours, theirs = (flat(weight_gradients(t, m)) for t, m in ((terms, model), (expected, reference)))
    assert relative_error(ours, theirs) < 1e-9


class Chain(nn.Module):
    """A convolution, one operation, and a classifier; the operation is the one under test."""

    def __init__(self, operation: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.operation = operation
            self.classifier = nn.LazyLinear(NUM_CLASSES)
            self.double()
            self(torch.rand(2, 3, 8, 8, dtype=torch.float64))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.operation(self.conv(x)).flatten(1))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.sigmoid(x) - 0.5 * x) / 2 + (1 - x)


OPERATIONS = [
    nn.SiLU(),
    nn.GELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(beta=2.0, threshold=0.3),
    nn.LeakyReLU(0.1),
    nn.ReLU6(),
    nn.Hardtanh(-0.3, 0.4),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d(2, ceil_mode=True),
    nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d(2),
    nn.Dropout(0.0),
    nn.Conv2d(4, 4, 3, groups=4, stride=2),
    Gate(),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda module: type(module).__name__)
def test_rules_of_single_operations(operation: nn.Module) -> None:
    model = Chain(operation)
    x, _ = batch()
    u = gaussian_direction(model, 0.3)
    expected = taylor_terms(model, x, u, order=2, derivatives="double_backward")
    terms = taylor_terms(model, x, u, order=2)
    for a, b in zip(parts(terms), parts(expected), strict=True):
        assert relative_error(a, b) < 1e-10
    for a, b in zip(weight_gradients(terms, model), weight_gradients(expected, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("operation", [nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding="same")])
def test_unknown_operations_are_errors_and_never_wrong_numbers(operation: nn.Module) -> None:
    x, _ = batch()
    model = Chain(operation)
    with pytest.raises(UserError, match="no rule"):
        taylor_terms(model, x, gaussian_direction(model, 0.1), order=1)


class Operator(nn.Module):
    """Something that Python's operators do to a tensor."""

    def __init__(self, operator: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Any:
        return self.operator(x)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x[torch.arange(len(x))],
        lambda x: torch.stack(list(x)),
        lambda x: x**2,
        lambda x: x @ x,
        abs,
        lambda x: 1 / x,
        lambda x: x * (x > 0),
        lambda x: x if x.mean() else -x,
        lambda x: x * (x == 0),
        lambda x: x * float(x.mean()),
        lambda x: x % 2,
    ],
)
def test_operators_without_a_rule_are_errors(operator: Callable[[Tensor], Any]) -> None:
    x, _ = batch()
    model = Chain(Operator(operator))
    with pytest.raises(UserError, match="no rule"):
        taylor_terms(model, x, gaussian_direction(model, 0.1), order=1)


@pytest.mark.parametrize("derivatives", ["nested_jvp", "double_backward"])
def test_fused_normalization_raises_in_train_mode(derivatives: str) -> None:
    x, _ = batch()
    model = tiny_network()
    u = gaussian_direction(model, 0.1)
    with pytest.raises(UserError, match="ExplicitBatchNorm2d"):
        taylor_terms(model, x, u, order=1, derivatives=derivatives)
    taylor_terms(model.eval(), x, u, order=1, derivatives=derivatives)
    with pytest.raises(UserError, match="layer_norm"):
        taylor_terms(Chain(nn.LayerNorm(8)), x, gaussian_direction(Chain(nn.LayerNorm(8)), 0.1), order=1, derivatives=derivatives)


def test_canary_for_the_upstream_defect() -> None:
    """The guard exists because of this. When PyTorch mends it, this test fails, and the guard may go."""
    model = tiny_network(nn.Softplus)
    reference = copy.deepcopy(model)
    make_batch_norm_explicit(reference)
    x, _ = batch()
    u = gaussian_direction(model, 0.3, only=convolutions)

    def first(network: nn.Module) -> tuple[Tensor, Tensor]:
        parameters = dict(network.named_parameters())

        def logits(t: Tensor) -> Tensor:
            return functional_call(network, {name: parameters[name] + t * value for name, value in u.items()}, (x,))

        zero = torch.zeros((), dtype=x.dtype)
        with mode(network, "train_without_update"):
            _, derivative = torch.func.jvp(logits, (zero,), (torch.ones_like(zero),))
        gradient = torch.autograd.grad((derivative * cotangents(len(x))[1]).sum(), list(network.parameters()), allow_unused=True)
        return derivative, flat([g for g in gradient if g is not None])

    (value, gradient), (right_value, right_gradient) = first(model), first(reference)
    assert relative_error(value, right_value) < 1e-10
    assert relative_error(gradient, right_gradient) > 1e-3, "upstream defect is gone: jvp through fused batch normalization is right"


class LinearInWeights(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            widths = [3, *([5] * (layers - 1)), NUM_CLASSES]
            self.layers = nn.Sequential(*(nn.Conv2d(a, b, 3, bias=False) for a, b in itertools.pairwise(widths))).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


def test_a_model_linear_in_its_weights_has_no_second_derivative() -> None:
    model = LinearInWeights(1)
    x, _ = batch()
    u = gaussian_direction(model, 0.5)
    terms = taylor_terms(model, x, u, order=2)
    torch.testing.assert_close(terms.first_BK, functional_call(model, u, (x,)), rtol=1e-12, atol=1e-14)
    assert torch.equal(terms.second_BK, torch.zeros_like(terms.second_BK))


def test_antithetic_is_exact_for_a_model_quadratic_in_its_weights() -> None:
    model = LinearInWeights(2)
    x, _ = batch()
    u = gaussian_direction(model, 0.5)
    exact, differences = (taylor_terms(model, x, u, order=2, derivatives=way) for way in ("exact", "antithetic"))
    for a, b in zip(parts(differences), parts(exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    for a, b in zip(weight_gradients(differences, model), weight_gradients(exact, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_antithetic_error_falls_with_the_square_of_sigma_on_a_smooth_network() -> None:
    model = tiny_network(nn.Softplus).eval()
    x, _ = batch()
    errors = []
    for sigma in (1e-1, 1e-2, 1e-3):
        u = gaussian_direction(model, sigma, only=convolutions)
        exact, differences = (taylor_terms(model, x, u, order=1, derivatives=way) for way in ("exact", "antithetic"))
        errors.append(relative_error(differences.first_BK, exact.first_BK))
    for larger, smaller in itertools.pairwise(errors):
        assert 0.5e-2 < smaller / larger < 2e-2


def test_relu_antithetic_first_order_agrees_only_for_tiny_noise() -> None:
    """With ReLU the differences see kinks; below the distance to the nearest one they agree with the derivative (T23)."""
    model = tiny_network(nn.ReLU).eval()
    x, _ = batch()
    errors = {}
    for sigma in (1e-1, 1e-7):
        u = gaussian_direction(model, sigma, only=convolutions)
        exact, differences = (taylor_terms(model, x, u, order=1, derivatives=way) for way in ("exact", "antithetic"))
        errors[sigma] = relative_error(differences.first_BK, exact.first_BK)
    assert errors[1e-7] < 1e-3 < errors[1e-1]


def test_residuals_of_the_expansions_scale_as_their_order_says() -> None:
    model = tiny_network(nn.Softplus)
    x, _ = batch()
    residuals = []
    for sigma in (1e-2, 1e-3):
        u = gaussian_direction(model, sigma, only=convolutions)
        terms = taylor_terms(model, x, u, order=2, update_statistics=False)
        parameters = dict(model.named_parameters())
        with mode(model, "train_without_update"):
            moved = functional_call(model, {name: parameters[name] + value for name, value in u.items()}, (x,))
        first = terms.value_BK + terms.first_BK
        residuals.append([(moved - sum_).norm().item() for sum_ in (terms.value_BK, first, first + terms.second_BK / 2)])
    for power, (larger, smaller) in enumerate(zip(*residuals, strict=True), start=1):
        assert math.log10(larger / smaller) == pytest.approx(power, abs=0.1)


def test_first_order_alone_equals_the_first_of_two() -> None:
    model = tiny_network(nn.ReLU)
    x, _ = batch()
    u = gaussian_direction(model, 0.3)
    one, two = (taylor_terms(model, x, u, order=order, update_statistics=False) for order in (1, 2))
    assert one.second_BK is None
    torch.testing.assert_close(one.first_BK, two.first_BK, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("derivatives", ["exact", "nested_jvp", "antithetic", "double_backward"])
@pytest.mark.parametrize("update", [True, False])
def test_running_statistics_take_in_the_unperturbed_pass_once_or_never(derivatives: str, update: bool) -> None:
    model = tiny_network(nn.ReLU)
    if derivatives in ("nested_jvp", "double_backward"):
        make_batch_norm_explicit(model)
    expected = copy.deepcopy(model)
    x, _ = batch()
    if update:
        expected(x)
    taylor_terms(model, x, gaussian_direction(model, 0.3), order=2, derivatives=derivatives, update_statistics=update)
    assert model.training
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_gpu_agrees_with_the_cpu(channels_last: bool) -> None:
    model = tiny_network(nn.ReLU)
    x, _ = batch()
    u = gaussian_direction(model, 0.3, only=convolutions)
    expected = taylor_terms(model, x, u, order=2, update_statistics=False)
    expected_gradients = weight_gradients(expected, model)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    device_model = copy.deepcopy(model).to("cuda", memory_format=layout)
    noise = {name: value.cuda() for name, value in u.items()}
    terms = taylor_terms(device_model, x.cuda().contiguous(memory_format=layout), noise, order=2, update_statistics=False)
    for a, b in zip(parts(terms), parts(expected), strict=True):
        assert relative_error(a.cpu(), b) < 1e-10
    for a, b in zip(weight_gradients(terms, device_model), expected_gradients, strict=True):
        assert relative_error(a.cpu(), b) < 1e-10
