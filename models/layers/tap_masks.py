"""The random space of DCS: which n of the k*k taps of a convolution kernel are kept.

Taps are numbered row by row, 0 to k*k - 1; a mask is an ascending tuple of n taps.
Shapes: R rows (one per mask to choose), T = k*k taps.
Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from models.errors import UserError, unknown_name

Sampling = Literal["uniform", "stratified2"]
Gsat = Literal["off", "attack", "chain"]

NUM_CLASSES = 4


@dataclass(frozen=True)
class TapMaskSpace:
    """All masks of n of k*k taps.

    Attributes:
        kernel_size: k, odd.
        num_taps: n.
        sampling: `uniform`: every set of n taps, equally likely; `stratified2`: the taps fall into four classes by the parities of
            row and column, n different classes are chosen uniformly and one tap uniformly in each (the paper's "cancel X^u", as coded).

    Raises:
        UserError: k is even, or n is out of range.
    """

    kernel_size: int
    num_taps: int
    sampling: Sampling = "uniform"

    def __post_init__(self) -> None:
        k, n = self.kernel_size, self.num_taps
        if self.sampling not in get_args(Sampling):
            raise unknown_name("sampling", self.sampling, get_args(Sampling))
        if k < 1 or k % 2 == 0:
            raise UserError(f"kernel_size is {k}; it must be odd and positive, e.g. 3 or 5")
        if not 1 <= n <= k * k:
            raise UserError(f"num_taps is {n}; a {k}x{k} kernel has 1 to {k * k} taps")
        if self.sampling == "stratified2" and n > len(self._nonempty_classes):
            raise UserError(
                f"num_taps is {n}; sampling stratified2 takes at most one tap of each of the "
                f"{len(self._nonempty_classes)} parity classes of a {k}x{k} kernel"
            )

    def check_disjoint(self) -> None:
        """Raise a `UserError` unless to every mask there is one that shares no tap with it (what GSAT needs)."""
        k, n = self.kernel_size, self.num_taps
        if 2 * n > k * k:
            raise UserError(f"gsat needs two disjoint masks, 2 n <= k k; num_taps is {n} and a {k}x{k} kernel has {k * k} taps")
        if self.sampling == "stratified2":
            sizes = sorted(len(self.classes[index]) for index in self._nonempty_classes)
            left = sum(size - (position < n) > 0 for position, size in enumerate(sizes))
            if left < n:
                raise UserError(
                    f"gsat with stratified2 needs taps left in {n} parity classes after a mask is taken away; a {k}x{k} kernel keeps {left}"
                )

    @property
    def size(self) -> int:
        """Number of masks."""
        if self.sampling == "uniform":
            return math.comb(self.kernel_size**2, self.num_taps)
        return sum(count for _, count in self._subsets)

    @property
    def num_scores(self) -> int:
        """Number of uniform random numbers that `choose` needs for one mask."""
        return self.kernel_size**2 + NUM_CLASSES

    @cached_property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """The taps of each of the four parity classes."""
        k = self.kernel_size
        return tuple(
            tuple(row * k + column for row in range(k) for column in range(k) if (row % 2, column % 2) == parity)
            for parity in itertools.product((0, 1), repeat=2)
        )

    @cached_property
    def _nonempty_classes(self) -> tuple[int, ...]:
        return tuple(index for index, members in enumerate(self.classes) if members)

    @cached_property
    def _subsets(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """The sets of n classes, each with its number of masks."""
        return tuple(
            (subset, math.prod(len(self.classes[index]) for index in subset))
            for subset in itertools.combinations(self._nonempty_classes, self.num_taps)
        )

    def taps(self, index: int) -> tuple[int, ...]:
        """Return mask number `index` in [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"configuration {index} is outside [0, {self.size})")
        if self.sampling == "stratified2":
            subset, index = self._subset_of(index)
            chosen = []
            for group in subset:
                index, position = divmod(index, len(self.classes[group]))
                chosen.append(self.classes[group][position])
            return tuple(sorted(chosen))
        chosen = []
        tap = 0
        for remaining in range(self.num_taps, 0, -1):
            while index >= (following := math.comb(self.kernel_size**2 - tap - 1, remaining - 1)):
                index -= following
                tap += 1
            chosen.append(tap)
            tap += 1
        return tuple(chosen)

    def probability(self, index: int) -> float:
        """Return the probability of mask number `index`: 1/size, except where classes of unequal size are chosen from."""
        if self.sampling == "uniform":
            return 1 / self.size
        subset, _ = self._subset_of(index)
        return 1 / len(self._subsets) / math.prod(len(self.classes[group]) for group in subset)

    def _subset_of(self, index: int) -> tuple[tuple[int, ...], int]:
        for subset, count in self._subsets:
            if index < count:
                return subset, index
            index -= count
        raise IndexError(f"there are {self.size} masks")

    def choose(self, scores: Tensor, available: Tensor) -> Tensor:
        """Turn uniform random numbers into masks.

        Args:
            scores: (R, num_scores), uniform in [0,1).
            available: (R, T) bool, taps that may be chosen.

        Returns:
            (R, n) taps, ascending in each row.
        """
        num_taps = self.kernel_size**2
        tap_scores = scores[:, :num_taps].masked_fill(~available, -1.0)
        if self.sampling == "uniform":
            return tap_scores.topk(self.num_taps, dim=1).indices.sort(dim=1).values
        best, best_score = [], []
        for members in self.classes:
            if not members:
                best.append(torch.zeros(len(scores), dtype=torch.int64))
                best_score.append(torch.full((len(scores),), -1.0, dtype=scores.dtype))
                continue
            value, position = tap_scores[:, list(members)].max(dim=1)
            best.append(torch.tensor(members)[position])
            best_score.append(value)
        class_scores = scores[:, num_taps:].masked_fill(torch.stack(best_score, dim=1) < 0, -1.0)
        chosen = class_scores.topk(self.num_taps, dim=1).indices
        return torch.stack(best, dim=1).gather(1, chosen).sort(dim=1).values
