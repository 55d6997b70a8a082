"""A model as an attack under some protocol sees it: a family of deterministic functions, one per draw, and which draws it may use.

Shapes: B batch, K classes, N draws averaged inside a predictor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import Draw, DrawSource, FixedDraws, set_draw
from models.errors import UserError
from models.randomness import RandomModule, derive_seed
from models.shared_prefix import SharedPrefix
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

    @property
    def averages_named_draws(self) -> bool:
        """Whether the predictor is a deterministic function whatever draw is asked for."""
        return self._averaged_draws is not None

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
            outputs.append(self._answer(x_BCHW))
        if len(outputs) == 1:
            return outputs[0]
        return torch.stack(outputs).log_softmax(-1).logsumexp(0) - math.log(len(outputs))

    def _answer(self, x_BCHW: Tensor) -> Tensor:
        try:
            logits_BK: Tensor = self.model(x_BCHW)
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            if getattr(self.model, "spec", None) is not None:
                raise
            text = str(error).strip().partition("\n")[0][:300]
            raise UserError(f"the model answered before, and raises on images of an attack: {type(error).__name__}: {text}") from error
        return logits_BK


@dataclass
class Passes:
    """What an attack spent: images sent forward and backward, and the draws it saw."""

    num_forward: int = 0
    num_backward: int = 0
    used: set[Draw] = field(default_factory=set)


class AttackedModel(RandomModule):
    """What an attack may ask: gradients over the protocol's draws, and scores of points on common draws.

    It is a random site itself: `resample` moves it to the source's next draw, so that code which knows only models and `resample`
    (projected gradient descent of the trainers) attacks it under any protocol. The attacked model is deliberately no submodule.

    Args:
        predictor: the model under named draws.
        source: the draws that the protocol allows.
        stops_at_success: an example that errs need not be attacked further, because the very function that is attacked is the one
            that scores, and each row of a batch is answered by itself. Never for randomized models.
        passes: where passes are counted; None: a new count.
    """

    def __init__(self, predictor: Predictor, source: DrawSource, *, stops_at_success: bool = False, passes: Passes | None = None) -> None:
        super().__init__()
        self.predictor = predictor  # no module itself, so the attacked model stays out of the module tree
        self.source = source
        self.stops_at_success = stops_at_success
        self.passes = passes or Passes()
        self._generation = 0
        self._current = source.comparison(0)[0]

    @property
    def num_configurations(self) -> float:
        """A continuum: the draws are counted on the attacked model itself."""
        return math.inf

    @property
    def network(self) -> nn.Module:
        """The network that answers."""
        return self.predictor.model

    @property
    def is_exact(self) -> bool:
        """Whether gradients and scores see one and the same fixed set of draws, so that comparisons have no noise."""
        return self.source.is_fixed

    def on(self, source: DrawSource, predictor: Predictor | None = None) -> AttackedModel:
        """Return the same model under other draws, or another predictor; passes are counted here as well. It never stops at success."""
        return AttackedModel(predictor or self.predictor, source, passes=self.passes)

    def frozen_draws(self, count: int | None = None) -> tuple[Draw, ...]:
        """Return draws to hold for a whole attack: the fixed ones, or `count` new ones (None: as many as one gradient averages)."""
        if isinstance(self.source, FixedDraws):
            return self.source.draws
        return tuple(self.source.take() for _ in range(count or self.source.count))

    @property
    def num_forward(self) -> int:
        """Images sent forward so far."""
        return self.passes.num_forward

    @property
    def num_backward(self) -> int:
        """Images sent backward so far."""
        return self.passes.num_backward

    @property
    def used(self) -> set[Draw]:
        """All draws used so far."""
        return self.passes.used

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
        self.passes.num_forward += images
        if logits_BK.requires_grad:
            logits_BK.register_hook(lambda _gradient: self._count_backward(images))
        return logits_BK

    def _count_backward(self, images: int) -> None:
        self.passes.num_backward += images

    def gradient(self, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradient of the mean loss, mean loss (B,) and share of draws that err (B,), over the source's next draws."""
        leaf = x_BCHW.detach().requires_grad_()
        loss_B = x_BCHW.new_zeros(len(x_BCHW))
        wrong_B = x_BCHW.new_zeros(len(x_BCHW))
        count = self.source.count
        with torch.enable_grad(), SharedPrefix(self, leaf, count * self.predictor.num_averaged) as shared:
            for _ in range(count):
                logits_BK = self.logits(leaf, self.source.take())
                values_B = loss(logits_BK, y_B)
                shared.add_gradient_of(values_B.sum())
                loss_B += values_B.detach()
                wrong_B += logits_BK.detach().argmax(1) != y_B
            total = shared.input_gradient()
        return total / count, loss_B / count, wrong_B / count

    @torch.no_grad()
    def score(self, x_BCHW: Tensor, y_B: Tensor, loss: AttackLoss) -> tuple[Tensor, Tensor]:
        """Return mean loss (B,) and share of draws that err (B,), over the common draws."""
        loss_B = x_BCHW.new_zeros(len(x_BCHW))
        wrong_B = x_BCHW.new_zeros(len(x_BCHW))
        draws = self.source.comparison(self._generation)
        with SharedPrefix(self, x_BCHW, len(draws) * self.predictor.num_averaged):
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

    def update_rows_(self, rows: Tensor, x_RCHW: Tensor, loss_R: Tensor, wrong_R: Tensor) -> None:
        """Take over the examples of `rows` (ascending) that improved; the first call must give all examples."""
        if self.x is None or len(rows) == len(self.x):  # rows are ascending, so these are all of them
            self.update_(x_RCHW, loss_R, wrong_R)
            return
        part = self.select(rows)
        part.update_(x_RCHW, loss_R, wrong_R)
        for whole, piece in zip(self.result(), part.result(), strict=True):
            whole[rows] = piece

    def select(self, rows: Tensor) -> BestPoint:
        """Return the best points of these examples, as copies."""
        part = BestPoint(self.exact)
        part.x, part.loss_B, part.wrong_B = (values[rows] for values in self.result())
        return part

    def open_rows(self, model: AttackedModel, x: Tensor) -> Tensor:
        """Return the examples of x that are still to be attacked: all, or those that do not err where that is enough."""
        if self.wrong_B is None or not model.stops_at_success:
            return torch.arange(len(x), device=x.device)
        return (self.wrong_B == 0).nonzero().squeeze(1)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return points, losses and shares of draws that err."""
        assert self.x is not None and self.loss_B is not None and self.wrong_B is not None
        return self.x, self.loss_B, self.wrong_B
