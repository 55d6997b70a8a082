"""Constrained trainable random weights: W = mu + delta * sigma with standard normal delta, and constraints on sigma.

Shapes: feature weights (C, H, W), filter weights (O, C, k, k). m is the number of elements of sigma.
Reference: Ma, Dong, Xu, "Adversarial Robustness through Random Weight Sampling", NeurIPS 2023, Eq. 4, 5, 14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers.channel_map import scale_filters
from models.randomness import DrawScope, RandomModule, per_example_rows, rows_held_by_both

Constraint = Literal["floor", "shift", "project", "none", "fixed"]


@dataclass(frozen=True)
class SigmaBounds:
    """A constraint on the standard deviations.

    Attributes:
        constraint: `floor`: every element below A/m is raised by A/m - min(sigma) (the official code); `shift`: if the sum is below
            A, all are raised by the same amount to reach it (the paper's words); `project`: negative elements become 0, then the sum is
            brought into [A, B] by a shift up or a scaling down; `none`; `fixed`: sigma is A/m everywhere and not trained.
        lower: A, lower bound of the sum.
        upper: B, upper bound of the sum; used by `project`.
    """

    constraint: Constraint
    lower: float
    upper: float

    @torch.no_grad()
    def apply(self, sigma: Tensor) -> None:
        """Move `sigma` into the set, in place. Idempotent."""
        size = sigma.numel()
        if self.constraint == "floor":
            floor = self.lower / size
            smallest = sigma.min()
            raised = torch.where(sigma < floor, sigma + (floor - smallest), sigma)
            sigma.copy_(raised)
            # One rounding error below the floor would make the next call raise the whole element again.
            sigma.copy_(torch.where(sigma < floor, torch.full_like(sigma, floor), sigma))
        elif self.constraint == "shift":
            total = sigma.double().sum()
            sigma.copy_(torch.where(total < self.lower, sigma + (self.lower - total) / size, sigma))
        elif self.constraint == "project":
            clipped = sigma.double().clamp_min(0)
            total = clipped.sum()
            shifted = torch.where(total < self.lower, clipped + (self.lower - total) / size, clipped)
            scale = torch.where(total > self.upper, self.upper / total.clamp_min(1e-300), torch.ones_like(total))
            sigma.copy_(shifted * scale)


class _RandomWeight(RandomModule):
    """mu, sigma and the draw delta, of one shape, with the constraint on sigma."""

    delta: Tensor

    def __init__(self, mu: Tensor, initial_sigma: float, bounds: SigmaBounds, draw_scope: DrawScope = "global") -> None:
        super().__init__(draw_scope)
        self.bounds = bounds
        self.mu = nn.Parameter(mu.clone())
        trained = bounds.constraint != "fixed"
        start = initial_sigma if trained else bounds.lower / mu.numel()
        self.sigma = nn.Parameter(torch.full_like(mu, start), requires_grad=trained)
        self.register_draw("delta", torch.zeros_like(mu))

    @property
    def num_configurations(self) -> float:
        """A continuum."""
        return math.inf

    def draw(self, generator: torch.Generator) -> None:
        self.set_draw("delta", torch.randn(self.mu.shape, generator=generator))

    def distance(self, first: dict[str, Any], second: dict[str, Any]) -> float:
        """Return 1 - correlation of two normal draws: 0 equal, about 1 independent."""
        x, y = (value.double().flatten() for value in rows_held_by_both(first, second, "delta_rows", "delta"))
        return 1.0 - (x @ y / (x.norm() * y.norm())).item()

    def constrain(self) -> None:
        """Apply the constraint on sigma."""
        self.bounds.apply(self.sigma)

    def sample_weight(self) -> Tensor:
        """Return W = mu + delta * sigma of the current draw (Eq. 4)."""
        return torch.addcmul(self.mu, self.delta, self.sigma)


class RandomFeatureWeight(_RandomWeight):
    """Multiply a feature map (B, C, H, W) element-wise with a random weight W of shape (C, H, W).

    Args:
        shape: (C, H, W).
        initial_mu, initial_sigma: start values of all elements.
        bounds: constraint on sigma.
        draw_scope: `global` and `per_rank`: one W for the whole batch (the paper's code); `per_example`: one per example.
    """

    delta_rows: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        initial_mu: float,
        initial_sigma: float,
        bounds: SigmaBounds,
        draw_scope: DrawScope = "global",
    ) -> None:
        super().__init__(torch.full(shape, float(initial_mu)), initial_sigma, bounds, draw_scope)
        if draw_scope == "per_example":
            self.register_draw("delta_rows", torch.zeros(1, *shape))
        self.take_first_draw()

    def draw(self, generator: torch.Generator) -> None:
        super().draw(generator)
        if self.draw_scope == "per_example":
            self.set_draw("delta_rows", self._rows(self.delta_rows.shape[0]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # bf16 autocast: mu, sigma, delta and the product stay in the parameters' precision.
        if self.draw_scope == "per_example":
            if self.delta_rows.shape[0] < x_BCHW.shape[0]:
                # Row b does not depend on how many rows there are, so this draws nothing new.
                self.set_draw("delta_rows", self._rows(x_BCHW.shape[0]))
            delta_BCHW = self.delta_rows[: x_BCHW.shape[0]]
            return (x_BCHW.to(self.mu.dtype) * (self.mu + delta_BCHW * self.sigma)).to(x_BCHW.dtype)
        return (x_BCHW.to(self.mu.dtype) * self.sample_weight()).to(x_BCHW.dtype)

    def _rows(self, num_examples: int) -> Tensor:
        return per_example_rows(
            self.draw_key,
            num_examples,
            lambda generator, count: torch.randn((count, *self.mu.shape), generator=generator),
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.mu.shape)}, {self.bounds}, draw_scope={self.draw_scope}"


class RandomFilterConv2d(_RandomWeight):
    """A convolution whose filter is random: conv(x, mu_w + delta * sigma_w), mu_w and sigma_w of the filter's shape.

    The paper's variant `filter` (Table 4). The filter's own trained values are the start of mu.

    Args:
        conv: the convolution to take the place of; its weight starts mu, its bias stays.
        initial_sigma: start value of sigma, relative to the root mean square of the filter.
        bounds: constraint on sigma.
        draw_scope: `global` or `per_rank`.
    """

    def __init__(self, conv: nn.Conv2d, initial_sigma: float, bounds: SigmaBounds, draw_scope: DrawScope = "global") -> None:
        if draw_scope == "per_example":
            raise ValueError("a random filter is shared by the batch: draw_scope per_example needs variant in, out or both")
        super().__init__(conv.weight.detach(), initial_sigma, bounds, draw_scope)
        self.bias = conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.take_first_draw()

    def take_channel_map(self, scale_O: Tensor, shift_O: Tensor) -> None:
        """Be followed by y * scale_O + shift_O: mean and deviation of every filter are scaled alike."""
        self.bias = scale_filters((self.mu, self.sigma), self.bias, scale_O, shift_O)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = self.sample_weight().to(x_BCHW.dtype)
        return functional.conv2d(x_BCHW, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
