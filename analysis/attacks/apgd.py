"""Auto-PGD for randomized models: step size and best iterate are decided on common draws, and no example is ever dropped.

Shapes: B batch, K classes; x is (B, C, H, W) in [0,1].

Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020,
Algorithm 1 and section 4; expectation over draws: Athalye et al., Synthesizing Robust Adversarial Examples.
Deviation: the official code drops examples that one noisy forward misclassifies, and compares losses of different draws. Here losses
are compared on the same draws throughout, an example is optimized to the end, and the perturbed point is returned in any case. Only
where the attacked function is the deterministic one that scores is an example left alone once it errs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from analysis.attacked_model.model import AttackedModel, BestPoint
from analysis.attacks.losses import (
    LossName,
    TargetedDifferenceOfLogitsRatio,
    attack_loss,
    difference_of_logits_ratio,
    loss_of_rows,
)
from analysis.attacks.registry import AttackEntry, AttackOutput, AttackProblem, Cost
from models.configuration import Config
from models.errors import UserError
from models.randomness import derive_seed
from models.threat_model import Norm
from trainers.attacks import AttackLoss, ball_around

_MOMENTUM = 0.75  # alpha of the paper
_ENOUGH_INCREASES = 0.75  # rho of the paper
_COMPACT_EVERY = 5  # steps; at every step the shapes would change too often to pay


class ApgdParameters(Config):
    """Auto-PGD."""

    steps: int = Field(100, ge=1, description="Number of gradient steps (official strength: 100).")
    restarts: int = Field(1, ge=1, description="Runs from different starts; the best point on common draws is kept.")


class TargetedApgdParameters(ApgdParameters):
    """Auto-PGD towards each of the most likely wrong classes."""

    num_targets: int = Field(9, ge=1, description="Number of target classes, most likely first; at most K - 1 are used.")


def apgd(
    model: AttackedModel,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 100,
    loss: AttackLoss,
    restarts: int = 1,
    seed: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the ball around each image for the point of highest mean loss over the model's draws.

    Args:
        model: the model and the draws that the protocol allows.
        x, y: images in [0,1] (B, C, H, W) and labels (B,).
        epsilon: radius in pixels of [0,1]. norm: `linf` or `l2`.
        steps: gradient steps. loss: `(logits_BK, y_B) -> loss_B`, maximized.
        restarts: runs from different random starts. seed: of the starts.
        rows: attack only these images (ascending); what they see does not depend on which others are attacked. None: all.

    Returns:
        Of the images attacked: perturbed images, their mean loss (B,) and the share of common draws that err (B,). The clean image is
        never a candidate.
    """
    best = BestPoint(model.is_exact)
    ball = ball_around(x, epsilon, norm)
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    for restart in range(restarts):
        # The starts of the whole batch are drawn, so that an example's does not depend on the others' success.
        start = ball.random_start(torch.Generator().manual_seed(derive_seed(seed, "start", restart)))
        open_now = best.open_rows(model, rows)
        if open_now.numel() == 0:
            break
        kept = rows[open_now]
        run = _Run(model, x[kept], y[kept], start[kept], epsilon, norm, steps, loss_of_rows(loss, kept))
        best.update_rows_(open_now, *run.result())
    return best.result()


@dataclass
class _State:
    """What a run knows of each example it still works on; every tensor has one row per example."""

    x: Tensor
    y: Tensor
    current: Tensor
    previous: Tensor
    gradient: Tensor
    loss_B: Tensor
    highest_x: Tensor
    highest_gradient: Tensor
    highest_B: Tensor
    highest_before_B: Tensor
    step_size_B: Tensor
    increases_B: Tensor
    step_kept_B: Tensor

    def select(self, rows: Tensor) -> _State:
        """Return the state of these examples."""
        return _State(**{name: values[rows] for name, values in self.__dict__.items()})


class _Run:
    """One run from one start."""

    def __init__(
        self, model: AttackedModel, x: Tensor, y: Tensor, start: Tensor, epsilon: float, norm: Norm, steps: int, loss: AttackLoss
    ) -> None:
        self.model, self.epsilon, self.norm, self.steps, self.loss = model, epsilon, norm, steps, loss
        self.shape = (-1, *(1,) * (x.dim() - 1))
        self.best = BestPoint(model.is_exact)
        self.rows = torch.arange(len(x), device=x.device)  # of the batch, that are still worked on
        zeros_B = x.new_zeros(len(x))
        self.state = _State(
            x=x,
            y=y,
            current=start,
            previous=start,
            gradient=torch.zeros_like(x),
            loss_B=zeros_B,
            highest_x=start,
            highest_gradient=torch.zeros_like(x),
            highest_B=torch.full_like(zeros_B, -torch.inf),
            highest_before_B=zeros_B,
            step_size_B=torch.full_like(zeros_B, 2 * epsilon),
            increases_B=zeros_B.clone(),
            step_kept_B=torch.zeros_like(zeros_B, dtype=torch.bool),
        )

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run, and return the best points, their losses and shares of draws that err."""
        self._look(needs_gradient=True)
        self.state.highest_before_B = self.state.highest_B.clone()
        checkpoints = _checkpoints(self.steps)
        last_checkpoint = 0
        for step in range(self.steps):
            if step % _COMPACT_EVERY == 0 and not self._compact():
                break
            self._move(first=step == 0)
            self._look(needs_gradient=step + 1 < self.steps)
            if step + 1 in checkpoints:
                self._review(step + 1 - last_checkpoint)
                last_checkpoint = step + 1
        return self.best.result()

    def _look(self, needs_gradient: bool) -> None:
        """Evaluate the current points and enter them into both lists of best points."""
        state = self.state
        gradient = torch.zeros_like(state.current)
        if needs_gradient:
            gradient, loss_B, wrong_B = self.model.gradient(state.current, state.y, self.loss)
        if not (needs_gradient and self.model.is_exact):
            loss_B, wrong_B = self.model.score(state.current, state.y, self.loss)
        self.best.update_rows_(self.rows, state.current, loss_B, wrong_B)
        better_B = loss_B > state.highest_B  # never for NaN
        state.highest_B = torch.where(better_B, loss_B, state.highest_B)
        state.highest_x = torch.where(better_B.view(self.shape), state.current, state.highest_x)
        state.highest_gradient = torch.where(better_B.view(self.shape), gradient, state.highest_gradient)
        state.increases_B = state.increases_B + (loss_B > state.loss_B)
        state.gradient, state.loss_B = gradient, loss_B

    def _move(self, first: bool) -> None:
        state = self.state
        if first:
            state.increases_B = torch.zeros_like(state.increases_B)  # the start was no increase
        ball = ball_around(state.x, self.epsilon, self.norm)
        moved = ball.project_(state.current + state.step_size_B.view(self.shape) * _direction(state.gradient, self.norm))
        if not first:
            moved = state.current + _MOMENTUM * (moved - state.current) + (1 - _MOMENTUM) * (state.current - state.previous)
            moved = ball.project_(moved)
        state.previous, state.current = state.current, moved

    def _review(self, num_steps: int) -> None:
        """Halve the step size where the loss rarely rose or got stuck since the last review, and go back to the best point there."""
        state = self.state
        rarely_up_B = state.increases_B < _ENOUGH_INCREASES * num_steps
        stuck_B = state.step_kept_B & (state.highest_B <= state.highest_before_B)
        halve_B = rarely_up_B | stuck_B
        state.step_size_B = torch.where(halve_B, state.step_size_B / 2, state.step_size_B)
        back = halve_B.view(self.shape)
        state.current = torch.where(back, state.highest_x, state.current)
        state.previous = torch.where(back, state.current, state.previous)
        state.gradient = torch.where(back, state.highest_gradient, state.gradient)
        state.loss_B = torch.where(halve_B, state.highest_B, state.loss_B)
        state.step_kept_B = ~halve_B
        state.highest_before_B = state.highest_B.clone()
        state.increases_B = torch.zeros_like(state.increases_B)

    def _compact(self) -> bool:
        """Leave out the examples that need no further attack; return whether any is left."""
        if not self.model.stops_at_success:
            return True
        _, _, wrong_B = self.best.result()
        open_now = wrong_B[self.rows] == 0
        if not bool(open_now.all()):
            kept = open_now.nonzero().squeeze(1)
            self.rows = self.rows[kept]
            self.state = self.state.select(kept)
            self.loss = loss_of_rows(self.loss, kept)
        return self.rows.numel() > 0


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which the step size is reviewed: p_0 = 0, p_1 = 0.22, then shrinking gaps of at least 0.06."""
    positions = [0.0, 0.22]
    while positions[-1] < 1:
        positions.append(positions[-1] + max(positions[-1] - positions[-2] - 0.03, 0.06))
    return {step for position in positions[1:] if 0 < (step := int(-(-position * steps // 1))) <= steps}


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the direction of steepest ascent of unit length; a NaN or zero gradient gives zero."""
    if norm == "linf":
        return gradient.sign().nan_to_num(nan=0.0)
    dims = tuple(range(1, gradient.dim()))
    smallest = torch.finfo(gradient.dtype).tiny
    # By the largest component first: squares of small gradients would be zero in float32.
    scaled = gradient / gradient.abs().amax(dim=dims, keepdim=True).clamp_min(smallest)
    length = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return (scaled / length.clamp_min(smallest)).nan_to_num(nan=0.0)


def _untargeted(loss_name: LossName):
    def run(model: AttackedModel, problem: AttackProblem, parameters: ApgdParameters) -> AttackOutput:
        x_adv, _, _ = apgd(
            model,
            problem.x,
            problem.y,
            epsilon=problem.threat_model.epsilon,
            norm=problem.threat_model.norm,
            steps=parameters.steps,
            loss=attack_loss(loss_name, problem.num_classes),
            restarts=parameters.restarts,
            seed=problem.seed,
        )
        return AttackOutput(x_adv)

    return run


def _run_targeted(model: AttackedModel, problem: AttackProblem, parameters: TargetedApgdParameters) -> AttackOutput:
    _check_targeted(parameters, problem.num_classes)
    ranked_BK = model.mean_log_probability(problem.x).scatter(1, problem.y[:, None], -torch.inf)
    targets_BT = ranked_BK.argsort(dim=1, descending=True)[:, : min(parameters.num_targets, problem.num_classes - 1)]
    best = BestPoint(model.is_exact)
    for index in range(targets_BT.shape[1]):
        rows = best.open_rows(model, problem.x)
        if rows.numel() == 0:
            break
        x_adv, _, _ = apgd(
            model,
            problem.x,
            problem.y,
            epsilon=problem.threat_model.epsilon,
            norm=problem.threat_model.norm,
            steps=parameters.steps,
            loss=TargetedDifferenceOfLogitsRatio(targets_BT[:, index]),
            restarts=parameters.restarts,
            seed=derive_seed(problem.seed, "target", index),
            rows=rows,
        )
        # Losses towards different targets are not comparable; the untargeted one is.
        best.update_rows_(rows, x_adv, *model.score(x_adv, problem.y[rows], difference_of_logits_ratio))
    return AttackOutput(best.result()[0])


def _check_targeted(parameters: TargetedApgdParameters, num_classes: int) -> None:
    del parameters
    if num_classes < 4:
        raise UserError(f"attack 'apgd_targeted' needs at least 4 classes, the model has {num_classes}; use 'apgd_ce' or 'apgd_margin'")


def _check_dlr(parameters: ApgdParameters, num_classes: int) -> None:
    del parameters
    attack_loss("difference_of_logits_ratio", num_classes)


def _cost(parameters: ApgdParameters, num_draws: int, num_classes: int, fixed_draws: bool) -> Cost:
    runs = parameters.restarts
    extra = 0.0
    if isinstance(parameters, TargetedApgdParameters):
        targets = min(parameters.num_targets, num_classes - 1)
        runs *= targets
        extra = num_draws * (1 + targets)
    scored = num_draws if fixed_draws else num_draws * (parameters.steps + 1)
    return Cost(runs * (num_draws * parameters.steps + scored) + extra, runs * num_draws * parameters.steps)


ATTACKS = (
    AttackEntry("apgd_ce", "Auto-PGD on cross-entropy", ApgdParameters, ("linf", "l2"), _untargeted("cross_entropy"), _cost),
    AttackEntry(
        "apgd_dlr",
        "Auto-PGD on the difference-of-logits ratio",
        ApgdParameters,
        ("linf", "l2"),
        _untargeted("difference_of_logits_ratio"),
        _cost,
        check_arguments=_check_dlr,
        min_classes=3,
        instead="apgd_margin",
        ignores_scale=True,
    ),
    AttackEntry("apgd_margin", "Auto-PGD on the margin", ApgdParameters, ("linf", "l2"), _untargeted("margin"), _cost, ignores_scale=True),
    AttackEntry(
        "apgd_targeted",
        "Auto-PGD on the targeted difference-of-logits ratio",
        TargetedApgdParameters,
        ("linf", "l2"),
        _run_targeted,
        _cost,
        check_arguments=_check_targeted,
        min_classes=4,
        instead="apgd_margin",
        ignores_scale=True,
    ),
)
