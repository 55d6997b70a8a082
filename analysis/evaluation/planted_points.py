"""A unit test for attacks: give the model a head for which an adversarial point provably exists, and see whether the attack finds it.

For each image a corner of its ball (l2: a point of the sphere) is drawn, together with points inside. A linear two-class head on the
model's own features is fitted that rises from the image and the inner points towards the corner. Its threshold lies a quarter of the way
from the best of 200 random points to the corner: the corner is beyond it, so an adversarial point exists, and chance hardly finds one. The
attack is then run against that head through the unchanged network. Gradients that lead anywhere get past what chance finds; an attack that
does not would not find other points either.

A randomized model is tested on one frozen draw, so that existence is certain.

Shapes: B images, D features, P points per image.

Reference: Zimmermann, Brendel, Tramer, Carlini, Increasing Confidence in Adversarial Robustness Evaluations, NeurIPS 2022.
Deviation: the head is the ridge regression of the points' sides on the features; the threshold is set by what chance finds, because a
needle that only the corner itself satisfies is missed by sound attacks on sound networks as well. Images whose corner is not beyond the
random points are left out and counted. Where different images pass different layers there is no common head, and no test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import Draw, FixedDraws, set_draw
from analysis.attacked_model.model import AttackedModel, Predictor
from analysis.attacks.registry import AttackEntry, AttackProblem
from models.configuration import Config
from models.randomness import derive_seed
from models.threat_model import ThreatModel
from trainers.attacks import ball_around

_NUM_INNER = 48
_INNER_SHARE = 0.9  # of the radius within which inner points lie
_NUM_RANDOM = 200
_BEYOND_CHANCE = 0.25  # of the way from the best random point to the corner: where the threshold lies
_RIDGE = 1e-3


class _NoCommonHead(Exception):
    """The layer does not see one row of features per image: which layers an image passes depends on the image."""


class HeadedPredictor(Predictor):
    """The model's features under a two-class head of each image's own: logits (B, 2), class 1 beyond the head's plane.

    Rows of a batch must be the images of the heads, in order.
    """

    def __init__(self, model: nn.Module, layer: nn.Linear, weight_BD: Tensor, bias_B: Tensor) -> None:
        super().__init__(model)
        self.layer, self.weight_BD, self.bias_B = layer, weight_BD, bias_B

    def score(self, x_BCHW: Tensor, draw: Draw) -> Tensor:
        """Return the signed distance of each image beyond the plane of its head (B,), in units of the head."""
        set_draw(self.model, draw)
        return (_features(self.model, self.layer, x_BCHW) * self.weight_BD).sum(1) + self.bias_B

    def logits(self, x_BCHW: Tensor, draw: Draw) -> Tensor:
        score_B = self.score(x_BCHW, draw)
        return torch.stack([-score_B / 2, score_B / 2], dim=1)


def last_linear_layer(model: nn.Module, x: Tensor) -> nn.Linear | None:
    """Return the last linear layer that a forward of `model` runs, on whose input a head can be put; None if there is none."""
    called: list[nn.Linear] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        assert isinstance(layer, nn.Linear)
        if inputs[0].dim() == 2 and len(inputs[0]) == len(x):
            called.append(layer)

    handles = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called else None


def run_unit_test(
    model: nn.Module,
    x: Tensor,
    draw: Draw,
    threat_model: ThreatModel,
    entry: AttackEntry,
    parameters: Config,
    *,
    seed: int,
) -> dict[str, Any]:
    """Run the test and return its facts: how many images were tested, and how many the attack and a random search solved.

    Args:
        model: the model, in the mode of the evaluation. draw: the draw that is held.
        x: images (B, C, H, W). threat_model: norm and radius.
        entry, parameters: the attack; it must work with two classes.
        seed: of corners, inner points and the attack.
    """
    set_draw(model, draw)
    layer = last_linear_layer(model, x[:2] if len(x) > 1 else x)
    if layer is None:
        return {"reason": "the model has no linear layer on whose features a head can be put"}
    try:
        return _run(model, layer, x, draw, threat_model, entry, parameters, seed=seed)
    except _NoCommonHead:
        return {"reason": "which layers an image passes depends on the image, so that no head can be put on one of them"}


def _run(
    model: nn.Module,
    layer: nn.Linear,
    x: Tensor,
    draw: Draw,
    threat_model: ThreatModel,
    entry: AttackEntry,
    parameters: Config,
    *,
    seed: int,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "points"))
    ball = ball_around(x, threat_model.epsilon, threat_model.norm)
    corner = _corner(x, threat_model, generator)
    inner_ball = ball_around(x, _INNER_SHARE * threat_model.epsilon, threat_model.norm)
    with torch.no_grad():
        inside_PBD = torch.stack(
            [_features(model, layer, x)] + [_features(model, layer, inner_ball.random_start(generator)) for _ in range(_NUM_INNER)]
        )
        outside_BD = _features(model, layer, corner)
        weight_BD = _fitted_heads(inside_PBD, outside_BD)
        predictor = HeadedPredictor(model, layer, weight_BD, torch.zeros_like(weight_BD[:, 0]))
        reached_B = (outside_BD * weight_BD).sum(1)
        by_chance_B = torch.full_like(reached_B, -torch.inf)
        for _ in range(_NUM_RANDOM):
            by_chance_B = torch.maximum(by_chance_B, predictor.score(ball.random_start(generator), draw))
        gap_B = reached_B - by_chance_B
        # In units of the gap, so that float32 and the loss see numbers of order one.
        separated_B = gap_B > 1e-4 * reached_B.abs()
        scale_B = gap_B.abs().clamp_min(torch.finfo(gap_B.dtype).tiny)
        predictor.weight_BD = weight_BD / scale_B[:, None]
        predictor.bias_B = -(by_chance_B / scale_B + _BEYOND_CHANCE)
        rows = separated_B.nonzero().squeeze(1)
        if rows.numel() == 0:
            return {"reason": "no head separates a corner from the points inside", "num_separated": 0, "num_images": len(x)}
        found_at_random_B = torch.zeros_like(separated_B)
        for _ in range(_NUM_RANDOM):
            found_at_random_B |= predictor.logits(ball.random_start(generator), draw).argmax(1) == 1
    attacked = AttackedModel(predictor, FixedDraws((draw,)))
    problem = AttackProblem(x, torch.zeros(len(x), dtype=torch.long, device=x.device), threat_model, 2, seed)
    x_adv = entry.run(attacked, problem, parameters).x
    with torch.no_grad():
        found_B = predictor.logits(x_adv, draw).argmax(1) == 1
    return {
        "num_images": len(x),
        "num_separated": len(rows),
        "num_found": int(found_B[rows].sum()),
        "num_found_at_random": int(found_at_random_B[rows].sum()),
    }


def _corner(x: Tensor, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
    if threat_model.norm == "linf":
        direction = (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x)
        step = threat_model.epsilon * direction
    else:
        direction = torch.randn(x.shape, generator=generator).to(x)
        step = threat_model.epsilon * direction / torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)
    return (x + step).clamp(0, 1)


def _fitted_heads(inside_PBD: Tensor, outside_BD: Tensor) -> Tensor:
    """Return weights (B, D) along which the outside point is far from the points inside, in units of their distance."""
    centre_BD = inside_PBD.double().mean(0)
    deviations_BPD = (inside_PBD.double() - centre_BD).transpose(0, 1)
    towards_BD = outside_BD.double() - centre_BD
    # (A' A + ridge) w = towards, in the space of the points: w = (towards - A' (A A' + ridge)^-1 A towards) / ridge.
    gram_BPP = deviations_BPD @ deviations_BPD.transpose(1, 2)
    ridge_B11 = (_RIDGE * gram_BPP.diagonal(dim1=1, dim2=2).mean(1) + 1e-12).view(-1, 1, 1)
    eye_PP = torch.eye(gram_BPP.shape[1], dtype=gram_BPP.dtype, device=gram_BPP.device)
    solved_BP1 = torch.linalg.solve(gram_BPP + ridge_B11 * eye_PP, deviations_BPD @ towards_BD[:, :, None])
    weight_BD = towards_BD - (deviations_BPD.transpose(1, 2) @ solved_BP1)[:, :, 0]
    length_B1 = (weight_BD * towards_BD).sum(1, keepdim=True).abs().clamp_min(1e-300)
    return (weight_BD / length_B1).to(outside_BD.dtype)


def _features(model: nn.Module, layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the input (B, D) of the layer."""
    with _captured(layer) as captured:
        model(x)
    if not captured or captured[-1].dim() != 2 or len(captured[-1]) != len(x):
        raise _NoCommonHead
    return captured[-1]


@contextmanager
def _captured(layer: nn.Linear) -> Iterator[list[Tensor]]:
    captured: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        captured.append(inputs[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        yield captured
    finally:
        handle.remove()


__all__ = ["HeadedPredictor", "last_linear_layer", "run_unit_test"]
