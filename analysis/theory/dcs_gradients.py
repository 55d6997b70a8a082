"""Gradient cosines of DCS between masks, exact at the input of the layer, and pairs of draws of a given overlap or kind.

Shapes: B batch, O output channels, T = k*k taps, M masks. The gradient at the layer's input is linear in the mask: with D_t the
gradient through tap t alone, the gradient under mask m is the sum of its D_t. The T x T Gram matrix of the D_t therefore gives the
cosines of all pairs of masks, C(k*k, n)^2 of them, at the price of one dense convolution (the tap bank).
Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025, Eq. 6 and 7,
Fig. 4b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from analysis.theory.dcs_bounds import PairKind, mask_pair, mask_pair_with_overlap, point_probabilities
from analysis.theory.transferability import DrawPair, current_draw, draw_distance, undisturbed
from models.layers.stochastic_convolution import StochasticConv2d
from models.randomness import derive_seed, random_sites

Mask = tuple[int, ...]


def stochastic_convolutions(model: nn.Module) -> list[StochasticConv2d]:
    """Return the stochastic convolutions of `model`, in module order.

    Raises:
        ValueError: there is none.
    """
    sites = [site for _, site in random_sites(model) if isinstance(site, StochasticConv2d)]
    if not sites:
        raise ValueError("the model has no stochastic convolution")
    return sites


@torch.no_grad()
def tap_gradients(layer: StochasticConv2d, input_shape: Sequence[int], grad_output_BOHW: Tensor) -> list[Tensor]:
    """Return, for each tap, the gradient at the input (B, C, H, W) that passes through it alone."""
    gradients = []
    for tap in range(layer.kernel_size**2):
        row, column = divmod(tap, layer.kernel_size)
        single = torch.zeros_like(layer.weight)
        single[:, :, row, column] = layer.weight[:, :, row, column]
        gradients.append(conv2d_input(tuple(input_shape), single, grad_output_BOHW, layer.stride, layer.padding, groups=layer.groups))
    return gradients


def tap_gradient_gram(layer: StochasticConv2d, input_shape: Sequence[int], grad_output_BOHW: Tensor) -> Tensor:
    """Return the inner products of the taps' gradients per example, (B, T, T) in float64."""
    bank_BTD = torch.stack([gradient.flatten(1).double() for gradient in tap_gradients(layer, input_shape, grad_output_BOHW)], dim=1)
    return bank_BTD @ bank_BTD.transpose(1, 2)


def mask_matrix(masks: Sequence[Sequence[int]], kernel_size: int) -> Tensor:
    """Return masks as rows of zeros and ones, (M, T) in float64."""
    matrix = torch.zeros(len(masks), kernel_size**2, dtype=torch.float64)
    for row, taps in enumerate(masks):
        matrix[row, list(taps)] = 1
    return matrix


def mask_cosines(gram_BTT: Tensor, first_MT: Tensor, second_MT: Tensor) -> Tensor:
    """Return the cosine of the input gradients under every mask of one list and every mask of another, (B, M1, M2); 0 for a zero one."""
    products = first_MT @ gram_BTT @ second_MT.T
    lengths_first = torch.einsum("mt,btu,mu->bm", first_MT, gram_BTT, first_MT).clamp_min(0).sqrt()
    lengths_second = torch.einsum("mt,btu,mu->bm", second_MT, gram_BTT, second_MT).clamp_min(0).sqrt()
    lengths = lengths_first[:, :, None] * lengths_second[:, None, :]
    return torch.where(lengths > 0, products / lengths.clamp_min(1e-300), 0.0)


@dataclass(frozen=True)
class InputGradientCosines:
    """Cosines at the input of one DCS layer under a fixed upstream gradient.

    Attributes:
        expected: exact mean over two independent draws and over images.
        by_overlap: mean over pairs of masks that share j taps, j = 0..n.
        by_kind: mean over designed pairs: `same` (1 by definition), `gap` (the paper's C_g), and `unhit` (C_u) where it exists.
        predicted: p_s + p_g C_g (Eq. 7) with the measured C_g.
    """

    expected: float
    by_overlap: tuple[float, ...]
    by_kind: dict[PairKind, float]
    predicted: float


def input_gradient_cosines(
    model: nn.Module, x_BCHW: Tensor, y_B: Tensor, layer_index: int = 0, num_designed: int = 200, seed: int = 0
) -> InputGradientCosines:
    """Measure the cosines at a DCS layer's input, the upstream gradient being that of the model's current draw.

    Raises:
        ValueError: the layer has more than 4096 masks.
    """
    layer = stochastic_convolutions(model)[layer_index]
    if layer.num_configurations > 4096:
        raise ValueError(f"the layer has {layer.num_configurations} masks, more than 4096")
    input_shape, grad_output = _upstream(model, layer, x_BCHW, y_B)
    gram_BTT = tap_gradient_gram(layer, input_shape, grad_output).cpu()
    count = int(layer.num_configurations)
    masks_MT = mask_matrix([layer.space.taps(index) for index in range(count)], layer.kernel_size)
    probability_M = torch.tensor([layer.configuration_probability(index) for index in range(count)], dtype=torch.float64)
    total = torch.zeros(count, count, dtype=torch.float64)
    for gram_TT in gram_BTT:
        total += mask_cosines(gram_TT[None], masks_MT, masks_MT)[0]
    cosine_MM = total / len(gram_BTT)
    weight_MM = probability_M[:, None] * probability_M[None, :]
    shared_MM = (masks_MT @ masks_MT.T).round()
    by_overlap = []
    for overlap in range(layer.num_taps + 1):
        chosen = shared_MM == overlap
        mass = weight_MM[chosen].sum()
        by_overlap.append(((cosine_MM * weight_MM)[chosen].sum() / mass).item() if mass > 0 else float("nan"))
    by_kind = _designed_cosines(layer, gram_BTT, num_designed, seed)
    probabilities = point_probabilities(layer.kernel_size, layer.num_taps, layer.stride[0])
    return InputGradientCosines(
        expected=(cosine_MM * weight_MM).sum().item(),
        by_overlap=tuple(by_overlap),
        by_kind=by_kind,
        predicted=probabilities.predicted_cosine(by_kind["gap"]) if "gap" in by_kind else float("nan"),
    )


def _designed_cosines(layer: StochasticConv2d, gram_BTT: Tensor, num_pairs: int, seed: int) -> dict[PairKind, float]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "designed"))
    means: dict[PairKind, float] = {}
    kinds: tuple[PairKind, ...] = ("same", "gap", "unhit")
    for kind in kinds:
        try:
            pairs = [mask_pair(kind, layer.kernel_size, layer.num_taps, layer.stride[0], generator) for _ in range(num_pairs)]
        except ValueError:  # a stride of 1 leaves no point unhit, a small kernel no gap
            continue
        first = mask_matrix([pair[0] for pair in pairs], layer.kernel_size)
        second = mask_matrix([pair[1] for pair in pairs], layer.kernel_size)
        products = torch.einsum("mt,btu,mu->bm", first, gram_BTT, second)
        lengths = torch.einsum("mt,btu,mu->bm", first, gram_BTT, first).clamp_min(0) * torch.einsum(
            "mt,btu,mu->bm", second, gram_BTT, second
        ).clamp_min(0)
        means[kind] = torch.where(lengths > 0, products / lengths.clamp_min(1e-300).sqrt(), 0.0).mean().item()
    return means


def _upstream(model: nn.Module, layer: StochasticConv2d, x_BCHW: Tensor, y_B: Tensor) -> tuple[torch.Size, Tensor]:
    """Return the shape of the layer's input and the loss's gradient at its output, in eval mode."""
    seen: list[tuple[torch.Size, Tensor]] = []
    handle = layer.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].shape, output)))
    try:
        with undisturbed(model), torch.enable_grad():
            loss = functional.cross_entropy(model(x_BCHW.detach().requires_grad_()), y_B, reduction="sum")
            (shape, output) = seen[0]
            (gradient,) = torch.autograd.grad(loss, output)
    finally:
        handle.remove()
    return shape, gradient


def pairs_with_overlap(model: nn.Module, overlap: int, num_pairs: int = 10, seed: int = 0) -> list[DrawPair]:
    """Return pairs of draws in which every DCS layer's two masks share exactly `overlap` taps."""
    return _pairs(
        model,
        lambda site, generator: mask_pair_with_overlap(overlap, site.kernel_size, site.num_taps, generator),
        num_pairs,
        derive_seed(seed, "overlap", overlap),
    )


def designed_pairs(model: nn.Module, kind: PairKind, num_pairs: int = 10, seed: int = 0) -> list[DrawPair]:
    """Return pairs of draws in which every DCS layer's two masks are of one kind (Fig. 5)."""
    return _pairs(
        model,
        lambda site, generator: mask_pair(kind, site.kernel_size, site.num_taps, site.stride[0], generator),
        num_pairs,
        derive_seed(seed, "kind", kind),
    )


def _pairs(
    model: nn.Module,
    choose: Callable[[StochasticConv2d, torch.Generator], tuple[Mask, Mask]],
    num_pairs: int,
    seed: int,
) -> list[DrawPair]:
    sites = stochastic_convolutions(model)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    with undisturbed(model):
        for _ in range(num_pairs):
            chosen = [choose(site, generator) for site in sites]
            draws = []
            for side in (0, 1):
                for site, masks in zip(sites, chosen, strict=True):
                    site.set_taps(masks[side])
                draws.append(current_draw(model))
            pairs.append(DrawPair(draws[0], draws[1], draw_distance(model, *draws)))
    return pairs
