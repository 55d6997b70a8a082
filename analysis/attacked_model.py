"""A model as an attack under some protocol sees it: a family of deterministic functions, one per draw, and which draws it may use.

Shapes: B batch, K classes, N draws averaged inside a predictor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from analysis.draws import Draw, DrawSource, set_draw
from models.randomness import RandomModule, derive_seed
from trainers.attacks import AttackLoss


class Predictor:
    """`logits(x, draw)`: the model under a named draw, or the logarithm of its mean probability over several draws.

    Args:
        model: maps pixels of [0,1] (B, C, H, W) to logits (B, K).
        num_averaged: N, draws averaged in one prediction; each named draw then stands for N draws derived from it.
        averaged_draws: average exactly these draws instead: the predictor is then deterministic.
    """

    def __init__(self, model: nn.Module, num_averaged: int = 1, averaged_draws: Sequence[Draw] | None = None) -> None:
        self.model = model
        self.num_averaged = num_averaged if averaged_draws is None else len(averaged_draws)
        self._averaged_draws = tuple(averaged_draws) if averaged_draws is not None else None

    def members(self, draw: Draw) -> tuple[Draw, ...]:
        """Return the model's draws behind one draw of the predictor."""
        if self._averaged_draws is not None:
            return self._averaged_draws
        if self.num_averaged == 1:
            return (draw,)
        return tuple(Draw("seed", derive_seed(draw.value, "member", index)) for index in range(self.num_averaged))

    def logits(self, x_BCHW: Tensor, draw: Draw) -> Tensor:
        """Return logits (B, K); of an averaged predictor, log-probabilities."""
        outputs = []
        for member in self.members(draw):
            set_draw(self.model, member)
            outputs.append(self.model(x_BCHW))
        if len(outputs) == 1:
            return outputs[0]
        return torch.stack(outputs).log_softmax(-1).logsumexp(0) - math.log(len(outputs))


class AttackedModel(RandomModule):
    """What an attack may ask: gradients over the protocol's draws, and scores of points on common draws.

    It is a random site itself: `resample` moves it to the source's next draw, so that code which knows only models and `resample`
    (projected gradient descent of the trainers) attacks it under any protocol. The attacked model is deliberately no submodule.

    Attributes:
        num_forward, num_backward: images sent forward and backward so far.
        used: seeds of all draws used so far.
    """

    def __init__(self, predictor: Predictor, source: DrawSource) -> None:
        super().__init__()
        self.predictor = predictor  # no module itself, so the attacked model stays out of the module tree
        self.source = source
        self.num_forward = 0
        self.num_backward = 0
        self.used: set[Draw] = set()
        self._generation = 0
        self._current = source.comparison(0)[0]

    @property
    def num_configurations(self) -> float:
        """A continuum: the draws are counted on the attacked model itself."""
        return math.inf

    @property
    def is_exact(self) -> bool:
        """Whether gradients and scores see one and the same fixed set of draws, so that comparisons have no noise."""
        return self.source.is_fixed

    @property
    def is_single(self) -> bool:
        """Whether the attack faces one deterministic function."""
        return self.source.is_fixed and self.source.count == 1

    def draw(self, generator: torch.Generator) -> None:
        """Move to the source's next draw; the generator is not used."""
        del generator
        self._current = self.source.take()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.logits(x_BCHW, self._current)

    def logits(self, x_BCHW: Tensor, draw: Draw) -> Tensor:
        """Return logits (B, K) under a named draw, and count the passes."""
        self.used.update(self.predictor.members(draw))
        self.used.add(draw)
        logits_BK = self.predictor.logits(x_BCHW, draw)
        images = x_BCHW.shape[0] * self.predictor.num_averaged
        self.num_forward += images
        if logits_BK.requires_grad:
            logits_BK.register_hook(lambda _gradient: self._count_backward(images))
        return logits_BK

    def _count_backward(self, images: int) -> None:
        self.num_backward += images

    def gradient(self, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradient of the mean loss, mean loss (B,) and share of draws that err (B,), over the source's next draws."""
        leaf = x_BCHW.detach().requires_grad_()
        total = torch.zeros_like(leaf)
        loss_B = x_BCHW.new_zeros(len(x_BCHW))
        wrong_B = x_BCHW.new_zeros(len(x_BCHW))
        with torch.enable_grad():
            for _ in range(self.source.count):
                logits_BK = self.logits(leaf, self.source.take())
                values_B = loss(logits_BK, y_B)
                (gradient,) = torch.autograd.grad(values_B.sum(), leaf)
                total += gradient
                loss_B += values_B.detach()
                wrong_B += logits_BK.detach().argmax(1) != y_B
        count = self.source.count
        return total / count, loss_B / count, wrong_B / count

    @torch.no_grad()
    def score(self, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
        """Return mean loss (B,) and share of draws that err (B,), over the common draws."""
        loss_B = x_BCHW.new_zeros(len(x_BCHW))
        wrong_B = x_BCHW.new_zeros(len(x_BCHW))
        draws = self.source.comparison(self._generation)
        for draw in draws:
            logits_BK = self.logits(x_BCHW, draw)
            loss_B += loss(logits_BK, y_B)
            wrong_B += logits_BK.argmax(1) != y_B
        return loss_B / len(draws), wrong_B / len(draws)

    @torch.no_grad()
    def mean_log_probability(self, x_BCHW: Tensor) -> Tensor:
        """Return the logarithm of the mean probability (B, K) over the common draws."""
        draws = self.source.comparison(self._generation)
        logits_DBK = torch.stack([self.logits(x_BCHW, draw) for draw in draws])
        return logits_DBK.log_softmax(-1).logsumexp(0) - math.log(len(draws))

    def renew_common_draws(self) -> None:
        """Exchange the common draws, so that a long search cannot adapt to them. Fixed draws stay."""
        self._generation += 1


class BestPoint:
    """Per example, the best point seen so far: by mean loss, or, without noise, by the share of draws that err and then the loss.

    Args:
        exact: comparisons have no noise.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.x: Tensor | None = None
        self.loss_B: Tensor | None = None
        self.wrong_B: Tensor | None = None

    def update_(self, x_BCHW: Tensor, loss_B: Tensor, wrong_B: Tensor) -> Tensor:
        """Take over the examples that improved and return which did (B,)."""
        loss_B = loss_B.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if self.x is None or self.loss_B is None or self.wrong_B is None:
            self.x, self.loss_B, self.wrong_B = x_BCHW.clone(), loss_B.clone(), wrong_B.clone()
            return torch.ones_like(loss_B, dtype=torch.bool)
        better_B = loss_B > self.loss_B
        if self.exact:
            better_B = (wrong_B > self.wrong_B) | ((wrong_B == self.wrong_B) & better_B)
        self.x = torch.where(better_B.view(-1, *(1,) * (x_BCHW.dim() - 1)), x_BCHW, self.x)
        self.loss_B = torch.where(better_B, loss_B, self.loss_B)
        self.wrong_B = torch.where(better_B, wrong_B, self.wrong_B)
        return better_B

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return points, losses and shares of draws that err."""
        assert self.x is not None and self.loss_B is not None and self.wrong_B is not None
        return self.x, self.loss_B, self.wrong_B
