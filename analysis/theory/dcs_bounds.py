"""Numbers of the DCS paper: probabilities of re-selected, shared and unreached points, bounds of n with their feasibility, mask pairs.

Notation: k kernel size, n kept taps, S stride, T = k*k. Seen from a first mask, a point under the second one is *same* (selected by
the same tap), *gap* (reached by the first mask from another location) or *unhit* (reached from nowhere). A first mask reaches, over all
locations, exactly the residue classes mod S of its taps; borders are ignored.
Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025, sections 4.2,
4.3, appendix A, Fig. 4b and 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from models.errors import UserError

PairKind = Literal["same", "gap", "unhit"]

_ATTEMPTS = 10_000


def class_of(tap: int, kernel_size: int, stride: int) -> int:
    """Return the residue class mod S of a tap, 0 to S*S - 1."""
    row, column = divmod(tap, kernel_size)
    return row % stride * stride + column % stride


def class_sizes(kernel_size: int, stride: int) -> tuple[int, ...]:
    """Return the number of taps of each of the S*S residue classes."""
    _check(kernel_size, 1, stride)
    sizes = [0] * stride**2
    for tap in range(kernel_size**2):
        sizes[class_of(tap, kernel_size, stride)] += 1
    return tuple(sizes)


@dataclass(frozen=True)
class PointProbabilities:
    """Probabilities that a point under the second mask is of each kind (p_s, p_g, p_u of the paper); they sum to 1."""

    same: float
    gap: float
    unhit: float

    def predicted_cosine(self, gap_cosine: float) -> float:
        """Return E cos = p_s + p_g C_g (Eq. 7), given the mean cosine C_g of gap points."""
        return self.same + self.gap * gap_cosine


def point_probabilities(kernel_size: int, num_taps: int, stride: int, *, disjoint: bool = False) -> PointProbabilities:
    """Return the exact expected probabilities over uniform masks.

    Args:
        disjoint: the second mask avoids the taps of the first (GSAT).

    Deviation: p_s = n / k^2; the paper's main text writes n / k, which its appendix does not use.
    """
    _check(kernel_size, num_taps, stride)
    total = kernel_size**2
    missed = [size * math.comb(total - size, num_taps) / math.comb(total, num_taps) for size in class_sizes(kernel_size, stride)]
    unhit = sum(missed) / total
    if disjoint:
        if total == num_taps:
            raise UserError("no tap is left for a disjoint mask: num_taps is k*k")
        unhit = unhit * total / (total - num_taps)
        return PointProbabilities(0.0, 1.0 - unhit, unhit)
    same = num_taps / total
    return PointProbabilities(same, 1.0 - same - unhit, unhit)


def unhit_extremes(kernel_size: int, num_taps: int, stride: int) -> tuple[float, float]:
    """Return the exact smallest and largest p_u of any mask."""
    _check(kernel_size, num_taps, stride)
    total = kernel_size**2
    sizes = sorted((size for size in class_sizes(kernel_size, stride) if size), reverse=True)
    most_hit = sum(sizes[:num_taps])
    sums = {0}
    for size in sizes:
        sums |= {value + size for value in sums}
    fewest_hit = min(value for value in sums if value >= num_taps)
    return 1 - most_hit / total, 1 - fewest_hit / total


def paper_unhit_lower_bound(kernel_size: int, num_taps: int, stride: int) -> float:
    """Return Eq. 16's lower bound of p_u. It is attained: equal to the exact minimum.

    Deviation: m = k mod S and beta = S - m, where the paper writes k^2 mod S^2 and k - m, which do not add up to S^2 classes.
    """
    _check(kernel_size, num_taps, stride)
    k2, n = kernel_size**2, num_taps
    m = kernel_size % stride
    beta = stride - m
    low, high = kernel_size // stride, -(-kernel_size // stride)
    if n <= m**2:
        return (k2 - n * high**2) / k2
    if n <= m**2 + 2 * m * beta:
        return (k2 - m**2 * high**2 - (n - m**2) * high * low) / k2
    return max(0, stride**2 - n) * low**2 / k2


def paper_unhit_upper_bound(kernel_size: int, num_taps: int, stride: int) -> float:
    """Return Eq. 24's upper bound of p_u, 1 - n / (floor(k/S)^2 S^2).

    It presumes that a mask fills the largest classes first; `unhit_extremes` shows masks above it (k=5, S=2, n=4: 0.84 against 0.75).
    """
    _check(kernel_size, num_taps, stride)
    return 1 - num_taps / ((kernel_size // stride) ** 2 * stride**2)


def paper_gap_bounds(kernel_size: int, num_taps: int, stride: int) -> tuple[float, float]:
    """Return Eq. 28's bounds of p_g.

    Deviation: the last n of the upper bound is added, as p_g = 1 - p_u - p_s demands; the paper prints it subtracted.
    """
    _check(kernel_size, num_taps, stride)
    k2, low = kernel_size**2, kernel_size // stride
    lower = num_taps / (low**2 * stride**2) - num_taps / k2
    return lower, 1 - ((stride**2 - num_taps) * low**2 + num_taps) / k2


def taps_upper_bound(kernel_size: int, stride: int, epsilon_c: float, gap_cosine: float | None = None, *, loose: bool = False) -> float:
    """Return the upper bound of n for which the expected gradient cosine is below epsilon_c.

    Args:
        gap_cosine: C_g in (0, 1] (Eq. 19); None: the worst case 1 (Eq. 20).
        loose: Lemma 1's S^2 epsilon_c (Eq. 8, 21), which follows from Eq. 20 and does not imply it: necessary, not sufficient.
    """
    _check(kernel_size, 1, stride)
    if loose:
        return stride**2 * epsilon_c
    low2 = (kernel_size // stride) ** 2
    cosine = 1.0 if gap_cosine is None else gap_cosine
    return (kernel_size**2 * epsilon_c + (stride**2 * low2 - kernel_size**2) * cosine) / (1 + (low2 - 1) * cosine)


def taps_lower_bound(kernel_size: int, stride: int, epsilon_l: float, num_points: int) -> float:
    """Return the lower bound of n for which the expected L1 distance of outputs is below epsilon_l (Lemma 2, Eq. 11).

    Args:
        num_points: N, size of the input feature map with its padding.
    """
    _check(kernel_size, 1, stride)
    k, s = kernel_size, stride
    return ((k - s) ** 2 + k**4 * (1 - epsilon_l * s**2 / num_points)) / (4 * k * s)


@dataclass(frozen=True)
class Feasibility:
    """Whether a configuration satisfies the paper's two bounds of n (Eq. 12).

    Attributes:
        lower: n_min(epsilon_l), Eq. 11. upper: n_max(epsilon_c), Eq. 20. upper_loose: S^2 epsilon_c, Eq. 8.
        needed_epsilon_c, needed_epsilon_l: the smallest ones for which this n satisfies Eq. 20 and Eq. 11.
    """

    kernel_size: int
    num_taps: int
    stride: int
    epsilon_c: float
    epsilon_l: float
    num_points: int
    lower: float
    upper: float
    upper_loose: float
    needed_epsilon_c: float
    needed_epsilon_l: float

    @property
    def feasible(self) -> bool:
        """Whether lower <= n <= upper."""
        return self.lower <= self.num_taps <= self.upper

    @property
    def some_n_is_feasible(self) -> bool:
        """Whether any integer n in [1, k*k] lies between the bounds."""
        return max(1, math.ceil(self.lower)) <= min(self.kernel_size**2, math.floor(self.upper))

    def __str__(self) -> str:
        return (
            f"feasible: {'yes' if self.feasible else 'no'} (k={self.kernel_size}, n={self.num_taps}, S={self.stride}: "
            f"{self.lower:.4g} <= n <= {self.upper:.4g} at epsilon_l={self.epsilon_l:g}, epsilon_c={self.epsilon_c:g}; Lemma 1 alone: "
            f"n <= {self.upper_loose:.4g}; this n needs epsilon_c >= {self.needed_epsilon_c:.4g} and "
            f"epsilon_l >= {self.needed_epsilon_l:.4g})"
        )


def feasibility(kernel_size: int, num_taps: int, stride: int, epsilon_c: float, epsilon_l: float, num_points: int) -> Feasibility:
    """Check a configuration against both bounds. The paper's own k=5, n=2, S=1 fails for every epsilon_c < 1."""
    _check(kernel_size, num_taps, stride)
    k, n, s = kernel_size, num_taps, stride
    return Feasibility(
        kernel_size=k,
        num_taps=n,
        stride=s,
        epsilon_c=epsilon_c,
        epsilon_l=epsilon_l,
        num_points=num_points,
        lower=taps_lower_bound(k, s, epsilon_l, num_points),
        upper=taps_upper_bound(k, s, epsilon_c),
        upper_loose=taps_upper_bound(k, s, epsilon_c, loose=True),
        needed_epsilon_c=1 + (n - s**2) * (k // s) ** 2 / k**2,
        needed_epsilon_l=max(0.0, num_points / s**2 * (1 + ((k - s) ** 2 - 4 * k * s * n) / k**4)),
    )


def mask_pair(
    kind: PairKind, kernel_size: int, num_taps: int, stride: int, generator: torch.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw a pair of masks of one kind (Fig. 5).

    Args:
        kind: `same`: twice the same mask; `gap`: disjoint masks with equally many taps in each residue class; `unhit`: masks without a
            common residue class, which exist only for S >= 2.

    Raises:
        ValueError: no such pair was found.
    """
    _check(kernel_size, num_taps, stride)
    total = kernel_size**2
    for _ in range(_ATTEMPTS):
        first = tuple(sorted(torch.randperm(total, generator=generator)[:num_taps].tolist()))
        if kind == "same":
            return first, first
        classes = [class_of(tap, kernel_size, stride) for tap in first]
        if kind == "unhit":
            free = [tap for tap in range(total) if class_of(tap, kernel_size, stride) not in classes]
            if len(free) >= num_taps:
                return first, _pick(free, num_taps, generator)
            continue
        second: list[int] = []
        for group in sorted(set(classes)):
            count = classes.count(group)
            free = [tap for tap in range(total) if class_of(tap, kernel_size, stride) == group and tap not in first]
            if len(free) < count:
                break
            second += _pick(free, count, generator)
        if len(second) == num_taps:
            return first, tuple(sorted(second))
    raise ValueError(f"no pair of kind {kind!r} for k={kernel_size}, n={num_taps}, S={stride}")


def mask_pair_with_overlap(
    overlap: int, kernel_size: int, num_taps: int, generator: torch.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw a uniform mask and another one that shares exactly `overlap` taps with it.

    Raises:
        ValueError: there is no such pair.
    """
    _check(kernel_size, num_taps, 1)
    total = kernel_size**2
    if not 0 <= overlap <= num_taps or 2 * num_taps - overlap > total:
        raise ValueError(f"two masks of {num_taps} of {total} taps cannot share exactly {overlap}")
    order = torch.randperm(total, generator=generator).tolist()
    return tuple(sorted(order[:num_taps])), tuple(sorted(order[num_taps - overlap : 2 * num_taps - overlap]))


def _pick(taps: Sequence[int], count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(sorted(taps[index] for index in torch.randperm(len(taps), generator=generator)[:count].tolist()))


def _check(kernel_size: int, num_taps: int, stride: int) -> None:
    if not 1 <= num_taps <= kernel_size**2:
        raise UserError(f"num_taps is {num_taps}; a {kernel_size}x{kernel_size} kernel has 1 to {kernel_size**2} taps")
    if not 1 <= stride <= kernel_size:
        raise UserError(f"stride is {stride}; the bounds are for strides of 1 to the kernel size {kernel_size}")
