"""RNA's numbers: paths, norm identities in float64, smoothness against finite differences, Theorem 3.1's ingredients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.theory.rna_paths import (
    cosines_between_types,
    flip_layers,
    pairs_at_difference,
    path_statistics,
    random_normalizations,
    set_path,
)
from analysis.theory.smoothness import (
    batch_group_norm_squared_gradient,
    effective_smoothness,
    group_norm_squared_gradient,
    normalization_gradients,
    transfer_bound,
)
from analysis.theory.transferability import transfer, transfer_by_distance
from models import build_model
from models.layers.channel_statistics import NormalizedGroups

SMALL = {"backbone": "resnet8", "image_shape": (3, 8, 8), "num_classes": 4}


def binomial_path_difference(num_layers: int, num_types: int) -> tuple[float, float]:
    """Return mean L (1 - 1/n) and standard deviation of the difference of two uniform paths, without a model."""
    same = 1 / num_types
    return num_layers * (1 - same), math.sqrt(num_layers * same * (1 - same))


def group_norm_gradient(activation_RG: Tensor, gradient_RG: Tensor, eps: float = 0.0) -> Tensor:
    """Return the gradient at the input of a normalization over groups (Eq. 4, GN).

    Args:
        activation_RG: Y, what is normalized.
        gradient_RG: the gradient with respect to the normalized Y, i.e. gamma times the gradient at the output.
        eps: added to the variance; the paper has 0.
    """
    deviation_R1 = (activation_RG.var(dim=1, keepdim=True, correction=0) + eps).sqrt()
    normalized_RG = (activation_RG - activation_RG.mean(dim=1, keepdim=True)) / deviation_R1
    mean_R1 = gradient_RG.mean(dim=1, keepdim=True)
    along_R1 = (gradient_RG * normalized_RG).mean(dim=1, keepdim=True)
    return (gradient_RG - mean_R1 - normalized_RG * along_R1) / deviation_R1


def images(batch=4, dtype=torch.float64):
    x = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x, torch.arange(batch) % 4


def shifted(model, x, y):
    """An attack that is cheap and differs from draw to draw."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), y), x)
    return (x + 0.1 * gradient.sign()).detach().clamp(0, 1)


def trained(pool=("bn", "in")) -> nn.Module:
    """A small network whose running statistics are those of its inputs."""
    model = build_model("rna", pool=pool, **SMALL).double().train()
    x, _ = images(16)
    for index in range(len(pool)):
        set_path(model, (index,) * 9)
        for _ in range(20):
            model(x)
    return model.eval()


def path_of(model):
    """Return the choice of every random normalization."""
    return tuple(site.selected for site in random_normalizations(model))


def test_paths():
    model = build_model("rna", **SMALL)
    path = (0, 1, 0, 1, 1, 0, 0, 0, 1)
    set_path(model, path)
    assert path_of(model) == path
    generator = torch.Generator().manual_seed(0)
    for difference in range(10):
        flipped = flip_layers(path, (2,) * 9, difference, generator)
        assert sum(a != b for a, b in zip(path, flipped, strict=True)) == difference
    assert set(flip_layers((1, 1), (3, 3), 2, generator)) <= {0, 2}
    with pytest.raises(ValueError, match=r"outside \[0, 9\]"):
        flip_layers(path, (2,) * 9, 10, generator)
    with pytest.raises(ValueError, match="9 random normalizations"):
        set_path(model, (0, 1))


def test_distribution_of_the_path_difference():
    values = path_statistics(build_model("rna", backbone="resnet18", image_shape=(3, 16, 16)))
    assert values.num_paths == 2**20
    assert (values.mean, values.variance**0.5) == pytest.approx(binomial_path_difference(20, 2))
    assert (values.mean, values.variance) == pytest.approx((10, 5))
    assert values.probability_of_same_path == pytest.approx(2.0**-20)
    assert sum(values.probability_D) == pytest.approx(1)
    layer_based = path_statistics(build_model("rna", choice="per_network", pool=("bn", "in", "ln"), **SMALL))
    assert layer_based.num_paths == 3
    assert layer_based.probability_D[0] == pytest.approx(1 / 3)
    assert layer_based.probability_D[9] == pytest.approx(2 / 3)


def test_transfer_as_a_function_of_the_path_difference():
    model = trained()
    x, y = images()
    path = path_of(model)
    pairs = [pair for difference in (0, 3, 9) for pair in pairs_at_difference(model, difference, 4)]
    points = transfer_by_distance(transfer(model, x, y, shifted, pairs))
    assert [point.distance for point in points] == [0, 3, 9]
    assert all(point.num_pairs == 4 and point.minimum <= point.mean <= point.maximum for point in points)
    assert path_of(model) == path
    assert {pair.distance for pair in pairs_at_difference(model, 5, 3)} == {5.0}


def test_cosines_between_types():
    model = trained(("bn", "in", "bgn_groups_64"))
    for site in (module for module in model.modules() if hasattr(module, "branches")):
        site.branches["bgn_groups_64"].load_state_dict(site.branches["bn"].state_dict())
    cosines = cosines_between_types(model, *images())
    assert set(cosines) == {("bn", "in"), ("bn", "bgn_groups_64"), ("in", "bgn_groups_64")}
    assert cosines["bn", "bgn_groups_64"].mean == pytest.approx(1, abs=1e-9)
    assert cosines["bn", "in"].mean < 0.999


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_equations_4_and_5_against_autograd(eps):
    generator = torch.Generator().manual_seed(1)
    groups, size, gamma = 3, 8, 0.7
    y = torch.randn(2, groups * 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, groups * 2, 2, 2, generator=generator, dtype=torch.float64)
    weight = torch.full((groups * 2,), gamma, dtype=torch.float64)
    (actual,) = torch.autograd.grad(functional.group_norm(y, groups, weight, None, eps), y, g)
    rows = lambda value: value.detach().reshape(2 * groups, size)  # noqa: E731
    torch.testing.assert_close(group_norm_gradient(rows(y), gamma * rows(g), eps), rows(actual), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        group_norm_squared_gradient(rows(y), gamma * rows(g), eps), rows(actual).square().sum(1), rtol=1e-10, atol=1e-10
    )
    if eps == 0:  # Eq. 5 as the paper writes it
        normalized = (rows(y) - rows(y).mean(1, keepdim=True)) / rows(y).std(1, correction=0, keepdim=True)
        paper = (gamma / rows(y).std(1, correction=0)) ** 2 * (
            rows(g).square().sum(1) - rows(g).sum(1) ** 2 / size - (rows(g) * normalized).sum(1) ** 2 / size
        )
        torch.testing.assert_close(rows(actual).square().sum(1), paper, rtol=1e-10, atol=1e-10)
    variance = 2.0
    (tracked,) = torch.autograd.grad(
        functional.batch_norm(y, torch.zeros(6).double(), torch.full((6,), variance).double(), weight, None, eps=eps), y, g
    )
    torch.testing.assert_close(
        batch_group_norm_squared_gradient(gamma * rows(g), variance, eps), rows(tracked).square().sum(1), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("path", [(0,) * 9, (1,) * 9, (2, 3, 4, 0, 1, 2, 3, 4, 0)])
def test_gradient_norms_at_every_normalization_of_a_network(path):
    model = trained(("bn", "in", "ln", "gn_size_2", "bgn_size_2"))
    set_path(model, path)
    buffers = [buffer.clone() for buffer in model.buffers()]
    records = normalization_gradients(model, *images())
    assert len(records) == 9
    for record in records:
        torch.testing.assert_close(record.input_B, record.predicted_B, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_a_normalization_that_no_code_names_is_measured_if_it_says_what_it_does():
    class Halves(nn.Module):
        """Group normalization in two halves, without affine parameters: somebody else's."""

        def normalized_groups(self):
            return NormalizedGroups("halves", num_groups=2, eps=0.1, weight=None, running_var=None)

        def forward(self, x_BCHW):
            return functional.group_norm(x_BCHW, 2, eps=0.1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Halves(), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 4)).double().eval()
    (record,) = normalization_gradients(model, *images(3))
    assert (record.name, record.kind) == ("1", "halves")
    torch.testing.assert_close(record.input_B, record.predicted_B, rtol=1e-10, atol=1e-12)


def smooth_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 4)).double()


@pytest.mark.parametrize("layer", [None, "1"])
def test_effective_smoothness_against_finite_differences(layer):
    model = smooth_network().eval()
    x, y = images(3)
    beta_B = effective_smoothness(model, x, y, layer)
    tail = model if layer is None else model[1:]
    point = x if layer is None else model[0](x).detach()

    def losses(value):
        return functional.cross_entropy(tail(value), y, reduction="none")

    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(leaf).sum(), leaf)
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = 1e-4
    with torch.no_grad():
        second = (losses(point + step * direction) - 2 * losses(point) + losses(point - step * direction)) / step**2
    torch.testing.assert_close(beta_B, second, rtol=1e-4, atol=1e-6)


def test_effective_smoothness_of_a_random_network():
    model = trained()
    beta_B = effective_smoothness(model, *images())
    assert beta_B.shape == (4,)
    assert beta_B.isfinite().all()


def test_theorem_3_1():
    x, y = images()
    first = smooth_network().eval()
    second = copy.deepcopy(first)
    target = (y + 1) % 4
    zero = transfer_bound(first, second, x, y, target, epsilon=0.0)
    assert zero.largest_similarity == pytest.approx(1)
    assert zero.risk_a == zero.risk_b == pytest.approx(functional.cross_entropy(first(x), y).item())
    assert zero.denominator == zero.smallest_target_loss
    assert zero.bound == pytest.approx(2 * zero.risk_a / zero.smallest_target_loss)
    wide = transfer_bound(first, second, x, y, target, epsilon=100.0)
    assert wide.bound is None
    assert "no statement" in str(wide)
    with pytest.raises(ValueError, match="equals the true label"):
        transfer_bound(first, second, x, y, y, epsilon=0.1)
