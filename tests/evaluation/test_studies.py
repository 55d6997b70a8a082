"""Studies and the checks that read them: sound evaluations pass, masked models and weak attacks are flagged."""

import math

import pytest
import torch
from evaluation_toys import SIGNAL, Quantized, classifier, digits_classifier, labelled_by, pattern, two_classes
from torch import nn

from analysis.attacked_model.draws import ONLY_DRAW
from analysis.attacks.registry import AttackOutput, attack_entry, parse_attack_parameters
from analysis.checks.evidence import Evidence
from analysis.checks.verdicts import run_checks
from analysis.evaluate import calibrate, collect, evaluate, plan_blocks, run_block
from analysis.evaluation import calibration
from analysis.evaluation.measurements import measurements
from analysis.evaluation.planted_points import run_unit_test
from analysis.evaluation.records import comparable
from analysis.evaluation.studies import StudySettings, applies, doublings, epsilon_levels
from analysis.evaluation.suites import AttackItem, Suite, load_suite
from analysis.reporting.conclusion import to_markdown
from models.threat_model import ThreatModel

THREAT = ThreatModel(epsilon=0.15)
STUDIES = StudySettings(
    num_samples=40, steps=40, num_draws=6, max_steps=80, max_draws=12, num_searched=15, num_random_points=20, num_votes=6, num_tested=24
)
SUITE = Suite(
    name="mine",
    scoring={"num_selection_draws": 6, "num_evaluation_draws": 20, "num_known_draws": 2},
    studies=STUDIES,
    attacks=(
        AttackItem(attack="fgsm", num_draws=6),
        AttackItem(attack="apgd_ce", parameters={"steps": 20}, num_draws=6, protocols=("T1", "T2")),
        AttackItem(attack="square", parameters={"num_queries": 150}, num_draws=3, num_samples=20),
        AttackItem(attack="transfer_frozen_draws", parameters={"steps": 20}, num_draws=5, models="randomized"),
        AttackItem(attack="transfer_static", parameters={"steps": 20}, models="randomized"),
        AttackItem(attack="arc", parameters={"rounds": 3, "num_boundaries": 2}, num_draws=6, models="randomized", num_samples=20),
    ),
)


def toys(name, num_images=40):
    x, y = calibration.calibration_images()
    return calibration.calibration_toys()[name], x[:num_images], y[:num_images]


@pytest.fixture(scope="module")
def results():
    # One calibration is enough: it is the same for every model.
    cheaper = STUDIES.model_copy(update={"names": tuple(name for name in STUDIES.names if name != "calibration")})
    without = SUITE.model_copy(update={"studies": cheaper})
    suites = {"adversarially_trained": SUITE, "masked": without, "noisy": without}
    return {name: evaluate(*toys(name), suite, threat_model=THREAT) for name, suite in suites.items()}


def verdict(result, name):
    return next(each for each in result.verdicts if each.id == name)


def test_a_sound_evaluation_of_a_deterministic_model_passes_every_check(results):
    result = results["adversarially_trained"]
    statuses = {each.id: each.status.value for each in result.verdicts}
    assert not [name for name, status in statuses.items() if status in ("FAIL", "WARN")], to_markdown(result)
    assert {name for name, status in statuses.items() if status == "SKIPPED"} == {"C2", "C10", "C13", "C17", "C20"}


def test_a_sound_evaluation_of_a_noisy_model_fails_no_check(results):
    result = results["noisy"]
    assert not result.marked, to_markdown(result)
    for name in ("C6", "C9", "C10", "C11", "C13", "C15"):
        assert verdict(result, name).status == "PASS", verdict(result, name)


def test_a_masked_model_fails_the_checks_that_are_meant_to_see_it(results):
    result = results["masked"]
    assert result.marked
    for name in ("C6", "C9", "C12", "C15"):
        assert verdict(result, name).status == "FAIL", verdict(result, name)
        assert verdict(result, name).advice


def test_every_check_of_the_specification_exists():
    ids = [each.id for each in run_checks(Evidence([]))]
    assert ids == [f"C{number}" for number in range(1, 22)]


def test_study_blocks_do_not_depend_on_the_worker(results):
    model, x, y = toys("noisy")
    plan = [task for task in plan_blocks(model, x, y, SUITE, threat_model=THREAT) if task.kind == "study"]
    assert {task.study.name for task in plan} == set(StudySettings().names)
    ours = {record["key"]: record for record in results["noisy"].records}
    for task in plan:
        if task.study.name in ("gradient_resolution", "progress", "unit_test", "random_search"):
            torch.manual_seed(5)
            record = run_block(model, x, y, type(task).model_validate_json(task.model_dump_json()))
            assert comparable(record) == comparable(ours[task.key])
    assert all(record["samples"]["num_correct"]["evaluation"] for record in results["noisy"].records)


def test_studies_appear_in_no_row_and_do_not_move_the_headline(results):
    model, x, y = toys("adversarially_trained")
    without = evaluate(model, x, y, SUITE.model_copy(update={"studies": None}), threat_model=THREAT)
    assert without.headline == results["adversarially_trained"].headline
    assert [row.attack for row in without.rows] == [row.attack for row in results["adversarially_trained"].rows]
    assert verdict(without, "C6").status == "SKIPPED"


def test_steps_are_doubled_until_accuracy_stays(results):
    for record in results["adversarially_trained"].records:
        study = record["header"]["study"]
        if study is None or study["name"] != "steps":
            continue
        facts = record["block"]["study"]
        assert facts["levels"][:4] == [10, 20, 40, 80]
        assert facts["accuracies"][-2] - facts["accuracies"][-1] < 0.05
        assert record["block"]["num_draws"]["previous"] == record["block"]["num_draws"]["evaluation"]


def test_an_attack_that_needs_more_steps_is_called_an_upper_bound():
    model, x, y = toys("adversarially_trained", 200)
    few = StudySettings(names=("steps",), attack="pgd", steps=2, max_steps=4, num_samples=200)
    suite = Suite(name="mine", studies=few, attacks=(AttackItem(attack="fgsm"),))
    result = evaluate(model, x, y, suite, threat_model=THREAT)
    assert verdict(result, "C7").status == "WARN"
    assert "upper bounds only" in verdict(result, "C7").explanation


def test_an_attack_that_returns_a_point_which_is_right_again_is_flagged():
    model, x, y = toys("adversarially_trained")
    settings = StudySettings(names=("progress",), num_samples=40, steps=20)
    suite = Suite(name="mine", studies=settings, attacks=(AttackItem(attack="apgd_ce"),))
    plan = [task for task in plan_blocks(model, x, y, suite, threat_model=THREAT, batch_size=40) if task.kind == "study"]
    record = run_block(model, x, y, plan[0])
    assert record["block"]["study"]["num_silent"] == 0
    record["block"]["study"]["num_silent"] = 2
    clean = run_block(model, x, y, plan_blocks(model, x, y, suite, threat_model=THREAT, batch_size=40)[0])
    finding = next(each for each in run_checks(Evidence(measurements([clean, record]))) if each.id == "C14")
    assert finding.status == "FAIL"
    assert Evidence(measurements([clean, record])).facts("progress")


def test_the_unit_test_separates_strong_from_weak_attacks():
    network, x, _ = digits_classifier(adversarial_epsilon=None, steps=60)
    x = x[:24]

    def facts(entry, parameters):
        return run_unit_test(network, x, ONLY_DRAW, ThreatModel(epsilon=0.1), entry, parameters, seed=1)

    strong = facts(attack_entry("apgd_ce"), parse_attack_parameters("apgd_ce", {"steps": 30}))
    assert strong["num_separated"] >= 20
    assert strong["num_found"] >= 0.95 * strong["num_separated"]
    assert strong["num_found_at_random"] < 0.5 * strong["num_separated"]
    does_nothing = type("Nothing", (), {"run": staticmethod(lambda model, problem, parameters: AttackOutput(problem.x))})
    assert facts(does_nothing, None)["num_found"] == 0
    no_head = run_unit_test(
        nn.Sequential(nn.Flatten(), nn.Tanh()),
        x,
        ONLY_DRAW,
        ThreatModel(),
        attack_entry("apgd_ce"),
        parse_attack_parameters("apgd_ce", {}),
        seed=1,
    )
    assert "no linear layer" in no_head["reason"]


def test_a_model_that_optimizes_in_forward_is_flagged():
    class Purifies(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.network(leaf).logsumexp(1).sum(), leaf)
            return self.network(x + 0.001 * gradient)

    network = classifier()
    x, y = labelled_by(network, 10)
    suite = Suite(name="mine", attacks=(AttackItem(attack="fgsm"),))
    assert verdict(evaluate(Purifies(network), x, y, suite), "C21").status == "WARN"
    assert verdict(evaluate(network, x, y, suite), "C21").status == "PASS"


def test_a_black_box_that_beats_gradients_is_flagged():
    x, y = two_classes(20)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    suite = Suite(
        name="mine",
        attacks=(AttackItem(attack="pgd", parameters={"steps": 5}), AttackItem(attack="square", parameters={"num_queries": 600})),
    )
    linear[1].weight.data = torch.stack([-pattern(), pattern()])
    linear[1].bias.data = -linear[1].weight.data.sum(1) / 2
    masked = evaluate(Quantized(linear.eval()), x, y, suite, threat_model=ThreatModel(epsilon=2 * SIGNAL))
    # The gradients are masked, the black box is in the suite, and what it leaves is the headline: 0 %, which is true.
    assert masked.headline.value == 0
    assert verdict(masked, "C9").status == "WARN"
    honest = evaluate(linear, x, y, suite, threat_model=ThreatModel(epsilon=2 * SIGNAL))
    assert verdict(honest, "C9").status == "PASS"


def test_calibration_reproduces_what_is_stored_and_notices_a_changed_harness(monkeypatch):
    rows = calibrate()
    assert all(row["met"] for row in rows), [row for row in rows if not row["met"]]
    assert {row["toy"] for row in rows} == {"adversarially_trained", "masked", "noisy"}
    monkeypatch.setattr(calibration, "Rounding", nn.Identity)
    assert not all(row["met"] for row in calibrate() if row["toy"] == "masked")


def test_a_frozen_draw_alone_is_named_a_transfer_attack():
    model, x, y = toys("noisy", 30)
    suite = Suite(name="mine", attacks=(AttackItem(attack="pgd", parameters={"steps": 5}, protocols=("T0",)),))
    finding = verdict(evaluate(model, x, y, suite, threat_model=THREAT), "C10")
    assert finding.status == "WARN"
    assert "transfer attack between draws" in finding.explanation


def test_levels():
    assert epsilon_levels(ThreatModel(), 3072) == pytest.approx([level / 255 for level in (1, 2, 4, 8, 16, 32, 64, 127.5, 255)])
    assert epsilon_levels(ThreatModel(norm="l2", epsilon=0.5), 3072)[-3:] == pytest.approx([4.0, 0.5 * 3072**0.5, 50.0])
    assert epsilon_levels(ThreatModel(epsilon=0.3), 64)[-1] == 1.0
    assert doublings(50, 800) == [50, 100, 200, 400, 800]
    assert doublings(20, 10) == [20, 40]
    assert not applies("draws", randomized=True, num_configurations=4, num_draws=4)
    assert applies("draws", randomized=True, num_configurations=None, num_draws=4)
    assert not applies("gradient_resolution", randomized=False, num_configurations=1, num_draws=4)


def test_shipped_suites_plan_for_every_kind_of_model():
    for name in ("standard", "full", "quick"):
        suite = load_suite(name)
        for toy in ("adversarially_trained", "noisy"):
            model, x, y = toys(toy, 20)
            for threat_model in (ThreatModel(), ThreatModel(norm="l2", epsilon=0.5)):
                plan = plan_blocks(model, x, y, suite, threat_model=threat_model)
                assert all(math.isfinite(task.cost) and task.cost > 0 for task in plan)
                assert (name == "quick") == (not [task for task in plan if task.kind == "study"])
    assert collect([run_block(*toys("noisy", 20), plan_blocks(*toys("noisy", 20), "quick")[0])]).clean is not None
