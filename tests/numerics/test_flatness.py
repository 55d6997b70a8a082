"""Flatness in weight space and landscapes in input space, against closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.theory.flatness import (
    expansion_errors,
    filter_normalized_direction,
    loss_along,
    loss_under_weight_noise,
    sharpness,
    top_hessian_eigenvalue,
    weight_landscape,
)
from analysis.theory.landscape import input_landscape
from models.errors import UserError
from tests.numerics.taylor_cases import batch, tiny_network
from trainers.weight_noise import sample_weight_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quadratic(nn.Module):
    """Logits equal to the weights; with `bowl` as loss, the landscape is 1/2 w'Hw around 0."""

    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), -1)


def bowl(*curvatures: float):
    diagonal = torch.tensor(curvatures, dtype=torch.float64)
    return lambda logits, _labels: 0.5 * (diagonal * logits[0] ** 2).sum()


X, Y = torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)


def test_direction_has_the_length_of_each_filter_and_none_elsewhere() -> None:
    model = tiny_network(nn.ReLU, bias=True)
    direction = filter_normalized_direction(model, generator())
    assert set(direction) == {name for name, p in model.named_parameters() if p.ndim > 1}
    for name, d in direction.items():
        torch.testing.assert_close(d.flatten(1).norm(dim=1), model.get_parameter(name).detach().flatten(1).norm(dim=1))


def test_profiles_are_loss_values_at_the_moved_weights() -> None:
    model = Quadratic([1.0, 2.0])
    first = {"weight": torch.tensor([[1.0, 0.0]])}
    loss = bowl(2.0, 6.0)
    positions = [-1.0, 0.0, 0.5]
    torch.testing.assert_close(
        loss_along(model, X, Y, first, positions, loss), torch.tensor([(1 + a) ** 2 + 12 for a in positions], dtype=torch.float64)
    )
    assert model.weight.tolist() == [[1.0, 2.0]]


def test_weight_landscape_is_repeatable_and_meets_the_loss_in_the_middle() -> None:
    model = tiny_network(nn.ReLU)
    state = copy.deepcopy(model.state_dict())
    x, y = batch()
    positions, losses = weight_landscape(model, x, y, num_positions=5, num_directions=3, generator=generator())
    again = weight_landscape(model, x, y, num_positions=5, num_directions=3, generator=generator())[1]
    assert torch.equal(losses, again)
    assert positions.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    here = functional.cross_entropy(model.eval()(x), y)
    torch.testing.assert_close(losses[:, 2], here.expand(3))


def test_expected_loss_under_noise_of_a_quadratic() -> None:
    """E L(w + u) = L(w) + sigma^2/2 trace(H)."""
    model = Quadratic([1.0, 2.0, 0.0])
    loss, sigma = bowl(2.0, 6.0, 1.0), 0.5
    samples = loss_under_weight_noise(
        model, X, Y, sigma=sigma, sigma_mode="absolute", noise_scope="all", num_samples=2000, generator=generator(), loss=loss
    )
    expected = 13 + sigma**2 / 2 * 9
    assert abs(samples.mean().item() - expected) < 3 * samples.std().item() / math.sqrt(len(samples))


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_expansion_errors_fall_with_the_noise(batch_statistics: bool) -> None:
    model = tiny_network(nn.Softplus)
    state = copy.deepcopy(model.state_dict())
    x, _ = batch()
    errors = []
    for sigma in (1e-2, 1e-3):
        u = sample_weight_noise(model, generator(), sigma=sigma)
        errors.append(expansion_errors(model, x, u, batch_statistics=batch_statistics))
    assert errors[1].first == pytest.approx(errors[0].first / 10, rel=0.3)
    assert errors[1].second == pytest.approx(errors[0].second / 100, rel=0.5)
    assert errors[0].second < errors[0].first < 0.5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_sharpness_of_a_quadratic() -> None:
    """Along the unit gradient: rho ||g|| + rho^2/2 g'Hg/||g||^2."""
    model = Quadratic([1.0, 2.0])
    h = torch.tensor([2.0, 6.0], dtype=torch.float64)
    g = h * model.weight[0].detach()
    rho = 0.3
    expected = rho * g.norm() + rho**2 / 2 * (h * g**2).sum() / g.norm() ** 2
    assert sharpness(model, X, Y, rho=rho, loss=bowl(2.0, 6.0)) == pytest.approx(expected.item(), rel=1e-12)
    assert sharpness(Quadratic([0.0, 0.0]), X, Y, loss=bowl(2.0, 6.0)) == 0


@pytest.mark.parametrize(("curvatures", "top"), [((2.0, 6.0, 1.0), 6.0), ((-9.0, 4.0, 1.0), 4.0), ((-9.0, -4.0, -1.0), -1.0)])
def test_top_eigenvalue_is_the_most_positive_one(curvatures: tuple[float, ...], top: float) -> None:
    found = top_hessian_eigenvalue(
        Quadratic([1.0, 2.0, 3.0]), X, Y, generator=generator(), loss=bowl(*curvatures), tolerance=1e-6, max_iterations=300
    )
    assert found.converged
    assert found.value == pytest.approx(top, abs=1e-4)
    assert found.residual < 1e-4


def test_top_eigenvalue_of_a_network_is_that_of_the_full_hessian() -> None:
    model = tiny_network(nn.Softplus, width=2)
    x, y = batch()
    found = top_hessian_eigenvalue(model, x, y, generator=generator(), max_iterations=500, tolerance=1e-6)
    model.eval()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(functional.cross_entropy(model(x), y), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, parameters, retain_graph=True)]) for g in gradient]
    largest = torch.linalg.eigvalsh(torch.stack(rows))[-1].item()
    assert found.value == pytest.approx(largest, rel=1e-5)
    assert all(parameter.grad is None for parameter in parameters)


def test_iterations_that_do_not_suffice_are_said_so() -> None:
    found = top_hessian_eigenvalue(Quadratic([1.0, 2.0]), X, Y, generator=generator(), loss=bowl(2.0, 2.1), max_iterations=1)
    assert not found.converged
    assert found.iterations == 1


def test_input_landscape_axes() -> None:
    model = tiny_network(nn.ReLU)
    x, y = batch()
    grid = input_landscape(model, x[0], y[0].item(), radius=0.1, num_positions=5, generator=generator(), batch_size=7)
    assert model.training
    model.eval()
    assert set(grid.random_sign.unique().tolist()) == {-1.0, 1.0}
    leaf = x[:1].clone().requires_grad_()
    functional.cross_entropy(model(leaf), y[:1]).backward()
    assert torch.equal(grid.gradient_sign, leaf.grad[0].sign())
    for row, column in ((2, 2), (4, 2), (2, 0), (0, 3)):
        point = x[0] + grid.gradient_positions_A[row] * grid.gradient_sign + grid.random_positions_A[column] * grid.random_sign
        torch.testing.assert_close(grid.loss_AA[row, column], functional.cross_entropy(model(point[None]), y[:1]))
    assert grid.loss_AA[4, 2] > grid.loss_AA[2, 2] > grid.loss_AA[0, 2]
    assert grid.rise >= (grid.loss_AA[4, 2] - grid.loss_AA[2, 2]).item()


def test_a_linear_loss_has_no_roughness_and_clamping_bends_it() -> None:
    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sum(1, keepdim=True)

    image = torch.full((1, 2, 2), 0.05, dtype=torch.float64)
    plain, clamped = (
        input_landscape(
            Linear(), image, 0, radius=0.1, num_positions=9, generator=generator(), loss=lambda logits, _y: logits[:, 0], clamp_pixels=clamp
        )
        for clamp in (False, True)
    )
    assert plain.roughness == pytest.approx(0, abs=1e-9)
    assert clamped.roughness > 0.1


def test_even_grids_are_an_error() -> None:
    with pytest.raises(UserError, match="odd number"):
        input_landscape(tiny_network(), torch.zeros(3, 8, 8).double(), 0, num_positions=4, generator=generator())
