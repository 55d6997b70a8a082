"""Models that fool gradients do not pass even a first look, honest ones pass all checks that say that a number is too high."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_toys import digits_classifier
from test_verdicts import of
from torch import nn

from analysis.checks.evidence import Evidence, Meaning
from analysis.checks.verdicts import Status, run_checks
from analysis.evaluate import evaluate
from analysis.evaluation.examination import gradient_prediction
from analysis.evaluation.measurements import measurements
from analysis.evaluation.records import pack_rows
from analysis.evaluation.studies import StudySettings
from analysis.evaluation.suites import AttackItem, Suite
from analysis.reporting.conclusion import conclusion, to_markdown
from analysis.result import EvaluationResult
from benchmarks.broken_models import (
    NegatedGradients,
    OnBatchStatistics,
    OneHot,
    OptimizingAtTestTime,
    Quantization,
    Shattering,
    UnderAutograd,
)
from benchmarks.checks import bounds
from benchmarks.checks import main as operating_characteristics
from benchmarks.honest_models import Scaled
from models.threat_model import ThreatModel

SOUND = StudySettings(names=("epsilon", "unit_test", "random_search"), num_samples=40, steps=20, num_tested=24, num_random_points=20)
TOO_HIGH = {"C6", "C8", "C9", "C10", "C11", "C12", "C15"}


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def natural(seed):
    return digits_classifier(None, steps=150, seed=seed)


@pytest.fixture(scope="module")
def robust(seed):
    return digits_classifier(0.2, steps=250, seed=seed)


def verdicts(result: EvaluationResult) -> dict[str, Status]:
    return {each.id: each.status for each in result.verdicts}


@pytest.mark.parametrize("trick", [OneHot, NegatedGradients, Shattering])
def test_a_first_look_marks_a_network_whose_gradients_lead_nowhere(natural, trick):
    network, x, y = natural
    honest = evaluate(network, x, y, threat_model=ThreatModel(epsilon=0.15), num_samples=120)
    assert not honest.marked, to_markdown(honest)
    fooled = evaluate(trick(network).eval(), x, y, threat_model=ThreatModel(epsilon=0.15), num_samples=120)
    assert fooled.headline.value > honest.headline.value + 0.1
    assert fooled.marked
    assert {each.id for each in fooled.failed} <= TOO_HIGH
    assert "the numbers are too high" in conclusion("it", fooled)


def test_a_first_look_names_what_it_did_not_run_and_what_warns(natural):
    network, x, y = natural
    result = evaluate(OptimizingAtTestTime(network).eval(), x, y, threat_model=ThreatModel(epsilon=0.15), num_samples=40)
    said = conclusion("it", result)
    assert "C21 (inference is static)" in said
    assert result.marked or "a first look, no basis for a claim" in said
    plain = evaluate(network, x, y, threat_model=ThreatModel(epsilon=0.15), num_samples=40)
    said = conclusion("it", plain)
    ran = [each for each in plain.verdicts if each.status is not Status.SKIPPED]
    assert f"a first look, no basis for a claim: {len(ran)} of 21 checks ran, none failed" in said
    assert "not run: C6, C14, C15, C19" in said
    assert "no check failed" not in said
    assert plain.basis == f"first look: {len(ran)} of 21 checks ran"
    assert all(row["basis"] == plain.basis for row in plain.frame())
    assert "A first look, no basis for a claim" in to_markdown(plain)


def test_only_checks_that_say_something_about_the_model_are_missing_from_a_first_look(natural):
    network, x, y = natural
    plain = evaluate(network, x, y, threat_model=ThreatModel(epsilon=0.15), num_samples=20)
    everything = replace(plain, verdicts=tuple(each for each in plain.verdicts if each not in plain.not_run))
    assert not everything.not_run
    assert everything.basis.startswith("all checks that apply")
    assert "first look" not in conclusion("it", everything)
    assert {each.id for each in plain.verdicts if not each.applies} == {"C2", "C10", "C13", "C17", "C20"}
    assert {each.id for each in plain.verdicts if each.meaning is Meaning.TOO_HIGH} >= TOO_HIGH


class Rounded(nn.Module):
    """Rounds its input and passes the gradient on as if it did not, as networks are trained with."""

    def __init__(self, network, levels):
        super().__init__()
        self.network, self.levels = network, levels

    def forward(self, x):
        return self.network(x + ((x * self.levels).round() / self.levels - x).detach())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("radius", [0.03, 0.15, 0.3])
def test_a_step_does_what_a_gradient_predicts_and_not_what_a_wave_does(natural, robust, seed, radius, norm):
    drawn = random.Random(f"{seed} {radius} {norm}")
    threat_model = ThreatModel(norm=norm, epsilon=radius * (1 if norm == "linf" else 4))
    for network, x, y in (natural, robust):

        def steps(model, x=x[:60], y=y[:60]):
            return gradient_prediction(model.eval(), x.to(next(model.parameters())), y, threat_model, seed)

        scale = 10 ** drawn.uniform(-6, 4)
        for model in (network, Scaled(network, scale), copy.deepcopy(network).double()):
            assert all(0.9 < max(medians) < 1.3 for medians in steps(model).values())
        for levels in (3, 8, 32):
            assert all(max(medians) > 0.4 and min(medians) < 10 for medians in steps(Rounded(network, levels)).values())
        assert set(steps(network)) == {"image", "random start"}
        waves = Shattering(network, 10 ** drawn.uniform(4, 5), drawn.uniform(10, 40))
        for model in (NegatedGradients(network), waves, UnderAutograd(network), OneHot(network, 10 ** drawn.uniform(3, 4))):
            found = steps(model)
            assert found and min(max(medians) for medians in found.values()) < 0.25, type(model)
        hidden = steps(OptimizingAtTestTime(network))
        assert hidden or radius < 0.1
        assert all(min(medians) > 10 for medians in hidden.values())
        assert steps(Quantization(network)) == {}


@pytest.mark.parametrize("epsilon", [8 / 255, 0.1, 0.2])
def test_an_honest_network_fails_nothing_at_any_radius(robust, epsilon):
    network, x, y = robust
    suite = Suite(
        name="mine",
        studies=SOUND,
        attacks=(
            AttackItem(attack="fgsm"),
            AttackItem(attack="apgd_ce", parameters={"steps": 20}),
            AttackItem(attack="square", parameters={"num_queries": 200}, num_samples=40),
            AttackItem(attack="uniform_noise", num_samples=40),
        ),
    )
    result = evaluate(network, x, y, suite, threat_model=ThreatModel(epsilon=epsilon), num_samples=60)
    assert not result.marked, to_markdown(result)
    assert verdicts(result)["C15"] is Status.PASS


def test_nothing_is_too_high_where_nothing_is_left(natural):
    network, x, y = natural
    result = evaluate(OnBatchStatistics(network).eval(), x, y, threat_model=ThreatModel(epsilon=0.5), num_samples=60)
    assert result.headline.value == 0
    failed = {each.id: each.meaning for each in result.failed}
    assert "C1" in failed  # the number is that of these batches
    assert set(failed.values()) == {Meaning.ELSE}


class Routed(nn.Module):
    """Bright images take another way than dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.dark, self.bright = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x):
        flat = x.flatten(1)
        bright = flat.mean(1) > 0.5
        logits = torch.empty(len(x), 4)
        if bright.any():
            logits[bright] = self.bright(flat[bright])
        if not bright.all():
            logits[~bright] = self.dark(flat[~bright])
        return logits


@pytest.mark.parametrize("levels", [(0.2, 0.8), (0.2, 0.2), (0.49, 0.51), (0.8, 0.2)])
def test_an_attack_can_be_tested_or_not_where_the_route_depends_on_the_input(levels):
    torch.manual_seed(0)
    x = torch.linspace(*levels, 12).view(-1, 1, 1, 1).expand(12, 1, 8, 8).contiguous()
    x = (x + 0.01 * torch.randn(x.shape)).clamp(0, 1)
    suite = Suite(name="mine", studies=StudySettings(names=("unit_test",), steps=5, num_tested=12), attacks=(AttackItem(attack="fgsm"),))
    result = evaluate(Routed().eval(), x, torch.arange(12) % 4, suite, threat_model=ThreatModel(epsilon=0.05))
    assert verdicts(result)["C15"] is not Status.FAIL


def planted(records, name, right_S):
    """Return the records with an attack after which these images are right."""
    record = of(records, name)
    record["samples"]["num_correct"] = {"evaluation": right_S.astype(int).tolist(), "selection": right_S.astype(int).tolist()}
    record["samples"]["correct"] = {"evaluation": pack_rows(right_S[:, None]), "selection": pack_rows(right_S[:, None])}


def test_few_images_that_only_a_black_box_breaks_are_no_failure_and_many_are(robust, seed):
    network, x, y = robust
    suite = Suite(
        name="mine", attacks=(AttackItem(attack="pgd", parameters={"steps": 5}), AttackItem(attack="square", parameters={"num_queries": 5}))
    )
    records = list(evaluate(network, x, y, suite, threat_model=ThreatModel(epsilon=0.05), num_samples=60).records)
    rng = np.random.default_rng(seed)
    for count, status in ((0, Status.PASS), (3, Status.WARN), (40, Status.FAIL)):
        planted(records, "pgd", np.ones(60, dtype=bool))
        planted(records, "square", rng.permutation(60) >= count)
        found = next(each for each in run_checks(Evidence(measurements(records))) if each.id == "C9")
        assert found.status is status, found


def test_operating_characteristics_go_on_where_they_were_killed_and_count_what_the_file_holds(tmp_path, capsys):
    records = tmp_path / "checks.jsonl"
    wanted = ["--records", str(records), "--suite", "quick", "--samples", "20", "--seeds", "1", "--only", "broken", "--names", "negated"]
    assert operating_characteristics(wanted) == 0
    first = capsys.readouterr().out
    line = json.loads(records.read_text())
    assert line["truth"] < line["reported"]
    records.write_text(records.read_text() + '{"case": ["broken", "cut o')
    assert operating_characteristics(wanted) == 0
    assert capsys.readouterr().out == first
    assert first.count("| negated gradients | 1 |") == 1
    assert bounds(0, 300)[1] == pytest.approx(1 - 0.05 ** (1 / 300))
    assert bounds(300, 300)[0] == pytest.approx(0.05 ** (1 / 300))
