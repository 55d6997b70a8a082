"""How much an attack on one draw is worth against another: gradient cosines and transfer accuracy, as functions of their distance.

Shapes: B batch, P pairs of draws. Every function works in eval mode and leaves modes, draws and streams as they were.

Distance of two draws: what each random site makes of it (`RandomModule.distance`), summed over the sites. RNA, 1 where the choices differ
(the paper's path difference); DCS, the number of taps that are not shared; CTRW, 1 - correlation of the two normal draws (0 equal, about 1
independent); an ensemble, 1 where different members answer; any other site, 1 where the draws differ.

References: Dong et al., "Random Normalization Aggregation", NeurIPS 2022, Fig. 3 and 5c; Ma et al., "Adversarial Robustness through Random
Weight Sampling", NeurIPS 2023, Eq. 6; Ma et al., "Deformable Convolution with Stochasticity", ICML 2025, Eq. 6 and Fig. 4b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analysis.attacked_model.draws import seeded_draws, set_draw
from models.modes import mode
from models.randomness import (
    frozen,
    load_randomness_state,
    random_sites,
    randomness_state,
)
from trainers.attacks import input_gradient

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""`(model, x_BCHW, y_B) -> adversarial x_BCHW`, on the draw that the model holds."""

DrawState = dict[str, dict[str, Any]]
"""The draw of every random site by its dotted name."""


class DrawPair(NamedTuple):
    """Two draws of one model: the one that is attacked, the one that answers, and their distance."""

    attacked: DrawState
    scored: DrawState
    distance: float


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode within; modes, draws and streams are as before afterwards, also after an exception."""
    state = randomness_state(model)
    try:
        with mode(model, "eval"):
            yield
    finally:
        load_randomness_state(model, state)


def current_draw(model: nn.Module) -> DrawState:
    """Return the draw that `model` holds."""
    return {name: site.draw_state() for name, site in random_sites(model)}


def restore_draw(model: nn.Module, draw: DrawState) -> None:
    """Put a draw from `current_draw` in place."""
    for name, site in random_sites(model):
        site.load_draw_state(draw[name])


def draw_distance(model: nn.Module, first: DrawState, second: DrawState) -> float:
    """Return the distance of two draws of `model`; see the head of this module."""
    return sum(site.distance(first[name], second[name]) for name, site in random_sites(model))


def random_pairs(model: nn.Module, num_pairs: int, seed: int = 0) -> list[DrawPair]:
    """Return pairs of independent draws, what an attack on a frozen draw and a later answer amount to."""
    pairs = []
    with undisturbed(model):
        for attacked, scored in zip(seeded_draws(num_pairs, seed, "attacked"), seeded_draws(num_pairs, seed, "scored"), strict=True):
            set_draw(model, attacked)
            first = current_draw(model)
            set_draw(model, scored)
            second = current_draw(model)
            pairs.append(DrawPair(first, second, draw_distance(model, first, second)))
    return pairs


@dataclass(frozen=True)
class GradientCosines:
    """Cosines of the input gradients of each image under two draws, or two models.

    Attributes:
        cosine_PB: float64, in [-1,1]; 0 where a gradient vanishes.
        distance_P: distances of the pairs.
        num_zero_gradients: how many of the 2 P B gradients vanish exactly; many of them mean masked gradients, not a small cosine.
    """

    cosine_PB: Tensor
    distance_P: Tensor
    num_zero_gradients: int

    @property
    def mean(self) -> float:
        """Mean over pairs and images."""
        return self.cosine_PB.mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over pairs and images."""
        return self.cosine_PB.std(correction=0).item()

    def histogram(self, num_bins: int = 40) -> tuple[Tensor, Tensor]:
        """Return counts (num_bins,) and bin edges (num_bins + 1,) over [-1,1]."""
        edges = torch.linspace(-1, 1, num_bins + 1, dtype=torch.float64)
        bins = torch.bucketize(self.cosine_PB.flatten().clamp(-1, 1).cpu(), edges[1:-1], right=True)
        return bins.bincount(minlength=num_bins), edges


def gradient_cosines(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, pairs: Sequence[DrawPair]) -> GradientCosines:
    """Return the cosines of the cross-entropy's input gradients under the two draws of each pair."""
    rows, zeros = [], 0
    with undisturbed(model):
        for pair in pairs:
            gradients = []
            for draw in (pair.attacked, pair.scored):
                restore_draw(model, draw)
                gradients.append(input_gradient(model, x_BCHW, y_B)[0])
            cosine_B, missing = cosine_per_example(*gradients)
            rows.append(cosine_B)
            zeros += missing
    distance_P = torch.tensor([pair.distance for pair in pairs], dtype=torch.float64)
    return GradientCosines(torch.stack(rows), distance_P, zeros)


def gradient_cosines_between_models(first: nn.Module, second: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> GradientCosines:
    """Return the cosines of the input gradients of two models, each on the draw that it holds (RNA, Fig. 3, separate networks)."""
    gradients = []
    for model in (first, second):
        with mode(model, "eval"):
            gradients.append(input_gradient(model, x_BCHW, y_B)[0])
    cosine_B, zeros = cosine_per_example(*gradients)
    return GradientCosines(cosine_B[None], torch.zeros(1, dtype=torch.float64), zeros)


def cosine_per_example(first: Tensor, second: Tensor) -> tuple[Tensor, int]:
    """Return the cosine (B,) of two gradients (B, ...) in float64, 0 where one vanishes, and how many of the 2 B vanish."""
    a, b = first.double().flatten(1), second.double().flatten(1)
    # Scaled first: the squares of tiny gradients would vanish.
    a = a / a.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    b = b / b.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine_B = torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return cosine_B, int((a == 0).all(1).sum() + (b == 0).all(1).sum())


@dataclass(frozen=True)
class TransferRecord:
    """One pair: how many images stay right when the draw that was not attacked answers.

    Attributes:
        distance: of the two draws.
        accuracy: on the scored draw, in [0,1].
        accuracy_on_attacked_draw: on the draw that was attacked, the classical white-box value.
    """

    distance: float
    accuracy: float
    accuracy_on_attacked_draw: float


def transfer(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, attack: Attack, pairs: Iterable[DrawPair]) -> list[TransferRecord]:
    """Attack the one draw of each pair and score both."""
    records = []
    with undisturbed(model):
        for pair in pairs:
            restore_draw(model, pair.attacked)
            with frozen(model):
                adversarial = attack(model, x_BCHW, y_B)
            own = _accuracy(model, adversarial, y_B)
            restore_draw(model, pair.scored)
            records.append(TransferRecord(pair.distance, _accuracy(model, adversarial, y_B), own))
    return records


@dataclass(frozen=True)
class TransferAtDistance:
    """Transfer accuracies of the pairs at one distance (a point of RNA, Fig. 5c)."""

    distance: float
    num_pairs: int
    mean: float
    minimum: float
    maximum: float


def transfer_by_distance(records: Sequence[TransferRecord]) -> list[TransferAtDistance]:
    """Group records by distance (rounded to 6 digits), ascending."""
    points = []
    for distance, indices in _groups([record.distance for record in records]):
        accuracies = [records[index].accuracy for index in indices]
        points.append(TransferAtDistance(distance, len(indices), sum(accuracies) / len(indices), min(accuracies), max(accuracies)))
    return points


@torch.no_grad()
def _accuracy(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> float:
    return (model(x_BCHW).argmax(dim=1) == y_B).double().mean().item()


def _groups(distances: Sequence[float]) -> list[tuple[float, list[int]]]:
    groups: dict[float, list[int]] = {}
    for index, distance in enumerate(distances):
        groups.setdefault(round(distance, 6), []).append(index)
    return sorted(groups.items())
