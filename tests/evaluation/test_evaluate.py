"""The evaluation as a whole: protocols, records, resume, workers, checks."""

import json

import numpy as np
import pytest
import torch
from evaluation_toys import SIGNAL, Choice, MultiplicativeNoise, Quantized, classifier, labelled_by, pattern, two_classes
from torch import nn

from analysis.evaluate import collect, evaluate, plan_blocks, run_block
from analysis.evaluation.records import comparable, correct_matrix, pack_rows, read_records, unpack_rows
from analysis.evaluation.suites import AttackItem, Suite, load_suite
from analysis.evaluation.tasks import class_balanced_order
from analysis.reporting.conclusion import to_markdown
from models.errors import UserError
from models.randomness import ResampleOnForward, randomness_state
from models.threat_model import ThreatModel

SIDE = 12
THREAT = ThreatModel(epsilon=1.4 * SIGNAL)


def noisy(num_images=40):
    return MultiplicativeNoise(pattern(SIDE), 1.5), *two_classes(num_images, SIDE)


def noisy_evaluation(**options):
    model, x, y = noisy()
    return evaluate(model, x, y, "quick", **{"threat_model": THREAT, "batch_size": 20, **options})


@pytest.fixture(scope="module")
def noisy_result():
    return noisy_evaluation()


def row(result, attack, protocol):
    return next(each for each in result.rows if each.attack == attack and each.protocol == protocol)


def verdict(result, name):
    return next(each for each in result.verdicts if each.id == name)


def test_the_paper_protocol_flatters_a_noisy_model(noisy_result):
    paper = row(noisy_result, "pgd_20", "T0").estimate
    unknown = row(noisy_result, "pgd_20", "T1").estimate
    known = row(noisy_result, "pgd_20", "T2").estimate
    assert noisy_result.clean.value > 0.95
    assert paper.value > unknown.value + 0.3
    assert known.value <= unknown.value + 2 * unknown.standard_error
    assert noisy_result.headline.value <= unknown.value + 0.05
    assert noisy_result.paper.value == paper.value
    worst_draw = row(noisy_result, "pgd_20", "T3").estimate
    assert worst_draw.value <= unknown.value
    assert row(noisy_result, "clean", "T3").estimate.value <= noisy_result.clean.value


def test_a_sound_evaluation_passes_every_check(noisy_result):
    statuses = {each.id: each.status for each in noisy_result.verdicts}
    assert set(statuses) >= {"C1", "C2", "C3", "C4", "C5", "C8", "C12", "C16", "C17", "C18", "C20"}
    assert {name for name, status in statuses.items() if status == "WARN"} == {"C10"}  # T0 flatters this model
    assert "FAIL" not in statuses.values()
    assert {name for name, status in statuses.items() if status == "SKIPPED"} == {"C6", "C13", "C14", "C15", "C19"}
    assert not noisy_result.marked
    assert noisy_result.finished
    assert "(!)" not in to_markdown(noisy_result)


def test_records_hold_everything_per_sample(noisy_result):
    record = next(each for each in noisy_result.records if each["header"]["kind"] == "attack")
    samples = record["samples"]
    assert len(samples["ids"]) == 20
    for name in ("labels", "margin", "linf", "l2", "num_unchanged"):
        assert len(samples[name]) == 20
    matrix = correct_matrix(record)
    assert matrix.shape == (20, record["header"]["scoring"]["num_evaluation_draws"])
    assert matrix.sum(1).tolist() == samples["num_correct"]["evaluation"]
    assert record["header"]["checkpoint"]
    assert record["block"]["num_backward"] > 0
    assert record["measured"]["versions"]["torch"] == torch.__version__
    json.dumps(noisy_result.frame())


def test_resume_from_a_half_written_file_equals_an_uninterrupted_run(noisy_result, tmp_path):
    path = tmp_path / "records" / "evaluation.jsonl"
    noisy_evaluation(records=path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][: len(lines[4]) // 2])  # killed in the middle of line 5
    seen = []
    resumed = noisy_evaluation(records=path, progress=seen.append)
    assert seen[0].num_done == seen[0].num_resumed == 4
    assert (seen[-1].num_done, seen[-1].share) == (seen[-1].num_total, pytest.approx(1))
    assert len(seen) == seen[-1].num_total - 4 + 1
    assert list(map(comparable, resumed.records)) == list(map(comparable, noisy_result.records))
    assert resumed.headline == noisy_result.headline
    assert len(read_records(path)) == seen[-1].num_total
    again = []
    noisy_evaluation(records=path, progress=again.append)
    assert len(again) == 1  # nothing runs twice


def test_blocks_of_two_workers_equal_those_of_one(noisy_result):
    model, x, y = noisy()
    plan = plan_blocks(model, x, y, "quick", threat_model=THREAT, batch_size=20)
    workers = [noisy()[0] for _ in range(2)]
    records = []
    for number, task in reversed(list(enumerate(plan))):
        torch.manual_seed(number)  # workers have whatever global state they have
        task = type(task).model_validate_json(task.model_dump_json())  # tasks travel
        records.append(run_block(workers[number % 2], x, y, task))
    result = collect(records, plan)
    assert list(map(comparable, result.records)) == list(map(comparable, noisy_result.records))
    assert result.rows[0].estimate == noisy_result.rows[0].estimate
    assert collect(records).headline == noisy_result.headline
    unfinished = collect(records[3:], plan)
    assert not unfinished.finished


def test_progress_tells_an_attack_from_a_study_with_it():
    model, x, y = noisy()
    titles = [task.title for task in plan_blocks(model, x, y, "standard", threat_model=THREAT)]
    assert len(set(titles)) == len(titles)
    assert {"fgsm T1 block 1/1", "fgsm at radius 0 T1 block 1/1", "study of random search, T1 block 1/1"} <= set(titles)


def test_the_model_is_as_before(noisy_result):
    model, x, y = noisy(6)
    model.train()
    before = randomness_state(model)
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    evaluate(ResampleOnForward(model), x, y, "quick", threat_model=THREAT, num_draws=3)
    after = randomness_state(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert after[""]["position"] == before[""]["position"]
    assert torch.equal(after[""]["draw"]["buffers"]["factors"], before[""]["draw"]["buffers"]["factors"])


def test_a_masked_model_is_flagged_and_marked():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    network[1].weight.data = torch.stack([-pattern(), pattern()])
    network[1].bias.data = -network[1].weight.data.sum(1) / 2
    x, y = two_classes(30)
    honest = evaluate(network, x, y, "quick", threat_model=THREAT)
    assert not honest.marked
    assert honest.headline.value == 0
    masked = evaluate(Quantized(network), x, y, "quick", threat_model=THREAT)
    assert next(row.estimate.value for row in masked.rows if row.attack == "pgd_20") > 0.9  # what a careless evaluation would print
    assert masked.headline.value == 0
    assert verdict(masked, "C12").status == "WARN"  # gradients are masked, but attacks that need none left nothing to doubt
    assert verdict(masked, "C12").advice


def test_dead_and_hidden_randomness_are_flagged():
    x, y = two_classes(12)
    dead = MultiplicativeNoise(pattern(), 0.0)
    assert verdict(evaluate(dead, x, y, "quick", threat_model=THREAT, num_draws=2), "C1").status == "FAIL"

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.pattern = nn.Parameter(pattern())

        def forward(self, x):
            margin = (x.flatten(1) - 0.5) @ self.pattern + torch.randn(len(x))
            return torch.stack([-margin, margin], 1)

    result = evaluate(Hidden(), x, y, "quick", threat_model=THREAT)
    assert verdict(result, "C1").status == "FAIL"
    assert "outside its random sites" in verdict(result, "C1").explanation
    assert verdict(result, "C16").status == "FAIL"  # it moves the global generator


def test_deterministic_model_takes_one_pass_and_an_exact_interval():
    network = classifier()
    x, y = labelled_by(network, 30)
    result = evaluate(network, x, y, "quick", threat_model=ThreatModel(epsilon=0.03))
    assert [each.protocol for each in result.rows] == ["T0 = T1 = T2"] * 7
    assert all(each.estimate.method == "Clopper-Pearson" for each in result.rows)
    assert result.clean.value == 1
    assert verdict(result, "C20").status == "SKIPPED"
    assert "deterministic" in verdict(result, "C1").explanation


def test_a_finite_space_of_draws_is_enumerated():
    members = torch.randn((4, 5, 64), generator=torch.Generator().manual_seed(1))
    model = Choice(members)
    x = torch.rand((24, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    y = ((x.flatten(1) - 0.5) @ members[0].T).argmax(1)
    item = AttackItem(attack="pgd", parameters={"steps": 3}, protocols=("T1", "T2", "T3", "T4"), num_draws=4)
    suite = Suite(name="mine", attacks=(item,))
    result = evaluate(model, x, y, suite, threat_model=ThreatModel(epsilon=0.02))
    exact = torch.stack([((x.flatten(1) - 0.5) @ member.T).argmax(1) == y for member in members])
    assert result.clean.exact
    assert result.clean.value == pytest.approx(exact.float().mean().item())
    probability = exact.float().mean(0)
    assert row(result, "clean", "T3").estimate.value == pytest.approx((probability**5).mean().item(), abs=1e-6)
    averaged = torch.stack([((x.flatten(1) - 0.5) @ member.T).softmax(1) for member in members]).mean(0).argmax(1) == y
    assert row(result, "clean", "T4").estimate.value == pytest.approx(averaged.float().mean().item())
    assert row(result, "pgd", "T1").estimate.exact
    assert row(result, "pgd", "T2").estimate.exact
    assert row(result, "pgd", "T1").estimate.value < result.clean.value
    assert verdict(result, "C17").status == "PASS"
    sampled = evaluate(model, x, y, suite, threat_model=ThreatModel(epsilon=0.02), num_draws=3)
    assert not sampled.clean.exact
    assert sampled.clean.num_draws == 3
    assert row(sampled, "pgd", "T3").caption.endswith("worst of k=3 draws")


def test_red_paper_protocol_attacks_a_model_that_redraws():
    members = torch.randn((4, 5, 64), generator=torch.Generator().manual_seed(1))
    x = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    y = torch.zeros(6, dtype=torch.long)
    item = AttackItem(attack="pgd", parameters={"steps": 12}, protocols=("T0",))
    suite = Suite(name="mine", scoring={"attacked_draw": "each_forward", "num_repetitions": 3}, attacks=(item,))
    result = evaluate(Choice(members), x, y, suite)
    estimate = row(result, "pgd", "T0").estimate
    assert (estimate.num_samples, estimate.num_draws) == (6, 3)
    assert result.headline is None  # nothing ran under T1
    assert verdict(result, "C20").status == "SKIPPED"


def test_library_attack_that_gives_up_is_flagged():
    pytest.importorskip("torchattacks")
    # So noisy that a single draw errs on many clean images, and on different ones.
    model, (x, y) = MultiplicativeNoise(pattern(SIDE), 8.0), two_classes(30, SIDE, noise=0.15)
    item = AttackItem(attack="torchattacks_apgd", parameters={"steps": 5}, protocols=("T1",))
    result = evaluate(model, x, y, Suite(name="mine", attacks=(item,)), threat_model=THREAT, num_draws=10)
    assert verdict(result, "C4").status == "FAIL"
    assert result.marked


def test_epsilon_zero_and_smaller_attacks():
    model, x, y = noisy(30)
    suite = Suite(
        name="mine",
        attacks=(
            AttackItem(attack="pgd", parameters={"steps": 2}, num_draws=2),
            AttackItem(attack="square", parameters={"num_queries": 10}, num_draws=2, num_samples=10),
        ),
    )
    result = evaluate(model, x, y, suite, threat_model=ThreatModel(epsilon=0), num_draws=4, batch_size=8)
    assert row(result, "pgd", "T1").estimate.value == result.clean.value
    assert row(result, "square", "T1").estimate.num_samples == 10
    assert result.headline.num_samples == 30
    assert sum(result.headline_attacks.values()) == 30


def test_samples_are_class_balanced_and_nested():
    y = torch.tensor([0] * 50 + [1] * 5 + [2] * 5)
    order = class_balanced_order(y)
    assert sorted(order) == list(range(60))
    assert np.bincount(y[order[:12]]).tolist() == [4, 4, 4]
    model, x, labels = noisy(40)
    small = plan_blocks(model, x, labels, "quick", num_samples=20, batch_size=10)
    large = plan_blocks(model, x, labels, "quick", num_samples=40, batch_size=10)
    assert {task.key for task in small} <= {task.key for task in large}  # a longer evaluation reuses a shorter one


def test_records_of_a_shorter_evaluation_are_continued(tmp_path):
    path = tmp_path / "records.jsonl"
    noisy_evaluation(records=path, num_samples=20, num_draws=3)
    seen = []
    longer = noisy_evaluation(records=path, num_samples=40, num_draws=3, progress=seen.append)
    assert seen[0].num_resumed > 0
    assert longer.finished
    assert longer.clean.num_samples == 40
    assert longer.rows[0].attack == "clean"


def test_wrong_weights_data_and_mixed_records_are_refused(noisy_result):
    model, x, y = noisy()
    plan = plan_blocks(model, x, y, "quick", threat_model=THREAT, batch_size=20)
    other = MultiplicativeNoise(pattern(SIDE, seed=8), 1.5)
    with pytest.raises(ValueError, match="weights"):
        run_block(other, x, y, plan[0])
    with pytest.raises(ValueError, match="images of block 0"):
        run_block(model, x.flip(0), y, plan[0])
    foreign = {**noisy_result.records[0], "header": {**noisy_result.records[0]["header"], "seed": 5}}
    with pytest.raises(ValueError, match="seed is 0 and 5"):
        collect([*noisy_result.records, foreign])


def test_mistakes_are_explained():
    model, x, y = noisy(4)
    with pytest.raises(UserError, match=r"in \[0,1\]"):
        evaluate(model, x * 255, y)
    with pytest.raises(UserError, match="labels are in"):
        evaluate(model, x, y + 1)
    with pytest.raises(UserError, match="4 integers"):
        evaluate(model, x, y[:2])
    with pytest.raises(UserError, match=r"'quik'.*'quick'"):
        evaluate(model, x, y, "quik")
    with pytest.raises(UserError, match="depends on the defence"):
        evaluate(model, x, y, "paper")
    targeted = Suite(name="targeted", attacks=(AttackItem(attack="torchattacks_apgdt"),))
    with pytest.raises(UserError, match="no attack of suite 'targeted' works with 2 classes"):
        evaluate(model, x, y, targeted)


def test_rows_of_correctness_survive_packing():
    matrix = np.random.default_rng(0).random((5, 37)) < 0.5
    assert (unpack_rows(pack_rows(matrix), 37) == matrix).all()


def test_attacks_on_all_draws_are_planned_where_draws_can_be_enumerated():
    suite = Suite(
        name="mine",
        attacks=(AttackItem(attack="fgsm"), AttackItem(attack="pgd", parameters={"steps": 2}, num_draws=512, models="finite")),
    )
    x, y = two_classes(6)

    def planned(model, **options):
        return [task.item.name for task in plan_blocks(model, x, y, suite, **options) if task.kind == "attack"]

    members = torch.randn((3, 2, 64), generator=torch.Generator().manual_seed(1))
    assert planned(Choice(members)) == ["fgsm", "pgd"]
    assert planned(Choice(members), num_draws=2) == ["fgsm"], "then draws are sampled"
    assert planned(MultiplicativeNoise(pattern(), 0.3)) == ["fgsm"]
    assert planned(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()) == ["fgsm"]
    record = next(r for r in evaluate(Choice(members), x, y, suite).records if r["header"]["item"] and r["header"]["item"]["name"] == "pgd")
    assert record["block"]["num_backward"] == 2 * 3, "two steps, each the exact mean over three members"


def test_suites_extend_each_other(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: quick\nnum_samples: 50\nscoring: {num_evaluation_draws: 7}\nattacks:\n"
        "  - {name: pgd_20, attack: pgd, parameters: {steps: 40, step_size: 1/255}, protocols: [T1]}\n"
        "  - {name: margin, attack: apgd_margin}\n"
    )
    suite = load_suite(path)
    assert (suite.name, suite.num_samples, suite.scoring.num_evaluation_draws) == ("mine", 50, 7)
    assert suite.scoring.num_selection_draws == load_suite("quick").scoring.num_selection_draws
    assert [item.name for item in suite.attacks] == [*(item.name for item in load_suite("quick").attacks), "margin"]
    assert suite.attacks[1].parameters["steps"] == 40
    path.write_text("extends: quick\nattacks: [{attack: pgd, parameters: {step: 3}}]\n")
    with pytest.raises(UserError, match=r"mine.yaml.*no parameter 'step'"):
        load_suite(path)
    path.write_text("attacks: [{attack: pgd, protocols: [T9]}]\n")
    with pytest.raises(UserError, match="protocols"):
        load_suite(path)
    path.write_text("extends: quikc\n")
    with pytest.raises(UserError, match="'quick'"):
        load_suite(path)
    with pytest.raises(UserError, match="cannot read"):
        load_suite(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("defence", "expected"),
    [("ctrw", "paper_ctrw"), ("rna", "paper_rna"), ("dcs", "paper_dcs"), ("ps_red", "paper_red"), ("rat", "paper_rat")],
)
def test_paper_suite_follows_the_defence(defence, expected):
    suite = load_suite("paper", defence)
    assert suite.name == expected
    assert all(item.protocols == ("T0",) for item in suite.attacks)
