"""How flat the loss is in weight space around a trained network.

All quantities are taken in eval mode at the draw that the model holds, for one batch of images (pass adversarial images and get the
adversarial landscape), with cross-entropy in nats unless another loss is given. Weights, modes and running statistics are as before
afterwards.

Shapes: R directions or samples, A positions along a direction, P number of parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import UserError
from models.modes import mode
from models.randomness import frozen
from trainers.taylor.terms import Derivatives, taylor_terms
from trainers.weight_noise import NoiseScope, SigmaMode, perturbed, sample_weight_noise

Direction = Mapping[str, Tensor]
BatchLoss = Callable[[Tensor, Tensor], Tensor]
"""`(logits_BK, y_B) -> scalar`, the mean over the batch."""


def filter_normalized_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a Gaussian direction in which each filter has the length of the model's filter: comparable between networks.

    A filter is what produces one output channel (a row of the weight tensor). Biases and normalization parameters have no direction.

    Reference: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, section 4.
    """
    direction = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            draw = torch.randn(parameter.shape, generator=generator, device=generator.device, dtype=parameter.dtype).to(parameter.device)
            axes = tuple(range(1, parameter.ndim))
            lengths = draw.square().sum(axes, keepdim=True).sqrt()
            wanted = parameter.square().sum(axes, keepdim=True).sqrt()
            direction[name] = draw * (wanted / lengths)
    return direction


@torch.no_grad()
def loss_along(
    model: nn.Module, x: Tensor, y: Tensor, direction: Direction, positions: Sequence[float], loss: BatchLoss = functional.cross_entropy
) -> Tensor:
    """Return the loss at w + a d for each a in `positions`, (A,)."""
    with _at_rest(model):
        losses = [_loss_at(model, x, y, {name: a * d for name, d in direction.items()}, loss) for a in positions]
    return torch.stack(losses)


def weight_landscape(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    radius: float = 1.0,
    num_positions: int = 21,
    num_directions: int = 10,
    generator: torch.Generator,
    loss: BatchLoss = functional.cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Return positions (A,) from -radius to radius and the loss along random filter-normalized directions, (R, A).

    Radius 1 moves each filter by its own length. Reference: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization",
    NeurIPS 2020, section 3.
    """
    positions = torch.linspace(-radius, radius, num_positions, dtype=torch.float64)
    directions = [filter_normalized_direction(model, generator) for _ in range(num_directions)]
    losses = [loss_along(model, x, y, direction, positions.tolist(), loss) for direction in directions]
    return positions, torch.stack(losses)


@torch.no_grad()
def loss_under_weight_noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    sigma_mode: SigmaMode = "relative",
    noise_scope: NoiseScope = "all",
    num_samples: int = 20,
    generator: torch.Generator,
    loss: BatchLoss = functional.cross_entropy,
) -> Tensor:
    """Return the loss at w + u for independent u ~ N(0, sigma^2), (R,); its mean estimates E_u L(w + u).

    The scope and the scale of u are those of `trainers.weight_noise`.
    """
    with _at_rest(model):
        losses = []
        for _ in range(num_samples):
            u = sample_weight_noise(model, generator, sigma=sigma, sigma_mode=sigma_mode, noise_scope=noise_scope)
            losses.append(_loss_at(model, x, y, u, loss))
    return torch.stack(losses)


@dataclass(frozen=True)
class ExpansionErrors:
    """Relative errors of the Taylor expansions of the change of the logits, g(w + u) - g(w), for one u.

    Attributes:
        first: ||change - d1|| / ||change||: far below 1 where the network is close to linear in u.
        second: ||change - d1 - d2 / 2|| / ||change||.
    """

    first: float
    second: float


@torch.no_grad()
def expansion_errors(
    model: nn.Module, x: Tensor, u: Direction, *, batch_statistics: bool = False, derivatives: Derivatives = "exact"
) -> ExpansionErrors:
    """Return how well first and second derivatives along u predict what w + u does to the logits.

    Args:
        u: noise by parameter name, e.g. of `trainers.weight_noise.sample_weight_noise`.
        batch_statistics: normalize by the statistics of x, as in training, instead of the running ones.
        derivatives: as in `trainers.taylor.terms`.
    """
    with frozen(model), mode(model, "train_without_update" if batch_statistics else "eval"):
        terms = taylor_terms(model, x, u, order=2, derivatives=derivatives, update_statistics=False)
        assert terms.second_BK is not None
        with perturbed(model, dict(u)):
            change = model(x) - terms.value_BK
        length = change.norm()
        first = change - terms.first_BK
        return ExpansionErrors((first.norm() / length).item(), ((first - terms.second_BK / 2).norm() / length).item())


def sharpness(model: nn.Module, x: Tensor, y: Tensor, *, rho: float = 0.05, loss: BatchLoss = functional.cross_entropy) -> float:
    """Return L(w + rho g / ||g||) - L(w) with g the gradient at w: the first-order maximum over a Euclidean ball.

    Args:
        rho: radius in weight space, over all trained parameters together.

    Reference: Foret et al., "Sharpness-Aware Minimization", ICLR 2021, Eq. 2 and 3.
    """
    with _at_rest(model):
        parameters = _trained(model)
        value = loss(model(x), y)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        used = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
        length = _norm(used.values())
        if length == 0:
            return 0.0
        with torch.no_grad():
            risen = _loss_at(model, x, y, {name: (rho / length) * g for name, g in used.items()}, loss)
    return (risen - value).item()


@dataclass(frozen=True)
class TopEigenvalue:
    """An eigenvalue of the Hessian, found by power iteration.

    Attributes:
        value: the estimate (Rayleigh quotient).
        residual: ||H v - value v|| for the unit vector v: some eigenvalue lies within this distance of `value`.
        iterations: Hessian-vector products used.
        converged: whether the residual is below the tolerance.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def top_hessian_eigenvalue(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    loss: BatchLoss = functional.cross_entropy,
) -> TopEigenvalue:
    """Return the largest (most positive) eigenvalue of the Hessian of the loss with respect to all trained parameters.

    Power iteration finds the eigenvalue of largest magnitude; if that is negative, a second run on the Hessian shifted by it finds
    the largest one.

    Args:
        generator: source of the start vector.
        max_iterations: Hessian-vector products of each run.
        tolerance: relative to the eigenvalue's magnitude.
    """
    if max_iterations < 1:
        raise UserError(f"max_iterations is {max_iterations}; it must be at least 1")
    with _at_rest(model), torch.enable_grad():
        parameters = list(_trained(model).values())
        gradients = torch.autograd.grad(loss(model(x), y), parameters, create_graph=True, allow_unused=True)
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return TopEigenvalue(0.0, 0.0, 0, True)
        used = [p for p, _ in pairs]

        def product(vectors: list[Tensor]) -> list[Tensor]:
            inner = _inner_product([g for _, g in pairs], vectors)
            result = torch.autograd.grad(inner, used, retain_graph=True, allow_unused=True)
            return [torch.zeros_like(p) if r is None else r.detach() for p, r in zip(used, result, strict=True)]

        def start() -> list[Tensor]:
            return [torch.randn(p.shape, generator=generator, device=generator.device, dtype=p.dtype).to(p.device) for p in used]

        found = _power_iteration(product, start(), 0.0, max_iterations, tolerance)
        if found.value >= 0:
            return found
        shifted = _power_iteration(product, start(), found.value, max_iterations, tolerance)
        return TopEigenvalue(shifted.value, shifted.residual, found.iterations + shifted.iterations, shifted.converged)


def _inner_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def _power_iteration(
    product: Callable[[list[Tensor]], list[Tensor]], start: list[Tensor], shift: float, max_iterations: int, tolerance: float
) -> TopEigenvalue:
    """Return the eigenvalue of H that is farthest from `shift`."""
    vector = _scaled(start, 1 / _norm(start))
    value, residual = 0.0, math.inf
    for iteration in range(1, max_iterations + 1):
        image = product(vector)
        value = _inner_product(image, vector).item()
        residual = _norm([a - value * b for a, b in zip(image, vector, strict=True)])
        moved = [a - shift * b for a, b in zip(image, vector, strict=True)]
        length = _norm(moved)
        if residual <= tolerance * max(abs(value), abs(shift)) or length == 0:
            return TopEigenvalue(value, residual, iteration, True)
        vector = _scaled(moved, 1 / length)
    return TopEigenvalue(value, residual, max_iterations, False)


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    with frozen(model), mode(model, "eval"):
        yield


def _loss_at(model: nn.Module, x: Tensor, y: Tensor, offset: Direction, loss: BatchLoss) -> Tensor:
    with perturbed(model, dict(offset)):
        return loss(model(x), y)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _norm(tensors: object) -> float:
    return math.sqrt(sum(tensor.detach().square().sum().item() for tensor in tensors))  # type: ignore[attr-defined]


def _scaled(tensors: list[Tensor], factor: float) -> list[Tensor]:
    return [tensor * factor for tensor in tensors]
