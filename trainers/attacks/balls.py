"""The set around each image in which an attack may move: a norm ball, cut at the pixel range [0,1].

Shapes: B batch; x has shape (B, ...), usually (B, C, H, W). Radii and steps are in pixels of [0,1].
Methods whose name ends in an underscore work in place. No method reads a value back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, get_args

import torch
from torch import Tensor

from models.errors import unknown_name
from models.threat_model import Norm

Shard = tuple[int, int]
"""(rank, number of ranks): x is this rank's part of a batch that is divided in equal parts. Noise is drawn for the whole batch, so
that every number of ranks sees the same noise per image."""

WHOLE: Shard = (0, 1)


def sharded_noise(
    x: Tensor, generator: torch.Generator, shard: Shard, fill: Callable[[Tensor], Tensor], per_example: bool = False
) -> Tensor:
    """Return noise for x (B, ...), or one number per example (B, 1, ...), from a tensor for the whole batch that `fill` fills in place."""
    rank, num_ranks = shard
    rest = (1,) * (x.dim() - 1) if per_example else x.shape[1:]
    whole = fill(torch.empty((len(x) * num_ranks, *rest), dtype=x.dtype, device=generator.device))
    return whole[rank * len(x) : (rank + 1) * len(x)].to(x.device)


class Ball(Protocol):
    """What projected gradient descent needs of a norm."""

    def random_start(self, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
        """Return a point drawn uniformly from the norm ball, then cut at the pixel range."""
        ...

    def project_(self, x_adv: Tensor) -> Tensor:
        """Move `x_adv` into the set."""
        ...

    def ascend_(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Move `x_adv` by one step of steepest ascent and back into the set; zero and NaN gradients move nothing."""
        ...


class LinfBall:
    """All images in [0,1] whose pixels differ from x by at most `epsilon` each: a box with bounds computed once."""

    def __init__(self, x: Tensor, epsilon: float) -> None:
        self.x = x
        self.epsilon = epsilon
        self.lower = (x - epsilon).clamp_(min=0)
        self.upper = (x + epsilon).clamp_(max=1)

    def random_start(self, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
        noise = sharded_noise(self.x, generator, shard, lambda whole: whole.uniform_(-self.epsilon, self.epsilon, generator=generator))
        return self.project_(self.x.clone().add_(noise))

    def project_(self, x_adv: Tensor) -> Tensor:
        return x_adv.clamp_(self.lower, self.upper)

    def ascend_(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        # PyTorch's sign of NaN is 0, so such a pixel stays where it is and the rest of its image goes on.
        return self.project_(x_adv.add_(gradient.sign(), alpha=step_size))


class L2Ball:
    """All images in [0,1] whose Euclidean distance from x is at most `epsilon`.

    Deviation: the radius of a random start is that of a uniform point, U**(1/D) * epsilon in D dimensions. torchattacks
    draws the radius itself uniformly, which leaves nearly all starts too far inside.
    """

    def __init__(self, x: Tensor, epsilon: float) -> None:
        self.x = x
        self.epsilon = epsilon
        self.dims = tuple(range(1, x.dim()))
        self.smallest = torch.finfo(x.dtype).tiny

    def random_start(self, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
        x = self.x
        noise = sharded_noise(x, generator, shard, lambda whole: whole.normal_(generator=generator))
        radius = sharded_noise(x, generator, shard, lambda whole: whole.uniform_(generator=generator), per_example=True)
        radius = radius.pow(1 / max(1, x.shape[1:].numel())).mul_(self.epsilon)
        return self.project_(x + noise * (radius / self._norm(noise).clamp_(min=self.smallest)))

    def project_(self, x_adv: Tensor) -> Tensor:
        delta = x_adv.sub_(self.x)
        # Inside the ball the factor is exactly 1; the smallest number keeps epsilon 0 from dividing 0 by 0.
        delta.mul_(self.epsilon / self._norm(delta).clamp_(min=max(self.epsilon, self.smallest)))
        return delta.add_(self.x).clamp_(0, 1)  # as x is in [0,1], the cut only shortens delta

    def ascend_(self, x_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        # Divided by the largest component first: in float32 the squares of a small gradient would be zero.
        largest = gradient.abs().amax(dim=self.dims, keepdim=True)
        direction = gradient / largest.clamp_(min=self.smallest)
        direction.div_(self._norm(direction).clamp_(min=1)).nan_to_num_(nan=0.0)
        return self.project_(x_adv.add_(direction, alpha=step_size))

    def _norm(self, delta: Tensor) -> Tensor:
        return torch.linalg.vector_norm(delta, dim=self.dims, keepdim=True)


_BALLS: dict[str, type[LinfBall] | type[L2Ball]] = {"linf": LinfBall, "l2": L2Ball}


def ball_around(x: Tensor, epsilon: float, norm: Norm) -> Ball:
    """Return the ball of radius `epsilon` around each image of x (B, ...).

    Raises:
        UserError: `norm` is unknown.
    """
    if norm not in _BALLS:
        raise unknown_name("norm", str(norm), get_args(Norm))
    return _BALLS[norm](x, epsilon)
