"""The table that holds several models side by side: a column compares what was measured on the same images."""

from types import SimpleNamespace

from analysis.result import EvaluationResult
from analysis.statistics import Estimate
from orchestration.evaluating.evaluation_report import _worst


def row(attack, value, num_samples):
    estimate = Estimate(value, value - 0.1, value + 0.1, 0.05, num_samples, num_draws=1, exact=True, method="made up")
    return SimpleNamespace(attack=attack, in_threat_model=True, protocols=frozenset({"T1"}), estimate=estimate)


def test_an_attack_on_a_part_of_the_images_does_not_stand_for_all():
    rows = [row("clean", 0.1, 360), row("pgd_20", 0.8, 360), row("fgsm", 0.9, 360), row("square", 0.7, 64)]
    result = SimpleNamespace(rows=rows, marked=False)
    result.lowest = lambda protocol: EvaluationResult.lowest(result, protocol)
    assert _worst(result, "T1").startswith("80.0 %")
    assert _worst(result, "T0") == ""
