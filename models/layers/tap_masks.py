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


@dataclass(frozen=True)
class TapMaskSpace:
    """All masks of n of k*k taps.

    Attributes:
        kernel_size: k, odd.
        num_taps: n.
        sampling: `uniform`: every set of n taps; `stratified2`: one tap of each of the first n parity classes (`classes`), so that a
            second mask has all its taps in classes that the first one used. All masks are equally likely.

    `stratified2` is the paper's "cancel X^u" as the official code has it: n = 1 always takes class 1 (9 masks of a 5x5 kernel), n = 3
    classes 1 to 3 (324 masks), n = 4 all of them (1296). The code has nothing for n = 2; classes 1 and 2 (54 masks) are our reading.

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
        if self.sampling == "stratified2" and n > len(self.classes):
            raise UserError(
                f"num_taps is {n}; sampling stratified2 takes one tap of each of the first n parity classes, "
                f"of which a {k}x{k} kernel has {len(self.classes)}"
            )

    def check_disjoint(self) -> None:
        """Raise a `UserError` unless to every mask there is one that shares no tap with it (what GSAT needs)."""
        k, n = self.kernel_size, self.num_taps
        if 2 * n > k * k:
            raise UserError(f"gsat needs two disjoint masks, 2 n <= k k; num_taps is {n} and a {k}x{k} kernel has {k * k} taps")
        if self.sampling == "stratified2":
            single = [number for number, members in enumerate(self._strata, start=1) if len(members) < 2]
            if single:
                raise UserError(
                    f"gsat with stratified2 needs two taps in each of the first {n} parity classes; class {single[0]} of a {k}x{k} kernel "
                    "has one"
                )

    @property
    def size(self) -> int:
        """Number of masks."""
        if self.sampling == "uniform":
            return math.comb(self.kernel_size**2, self.num_taps)
        return math.prod(map(len, self._strata))

    @property
    def num_scores(self) -> int:
        """Number of uniform random numbers that `choose` needs for one mask."""
        return self.kernel_size**2

    @cached_property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """The taps of each parity class: 1 even row and column, 2 even row and odd column, 3 the reverse, 4 both odd. 1x1 has class 1."""
        k = self.kernel_size
        taps = (
            tuple(row * k + column for row in range(k) for column in range(k) if (row % 2, column % 2) == parity)
            for parity in itertools.product((0, 1), repeat=2)
        )
        return tuple(members for members in taps if members)

    @property
    def _strata(self) -> tuple[tuple[int, ...], ...]:
        """The classes that a stratified mask has one tap of each."""
        return self.classes[: self.num_taps]

    def taps(self, index: int) -> tuple[int, ...]:
        """Return mask number `index` in [0, size)."""
        if not 0 <= index < self.size:
            raise IndexError(f"configuration {index} is outside [0, {self.size})")
        if self.sampling == "stratified2":
            one_of_each = []
            for members in self._strata:
                index, position = divmod(index, len(members))
                one_of_each.append(members[position])
            return tuple(sorted(one_of_each))
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
        """Return the probability of mask number `index`, which is 1 / size."""
        self.taps(index)
        return 1 / self.size

    def choose(self, scores: Tensor, available: Tensor) -> Tensor:
        """Turn uniform random numbers into masks.

        Args:
            scores: (R, num_scores), uniform in [0,1).
            available: (R, T) bool, taps that may be chosen.

        Returns:
            (R, n) taps, ascending in each row.
        """
        masked = scores.masked_fill(~available, -1.0)
        if self.sampling == "uniform":
            return masked.topk(self.num_taps, dim=1).indices.sort(dim=1).values
        best = [torch.tensor(members)[masked[:, list(members)].argmax(dim=1)] for members in self._strata]
        return torch.stack(best, dim=1).sort(dim=1).values
