"""Arithmetic of truncated power series a_0 + a_1 t + ... + a_(T-1) t^(T-1), stored as (T, ...) tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def convolve_adjoint(grad: Tensor, b: Tensor) -> Tensor:
    """Return the adjoint of a -> a b at `grad`: out_j = sum over k >= j of grad_k b_(k-j)."""
    size = len(grad)
    terms = [sum((grad[k] * b[k - j] for k in range(j + 1, size)), start=grad[j] * b[0]) for j in range(size)]
    return torch.stack(terms)


def power(a: Tensor, exponent: float) -> Tensor:
    """Return a^exponent, truncated; a_0 must be positive.

    From a h' = exponent a' h for h = a^exponent, coefficient by coefficient.
    """
    terms = [a[0].pow(exponent)]
    for k in range(1, len(a)):
        total = sum(((exponent * i - (k - i)) * a[i] * terms[k - i] for i in range(1, k + 1)), start=torch.zeros_like(a[0]))
        terms.append(total / (k * a[0]))
    return torch.stack(terms)
