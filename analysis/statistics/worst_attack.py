"""The worst attack of each sample, chosen on other draws than those that score it.

Shapes: A attacks, S samples, R and T draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.statistics.accuracy import accuracy_interval
from analysis.statistics.estimate import Estimate


def choose_worst_attack(selection_ASR: ArrayLike) -> NDArray[np.int64]:
    """Return, per sample, the attack with the lowest accuracy on the selection draws; ties go to the lowest mean over samples."""
    shares_AS = np.asarray(selection_ASR, dtype=np.float64).mean(-1)
    # The overall stronger attack wins ties, so the choice does not depend on the order in which attacks are listed.
    order = np.argsort(shares_AS.mean(1), kind="stable")
    return order[np.argmin(shares_AS[order], axis=0)]


def worst_attack_accuracy(
    selection_ASR: ArrayLike, evaluation_AST: ArrayLike, *, exact: bool = False, level: float = 0.95
) -> tuple[Estimate, NDArray[np.int64]]:
    """Return the expected accuracy under the worst attack per sample, and which attack that was.

    The attack is chosen on the selection draws and scored on the evaluation draws: a minimum taken on the draws that score it is too
    low (winner's curse).
    """
    chosen_S = choose_worst_attack(selection_ASR)
    evaluation = np.asarray(evaluation_AST)  # numbers only once they are chosen: of many attacks and draws it is large
    worst_ST = evaluation[chosen_S, np.arange(evaluation.shape[1])].astype(np.float64)
    return accuracy_interval(worst_ST, worst_ST.shape[1] if exact else None, level=level), chosen_S
