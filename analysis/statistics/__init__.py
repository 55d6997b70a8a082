"""Intervals and tests for accuracies, with samples and draws as two sources of chance.

Shapes: S samples, R draws, A attacks. A correctness matrix correct_SR holds 1 where draw r classifies sample s correctly. All functions
take NumPy arrays, are deterministic, and touch no global generator.
"""

from analysis.statistics.accuracy import accuracy_interval
from analysis.statistics.estimate import Estimate
from analysis.statistics.exact_tests import holm, mcnemar_exact, wilson_interval
from analysis.statistics.paired import MeasuredShares, paired_difference, paired_difference_of_shares, two_sided_p_value
from analysis.statistics.several_draws import majority_of_n, worst_of_k, worst_of_k_accuracy
from analysis.statistics.worst_attack import choose_worst_attack, worst_attack_accuracy

__all__ = [
    "Estimate",
    "MeasuredShares",
    "accuracy_interval",
    "choose_worst_attack",
    "holm",
    "majority_of_n",
    "mcnemar_exact",
    "paired_difference",
    "paired_difference_of_shares",
    "two_sided_p_value",
    "wilson_interval",
    "worst_attack_accuracy",
    "worst_of_k",
    "worst_of_k_accuracy",
]
