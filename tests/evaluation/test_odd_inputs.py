"""Models, images and labels as people have them: each evaluation ends in a result or in one sentence."""

import math
from dataclasses import replace

import pytest
import torch
from evaluation_toys import NUM_CLASSES, NUM_IMAGES, SMALL_SUITE, Wrapped, classifier, labelled_by
from torch import Tensor, nn

from analysis.evaluate import evaluate
from analysis.evaluation.suites import AttackItem, Suite, load_suite
from analysis.reporting.conclusion import headline_note, to_markdown
from analysis.reporting.report import render_html
from analysis.result import collect
from models.errors import UserError
from models.threat_model import ThreatModel

THREAT = ThreatModel(epsilon=0.1)


def data(count=NUM_IMAGES):
    return labelled_by(classifier(NUM_CLASSES), count)


class WithExtraState(Wrapped):
    extra: object = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


class IntegerFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.version = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.network = classifier(NUM_CLASSES)

    def forward(self, x):
        return self.network(x)


def same(network, x):
    return network(x)


PLAIN_MODELS = {
    "tuple": lambda: Wrapped(lambda network, x: (network(x), x.mean())),
    "dictionary": lambda: Wrapped(lambda network, x: {"features": x, "logits": network(x)}),
    "only entry": lambda: Wrapped(lambda network, x: {"scores": network(x)}),
    "integer first": IntegerFirst,
    "extra state": lambda: WithExtraState(same),
}

PLAIN_DATA = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "list of tensors": lambda x, y: (list(x), [int(label) for label in y]),
    "requires a gradient": lambda x, y: (x.clone().requires_grad_(), y),
    "small integers": lambda x, y: (x, y.to(torch.uint8)),
}


def samples(result):
    """What was measured of each sample, but not of which model."""
    return [record["samples"]["num_correct"] for record in result.records]


@pytest.fixture(scope="module")
def plain_result():
    return evaluate(classifier(NUM_CLASSES), *data(), SMALL_SUITE, threat_model=THREAT)


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_a_model_whose_meaning_is_plain_has_the_numbers_of_the_plain_one(kind, plain_result):
    result = evaluate(PLAIN_MODELS[kind](), *data(), SMALL_SUITE, threat_model=THREAT)
    assert samples(result) == samples(plain_result)
    assert not result.failed


@pytest.mark.parametrize("kind", PLAIN_DATA)
def test_data_whose_meaning_is_plain_have_the_numbers_of_tensors(kind, plain_result):
    x, y = PLAIN_DATA[kind](*data())
    assert samples(evaluate(classifier(NUM_CLASSES), x, y, SMALL_SUITE, threat_model=THREAT)) == samples(plain_result)


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_changes_nothing(made_inside, plain_result):
    model, (x, y) = classifier(NUM_CLASSES), data()
    with torch.inference_mode():
        if made_inside:
            model, (x, y) = classifier(NUM_CLASSES), data()
        result = evaluate(model, x, y, SMALL_SUITE, threat_model=THREAT)
    assert samples(result) == samples(plain_result)


def test_extra_state_is_part_of_a_models_identity():
    models = [WithExtraState(same) for _ in range(3)]
    models[1].extra, models[2].extra = {"levels": 1}, {"levels": torch.tensor([16])}
    assert len({evaluate(model, *data(4), SMALL_SUITE).header["checkpoint"] for model in models}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_a_model_in_half_precision_stay_within_the_radius(dtype, norm):
    model = classifier(NUM_CLASSES).to(dtype)
    result = evaluate(model, *data(), SMALL_SUITE, threat_model=ThreatModel(norm=norm, epsilon=0.1))
    assert next(verdict for verdict in result.verdicts if verdict.id == "C3").status == "PASS"
    assert result.headline.value <= result.clean.value


def said_everywhere(result, text):
    """Whether a remark is in the result, in its records, and on its page."""
    again = collect(result.records)
    texts = [*result.remarks, *again.remarks], to_markdown(result), render_html("model", again)
    found = {any(text in line for line in lines) if isinstance(lines, list) else text in lines for lines in texts}
    assert len(found) == 1
    return found.pop()


def test_pixels_that_rounding_left_outside_are_clipped_with_a_remark(caplog):
    x, y = data()
    result = evaluate(classifier(NUM_CLASSES), (x * 1.2 - 0.1).clamp(-1e-7, 1 + 1e-6), y, SMALL_SUITE, threat_model=THREAT)
    assert "clipped" in caplog.text and said_everywhere(result, "clipped")
    assert next(verdict for verdict in result.verdicts if verdict.id == "C3").status == "PASS"
    with pytest.raises(UserError, match=r"in \[0,1\]"):
        evaluate(classifier(NUM_CLASSES), x * 1.01, y, SMALL_SUITE)


def test_truth_values_are_two_classes_and_unused_classes_are_said(caplog):
    x, y = data()
    result = evaluate(classifier(NUM_CLASSES), x, y == y[0], SMALL_SUITE, threat_model=THREAT)
    assert "True is class 1" in caplog.text and "5 classes, labels use 2" in caplog.text
    assert said_everywhere(result, "True is class 1") and said_everywhere(result, "5 classes, labels use 2")
    assert result.finished
    plain = evaluate(classifier(NUM_CLASSES), x, y, SMALL_SUITE, threat_model=THREAT)
    assert not said_everywhere(plain, "True is class 1")


def test_attacks_that_a_suite_leaves_out_for_few_classes_are_named_in_the_result():
    x, y = data()
    suite = Suite(name="mine", attacks=(AttackItem(attack="fgsm"), AttackItem(attack="apgd_targeted", parameters={"steps": 2})))
    result = evaluate(classifier(2), x, y % 2, suite, threat_model=THREAT)
    assert said_everywhere(result, "takes its place")


def test_a_model_that_is_no_module_is_one_sentence():
    x, y = data()
    with pytest.raises(UserError, match=r"torch\.nn\.Module .* not function"):
        evaluate(lambda x: x.flatten(1), x, y, SMALL_SUITE)


SENTENCES = {
    "one class": (lambda network, x: network(x)[:, :1], "nothing can be misclassified"),
    "not a number": (lambda network, x: network(x) * math.nan, "NaN or infinite"),
    "infinite": (lambda network, x: network(x) * math.inf, "NaN or infinite"),
    "no logits": (lambda network, x: "cat", "must return logits"),
    "two entries": (lambda network, x: {"a": network(x), "b": network(x)}, "'logits'"),
    "labels": (lambda network, x: network(x).argmax(1), r"\(B, K\)"),
    "raises": (lambda network, x: network(x[:, :, :3]), "cannot be run on images of shape"),
    "batches of one": (lambda network, x: network(x).view(1, -1), "logits"),
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_what_cannot_be_judged_is_one_sentence(kind):
    answer, words = SENTENCES[kind]
    with pytest.raises(UserError, match=words):
        evaluate(Wrapped(answer), *data(), SMALL_SUITE)


def test_an_answer_of_nan_is_never_right():
    def broken_beside_the_images(network, x):
        logits = network(x)
        return torch.where((x * 64 % 1 == 0).flatten(1).all(1)[:, None], logits, torch.full_like(logits, math.nan))

    x, _ = data()
    x = (x * 64).round() / 64
    y = torch.zeros(len(x), dtype=torch.long)  # where the largest of nothing but NaN is found
    result = evaluate(Wrapped(broken_beside_the_images), x, y, SMALL_SUITE, threat_model=THREAT)
    attacked = [row for row in result.rows if row.attack == "apgd_ce"]
    assert attacked[0].estimate.value == 0


@pytest.mark.parametrize("name", ["pgd@5, ours", "", " pgd", "pgd ", "a/b", "a:b", "ä", "clean", "x" * 81, "a\nb", "100%"])
def test_a_name_that_no_metric_can_have_is_refused_before_anything_runs(name, tmp_path):
    with pytest.raises(ValueError, match="an attack's name is"):
        AttackItem(name=name, attack="pgd")
    path = tmp_path / "own.yaml"
    path.write_text(f"attacks: [{{name: {name!r}, attack: pgd}}]\n")
    with pytest.raises(UserError, match="name"):
        load_suite(path)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_suite_chooses_what_fits_the_number_of_classes(num_classes, caplog):
    network = classifier(num_classes)
    full = load_suite("full")
    small = [
        item.model_copy(update={"parameters": {**item.parameters, "steps": 2}, "deterministic_parameters": {}})
        for item in full.attacks
        if "steps" in item.parameters
    ]
    suite = full.model_copy(update={"attacks": tuple(small), "studies": None})
    result = evaluate(network, *labelled_by(network, 8), suite, threat_model=THREAT)
    entries = {row.entry for row in result.rows}
    assert "apgd_targeted" not in entries and "apgd_margin" in entries
    assert ("apgd_dlr" in entries) == (num_classes == 3)
    assert "takes its place" in caplog.text


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "aggregated_momentum"])
def test_a_ratio_of_logits_gives_way_to_the_margin_on_two_classes(attack):
    network = classifier(2)
    item = AttackItem(attack=attack, parameters={"loss": "difference_of_logits_ratio"})
    own = Suite(name="own", attacks=(item,))
    result = evaluate(network, *labelled_by(network, 6), own, threat_model=THREAT)
    assert result.records[-1]["header"]["item"]["parameters"]["loss"] == "margin"


@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_tiny_logits_mark_a_suite_whose_attacks_all_depend_on_the_scale(scale):
    model = Wrapped(lambda network, x: scale * network(x))
    alone = SMALL_SUITE.model_copy(update={"attacks": SMALL_SUITE.attacks[:1]})

    def outputs(suite, network=model):
        result = evaluate(network, *data(), suite, threat_model=THREAT)
        return next(verdict for verdict in result.verdicts if verdict.id == "C18")

    assert outputs(alone).status == "FAIL" and outputs(alone).attacks == ("apgd_ce",)
    assert outputs(SMALL_SUITE).status == "FAIL", "square is no substitute for a gradient that points somewhere"
    on_margin = SMALL_SUITE.model_copy(
        update={"attacks": (*SMALL_SUITE.attacks, AttackItem(attack="apgd_margin", parameters={"steps": 5}))}
    )
    assert outputs(on_margin).status == "WARN"
    assert outputs(alone, classifier(NUM_CLASSES)).status == "PASS"


@pytest.mark.parametrize("seed", range(3))
def test_cw_on_two_classes_does_not_depend_on_their_order(seed):
    pytest.importorskip("torchattacks")
    network = classifier(2, seed=seed)
    x, y = labelled_by(network, 12)
    suite = Suite(name="cw", attacks=(AttackItem(attack="torchattacks_cw", parameters={"c": 1, "steps": 20}),))

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).flip(1)

    accuracies = [
        next(row.estimate.value for row in evaluate(model, x, labels, suite).rows if row.attack == "torchattacks_cw")
        for model, labels in ((network, y), (Swapped(), 1 - y))
    ]
    assert accuracies[0] == accuracies[1]


def test_a_headline_above_a_listed_attack_is_explained(plain_result):
    lowest = min(row.estimate.value for row in plain_result.rows)
    assert headline_note(plain_result) == "" or plain_result.headline.value > lowest
    above = replace(plain_result, headline=replace(plain_result.headline, value=lowest + 0.05))
    assert "luck in choosing" in headline_note(above)
    part = replace(above, headline=replace(above.headline, num_samples=above.headline.num_samples + 1))
    assert "of the" in headline_note(part) and "luck" not in headline_note(part)
    for text in (headline_note(above), to_markdown(above), render_html("model", above)):
        assert f"alone is at {100 * lowest:.1f} %" in text
