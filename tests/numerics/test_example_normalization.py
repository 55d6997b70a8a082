"""Normalization of each example of channels-last maps, against PyTorch's kernel in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.layers import example_normalization
from models.layers.example_normalization import normalize_each_example

EPS = 1e-5


def case(seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return float64 maps, weight and bias of random shapes, and a number of groups that divides the channels."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    groups, size = choose.choice([(1, 5), (2, 3), (4, 1), (6, 2), (7, 1)])
    shape = (choose.randint(1, 7), groups * size, choose.randint(2, 9), choose.randint(1, 6))
    scale, shift = choose.choice([1e-3, 1.0, 30.0]), choose.choice([0.0, -5.0])
    x = scale * torch.randn(shape, generator=generator, dtype=torch.float64) + shift
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    return x, weight, bias, groups


def laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients_are_those_of_group_norm(seed, affine, monkeypatch):
    x, weight, bias, groups = case(seed)
    if seed % 2:
        monkeypatch.setattr(example_normalization, "_CHUNK_BYTES", 3 * 8 * x[0].numel())  # three examples at a time
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    inputs = [x, weight, bias] if affine else [x]
    found, expected = [], []
    for results, prepare, normalize in (
        (expected, torch.clone, functional.group_norm),
        (found, laid_out, normalize_each_example),
    ):
        leaves = [prepare(inputs[0]).requires_grad_(), *(value.clone().requires_grad_() for value in inputs[1:])]
        arguments = leaves[1:] if affine else [None, None]
        if normalize is functional.group_norm:
            out = functional.group_norm(leaves[0], groups, *arguments, EPS)
        else:
            out = normalize(leaves[0], groups, *arguments, EPS)
        results += [out, *torch.autograd.grad(out, leaves, prepare(upstream))]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_can_be_differentiated_again(groups):
    generator = torch.Generator().manual_seed(groups)
    x = laid_out(torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    weight, bias = (torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))

    def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normalize_each_example(laid_out(x), groups, weight, bias, EPS)

    assert torch.autograd.gradcheck(normalized, (x, weight, bias))
    assert torch.autograd.gradgradcheck(normalized, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_costs_no_digits(dtype):
    noise = torch.randn(3, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    x = laid_out((noise + (1000 if dtype == torch.float32 else 4)).to(dtype)).requires_grad_()
    found = normalize_each_example(x, 64, None, None, EPS)
    expected = functional.group_norm(x.detach().double().contiguous(), 64, None, None, EPS)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.02)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), x)
    assert gradient.dtype == dtype and gradient.isfinite().all()
