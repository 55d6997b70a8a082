"""Input gradients of the members of an ensemble: cosines, Lipschitz and smoothness estimates, loss landscapes.

Shapes: B batch, D pixels, N members, G grid points per axis. Losses are cross-entropies in nats, pixels are in [0,1].

References: RED, section 3.2, Fig. 1, 2; Yang et al., "TRS", Theorem 1 (gradient similarity, smoothness and empirical risk bound transfer);
Jin et al., "Randomized Adversarial Training via Taylor Expansion", Fig. 2 (axes of the landscape).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.ensemble import ensemble_in
from models.modes import mode
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import ball_around
from trainers.ensembles.input_gradients import COSINE_DELTA, gradient_lengths, gram_matrix, input_gradient_of


@dataclasses.dataclass(frozen=True)
class GradientSimilarity:
    """Cosines between the members' input gradients, means over images.

    Attributes:
        signed_NN: mean cosine, in [-1,1]. absolute_NN: mean absolute cosine, in [0,1], what RED and TRS make small.
    """

    signed_NN: Tensor
    absolute_NN: Tensor

    @property
    def mean_absolute(self) -> float:
        """Mean absolute cosine over pairs of different members; half of RED's R_sim on these images. NaN for one member."""
        count = len(self.absolute_NN)
        if count == 1:
            return float("nan")
        return ((self.absolute_NN.sum() - self.absolute_NN.diagonal().sum()) / (count * (count - 1))).item()


def gradient_similarity(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, batch_size: int = 128) -> GradientSimilarity:
    """Return the cosines of all pairs of members, in eval mode."""
    signed: list[Tensor] = []
    with mode(model, "eval"):
        for x, y in zip(x_BCHW.split(batch_size), y_B.split(batch_size), strict=True):
            gram_BNN = gram_matrix(
                [input_gradient_of(member, x, y, create_graph=False)[1] for member in ensemble_in(model).members]
            ).double()
            lengths_BN = gradient_lengths(gram_BNN)
            signed.append(gram_BNN / (lengths_BN.unsqueeze(1) * lengths_BN.unsqueeze(2)).clamp_min(COSINE_DELTA))
    signed_BNN = torch.cat(signed)
    return GradientSimilarity(signed_BNN.mean(dim=0), signed_BNN.abs().mean(dim=0))


@dataclasses.dataclass(frozen=True)
class LipschitzEstimates:
    """How steep and how curved each member's loss is; each tensor (N,).

    Attributes:
        mean_gradient_l2, max_gradient_l2: length of the input gradient over the images (RED's R_Lip on them is the mean's mean over
        members). mean_gradient_l1: its l1 norm, the slope against perturbations bounded per pixel.
        local_lipschitz: largest |loss(x') - loss(x)| / |x' - x|_2 over points x' of attack paths from all images.
        smoothness: largest |gradient(x') - gradient(x)|_2 / |x' - x|_2 over the same points.
        mean_local_lipschitz, mean_smoothness: means over images of each image's largest value.
        risk: mean loss.
    """

    mean_gradient_l2: Tensor
    max_gradient_l2: Tensor
    mean_gradient_l1: Tensor
    local_lipschitz: Tensor
    mean_local_lipschitz: Tensor
    smoothness: Tensor
    mean_smoothness: Tensor
    risk: Tensor


def lipschitz_estimates(
    model: nn.Module,
    x_BCHW: Tensor,
    y_B: Tensor,
    *,
    epsilon: float = 8 / 255,
    num_points: int = 10,
    step_size: float | None = None,
    norm: Norm = "linf",
    seed: int = 0,
    batch_size: int = 128,
) -> LipschitzEstimates:
    """Return estimates (lower bounds of the constants) for each member, in eval mode.

    Args:
        x_BCHW: clean or adversarial images.
        epsilon: radius of the ball in which x' moves. num_points: points of the path per image, the random start first.
        step_size: of the path; None: a quarter of the radius. seed: of the start.
    """
    step_size = epsilon / 4 if step_size is None else step_size
    rows = []
    with mode(model, "eval"):
        for member in ensemble_in(model).members:
            parts = [
                _measure(member, x, y, epsilon, num_points, step_size, norm, derive_seed(seed, "path", index))
                for index, (x, y) in enumerate(zip(x_BCHW.split(batch_size), y_B.split(batch_size), strict=True))
            ]
            l2_B, l1_B, lipschitz_B, smoothness_B, loss_B = (torch.cat(column) for column in zip(*parts, strict=True))
            rows.append(
                [
                    l2_B.mean(), l2_B.amax(), l1_B.mean(),
                    lipschitz_B.amax(), lipschitz_B.mean(), smoothness_B.amax(), smoothness_B.mean(), loss_B.mean(),
                ]
            )  # fmt: skip
    return LipschitzEstimates(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _measure(
    member: nn.Module,
    x_BCHW: Tensor,
    y_B: Tensor,
    epsilon: float,
    num_points: int,
    step_size: float,
    norm: Norm,
    seed: int,
) -> tuple[Tensor, ...]:
    loss_B, gradient_BD = input_gradient_of(member, x_BCHW, y_B, create_graph=False)
    lipschitz_B, smoothness_B = torch.zeros_like(loss_B), torch.zeros_like(loss_B)
    ball = ball_around(x_BCHW, epsilon, norm)
    point_BCHW = ball.random_start(torch.Generator().manual_seed(seed))
    for _ in range(num_points):
        point_loss_B, point_gradient_BD = input_gradient_of(member, point_BCHW, y_B, create_graph=False)
        distance_B = (point_BCHW - x_BCHW).flatten(1).norm(dim=1)
        # A point on top of the image says nothing about a slope.
        scale_B = torch.where(distance_B > 0, 1 / distance_B, torch.zeros_like(distance_B))
        lipschitz_B = torch.maximum(lipschitz_B, (point_loss_B - loss_B).abs() * scale_B)
        smoothness_B = torch.maximum(smoothness_B, (point_gradient_BD - gradient_BD).norm(dim=1) * scale_B)
        point_BCHW = ball.ascend_(point_BCHW, point_gradient_BD.view_as(x_BCHW), step_size)
    return gradient_BD.norm(dim=1), gradient_BD.abs().sum(dim=1), lipschitz_B, smoothness_B, loss_B


@dataclasses.dataclass(frozen=True)
class MemberLandscapes:
    """Losses of the members on a plane through the images.

    Attributes:
        offsets_G: steps along both axes in pixels of [0,1]. loss_NGG: [i, a, b]: mean loss of member i at x + a d1 + b d2.
    """

    offsets_G: Tensor
    loss_NGG: Tensor


@torch.no_grad()
def member_landscapes(
    model: nn.Module,
    x_BCHW: Tensor,
    y_B: Tensor,
    *,
    half_width: float = 16 / 255,
    num_points: int = 41,
    seed: int = 0,
) -> MemberLandscapes:
    """Return the loss surfaces of all members on common axes, averaged over the images, in eval mode (RED, Fig. 1, 2).

    d1 is the sign of the gradient of the members' mean loss, d2 is +1 or -1 per pixel at random; both are the same for all members, so
    surfaces can be laid over one another. Points outside [0,1] are not cut: the plane stays a plane.

    Args:
        half_width: the grid goes from -half_width to half_width. num_points: G. seed: of d2.
    """
    members = ensemble_in(model).members
    with mode(model, "eval"):
        gradients = [input_gradient_of(member, x_BCHW, y_B, create_graph=False)[1] for member in members]
        ascent_BCHW = torch.stack(gradients).mean(dim=0).sign().view_as(x_BCHW)
        generator = torch.Generator().manual_seed(derive_seed(seed, "landscape"))
        signs_BCHW = torch.randint(0, 2, x_BCHW.shape, generator=generator).to(x_BCHW) * 2 - 1
        offsets_G = torch.linspace(-half_width, half_width, num_points, dtype=x_BCHW.dtype, device=x_BCHW.device)
        loss_NGG = x_BCHW.new_empty((len(members), num_points, num_points))
        for row, a in enumerate(offsets_G):
            for column, b in enumerate(offsets_G):
                point_BCHW = x_BCHW + a * ascent_BCHW + b * signs_BCHW
                for index, member in enumerate(members):
                    loss_NGG[index, row, column] = functional.cross_entropy(member(point_BCHW), y_B)
    return MemberLandscapes(offsets_G, loss_NGG)
