"""The loss of one image over a plane in input space: along the gradient's sign and along random signs.

Reference: Jin et al., "Randomized Adversarial Training via Taylor Expansion", CVPR 2023, Fig. 2, which follows Engstrom, Ilyas, Athalye,
"Evaluating and Understanding the Robustness of Adversarial Logit Pairing", 2018.
Deviation: "sign of the gradient of f(s)" is read as that of the loss, the quantity on the vertical axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import UserError
from models.modes import mode
from models.randomness import frozen

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""`(logits_BK, y_B) -> loss_B`."""


@dataclass(frozen=True)
class InputLandscape:
    """A grid of losses around one image.

    Attributes:
        gradient_positions_A: distances along the sign of the gradient, in pixels of [0,1]: the x axis of the figure.
        random_positions_A: distances along the random signs, the y axis.
        loss_AA: loss, row: gradient position, column: random position.
        gradient_sign, random_sign: the two directions, of the image's shape, entries -1, 0 or 1.
    """

    gradient_positions_A: Tensor
    random_positions_A: Tensor
    loss_AA: Tensor
    gradient_sign: Tensor
    random_sign: Tensor

    @property
    def rise(self) -> float:
        """Largest loss of the grid minus that at the image."""
        middle = len(self.gradient_positions_A) // 2
        return (self.loss_AA.max() - self.loss_AA[middle, middle]).item()

    @property
    def roughness(self) -> float:
        """Mean absolute second difference over the squared grid distance: 0 for a plane, large for a rugged surface."""
        step = (self.gradient_positions_A[1] - self.gradient_positions_A[0]).item()
        bends = [self.loss_AA.diff(n=2, dim=axis).abs().mean() for axis in (0, 1)]
        return (torch.stack(bends).mean() / step**2).item()


def input_landscape(
    model: nn.Module,
    image: Tensor,
    label: int,
    *,
    radius: float = 8 / 255,
    num_positions: int = 25,
    generator: torch.Generator,
    loss: ExampleLoss | None = None,
    clamp_pixels: bool = False,
    batch_size: int = 256,
) -> InputLandscape:
    """Return the loss on a grid of x + a sign(grad) + b r, with r of independent signs (Rademacher 1/2), a and b in [-radius, radius].

    In eval mode, at the draw that the model holds; mode and draw are as before afterwards.

    Args:
        image: (C, H, W), pixels in [0,1].
        label: its class.
        radius: half width of the grid in pixels of [0,1].
        num_positions: A, an odd number of at least 3, so that the image itself is on the grid.
        generator: source of r.
        loss: per example; None: cross-entropy.
        clamp_pixels: cut the grid's images at [0,1], which bends the plane near black and white pixels; the figure does not.
        batch_size: images per forward pass.
    """
    if num_positions < 3 or num_positions % 2 == 0:
        raise UserError(f"num_positions is {num_positions}; it must be an odd number of at least 3")
    per_example = loss if loss is not None else _cross_entropy
    y_B = torch.tensor([label], device=image.device)
    with frozen(model), mode(model, "eval"):
        with torch.enable_grad():
            leaf = image.detach().unsqueeze(0).requires_grad_()
            (gradient,) = torch.autograd.grad(per_example(model(leaf), y_B).sum(), leaf)
        gradient_sign = gradient[0].sign()
        bits = torch.randint(0, 2, image.shape, generator=generator, device=generator.device).to(image)
        random_sign = 2 * bits - 1
        positions = torch.linspace(-radius, radius, num_positions, dtype=torch.float64).to(image)
        a_N, b_N = (grid.reshape(-1, 1, 1, 1) for grid in torch.meshgrid(positions, positions, indexing="ij"))
        losses = []
        with torch.no_grad():
            for a, b in zip(a_N.split(batch_size), b_N.split(batch_size), strict=True):
                points = image + a * gradient_sign + b * random_sign
                points = points.clamp(0, 1) if clamp_pixels else points
                losses.append(per_example(model(points), y_B.expand(len(points))))
    loss_AA = torch.cat(losses).view(num_positions, num_positions)
    return InputLandscape(positions, positions.clone(), loss_AA, gradient_sign, random_sign)


def _cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BK, y_B, reduction="none")
