"""Regularizers of input gradients that couple the members of an ensemble, and two exact ways to differentiate them.

Shapes: B batch, D = C*H*W pixels, N members, K classes.

The input gradient g_i of member i is the gradient of each example's cross-entropy with respect to its own pixels (sum over the batch, so it
does not shrink with the batch), in fp32 at least. Lengths and cosines, hence all regularizers of RED, GAL and TRS, are functions of
the Gram matrices G_ij = <g_i, g_j> of shape (B, N, N); that is what a regularizer gets here.

`joint`: all members' graphs are alive at once, one backward pass goes through them.
`cached`: first all gradients without a graph, then C = dR/dG, then member by member: the gradient of R with respect to the weights of
member i is that of <g_i, v_i> with the constant v_i = sum_j (C_ij + C_ji) g_j. The same numbers, one member's graph at a time, one
more pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from models.modes import tracking_modules
from trainers.ensembles.placement import MemberPlacement

Computation = Literal["cached", "joint"]
Regularizer = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""`{set: gram_BNN} -> {name: scalar}`; the scalar named `regularization` is added to the loss, the others are logged."""

REFERENCE_BATCH = 128
"""Batch size that is meant where a paper differentiates the mean loss of a batch, so that an image's gradient shrinks with the batch: the
papers' own. Regularizers are defined with it, whatever batch and number of workers a run has, because their weights would otherwise act
differently at each."""

COSINE_DELTA = 1e-12
LENGTH_SMOOTHING = 1e-24


@dataclass(frozen=True)
class InputSet:
    """Images at which members are trained or their input gradients regularized.

    Attributes:
        x_BCHW: the images, the same for all members.
        cross_entropy_weight: factor of each member's mean cross-entropy on them; 0: none.
        regularized: whether the regularizer sees the input gradients there.
    """

    x_BCHW: Tensor
    cross_entropy_weight: float
    regularized: bool


def input_gradient_of(network: nn.Module, x_BCHW: Tensor, y_B: Tensor, *, create_graph: bool) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies (B,) and their input gradients (B, D) of one network in its current mode.

    Without `create_graph` both are detached. No `.grad` is touched, no autocast applies.
    """
    leaf_BCHW = x_BCHW.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(x_BCHW.device.type, enabled=False):
        if create_graph and x_BCHW.device.type == "cpu":
            logits_BK = _in_contiguous_layout(network, leaf_BCHW)
        else:
            logits_BK = network(leaf_BCHW)
        loss_B = functional.cross_entropy(logits_BK, y_B, reduction="none")
        (gradient_BCHW,) = torch.autograd.grad(loss_B.sum(), leaf_BCHW, create_graph=create_graph)
    return (loss_B if create_graph else loss_B.detach()), gradient_BCHW.flatten(1)


def _in_contiguous_layout(network: nn.Module, x_BCHW: Tensor) -> Tensor:
    """Evaluate with images and weights in the contiguous layout, in which a CPU differentiates twice about a quarter faster."""
    weights = {name: weight.contiguous() for name, weight in network.named_parameters() if not weight.is_contiguous()}
    x_BCHW = x_BCHW.contiguous()
    return functional_call(network, weights, (x_BCHW,)) if weights else network(x_BCHW)


def gram_matrix(gradients_BD: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the members' gradients, (B, N, N), symmetric.

    Products and sums are elementwise: reduced-precision matrix units never touch them.
    """
    count = len(gradients_BD)
    products = {(i, j): (gradients_BD[i] * gradients_BD[j]).sum(dim=-1) for i in range(count) for j in range(i, count)}
    rows = [torch.stack([products[min(i, j), max(i, j)] for j in range(count)], dim=-1) for i in range(count)]
    return torch.stack(rows, dim=-2)


def gradient_lengths(gram_BNN: Tensor) -> Tensor:
    """Return the Euclidean lengths of the gradients (B, N); differentiable at 0."""
    return (gram_BNN.diagonal(dim1=-2, dim2=-1) + LENGTH_SMOOTHING).sqrt()


def of_batch_mean(gram_BNN: Tensor) -> Tensor:
    """Return the Gram matrices of the gradients of a batch's mean loss, given those of each example's own; a batch of `REFERENCE_BATCH`."""
    return gram_BNN / REFERENCE_BATCH**2


def pair_cosines(gram_BNN: Tensor) -> Tensor:
    """Return the signed cosines of the unordered pairs, (B, N (N - 1) / 2), in the order (0,1), (0,2), ..., (1,2), ..."""
    lengths_BN = gradient_lengths(gram_BNN)
    first, second = torch.triu_indices(gram_BNN.shape[-1], gram_BNN.shape[-1], offset=1, device=gram_BNN.device)
    product_BP = lengths_BN[:, first] * lengths_BN[:, second]
    return gram_BNN[:, first, second] / product_BP.clamp_min(COSINE_DELTA)


def regularized_loss(
    members: Sequence[nn.Module], sets: Mapping[str, InputSet], y_B: Tensor, regularizer: Regularizer
) -> dict[str, Tensor]:
    """Return sum_i sum_s w_s CE_i(x_s) + R(Gram matrices) with the graphs of all members alive: the `joint` computation.

    Args:
        members: N networks in the mode in which they are trained. Their draws stay as they are.
        sets: named images. Running statistics of a member move once per set, in this order.
        y_B: labels, the same for all sets.
        regularizer: R.

    Returns:
        `loss`, `cross_entropy` (mean over members and the sets that carry it), and what the regularizer returns.
    """
    weighted: list[Tensor] = []
    reported = _MeanCrossEntropy(sets, len(members))
    gradients: dict[str, list[Tensor]] = {name: [] for name, inputs in sets.items() if inputs.regularized}
    for member in members:
        for name, inputs in sets.items():
            loss_B, gradient_BD = _pass(member, inputs, y_B)
            if gradient_BD is not None:
                gradients[name].append(gradient_BD)
            weighted.append(inputs.cross_entropy_weight * loss_B.mean())
            reported.add(inputs, loss_B)
    terms = regularizer({name: gram_matrix(gradients_BD) for name, gradients_BD in gradients.items()})
    total_weight = len(members) * sum(inputs.cross_entropy_weight for inputs in sets.values())
    if not total_weight:
        return {"loss": terms["regularization"], "cross_entropy": reported.mean(terms["regularization"]), **terms}
    # Sets that carry cross-entropy carry equally much of it, so the weighted mean is the one that is reported; part of the graph.
    cross_entropy = torch.stack(weighted).sum() / total_weight
    return {"loss": total_weight * cross_entropy + terms["regularization"], "cross_entropy": cross_entropy, **terms}


def regularized_backward(
    members: Sequence[nn.Module],
    sets: Mapping[str, InputSet],
    y_B: Tensor,
    regularizer: Regularizer,
    placement: MemberPlacement,
) -> dict[str, Tensor]:
    """Add the gradient of `regularized_loss` to `.grad`, one member after the other, and return its scalars: the `cached` computation.

    Args as for `regularized_loss`, and:
        placement: which members this worker computes. With several workers each has a part of the gradients, which average to the whole.
    """
    bank = {
        name: placement.exchange([_bank_entry(members[index], inputs.x_BCHW, y_B) for index in placement.own], inputs.x_BCHW)
        for name, inputs in sets.items()
        if inputs.regularized
    }
    with torch.enable_grad():
        grams = {name: gram_matrix(gradients_BD).requires_grad_() for name, gradients_BD in bank.items()}
        terms = regularizer(grams)
        slopes = torch.autograd.grad(terms["regularization"], list(grams.values()), allow_unused=True)
    slope_of = {
        name: torch.zeros_like(gram_BNN) if slope is None else slope + slope.mT
        for (name, gram_BNN), slope in zip(grams.items(), slopes, strict=True)
    }
    reported = _MeanCrossEntropy(sets, len(members), placement.gradient_factor)
    loss = terms["regularization"].detach()
    for index in placement.own:
        for name, inputs in sets.items():
            loss_B, gradient_BD = _pass(members[index], inputs, y_B)
            objective = placement.gradient_factor * inputs.cross_entropy_weight * loss_B.mean()
            loss = loss + objective.detach()
            if gradient_BD is not None:
                objective = objective + placement.gradient_factor * (gradient_BD * _direction(bank[name], slope_of[name][:, index])).sum()
            objective.backward()
            reported.add(inputs, loss_B)
            del loss_B, gradient_BD, objective  # the graph of this pass ends before the next one begins
    placement.share_buffers(members)
    scalars = {"loss": loss, "cross_entropy": reported.mean(loss)}
    return scalars | {name: value.detach() for name, value in terms.items()}


def _pass(member: nn.Module, inputs: InputSet, y_B: Tensor) -> tuple[Tensor, Tensor | None]:
    if inputs.regularized:
        return input_gradient_of(member, inputs.x_BCHW, y_B, create_graph=True)
    with torch.autocast(inputs.x_BCHW.device.type, enabled=False):
        return functional.cross_entropy(member(inputs.x_BCHW), y_B, reduction="none"), None


def _bank_entry(member: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    with _statistics_held(member):
        return input_gradient_of(member, x_BCHW, y_B, create_graph=False)[1]


def _direction(gradients_BD: Sequence[Tensor], coefficients_BN: Tensor) -> Tensor:
    direction_BD = torch.zeros_like(gradients_BD[0])
    for gradient_BD, coefficient_B in zip(gradients_BD, coefficients_BN.unbind(dim=-1), strict=True):
        direction_BD.addcmul_(gradient_BD, coefficient_B.unsqueeze(-1))
    return direction_BD


@contextlib.contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Within, normalizations in training mode use batch statistics and leave running ones alone; no mode changes."""
    tracking = [(part, tracks) for part, tracks in tracking_modules(module) if part.training]
    try:
        for part, _ in tracking:
            part.track_running_stats = False
        yield
    finally:
        for part, tracked in tracking:
            part.track_running_stats = tracked


class _MeanCrossEntropy:
    """Mean over all members and the sets that carry cross-entropy, or all sets if none does; a worker's part times their number."""

    def __init__(self, sets: Mapping[str, InputSet], num_members: int, factor: float = 1.0) -> None:
        self.only_weighted = any(inputs.cross_entropy_weight for inputs in sets.values())
        carrying = [inputs for inputs in sets.values() if inputs.cross_entropy_weight or not self.only_weighted]
        self.factor = factor / (num_members * len(carrying))
        self.sum: Tensor | float = 0.0

    def add(self, inputs: InputSet, loss_B: Tensor) -> None:
        if inputs.cross_entropy_weight or not self.only_weighted:
            self.sum = self.sum + loss_B.detach().mean()

    def mean(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self.sum, dtype=like.dtype, device=like.device) * self.factor
