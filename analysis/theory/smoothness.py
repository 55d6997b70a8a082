"""Gradient norms and smoothness of normalized networks: Eq. 4 to 6 and the ingredients of Theorem 3.1 of the RNA paper.

Shapes: B batch, R rows (one group of one example each), G elements of a group. Everything is measured in eval mode, where examples do not
influence one another.
Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.theory.transferability import cosine_per_example, undisturbed
from models.layer_replacement import get_module
from models.layers.channel_statistics import NormalizedGroups, normalized_groups
from models.modes import mode


def group_norm_squared_gradient(activation_RG: Tensor, gradient_RG: Tensor, eps: float = 0.0) -> Tensor:
    """Return the squared norm (R,) of that gradient in closed form (Eq. 5, GN).

    For eps = 0 it is (|g|^2 - <1, g>^2 / G - <g, Yhat>^2 / G) / sigma^2. With eps, |Yhat|^2 is below G and the last term counts
    2 - |Yhat|^2 / G times.
    """
    normalized_RG, deviation_R1 = _normalized(activation_RG, eps)
    size = activation_RG.shape[1]
    factor_R = 2 - normalized_RG.square().mean(dim=1)
    along_R = (gradient_RG * normalized_RG).sum(dim=1)
    reduced_R = gradient_RG.square().sum(1) - gradient_RG.sum(1).square() / size - factor_R * along_R.square() / size
    return reduced_R / deviation_R1[:, 0].square()


def batch_group_norm_squared_gradient(gradient_RG: Tensor, variance: Tensor | float, eps: float = 0.0) -> Tensor:
    """Return the squared norm (R,) of the gradient at the input of a normalization by tracked statistics (Eq. 5, BGN)."""
    return gradient_RG.square().sum(dim=1) / (variance + eps)


def _normalized(activation_RG: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred_RG = activation_RG - activation_RG.mean(dim=1, keepdim=True)
    deviation_R1 = (centred_RG.square().mean(dim=1, keepdim=True) + eps).sqrt()
    return centred_RG / deviation_R1, deviation_R1


@dataclass(frozen=True)
class NormalizationGradient:
    """Gradient norms at one normalization layer, per example.

    Attributes:
        name: dotted name. kind: e.g. `in`, `bn`.
        output_B: norm of the gradient at the layer's output. input_B: at its input, by autograd. predicted_B: the same by Eq. 5.
    """

    name: str
    kind: str
    output_B: Tensor
    input_B: Tensor
    predicted_B: Tensor


def normalization_gradients(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> list[NormalizationGradient]:
    """Return the gradient norms at every normalization that the model's current draw uses, in forward order.

    Raises:
        ValueError: no layer was used of which `normalized_groups` knows what it normalizes (draws per example use none).
    """
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.append((name, module, inputs[0], output)))
        for name, module in model.named_modules()
        if normalized_groups(module) is not None
    ]
    try:
        with undisturbed(model), torch.enable_grad():
            loss = functional.cross_entropy(model(x_BCHW.detach().requires_grad_()), y_B, reduction="sum")
            if not seen:
                raise ValueError("the model uses no BatchNorm2d and no normalization of the RNA family in this draw")
            upstream = torch.autograd.grad(loss, [output for *_, output in seen])
            records = []
            for (name, module, inputs, _), gradient in zip(list(seen), upstream, strict=True):
                leaf = inputs.detach().requires_grad_()
                (at_input,) = torch.autograd.grad(module(leaf), leaf, gradient)
                groups = normalized_groups(module)
                assert groups is not None
                predicted_B = _predicted_lengths(groups, leaf.detach(), gradient)
                records.append(NormalizationGradient(name, groups.kind, _lengths(gradient), _lengths(at_input), predicted_B))
    finally:
        for handle in handles:
            handle.remove()
    return records


def _predicted_lengths(groups: NormalizedGroups, activation_BCHW: Tensor, gradient_BCHW: Tensor) -> Tensor:
    if groups.weight is not None:
        gradient_BCHW = gradient_BCHW * groups.weight[:, None, None]
    batch = len(activation_BCHW)
    rows = batch * groups.num_groups
    gradient_RG = gradient_BCHW.reshape(rows, -1)
    if groups.running_var is None:
        squared_R = group_norm_squared_gradient(activation_BCHW.reshape(rows, -1), gradient_RG, groups.eps)
    else:
        squared_R = batch_group_norm_squared_gradient(gradient_RG, groups.running_var.repeat(batch), groups.eps)
    return squared_R.view(batch, groups.num_groups).sum(dim=1).clamp_min(0).sqrt()


def effective_smoothness(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, layer: str | None = None) -> Tensor:
    """Return v' H v per example, H the Hessian of the cross-entropy and v the normalized gradient (left side of Eq. 6).

    Args:
        layer: dotted name of a module; derivatives are taken with respect to its input. None: with respect to the image.

    Returns:
        (B,), may be negative; 0 where the gradient vanishes.
    """
    captured: list[Tensor] = []
    handle = None
    if layer is not None:
        handle = get_module(model, layer).register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    try:
        with undisturbed(model), torch.enable_grad():
            image = x_BCHW.detach().requires_grad_()
            loss = functional.cross_entropy(model(image), y_B, reduction="sum")
            point = captured[0] if layer is not None else image
            return _curvature_along_gradient(loss, point)[1]
    finally:
        if handle is not None:
            handle.remove()


def _curvature_along_gradient(loss: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient at `point` and v' H v per example."""
    (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
    lengths_B = _lengths(gradient.detach())
    shape = (-1, *(1 for _ in point.shape[1:]))
    direction = gradient.detach() / lengths_B.clamp_min(torch.finfo(gradient.dtype).tiny).view(shape)
    if not gradient.requires_grad:  # a network that is linear up to the loss's own constant
        return gradient.detach(), torch.zeros_like(lengths_B)
    (product,) = torch.autograd.grad(gradient, point, direction, allow_unused=True)
    if product is None:
        return gradient.detach(), torch.zeros_like(lengths_B)
    return gradient.detach(), (product * direction).flatten(1).sum(dim=1)


@dataclass(frozen=True)
class TransferBound:
    """The ingredients of Theorem 3.1 (Eq. 7) for two networks or two draws a and b, measured on a batch.

    Attributes:
        risk_a, risk_b: empirical risks, mean cross-entropy on the true labels.
        smallest_target_loss: min over images and networks of the loss on the attack's target label.
        largest_gradient: max over images, labels and networks of the 2-norm of the input gradient.
        largest_similarity: S-bar, the largest gradient cosine of an image.
        smoothness: the larger effective beta, max over images and labels of v' H v.
        epsilon: 2-norm radius.
        denominator: of Eq. 7.
        bound: of the transfer rate, or None where the denominator is not positive: then the theorem says nothing.
    """

    risk_a: float
    risk_b: float
    smallest_target_loss: float
    largest_gradient: float
    largest_similarity: float
    smoothness: float
    epsilon: float
    denominator: float
    bound: float | None

    def __str__(self) -> str:
        claim = "no statement: the denominator is not positive" if self.bound is None else f"T <= {self.bound:.4g}"
        return (
            f"Theorem 3.1 at |delta|_2 <= {self.epsilon:.4g}: {claim} (risks {self.risk_a:.4g} + {self.risk_b:.4g}, smallest target loss "
            f"{self.smallest_target_loss:.4g}, largest gradient {self.largest_gradient:.4g}, S {self.largest_similarity:.4g}, beta "
            f"{self.smoothness:.4g}, denominator {self.denominator:.4g})"
        )


def transfer_bound(first: nn.Module, second: nn.Module, x_BCHW: Tensor, y_B: Tensor, target_B: Tensor, epsilon: float) -> TransferBound:
    """Measure the ingredients of Theorem 3.1 for two models, each on the draw that it holds (deepcopies of one model will do).

    Args:
        y_B: true labels. target_B: labels that a targeted attack aims at, none equal to the true one.
        epsilon: radius in the 2-norm.

    The maxima are over the given images, so the bound is an estimate of the theorem's, which takes them over all images.

    Raises:
        ValueError: a target label equals the true one.
    """
    if (target_B == y_B).any():
        raise ValueError("a target label equals the true label")
    risks, target_losses, lengths, gradients, curvatures = [], [], [], [], []
    for model in (first, second):
        with mode(model, "eval"), torch.enable_grad():
            for labels_B in (y_B, target_B):
                image = x_BCHW.detach().requires_grad_()
                loss_B = functional.cross_entropy(model(image), labels_B, reduction="none")
                gradient, curvature_B = _curvature_along_gradient(loss_B.sum(), image)
                lengths.append(_lengths(gradient).max().item())
                curvatures.append(curvature_B.max().item())
                if labels_B is y_B:
                    risks.append(loss_B.mean().item())
                    gradients.append(gradient)
                else:
                    target_losses.append(loss_B.min().item())
    similarity = cosine_per_example(*gradients)[0].max().item()
    smoothness = max(curvatures)
    largest = max(lengths)
    denominator = min(target_losses) - largest * epsilon * (math.sqrt((1 + similarity) / 2) + 1) - smoothness * epsilon**2
    return TransferBound(
        risk_a=risks[0],
        risk_b=risks[1],
        smallest_target_loss=min(target_losses),
        largest_gradient=largest,
        largest_similarity=similarity,
        smoothness=smoothness,
        epsilon=epsilon,
        denominator=denominator,
        bound=sum(risks) / denominator if denominator > 0 else None,
    )


def _lengths(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).norm(dim=1)
